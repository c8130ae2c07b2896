"""Run the rows that are named, or all of them, and print figures, bars, machine and load."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

from benchmarks.cloud_run import ROWS as CLOUD_RUN
from benchmarks.compute_api import api
from benchmarks.receipts import receipts
from benchmarks.rows import ROWS as CORE
from benchmarks.stack import stack

ROWS = {**CORE, "api": api, "receipts": receipts, **CLOUD_RUN}


def machine() -> str:
    """Say on what this was measured."""
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    return (
        f"{os.cpu_count()} cores of {cpu}, {pages / 2**30:.0f} GiB, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}, load {load}"
    )


def main() -> int:
    """Measure; 1 if a bar was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help=f"of {', '.join(ROWS)}")
    names = parser.parse_args().rows or list(ROWS)
    print(machine(), flush=True)
    missed = 0
    for name in names:
        with stack() as servers:
            for figure in ROWS[name](servers):
                word = "≥" if figure.at_least else "≤"
                mark = "ok  " if figure.met else "MISS"
                missed += not figure.met
                print(
                    f"{mark} {figure.what:<52} {figure.measured:9.2f} {figure.unit:<9} "
                    f"(bar {word} {figure.bar:g})  {figure.note}",
                    flush=True,
                )
    print(machine(), flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
