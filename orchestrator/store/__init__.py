"""The content-addressed store: keys, single flight, atomic publish, reading by memory map."""

from orchestrator.store.keys import key_of
from orchestrator.store.places import check_remote, open_store, store_at
from orchestrator.store.records import JoinedRecords, OpenFiles, Records, records_bytes, write_records
from orchestrator.store.remote import RemoteStore
from orchestrator.store.store import Entry, Store, in_turns

__all__ = [
    "Entry",
    "JoinedRecords",
    "OpenFiles",
    "Records",
    "RemoteStore",
    "Store",
    "check_remote",
    "in_turns",
    "key_of",
    "open_store",
    "records_bytes",
    "store_at",
    "write_records",
]
