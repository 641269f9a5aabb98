"""What every queue has to keep: subclass `QueueSuite` with the fixture `queue`."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest

from bucketward.errors import Unsupported
from bucketward.interfaces import Queue
from bucketward.model import Message

LIMIT = 256 * 1024

TEXTS = (
    "plain",
    " leading and trailing blanks ",
    "\n\ttabs and\nline ends\r\n and a bare \r\n\n",
    '{"a": [1, "\\u0000", null], "b": "\\"}"}',
    "<a href='x'>&amp;&#x0;<![CDATA[ ]]> ]]> <!-- --></a>",
    "a=b&c=%2F+%00&d=é",
    "e\u0301 is not \u00e9",
    "日本語 العربية עברית \u202eright to left\u202c",
    "\U0001f9a0\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2028 \u2029 \u0085 \ufeff",
    "'; DROP TABLE message; --",
    "0",
    "null",
    "x" * 100_000,
)

HARD_TEXTS = (
    "",
    "nul \x00 inside",
    "bell \x07 and escape \x1b[0m",
    "not a character \ufffe \uffff",
    "lone surrogate \ud800",
)
"""Some media cannot carry these; then they are refused, never altered."""


class QueueSuite:
    """Fixture `queue`: open, empty, with no dead letters, and closed by the subclass afterwards.

    The attributes describe it.  Leases must last long enough for one step of a test (1 s is
    comfortable); tests that need one to lapse mostly shorten it to `tick` by `extend`.
    """

    lease = 1.0
    """The lease, in seconds, that the fixture gave the queue."""

    tick = 0.1
    """The shortest lease or delay that the queue can measure (SQS: 1 s)."""

    max_deliveries = 3
    """As the fixture set it up; at least 2, or 0 if this queue never sets messages aside."""

    many = 400
    """How many messages are a crowd; fewer where the server is a slow stand-in."""

    is_exact = True
    """Whether a message never comes twice within one lease.  At-least-once permits it."""

    knows_spent_receipts = True
    """Whether a receipt of an earlier delivery, or of a message given back, has no effect."""

    @pytest.fixture
    def queue(self) -> Iterable[Queue]:
        raise NotImplementedError("a subclass says which queue")

    # Sending

    def test_every_text_comes_back_as_it_was_sent(self, queue: Queue) -> None:
        queue.send(TEXTS)

        assert sorted(m.body for m in take(queue, len(TEXTS))) == sorted(TEXTS)

    @pytest.mark.parametrize("text", HARD_TEXTS, ids=ascii)
    def test_a_hard_text_is_kept_or_refused_but_never_altered(
        self, queue: Queue, text: str
    ) -> None:
        refused = None
        try:
            queue.send(["before", text])
        except Unsupported as error:
            refused = error

        if refused is None:
            assert sorted(m.body for m in take(queue, 2)) == sorted(["before", text])
        else:
            assert refused.backend
            assert refused.reason
            assert queue.receive(10, 0) == []

    @pytest.mark.parametrize("letter", ["x", "é", "\U0001f9a0"])
    def test_a_body_of_exactly_256_kib_passes(self, queue: Queue, letter: str) -> None:
        body = letter * (LIMIT // len(letter.encode()))
        queue.send([body])
        (message,) = take(queue, 1)

        assert message.body == body

    @pytest.mark.parametrize("body", ["x" * (LIMIT + 1), "é" * (LIMIT // 2) + "x"], ids=len)
    def test_one_body_too_large_and_nothing_is_enqueued(self, queue: Queue, body: str) -> None:
        with pytest.raises(Unsupported) as caught:
            queue.send(["small", body, "small"])

        assert caught.value.reason == "too-large"
        assert caught.value.backend
        assert queue.receive(10, 0) == []

    def test_many_large_bodies_go_in_one_call(self, queue: Queue) -> None:
        bodies = [str(i) * LIMIT for i in range(10)]
        queue.send(bodies)

        assert sorted(m.body for m in take(queue, 10)) == bodies

    def test_sending_nothing_does_nothing(self, queue: Queue) -> None:
        queue.send([])

        assert queue.receive(10, 0) == []

    def test_equal_bodies_are_different_messages(self, queue: Queue) -> None:
        queue.send(["same"] * 25)
        messages = take(queue, 25)

        assert {m.body for m in messages} == {"same"}
        assert len({m.id for m in messages}) == 25
        assert len({m.receipt for m in messages}) == 25

    # Receiving

    def test_the_first_delivery_says_so(self, queue: Queue) -> None:
        before = datetime.now(UTC) - timedelta(seconds=1)
        queue.send(["body"])
        (message,) = take(queue, 1)

        assert message.deliveries == 1
        assert message.reason == ""
        assert message.sent_at.tzinfo is not None
        assert before <= message.sent_at <= datetime.now(UTC) + timedelta(seconds=1)
        assert message.leased_until == pytest.approx(time.time() + self.lease, abs=1)

    def test_an_empty_queue_answers_at_once_when_told_not_to_wait(self, queue: Queue) -> None:
        started = time.monotonic()

        assert queue.receive(10, 0) == []
        assert queue.dead(10, 0) == []
        assert time.monotonic() - started < 1

    def test_an_empty_queue_waits_as_long_as_it_was_told(self, queue: Queue) -> None:
        wait = max(self.tick, 0.3)
        started = time.monotonic()
        messages = queue.receive(10, wait)
        waited = time.monotonic() - started

        assert messages == []
        assert wait * 0.8 <= waited < wait + 5

    def test_waiting_ends_at_once_when_there_is_something(self, queue: Queue) -> None:
        queue.send(["body"])
        started = time.monotonic()

        assert len(queue.receive(10, 15)) == 1
        assert time.monotonic() - started < 5

    def test_waiting_ends_when_something_comes(self, queue: Queue) -> None:
        timer = threading.Timer(0.15, queue.send, [["late"]])
        timer.start()
        started = time.monotonic()
        messages = queue.receive(10, 15)
        waited = time.monotonic() - started
        timer.join()

        assert [m.body for m in messages] == ["late"]
        assert waited < 5

    def test_waiting_ends_when_a_lease_lapses(self, queue: Queue) -> None:
        queue.send(["body"])
        queue.extend(take(queue, 1), self.tick)
        started = time.monotonic()
        messages = queue.receive(10, 15)

        assert [m.body for m in messages] == ["body"]
        assert time.monotonic() - started < 5 + self.tick

    @pytest.mark.parametrize("limit", [1, 3, 10, 25])
    def test_the_limit_is_honoured(self, queue: Queue, limit: int) -> None:
        queue.send([str(i) for i in range(40)])

        assert 1 <= len(queue.receive(limit, 2)) <= limit

    def test_a_limit_of_nothing_yields_nothing(self, queue: Queue) -> None:
        queue.send(["body"])

        assert queue.receive(0, 0) == []
        assert len(take(queue, 1)) == 1

    # Leases

    def test_a_lease_hides_the_message(self, queue: Queue) -> None:
        queue.send(["body"])
        (message,) = take(queue, 1)
        while time.time() < message.leased_until - self.lease / 2:
            assert queue.receive(10, 0) == []
            time.sleep(self.lease / 10)

    def test_a_lapsed_lease_brings_the_message_again(self, queue: Queue) -> None:
        queue.send(["body"])
        (first,) = take(queue, 1)
        (second,) = queue.receive(10, self.lease + 5)

        assert time.time() >= first.leased_until - 0.5
        assert second.id == first.id
        assert second.body == first.body
        assert second.sent_at == first.sent_at
        assert second.deliveries == 2
        assert second.receipt != first.receipt

    # Acknowledging

    def test_what_is_acked_never_comes_again(self, queue: Queue) -> None:
        queue.send(["body"])
        messages = queue.extend(take(queue, 1), self.tick)
        queue.ack(messages)
        time.sleep(self.tick * 1.1)

        assert queue.receive(10, 0) == []
        assert queue.dead(10, 0) == []

    def test_a_large_batch_is_acked_whole(self, queue: Queue) -> None:
        queue.send([str(i) for i in range(25)])
        messages = queue.extend(take(queue, 25), max(self.tick, 0.3))
        assert len(messages) == 25
        queue.ack(messages)
        time.sleep(max(self.tick, 0.3) * 1.1)

        assert queue.receive(10, 0) == []

    def test_acking_nothing_is_fine(self, queue: Queue) -> None:
        queue.ack([])
        queue.nack([])

        assert queue.extend([], 1) == []

    def test_acking_twice_is_no_error(self, queue: Queue) -> None:
        queue.send(["one", "two"])
        one, two = take(queue, 2)
        queue.ack([one])
        queue.ack([one, one, two])
        queue.ack([two, one])

        assert gone(queue)

    def test_acking_after_the_lease_lapsed_is_no_error(self, queue: Queue) -> None:
        queue.send(["body"])
        lapsed = self._let_lapse(queue, take(queue, 1))
        queue.ack(lapsed)
        queue.ack(self._take_if_any(queue))

        assert gone(queue)

    def test_acking_what_somebody_else_has_now_is_no_error(self, queue: Queue) -> None:
        queue.send(["body"])
        lapsed = self._let_lapse(queue, take(queue, 1))
        again = take(queue, 1)
        queue.ack(lapsed)
        if self.knows_spent_receipts:
            assert len(queue.extend(again, 30)) == 1, "the new holder was disturbed"
        queue.ack(again)

        assert gone(queue)

    def test_one_spent_receipt_does_not_keep_the_others(self, queue: Queue) -> None:
        queue.send([str(i) for i in range(12)])
        messages = take(queue, 12)
        queue.ack(messages[5:6])
        queue.ack(messages)

        assert gone(queue)

    # Giving back

    def test_what_is_given_back_comes_at_once(self, queue: Queue) -> None:
        queue.send(["body"])
        (first,) = take(queue, 1)
        queue.nack([first])
        started = time.monotonic()
        (second,) = queue.receive(10, 5)

        assert time.monotonic() - started < max(self.lease / 2, 1)
        assert (second.id, second.deliveries) == (first.id, 2)

    def test_giving_back_wakes_a_waiting_receiver(self, queue: Queue) -> None:
        queue.send(["body"])
        messages = queue.extend(take(queue, 1), 60)
        timer = threading.Timer(0.15, queue.nack, [messages])
        timer.start()
        started = time.monotonic()
        again = queue.receive(10, 15)
        waited = time.monotonic() - started
        timer.join()

        assert len(again) == 1
        assert waited < 5

    def test_what_is_given_back_with_a_delay_comes_after_it(self, queue: Queue) -> None:
        queue.send([str(i) for i in range(12)])
        messages = queue.extend(take(queue, 12), 60)
        delay = max(self.tick, 0.3)
        started = time.monotonic()
        queue.nack(messages, delay)

        assert queue.receive(10, 0) == []
        assert len(take(queue, 12)) == 12
        assert time.monotonic() - started >= delay * 0.9

    def test_giving_back_after_the_lease_lapsed_is_no_error(self, queue: Queue) -> None:
        queue.send(["body"])
        lapsed = self._let_lapse(queue, take(queue, 1))
        queue.nack(lapsed)

        assert len(take(queue, 1)) == 1

    def test_giving_back_what_somebody_else_has_now_changes_nothing(self, queue: Queue) -> None:
        queue.send(["body"])
        lapsed = self._let_lapse(queue, take(queue, 1))
        again = queue.extend(take(queue, 1), 30)
        queue.nack(lapsed)

        assert queue.receive(10, 0) == []
        assert len(queue.extend(again, 30)) == 1

    def test_giving_back_what_was_acked_does_not_revive_it(self, queue: Queue) -> None:
        queue.send(["body"])
        messages = take(queue, 1)
        queue.ack(messages)
        queue.nack(messages)

        assert gone(queue)

    # Extending

    def test_extending_keeps_the_message(self, queue: Queue) -> None:
        queue.send([str(i) for i in range(25)])
        messages = queue.extend(queue.extend(take(queue, 25), 30), 2 * self.tick)
        started = time.time()
        again = queue.extend(messages, 60)

        assert sorted(m.id for m in again) == sorted(m.id for m in messages)
        assert len(again) == 25
        for message in again:
            assert started + 55 < message.leased_until <= started + 65
        time.sleep(2.1 * self.tick)
        assert queue.receive(10, 0) == []
        queue.ack(again)
        assert gone(queue)

    def test_a_lease_can_be_cut_short(self, queue: Queue) -> None:
        queue.send(["body"])
        (short,) = queue.extend(queue.extend(take(queue, 1), 60), self.tick)
        (again,) = queue.receive(10, 10)

        assert short.leased_until < time.time() + self.tick
        assert again.deliveries == 2

    def test_what_somebody_else_has_now_is_lost(self, queue: Queue) -> None:
        queue.send(["lost", "kept"])
        both = queue.extend(take(queue, 2), 30)
        kept = [m for m in both if m.body == "kept"]
        lapsed = self._let_lapse(queue, [m for m in both if m.body == "lost"])
        (again,) = queue.extend(take(queue, 1), 10)
        held = queue.extend([*lapsed, *kept], 60)

        assert [m.id for m in held] == [m.id for m in kept]
        assert queue.receive(10, 0) == []
        assert len(queue.extend([again], 30)) == 1, "the new holder was disturbed"

    def test_what_was_acked_is_lost(self, queue: Queue) -> None:
        queue.send(["one", "two"])
        one, two = take(queue, 2)
        queue.ack([one])

        assert [m.id for m in queue.extend([one, two], 30)] == [two.id]

    def test_what_was_given_back_is_lost(self, queue: Queue) -> None:
        if not self.knows_spent_receipts:
            return
        queue.send(["body"])
        messages = take(queue, 1)
        queue.nack(messages)

        assert queue.extend(messages, 30) == []
        assert len(take(queue, 1)) == 1

    # Dead letters

    def test_what_is_buried_is_a_dead_letter_with_its_reason(self, queue: Queue) -> None:
        queue.send(["live", "bad <&> \U0001f9a0"])
        live, bad = sorted(take(queue, 2), key=lambda m: -ord(m.body[0]))
        queue.bury(bad, "why <&> é \U0001f9a0")
        (dead,) = take(queue, 1, dead=True)

        assert dead.body == bad.body
        assert dead.id == bad.id
        assert dead.reason == "why <&> é \U0001f9a0"
        assert dead.deliveries >= 1
        assert dead.sent_at.tzinfo is not None
        assert dead.leased_until > time.time()
        queue.nack([live])
        assert [m.id for m in take(queue, 1)] == [live.id]

    def test_what_is_buried_is_not_delivered_again(self, queue: Queue) -> None:
        queue.send(["body"])
        (message,) = queue.extend(take(queue, 1), self.tick)
        queue.bury(message, "reason")
        time.sleep(self.tick * 1.1)

        assert queue.receive(10, 0) == []

    @pytest.mark.parametrize("reason", ["", "r" * 5000, "\x00\x1b[31m\n\ud800"], ids=len)
    def test_a_hard_reason_buries_all_the_same(self, queue: Queue, reason: str) -> None:
        queue.send(["body"])
        (message,) = take(queue, 1)
        queue.bury(message, reason)
        (dead,) = take(queue, 1, dead=True)

        assert dead.body == "body"
        assert bool(dead.reason) == bool(reason)

    def test_the_largest_body_can_be_buried(self, queue: Queue) -> None:
        queue.send(["x" * LIMIT])
        (message,) = take(queue, 1)
        queue.bury(message, "reason")
        (dead,) = take(queue, 1, dead=True)

        assert dead.body == message.body

    def test_burying_twice_loses_nothing(self, queue: Queue) -> None:
        queue.send(["body"])
        (message,) = take(queue, 1)
        queue.bury(message, "reason")
        queue.bury(message, "reason")
        dead = take(queue, 1, dead=True)
        dead += queue.dead(10, 0)

        assert {m.body for m in dead} == {"body"}
        assert {m.id for m in dead} == {message.id}
        assert len(dead) <= 2
        assert gone(queue)

    def test_burying_after_the_lease_lapsed_loses_nothing(self, queue: Queue) -> None:
        queue.send(["body"])
        (lapsed,) = self._let_lapse(queue, take(queue, 1))
        queue.bury(lapsed, "reason")

        assert [m.body for m in take(queue, 1, dead=True)] == ["body"]

    def test_burying_a_dead_letter_changes_nothing(self, queue: Queue) -> None:
        queue.send(["body"])
        queue.bury(take(queue, 1)[0], "first")
        (dead,) = take(queue, 1, dead=True)
        queue.bury(dead, "second")
        queue.nack([dead])

        assert [m.reason for m in take(queue, 1, dead=True)] == ["first"]
        assert queue.dead(10, 0) == []

    def test_dead_letters_are_leased_and_given_back_and_acked(self, queue: Queue) -> None:
        queue.send([str(i) for i in range(12)])
        for message in take(queue, 12):
            queue.bury(message, f"reason {message.body}")
        first = queue.extend(take(queue, 12, dead=True), 30)

        assert len(first) == 12
        assert queue.dead(10, 0) == []
        queue.nack(first[:1])
        (again,) = take(queue, 1, dead=True)
        assert again.id == first[0].id
        assert again.reason == f"reason {again.body}"
        short = queue.extend(first[1:2], self.tick)
        assert [m.id for m in queue.dead(10, 10)] == [short[0].id]
        queue.ack([again, *first[2:]])
        assert queue.receive(10, 0) == []

    def test_dead_letters_honour_the_limit_and_the_wait(self, queue: Queue) -> None:
        queue.send([str(i) for i in range(5)])
        for message in take(queue, 5):
            queue.bury(message, "reason")

        assert 1 <= len(queue.dead(2, 15)) <= 2
        assert queue.dead(0, 0) == []

    def test_waiting_for_dead_letters_ends_when_one_comes(self, queue: Queue) -> None:
        queue.send(["body"])
        (message,) = queue.extend(take(queue, 1), 60)
        timer = threading.Timer(0.15, queue.bury, [message, "reason"])
        timer.start()
        started = time.monotonic()
        dead = queue.dead(10, 15)
        waited = time.monotonic() - started
        timer.join()

        assert [m.body for m in dead] == ["body"]
        assert waited < 5

    def test_what_was_given_back_too_often_becomes_a_dead_letter(self, queue: Queue) -> None:
        queue.send(["bad"])
        deliveries = []
        while messages := self._take_if_any(queue):
            deliveries += [m.deliveries for m in messages]
            queue.nack(messages)
            if len(deliveries) > 10 and not self.max_deliveries:
                return

        assert deliveries == list(range(1, self.max_deliveries + 1))
        (dead,) = take(queue, 1, dead=True)
        assert (dead.body, dead.reason) == ("bad", "")
        queue.ack([dead])
        assert gone(queue)

    def test_what_lapsed_too_often_becomes_a_dead_letter(self, queue: Queue) -> None:
        if not self.max_deliveries:
            return
        queue.send(["bad"])
        (message,) = take(queue, 1)
        for _ in range(self.max_deliveries - 1):
            self._let_lapse(queue, [message])
            (message,) = take(queue, 1)

        assert message.deliveries == self.max_deliveries
        assert queue.dead(10, 0) == [], "somebody still has it"
        self._let_lapse(queue, [message])
        assert self._take_if_any(queue) == []
        assert [(m.body, m.id) for m in take(queue, 1, dead=True)] == [("bad", message.id)]

    def test_the_last_delivery_can_still_be_acked(self, queue: Queue) -> None:
        queue.send(["good at last"])
        for _ in range(self.max_deliveries - 1):
            queue.nack(take(queue, 1))
        messages = queue.extend(take(queue, 1), 30)
        assert len(messages) == 1
        queue.ack(messages)

        assert gone(queue)
        assert queue.dead(10, 0) == []

    def test_the_last_delivery_can_still_be_buried(self, queue: Queue) -> None:
        queue.send(["bad"])
        for _ in range(self.max_deliveries - 1):
            queue.nack(take(queue, 1))
        (message,) = take(queue, 1)
        queue.bury(message, "gave up")

        assert [(m.id, m.reason) for m in take(queue, 1, dead=True)] == [(message.id, "gave up")]
        assert gone(queue)

    # Depth

    def test_depth_tells_waiting_from_in_flight(self, queue: Queue) -> None:
        assert eventually(lambda: counts(queue) == (0, 0))
        queue.send(["1", "2", "3"])
        assert eventually(lambda: counts(queue) == (3, 0))
        (first,) = queue.extend(queue.receive(1, 5), 60)
        assert eventually(lambda: counts(queue) == (2, 1))
        queue.nack([first], 60)
        assert eventually(lambda: sum(counts(queue)) == 3)
        queue.ack(take(queue, 2))
        assert eventually(lambda: sum(counts(queue)) == 1)

    def test_dead_letters_do_not_count(self, queue: Queue) -> None:
        queue.send(["1", "2"])
        one, two = take(queue, 2)
        queue.bury(one, "reason")
        queue.ack([two])

        assert eventually(lambda: counts(queue) == (0, 0))
        assert len(take(queue, 1, dead=True)) == 1
        assert counts(queue) == (0, 0)

    def test_the_oldest_age_is_the_oldest_messages(self, queue: Queue) -> None:
        queue.send(["old"])
        time.sleep(0.2)
        queue.send(["new"])
        age = queue.depth().oldest_age

        assert age is None or 0.2 <= age < 10

    # Many at once

    def test_eight_threads_take_many_messages_and_lose_none(self, queue: Queue) -> None:
        bodies = [str(i) for i in range(self.many)]
        queue.send(bodies)
        acked: list[str] = []

        def consume() -> None:
            while messages := queue.receive(10, self._moment):
                queue.ack(messages)
                acked.extend(m.body for m in messages)

        at_once([consume] * 8)

        assert set(acked) == set(bodies)
        if self.is_exact:
            assert Counter(acked) == Counter(bodies)
        assert gone(queue)

    def test_threads_send_and_take_at_once_and_lose_none(self, queue: Queue) -> None:
        taken: list[str] = []

        def send(number: int) -> Callable[[], None]:
            def work() -> None:
                for i in range(7):
                    queue.send([f"{number}.{i}.{j}" for j in range(7)])

            return work

        def consume() -> None:
            while messages := queue.receive(10, self._moment):
                taken.extend(m.body for m in messages)
                queue.ack(messages)

        at_once([*map(send, range(4)), *[consume] * 4])

        assert set(taken) >= {f"{n}.{i}.{j}" for n in range(4) for i in range(7) for j in range(7)}

    def test_threads_that_quarrel_lose_none(self, queue: Queue) -> None:
        bodies = {str(i) for i in range(60)}
        queue.send(sorted(bodies))
        tally = Tally()

        def quarrel() -> None:
            while messages := queue.receive(5, self._moment):
                for message in queue.extend(messages, 30):
                    turn = tally.count(message.body)
                    if turn == 1 and self.max_deliveries != 1:
                        queue.nack([message])
                    elif turn % 5 == 0:
                        queue.bury(message, "reason")
                    else:
                        queue.ack([message, message])

        at_once([quarrel] * 6)
        seen = set(tally.counts)

        assert seen == bodies
        assert gone(queue)

    # The rest

    def test_a_good_queue_answers_a_ping(self, queue: Queue) -> None:
        queue.send(["body"])
        queue.ping()
        (message,) = take(queue, 1)

        assert message.deliveries == 1, "a ping is not a delivery"

    def test_it_closes_twice(self, queue: Queue) -> None:
        queue.close()
        queue.close()

    def test_it_is_a_queue_that_declares_itself(self, queue: Queue) -> None:
        assert isinstance(queue, Queue)
        assert queue.max_deliveries == self.max_deliveries
        permissions = sys.modules[type(queue).__module__].PERMISSIONS
        json.dumps(dict(permissions))
        assert all(permissions.values())

    def _take_if_any(self, queue: Queue) -> Sequence[Message]:
        return queue.receive(1, self._moment)

    @property
    def _moment(self) -> float:
        """The shortest time in which a queue that has something says so."""
        return max(self.tick, 0.2)

    def _let_lapse(self, queue: Queue, messages: Sequence[Message]) -> Sequence[Message]:
        lapsing = queue.extend(messages, self.tick)
        assert len(lapsing) == len(messages)
        time.sleep(self.tick * 1.1 + 0.05)
        return lapsing


@dataclass
class Tally:
    """Counts by name, from any thread."""

    counts: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str) -> int:
        with self.lock:
            self.counts[name] = self.counts.get(name, 0) + 1
            return self.counts[name]


def take(queue: Queue, number: int, *, dead: bool = False) -> list[Message]:
    """Receive exactly `number` messages, in as many calls as it takes, for 15 s at most."""
    messages: list[Message] = []
    until = time.monotonic() + 15
    while len(messages) < number and time.monotonic() < until:
        receive = queue.dead if dead else queue.receive
        messages += receive(number - len(messages), 1)
    assert len(messages) == number
    return messages


def gone(queue: Queue) -> bool:
    """Return whether nothing waits, and nothing is in flight."""
    return eventually(lambda: counts(queue) == (0, 0)) and queue.receive(10, 0) == []


def counts(queue: Queue) -> tuple[int, int]:
    """Return how many wait and how many are in flight."""
    depth = queue.depth()
    return depth.waiting, depth.in_flight


def eventually(condition: Callable[[], bool], seconds: float = 5) -> bool:
    """Return whether `condition` becomes true in time: depth is only about right."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def at_once(works: Sequence[Callable[[], None]]) -> None:
    """Run every function in a thread of its own and raise what any of them raised."""
    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result(120)
