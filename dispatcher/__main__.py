"""Where the command starts, as `dispatcher` and as `python -m dispatcher`.

Nothing of the command is imported before ^C has a meaning: the imports take most of the first half
second.
"""

from __future__ import annotations

import sys

__all__ = ["main"]

INTERRUPTED = 130


def main() -> None:
    """Run the command line of this process."""
    try:
        from dispatcher import cli  # noqa: PLC0415 - as said above

        cli.main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
