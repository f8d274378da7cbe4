"""How commands end."""

import subprocess
import sys

import pytest

INTERRUPTED = """
import time
from valle.utils.command import run

class Kept:
    def __del__(self):
        raise {error}("in between")

def main(argv):
    kept = Kept()
    del kept
    time.sleep({wait})
    print("went on")

run(main, [])
"""


@pytest.mark.parametrize("error,code", [("KeyboardInterrupt", 130), ("ValueError", 0)])
def test_an_interruption_is_heard_where_python_drops_exceptions(error, code):
    program = INTERRUPTED.format(error=error, wait=5 if code else 0.1)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    heard = code == 130
    assert ("went on" in done.stdout) != heard
    assert ("interrupted" in done.stderr) == heard and ("in between" in done.stderr) != heard
