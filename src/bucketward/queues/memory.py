"""Messages in this process's memory: for tests, and for commands that end when their work does."""
# ruff: noqa: D102 - the docstrings are the Protocol's

from __future__ import annotations

import heapq
import itertools
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from threading import Condition

from bucketward.model import Depth, Message
from bucketward.queues.rules import check_bodies, parse_url

PERMISSIONS: Mapping[str, str] = {}

_LEASE = 30.0
_MAX_DELIVERIES = 5


def open_memory(url: str = "memory://") -> MemoryQueue:
    """Open a new queue; every ``memory://?lease=30&max_deliveries=5`` is another."""
    address = parse_url(url, "memory", frozenset({"lease", "max_deliveries"}))
    return MemoryQueue(
        lease=address.seconds("lease", _LEASE),
        max_deliveries=address.count("max_deliveries", _MAX_DELIVERIES),
    )


@dataclass(slots=True)
class _Entry:
    body: str
    sent_at: datetime
    due_at: float = 0.0
    turn: int = 0
    """The number of its valid place in a heap; places with another number are stale."""
    deliveries: int = 0
    receipt: str = ""
    reason: str = ""
    is_dead: bool = False
    """Among the dead letters, where it also is while it is out on its last delivery."""
    is_last: bool = False


class MemoryQueue:
    """A queue that ends with the process.

    A lapsed lease is still good until somebody else takes the message.
    """

    def __init__(self, *, lease: float = _LEASE, max_deliveries: int = _MAX_DELIVERIES) -> None:
        self.max_deliveries = max_deliveries
        self._lease = lease
        self._entries: dict[str, _Entry] = {}
        self._heaps: tuple[list[_Place], list[_Place]] = ([], [])
        self._turns = itertools.count(1)
        self._changed = Condition()
        self._is_closed = False

    def ping(self) -> None:
        pass

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._entries.clear()
            self._changed.notify_all()

    def send(self, bodies: Sequence[str]) -> None:
        check_bodies(bodies, "memory")
        with self._changed:
            for body in bodies:
                key = uuid.uuid4().hex
                self._entries[key] = _Entry(body, datetime.now(UTC))
                self._place(key, time.time())
            self._changed.notify_all()

    def receive(self, limit: int, wait: float) -> Sequence[Message]:
        return self._take(limit, wait, dead=False)

    def ack(self, messages: Sequence[Message]) -> None:
        with self._changed:
            for message in messages:
                if self._held(message):
                    del self._entries[message.id]

    def nack(self, messages: Sequence[Message], delay: float = 0) -> None:
        with self._changed:
            for message in messages:
                if entry := self._held(message):
                    entry.receipt, entry.is_last = "", False
                    self._place(message.id, time.time() + max(delay, 0))
            self._changed.notify_all()

    def extend(self, messages: Sequence[Message], seconds: float) -> Sequence[Message]:
        with self._changed:
            until = time.time() + seconds
            held = [message for message in messages if self._held(message)]
            for message in held:
                self._place(message.id, until)
            self._changed.notify_all()
        return [replace(message, leased_until=until) for message in held]

    def bury(self, message: Message, reason: str) -> None:
        with self._changed:
            entry = self._entries.get(message.id)
            if entry is None or (entry.is_dead and not entry.is_last):
                return
            entry.receipt, entry.reason, entry.is_dead, entry.is_last = "", reason, True, False
            self._place(message.id, time.time())
            self._changed.notify_all()

    def dead(self, limit: int, wait: float) -> Sequence[Message]:
        return self._take(limit, wait, dead=True)

    def depth(self) -> Depth:
        """Count a message given back with a delay as in flight, as SQS does."""
        with self._changed:
            now = time.time()
            alive = [
                entry
                for entry in self._entries.values()
                if not entry.is_dead or (entry.is_last and entry.due_at > now)
            ]
        waiting = sum(entry.due_at <= now for entry in alive)
        oldest = min((entry.sent_at.timestamp() for entry in alive), default=now)
        return Depth(waiting, len(alive) - waiting, max(now - oldest, 0.0))

    def _take(self, limit: int, wait: float, *, dead: bool) -> list[Message]:
        deadline = time.monotonic() + wait
        with self._changed:
            while limit > 0 and not self._is_closed:
                taken, next_at = self._due(limit, dead=dead)
                left = deadline - time.monotonic()
                if taken or left <= 0:
                    return taken
                self._changed.wait(min(left, max(next_at - time.time(), 0)))
        return []

    def _due(self, limit: int, *, dead: bool) -> tuple[list[Message], float]:
        """Lease what is due; if nothing is, also return when something will be."""
        heap, now = self._heaps[dead], time.time()
        taken: list[Message] = []
        while heap and len(taken) < limit:
            due_at, turn, key = heap[0]
            entry = self._entries.get(key)
            if entry is not None and entry.turn == turn and due_at > now:
                return taken, due_at
            heapq.heappop(heap)
            if entry is None or entry.turn != turn:
                continue
            entry.deliveries += 1
            entry.receipt = uuid.uuid4().hex
            # Out on its last delivery it already stands, leased, among the dead letters: unless
            # it is acked, that is where it falls due.
            entry.is_last = not dead and entry.deliveries >= self.max_deliveries > 0
            entry.is_dead = dead or entry.is_last
            self._place(key, now + self._lease)
            taken.append(
                Message(
                    id=key,
                    body=entry.body,
                    receipt=entry.receipt,
                    deliveries=entry.deliveries,
                    sent_at=entry.sent_at,
                    leased_until=entry.due_at,
                    reason=entry.reason,
                )
            )
        return taken, float("inf")

    def _held(self, message: Message) -> _Entry | None:
        entry = self._entries.get(message.id)
        return entry if entry is not None and entry.receipt == message.receipt else None

    def _place(self, key: str, due_at: float) -> None:
        entry = self._entries[key]
        entry.due_at, entry.turn = due_at, next(self._turns)
        heapq.heappush(self._heaps[entry.is_dead], (due_at, entry.turn, key))


_Place = tuple[float, int, str]
