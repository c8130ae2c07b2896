"""Full names of resources, and the refusals that tell of one: there is none, or it has changed."""

from __future__ import annotations

import re
from typing import Final

from dispatcher.emulators.cloud_run.refusal import Code, Refused

__all__ = ["changed", "check_location", "location_of", "missing"]

LOCATION_PARTS: Final = 4
"""projects/P/locations/R."""


def location_of(name: str) -> str:
    """Return the `projects/…/locations/…` of a name."""
    return "/".join(name.split("/")[:LOCATION_PARTS])


def check_location(parent: str) -> None:
    """Refuse a parent that is no location (vendor: CreateJobRequest.parent)."""
    if not re.fullmatch(r"projects/[^/]+/locations/[^/]+", parent):
        raise Refused(
            Code.INVALID_ARGUMENT,
            f"parent: {parent!r} is invalid: projects/PROJECT/locations/REGION is expected.",
        )


def missing(kind: str, name: str) -> Refused:
    """Tell that there is no JOB, EXECUTION or TASK of that name (google/rpc/code.proto)."""
    _, project, _, region = [*name.split("/"), *[""] * LOCATION_PARTS][:LOCATION_PARTS]
    return Refused(
        Code.NOT_FOUND,
        f"Resource '{name.rpartition('/')[2]}' of kind '{kind}' in region '{region}' in project "
        f"'{project}' does not exist.",
    )


def changed(name: str) -> Refused:
    """Tell that the etag given is not the current one (vendor: Job.etag; google/rpc/code.proto)."""
    return Refused(Code.ABORTED, f"Conflict for resource '{name}': its etag has changed.")
