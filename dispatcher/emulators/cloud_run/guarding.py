"""`Guard`: the emulator's end of the pipe to `process_guard.py`, which ends what it leaves behind.

It is started with the first attempt, and lives until the emulator has ended, however that ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

__all__ = ["Guard"]

PROGRAM: Final = Path(__file__).with_name("process_guard.py")


class Guard:
    """Told of the process groups that live. May be used from any thread.

    Args:
        words: the path of a container engine's command and a label, if containers with that label
            are to be removed too.
    """

    def __init__(self, *words: str) -> None:
        self._words = words
        self._lock = threading.Lock()
        self._popen: subprocess.Popen[bytes] | None = None
        self._making: int | None = None

    def open(self) -> None:
        """Start the program, if it has not been."""
        with self._lock:
            if self._popen is None:
                its_end, self._making = os.pipe()
                self._popen = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(PROGRAM), str(its_end), *self._words],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,  # who reads the emulator's must not wait for it
                    pass_fds=(its_end,),
                    start_new_session=True,
                )
                os.close(its_end)

    @property
    def making(self) -> tuple[int, ...]:
        """The file that a call inherits that makes a container: what is left is sought after it."""
        with self._lock:
            return () if self._making is None else (self._making,)

    def watch(self, group: int) -> None:
        """Have a process group killed if the emulator dies."""
        self._tell(f"+{group}")

    def forget(self, group: int) -> None:
        """Leave a process group alone: it has ended."""
        self._tell(f"-{group}")

    def close(self) -> None:
        """Have it look for what is left, now that nothing is started any more; wait for it."""
        self._tell("done")
        with self._lock:
            popen, self._popen = self._popen, None
            making, self._making = self._making, None
        if popen is not None:
            popen.communicate()
        if making is not None:
            os.close(making)

    def _tell(self, word: str) -> None:
        with self._lock:
            if self._popen is None or self._popen.stdin is None:
                return
            try:
                self._popen.stdin.write(f"{word}\n".encode())
                self._popen.stdin.flush()
            except BrokenPipeError:
                # Somebody has killed it: tasks go on, and end with the emulator unless that is
                # killed too.
                return
