"""The keeper: background chores, each done by one keeper at a time under a lease in the ledger."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from bucketward.errors import Error, Unavailable, Unsupported
from bucketward.events import decode, encode
from bucketward.interfaces import Notifier, Queue, Store
from bucketward.ledger import Due, Ledger, Protected, Snapshot, load_gone, load_result
from bucketward.model import Message, ObjectInfo, ObjectRef, ScanResult
from bucketward.scan import give_up

log = logging.getLogger(__name__)

_TICK = 0.5
_NOTE_BACKOFF = 10.0
_NOTE_BACKOFF_MAX = 3600.0
_NOTE_TRIES = 24
_NO_RESULT = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a body raises that is no result, or has a part of the wrong kind."""
_REASON = 1000


def sweep(
    ledger: Ledger,
    queue: Queue,
    store: Store,
    protected: Protected,
    *,
    older_than: datetime | None = None,
    stopping: Callable[[], bool] = lambda: False,
    on_missing: Callable[[Sequence[ObjectInfo]], None] = lambda _: None,
) -> int:
    """Enqueue every object version of a bucket that has no verdict; return how many.

    Only objects modified at or before `older_than` count, so that those whose own event is on its
    way are left to it; also those of the future, since anybody can set a file's time; and
    none from before the bucket was protected (`Protected.since`).
    """
    since = datetime.fromisoformat(protected.since) if protected.since else None
    future = datetime.now(UTC) + timedelta(minutes=5)  # or our clocks differ
    found = 0
    cursor = ""
    while not stopping():
        page = store.list(cursor=cursor, versions=store.has_versions)
        infos = [
            info
            for info in page.items
            if (older_than is None or not older_than < info.modified_at < future)
            and (since is None or info.modified_at >= since)
        ]
        missing = [
            info
            for info, verdict in zip(infos, ledger.verdicts(infos), strict=True)
            if verdict is None
        ]
        if missing:
            on_missing(missing)
            found += _enqueue(queue, missing)
        cursor = page.cursor
        if not cursor:
            break
    return found


def _enqueue(queue: Queue, infos: Sequence[ObjectInfo]) -> int:
    """Send a message for each; a name that no message can hold keeps none of the others back."""
    try:
        queue.send([encode([_unscanned(info.ref)]) for info in infos])
        return len(infos)
    except Unsupported as error:
        if len(infos) == 1:
            (info,) = infos
            log.error("cannot scan %r in %s: %s", info.key[:200], info.bucket, error)
            return 0
    half = len(infos) // 2
    return _enqueue(queue, infos[:half]) + _enqueue(queue, infos[half:])


def _unscanned(ref: ObjectRef) -> ObjectRef:
    # Without a version the read pins what is there by then; naming the etag would only add a round.
    if ref.version_id is not None:
        return ref
    return ObjectRef(ref.bucket, ref.key, size=ref.size)


@dataclass(slots=True)
class _Chore:
    name: str
    every: float
    do: Callable[[], None]
    due: float = 0.0


class Keeper:
    """Runs the chores until it is stopped.  Any number of keepers may run.

    `notifiers` are those that notes name as their target.  `on_dead` is told how many dead letters
    were taken off the queue, `on_sweep` how many unscanned objects a sweep found and when the
    oldest was modified.
    """

    def __init__(
        self,
        ledger: Ledger,
        queue: Queue,
        snapshot: Callable[[], Snapshot],
        stores: Callable[[Protected], Store],
        notifiers: Mapping[str, Notifier],
        *,
        holder: str,
        results: Queue | None = None,
        sweep_every: float = 900.0,
        sweep_older: float = 300.0,
        on_dead: Callable[[int], None] = lambda _: None,
        on_sweep: Callable[[int, datetime | None], None] = lambda *_: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._ledger = ledger
        self._queue = queue
        self._snapshot = snapshot
        self._stores = stores
        self._notifiers = notifiers
        self._holder = holder
        self._results = results
        self._sweep_older = sweep_older
        self._on_dead = on_dead
        self._on_sweep = on_sweep
        self._now = now
        self._stopping = threading.Event()
        self._chores = [
            _Chore("outbox", 1.0, self.send_notes),
            _Chore("dead-letters", 5.0, self.consume_dead_letters),
            _Chore("retries", 60.0, self.retry_errors),
        ]
        if sweep_every:
            first = time.monotonic() + sweep_every
            self._chores.append(_Chore("sweep", sweep_every, self.sweep_all, first))
        if results is not None:
            self._chores.append(_Chore("results", 0.5, self.drain_results))
        self._thread = threading.Thread(target=self._run, name="keeper")

    def start(self) -> None:
        """Start the thread and return."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the chore at hand and return."""
        self._stopping.set()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Return whether the thread runs, or a stop is on its way."""
        return self._stopping.is_set() or self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.wait(_TICK):
            for chore in self._chores:
                if self._stopping.is_set() or time.monotonic() < chore.due:
                    continue
                chore.due = time.monotonic() + chore.every
                try:
                    if self._ledger.lease(chore.name, self._holder, chore.every + 60):
                        chore.do()
                except Error as error:
                    log.warning("chore %s: %s", chore.name, error)
                except Exception:
                    log.exception("bug in chore %s", chore.name)

    # -- the chores ------------------------------------------------------------------------------

    def send_notes(self) -> None:
        """Deliver what is due in the outbox; what fails waits longer each time."""
        by_target: dict[str, list[Due]] = {}
        for due in self._ledger.due_notes():
            by_target.setdefault(due.target, []).append(due)
        for target, dues in by_target.items():
            notifier = self._notifiers.get(target)
            if notifier is None:
                log.warning("dropping %d notes: no notifier %r any more", len(dues), target)
                self._ledger.noted(dues)
                continue
            failures = notifier.send([due.note for due in dues])
            self._ledger.noted([due for due in dues if due.note.id not in failures])
            for due in dues:
                error = failures.get(due.note.id)
                if error is None:
                    continue
                if due.tries + 1 >= _NOTE_TRIES:
                    log.error("giving up on note %s to %s: %s", due.note.id, target, error)
                    self._ledger.noted([due])
                    continue
                # Also what another try cannot mend now may work once the operator mended it.
                delay = min(_NOTE_BACKOFF_MAX, _NOTE_BACKOFF * 2**due.tries)
                log.warning("note to %s failed, again in %.0f s: %s", target, delay, error)
                self._ledger.note_failed(due, error.retry_after or delay)

    def consume_dead_letters(self) -> None:
        """Give every object of a dead letter the verdict Error, and keep the letter readable."""
        while letters := self._queue.dead(10, 0):
            protected = self._snapshot().protected
            for letter in letters:
                reason = letter.reason or "delivered as often as the queue allows"
                try:
                    event = decode(letter.body)
                    self._ledger.record(
                        [
                            give_up(ref, event.job or letter.id, reason, self._now())
                            for ref in event.refs
                            if ref.bucket in protected
                        ]
                    )
                except Unsupported:
                    pass  # not an event: it names no object; the letter itself is kept below
                self._ledger.bury(letter.id, letter.body, reason)
                log.warning("dead letter %s: %s", letter.id, reason)
            self._queue.ack(letters)
            self._on_dead(len(letters))

    def retry_errors(self) -> None:
        """Enqueue objects with verdict Error again, as `bucketward.ledger.RETRY_AFTER` says."""
        protected = self._snapshot().protected
        for verdict in self._ledger.due_retries():
            if verdict.bucket in protected:
                version = None if verdict.identity.startswith("etag:") else verdict.identity
                self._queue.send([encode([ObjectRef(verdict.bucket, verdict.key, version)])])
            self._ledger.retried(verdict)

    def sweep_all(self) -> None:
        """Look for unscanned objects in every protected bucket.

        While the queue itself is behind, what it holds has no verdict either: then it waits, or
        it would enqueue the backlog again and again.
        """
        age = self._queue.depth().oldest_age
        if age is not None and age > self._sweep_older:
            log.info("no sweep while the oldest message is %.0f s old", age)
            return
        older_than = self._now() - timedelta(seconds=self._sweep_older)
        total = 0
        times: list[datetime] = []

        def note(infos: Sequence[ObjectInfo]) -> None:
            times[:] = [min((*times, *(info.modified_at for info in infos)))]

        for protected in self._snapshot().protected.values():
            try:
                found = sweep(
                    self._ledger,
                    self._queue,
                    self._stores(protected),
                    protected,
                    older_than=older_than,
                    stopping=self._stopping.is_set,
                    on_missing=note,
                )
            except Error as error:
                log.warning("cannot sweep %s: %s", protected.bucket, error)
                continue
            if found:
                log.warning("sweep: %d unscanned objects in %s", found, protected.bucket)
            total += found
        self._on_sweep(total, min(times, default=None))

    def drain_results(self) -> None:
        """Take results that agents elsewhere sent and write them into the ledger."""
        assert self._results is not None
        while not self._stopping.is_set() and (messages := self._results.receive(10, 0)):
            read: list[tuple[Message, ScanResult | ObjectRef]] = []
            for message in messages:
                try:
                    read.append((message, load_gone(message.body) or load_result(message.body)))
                except _NO_RESULT as error:
                    self._results.bury(message, f"not a scan result: {error!r}"[:_REASON])
            try:
                self._take([what for _, what in read])
            except Unavailable:
                self._results.nack([message for message, _ in read])
                raise
            except (Unsupported, *_NO_RESULT):
                read = [(message, what) for message, what in read if self._take_one(message, what)]
            self._results.ack([message for message, _ in read])

    def _take(self, things: Sequence[ScanResult | ObjectRef]) -> None:
        self._ledger.record([thing for thing in things if isinstance(thing, ScanResult)])
        refs = [thing for thing in things if isinstance(thing, ObjectRef)]
        self._ledger.forget([ref for ref in refs if ref.etag is None])
        self._ledger.replaced([ref for ref in refs if ref.etag is not None])

    def _take_one(self, message: Message, thing: ScanResult | ObjectRef) -> bool:
        """Take one thing into the ledger, and return whether it fits in there."""
        assert self._results is not None
        try:
            self._take([thing])
        except (Unsupported, *_NO_RESULT) as error:
            self._results.bury(message, f"cannot be recorded: {error}"[:_REASON])
            return False
        return True
