"""The gRPC server: generic handlers, since the client package ships no servicer classes."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any, Final

import grpc.aio  # type: ignore[import-untyped,unused-ignore]  # grpcio ships no types

from dispatcher.emulators.cloud_run.api import METHODS, Method
from dispatcher.emulators.cloud_run.errors import status_of
from dispatcher.emulators.cloud_run.gate import Dropped, Gate
from dispatcher.emulators.cloud_run.refusal import Refused

__all__ = ["GrpcServer"]

DETAILS: Final = "grpc-status-details-bin"
CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
GRACE: Final = 0.1


class GrpcServer:
    """Serves the gate on a loopback port. Every method runs on the emulator's event loop."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._server: Any = None

    async def open(self, port: int) -> int:
        """Start; returns the port."""
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                # Two emulators must not share a port by accident.
                ("grpc.so_reuseport", 0),
            ]
        )
        services: dict[str, dict[str, Any]] = {}
        for method in METHODS.values():
            services.setdefault(method.service, {})[method.rpc] = self._handler(method)
        self._server.add_generic_rpc_handlers(
            tuple(
                grpc.method_handlers_generic_handler(service, handlers)
                for service, handlers in services.items()
            )
        )
        bound = int(self._server.add_insecure_port(f"127.0.0.1:{port}"))
        await self._server.start()
        return bound

    async def close(self) -> None:
        """Stop; calls that have no answer yet are cut off."""
        await self._server.stop(GRACE)

    def _handler(self, method: Method) -> Any:
        async def answer(request: Any, context: Any) -> Any:
            try:
                return await self._gate.call(method, request)
            except Dropped:
                sever(context.peer())
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            except Refused as refused:
                if refused.reason:
                    details = status_of(refused).SerializeToString()
                    context.set_trailing_metadata(((DETAILS, details),))
                await context.abort(CODES[int(refused.code)], refused.message)

        return grpc.unary_unary_rpc_method_handler(
            answer,
            request_deserializer=method.request.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )


def sever(peer: str) -> None:
    """Shut the connection of a peer, such as `ipv4:127.0.0.1:41234`.

    gRPC has no call for it. The socket is one of this process's, so it is looked up among its
    files, and shut through a duplicate: gRPC then sees a connection that the other side has left.
    """
    port = int(peer.rpartition(":")[2])
    for number in [int(file.name) for file in Path("/dev/fd").iterdir()]:
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            duplicate = socket.socket(fileno=os.dup(number))
        except OSError:
            continue  # it was closed in the meantime, as that of the listing itself is
        with duplicate:
            try:
                if duplicate.family == socket.AF_INET and duplicate.getpeername()[1] == port:
                    duplicate.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # not connected
