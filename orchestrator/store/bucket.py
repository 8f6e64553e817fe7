"""An address of object storage (s3://, gs://, gcs:// or file://): whole objects, patiently."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import os
import random
import time
import urllib.parse
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from orchestrator.errors import UserError, WorkError, disk_full, first_lines, listed

CHUNK = 8 << 20
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 10.0
CONNECT_S = 5.0
REQUEST_S = 20.0
PATIENCE_S = 60.0  # of one request and its repetitions
S3_REFUSES = ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH", "NO_SUCH_BUCKET", "Permission denied")
GCS_REFUSES = ("Status(NOT_FOUND", "Status(PERMISSION_DENIED", "Status(UNAUTHENTICATED")
NO_CURE = (*S3_REFUSES, *GCS_REFUSES)
Result = TypeVar("Result")


class RemoteError(WorkError):
    """Object storage does not answer, or refuses."""


@dataclass(frozen=True)
class Object:
    """One object.

    Attributes:
        name: its path below the address.
        size: in bytes.
        stamp: changes when it is written again, most often.
    """

    name: str
    size: int
    stamp: int | None


class Bucket:
    """Objects below an address. Errors of the network and of the server are tried again, later and later.

    Args:
        address: such as `s3://bucket/prefix?region=eu-central-1`; credentials come from the environment or the machine.

    Raises:
        UserError: if no file system knows such an address.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.shown = address.partition("?")[0]
        try:
            self.system, root = _open(address)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise UserError(f"store.remote: {self.shown!r} cannot be opened: {first_lines(error)}") from None
        self.root = root.rstrip("/")

    def read(self, name: str) -> bytes | None:
        """The whole object, or None if there is none."""

        def read() -> bytes | None:
            try:
                with self.system.open_input_stream(self._path(name)) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

        return self._patiently(read, f"read {name}")

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, replacing it at once."""
        self._patiently(lambda: self.write_once(name, content), f"write {name}")

    def write_once(self, name: str, content: bytes) -> None:
        """The same without another try.

        Raises:
            OSError: of any kind.
        """
        self._parents(name)
        with self.system.open_output_stream(self._path(name)) as stream:
            stream.write(content)

    def upload(self, file: Path, name: str) -> None:
        """Copies a local file; a reader sees nothing of it before all of it is there."""

        def upload() -> None:
            self._parents(name)
            with file.open("rb") as source, self.system.open_output_stream(self._path(name)) as stream:
                while block := source.read(CHUNK):
                    stream.write(block)

        self._patiently(upload, f"write {name}")

    def download(self, name: str, file: Path) -> bool:
        """Copies an object into a local file; False if there is none."""

        def download() -> bool:
            try:
                with self.system.open_input_stream(self._path(name)) as stream, file.open("wb") as target:
                    while block := stream.read(CHUNK):
                        target.write(block)
            except FileNotFoundError:
                return False
            return True

        return self._patiently(download, f"read {name}")

    def has(self, name: str) -> bool:
        """Whether there is such an object; half the requests of reading it."""
        info = self._patiently(lambda: self.system.get_file_info(self._path(name)), f"look for {name}")
        return bool(info.type == fs.FileType.File)

    def hash(self, name: str) -> str | None:
        """SHA-256 of an object, in hex, or None if there is none."""

        def read() -> str | None:
            digest = hashlib.sha256()
            try:
                with self.system.open_input_stream(self._path(name)) as stream:
                    while block := stream.read(CHUNK):
                        digest.update(block)
            except FileNotFoundError:
                return None
            return digest.hexdigest()

        return self._patiently(read, f"read {name}")

    def list(self, folder: str = "", *, deep: bool = True) -> list[Object]:
        """The objects below a folder, by name."""
        where = self._path(folder) if folder else self.root
        selector = fs.FileSelector(where, recursive=deep, allow_not_found=True)
        infos = self._patiently(lambda: self.system.get_file_info(selector), f"list {folder or 'it'}")
        found = [i for i in infos if i.type == fs.FileType.File]
        return sorted(
            (Object(i.path.removeprefix(self.root).lstrip("/"), i.size, i.mtime_ns) for i in found),
            key=lambda one: one.name,
        )

    def delete(self, name: str) -> None:
        """Removes an object, if it is there."""

        def delete() -> None:
            try:
                self.system.delete_file(self._path(name))
            except FileNotFoundError:
                return

        self._patiently(delete, f"delete {name}")

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _parents(self, name: str) -> None:
        if isinstance(self.system, fs.LocalFileSystem):  # object storage has no folders
            self.system.create_dir(self._path(name).rpartition("/")[0], recursive=True)

    def _patiently(self, work: Callable[[], Result], what: str) -> Result:
        started, wait = time.monotonic(), FIRST_WAIT_S
        while True:
            try:
                return work()
            except (OSError, pa.ArrowException) as error:
                if disk_full(error) or getattr(error, "filename", None) is not None:
                    raise  # of the local file
                said = first_lines(error).rstrip(".")
                spent = time.monotonic() - started
                if any(words in str(error) for words in NO_CURE):
                    raise RemoteError(f"The object storage {self.shown} refuses to {what}: {said}.") from None
                if spent + wait > PATIENCE_S:
                    raise RemoteError(
                        f"The object storage {self.shown} could not {what} in {spent:.0f} s; the last error: {said}."
                    ) from None
            time.sleep(wait * random.uniform(0.5, 1))  # many nodes that failed together do not come back together
            wait = min(2 * wait, LONGEST_WAIT_S)


@functools.lru_cache(maxsize=16)
def bucket_at(address: str) -> Bucket:
    """The bucket of an address; one client for each process."""
    return Bucket(address)


def _open(address: str) -> tuple[fs.FileSystem, str]:
    """As `from_uri` reads it; but on S3 a small object is one request and a slow server is waited for, and Google's
    client does not try a request again for a quarter of an hour.
    """
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("s3", "gs", "gcs"):
        return fs.FileSystem.from_uri(address)
    options = dict(urllib.parse.parse_qsl(parts.query))
    allowed = ["region"] * (parts.scheme == "s3") + ["endpoint_override", "scheme"]
    unknown = next((name for name in options if name not in allowed), None)
    if unknown is not None:
        raise ValueError(f"unknown option {unknown!r}; allowed are {listed(allowed)}")
    bucket, endpoint = parts.netloc.rpartition("@")[2], options.get("endpoint_override")
    common: dict[str, Any] = {
        "endpoint_override": endpoint,
        "scheme": options.get("scheme", "https"),
        "anonymous": parts.username == "anonymous",
    }
    system: fs.FileSystem
    if parts.scheme == "s3":
        region = options.get("region") or (None if endpoint else fs.resolve_s3_region(bucket))
        waits = {"connect_timeout": CONNECT_S, "request_timeout": REQUEST_S}
        system = fs.S3FileSystem(region=region, allow_delayed_open=True, **waits, **common)
    else:
        system = fs.GcsFileSystem(retry_time_limit=datetime.timedelta(seconds=REQUEST_S), **common)
    return system, bucket + parts.path


class BucketMirror:
    """Files of a folder of partial work, for whoever goes on with it on another node.

    Args:
        bucket: where they are kept.
        folder: below its address.
    """

    def __init__(self, bucket: Bucket, folder: str) -> None:
        self.bucket, self.folder = bucket, folder

    def put(self, file: Path) -> None:
        """Keeps a file under its name. One that cannot be kept is missing after a death, and costs nothing else."""
        with contextlib.suppress(RemoteError):
            self.bucket.upload(file, f"{self.folder}/{file.name}")

    def get(self, file: Path) -> bool:
        """Brings a kept file of that name, whole, if there is one."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
        try:
            if not self.bucket.download(f"{self.folder}/{file.name}", temporary):
                return False
            os.replace(temporary, file)
            return True
        finally:
            temporary.unlink(missing_ok=True)
