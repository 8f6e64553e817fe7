"""The content-addressed store: keys, single flight, atomic publish, reading by memory map."""

from orchestrator.store.keys import key_of
from orchestrator.store.records import JoinedRecords, Records, write_records
from orchestrator.store.store import Entry, Store

__all__ = ["Entry", "JoinedRecords", "Records", "Store", "key_of", "write_records"]
