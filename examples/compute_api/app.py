"""The API: HTTP over `computations.py`, and nothing of the dispatcher in a request's way but rows.

    uvicorn --factory examples.compute_api.app:create

Settings: those of the dispatcher (DISPATCHER_DATABASE_URL, DISPATCHER_JOBS), and COMPUTE_TOKENS, a
JSON object of bearer tokens and the tenants that they stand for. `python -m
examples.compute_api.app` makes the application's table.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from dispatcher import (
    Batch,
    BatchState,
    ConfigurationError,
    Dispatcher,
    IdempotencyConflict,
    InvalidInput,
    Unreachable,
)
from examples.compute_api.computations import (
    Asked,
    Computations,
    NoSuchComputation,
    NotDone,
    TooLate,
    tables,
)

RETRY_AFTER = "5"
LARGEST = 1_000_000_000

# --- what goes in and out -------------------------------------------------------------------------


def _whole(value: object) -> object:
    """Take 5.0 for 5, as JSON has no other difference, and neither "5" nor true."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)


class Variables(BaseModel):
    """The variables that a caller may set, each with its values."""

    model_config = ConfigDict(extra="forbid")

    LOG_LEVEL: Literal["debug", "info", "warning"] | None = None


class Order(BaseModel):
    """What to compute. What is left out is as the job says."""

    model_config = ConfigDict(extra="forbid")

    upto: Annotated[int, Field(strict=True, ge=1, le=LARGEST), WHOLE]
    """Count the primes below this number."""

    args: Annotated[list[Literal["--gap=2", "--gap=4", "--gap=6"]], Field(max_length=1)] | None = (
        None
    )
    """--gap=2 counts the primes p for which p + 2 is one too."""

    env: Variables | None = None
    tasks: Annotated[int, Field(strict=True, ge=1, le=20), WHOLE] | None = None
    """How many containers share the work."""

    timeout_seconds: Annotated[int, Field(strict=True, ge=10, le=7200), WHOLE] | None = None
    """The longest that one of them may run."""


class Computation(BaseModel):
    """A computation as it is now."""

    id: str
    state: BatchState
    progress: Annotated[float, Field(ge=0, le=1)]
    """The part of its tasks that have ended."""

    tasks: dict[str, int]
    """How many tasks are in each state."""

    cancelling: bool
    reason: str | None
    """Why it ended as it did."""

    created_at: datetime
    finished_at: datetime | None


class FoundPart(BaseModel):
    """What one task found."""

    task: int
    attempt: int
    count: int


class Found(BaseModel):
    """The output of a computation."""

    id: str
    count: int
    parts: list[FoundPart]


class Failure(BaseModel):
    """Why a request was not done."""

    detail: str


class Wrong(BaseModel):
    """One thing that is wrong with a request."""

    loc: list[str | int]
    msg: str
    type: str


class Invalid(BaseModel):
    """All that is wrong with a request."""

    detail: list[Wrong]


# --- who asks, and whom -------------------------------------------------------------------------

bearer = HTTPBearer(auto_error=False, description="A token of COMPUTE_TOKENS.")


def tenant_of(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> str:
    """Name the tenant whose token this is."""
    given = (credentials.credentials if credentials else "").encode()
    tokens: Mapping[str, str] = request.app.state.tokens
    # All are compared, so that the time it takes tells nothing.
    found = [name for one, name in tokens.items() if secrets.compare_digest(one.encode(), given)]
    if not found:
        raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
    return found[0]


def computations_of(request: Request) -> Computations:
    """Give the endpoints what they work on."""
    found: Computations = request.app.state.computations
    return found


Tenant = Annotated[str, Depends(tenant_of)]
All = Annotated[Computations, Depends(computations_of)]
Id = Annotated[str, Path(json_schema_extra={"pattern": "^[a-z2-9]{12}$"})]
"""Any other text is the name of no computation, and so not found like any other."""

Key = Annotated[
    str,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[A-Za-z0-9._:-]+$",
        min_length=1,
        max_length=100,
        description="The same key and body give the same computation, however often they come.",
    ),
]


def shown(batch: Batch) -> Computation:
    """Show a batch as a computation."""
    return Computation(
        id=batch.id,
        state=batch.state,
        progress=batch.progress,
        tasks={state.value: count for state, count in batch.counts.items()},
        cancelling=batch.cancel_requested_at is not None and not batch.finished,
        reason=batch.reason,
        created_at=batch.created_at,
        finished_at=batch.finished_at,
    )


# --- the endpoints --------------------------------------------------------------------------------


def says(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Document the failures of an endpoint."""
    return {code: {"model": Invalid if code == 422 else Failure} for code in codes}  # noqa: PLR2004 - a status


def linked(name: str, operation: str) -> dict[str, Any]:
    """Document what to ask next about the computation that an answer names."""
    parameters = {"computation_id": "$response.body#/id"}
    return {name: {"operationId": operation, "parameters": parameters}}


router = APIRouter(responses=says(401, 503))


@router.post(
    "/computations",
    status_code=202,
    operation_id="start",
    responses={
        **says(400, 409, 422),
        202: {
            "links": {**linked("status", "status"), **linked("output", "output")}
            | linked("cancel", "cancel"),
            "headers": {"Location": {"schema": {"type": "string"}, "required": True}},
        },
    },
)
def start(
    order: Order, key: Key, tenant: Tenant, computations: All, answer: Response
) -> Computation:
    """Start a computation; or name the one that this key has started before."""
    batch = computations.start(
        tenant,
        key,
        Asked(
            upto=order.upto,
            args=None if order.args is None else list(order.args),
            env=order.env.model_dump(exclude_none=True) if order.env else None,
            tasks=order.tasks,
            timeout=order.timeout_seconds,
        ),
    )
    answer.headers["Location"] = f"/computations/{batch.id}"
    return shown(batch)


@router.get("/computations/{computation_id}", operation_id="status", responses=says(404))
def status(computation_id: Id, tenant: Tenant, computations: All) -> Computation:
    """Say how far a computation is."""
    return shown(computations.get(tenant, computation_id))


@router.get(
    "/computations/{computation_id}/output", operation_id="output", responses=says(404, 409)
)
def output(computation_id: Id, tenant: Tenant, computations: All) -> Found:
    """Give what a computation that succeeded has found."""
    parts = [
        FoundPart(task=part.task, attempt=part.attempt, count=part.count)
        for part in computations.output(tenant, computation_id)
    ]
    return Found(id=computation_id, count=sum(part.count for part in parts), parts=parts)


@router.post(
    "/computations/{computation_id}/cancel",
    status_code=202,
    operation_id="cancel",
    responses=says(404, 409),
)
def cancel(computation_id: Id, tenant: Tenant, computations: All) -> Computation:
    """Ask for the end of a computation; it is `cancelled` once nothing of it runs any more."""
    return shown(computations.cancel(tenant, computation_id))


# --- failures -------------------------------------------------------------------------------------


def failure(code: int, detail: object, **headers: str) -> JSONResponse:
    """Tell a failure. What a caller sent may be no Unicode text, and is told all the same."""
    text = json.dumps({"detail": detail}).encode("utf-8", "backslashreplace")
    return JSONResponse(json.loads(text), code, headers)


def _invalid(_: Request, error: Exception) -> Response:
    """Tell what is wrong, without repeating what was sent."""
    if isinstance(error, RequestValidationError):
        wrong = [
            {"loc": [*map(_plain, one["loc"])], "msg": _plain(one["msg"]), "type": one["type"]}
            for one in error.errors()
        ]
    else:
        wrong = [{"loc": ["body"], "msg": str(error), "type": "not_allowed"}]
    return failure(422, wrong)


def _plain(part: Any) -> Any:
    """Make text printable: a key of the body may hold half of a surrogate pair."""
    return part.encode("utf-8", "backslashreplace").decode() if isinstance(part, str) else part


def _conflict(_: Request, error: Exception) -> Response:
    return failure(409, str(error))


def _no_such(_: Request, error: Exception) -> Response:
    return failure(404, f"there is no computation {_plain(str(error))!r}")


def _later(_: Request, error: Exception) -> Response:
    said: object = error
    if isinstance(error, sa.exc.OperationalError):
        said = "the database does not answer"
    elif isinstance(error, sa.exc.TimeoutError):
        said = "all connections to the database are in use"
    return failure(503, f"try again: {said}", **{"Retry-After": RETRY_AFTER})


# --- put together ---------------------------------------------------------------------------------


def create_app(dispatcher: Dispatcher, engine: sa.Engine, tokens: Mapping[str, str]) -> FastAPI:
    """Make the application over a dispatcher and a database, which must be the same one.

    Both are closed when the server stops.
    """

    @asynccontextmanager
    async def serving(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.dispose()
        dispatcher.close()

    app = FastAPI(title="Computations", version="1", lifespan=serving)
    app.state.computations = Computations(dispatcher, engine)
    app.state.tokens = dict(tokens)
    app.include_router(router)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(InvalidInput, _invalid)
    app.add_exception_handler(IdempotencyConflict, _conflict)
    app.add_exception_handler(NotDone, _conflict)
    app.add_exception_handler(TooLate, _conflict)
    app.add_exception_handler(NoSuchComputation, _no_such)
    app.add_exception_handler(Unreachable, _later)
    app.add_exception_handler(sa.exc.OperationalError, _later)
    app.add_exception_handler(sa.exc.TimeoutError, _later)  # none of the pool became free in time
    return app


def create() -> FastAPI:
    """Make the application from its settings."""
    dispatcher = Dispatcher()
    engine = sa.create_engine(dispatcher.settings.database_url, pool_pre_ping=True)
    return create_app(dispatcher, engine, read_tokens(os.environ.get("COMPUTE_TOKENS", "")))


def read_tokens(text: str) -> dict[str, str]:
    """Read COMPUTE_TOKENS.

    Raises:
        ConfigurationError: it is no object of texts; the value is not repeated.
    """
    try:
        return TypeAdapter(dict[str, str]).validate_json(text)
    except ValidationError:
        raise ConfigurationError(
            "COMPUTE_TOKENS is not set or cannot be read: it must be a JSON object of tokens and "
            'the tenants that they stand for, such as {"a-long-secret": "ann"}'
        ) from None


if __name__ == "__main__":
    tables.create_all(sa.create_engine(Dispatcher().settings.database_url))
