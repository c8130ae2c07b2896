"""The REST server: HTTP/1.1 with JSON bodies, on asyncio streams, for loopback only.

It knows paths, queries and bodies as Google's HTTP annotations map them to requests, and nothing of
what a method does.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Coroutine
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from dispatcher.emulators.cloud_run.api import METHODS, Method
from dispatcher.emulators.cloud_run.errors import error_body
from dispatcher.emulators.cloud_run.gate import Dropped, Gate
from dispatcher.emulators.cloud_run.messages import json_format
from dispatcher.emulators.cloud_run.refusal import HTTP_STATUS, Code, Refused

__all__ = ["RestServer"]

MAX_HEAD: Final = 1 << 16
MAX_BODY: Final = 64 << 20
LOOK_SECONDS: Final = 0.25
"""How often a client that waits is looked after: it may have hung up."""


def _pattern(template: str) -> re.Pattern[str]:
    """Make a pattern of a path such as `/v2/{name=projects/*/jobs/*}:run`."""
    parts = re.split(r"\{([\w.]+)=([^}]*)\}", template)
    text = re.escape(parts[0])
    for field, value, rest in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        inner = re.escape(value).replace(r"\*", "[^/:]+")
        text += f"(?P<{field.replace('.', '__')}>{inner}){re.escape(rest)}"
    return re.compile(text)


ROUTES: Final = [(method.http[0], _pattern(method.http[1]), method) for method in METHODS.values()]


class RestServer:
    """Serves the gate on a loopback port. Every method runs on the emulator's event loop."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self, port: int) -> int:
        """Start; returns the port."""
        self._server = await asyncio.start_server(
            self._connected, "127.0.0.1", port, limit=MAX_HEAD
        )
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop; connections are cut off."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has left, or the emulator is being closed
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; returns whether another one may follow."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as ended:
            if ended.partial:
                raise
            return False
        except asyncio.LimitOverrunError:
            await _send(writer, 431, {"error": {"code": 431, "message": "The head is too long."}})
            return False
        start, *lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines if line)
        }
        verb, target, _ = start.split(" ", 2)
        size = int(headers.get("content-length") or 0)
        if size > MAX_BODY or "transfer-encoding" in headers:
            await _send(writer, 413, {"error": {"code": 413, "message": "The body is too long."}})
            return False
        body = await reader.readexactly(size)
        try:
            status, answer = await _unless_left(self._answer(verb, target, body), reader)
        except Dropped:
            writer.transport.abort()
            return False
        await _send(writer, status, answer)
        return headers.get("connection", "").lower() != "close"

    async def _answer(self, verb: str, target: str, body: bytes) -> tuple[int, dict[str, Any]]:
        try:
            method, fields = _route(verb, target)
            query = parse_qsl(urlsplit(target).query, keep_blank_values=True)
            request = _request(method, fields, query, body)
            response = await self._gate.call(method, request)
        except Refused as refused:
            return HTTP_STATUS[refused.code], error_body(refused)
        numbers = any(name == "$alt" and "enum-encoding=int" in value for name, value in query)
        return 200, json_format.MessageToDict(response, use_integers_for_enums=numbers)


async def _unless_left(
    work: Coroutine[Any, Any, tuple[int, dict[str, Any]]], reader: asyncio.StreamReader
) -> tuple[int, dict[str, Any]]:
    """Do some work, and give it up when the client hangs up, as gRPC does by itself."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=LOOK_SECONDS)
            if reader.at_eof():
                break
        if task.done():
            return task.result()
        raise Dropped
    finally:
        task.cancel()


def _route(verb: str, target: str) -> tuple[Method, dict[str, str]]:
    """Find the method of a path (google/api/http.proto)."""
    path = unquote(urlsplit(target).path)
    for wanted, pattern, method in ROUTES:
        if wanted == verb and (match := pattern.fullmatch(path)):
            return method, {
                name.replace("__", "."): value for name, value in match.groupdict().items()
            }
    raise Refused(Code.NOT_FOUND, f"The requested URL {path} was not found on this server.")


def _request(
    method: Method, fields: dict[str, str], query: list[tuple[str, str]], body: bytes
) -> Any:
    """Put a request together from path, query and body (google/api/http.proto)."""
    descriptor = method.request.DESCRIPTOR
    content: dict[str, Any] = {}
    try:
        given = json.loads(body) if body else {}
        if method.body == "*":
            content = given
        elif method.body:
            content[method.body] = given
        for name, value in query:
            if not name.startswith("$"):
                _put(content, descriptor, name.split("."), value)
        for name, value in fields.items():
            _put(content, descriptor, name.split("."), value)
        return json_format.ParseDict(content, method.request())
    except (ValueError, TypeError, AttributeError, json_format.ParseError) as error:
        raise Refused(Code.INVALID_ARGUMENT, f"Invalid JSON payload received: {error}") from error


def _put(content: dict[str, Any], descriptor: Any, path: list[str], text: str) -> None:
    """Set one field of a request's JSON from text."""
    first, *rest = path
    field = descriptor.fields_by_name.get(first) or descriptor.fields_by_camelcase_name.get(first)
    if field is None:
        raise ValueError(f'unknown name "{first}"')
    if rest:
        _put(content.setdefault(field.name, {}), field.message_type, rest, text)
    elif field.cpp_type == field.CPPTYPE_BOOL:
        content[field.name] = text.lower() == "true"
    else:
        content[field.name] = text


async def _send(writer: asyncio.StreamWriter, status: int, answer: dict[str, Any]) -> None:
    body = json.dumps(answer, separators=(",", ":")).encode()
    reasons = {one.value: one.phrase for one in HTTPStatus}
    writer.write(
        f"HTTP/1.1 {status} {reasons.get(status, 'Error')}\r\n"
        "Content-Type: application/json; charset=UTF-8\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await writer.drain()
