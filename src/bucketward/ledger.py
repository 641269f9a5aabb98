"""Typed records over a `State`: every table, every index, and what is written together."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from bucketward.errors import Changed, ConfigError, NotFound, Unavailable
from bucketward.interfaces import Queue, State
from bucketward.model import (
    Add,
    Delete,
    EngineReport,
    Finding,
    Note,
    ObjectInfo,
    ObjectRef,
    Page,
    Put,
    Record,
    ScanResult,
    Signatures,
    Verdict,
)
from bucketward.policy import Policy, Settings

log = logging.getLogger(__name__)

TABLES: Mapping[str, tuple[str, ...]] = {
    # One scan of one exact object, by scan id.  `bucket` and `verdict` values end in the UTC day;
    # Clean is not indexed by verdict.  `object` gathers the history of one key.
    "results": ("bucket", "verdict", "object"),
    # The compact current verdict of every live object version; `bucket` orders them by key.
    # `retry` holds those with verdict Error, by when they are due for another try.
    "verdicts": ("bucket", "retry"),
    # Objects and bytes by day, bucket and verdict.
    "counters": (),
    # Protected buckets, by identity.
    "buckets": ("all",),
    # `settings/current`, and every earlier one by version.
    "settings": ("history",),
    # Notes not delivered yet, by when they are due.
    "outbox": ("due",),
    # Messages that were buried, for people to read and redrive.
    "dead": ("day",),
    # Who does a background chore now.
    "leases": (),
    # Agents and their heartbeat.
    "agents": ("all",),
    # What people and Bucketward itself changed.
    "audit": ("day",),
    # Findings that an administrator allows, by content and signature.
    "allow": ("sha256", "all"),
    # What engines said of some bytes, by SHA-256, size and engine set; see `bucketward.cache`.
    "cache": (),
}

_MAX_RESULT = 200 * 1024  # of 256 KiB, which a record and a message may have
_MAX_TEXT = 2048
_MANY, _FEW = 100, 10  # findings of one engine that are kept
_BATCH = 100  # the most changes in one commit: the State Protocol
_LETTER = 250 << 10  # the largest dead letter: a record's body ends at 256 KiB
_SHOWN = 1000  # characters of a reason
RETRY_AFTER = (3600.0, 6 * 3600.0, 24 * 3600.0)
"""When an object with verdict Error is tried again, in seconds after each failure."""


class Results(Protocol):
    """Where finished scans go: the ledger itself, or a queue that a keeper drains into it."""

    def record(self, results: Sequence[ScanResult]) -> None:
        """Make the results durable, all of them; recording one twice changes nothing.

        `Unavailable` if it cannot be done now: the caller keeps them and tries again.
        """

    def forget(self, refs: Sequence[ObjectRef]) -> None:
        """Note that these objects are gone from their bucket."""

    def replaced(self, holders: Sequence[ObjectRef]) -> None:
        """Note what keys without versions hold now, by etag: whatever else they held is gone."""

    def ping(self) -> None:
        """Prove that `record` would work."""


@dataclass(frozen=True, slots=True)
class Protected:
    """A protected bucket.  `url` opens it; `bucket` is its identity.

    `route` is how its events reach us.  The sweep looks after objects modified at or after
    `since` (ISO-8601 in UTC), "" for all: older ones are for a job that somebody asks for.
    """

    bucket: str
    url: str
    account: str = ""
    region: str = ""
    route: str = ""
    since: str = ""


@dataclass(frozen=True, slots=True)
class Due:
    """A note that waits in the outbox for one notifier, and how often it was tried."""

    target: str
    note: Note
    tries: int = 0

    @property
    def key(self) -> str:
        """Return the record key: each notifier gets its own copy."""
        return f"{self.note.id}|{self.target}"


@dataclass(frozen=True, slots=True)
class Allow:
    """A false positive: this signature may be found in exactly these bytes.

    `bucket` and `key` narrow it to one place if given.
    """

    sha256: str
    signature: str
    by: str
    reason: str
    at: datetime
    bucket: str = ""
    key: str = ""
    expires_at: datetime | None = None
    is_active: bool = True

    @property
    def id(self) -> str:
        """Return what tells this entry from every other."""
        return _digest(self.sha256, self.signature, self.bucket, self.key)

    def covers(self, bucket: str, key: str, now: datetime) -> bool:
        """Return whether the entry holds for an object there, now."""
        return (
            self.is_active
            and (self.expires_at is None or now < self.expires_at)
            and self.bucket in {"", bucket}
            and self.key in {"", key}
        )


@dataclass(frozen=True, slots=True)
class CurrentVerdict:
    """The compact verdict on one live object version."""

    bucket: str
    key: str
    identity: str
    verdict: Verdict
    engines: str
    scanned_at: datetime
    attempts: int = 0


class Ledger:
    """All that is known, in the words of the product.  Safe from any thread."""

    def __init__(
        self,
        state: State,
        *,
        keep: str = "all",
        retention_days: int = 0,
        notes: Callable[[ScanResult], Sequence[Due]] = lambda _: (),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.state = state
        self._keep = keep
        self._retention = timedelta(days=retention_days) if retention_days else None
        self._notes = notes
        self._now = now

    def ping(self) -> None:
        """Prove that the state can be reached."""
        self.state.ping()

    # -- results ---------------------------------------------------------------------------------

    def record(self, results: Sequence[ScanResult]) -> None:
        """Write results, current verdicts, counters and notes; see `Results.record`.

        Whole batches are committed as new; if one of them is known already the batch falls apart
        into single commits, and a known one is at most brought up to date.
        """
        for batch in _batches(results, self._changes):
            try:
                self.state.commit(_merged(batch))
            except Changed:
                for changes in batch:
                    self._record_one(changes)

    def _record_one(self, changes: _Changes) -> None:
        try:
            self.state.commit(_merged([changes]))
            return
        except Changed:
            pass
        stored = self.state.get("results", [changes.result.id]).get(changes.result.id)
        if stored is None:
            raise Changed(f"result {changes.result.id} vanished while it was written")
        if json.loads(stored.body).get("action_state") != "pending":
            return
        if changes.result.action_state == "pending":
            return
        first = Put("results", changes.records[0].record, version=stored.version)
        self.state.commit([first, *changes.records[1:]])

    def _changes(self, result: ScanResult) -> _Changes:
        day = result.scanned_at.strftime("%Y-%m-%d")
        info = result.object
        when = f"{result.scanned_at.isoformat(timespec='milliseconds')}|{result.id}"
        expires = result.scanned_at + self._retention if self._retention else None
        indexes: dict[str, tuple[str, str]] = {}
        if self._keep == "all" or result.verdict is not Verdict.CLEAN:
            body = dump_result(result)
            indexes["bucket"] = (f"{info.bucket}|{day}", when)
            indexes["object"] = (object_id(info.bucket, info.key), when)
            if result.verdict is not Verdict.CLEAN:
                indexes["verdict"] = (f"{result.verdict}|{day}", when)
        else:
            # Kept only so that a redelivery finds it: queues forget messages within 14 days.
            body = "{}"
            expires = result.scanned_at + timedelta(days=15)
        records: list[Put | Delete] = [
            Put("results", Record(result.id, body, indexes=indexes, expires_at=expires), version=0)
        ]
        if result.action in ("move", "delete") and result.action_state == "done":
            records.append(Delete("verdicts", verdict_id(info.bucket, info.key, info.version_id)))
        else:
            records.append(Put("verdicts", self._verdict_record(result)))
        if result.action_state != "pending":  # people are told how it ended
            records += [
                Put("outbox", _outbox_record(due, result.scanned_at), version=0)
                for due in self._notes(result)
            ]
        amounts = {str(result.verdict): 1, f"{result.verdict}.bytes": info.size}
        for reason in result.reasons:
            amounts[f"reason.{reason}"] = 1
        return _Changes(result, tuple(records), f"{day}|{info.bucket}", amounts)

    def _verdict_record(self, result: ScanResult) -> Record:
        info = result.object
        key = verdict_id(info.bucket, info.key, info.version_id)
        body: dict[str, Any] = {
            "bucket": info.bucket,
            "key": info.key,
            "identity": info.identity,
            "verdict": result.verdict,
            "engines": result.engines,
            "scanned_at": result.scanned_at.isoformat(),
        }
        indexes = {"bucket": (info.bucket, f"{info.key}\0{info.identity}")}
        if result.verdict is Verdict.ERROR:
            stored = self.state.get("verdicts", [key]).get(key)
            attempts = json.loads(stored.body).get("attempts", 0) if stored else 0
            body["attempts"] = attempts + 1
            if attempts < len(RETRY_AFTER):
                due = result.scanned_at + timedelta(seconds=RETRY_AFTER[attempts])
                indexes["retry"] = ("due", due.isoformat(timespec="seconds"))
        return Record(key, json.dumps(body), indexes=indexes)

    def result(self, scan_id: str) -> ScanResult | None:
        """Return the result of one scan, or `None` if there is none kept in full."""
        record = self.state.get("results", [scan_id]).get(scan_id)
        return load_result(record.body) if record and record.body != "{}" else None

    def results(
        self, index: str, value: str, *, cursor: str = "", limit: int = 100
    ) -> Page[ScanResult]:
        """Return results newest first; `index` and `value` as in `TABLES`, the day included."""
        page = self.state.query(
            "results", index, value, after=cursor, limit=limit, newest_first=True
        )
        return Page(
            [load_result(r.body) for r in page.items if r.body != "{}"],
            page.cursor,
        )

    def forget(self, refs: Sequence[ObjectRef]) -> None:
        """Drop the current verdicts of objects that are gone, and end what was pending on them.

        A reference without a version drops every verdict of its key; if the key holds a new
        object by now, the sweep finds it without a verdict and has it scanned.
        """
        for ref in refs:
            self._end_pending(ref)
            if ref.version_id is not None:
                self.state.commit(
                    [Delete("verdicts", verdict_id(ref.bucket, ref.key, ref.version_id))]
                )
                continue
            for record in self._verdicts_of(ref.bucket, ref.key):
                self.state.commit([Delete("verdicts", record.key)])

    def replaced(self, holders: Sequence[ObjectRef]) -> None:
        """End what was pending on objects that others overwrote; see `Results.replaced`."""
        for ref in holders:
            self._end_pending(ref, holds=ref.etag)

    def _end_pending(self, ref: ObjectRef, *, holds: str | None = None) -> None:
        """Finish results whose deletion happened but was not recorded: the agent died between.

        With `holds`, the etag of what is there, only those on other objects.
        """
        for result in self.results("object", object_id(ref.bucket, ref.key), limit=20).items:
            if result.action_state != "pending" or result.object.etag == holds:
                continue
            if ref.version_id not in (None, result.object.version_id):
                continue
            changes = self._changes(replace(result, action_state="done"))
            if holds is not None:  # the current verdict is on what is there
                records = tuple(c for c in changes.records if c.table != "verdicts")
                changes = replace(changes, records=records)
            self._record_one(changes)

    def _verdicts_of(self, bucket: str, key: str) -> Iterator[Record]:
        cursor = ""
        while True:
            page = self.state.query(
                "verdicts", "bucket", bucket, low=f"{key}\0", high=f"{key}\1", after=cursor
            )
            yield from page.items
            cursor = page.cursor
            if not cursor:
                return

    def verdicts(self, infos: Sequence[ObjectInfo]) -> Sequence[CurrentVerdict | None]:
        """Return the current verdict on each of these exact objects, `None` where there is none."""
        keys = [verdict_id(i.bucket, i.key, i.version_id) for i in infos]
        found: dict[str, CurrentVerdict] = {}
        for start in range(0, len(keys), _BATCH):
            records = self.state.get("verdicts", keys[start : start + _BATCH])
            found.update({key: _load_verdict(record.body) for key, record in records.items()})
        return [
            found[key] if key in found and _is_about(found[key], info) else None
            for key, info in zip(keys, infos, strict=True)
        ]

    def due_retries(self, limit: int = 100) -> Sequence[CurrentVerdict]:
        """Return objects with verdict Error whose next try is due."""
        now = self._now().isoformat(timespec="seconds")
        page = self.state.query("verdicts", "retry", "due", high=now, limit=limit)
        return [_load_verdict(record.body) for record in page.items]

    def retried(self, verdict: CurrentVerdict) -> None:
        """Take a verdict off the list of retries: it has been enqueued again."""
        is_etag = verdict.identity.startswith("etag:")
        key = verdict_id(verdict.bucket, verdict.key, None if is_etag else verdict.identity)
        stored = self.state.get("verdicts", [key]).get(key)
        if stored is None or "retry" not in stored.indexes:
            return
        indexes = {name: at for name, at in stored.indexes.items() if name != "retry"}
        with suppress(Changed):  # a newer verdict has its own opinion on retries
            self.state.commit(
                [Put("verdicts", replace(stored, indexes=indexes), version=stored.version)]
            )

    def counters(self, bucket: str, day: str) -> Mapping[str, int]:
        """Return the counters of one bucket on one UTC day (``YYYY-MM-DD``)."""
        key = f"{day}|{bucket}"
        record = self.state.get("counters", [key]).get(key)
        return json.loads(record.body) if record else {}

    def cached(self, key: str) -> str | None:
        """Return an entry of the cache, `None` if there is none."""
        record = self.state.get("cache", [key]).get(key)
        return record.body if record else None

    def cache(self, bodies: Mapping[str, str], expires_at: datetime) -> None:
        """Put entries, at most a hundred, into the cache."""
        self.state.commit(
            [Put("cache", Record(key, body, expires_at=expires_at)) for key, body in bodies.items()]
        )

    # -- protected buckets and settings ----------------------------------------------------------

    def protect(self, bucket: Protected, *, again: bool = False) -> bool:
        """Enter a protected bucket; return whether it is new.

        An entry that is there stays as it is, unless `again` is to replace it.
        """
        body = json.dumps({s: getattr(bucket, s) for s in Protected.__slots__})
        record = Record(bucket.bucket, body, indexes={"all": ("all", bucket.bucket)})
        try:
            self.state.commit([Put("buckets", record, version=None if again else 0)])
        except Changed:
            return False
        return True

    def unprotect(self, bucket: str) -> None:
        """Take a bucket off the list; its results stay."""
        self.state.commit([Delete("buckets", bucket)])

    def protected(self) -> Mapping[str, Protected]:
        """Return every protected bucket by identity."""
        found: dict[str, Protected] = {}
        cursor = ""
        while True:
            page = self.state.query("buckets", "all", "all", after=cursor)
            found.update({r.key: Protected(**json.loads(r.body)) for r in page.items})
            cursor = page.cursor
            if not cursor:
                return found

    def settings(self) -> tuple[str, int]:
        """Return the current settings as JSON text and their version, ``("{}", 0)`` if unset."""
        record = self.state.get("settings", ["current"]).get("current")
        return (record.body, record.version) if record else ("{}", 0)

    def change_settings(self, text: str, expected: int, who: str) -> int:
        """Replace the settings if they still are version `expected`, else `Changed`.

        The history keeps every version and who made it; returns the new version.
        """
        now = self._now().isoformat()
        version = expected + 1
        entry = json.dumps({"settings": json.loads(text), "who": who, "at": now})
        self.state.commit(
            [
                Put("settings", Record("current", text), version=expected),
                Put(
                    "settings",
                    Record(f"{version:08}", entry, indexes={"history": ("all", f"{version:08}")}),
                    version=0,
                ),
                self._audit(who, "setting.change", f"version {version}", now),
            ]
        )
        return version

    def _audit(self, who: str, what: str, detail: str, now: str) -> Put:
        key = hashlib.sha256(f"{now}|{who}|{what}|{detail}".encode()).hexdigest()[:32]
        body = json.dumps({"who": who, "what": what, "detail": detail, "at": now})
        return Put("audit", Record(key, body, indexes={"day": (now[:10], now)}))

    # -- the allow list --------------------------------------------------------------------------

    def allow(self, entry: Allow) -> None:
        """Enter an allowed finding, or replace the entry about the same one."""
        fields = {name: getattr(entry, name) for name in Allow.__slots__}
        fields["at"] = entry.at.isoformat()
        fields["expires_at"] = entry.expires_at and entry.expires_at.isoformat()
        indexes = {"sha256": (entry.sha256, entry.id), "all": ("all", f"{fields['at']}|{entry.id}")}
        verb = "finding.allow" if entry.is_active else "finding.disallow"
        detail = f"{entry.signature} in {entry.sha256}: {entry.reason}"
        self.state.commit(
            [
                Put("allow", Record(entry.id, json.dumps(fields), indexes=indexes)),
                self._audit(entry.by, verb, detail, self._now().isoformat()),
            ]
        )

    def allowed(self, sha256: str, bucket: str, key: str) -> Collection[str]:
        """Return the signatures that are allowed in these bytes, at this place, now."""
        now = self._now()
        page = self.state.query("allow", "sha256", sha256, limit=1000)
        entries = [_load_allow(record.body) for record in page.items]
        return {entry.signature for entry in entries if entry.covers(bucket, key, now)}

    def allow_list(self, *, cursor: str = "", limit: int = 100) -> Page[Allow]:
        """Return the entries of the allow list, newest first, those that ended too."""
        page = self.state.query("allow", "all", "all", after=cursor, limit=limit, newest_first=True)
        return Page([_load_allow(record.body) for record in page.items], page.cursor)

    def amend(self, result: ScanResult, who: str, what: str) -> None:
        """Write down what somebody did about a result, in the result and in the audit log."""
        stored = self.state.get("results", [result.id]).get(result.id)
        if stored is None:
            raise NotFound(f"there is no result {result.id}", backend="ledger")
        now = self._now().isoformat()
        self.state.commit(
            [
                Put("results", replace(stored, body=dump_result(result)), version=stored.version),
                self._audit(who, what, f"{result.object.bucket} {result.object.key}", now),
            ]
        )

    # -- notes, dead letters, leases, agents -----------------------------------------------------

    def due_notes(self, limit: int = 100) -> Sequence[Due]:
        """Return what is to be delivered now."""
        now = self._now().isoformat(timespec="milliseconds")
        page = self.state.query("outbox", "due", "due", high=f"{now}\uffff", limit=limit)
        return [_load_due(record.body) for record in page.items]

    def noted(self, delivered: Sequence[Due]) -> None:
        """Take delivered notes out of the outbox."""
        changes = [Delete("outbox", due.key) for due in delivered]
        for start in range(0, len(changes), _BATCH):
            self.state.commit(changes[start : start + _BATCH])

    def note_failed(self, due: Due, delay: float) -> None:
        """Leave a note in the outbox for another try in `delay` seconds."""
        later = self._now() + timedelta(seconds=delay)
        self.state.commit([Put("outbox", _outbox_record(replace(due, tries=due.tries + 1), later))])

    def bury(self, message_id: str, body: str, reason: str) -> None:
        """Keep a dead letter for people to read and redrive; one too large, its beginning."""
        now = self._now().isoformat()
        letter = {"id": message_id, "body": body, "reason": reason[:_SHOWN], "at": now}
        text = json.dumps(letter)
        if len(text) > _LETTER:
            # A character may become twelve.
            text = json.dumps({**letter, "body": body[: _LETTER // 13], "is_cut": True})
        self.state.commit([Put("dead", Record(message_id, text, indexes={"day": (now[:10], now)}))])

    def dead(self, day: str, *, cursor: str = "") -> Page[Mapping[str, str]]:
        """Return the dead letters of one UTC day, newest first."""
        page = self.state.query("dead", "day", day, after=cursor, newest_first=True)
        return Page([json.loads(record.body) for record in page.items], page.cursor)

    def lease(self, name: str, holder: str, seconds: float) -> bool:
        """Take or renew the lease on a chore; return whether `holder` has it now."""
        now = self._now()
        stored = self.state.get("leases", [name]).get(name)
        if stored is not None:
            body = json.loads(stored.body)
            if body["holder"] != holder and datetime.fromisoformat(body["until"]) > now:
                return False
        until = (now + timedelta(seconds=seconds)).isoformat()
        record = Record(name, json.dumps({"holder": holder, "until": until}))
        try:
            self.state.commit([Put("leases", record, version=stored.version if stored else 0)])
        except Changed:
            return False
        return True

    def heartbeat(self, agent: str, facts: Mapping[str, Any]) -> None:
        """Say that an agent lives, and what it is: version, engines, signatures."""
        now = self._now()
        body = json.dumps({**facts, "agent": agent, "at": now.isoformat()})
        expires = now + timedelta(days=7)
        record = Record(agent, body, indexes={"all": ("all", agent)}, expires_at=expires)
        self.state.commit([Put("agents", record)])

    def agents(self) -> Sequence[Mapping[str, Any]]:
        """Return what each agent said of itself last."""
        page = self.state.query("agents", "all", "all", limit=1000)
        return [json.loads(record.body) for record in page.items]


class QueuedResults:
    """Sends results to a keeper elsewhere; recorded means durable in that queue."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def record(self, results: Sequence[ScanResult]) -> None:
        """Send the results; see `Results.record`."""
        self._queue.send([dump_result(result) for result in results])

    def forget(self, refs: Sequence[ObjectRef]) -> None:
        """Send word that these objects are gone."""
        self._queue.send([dump_gone(ref) for ref in refs])

    def replaced(self, holders: Sequence[ObjectRef]) -> None:
        """Send word what these keys hold."""
        self._queue.send([dump_gone(ref, holds=ref.etag) for ref in holders])

    def ping(self) -> None:
        """Prove that the queue can be reached."""
        self._queue.ping()


@dataclass(frozen=True, slots=True)
class _Changes:
    """What one result writes; `records[0]` is the result itself."""

    result: ScanResult
    records: tuple[Any, ...]
    counter: str
    amounts: Mapping[str, int]


def _batches(
    results: Sequence[ScanResult], changes: Callable[[ScanResult], _Changes]
) -> Iterator[list[_Changes]]:
    """Group results so that each group fits one commit and writes no record twice."""
    batch: list[_Changes] = []
    touched: set[tuple[str, str]] = set()
    counters: set[str] = set()
    for result in results:
        one = changes(result)
        names = {(c.table, c.key if isinstance(c, Delete) else c.record.key) for c in one.records}
        total = len(touched) + len(names) + len(counters | {one.counter})
        if batch and (touched & names or total > _BATCH):
            yield batch
            batch, touched, counters = [], set(), set()
        batch.append(one)
        touched |= names
        counters.add(one.counter)
    if batch:
        yield batch


def _merged(batch: Sequence[_Changes]) -> list[Put | Delete | Add]:
    amounts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for one in batch:
        for name, amount in one.amounts.items():
            amounts[one.counter][name] += amount
    return [
        *(change for one in batch for change in one.records),
        *(Add("counters", key, total) for key, total in amounts.items()),
    ]


def object_id(bucket: str, key: str) -> str:
    """Return the index value that gathers the history of one key."""
    return _digest(bucket, key)


def verdict_id(bucket: str, key: str, version_id: str | None) -> str:
    """Return the record key of the current verdict on one object version.

    Without versions a key has one verdict at a time, however often it is overwritten.
    """
    return _digest(bucket, key, version_id or "")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _is_about(verdict: CurrentVerdict, info: ObjectInfo) -> bool:
    """Return whether a verdict is about exactly this object.

    One on an object that could not be pinned is about whatever was there at the time.
    """
    if verdict.identity == "etag:":
        return info.modified_at <= verdict.scanned_at
    return verdict.identity == info.identity


def _load_allow(body: str) -> Allow:
    fields = json.loads(body)
    fields["at"] = datetime.fromisoformat(fields["at"])
    if fields["expires_at"]:
        fields["expires_at"] = datetime.fromisoformat(fields["expires_at"])
    return Allow(**fields)


def _load_verdict(body: str) -> CurrentVerdict:
    fields = json.loads(body)
    return CurrentVerdict(
        fields["bucket"],
        fields["key"],
        fields["identity"],
        Verdict(fields["verdict"]),
        fields["engines"],
        datetime.fromisoformat(fields["scanned_at"]),
        fields.get("attempts", 0),
    )


def _outbox_record(due: Due, when: datetime) -> Record:
    note = due.note
    body = {
        "target": due.target,
        "tries": due.tries,
        "note": {
            "id": note.id,
            "type": note.type,
            "subject": note.subject,
            "body": note.body,
            "attributes": dict(note.attributes),
        },
    }
    indexes = {"due": ("due", when.isoformat(timespec="milliseconds"))}
    return Record(due.key, json.dumps(body), indexes=indexes)


def _load_due(body: str) -> Due:
    fields = json.loads(body)
    return Due(fields["target"], Note(**fields["note"]), fields["tries"])


def dump_result(result: ScanResult) -> str:
    """Return a result as JSON text, as the ledger and the results queue keep it.

    However much the engines had to say, it fits into a record and a message: what is too long is
    cut, findings down to the first hundred of each engine.
    """
    text = _dump_result(result, _MANY)
    return text if len(text) <= _MAX_RESULT else _dump_result(result, _FEW)


def _dump_result(result: ScanResult, findings: int) -> str:
    info = result.object
    fields: dict[str, Any] = {
        "id": result.id,
        "object": {
            "bucket": info.bucket,
            "key": info.key,
            "size": info.size,
            "etag": info.etag,
            "modified_at": info.modified_at.isoformat(),
            "version_id": info.version_id,
            "storage_class": info.storage_class,
        },
        "verdict": result.verdict,
        "scanned_at": result.scanned_at.isoformat(),
        "reasons": result.reasons,
        "reports": [dump_report(report, findings) for report in result.reports],
        "sha256": result.sha256,
        "seconds": round(result.seconds, 6),
        "action": result.action,
        "action_state": result.action_state,
        "moved_to": result.moved_to,
    }
    for name in (
        "message",
        "engines",
        "uploaded_by",
        "sequencer",
        "agent",
        "account",
        "region",
        "tag_note",
        "cached_from",
    ):
        if value := getattr(result, name):
            fields[name] = value[:_MAX_TEXT]
    return json.dumps(fields)


def dump_report(report: EngineReport, findings: int = _MANY) -> dict[str, Any]:
    """Return a report as JSON data; what is too long is cut."""
    signatures = report.signatures
    return {
        "engine": report.engine,
        "verdict": report.verdict,
        "coverage": report.coverage,
        "findings": [
            (f.engine, f.signature[:_MAX_TEXT], f.member[:_MAX_TEXT])
            for f in report.findings[:findings]
        ],
        "signatures": signatures
        and {
            "digest": signatures.digest,
            "version": signatures.version,
            "updated_at": signatures.updated_at and signatures.updated_at.isoformat(),
            "count": signatures.count,
            "is_demo": signatures.is_demo,
        },
        "seconds": round(report.seconds, 6),
        "message": report.message[:_MAX_TEXT],
    }


def dump_gone(ref: ObjectRef, *, holds: str | None = None) -> str:
    """Return the word that an object is gone, as the results queue carries it.

    With `holds`, the etag of what is there: that everything else under the key is gone.
    """
    gone = {"gone": [ref.bucket, ref.key, ref.version_id]}
    return json.dumps(gone if holds is None else {**gone, "holds": holds})


def load_gone(text: str) -> ObjectRef | None:
    """Return what `dump_gone` wrote about, `holds` as its etag; `None` for anything else."""
    fields = json.loads(text)
    if not isinstance(fields, dict) or "gone" not in fields:
        return None
    bucket, key, version_id = fields["gone"]
    if not isinstance(bucket, str) or not isinstance(key, str):
        raise TypeError("bucket and key have to be texts")
    return ObjectRef(bucket, key, version_id, etag=fields.get("holds"))


def load_result(text: str) -> ScanResult:
    """Return the result that `dump_result` wrote; `ValueError` or `KeyError` for anything else."""
    fields = json.loads(text)
    info = fields.pop("object")
    info["modified_at"] = datetime.fromisoformat(info["modified_at"])
    moved_to = fields.pop("moved_to")
    return ScanResult(
        object=ObjectInfo(**info),
        verdict=Verdict(fields.pop("verdict")),
        scanned_at=datetime.fromisoformat(fields.pop("scanned_at")),
        reasons=tuple(fields.pop("reasons")),
        reports=tuple(load_report(report) for report in fields.pop("reports")),
        moved_to=(moved_to[0], moved_to[1]) if moved_to else None,
        **fields,
    )


def load_report(fields: Mapping[str, Any]) -> EngineReport:
    """Return the report that `dump_report` wrote."""
    signatures = fields["signatures"]
    updated_at = signatures and signatures["updated_at"]
    return EngineReport(
        engine=fields["engine"],
        verdict=Verdict(fields["verdict"]),
        coverage=tuple(fields["coverage"]),
        findings=tuple(Finding(*finding) for finding in fields["findings"]),
        signatures=signatures
        and Signatures(
            **{**signatures, "updated_at": updated_at and datetime.fromisoformat(updated_at)}
        ),
        seconds=fields["seconds"],
        message=fields["message"],
    )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything an agent goes by while it handles one message; never changes."""

    settings: Settings
    protected: Mapping[str, Protected]
    version: int

    def policy(self, bucket: Protected) -> Policy:
        """Return how `bucket` is treated."""
        return self.settings.resolve(bucket.account, bucket.region, bucket.bucket)


class SettingsReader:
    """The current settings and protected buckets, read again every `every` seconds.

    When the ledger cannot be reached, or holds settings that this version does not understand,
    the last good snapshot goes on being used.  Safe from any thread.
    """

    def __init__(self, ledger: Ledger, *, every: float = 30.0) -> None:
        self._ledger = ledger
        self._every = every
        self._lock = threading.Lock()
        self._snapshot = self._read()
        self._read_at = time.monotonic()

    def current(self) -> Snapshot:
        """Return the snapshot to use for the next message."""
        if time.monotonic() - self._read_at > self._every and self._lock.acquire(blocking=False):
            try:
                self._snapshot = self._read()
            except (Unavailable, ConfigError) as error:
                log.warning("keeping the settings of version %d: %s", self._snapshot.version, error)
            finally:
                self._read_at = time.monotonic()
                self._lock.release()
        return self._snapshot

    def refresh(self) -> Snapshot:
        """Read again now and return the new snapshot."""
        with self._lock:
            self._snapshot = self._read()
            self._read_at = time.monotonic()
        return self._snapshot

    def _read(self) -> Snapshot:
        text, version = self._ledger.settings()
        return Snapshot(Settings.from_json(text), self._ledger.protected(), version)
