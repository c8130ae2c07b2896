"""A short program that ties another program to the life of the process that started it.

`servers.py` starts it as `python -I -S leash.py SIGNAL PARENT ACCOUNT -- PROGRAM ARGUMENT …`. It
asks the kernel for SIGNAL at the death of PARENT, gives up root for ACCOUNT ("uid:gid", or "-" to
stay), and becomes PROGRAM. A `preexec_fn` would do the same in a forked child of a process with
threads, which can deadlock and which Python 3.12 warns of; here it happens in a fresh interpreter.
Standard library only: it runs without site-packages. Not for import.

Where the kernel has no such wish to fulfil (macOS), a hard death of the parent leaves the child.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1
COMMAND_AT = 5
CANNOT_BE_RUN = 127
"""What a shell says of a program that it cannot run."""


def become(arguments: list[str]) -> None:
    """Drop privileges, tie the process to its parent, and turn into the program."""
    signal_number, parent, account, command = (
        int(arguments[1]),
        int(arguments[2]),
        arguments[3],
        arguments[COMMAND_AT:],
    )
    if account != "-":
        uid, gid = (int(number) for number in account.split(":"))
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    # After the change of user: the kernel forgets the wish when credentials change.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    # The parent may have died before the wish was heard.
    if os.getppid() != parent:
        sys.exit(f"{command[0]} was not started: the process {parent} that wanted it has died")
    try:
        os.execvp(command[0], command)  # noqa: S606 - becoming another program is the purpose
    except OSError as error:
        sys.stderr.write(f"{command[0]} cannot be run: {error.strerror}\n")
        sys.exit(CANNOT_BE_RUN)


if __name__ == "__main__":
    become(sys.argv)
