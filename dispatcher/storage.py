"""Objects in storage: `file://`, `s3://` and `gs://`, through one library.

This module reads items from an object, block by block. The formats are those of local files and
are parsed in `items.py`. Credentials, regions and endpoints are the platform's own (`AWS_*` and
`GOOGLE_*` variables, instance roles, workload identity) and are never settings of this package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from obstore.exceptions import (
    BaseError,
    InvalidPathError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import GCSStore, LocalStore, S3Store

from dispatcher.errors import DispatcherError, InvalidItems, Unreachable
from dispatcher.items import ItemStream, format_of, parse

if TYPE_CHECKING:
    from obstore.store import RetryConfig

__all__ = ["check_uri", "read_bytes", "read_items"]

_PART_BYTES: Final = 4 << 20
"""Read by one request, so that its timeout bounds the wait however large the object is."""

_BLOCK_BYTES: Final = 1 << 18
"""Given on at once: what is made of a block takes many times its size."""

# No client options: they would replace those of the environment (`AWS_ALLOW_HTTP`, proxies). The
# library's own are 5 s to connect and 30 s for a request.
_RETRY: Final[RetryConfig] = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}


@dataclass(frozen=True, slots=True)
class _Location:
    """An object, as its URI names it."""

    scheme: str
    bucket: str
    key: str

    def store(self) -> GCSStore | LocalStore | S3Store:
        if self.scheme == "s3":
            return S3Store(self.bucket, retry_config=_RETRY)
        if self.scheme == "gs":
            return GCSStore(self.bucket, retry_config=_RETRY)
        return LocalStore()


def check_uri(uri: str) -> None:
    """Refuse a URI of items that could never be read, without looking whether the object exists.

    Raises:
        InvalidItems: unknown scheme, no bucket or key, a relative file, an unknown kind of file.
    """
    _locate(uri)
    format_of(uri)


def read_items(uri: str) -> ItemStream:
    """Open the items in an object: `.jsonl`, `.csv` or `.txt`, and `.gz` after it.

    Raises:
        InvalidItems: at once, as `check_uri`; while reading, as `read_bytes`, or naming the line.
        Unreachable: while reading, as `read_bytes`.
    """
    kind = format_of(uri)
    return ItemStream(uri, parse(read_bytes(uri), kind, uri, gzipped=uri.endswith(".gz")))


def read_bytes(uri: str) -> Iterator[bytes]:
    """Read an object in small blocks; a few megabytes of it are in memory at most.

    Raises:
        InvalidItems: at once for a bad URI; while reading if the object does not exist, may not be
            read, or was changed meanwhile.
        Unreachable: while reading, if the storage does not answer or answers with a fault.
    """
    return _parts(uri, _locate(uri))


def _parts(uri: str, location: _Location) -> Iterator[bytes]:
    try:
        store = location.store()
        meta = store.head(location.key)
        size = meta["size"]
        for start in range(0, size, _PART_BYTES):
            # Parts of two versions of the object would make items that nobody wrote.
            part = store.get(
                location.key,
                options={
                    "range": (start, min(start + _PART_BYTES, size)),
                    "if_match": meta["e_tag"],
                },
            )
            data = memoryview(part.bytes())
            for place in range(0, len(data), _BLOCK_BYTES):
                yield bytes(data[place : place + _BLOCK_BYTES])
    except (BaseError, OSError) as error:
        raise _explained(uri, error) from error


def _locate(uri: str) -> _Location:
    scheme, separator, rest = uri.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in {"file", "s3", "gs"}:
        raise InvalidItems(
            f"cannot read items from {uri!r}: it must start with file:///, s3:// or gs://"
        )
    host, _, key = rest.partition("/")
    if scheme == "file":
        if host not in {"", "localhost"}:
            raise InvalidItems(
                f"{uri!r} is relative or names a host: write file:/// and the absolute path"
            )
        # `Path.as_uri` writes spaces and the like as %20; keys of buckets are taken as they are.
        key = unquote(key)
    elif not host:
        raise InvalidItems(f"{uri!r} names no bucket: write {scheme}://BUCKET/KEY")
    if not key or key.endswith("/"):
        raise InvalidItems(f"{uri!r} names no object: write the whole name of a file of items")
    return _Location(scheme, host, key)


def _explained(uri: str, error: Exception) -> DispatcherError:
    # The library adds a dump of its inner state after the first line.
    said = str(error).partition("\n")[0][:400]
    if isinstance(error, (NotFoundError, FileNotFoundError)):
        return InvalidItems(f"cannot read items from {uri}: there is no such object")
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError, PermissionError)):
        return InvalidItems(
            f"cannot read items from {uri}: no permission; the credentials are those that the "
            f"worker's platform gives it. The storage says: {said}"
        )
    if isinstance(error, PreconditionError):
        return InvalidItems(
            f"{uri} was changed while it was read; write each list under a new name"
        )
    if isinstance(error, InvalidPathError):
        return InvalidItems(f"cannot read items from {uri}: {said}")
    return Unreachable(f"cannot read items from {uri} now: {said}")
