"""A short program that outlives the emulator for a moment, to end what it has left running.

`processes.py` starts one and tells it over a pipe which process groups live: `+PID` and `-PID`, a
line each. When the pipe ends, however the emulator died, it kills the groups that are left.
Standard library only: it runs without site-packages. Not for import.
"""

from __future__ import annotations

import os
import signal
import sys


def watch() -> None:
    """Read the pipe to its end, then kill."""
    alive: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line[0] == "+":
            alive.add(group)
        else:
            alive.discard(group)
    for group in alive:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has ended meanwhile


if __name__ == "__main__":
    watch()
