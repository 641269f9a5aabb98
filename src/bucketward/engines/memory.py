"""An engine in this process that looks for byte patterns: for tests and demonstrations."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping

from bucketward.engines.containers import kind_of
from bucketward.errors import Error, Unavailable
from bucketward.model import EngineReport, Finding, Reason, Signatures, Spooled, Verdict

PERMISSIONS: Mapping[str, str] = {}

Judge = Callable[[Spooled, bytes], EngineReport | None]
"""Given a file and its bytes returns the report, or `None` to have the patterns decide."""


class MemoryEngine:
    """Finds each of `patterns` (signature to bytes) in what it is given.

    Attributes that tests turn, at any time: `delay` seconds per scan, which end at the deadline;
    `failure`, raised by every `scan` and `ping` until it is `None` again; `judge`, asked first;
    `suspicious`, the signatures that are only that; `version`, a part of the digest.  `scanned`
    counts the files, `alone` those that came alone.
    """

    def __init__(
        self,
        name: str = "memory",
        *,
        patterns: Mapping[str, bytes],
        max_size: int = 1 << 30,
        opens_containers: bool = False,
        delay: float = 0.0,
        failure: Error | None = None,
        judge: Judge | None = None,
        suspicious: frozenset[str] = frozenset(),
    ) -> None:
        self.name = name
        self.max_size = max_size
        self.opens_containers = opens_containers
        self.patterns = dict(patterns)
        self.delay = delay
        self.failure = failure
        self.judge = judge
        self.suspicious = suspicious
        self.version = "1"
        self.scanned = 0
        self.alone = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def ping(self) -> None:
        """Raise `failure`, or `Unavailable` without patterns."""
        if self.failure is not None:
            raise self.failure
        self.signatures()

    def close(self) -> None:
        """End what `delay` holds up."""
        self._closed.set()

    def scan(self, file: Spooled, deadline: float, *, alone: bool = False) -> EngineReport:
        """Do as the attributes say."""
        started = time.monotonic()
        with self._lock:
            self.scanned += 1
            self.alone += alone
        signatures = self.signatures()
        if self.failure is not None:
            raise self.failure
        if file.size > self.max_size:
            return self._report(started, signatures, Verdict.UNSCANNABLE, Reason.TOO_LARGE)
        if self.delay:
            self._closed.wait(min(self.delay, max(0.0, deadline - started)))
        if time.monotonic() >= deadline:
            return self._report(started, signatures, Verdict.UNSCANNABLE, Reason.TIMED_OUT)
        with file.open() as opened:
            body = opened.read(file.size)
        if self.judge is not None and (report := self.judge(file, body)) is not None:
            return report
        found = [signature for signature, pattern in self.patterns.items() if pattern in body]
        hidden = not self.opens_containers and kind_of(file.fd, file.size)
        coverage = (Reason.CONTAINER_UNOPENED,) if hidden else ()
        if not found:
            return self._report(started, signatures, Verdict.CLEAN, *coverage)
        verdict = Verdict.SUSPICIOUS if self.suspicious.issuperset(found) else Verdict.INFECTED
        return self._report(started, signatures, verdict, *coverage, found=found)

    def signatures(self) -> Signatures:
        """Return a digest over patterns, limits and `version`."""
        if not self.patterns:
            raise Unavailable("it has no patterns", backend=self.name)
        parts = (sorted(self.patterns.items()), self.max_size, self.version)
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()
        return Signatures(digest, f"memory {self.version}", count=len(self.patterns))

    def _report(
        self,
        started: float,
        signatures: Signatures,
        verdict: Verdict,
        *coverage: str,
        found: list[str] | None = None,
    ) -> EngineReport:
        findings = tuple(Finding(self.name, signature) for signature in found or ())
        seconds = time.monotonic() - started
        return EngineReport(self.name, verdict, coverage, findings, signatures, seconds)


def open_memory(url: str, *, patterns: Mapping[str, bytes]) -> MemoryEngine:
    """Open ``memory:NAME``."""
    return MemoryEngine(url.partition(":")[2] or "memory", patterns=patterns)
