"""Verdicts that are known already: what engines said of the same bytes by the same signatures."""

from __future__ import annotations

import json
import logging
import queue as inboxes
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from bucketward.errors import Error
from bucketward.ledger import Ledger, dump_report, load_report
from bucketward.model import EngineReport

log = logging.getLogger(__name__)

_MAX_BODY = 16 << 10  # characters of an entry; a file with that many findings is scanned again
_BATCH = 50
_LINGER = 0.5
_BACKLOG = 1000  # entries that wait to be written; more are dropped
_OUTAGE = 10.0  # seconds for which a ledger that failed is not asked again


@dataclass(frozen=True, slots=True)
class Cached:
    """What every engine of a set said, before any policy, and the scan they said it in."""

    scan: str
    reports: tuple[EngineReport, ...]


class Cache:
    """The last `entries` in memory, in front of those of all agents in `ledger` (`None`: alone).

    An entry is found by the SHA-256, the size and the digest of the engine set, and is good for
    `days`.  Never fails and never waits for a write: a ledger that is away makes a miss.  Safe from
    any thread.
    """

    def __init__(
        self,
        ledger: Ledger | None,
        *,
        entries: int = 4096,
        days: float = 30,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._ledger = ledger
        self._entries = entries
        self._life = timedelta(days=days)
        self._now = now
        self._lock = threading.Lock()
        self._memory: OrderedDict[str, str] = OrderedDict()
        self._away_until = 0.0
        self._inbox: inboxes.Queue[tuple[str, str] | None] = inboxes.Queue(_BACKLOG)
        self._writer: threading.Thread | None = None
        self._is_closed = False

    def find(self, sha256: str, size: int, engines: str) -> Cached | None:
        """Return what is known of these bytes; a record that is not about them is not believed."""
        key = _key(sha256, size, engines)
        with self._lock:
            body = self._memory.get(key)
            if body is not None:
                self._memory.move_to_end(key)
        if body is not None:
            return self._load(body, sha256, size, engines)
        body = self._ask(key)
        found = self._load(body, sha256, size, engines) if body is not None else None
        if found is not None and body is not None:
            self._remember(key, body)
        return found

    def keep(self, sha256: str, size: int, engines: str, cached: Cached) -> None:
        """Remember it, unless its text would be cut or too long."""
        # As it will be read; times need no more than microseconds.
        reports = tuple(replace(r, seconds=round(r.seconds, 6)) for r in cached.reports)
        texts = [dump_report(report) for report in reports]
        body = json.dumps(
            {
                "sha256": sha256,
                "size": size,
                "engines": engines,
                "scan": cached.scan,
                "at": self._now().isoformat(),
                "reports": texts,
            }
        )
        if len(body) > _MAX_BODY or tuple(map(load_report, json.loads(body)["reports"])) != reports:
            return
        key = _key(sha256, size, engines)
        self._remember(key, body)
        if self._ledger is None:
            return
        with self._lock:
            if self._is_closed:
                return
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="cache", daemon=True)
                self._writer.start()
            try:
                self._inbox.put_nowait((key, body))
            except inboxes.Full:
                log.debug("an entry of the cache is dropped: the ledger is behind")

    def close(self) -> None:
        """Write what waits; closing twice is fine."""
        with self._lock:
            self._is_closed = True
            writer, self._writer = self._writer, None
        if writer is not None:
            self._inbox.put(None)
            writer.join()

    def _ask(self, key: str) -> str | None:
        if self._ledger is None or time.monotonic() < self._away_until:
            return None
        try:
            return self._ledger.cached(key)
        except Error as error:
            self._away(error)
            return None

    def _away(self, error: Error) -> None:
        self._away_until = time.monotonic() + _OUTAGE
        log.debug("scanning without the ledger's cache for %.0f s: %s", _OUTAGE, error)

    def _load(self, body: str, sha256: str, size: int, engines: str) -> Cached | None:
        try:
            fields = json.loads(body)
            if (fields["sha256"], fields["size"], fields["engines"]) != (sha256, size, engines):
                return None
            if self._now() - datetime.fromisoformat(fields["at"]) > self._life:
                return None
            return Cached(str(fields["scan"]), tuple(map(load_report, fields["reports"])))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def _remember(self, key: str, body: str) -> None:
        with self._lock:
            self._memory[key] = body
            self._memory.move_to_end(key)
            while len(self._memory) > self._entries:
                self._memory.popitem(last=False)

    def _write(self) -> None:
        assert self._ledger is not None
        is_ending = False
        while not is_ending:
            batch: dict[str, str] = {}
            end: float | None = None
            while len(batch) < _BATCH:
                wait = None if end is None else max(0.0, end - time.monotonic())
                try:
                    entry = self._inbox.get(timeout=wait)
                except inboxes.Empty:
                    break
                if entry is None:
                    is_ending = True
                    break
                batch[entry[0]] = entry[1]
                end = time.monotonic() + _LINGER if end is None else end
            try:
                if batch:
                    self._ledger.cache(batch, self._now() + self._life)
            except Error as error:
                self._away(error)
            except Exception:
                log.exception("bug while writing the cache")


def _key(sha256: str, size: int, engines: str) -> str:
    return f"{sha256}|{size}|{engines}"
