"""The event agent: take messages from the queue, scan what they announce, record, acknowledge.

One receiver keeps a small inbox; workers take one message each and fetch, scan and act; one
committer writes results in batches and then acknowledges; one thread extends every lease in hand.
"""

from __future__ import annotations

import logging
import queue as inboxes
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from bucketward.actions import Actor
from bucketward.errors import (
    Changed,
    ConfigError,
    Denied,
    Error,
    NotFound,
    Unavailable,
    Unsupported,
)
from bucketward.events import Event, decode, encode
from bucketward.interfaces import Queue, Store
from bucketward.ledger import Protected, Results, Snapshot
from bucketward.model import Message, ObjectRef, Reason, ScanResult
from bucketward.policy import Policy
from bucketward.scan import Scanner, give_up

log = logging.getLogger(__name__)

_BATCH = 100  # results that are committed together at most
_LINGER = 0.02  # seconds the committer waits for more of them
_LEASE = 60.0  # seconds a lease is extended by, every third of that
_ALONE_AFTER = 2  # deliveries that came to no end before the next one runs alone
_REMEMBERED = 10_000  # messages given back that we remember
_BACKOFF = 5.0  # seconds before the second delivery; doubles, up to the next
_BACKOFF_MAX = 900.0
_OUTAGE_POLL = 1.0
_FOREIGN = 5.0  # seconds for which a bucket that is not protected is not looked up again


@dataclass(slots=True)
class _Work:
    """One message in hand, from receipt to acknowledgement."""

    message: Message
    results: list[ScanResult] = field(default_factory=list)
    gone: list[ObjectRef] = field(default_factory=list)
    again: list[ObjectRef] = field(default_factory=list)
    replaced: list[ObjectRef] = field(default_factory=list)
    bury: str = ""
    received_at: float = field(default_factory=time.monotonic)
    event_at: datetime | None = None


class EventAgent:
    """Consumes one queue until it is stopped.

    `snapshot` yields the settings to go by, `refresh` those of this moment.  `stores` opens a
    protected bucket, `quarantine` the bucket that infected objects of a protected
    one go to; both may raise any error and cache by themselves.  `on_latency` is told for each
    recorded result the seconds since its event, `None` if that bears no time, and since receipt;
    `on_retry` of each message given back because something failed.
    """

    def __init__(  # noqa: PLR0917 - wiring names them all
        self,
        queue: Queue,
        scanner: Scanner,
        results: Results,
        snapshot: Callable[[], Snapshot],
        stores: Callable[[Protected], Store],
        quarantine: Callable[[Protected, str], Store],
        *,
        name: str = "event",
        threads: int = 8,
        max_deliveries: int = 5,
        drain: float = 25.0,
        poll: float = 1.0,
        on_result: Callable[[ScanResult], None] = lambda _: None,
        on_latency: Callable[[float | None, float], None] = lambda *_: None,
        on_retry: Callable[[], None] = lambda: None,
        on_ready: Callable[[], None] = lambda: None,
        refresh: Callable[[], Snapshot] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._queue = queue
        self._scanner = scanner
        self._results = results
        self._snapshot = snapshot
        self._refresh = refresh if refresh is not None else snapshot
        self._foreign: dict[str, float] = {}
        self._stores = stores
        self._quarantine = quarantine
        self._name = name
        self._max_deliveries = queue.max_deliveries or max_deliveries
        self._drain = drain
        self._poll = poll
        self._on_result = on_result
        self._on_latency = on_latency
        self._on_retry = on_retry
        self._on_ready = on_ready
        self._now = now
        self._actor = Actor(lambda result: results.record([result]))
        self._inbox: inboxes.Queue[_Work | None] = inboxes.Queue()
        self._done: inboxes.Queue[_Work | None] = inboxes.Queue()
        self._held: dict[str, _Work] = {}
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._limit = 3 * threads  # in the workers' hands, and an inbox twice as long
        self._not_ready = ""
        self._given_back: OrderedDict[str, int] = OrderedDict()
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._receiver = threading.Thread(target=self._receive, name=f"{name}-receiver")
        self._workers = [
            threading.Thread(target=self._work, name=f"{name}-worker-{i}", daemon=True)
            for i in range(threads)
        ]
        self._committer = threading.Thread(target=self._commit, name=f"{name}-committer")
        self._extender = threading.Thread(target=self._extend, name=f"{name}-extender", daemon=True)

    def start(self) -> None:
        """Start the threads and return."""
        for thread in (self._committer, *self._workers, self._extender, self._receiver):
            thread.start()

    def stop(self) -> None:
        """Give back what was not begun, finish what was within the bound, and return."""
        self._stopping.set()
        self._receiver.join()
        self._return_inbox()
        for _ in self._workers:
            self._inbox.put(None)
        end = time.monotonic() + self._drain
        for worker in self._workers:
            worker.join(max(0.0, end - time.monotonic()))
        self._done.put(None)
        self._committer.join(max(1.0, end - time.monotonic()))
        with self._lock:
            left = [work.message for work in self._held.values()]
        if left:
            log.warning("giving back %d messages that were not finished in time", len(left))
            self._nack(left, 0)

    @property
    def is_idle(self) -> bool:
        """Return whether nothing is in hand."""
        with self._lock:
            return not self._held

    @property
    def is_alive(self) -> bool:
        """Return whether every thread runs, or a stop is on its way."""
        threads = (self._receiver, self._committer, self._extender, *self._workers)
        return self._stopping.is_set() or all(thread.is_alive() for thread in threads)

    @property
    def is_ready(self) -> bool:
        """Return whether messages are taken."""
        return self._ready.is_set() and not self._stopping.is_set()

    # -- receiving -------------------------------------------------------------------------------

    def _receive(self) -> None:
        at_once = min(10, self._limit)
        while not self._stopping.is_set():
            with self._room:
                # Wait for room for a whole batch: receiving singly costs a request each.
                if not self._room.wait_for(lambda: len(self._held) <= self._limit - at_once, 0.5):
                    continue
            if not self._check_ready():
                self._stopping.wait(_OUTAGE_POLL)
                continue
            try:
                messages = self._queue.receive(at_once, self._poll)
            except Error as error:
                log.warning("cannot receive: %s", error)
                self._stopping.wait(_OUTAGE_POLL)
                continue
            for message in messages:
                with self._lock:
                    known = self._held.get(message.id)
                    if known is not None:
                        # Its lease lapsed while we worked on it; it is one piece of work still.
                        known.message = message
                        continue
                    work = self._held[message.id] = _Work(message)
                self._inbox.put(work)

    def _check_ready(self) -> bool:
        """Return whether engines and results can take work; log when that changes."""
        if self._ready.is_set():
            return True
        try:
            self._scanner.ping(self._policies())
            self._results.ping()
            self._on_ready()
        except Error as error:
            if str(error) != self._not_ready:
                self._not_ready = str(error)
                log.warning("not receiving yet: %s", error)
            return False
        log.info("ready")
        self._not_ready = ""
        self._ready.set()
        return True

    def _outage(self, error: Error) -> bool:
        """Return whether `error` is an outage of ours, and stop receiving while it lasts."""
        try:
            self._scanner.ping(self._policies())
            self._results.ping()
        except Error as outage:
            if self._ready.is_set():
                self._ready.clear()
                log.warning("not receiving: %s (%s)", outage, error)
            return True
        return False

    def _policies(self) -> Collection[Policy]:
        snapshot = self._snapshot()
        return {id(p): p for p in map(snapshot.policy, snapshot.protected.values())}.values()

    def _return_inbox(self) -> None:
        messages = []
        while True:
            try:
                work = self._inbox.get_nowait()
            except inboxes.Empty:
                break
            if work is not None:
                messages.append(work.message)
        if messages:
            self._nack(messages, 0)

    # -- working ---------------------------------------------------------------------------------

    def _work(self) -> None:
        while (work := self._inbox.get()) is not None:
            while True:
                try:
                    self._handle(work)
                    self._done.put(work)
                except Unavailable as error:
                    if self._outage(error):
                        # Keep what we hold: an outage must not burn an object's deliveries.
                        if self._stopping.wait(_OUTAGE_POLL):
                            self._nack([work.message], 0)
                            break
                        continue
                    self._try_later(work, error)
                except Exception as error:
                    log.exception("bug while handling message %s", work.message.id)
                    self._try_later(work, error)
                break

    def _handle(self, work: _Work) -> None:
        """Do everything a message asks for, short of recording and acknowledging it."""
        work.results, work.gone, work.again, work.replaced, work.bury = [], [], [], [], ""
        message = work.message
        try:
            event = decode(message.body)
        except Unsupported as error:
            work.bury = str(error)
            return
        for note in event.ignored:
            log.debug("ignored in message %s: %s", message.id, note)
        if event.malformed:
            work.bury = "; ".join(event.malformed)
        times = [ref.event_at for ref in event.refs if ref.event_at is not None]
        work.event_at = min(times, default=None)
        snapshot = self._snapshot()
        for ref in event.removed:
            if ref.bucket in snapshot.protected:
                work.gone.append(ref)
        for ref in event.refs:
            if ref.bucket not in snapshot.protected:
                snapshot = self._look_again(ref.bucket, snapshot)
            protected = snapshot.protected.get(ref.bucket)
            if protected is None:
                log.warning(
                    "refused: %s is not a protected bucket", ref.bucket, extra={"key": ref.key}
                )
                continue
            self._handle_object(work, ref, protected, snapshot, event)

    def _look_again(self, bucket: str, snapshot: Snapshot) -> Snapshot:
        """Return a snapshot read just now: the bucket may have been protected a moment ago.

        Events of buckets that are not ours may come in any number: such a bucket is not looked up
        again for some seconds.
        """
        if self._foreign.get(bucket, -_FOREIGN) > time.monotonic() - _FOREIGN:
            return snapshot
        try:
            snapshot = self._refresh()
        except ConfigError as error:
            log.warning("keeping the settings of version %d: %s", snapshot.version, error)
        if bucket not in snapshot.protected:
            if len(self._foreign) >= _REMEMBERED:
                self._foreign.clear()
            self._foreign[bucket] = time.monotonic()
        return snapshot

    def _handle_object(
        self,
        work: _Work,
        ref: ObjectRef,
        protected: Protected,
        snapshot: Snapshot,
        event: Event,
    ) -> None:
        policy = snapshot.policy(protected)
        cause = event.job or work.message.id
        try:
            store = self._stores(protected)
            with self._scanner.scan(
                store, ref, policy, cause=cause, alone=self._is_alone(work.message)
            ) as scan:
                scan.result = replace(
                    scan.result,
                    agent=self._name,
                    account=protected.account,
                    region=protected.region,
                )
                outcome = self._actor.act(
                    store, scan, policy, lambda: self._quarantine(protected, policy.quarantine)
                )
            work.results.append(outcome.result)
            info = outcome.result.object
            is_repeated = work.message.deliveries > 1 or event.attempt > 0
            if is_repeated and scan.is_pinned and info.version_id is None:
                # An agent may have died before it recorded the deletion of what was there before.
                work.replaced.append(ObjectRef(info.bucket, info.key, etag=info.etag))
            if outcome.is_replaced:
                work.again.append(ObjectRef(ref.bucket, ref.key))
        except NotFound as error:
            log.info("gone before it was scanned: %r in %s (%s)", ref.key, ref.bucket, error)
            work.gone.append(ref)
        except Changed:
            # What is there now may have an event of its own; on an unversioned bucket, where two
            # writes can make one event, it may not.
            work.again.append(ObjectRef(ref.bucket, ref.key, uploaded_by=ref.uploaded_by))
        except (Denied, Unsupported, ConfigError) as error:
            reason = Reason.DENIED if isinstance(error, Denied) else Reason.UNSUPPORTED
            work.results.append(give_up(ref, cause, str(error), self._now(), reason=reason))

    def _is_alone(self, message: Message) -> bool:
        """Return whether a message may have killed agents or engines before: then it runs alone.

        Deliveries that this agent gave back in good order do not count against it.
        """
        if message.deliveries > 1 and message.deliveries >= self._max_deliveries:
            return True
        orderly = self._given_back.get(message.id, 0)
        return message.deliveries - 1 - orderly >= _ALONE_AFTER

    def _try_later(self, work: _Work, error: Exception) -> None:
        """Give the message back, or end it on its last delivery: nothing is tried for ever."""
        message = work.message
        if message.deliveries < self._max_deliveries:
            delay = min(_BACKOFF_MAX, _BACKOFF * 2 ** (message.deliveries - 1))
            log.warning("trying again in %.0f s: %s", delay, error)
            with self._lock:
                self._given_back[message.id] = self._given_back.get(message.id, 0) + 1
                if len(self._given_back) > _REMEMBERED:
                    self._given_back.popitem(last=False)
            self._on_retry()
            self._nack([message], delay)
            return
        log.error("giving up after %d deliveries: %s", message.deliveries, error)
        text = f"gave up after {message.deliveries} deliveries: {error}"
        work.results, work.again, work.replaced = [], [], []
        try:
            event = decode(message.body)
            protected = self._snapshot().protected
            work.results = [
                give_up(ref, event.job or message.id, text, self._now())
                for ref in event.refs
                if ref.bucket in protected
            ]
        except Unsupported:
            pass
        work.bury = text
        self._done.put(work)

    # -- recording -------------------------------------------------------------------------------

    def _commit(self) -> None:
        ending = False
        while not ending:
            work = self._done.get()
            if work is None:
                return
            batch = [work]
            count = len(work.results)
            end = time.monotonic() + _LINGER
            while count < _BATCH and (left := end - time.monotonic()) > 0:
                try:
                    work = self._done.get(timeout=left)
                except inboxes.Empty:
                    break
                if work is None:
                    ending = True
                    break
                batch.append(work)
                count += len(work.results)
            self._settle(batch)

    def _settle(self, batch: Sequence[_Work]) -> None:
        """Make a batch durable, then acknowledge it; keep trying while the ledger is away."""
        results = [result for work in batch for result in work.results]
        gone = [ref for work in batch for ref in work.gone]
        again = [ref for work in batch for ref in work.again]
        replaced = [ref for work in batch for ref in work.replaced]
        while True:
            try:
                self._results.record(results)
                if gone:
                    self._results.forget(gone)
                    gone = []
                if replaced:
                    self._results.replaced(replaced)
                    replaced = []
                if again:
                    self._queue.send([encode([ref], attempt=1) for ref in again])
                    again = []
                break
            except (Unavailable, Denied, ConfigError) as error:
                log.warning("cannot record, keeping %d results: %s", len(results), error)
                self._ready.clear()
                if self._stopping.wait(_OUTAGE_POLL):
                    self._nack([work.message for work in batch], 0)
                    return
            except Exception as error:
                # One of them cannot be recorded, now or later: it must not hold up the others.
                if len(batch) > 1:
                    for work in batch:
                        self._settle([work])
                    return
                log.exception("cannot record what message %s led to", batch[0].message.id)
                if batch[0].bury:
                    self._nack([batch[0].message], _BACKOFF_MAX)
                else:
                    self._try_later(batch[0], error)
                return
        for result in results:
            self._on_result(result)
        for work in batch:
            since_event = None
            if work.event_at is not None:
                since_event = (self._now() - work.event_at).total_seconds()
            for _ in work.results:
                self._on_latency(since_event, time.monotonic() - work.received_at)
        for work in batch:
            if work.bury:
                try:
                    log.warning("burying message %s: %s", work.message.id, work.bury)
                    self._queue.bury(self._fresh(work), work.bury)
                except Error as error:
                    log.warning("cannot bury message %s: %s", work.message.id, error)
                self._drop([work.message])
        acked = [self._fresh(work) for work in batch if not work.bury]
        if acked:
            try:
                self._queue.ack(acked)
            except Error as error:
                # It comes again and finds its result: that changes nothing.
                log.warning("cannot acknowledge: %s", error)
            self._drop(acked)

    # -- leases ----------------------------------------------------------------------------------

    def _extend(self) -> None:
        while not self._stopping.wait(_LEASE / 6):
            soon = time.time() + _LEASE * 2 / 3
            with self._lock:
                due = [w.message for w in self._held.values() if w.message.leased_until < soon]
            if not due:
                continue
            try:
                held = {message.id: message for message in self._queue.extend(due, _LEASE)}
            except Error as error:
                log.warning("cannot extend leases: %s", error)
                continue
            with self._lock:
                for message in due:
                    work = self._held.get(message.id)
                    if work is not None and message.id in held:
                        work.message = held[message.id]
                    elif work is not None:
                        log.warning("lost the lease on message %s; going on", message.id)

    def _fresh(self, work: _Work) -> Message:
        with self._lock:
            return work.message

    def _nack(self, messages: Sequence[Message], delay: float) -> None:
        try:
            self._queue.nack(messages, delay)
        except Error as error:
            log.warning(
                "cannot give back %d messages, their leases will lapse: %s", len(messages), error
            )
        self._drop(messages)

    def _drop(self, messages: Sequence[Message]) -> None:
        with self._room:
            for message in messages:
                self._held.pop(message.id, None)
            self._room.notify_all()
