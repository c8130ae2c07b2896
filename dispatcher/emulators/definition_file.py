"""Reads the file of `dispatcher emulate cloud-run --definitions`: Cloud Run jobs that are there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dispatcher.errors import ConfigurationError
from dispatcher.problems import problems_of, shown

__all__ = ["read_definitions"]

NAME_PARTS: Final = ("projects", "locations", "jobs")


class _Definition(BaseModel):
    """A Cloud Run job as the file of --definitions has it: the arguments of `World.define`.

    What Cloud Run itself refuses, such as a reserved variable, is left to the emulator.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    image: Annotated[str, Field(min_length=1)] = "image"
    container: str = ""
    command: list[str] = []
    args: list[str] = []
    env: dict[str, str] = {}
    limits: dict[Literal["cpu", "memory"], str] = {}
    parallelism: Annotated[int, Field(ge=0)] = 0
    max_retries: Annotated[int, Field(ge=0)] = 0
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600
    task_count: Annotated[int, Field(ge=1)] = 1


def read_definitions(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """Read the jobs of a file: for each name the arguments of `World.define`.

    Raises:
        ConfigurationError: it cannot be read, or something in it is wrong.
    """
    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path}: the jobs cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise ConfigurationError(f"{path}: expected projects/P/locations/R/jobs/J: {{image: ...}}")
    return {str(name): _definition(path, str(name), one) for name, one in given.items()}


def _definition(path: Path, name: str, given: object) -> Mapping[str, Any]:
    """Read the entry of one job.

    Raises:
        ConfigurationError: it is none; each thing that is wrong is named.
    """
    parts = name.split("/")
    if len(parts) != 2 * len(NAME_PARTS) or tuple(parts[::2]) != NAME_PARTS:
        raise ConfigurationError(f"{path}: {name!r} is not projects/P/locations/R/jobs/J")
    if not isinstance(given, dict):
        keys = ", ".join(_Definition.model_fields)
        raise ConfigurationError(
            f"{path}: {name} is {shown(given)}; it must be a mapping, such as {{image: app}}; "
            f"allowed: {keys}"
        )
    try:
        return _Definition.model_validate(given).model_dump(exclude_unset=True)
    except ValidationError as error:
        told = "; ".join(map(str, problems_of(error, _Definition)))
        raise ConfigurationError(f"{path}: {name}: {told}") from error
