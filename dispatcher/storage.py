"""Objects in storage: `file://`, `s3://` and `gs://`, through one library.

`Storage` is the installation's own place, for input documents and receipts; what stands in them is
`documents.py`'s. `read_items` reads items from anybody's object, block by block; their formats are
those of local files and are parsed in `items.py`. Credentials, regions and endpoints are the
platform's own (`AWS_*` and `GOOGLE_*` variables, instance roles, workload identity) and are never
settings of this package.
"""

from __future__ import annotations

import errno
import http.client
import re
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Final, Literal, TypeAlias
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)
from obstore.store import GCSStore, LocalStore, S3Store

from dispatcher.errors import ConfigurationError, DispatcherError, InvalidItems, Unreachable
from dispatcher.items import ItemStream, format_of, parse
from dispatcher.redaction import mask_url

if TYPE_CHECKING:
    from obstore.store import RetryConfig

__all__ = [
    "LONGEST_SIGNED",
    "MAX_OBJECT_BYTES",
    "Storage",
    "StorageRefused",
    "StoredObject",
    "TooLarge",
    "check_uri",
    "read_beginning",
    "read_bytes",
    "read_items",
    "read_object",
]

MAX_OBJECT_BYTES: Final = 64 << 20
"""The largest object that `Storage.create` writes: it is in memory, and goes out in one request."""

LONGEST_SIGNED: Final = timedelta(days=7)
"""No provider signs a URL for longer; one signed with a role's credentials ends with those."""

_PART_BYTES: Final = 4 << 20
"""Read by one request, so that its timeout bounds the wait however large the object is."""

_BLOCK_BYTES: Final = 1 << 18
"""Given on at once: what is made of a block takes many times its size."""

_DELETE_PAGE: Final = 1000
"""Objects that one request deletes, where the provider can do that."""

_SAID: Final = 400
"""Characters of a storage's own words in a message of ours, at most."""

_REFUSALS: Final = frozenset({"301", "400", "401", "403", "404", "405", "501"})
"""Answers that would come again."""

_PASSING: Final = frozenset({408, 429, 500, 502, 503, 504})
"""Answers to a signed URL that say nothing of its signature."""

_NO_PLACE: Final = frozenset({errno.ENOENT, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG})
"""Why a directory can never be made; what else a file system says may pass."""

_PROBE_SIGNED: Final = timedelta(minutes=5)
_PROBE_TIMEOUT: Final = 30.0
_PROBE_BYTES: Final = 4096

_SIGNERS: Final = 16

_FAULTS_OF_OURS: Final = (
    FileExistsError,
    InvalidPathError,
    NotADirectoryError,
    UnknownConfigurationKeyError,
    ValueError,
)
"""A file where a directory should be; variables of the platform that make no sense."""

_Store: TypeAlias = GCSStore | LocalStore | S3Store

# No client options: they would replace those of the environment (`AWS_ALLOW_HTTP`, proxies). The
# library's own are 5 s to connect and 30 s for a request.
_RETRY: Final[RetryConfig] = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}


_SAFE_PATH: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*(/[A-Za-z0-9][A-Za-z0-9._=-]*)*")
"""Names that are the same in a key, in a URL and as a file, and that never climb up."""


class StorageRefused(DispatcherError):
    """The storage answers and refuses: no permission, no such bucket, a wrong region.

    The same call will be refused again until somebody mends the bucket or the worker's rights.
    """


class TooLarge(StorageRefused):
    """The object is larger than what it may be here; nothing of it was read or written."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as a listing shows it."""

    path: str
    """As `Storage` takes it: below the storage's own prefix."""

    size: int
    """In bytes."""

    modified: datetime
    """When it was written, by the storage's clock."""


class Storage:
    """A directory or a prefix of a bucket that is this installation's. Safe to use from threads.

    A path is like "inputs/<batch>/<key>.jsonl": letters, digits and "._=-" between slashes.

    Where the storage is a directory that does not exist, it is made with mode 0700, because items
    may be nobody else's business. What comes to lie in it gets the modes that the umask says. So,
    if tasks run as other users, make it yourself: a common group, mode 2770, umask 002 for all.

    Every method raises:
        Unreachable: the storage does not answer, or answers with a fault: try again.
        StorageRefused: it refuses, and would refuse again.
        ValueError: a path that is none.
    """

    def __init__(self, url: str) -> None:
        """Take `file:///directory`, `s3://bucket/prefix` or `gs://bucket/prefix`; touch nothing.

        Raises:
            ConfigurationError: it is none of these.
        """
        self.url: Final = url.rstrip("/")
        self._place = _place(url)
        self._store: _Store | None = None
        self._opening = Lock()

    def uri(self, path: str) -> str:
        """Name an object in full, as a container is given it; or, ending in "/", a prefix."""
        place, slash = self._place, "/" if path.endswith("/") else ""
        safe = _safe(path.removesuffix("/"))
        if place.scheme == "file":
            return (Path("/", place.key) / safe).as_uri() + slash
        key = f"{place.key}/{safe}" if place.key else safe
        return f"{place.scheme}://{place.bucket}/{key}{slash}"

    def create(self, path: str, data: bytes) -> bool:
        """Write an object whole, unless there is one of that name.

        Returns:
            False if it was there already; its content is not looked at. It may then be our own, of
            an earlier call whose answer was lost.

        Raises:
            TooLarge: more than `MAX_OBJECT_BYTES`.
        """
        if len(data) > MAX_OBJECT_BYTES:
            raise TooLarge(
                f"cannot write {self.uri(path)}: it would have {len(data):,} bytes, and an object "
                f"may have {MAX_OBJECT_BYTES:,}"
            )
        with self._explaining("write", _safe(path)):
            try:
                obstore.put(self._opened(), path, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def read(self, path: str, most: int) -> bytes | None:
        """Read an object; None if there is none.

        Raises:
            TooLarge: it has more than `most` bytes.
        """
        with self._explaining("read", _safe(path)):
            try:
                found = obstore.get(self._opened(), path)
                if found.meta["size"] <= most:
                    return bytes(found.bytes())
            except FileNotFoundError as error:
                if _names_no_bucket(error):
                    raise
                return None
        raise TooLarge(
            f"{self.uri(path)} has {found.meta['size']:,} bytes, and may have {most:,}; "
            "it was not read"
        )

    def beginning(self, path: str, most: int) -> bytes | None:
        """Read the first bytes of an object; None if there is none."""
        with self._explaining("read", _safe(path)):
            try:
                # No range is asked for: what does not know ranges would seem not to answer.
                blocks = obstore.get(self._opened(), path).stream(min_chunk_size=most)
                return next((bytes(block)[:most] for block in blocks), b"")
            except FileNotFoundError as error:
                if _names_no_bucket(error):
                    raise
                return None

    def sign(self, path: str, *, method: Literal["GET", "PUT"], expires: timedelta) -> str:
        """Make a URL with which anybody may read or write this object for a while.

        A bucket's URL is signed with the worker's own credentials: it works no longer than they do.
        On Google Cloud a worker without a key file needs `iam.serviceAccounts.signBlob` on its own
        account. Of a file, it is the `file://` URI.

        Raises:
            ValueError: `expires` is not within `LONGEST_SIGNED`.
        """
        if not timedelta(0) < expires <= LONGEST_SIGNED:
            raise ValueError(f"a URL is signed for at most {LONGEST_SIGNED}, not for {expires}")
        with self._explaining("sign a URL of", _safe(path)):
            store = self._opened()
            if isinstance(store, LocalStore):
                return self.uri(path)
            return obstore.sign(store, method, path, expires)

    def sign_all(
        self, paths: Sequence[str], *, method: Literal["GET", "PUT"], expires: timedelta
    ) -> list[str]:
        """Sign a URL of each of some objects, as `sign`; several at once, as each may be a call."""
        with ThreadPoolExecutor(_SIGNERS, "sign") as signers:
            return list(
                signers.map(lambda path: self.sign(path, method=method, expires=expires), paths)
            )

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """List what lies below a path, which may end in "/", page by page, in no order."""
        with self._explaining("list", prefix):
            for page in obstore.list(self._opened(), prefix.removesuffix("/")):
                for meta in page:
                    yield StoredObject(meta["path"], meta["size"], meta["last_modified"])

    def delete_older(self, prefix: str, before: datetime) -> int:
        """Delete what lies below a path and was written before a time; returns how many objects."""
        deleted = 0
        page: list[str] = []
        for found in self.list(prefix):
            if found.modified < before:
                page.append(found.path)
            if len(page) == _DELETE_PAGE:
                deleted += self._delete(page)
                page = []
        return deleted + self._delete(page)

    def check(self) -> None:
        """Look for a probe below "checks/", write it, read it, write it again in vain, delete it.

        On S3 this needs s3:GetObject, PutObject, DeleteObject and ListBucket.

        Raises:
            StorageRefused: also where the storage lets objects be overwritten that `create` must
                not overwrite, or loses them.
        """
        path = f"checks/{uuid.uuid4()}"
        data = b"Written by `dispatcher check`; it may be deleted.\n"
        # Who may not list is told "forbidden" of what does not exist, and would never learn it.
        self.read(path, 0)
        self.create(path, data)
        try:
            if self.read(path, len(data)) != data:
                raise StorageRefused(
                    f"{self.uri(path)} was written and does not read back as it was written: "
                    "this storage cannot be used"
                )
            if self.create(path, data):
                raise StorageRefused(
                    f"{self.uri(path)} was there and could be written again: this storage does not "
                    "know create-only writes (If-None-Match, ifGenerationMatch), which keep two "
                    "containers from writing one receipt; take another"
                )
        finally:
            self._delete([path])

    def check_signing(self) -> None:
        """Write and read a probe below "checks/" by URLs that are signed here, then delete it.

        Of a directory nothing is signed, and nothing is done.

        Raises:
            StorageRefused: they cannot be signed, or the storage refuses them; in its words.
        """
        if self.is_directory:
            return
        path = f"checks/{uuid.uuid4()}"
        data = b"Written by `dispatcher check`; it may be deleted.\n"
        written = self.sign(path, method="PUT", expires=_PROBE_SIGNED)
        read = self.sign(path, method="GET", expires=_PROBE_SIGNED)
        try:
            self._ask("PUT", path, written, data)
            if self._ask("GET", path, read, None) != data:
                raise StorageRefused(
                    f"{self.uri(path)} was written by a signed URL and does not read back as it "
                    "was written: signed URLs cannot be used there"
                )
        finally:
            self._delete([path])

    def _ask(self, method: str, path: str, url: str, data: bytes | None) -> bytes:
        """Use a signed URL as a task does. No message has it: it is a secret."""
        what = f"a URL that was signed here to {'write' if data else 'read'} {self.uri(path)}"
        # As `dispatcher.container` does; the type that urllib would add means a form.
        headers = {"Content-Type": "application/json"} if data else {}
        request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310 - signed here
        try:
            with urllib.request.urlopen(request, timeout=_PROBE_TIMEOUT) as answer:  # noqa: S310
                found: bytes = answer.read(_PROBE_BYTES)
                return found
        except urllib.error.HTTPError as error:
            said = mask_url(_said(error.read(_PROBE_BYTES).decode(errors="replace")))
            text = f"{what} is answered {error.code} {error.reason}: {said}"
            if error.code in _PASSING:
                raise Unreachable(text) from None
            raise StorageRefused(
                f"{text}. The clock of this machine must be right, and its credentials must be "
                "allowed that"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{what} gets no answer: {error}") from None

    @property
    def is_directory(self) -> bool:
        """Whether it is one on this machine, or mounted there, and no bucket."""
        return self._place.scheme == "file"

    def _delete(self, paths: Sequence[str]) -> int:
        if not paths:
            return 0
        with self._explaining("delete", paths[0]):
            store = self._opened()
            try:
                obstore.delete(store, paths)
            except FileNotFoundError as error:
                if _names_no_bucket(error):
                    raise
                # Another one cleans up at the same time: what is gone is gone.
                for path in paths:
                    try:
                        obstore.delete(store, path)
                    except FileNotFoundError:
                        continue
        return len(paths)

    def _opened(self) -> _Store:
        with self._opening:
            if self._store is None:
                try:
                    self._store = self._place.open()
                except BaseError as error:
                    raise StorageRefused(
                        f"cannot open {self.url}: the platform's variables (AWS_*, GOOGLE_*) do "
                        f"not make sense: {_said(error)}"
                    ) from error
                except OSError as error:
                    if error.errno not in _NO_PLACE:
                        raise
                    raise StorageRefused(
                        f"the directory of {self.url} is not there and cannot be made: {error}"
                    ) from error
            return self._store

    @contextmanager
    def _explaining(self, verb: str, path: str) -> Iterator[None]:
        uri = self.uri(path)
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            raise _refusal(f"cannot {verb} {uri}", error) from error


@dataclass(frozen=True, slots=True)
class _Place:
    """A directory (its path without the first slash is the key) or a prefix of a bucket."""

    scheme: str
    bucket: str
    key: str

    def open(self) -> _Store:
        if self.scheme == "s3":
            return S3Store(self.bucket, prefix=self.key or None, retry_config=_RETRY)
        if self.scheme == "gs":
            return GCSStore(self.bucket, prefix=self.key or None, retry_config=_RETRY)
        root = Path("/", self.key)
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Empty directories of past batches go with what lay in them.
        return LocalStore(root, automatic_cleanup=True)


def _place(url: str) -> _Place:
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    wanted = "write file:///absolute/directory, s3://bucket/prefix or gs://bucket/prefix"
    if not separator or scheme not in {"file", "s3", "gs"}:
        raise ConfigurationError(f"the storage {url!r} is no place for objects: {wanted}")
    host, _, key = rest.rstrip("/").partition("/")
    if scheme == "file":
        if host not in {"", "localhost"} or not key:
            raise ConfigurationError(
                f"the storage {url!r} is relative, names a host or names the root: {wanted}"
            )
        key, host = unquote(key), ""
    elif not host:
        raise ConfigurationError(f"the storage {url!r} names no bucket: {wanted}")
    if key and not {"", ".", ".."}.isdisjoint(key.split("/")):
        raise ConfigurationError(
            f"the storage {url!r} has a part that is empty, '.' or '..': {wanted}"
        )
    return _Place(scheme, host, key)


def _safe(path: str) -> str:
    if not _SAFE_PATH.fullmatch(path):
        raise ValueError(
            f"{path!r} is no path in the storage: letters, digits and ._=- between single slashes"
        )
    return path


def _names_no_bucket(error: Exception) -> bool:
    return "NoSuchBucket" in str(error) or "bucket does not exist" in str(error)


def _said(error: object) -> str:
    """Take the storage's own words out of what the library made of them."""
    text = str(error)
    if found := re.search(r"<Code>(.*?)</Code>\s*(?:<Message>(.*?)</Message>)?", text, re.DOTALL):
        return ": ".join(filter(None, found.groups()))[:_SAID]
    # The library adds a dump of its inner state after the first line.
    return text.partition("\n")[0][:_SAID]


def _refusal(what: str, error: Exception) -> DispatcherError:
    said = _said(error)
    if _names_no_bucket(error):
        return StorageRefused(f"{what}: there is no such bucket; make it, or mend the storage URL")
    if "RequestTimeTooSkewed" in str(error):
        return StorageRefused(f"{what}: the clock of this machine is wrong; {said}")
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError, PermissionError)):
        return StorageRefused(
            f"{what}: no permission; the credentials are those that this process's platform gives "
            f"it. The storage says: {said}"
        )
    status = re.search(r"status code: (\d+)", str(error))
    if "incorrectly configured region" in str(error):
        return StorageRefused(
            f"{what}: the bucket is in another region than this process looks; set AWS_REGION"
        )
    if isinstance(error, _FAULTS_OF_OURS) or (status and status[1] in _REFUSALS):
        return StorageRefused(f"{what}: {said}")
    return Unreachable(f"{what} now: {said}")


@dataclass(frozen=True, slots=True)
class _Location:
    """An object, as its URI names it."""

    scheme: str
    bucket: str
    key: str

    def store(self) -> _Store:
        if self.scheme == "s3":
            return S3Store(self.bucket, retry_config=_RETRY)
        if self.scheme == "gs":
            return GCSStore(self.bucket, retry_config=_RETRY)
        return LocalStore()


def read_object(uri: str, most: int) -> bytes | None:
    """Read an object by its whole URI; None if there is none.

    Raises:
        TooLarge: it has more than `most` bytes.
        StorageRefused: the storage refuses.
        Unreachable: it does not answer.
    """
    found = _around(uri)
    return None if found is None else found[0].read(found[1], most)


def read_beginning(uri: str, most: int) -> bytes | None:
    """Read the first bytes of an object by its whole URI; None if there is none.

    Raises:
        StorageRefused: the storage refuses.
        Unreachable: it does not answer.
    """
    found = _around(uri)
    return None if found is None else found[0].beginning(found[1], most)


def _around(uri: str) -> tuple[Storage, str] | None:
    """Take what an object lies in for a storage, and its name there; None if it is not there."""
    if uri.startswith("file://") and not Path(unquote(urlsplit(uri).path)).exists():
        return None  # and a look makes no directory, which a task of another user could not use
    parent, _, name = uri.rpartition("/")
    return Storage(parent), name


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
    said = _said(error)
    if isinstance(error, FileNotFoundError):
        if _names_no_bucket(error):
            return InvalidItems(f"cannot read items from {uri}: there is no such bucket")
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
