"""The clients of one target, made when they are first used; any process can make others.

No client retries by itself: the Google clients have no default retry on these methods [C], and what
gRPC repeats of its own accord was never handed to the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from threading import Lock
from typing import Any, Final

import google.auth
import grpc
from google.api_core import grpc_helpers
from google.auth import credentials as auth_credentials
from google.auth import exceptions as auth_exceptions
from google.auth import impersonated_credentials
from google.auth.transport import requests as auth_requests
from google.cloud import run_v2
from google.cloud.logging_v2.services.logging_service_v2 import LoggingServiceV2Client
from google.cloud.logging_v2.services.logging_service_v2.transports import (
    LoggingServiceV2GrpcTransport,
)
from google.cloud.run_v2.services.executions.transports import ExecutionsGrpcTransport
from google.cloud.run_v2.services.jobs.transports import JobsGrpcTransport
from google.cloud.run_v2.services.tasks.transports import TasksGrpcTransport

from dispatcher.backends.cloud_run.options import CloudRunSettings, is_loopback

__all__ = ["Clients", "RunClients"]

SCOPES: Final = ("https://www.googleapis.com/auth/cloud-platform",)

REFRESH_SECONDS: Final = 10.0
"""The longest that fetching a token may take."""

_CHANNEL_OPTIONS: Final = (
    # A list of executions with their whole environments is large [C: the client's own setting].
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # After an outage calls are to work again within seconds; gRPC's own pause grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 3000),
)


@dataclass(frozen=True, slots=True)
class RunClients:
    """What speaks to Cloud Run."""

    jobs: run_v2.JobsClient
    executions: run_v2.ExecutionsClient
    tasks: run_v2.TasksClient


class Clients:
    """Makes a target's clients once, and keeps its token fresh."""

    def __init__(self, settings: CloudRunSettings) -> None:
        self._settings = settings
        self._lock = Lock()
        self._credentials: auth_credentials.Credentials | None = None
        self._run: RunClients | None = None
        self._logging: LoggingServiceV2Client | None = None
        self._session: auth_requests.AuthorizedSession | None = None

    def run(self) -> RunClients:
        """Give the clients of Cloud Run, with a token that is good for now.

        The token is fetched here and not within a call, so that a problem with it is told apart
        from an answer that was lost.

        Raises:
            google.auth.exceptions.GoogleAuthError: there are no credentials, or they are refused.
        """
        with self._lock:
            credentials = self._fresh()
            if self._run is None:
                self._run = self._make_run(credentials)
            return self._run

    def logging(self) -> LoggingServiceV2Client:
        """Give the gRPC client of Cloud Logging.

        Raises:
            google.auth.exceptions.GoogleAuthError: as `run`.
        """
        with self._lock:
            credentials = self._fresh()
            if self._logging is None:
                channel = self._channel("logging", credentials)
                transport = LoggingServiceV2GrpcTransport(channel=channel)
                self._logging = LoggingServiceV2Client(transport=transport)
            return self._logging

    def session(self) -> tuple[auth_requests.AuthorizedSession, str]:
        """Give a session for REST calls to Cloud Logging, and the address to call.

        The library's client of it speaks gRPC only.

        Raises:
            google.auth.exceptions.GoogleAuthError: as `run`.
        """
        with self._lock:
            credentials = self._fresh()
            if self._session is None:
                self._session = auth_requests.AuthorizedSession(credentials)  # type: ignore[no-untyped-call]  # google-auth is half typed
            scheme = "http" if self._settings.insecure else "https"
            return self._session, f"{scheme}://{self._settings.address('logging')}"

    def _make_run(self, credentials: auth_credentials.Credentials) -> RunClients:
        if self._settings.transport == "rest":
            scheme = "http" if self._settings.insecure else "https"
            given: dict[str, Any] = {
                "credentials": credentials,
                "transport": "rest",
                "client_options": {"api_endpoint": f"{scheme}://{self._settings.address('run')}"},
            }
            return RunClients(
                run_v2.JobsClient(**given),
                run_v2.ExecutionsClient(**given),
                run_v2.TasksClient(**given),
            )
        channel = self._channel("run", credentials)
        return RunClients(
            run_v2.JobsClient(transport=JobsGrpcTransport(channel=channel)),
            run_v2.ExecutionsClient(transport=ExecutionsGrpcTransport(channel=channel)),
            run_v2.TasksClient(transport=TasksGrpcTransport(channel=channel)),
        )

    def _channel(self, service: Any, credentials: auth_credentials.Credentials) -> grpc.Channel:
        address = self._settings.address(service)
        if self._settings.insecure:
            options = [*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)]
            return grpc.insecure_channel(address, options=options)
        channel: grpc.Channel = grpc_helpers.create_channel(
            address, credentials=credentials, options=list(_CHANNEL_OPTIONS)
        )
        return channel

    def _fresh(self) -> auth_credentials.Credentials:
        if self._credentials is None:
            self._credentials = self._find_credentials()
        found = self._credentials
        if not found.valid:
            request = partial(auth_requests.Request(), timeout=REFRESH_SECONDS)
            found.refresh(request)  # type: ignore[no-untyped-call]  # as above
        return found

    def _find_credentials(self) -> auth_credentials.Credentials:
        if self._settings.insecure:
            return auth_credentials.AnonymousCredentials()  # type: ignore[no-untyped-call]  # as above
        try:
            found, _ = google.auth.default(scopes=list(SCOPES))
        except auth_exceptions.DefaultCredentialsError as error:
            endpoint = self._settings.endpoint
            if endpoint is None or not is_loopback(endpoint):
                raise
            raise auth_exceptions.DefaultCredentialsError(  # type: ignore[no-untyped-call]  # as above
                f"the endpoint {endpoint} is on this machine: if it is an emulator, set `insecure: "
                f"true` at the target, and no credentials are needed ({error})"
            ) from error
        if self._settings.impersonate is None:
            return found
        return impersonated_credentials.Credentials(  # type: ignore[no-untyped-call]  # as above
            source_credentials=found,
            target_principal=self._settings.impersonate,
            target_scopes=list(SCOPES),
            lifetime=int(timedelta(hours=1).total_seconds()),
        )
