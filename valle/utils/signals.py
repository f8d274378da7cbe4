"""Being asked to end: a cluster sends SIGTERM or SIGUSR1 some time before it takes the machine away."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """`with StopRequest() as stop:` notes down SIGTERM and SIGUSR1 in `stop.name`, and the process goes on.

    Outside of the main thread, where Python takes no signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def leave_to_parent(worker: int = 0) -> None:
    """In a process that reads data for another: a cluster signals to all, and the other still needs this one."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
