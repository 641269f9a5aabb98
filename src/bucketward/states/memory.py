"""A state in this process's memory: the reference for the others, and for tests."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TypeGuard

from bucketward.errors import Changed
from bucketward.model import Add, Delete, Page, Put, Record
from bucketward.states.rules import (
    Tables,
    added,
    check_changes,
    check_index,
    check_keys,
    check_limit,
    check_table,
    from_cursor,
    named,
    to_cursor,
)

PERMISSIONS: Mapping[str, str] = {}

_BACKEND = "memory"
_EXPORTED = 500
_SWEEP_SECONDS = 60.0


def open_memory(_url: str, tables: Tables) -> MemoryState:
    """Open a new, empty state; every ``memory://`` is another."""
    return MemoryState(tables)


@dataclass(slots=True)
class _Table:
    records: dict[str, Record] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    """All keys in order."""
    entries: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=dict)
    """By index and value: sort and key of each such record, in order."""

    def write(self, record: Record) -> None:
        self.remove(record.key)
        self.records[record.key] = record
        insort(self.keys, record.key)
        for index, (value, sort) in record.indexes.items():
            insort(self.entries.setdefault((index, value), []), (sort, record.key))

    def remove(self, key: str) -> None:
        record = self.records.pop(key, None)
        if record is None:
            return
        del self.keys[bisect_left(self.keys, key)]
        for index, (value, sort) in record.indexes.items():
            entries = self.entries[index, value]
            del entries[bisect_left(entries, (sort, key))]
            if not entries:
                del self.entries[index, value]


class MemoryState:
    """A `State` that is gone with the process.  Expired records are never returned."""

    def __init__(self, tables: Tables) -> None:
        self._names = {table: tuple(indexes) for table, indexes in tables.items()}
        self._tables = {table: _Table() for table in tables}
        self._lock = threading.Lock()
        self._sweep_at = time.monotonic() + _SWEEP_SECONDS

    def ping(self) -> None:
        """Do nothing: memory is always there."""

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def get(self, table: str, keys: Sequence[str]) -> Mapping[str, Record]:
        """Look each key up."""
        check_table(self._names, table, _BACKEND)
        check_keys(keys, _BACKEND)
        now = datetime.now(UTC)
        with self._lock:
            records = self._tables[table].records
            found = {key: records.get(key) for key in keys}
        return {key: record for key, record in found.items() if _is_live(record, now)}

    def commit(self, changes: Sequence[Put | Delete | Add]) -> None:
        """Decide about every change before the first one is made."""
        check_changes(self._names, changes, _BACKEND)
        now = datetime.now(UTC)
        with self._lock:
            writes = [self._decide(change, now) for change in changes]
            for change, record in zip(changes, writes, strict=True):
                if record is not None:
                    self._tables[change.table].write(record)
                elif isinstance(change, Delete):
                    self._tables[change.table].remove(change.key)
            if time.monotonic() >= self._sweep_at:
                self._sweep(now)

    def query(
        self,
        table: str,
        index: str,
        value: str,
        *,
        low: str = "",
        high: str = "",
        after: str = "",
        limit: int = 100,
        newest_first: bool = False,
    ) -> Page[Record]:
        """Return full pages, except for the last one."""
        check_index(self._names, table, index, _BACKEND)
        check_limit(limit)
        sort, key = from_cursor(after, 2, _BACKEND) if after else ("", "")
        now = datetime.now(UTC)
        with self._lock:
            entries = self._tables[table].entries.get((index, value), [])
            start = bisect_left(entries, (low, ""))
            stop = bisect_left(entries, (high, "")) if high else len(entries)
            if after and newest_first:
                stop = min(stop, bisect_left(entries, (sort, key)))
            elif after:
                start = max(start, bisect_right(entries, (sort, key)))
            order = range(stop - 1, start - 1, -1) if newest_first else range(start, stop)
            records = self._tables[table].records
            items: list[Record] = []
            for at in order:
                record = records[entries[at][1]]
                if not _is_live(record, now):
                    continue
                if len(items) == limit:
                    last = items[-1]
                    return Page(items, to_cursor(last.indexes[index][1], last.key))
                items.append(record)
        return Page(items)

    def export(self, table: str, cursor: str = "") -> Page[Record]:
        """Return the records in the order of their keys."""
        check_table(self._names, table, _BACKEND)
        (after,) = from_cursor(cursor, 1, _BACKEND) if cursor else [""]
        now = datetime.now(UTC)
        with self._lock:
            keys = self._tables[table].keys
            start = bisect_right(keys, after) if cursor else 0
            part = keys[start : start + _EXPORTED]
            records = [self._tables[table].records[key] for key in part]
            is_last = start + len(part) >= len(keys)
        items = [record for record in records if _is_live(record, now)]
        return Page(items, "" if is_last else to_cursor(part[-1]))

    def _decide(self, change: Put | Delete | Add, now: datetime) -> Record | None:
        """Return what `change` writes, `None` for nothing; `Changed` if its condition fails."""
        key = change.record.key if isinstance(change, Put) else change.key
        stored = self._tables[change.table].records.get(key)
        if not _is_live(stored, now):
            stored = None
        version = stored.version if stored else 0
        if isinstance(change, Add):
            base = stored or Record(key, "{}")
            return replace(base, body=added(change, base.body, _BACKEND), version=version + 1)
        if change.version is not None and (
            change.version != version or (isinstance(change, Delete) and stored is None)
        ):
            raise Changed(
                f"{named(change.table, key)} has version {version}, not {change.version}",
                backend=_BACKEND,
            )
        if isinstance(change, Delete):
            return None
        record = change.record
        indexes = MappingProxyType({name: (v, s) for name, (v, s) in record.indexes.items()})
        expires_at = record.expires_at and record.expires_at.astimezone(UTC)
        return Record(record.key, record.body, version + 1, indexes, expires_at)

    def _sweep(self, now: datetime) -> None:
        self._sweep_at = time.monotonic() + _SWEEP_SECONDS
        for table in self._tables.values():
            for key in [k for k, record in table.records.items() if not _is_live(record, now)]:
                table.remove(key)


def _is_live(record: Record | None, now: datetime) -> TypeGuard[Record]:
    return record is not None and (record.expires_at is None or record.expires_at > now)
