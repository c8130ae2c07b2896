"""An image's program as it was before: it reads IDS, and knows nothing of any dispatcher.

For each id of IDS it adds up the numbers of DATA/in/ID.csv, one a line, and writes the total to
DATA/out/ID.json. It does all that it can, names what it cannot on stderr, and ends with 1 then.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

BAD_USAGE = 64
"""The exit code that says: trying again will not help; `exit_codes` in jobs.yaml knows it."""


def total(data: Path, name: str) -> None:
    """Write the total of one id; half a file never has its name.

    Raises:
        OSError: its numbers are not there, or the total cannot be written.
        ValueError: a line is no number.
    """
    with (data / "in" / f"{name}.csv").open(newline="") as source:
        found = sum(int(row[0]) for row in csv.reader(source) if row)
    out = data / "out"
    out.mkdir(parents=True, exist_ok=True)
    draft = out / f".{name}.{os.getpid()}.part"
    draft.write_text(json.dumps({"id": name, "total": found}) + "\n")
    draft.replace(out / f"{name}.json")


def main() -> int:
    """Go through the ids; return the exit code."""
    ids = [name for name in os.environ.get("IDS", "").split(",") if name]
    if not ids:
        print("IDS is empty or not set", file=sys.stderr)
        return BAD_USAGE
    data = Path(os.environ.get("DATA", "/data"))
    failed = 0
    for name in ids:
        try:
            total(data, name)
        except (OSError, ValueError) as error:
            print(f"id {name}: {error}", file=sys.stderr)
            failed += 1
        else:
            print(f"id {name}: done")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
