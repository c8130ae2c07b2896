"""A short program that outlives the emulator for a moment, to end what it has left running.

`guarding.py` starts one and tells it over a pipe which process groups live: `+PID` and `-PID`, a
line each. When the pipe ends, however the emulator died, it kills the groups that are left. Given
the path of a container engine's command and a label, it then removes every container with that
label, once a second pipe has ended, which each call inherits that makes one. The line `done` says
that nothing is being made any more: one look is enough then.
Standard library only: it runs without site-packages. Not for import.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

SETTLE_SECONDS = 3.0
"""How long no container may have come, if the emulator died while the engine was making one."""

PATIENCE_SECONDS = 30.0
"""How long an engine that does not answer is asked, if the emulator died."""

PATIENCE_WHEN_DONE_SECONDS = 2.0
"""The same where somebody waits for the emulator to end."""

LOOK_SECONDS = 0.2
CALL_SECONDS = 30.0


def watch(making: int, engine: list[str]) -> None:
    """Read the pipe to its end, then kill and remove."""
    alive: set[int] = set()
    done = False
    for line in sys.stdin:
        if line.strip() == "done":
            done = True
            continue
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
    if engine:
        command, label = engine
        if not done:
            # It is never written to: it can be read when the last call that had it is over.
            select.select([making], [], [], PATIENCE_SECONDS)
        patience = PATIENCE_WHEN_DONE_SECONDS if done else PATIENCE_SECONDS
        remove(command, label, settle=0.0 if done else SETTLE_SECONDS, patience=patience)


def remove(command: str, label: str, *, settle: float, patience: float) -> None:
    """Remove the containers with a label until none has been there for `settle` seconds."""
    none_since: float | None = None
    answered = time.monotonic()  # and did what it was asked for
    while True:
        try:
            found = call(command, "ps", "--all", "--quiet", "--filter", f"label={label}").split()
            if found:
                call(command, "rm", "--force", "--volumes", *found)
            answered = now = time.monotonic()
            none_since = None if found else none_since or now
            if none_since is not None and now - none_since >= settle:
                return
        except (OSError, subprocess.SubprocessError) as error:
            if time.monotonic() - answered > patience:
                words = getattr(error, "stderr", None) or str(error)
                sys.stderr.write(
                    f"containers of the emulator may be left, as {command} cannot remove them: "
                    f"{words.strip()}\nTo remove them later: {command} rm --force "
                    f"$({command} ps --all --quiet --filter label={label})\n"
                )
                return
        time.sleep(LOOK_SECONDS)


def call(*words: str) -> str:
    """Call the engine's command; returns what it says."""
    return subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=CALL_SECONDS,
        check=True,
    ).stdout


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2:])
