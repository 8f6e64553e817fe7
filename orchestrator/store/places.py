"""Which store an address or a folder stands for."""

from __future__ import annotations

import uuid
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.spec import read_spec
from orchestrator.store.bucket import RemoteError, bucket_at
from orchestrator.store.remote import RemoteStore
from orchestrator.store.store import Store


def store_at(address: str | Path, *, min_free_gb: float = 0.0) -> Store:
    """The store of a folder, or of an address of object storage.

    Raises:
        UserError: if the address cannot be opened.
    """
    if "://" in str(address):
        return RemoteStore(str(address), min_free_gb=min_free_gb)
    return Store(address, min_free_gb=min_free_gb)


def open_store(where: str | Path) -> Store:
    """The store at an address; or of a sweep folder, of a storage folder, or the store folder itself.

    Raises:
        UserError: if there is no store there.
    """
    if "://" in str(where):
        return store_at(where)
    path = Path(where)
    if (path / "sweep.yaml").is_file() and (remote := read_spec(path / "sweep.yaml").store.remote) is not None:
        return store_at(remote)
    for candidate in (path / "store", path.parent / "store", path):
        if candidate.name == "store" and candidate.is_dir():
            return Store(candidate)
    raise UserError(f"There is no store at {str(path)!r}, nor beside it.")


def check_remote(address: str) -> None:
    """Writes, lists, reads and deletes one small object.

    Raises:
        UserError: if that is not possible.
    """
    bucket = bucket_at(address)
    name, content = f".leases/check-{uuid.uuid4().hex}/probe", uuid.uuid4().hex.encode()
    try:
        bucket.write(name, content)
        whole = bucket.read(name) == content and [o.name for o in bucket.list(name.rpartition("/")[0])] == [name]
        bucket.delete(name)
    except RemoteError as error:
        raise UserError(f"store.remote: {error}") from None
    if not whole:
        raise UserError(f"store.remote: {bucket.shown} does not give back what was just written to it.")
