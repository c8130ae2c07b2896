"""The long computation: counts the primes, or pairs of primes, in blocks of numbers.

It runs in any image with Python: `container.py` of the dispatcher lies beside it there, and tells
it its blocks and takes what it finds. What it counts is said by its arguments: `--gap=2` counts the
primes p for which p + 2 is one too. LOG_LEVEL says how much it tells.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from math import isqrt

try:
    from dispatcher import container
except ImportError:  # in the image, where it is a file
    import container  # type: ignore[import-not-found,no-redef]  # as above

BAD_USAGE = 64
BAD_INPUT = 65
"""Exit codes that say: trying again will not help; `exit_codes` in jobs.yaml knows them."""

SEGMENT = 1_000_000
"""Numbers that are looked at in one go, a byte each."""

log = logging.getLogger("count_primes")


def sieve(low: int, high: int) -> bytearray:
    """Mark the primes from low up to and without high: 1 at place p - low."""
    marks = bytearray([1]) * max(0, high - low)
    for number in range(low, min(2, high)):
        marks[number - low] = 0
    root = isqrt(max(0, high - 1))
    small = [2 + p for p, mark in enumerate(sieve(2, root + 1)) if mark] if root > 1 else []
    for prime in small:
        start = max(prime * prime, (low + prime - 1) // prime * prime) - low
        marks[start::prime] = bytes(len(range(start, len(marks), prime)))
    return marks


def count(low: int, high: int, gap: int) -> int:
    """Count the primes p with low <= p < high for which p + gap is a prime too."""
    found = 0
    for start in range(low, high, SEGMENT):
        end = min(start + SEGMENT, high)
        marks = sieve(start, end + gap)
        if gap == 0:
            found += marks.count(1)
        else:
            found += sum(map(int.__and__, marks[: end - start], marks[gap:]))
    return found


def work(gap: int) -> None:
    """Count in each block of this task; what is done is kept if it is stopped in the middle."""
    with container.run() as task:
        for item in task.items:
            began = time.monotonic()
            low, high = item["from"], item["to"]
            found = count(low, high, gap)
            task.report(item, ok=True, output={"count": found})
            log.info("%d to %d: %d, in %.2f s", low, high, found, time.monotonic() - began)


def main() -> int:
    """Do the work of one task; return the exit code."""
    parser = argparse.ArgumentParser(description="Count primes in the blocks that it is given.")
    parser.add_argument("--gap", type=int, choices=[0, 2, 4, 6], default=0)
    try:
        gap = parser.parse_args().gap
    except SystemExit as end:
        return BAD_USAGE if end.code else 0
    level = os.environ.get("LOG_LEVEL", "info").upper()
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    try:
        work(gap)
    except (container.InputError, KeyError, TypeError) as error:
        log.error("bad input: %r", error)  # noqa: TRY400 - the error says it
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
