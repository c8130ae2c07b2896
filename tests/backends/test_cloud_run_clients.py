"""Credentials and channels of Cloud Run's clients, and what Cloud Logging answers. No network."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import google.auth
import pytest
from google.auth import credentials, exceptions, impersonated_credentials
from google.cloud.logging_v2 import types
from google.protobuf import struct_pb2

from dispatcher.backends.base import LaunchRequest, Rejected, TaskInput, Unavailable
from dispatcher.backends.cloud_run import (
    CloudRunBackend,
    CloudRunOptions,
    CloudRunSettings,
    logs,
)
from dispatcher.backends.cloud_run.clients import SCOPES, Clients

HANDLE = "projects/project-1/locations/europe-west1/jobs/etl/executions/etl-a"


class Token(credentials.Credentials):
    """Credentials whose refresh does as the test says."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # google-auth is half typed
        self.error = error
        self.refreshed = 0

    def refresh(self, request: Any) -> None:
        assert request.keywords == {"timeout": 10.0}, "a token is not waited for without end"
        self.refreshed += 1
        if self.error is not None:
            raise self.error
        self.token = "good"  # noqa: S105 -- no secret


def use(monkeypatch: pytest.MonkeyPatch, found: credentials.Credentials) -> None:
    def default(scopes: list[str]) -> tuple[credentials.Credentials, str]:
        assert scopes == list(SCOPES)
        return found, "project-1"

    monkeypatch.setattr(google.auth, "default", default)


def settings(**given: Any) -> CloudRunSettings:
    return CloudRunSettings.model_validate(
        {"project": "project-1", "region": "europe-west1", **given}
    )


def request() -> LaunchRequest:
    return LaunchRequest(
        key="k",
        instance="i",
        batch_id="b",
        job="etl",
        command=(),
        tasks=(TaskInput(0, 0, 1, "[]"),),
        options=CloudRunOptions(job="etl"),
        timeout=timedelta(minutes=1),
        parallelism=1,
    )


@pytest.mark.parametrize(
    ("given", "said"), [({"endpoint": "localhost:8080"}, True), ({"endpoint": "run.test"}, False)]
)
def test_without_credentials_an_endpoint_on_this_machine_is_taken_for_an_emulators(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], said: bool
) -> None:
    def default(scopes: list[str]) -> None:
        raise exceptions.DefaultCredentialsError(f"none were found for {scopes}")  # type: ignore[no-untyped-call]

    monkeypatch.setattr(google.auth, "default", default)
    with pytest.raises(Rejected, match="none were found") as caught:
        CloudRunBackend("cloud", settings(**given)).launch(request())
    assert ("set `insecure: true` at the target" in str(caught.value)) is said


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_clients_are_made_once_and_a_token_is_kept_while_it_is_good(
    monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    token = Token()
    use(monkeypatch, token)
    clients = Clients(settings(transport=transport))
    assert clients.run() is clients.run()
    assert token.refreshed == 1
    assert clients.run().jobs.transport.kind == transport
    assert clients.logging() is clients.logging()
    session, address = clients.session()
    assert address == "https://logging.googleapis.com:443"
    assert session is clients.session()[0]
    assert token.refreshed == 1


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_a_token_that_cannot_be_had_now_is_a_clear_not_now(
    monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    use(monkeypatch, Token(exceptions.TransportError("no network")))  # type: ignore[no-untyped-call]
    backend = CloudRunBackend("t", settings(transport=transport))
    with pytest.raises(Unavailable, match="no network") as caught:
        backend.launch(request())
    assert caught.value.not_started, "nothing was sent"
    with pytest.raises(Unavailable, match="no network"):
        backend.poll([HANDLE])
    with pytest.raises(Unavailable, match="no network"):
        list(backend.logs(HANDLE, 0, 1))


def test_a_token_that_is_refused_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Token(exceptions.RefreshError("invalid_grant: account deleted")))  # type: ignore[no-untyped-call]
    backend = CloudRunBackend("t", settings())
    with pytest.raises(Rejected, match=r"invalid_grant.*impersonate"):
        backend.launch(request())
    with pytest.raises(Unavailable, match="invalid_grant"):
        backend.cancel(HANDLE)


def test_another_account_is_acted_as_where_the_target_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[dict[str, Any]] = []

    class Impersonated(Token):
        def __init__(self, **given: Any) -> None:
            super().__init__()
            made.append(given)

    source = Token()
    use(monkeypatch, source)
    monkeypatch.setattr(impersonated_credentials, "Credentials", Impersonated)
    account = "runner@project-1.iam.gserviceaccount.com"
    Clients(settings(impersonate=account)).run()
    (given,) = made
    assert given["source_credentials"] is source
    assert given["target_principal"] == account
    assert given["target_scopes"] == list(SCOPES)


def entry(**payload: Any) -> Any:
    if "json_payload" in payload:
        struct = struct_pb2.Struct()
        struct.update(payload["json_payload"])
        payload["json_payload"] = struct
    return types.LogEntry.pb(types.LogEntry(**payload))


@pytest.mark.parametrize(
    ("payload", "line"),
    [
        ({"textPayload": "plain\n"}, "plain"),
        ({"jsonPayload": {"message": "only"}}, "only"),
        ({"jsonPayload": {"message": "a", "level": "info"}}, '{"message": "a", "level": "info"}'),
        ({}, ""),
    ],
)
def test_an_entry_is_a_line_whatever_its_payload(payload: dict[str, Any], line: str) -> None:
    names = {"textPayload": "text_payload", "jsonPayload": "json_payload"}
    same = {names[name]: value for name, value in payload.items()}
    assert logs._text_of_json(payload) == line
    told = logs._text_of_entry(entry(**same))
    assert sorted(told) == sorted(line), "a message of fields has no order"
