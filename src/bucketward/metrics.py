"""What a running process tells its operators: Prometheus metrics, liveness and readiness.

docs/metrics.md describes each of them.  Agents do not know this module: they are given callables.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, Protocol, TypeVar, runtime_checkable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bucketward.agents.server import Server
from bucketward.errors import Error
from bucketward.interfaces import Engine, Queue
from bucketward.ledger import Ledger
from bucketward.model import Reason, ScanResult
from bucketward.spool import Spool

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
_MAX_BUCKETS = 1000  # label values; the buckets beyond share one
_SAMPLE_EVERY = 5.0  # seconds; asking a queue may cost money
_READY_EVERY = 2.0
_PATIENCE = 3.0  # seconds a scrape or a probe waits for a backend
_MAX_NOTES = 1000  # notes are counted up to here
_CONNECTIONS = 32  # fewer than starlette has threads: /health always gets one

T = TypeVar("T")


@runtime_checkable
class Living(Protocol):
    """A part that knows whether its threads live."""

    @property
    def is_alive(self) -> bool:
        """Return whether every thread runs, or the part was told to stop."""


@runtime_checkable
class Readying(Protocol):
    """A part that takes work only when what it needs is there."""

    @property
    def is_ready(self) -> bool:
        """Return whether it takes work now."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What is looked at when somebody asks; `None` for what this process does not have."""

    queue: Queue | None = None
    ledger: Ledger | None = None
    engines: Mapping[str, Engine] | None = None
    spool: Spool | None = None


class Meters:
    """Everything that is measured in one process.  Safe from any thread; its methods never fail."""

    def __init__(self, sources: Sources) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._buckets: set[str] = set()
        self._lock = threading.Lock()
        self._swept: tuple[int, datetime | None] | None = None

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(name, text, labels, registry=self.registry, buckets=_SECONDS)

        self._objects = counter("bucketward_objects", "Objects judged.", "bucket", "verdict")
        self._bytes = counter("bucketward_object_bytes", "Their bytes.", "bucket", "verdict")
        self._reasons = counter(
            "bucketward_object_reasons", "Reasons for not Clean.", "verdict", "reason"
        )
        self._cached = counter("bucketward_cached_objects", "Objects known from the cache.")
        self._from_event = histogram(
            "bucketward_event_to_verdict_seconds", "From the event to the recorded verdict."
        )
        self._from_receipt = histogram(
            "bucketward_receipt_to_verdict_seconds", "From receipt to the recorded verdict."
        )
        self._engine = histogram("bucketward_engine_seconds", "One scan by one engine.", "engine")
        self._retries = counter("bucketward_retries", "Messages given back for another try.")
        self._dead = counter("bucketward_dead_letters", "Dead letters taken off the queue.")
        self.registry.register(_Sampler(sources, lambda: self._swept))

    def result(self, result: ScanResult) -> None:
        """Count a result that was recorded."""
        verdict = str(result.verdict)
        bucket = self._bounded(result.object.bucket)
        self._objects.labels(bucket, verdict).inc()
        self._bytes.labels(bucket, verdict).inc(result.object.size)
        for reason in result.reasons:
            known = reason if reason in Reason.__members__.values() else "other"
            self._reasons.labels(verdict, str(known)).inc()
        if result.cached_from:
            self._cached.inc()
            return
        for report in result.reports:
            self._engine.labels(report.engine).observe(report.seconds)

    def latency(self, from_event: float | None, from_receipt: float) -> None:
        """Count how long it took to a recorded verdict, in seconds."""
        if from_event is not None:
            self._from_event.observe(max(0.0, from_event))
        self._from_receipt.observe(from_receipt)

    def retry(self) -> None:
        """Count a message that was given back."""
        self._retries.inc()

    def dead(self, letters: int) -> None:
        """Count dead letters."""
        self._dead.inc(letters)

    def swept(self, found: int, oldest: datetime | None) -> None:
        """Keep what the last sweep found: how many unscanned objects, and the oldest's date."""
        self._swept = (found, oldest)

    def _bounded(self, bucket: str) -> str:
        with self._lock:
            if bucket not in self._buckets and len(self._buckets) >= _MAX_BUCKETS:
                return "other"
            self._buckets.add(bucket)
            return bucket


class _Sampler(Collector):
    """What is not counted but looked up; what cannot be looked up is left out."""

    def __init__(
        self, sources: Sources, swept: Callable[[], tuple[int, datetime | None] | None]
    ) -> None:
        self._sources = sources
        self._swept = swept
        # Each by itself: a queue that hangs must not hide the others.
        self._fresh = [
            _Fresh(look, _SAMPLE_EVERY) for look in (self._queue, self._outbox, self._engines)
        ]

    def describe(self) -> Iterator[Metric]:
        """Yield nothing, so that registering it looks nothing up."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Yield what is known at the moment."""
        yield from self._own()
        end = time.monotonic() + _PATIENCE
        for fresh in self._fresh:
            fresh.start()
        for fresh in self._fresh:
            yield from fresh.get(end - time.monotonic()) or ()

    def _queue(self) -> Sequence[Metric]:
        if self._sources.queue is None:
            return ()
        depth = self._sources.queue.depth()
        found = [
            _gauge("bucketward_queue_messages", "Messages that wait.", depth.waiting),
            _gauge("bucketward_queue_in_flight", "Messages in hand.", depth.in_flight),
        ]
        if depth.oldest_age is not None:
            text = "Age of the oldest message."
            found.append(_gauge("bucketward_queue_oldest_age_seconds", text, depth.oldest_age))
        return found

    def _outbox(self) -> Sequence[Metric]:
        if self._sources.ledger is None:
            return ()
        due = len(self._sources.ledger.due_notes(_MAX_NOTES))
        return (_gauge("bucketward_outbox_due", "Notes due for delivery.", due),)

    def _engines(self) -> Sequence[Metric]:
        if self._sources.engines is None:
            return ()
        works = GaugeMetricFamily("bucketward_engine_up", "Engine works.", labels=["engine"])
        age = GaugeMetricFamily(
            "bucketward_signatures_age_seconds", "Age of the newest database.", labels=["engine"]
        )
        demo = GaugeMetricFamily(
            "bucketward_signatures_demo", "Only demonstration signatures.", labels=["engine"]
        )
        for name, engine in self._sources.engines.items():
            works.add_metric([name], 0 if _problem(engine.ping) else 1)
            with contextlib.suppress(Error):
                signatures = engine.signatures()
                demo.add_metric([name], int(signatures.is_demo))
                if signatures.updated_at is not None:
                    age.add_metric([name], _age(signatures.updated_at))
        return (works, age, demo)

    def _own(self) -> Sequence[Metric]:
        found = []
        if self._sources.spool is not None:
            spool = self._sources.spool
            found += [
                _gauge("bucketward_spool_used_bytes", "Bytes reserved.", spool.used),
                _gauge("bucketward_spool_size_bytes", "Bytes in all.", spool.memory + spool.disk),
            ]
        if (swept := self._swept()) is not None:
            count, oldest = swept
            age = 0.0 if oldest is None else _age(oldest)
            found += [
                _gauge("bucketward_unscanned_objects", "Found by the last sweep.", count),
                _gauge("bucketward_unscanned_oldest_age_seconds", "Age of the oldest.", age),
            ]
        return found


class _Fresh(Generic[T]):
    """The answer to `ask`, at most `every` seconds old; asked in a thread, since it may hang."""

    def __init__(self, ask: Callable[[], T], every: float) -> None:
        self._ask = ask
        self._every = every
        self._lock = threading.Lock()
        self._at = 0.0
        self._answer: Future[T] | None = None

    def start(self) -> Future[T]:
        """Ask unless the answer is fresh or somebody is asking."""
        with self._lock:
            old = time.monotonic() - self._at >= self._every
            if self._answer is None or (old and self._answer.done()):
                self._at = time.monotonic()
                self._answer = Future()
                threading.Thread(
                    target=self._run, args=(self._answer,), name="metrics", daemon=True
                ).start()
            return self._answer

    def get(self, patience: float) -> T | None:
        """Return the answer, `None` if it fails or does not come in time."""
        try:
            return self.start().result(max(0.0, patience))
        except (TimeoutError, Error):
            return None

    def _run(self, answer: Future[T]) -> None:
        try:
            answer.set_result(self._ask())
        except Exception as error:
            answer.set_exception(error)


class Monitor:
    """Serves ``/metrics``, ``/health`` and ``/ready`` on one port until it is stopped.

    `parts` are those that run, and may grow until `all_started`.  `checks` raise what keeps us
    from working.
    """

    def __init__(
        self,
        meters: Meters,
        parts: Collection[object],
        checks: Mapping[str, Callable[[], object]],
        host: str = "127.0.0.1",
        port: int = 9464,
    ) -> None:
        self._meters = meters
        self._parts = parts
        self._checks = checks
        self._is_complete = False
        self._readiness = _Fresh(self._ask, _READY_EVERY)
        app = Starlette(
            routes=[
                Route("/metrics", self._metrics),
                Route("/health", self._health),
                Route("/ready", self._ready),
            ]
        )
        self._server = Server(app, host, port, option="metrics", connections=_CONNECTIONS)

    @property
    def url(self) -> str:
        """Return ``http://host:port``; only after `start`."""
        return self._server.url

    def start(self) -> None:
        """Listen, and serve in a thread; `ConfigError` if the port is taken."""
        self._server.start()

    def all_started(self) -> None:
        """Note that every part runs: before, we are not ready."""
        self._is_complete = True

    def stop(self) -> None:
        """Stop at once."""
        self._server.stop(1)

    def _metrics(self, _request: Request) -> Response:
        body = generate_latest(self._meters.registry)
        return Response(body, headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    def _health(self, _request: Request) -> Response:
        is_alive = all(part.is_alive for part in self._parts if isinstance(part, Living))
        return JSONResponse({"healthy": is_alive}, 200 if is_alive else 503)

    def _ready(self, _request: Request) -> Response:
        missing = self._readiness.get(_PATIENCE)
        if missing is None:
            missing = ["an answer in time"]
        is_ready = all(part.is_ready for part in self._parts if isinstance(part, Readying))
        if not (is_ready and self._is_complete):
            missing = [*missing, "agent"]
        # What exactly is wrong stays in our log: anybody may ask.
        body = {"ready": not missing, "missing": missing}
        return JSONResponse(body, 503 if missing else 200)

    def _ask(self) -> list[str]:
        return [name for name, check in self._checks.items() if _problem(check)]


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _age(when: datetime) -> float:
    return max(0.0, (datetime.now(UTC) - when).total_seconds())


def _problem(check: Callable[[], object]) -> bool:
    try:
        check()
    except Error:
        return True
    return False
