"""The memory queue keeps the contract."""

import threading
import time

import pytest

from bucketward.errors import ConfigError
from bucketward.queues.memory import MemoryQueue, open_memory
from bucketward.testing.queue import QueueSuite


class TestMemoryQueue(QueueSuite):
    @pytest.fixture
    def queue(self):
        queue = MemoryQueue(lease=self.lease, max_deliveries=self.max_deliveries)
        yield queue
        queue.close()


def test_without_a_maximum_it_delivers_for_ever():
    queue = MemoryQueue(max_deliveries=0)
    queue.send(["body"])
    for delivery in range(1, 101):
        (message,) = queue.receive(1, 0)
        assert message.deliveries == delivery
        queue.nack([message])

    assert queue.dead(1, 0) == []


def test_a_lapsed_lease_is_good_until_somebody_takes_the_message():
    queue = MemoryQueue(lease=0.01)
    queue.send(["body"])
    messages = queue.receive(1, 0)
    time.sleep(0.05)

    assert len(queue.extend(messages, 30)) == 1
    assert queue.receive(1, 0) == []


def test_closing_ends_a_wait():
    queue = MemoryQueue()
    waiting = threading.Thread(target=queue.receive, args=(1, 30))
    waiting.start()
    time.sleep(0.05)
    queue.close()
    waiting.join(5)

    assert not waiting.is_alive()


def test_what_was_acked_takes_no_memory():
    queue = MemoryQueue(lease=3600)
    for _ in range(50):
        queue.send(["x" * 1000] * 100)
        queue.ack(queue.receive(100, 0))

    assert not queue._entries


def test_a_url_sets_lease_and_deliveries():
    queue = open_memory("memory://?lease=7&max_deliveries=2")
    queue.send(["body"])
    (message,) = queue.receive(1, 0)

    assert queue.max_deliveries == 2
    assert message.leased_until == pytest.approx(time.time() + 7, abs=1)


@pytest.mark.parametrize(
    "url",
    [
        "memory://?lease=0",
        "memory://?lease=nan",
        "memory://?lease=inf",
        "memory://?max_deliveries=-1",
        "memory://?max_deliveries=1.5",
        "memory://?leese=1",
        "memory://?lease",
        "sqs://eu-west-1/q",
        "memory://me:secret@/",
        "memory://[",
    ],
)
def test_a_bad_url_is_refused_without_repeating_secrets(url):
    with pytest.raises(ConfigError) as caught:
        open_memory(url)

    assert "secret" not in str(caught.value)
