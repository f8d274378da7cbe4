"""How a command ends: well with 0, on bad input with one line and 2, on a bug with a traceback and 1.

A training that was asked to end (SIGTERM, SIGUSR1) ends with 75, "try again later" in sysexits.h: 0 would let a script
go on to the next step with a model that is not done.
"""

import _thread
import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from valle.utils.errors import Unfinished, UserError

UNFINISHED = 75


def run(main: Callable[[Sequence[str]], object], argv: Sequence[str] | None = None) -> NoReturn:
    """Call `main(argv)`; turn a UserError into one line on stderr and exit code 2.

    `--debug` anywhere on the command line shows the traceback of a UserError too.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with _interruptions_heard():
            main(arguments)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Unfinished as reason:
        print(" ".join(str(reason).split()), file=sys.stderr)
        sys.exit(UNFINISHED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    sys.exit(0)


@contextlib.contextmanager
def _interruptions_heard() -> Iterator[None]:
    """Ctrl-C that comes while an object is cleared away, where Python drops exceptions, is raised once more."""
    before = sys.unraisablehook

    def hand_on(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            # Not at once: it would be raised, and dropped, in here.
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            before(unraisable)

    sys.unraisablehook = hand_on
    try:
        yield
    finally:
        sys.unraisablehook = before
