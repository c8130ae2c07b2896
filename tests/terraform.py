"""The Terraform set-ups of the examples, as tests read them. Nothing is planned or applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hcl2


def resources(example: Path) -> dict[str, dict[str, Any]]:
    """The resources of a set-up by their addresses, and its locals; texts without quotes."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key.strip('"'): plain(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return value.strip('"') if isinstance(value, str) else value

    with (example / "terraform" / "main.tf").open() as file:
        read = plain(hcl2.load(file))
    found = {
        f"{kind}.{name}": body
        for block in read["resource"]
        for kind, named in block.items()
        for name, body in named.items()
    }
    return {**found, "locals": {k: v for block in read.get("locals", ()) for k, v in block.items()}}


def granted(example: Path) -> frozenset[str]:
    """What the workers may do with Cloud Run and Logging, by all of their roles."""
    kinds = "google_project_iam_custom_role."
    roles = [body for name, body in resources(example).items() if name.startswith(kinds)]
    return frozenset(one for body in roles for one in body["permissions"])
