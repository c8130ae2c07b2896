"""From what the client raises to the door's two errors.

    what came                                      at a launch            at a read, cancel, …
    429 RESOURCE_EXHAUSTED, RATE_LIMIT_EXCEEDED    Unavailable, clear     Unavailable, meter told
    400 invalid, precondition; 401; 403; 404;      Rejected               Unavailable, or Rejected
    405; 413; 501                                                         where the caller can tell
    credentials missing or refused                 Rejected               as 401
    credentials cannot be had now                  Unavailable, clear     Unavailable
    anything else: 409, 499, 5xx, deadline,        Unavailable, open      Unavailable
    dropped connection, an unreadable answer

"Clear" means that nothing was started; "open", that it may have been.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, Literal

import requests
from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.protobuf import json_format

from dispatcher.backends.base import BackendError, Meter, Rejected, Unavailable

__all__ = [
    "CLIENT_ERRORS",
    "at_launch",
    "at_read",
    "calling",
    "concerns_the_job",
    "is_missing",
    "words",
]

CLIENT_ERRORS: Final = (
    api.GoogleAPIError,
    auth.GoogleAuthError,
    requests.RequestException,
    json_format.Error,
)
"""All that the clients raise of themselves, over gRPC and REST."""

LONGEST: Final = 1000
"""Characters of the provider's words that are kept."""

_REFUSALS: Final = (
    api.BadRequest,  # INVALID_ARGUMENT, FAILED_PRECONDITION and OUT_OF_RANGE are kinds of it
    api.Unauthorized,
    api.Forbidden,
    api.NotFound,
    api.MethodNotAllowed,
    api.MethodNotImplemented,
)
_OF_THE_JOB: Final = (
    api.Unauthorized,
    api.Forbidden,
    api.NotFound,
    api.FailedPrecondition,
    auth.GoogleAuthError,
)
_TOO_LARGE: Final = 413

_CREDENTIALS: Final = (
    "give the workers credentials (a service account of the machine, workload identity, or "
    "GOOGLE_APPLICATION_CREDENTIALS), or mend the target's `impersonate`"
)
_HINTS: Final[tuple[tuple[type[Exception], str], ...]] = (
    (api.Unauthorized, _CREDENTIALS),
    (
        api.Forbidden,
        "the workers' account needs roles/run.jobsExecutorWithOverrides and roles/run.viewer there",
    ),
    (
        api.NotFound,
        "mend options.job, or the target's project and region, or let `dispatcher apply` make it",
    ),
    (api.BadRequest, "`dispatcher check` says more"),
)


def words(error: BaseException) -> str:
    """Give what the provider said, short and without the client's own dump."""
    said = _said_over_rest(error)
    if said is None:
        said = error.message if isinstance(error, api.GoogleAPICallError) else str(error)
    text = " ".join(str(said).split()) or type(error).__name__
    if isinstance(error, api.GoogleAPICallError) and error.code is not None:
        text = f"{int(error.code)} {text}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _said_over_rest(error: BaseException) -> str | None:
    """Read the provider's own words from the body of an answer over REST; None if it has none.

    The client puts the verb and the whole URL before them.
    """
    said = _body(error).get("message")
    return said if isinstance(said, str) and said else None


def _body(error: BaseException) -> dict[str, Any]:
    """Read what an answer over REST says of its error; empty if there is none, or it is no JSON."""
    response = getattr(error, "response", None)
    if not isinstance(response, requests.Response):
        return {}
    try:
        body = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return body if isinstance(body, dict) else {}


def concerns_the_job(error: BaseException | None) -> bool:
    """Whether a launch was refused for what its job, or the workers' account, is like.

    Other launches of the job would meet the same. FAILED_PRECONDITION is a job that is not ready.
    """
    if isinstance(error, _OF_THE_JOB):
        return True
    return error is not None and _body(error).get("status") == "FAILED_PRECONDITION"


def is_missing(error: BaseException) -> bool:
    """Whether a look-up by name says that there is no such thing."""
    return isinstance(error, api.NotFound)


def at_launch(error: Exception, what: str, forbidden: str | None = None) -> BackendError:
    """Word what a launch call, or a call that defines something, raised.

    `forbidden` is what to do where it may not be done; as a default, what lets a launch run.
    """
    text = f"{what}: {words(error)}"
    if _is_throttle(error):
        return Unavailable(text, not_started=True, retry_after=_retry_after(error))
    if isinstance(error, auth.GoogleAuthError):
        if _may_pass(error):
            return Unavailable(text, not_started=True)
        return Rejected(_with(text, _CREDENTIALS))
    code = getattr(error, "code", None)
    if isinstance(error, _REFUSALS) or code == _TOO_LARGE:
        hint = next((hint for kind, hint in _HINTS if isinstance(error, kind)), None)
        if isinstance(error, api.Forbidden):
            hint = forbidden or hint
        return Rejected(_with(text, hint))
    return Unavailable(text)


def _with(text: str, hint: str | None) -> str:
    """Add what is to be done to what the provider said, which may end with a stop."""
    return text if hint is None else f"{text.rstrip('.')}; {hint}"


def at_read(error: Exception, what: str) -> Unavailable:
    """Word what any other call raised: it says nothing of what runs."""
    text = f"{what}: {words(error)}"
    hint = _CREDENTIALS if isinstance(error, auth.GoogleAuthError) else None
    if isinstance(error, (api.Unauthorized, api.Forbidden)):
        hint = next(hint for kind, hint in _HINTS if isinstance(error, kind))
    throttled = _is_throttle(error)
    return Unavailable(
        _with(text, hint),
        not_started=throttled,
        retry_after=_retry_after(error) if throttled else None,
    )


@contextmanager
def calling(
    meter: Meter, kind: Literal["read", "write", "logs"], what: str, *, gentle: bool = False
) -> Iterator[None]:
    """Pay for one call and make it; NOT_FOUND comes through as it is.

    `gentle` leaves half of a full budget for calls that matter more.

    Raises:
        Unavailable: the budget is used up, or the call did not work.
        google.api_core.exceptions.NotFound: there is no such thing.
    """
    meter.take(kind, gentle=gentle)
    try:
        yield
    except api.NotFound:
        raise
    except CLIENT_ERRORS as error:
        if _is_throttle(error):
            meter.throttled(kind)
        answer = _answer(error)
        raise at_read(answer, what) from answer


def _answer(error: Exception) -> Exception:
    """Give what a call was answered: over REST a session that can renew no token hides the 401."""
    if isinstance(error, auth.GoogleAuthError) and not _may_pass(error):
        answer = api.Unauthorized(words(error))  # type: ignore[no-untyped-call]  # half typed
        answer.__cause__ = error
        return answer
    return error


def _is_throttle(error: Exception) -> bool:
    # Older Google front ends say 403 with this reason [D: error model].
    reason = getattr(error, "reason", None)
    return isinstance(error, api.TooManyRequests) or reason == "RATE_LIMIT_EXCEEDED"


def _may_pass(error: auth.GoogleAuthError) -> bool:
    # A metadata server that cannot be reached is told as a refusal that was caused by that.
    causes = (error, error.__cause__)
    return bool(error.retryable) or any(isinstance(one, auth.TransportError) for one in causes)


def _retry_after(error: Exception) -> timedelta | None:
    """Read how long the provider asks us to wait: RetryInfo, or the header of REST."""
    for detail in getattr(error, "details", None) or ():
        delay: Any = getattr(detail, "retry_delay", None)
        if delay is not None and delay.ToTimedelta() > timedelta(0):
            return _bounded(delay.ToTimedelta())
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    text = str(headers.get("Retry-After", "")) if hasattr(headers, "get") else ""
    return _bounded(timedelta(seconds=int(text))) if text.isdigit() and len(text) < 7 else None  # noqa: PLR2004 - no date, and no nonsense


def _bounded(delay: timedelta) -> timedelta:
    return min(delay, timedelta(minutes=10))
