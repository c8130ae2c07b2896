"""The `DISPATCHER_*` settings of one process, from arguments, the environment or a standalone.

They are parsed once into a frozen value; everything that is wrong is told at once. What targets and
jobs there are is `config.py`'s.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import logging
import os
import platform
from collections.abc import Mapping
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dispatcher.durations import Duration, format_duration
from dispatcher.errors import ConfigurationError
from dispatcher.problems import Problem, Problems, problems_of

__all__ = ["Settings", "load_settings", "misspelt_variables", "standalone_file"]

_PREFIX: Final = "DISPATCHER_"

NEARLY: Final = 0.75
"""How much of a name must be as in another one to be taken for it, misspelt."""

_POSTGRES: Final = "postgresql+psycopg"
_DATABASE_FORM: Final = "must be a URL such as postgresql://user:password@host:5432/database"
_BROKER_FORM: Final = (
    "must be a URL such as redis://host:6379/0, rediss://… or redis+socket:///path"
)
_STORAGE_FORM: Final = (
    "must be a URL such as file:///absolute/path, s3://bucket/path or gs://bucket"
)


def _read_database_url(url: str) -> str:
    scheme, _, rest = url.partition("://")
    if scheme not in {"postgresql", "postgres", _POSTGRES} or not _can_be_split(url) or not rest:
        raise ValueError(_DATABASE_FORM)
    return f"{_POSTGRES}://{rest}"


def _check_broker_url(url: str) -> str:
    schemes = {"redis", "rediss", "redis+socket", "filesystem", "memory"}
    if "://" not in url or not _can_be_split(url) or urlsplit(url).scheme not in schemes:
        raise ValueError(_BROKER_FORM)
    return url


def _check_storage_url(url: str) -> str:
    parts = urlsplit(url) if _can_be_split(url) else urlsplit("")
    place = {"file": parts.path[1:] and not parts.netloc, "s3": parts.netloc, "gs": parts.netloc}
    if "://" not in url or not place.get(parts.scheme):
        raise ValueError(_STORAGE_FORM)
    return url


def _can_be_split(url: str) -> bool:
    try:
        urlsplit(url).port  # noqa: B018 - reading the port is what checks it
    except ValueError:
        return False
    return True


def _read_level(level: object) -> object:
    return level.upper() if isinstance(level, str) else level


def _user_at_host() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = f"uid{os.getuid()}"
    return f"{user}@{platform.node()}"


Level: TypeAlias = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


class Settings(BaseSettings):
    """The `DISPATCHER_*` variables of one process; use `load_settings` for readable errors."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    database_url: Annotated[str, AfterValidator(_read_database_url)] = Field(repr=False)
    """Postgres, always as postgresql+psycopg://…"""

    broker_url: Annotated[str, AfterValidator(_check_broker_url)] | None = Field(None, repr=False)
    """Where Celery's messages go; None on a machine that only writes to the database."""

    storage_url: Annotated[str, AfterValidator(_check_storage_url)] | None = Field(None, repr=False)
    """Where input documents, results and claims lie; containers must reach it too."""

    storage_keep: Duration = timedelta(days=14)
    """How long they are kept; longer than any batch may take."""

    jobs: Annotated[str, Field(min_length=1)] | None = None
    """The targets and jobs: the path of a YAML file, or "module" or "module:attribute"."""

    actor: Annotated[str, Field(min_length=1)] = Field(default_factory=_user_at_host)
    """Who is named in events; "user@host" unless given."""

    log_level: Annotated[Level, BeforeValidator(_read_level)] = "INFO"
    log_format: Literal["console", "json"] = "console"

    launch_concurrency: Annotated[int, Field(ge=1, le=256)] = 16
    """Launches that one worker has open at once, at most."""

    sweep_interval: Duration = timedelta(seconds=2)
    heartbeat: Duration = timedelta(seconds=5)
    """How often a worker says that it lives."""

    lease: Duration = timedelta(seconds=15)
    """How long a target stays a worker's after its last heartbeat."""

    call_window: Duration = timedelta(seconds=15)
    """The longest from the commit of an intent to the call that it means."""

    pool_size: Annotated[int, Field(ge=1, le=100)] = 8
    """Database connections of one process, at most."""

    @model_validator(mode="after")
    def _check_lease(self) -> Settings:
        if self.lease <= self.heartbeat:
            beat = f"longer than the heartbeat, {format_duration(self.heartbeat)}"
            text = f'is "{format_duration(self.lease)}"; it must be {beat}'
            raise Problems([Problem(("lease",), text)])
        return self

    @property
    def level(self) -> int:
        """`log_level` as the number of the `logging` module."""
        return logging.getLevelNamesMapping()[self.log_level]


def load_settings(**overrides: Any) -> Settings:
    """Read the settings: overrides first, then the environment, then a running standalone.

    An override of None counts as not given. The standalone is asked only if nothing else names a
    database.

    Raises:
        ConfigurationError: all that is wrong, one line each.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    origins = dict.fromkeys(given, "the argument ")
    if "database_url" not in given and not _in_environment("database_url"):
        path, defaults = _standalone_defaults()
        for name, value in defaults.items():
            if name not in given and not _in_environment(name):
                given[name], origins[name] = value, f"{path}: "
    try:
        return Settings(**given)
    except ValidationError as error:
        problems = problems_of(error, Settings)
        # Without a cause: pydantic's own text may show a password.
        raise ConfigurationError("\n".join(_settings_line(p, origins) for p in problems)) from None


def misspelt_variables() -> list[str]:
    """Say of each variable that is none of ours and nearly has the name of one, which was meant.

    Others that begin alike are left alone: an orchestrator makes some of a service of our name.
    """
    known = {f"{_PREFIX}{name.upper()}" for name in (*Settings.model_fields, "home")}
    said = []
    for name in sorted(os.environ):
        if not name.upper().startswith(_PREFIX) or name.upper() in known:
            continue
        rest = [one.removeprefix(_PREFIX) for one in known]
        close = get_close_matches(name.upper().removeprefix(_PREFIX), rest, n=1, cutoff=NEARLY)
        said += [
            f"{name} is no setting and is ignored: did you mean {_PREFIX}{one}?" for one in close
        ]
    return said


def standalone_file() -> Path:
    """Say where `dispatcher standalone` tells other processes of itself.

    It is `.dispatcher/standalone.json` in the directory `DISPATCHER_HOME`, or in the current one.
    """
    return Path(os.environ.get(f"{_PREFIX}HOME") or ".", ".dispatcher", "standalone.json")


def _in_environment(name: str) -> bool:
    return any(
        value and variable.upper() == f"{_PREFIX}{name.upper()}"
        for variable, value in os.environ.items()
    )


def _standalone_defaults() -> tuple[Path, dict[str, Any]]:
    path = standalone_file()
    try:
        told = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigurationError(
            f"DISPATCHER_DATABASE_URL is not set, and no standalone is running here (no {path}); "
            "set it, e.g. to postgresql://user:password@host:5432/database, "
            "or run `dispatcher standalone`"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error}); start `dispatcher standalone` again, "
            "or set DISPATCHER_DATABASE_URL"
        ) from error
    if not isinstance(told, dict) or not told.get("database_url"):
        raise ConfigurationError(
            f"{path} names no database_url; start `dispatcher standalone` again, "
            "or set DISPATCHER_DATABASE_URL"
        )
    _refuse_a_gone_one(path, told.get("pid"))
    names = ("database_url", "broker_url", "storage_url", "jobs")
    return path, {name: told[name] for name in names if told.get(name) is not None}


def _refuse_a_gone_one(path: Path, pid: object) -> None:
    """Say that a standalone has died, if it was killed and so left its file."""
    if not isinstance(pid, int) or pid <= 0:
        return  # it does not say; whether it lives, its database will tell
    try:
        os.kill(pid, 0)
    except PermissionError:
        return  # it lives, as another user's
    except ProcessLookupError:
        if _is_locked(path.with_name("lock")):
            return  # it lives, where processes are numbered anew, as in a container
    else:
        return
    raise ConfigurationError(
        f"the standalone that wrote {path} is gone (process {pid}); start `dispatcher standalone` "
        "there again, or set DISPATCHER_DATABASE_URL"
    )


def _is_locked(path: Path) -> bool:
    """Whether a standalone holds the lock of its directory."""
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or none that we may open: nothing speaks for a live one
        return False
    return False


def _settings_line(problem: Problem, origins: Mapping[str, str]) -> str:
    name = str(problem.path[0])
    origin = origins.get(name)
    field = f"{_PREFIX}{name.upper()}" if origin is None else f"{origin}{name}"
    return f"{field} {problem.text}"
