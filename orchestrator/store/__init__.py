"""The content-addressed store: keys, single flight, atomic publish, reading by memory map."""

from orchestrator.store.keys import key_of
from orchestrator.store.records import JoinedRecords, OpenFiles, Records, records_bytes, write_records
from orchestrator.store.store import Entry, Store

__all__ = [
    "Entry",
    "JoinedRecords",
    "OpenFiles",
    "Records",
    "Store",
    "key_of",
    "records_bytes",
    "write_records",
]
