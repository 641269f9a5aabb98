"""The SQLite queue keeps the contract, over threads, processes, kills and bad disks."""

import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bucketward.errors import ConfigError, Unavailable, Unsupported
from bucketward.queues import sqlite
from bucketward.queues.sqlite import SqliteQueue, open_sqlite
from bucketward.testing.queue import QueueSuite, at_once, take


class TestSqliteQueue(QueueSuite):
    @pytest.fixture
    def queue(self, tmp_path):
        queue = SqliteQueue(
            tmp_path / "queue.db", lease=self.lease, max_deliveries=self.max_deliveries
        )
        yield queue
        queue.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "queue.db"


@pytest.fixture
def queue(path):
    queue = SqliteQueue(path)
    yield queue
    queue.close()


def run(script, *args, **more):
    """Start a Python process that has the queue's class at hand."""
    script = "import sys, time\nfrom bucketward.queues.sqlite import SqliteQueue\n" + (
        textwrap.dedent(script)
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        **more,
    )


def test_it_outlives_its_process(path):
    first = SqliteQueue(path)
    first.send(["kept", "leased", "buried", "acked"])
    by_body = {m.body: m for m in take(first, 4)}
    first.nack([by_body["kept"]])
    first.bury(by_body["buried"], "why")
    first.ack([by_body["acked"]])
    first.close()

    second = SqliteQueue(path)
    assert [(m.body, m.deliveries) for m in second.receive(10, 0)] == [("kept", 2)]
    assert [(m.body, m.reason) for m in second.dead(10, 0)] == [("buried", "why")]
    assert len(second.extend([by_body["leased"]], 30)) == 1, "a lease outlives the process too"
    second.close()


def test_what_one_connection_leased_another_can_settle(path, queue):
    other = SqliteQueue(path)
    queue.send([str(i) for i in range(5)])
    acked, nacked, buried, lapsing, kept = take(queue, 5)
    other.ack([acked])
    other.nack([nacked])
    other.bury(buried, "why")
    other.extend([lapsing], 0.05)
    (kept,) = other.extend([kept], 60)
    time.sleep(0.1)

    assert {m.id for m in queue.receive(10, 0)} == {nacked.id, lapsing.id}
    assert [(m.id, m.reason) for m in queue.dead(10, 0)] == [(buried.id, "why")]
    assert queue.extend([acked, nacked, buried, lapsing, kept], 30) == [
        replace(kept, leased_until=pytest.approx(time.time() + 30, abs=1))
    ]
    other.close()


@pytest.mark.parametrize("end", ["send", "nack", "bury"])
def test_a_waiting_thread_is_woken_at_once(queue, end):
    queue.send(["body"])
    (message,) = queue.receive(1, 0)
    ends = {
        "send": lambda: queue.send(["more"]),
        "nack": lambda: queue.nack([message]),
        "bury": lambda: queue.bury(message, "why"),
    }
    woken = []

    def wait():
        assert (queue.dead if end == "bury" else queue.receive)(1, 10)
        woken.append(time.monotonic())

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.21)
    started = time.monotonic()
    ends[end]()
    waiting.join()

    assert woken[0] - started < 0.05, "that would be the poll for other processes"


def test_queues_of_one_file_do_not_mix(path):
    events, retro = SqliteQueue(path), SqliteQueue(path, name="retro")
    events.send(["event"])
    retro.send(["retro"])
    (event,) = events.receive(10, 0)
    events.bury(event, "why")

    assert [m.body for m in retro.receive(10, 0)] == ["retro"]
    assert retro.dead(10, 0) == []
    assert events.depth().waiting == 0
    assert [m.body for m in events.dead(10, 0)] == ["event"]
    events.close()
    retro.close()


def test_two_processes_take_everything_once(path, queue):
    bodies = [str(i) for i in range(400)]
    script = """
        queue = SqliteQueue(sys.argv[1])
        print("ready", flush=True)
        wait = 20
        while messages := queue.receive(7, wait):
            wait = 0.3
            time.sleep(0.001)
            again = [m for m in messages[-1:] if m.deliveries == 1]
            done = [m for m in messages if m not in again]
            queue.nack(again)
            queue.ack(done)
            for message in done:
                print(message.body)
    """
    workers = [run(script, path) for _ in range(2)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    queue.send(bodies)
    printed = [worker.communicate(timeout=60)[0].split() for worker in workers]

    assert sorted(printed[0] + printed[1]) == sorted(bodies)
    assert all(printed), "both had a share"
    assert queue.depth().in_flight == 0


def test_a_send_in_another_process_wakes_a_receiver_quickly(path, queue):
    sender = run(
        """
        queue = SqliteQueue(sys.argv[1])
        time.sleep(0.5)
        queue.send([str(time.time())])
        """,
        path,
    )
    (message,) = queue.receive(1, 20)
    late = time.time() - float(message.body)
    sender.communicate()

    assert late < 0.5


def test_many_processes_may_open_a_new_file_at_once(path):
    script = """
        queue = SqliteQueue(sys.argv[1])
        queue.send([sys.argv[2]])
    """
    workers = [run(script, path, i) for i in range(6)]
    codes = [worker.wait(60) for worker in workers]
    for worker in workers:
        worker.stdout.close()
    queue = SqliteQueue(path)

    assert codes == [0] * 6
    assert sorted(m.body for m in queue.receive(10, 0)) == [str(i) for i in range(6)]
    queue.close()


@pytest.mark.parametrize("seed", range(3))
def test_killed_while_sending_nothing_that_was_sent_is_lost(path, seed):
    worker = run(
        """
        queue = SqliteQueue(sys.argv[1])
        number = 0
        while True:
            queue.send([f"{number}.{i}" for i in range(10)])
            print(number, flush=True)
            number += 1
        """,
        path,
    )
    worker.stdout.readline()
    time.sleep(random.Random(seed).uniform(0.02, 0.3))
    worker.send_signal(signal.SIGKILL)
    said = worker.communicate()[0].split()
    sent = int(said[-1]) + 1 if said else 1

    queue = SqliteQueue(path)
    bodies = {m.body for m in take(queue, queue.depth().waiting)}
    queue.close()
    assert {f"{n}.{i}" for n in range(sent) for i in range(10)} <= bodies
    assert len(bodies) % 10 == 0, "a call is whole or not at all"
    assert is_sound(path)


@pytest.mark.parametrize("seed", range(3))
def test_killed_while_working_nothing_is_lost_and_what_was_acked_stays_acked(path, seed):
    queue = SqliteQueue(path)
    bodies = {str(i) for i in range(3000)}
    queue.send(sorted(bodies))
    worker = run(
        """
        queue = SqliteQueue(sys.argv[1], lease=0.5)
        while messages := queue.receive(10, 0):
            messages = queue.extend(messages, 0.6)
            queue.bury(messages[0], "why")
            queue.ack(messages[1:9])
            print(*[m.body for m in messages[1:9]], flush=True)
            queue.nack(messages[9:])
        """,
        path,
    )
    acked = set(worker.stdout.readline().split())
    time.sleep(random.Random(seed).uniform(0.01, 0.1))
    worker.send_signal(signal.SIGKILL)
    acked |= set(worker.communicate()[0].split())
    time.sleep(0.7)

    left = set()
    for receive in (queue.receive, queue.dead):
        while messages := receive(500, 0):
            left |= {m.body for m in messages}
    queue.close()
    assert not acked & left
    assert len(bodies - acked - left) <= 8, "at most one ack was done and not yet said"
    assert is_sound(path)


def is_sound(path):
    db = sqlite3.connect(path)
    try:
        return db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        db.close()


def test_waiting_leaves_the_write_lock_alone(path, queue):
    waiting = threading.Thread(target=queue.receive, args=(1, 0.6))
    waiting.start()
    other = sqlite3.connect(path, timeout=0, isolation_level=None)
    for _ in range(60):
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
        time.sleep(0.005)
    waiting.join()
    other.close()


def test_a_file_that_is_locked_is_unavailable(path, queue):
    queue._db.execute("PRAGMA busy_timeout = 50")
    queue.send(["body"])
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for refused in (
        queue.ping,
        lambda: queue.send(["more"]),
        lambda: queue.receive(1, 5),
    ):
        with pytest.raises(Unavailable, match="locked by another process"):
            refused()
    other.execute("ROLLBACK")
    other.close()

    assert [(m.body, m.deliveries) for m in queue.receive(10, 0)] == [("body", 1)]


def test_a_full_disk_is_unavailable_and_passes(path, queue):
    queue.send(["before"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses to let any file of this process grow: SQLite sees a failed write.
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
    try:
        with pytest.raises(Unavailable, match="disk is full"):
            queue.send(["x" * 200_000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    queue.send(["after"])

    assert [m.body for m in take(queue, 2)] == ["before", "after"]
    assert is_sound(path)


def test_a_full_database_is_unavailable(queue):
    queue._db.execute("PRAGMA max_page_count = 20")

    with pytest.raises(Unavailable, match="disk is full; make room"):
        queue.send(["x" * 200_000])
    queue.send(["small"])
    assert [m.body for m in queue.receive(10, 0)] == ["small"]


@pytest.mark.parametrize(
    "content",
    [b"not a database at all\n" * 100, b"SQLite format 3\0" + b"\xff" * 4080, b"x"],
    ids=["text", "broken header", "one byte"],
)
def test_a_file_that_is_no_database_is_refused_and_left_alone(path, content):
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=r"queue\.db .* left as it is"):
        SqliteQueue(path)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["queue.db"]


@pytest.mark.parametrize(
    "statement",
    ["CREATE TABLE record (key)", "PRAGMA application_id = 7", "PRAGMA user_version = 1"],
)
def test_a_database_of_something_else_is_refused_and_left_alone(path, statement):
    other = sqlite3.connect(path)
    other.execute(statement)
    other.commit()
    other.close()
    content = path.read_bytes()

    with pytest.raises(ConfigError, match="something else"):
        SqliteQueue(path)
    assert path.read_bytes() == content


def test_a_file_of_another_release_is_refused(path, queue):
    queue._db.execute("PRAGMA user_version = 99")

    with pytest.raises(ConfigError, match="schema 99"):
        SqliteQueue(path)


def test_damage_behind_the_header_is_said(path):
    queue = SqliteQueue(path)
    queue.send([f"{i}" * 1000 for i in range(500)])
    queue.close()
    with path.open("r+b") as file:
        for page in range(2, path.stat().st_size // 4096):
            file.seek(page * 4096)
            file.write(b"\xde\xad" * 2048)

    with pytest.raises((Unavailable, ConfigError), match="is damaged"):
        for _ in range(100):
            SqliteQueue(path).receive(100, 0)


def test_an_empty_file_becomes_a_queue(path):
    path.touch()
    queue = SqliteQueue(path)
    queue.send(["body"])

    assert len(queue.receive(1, 0)) == 1
    queue.close()


def test_others_cannot_read_the_file(path, queue):
    queue.send(["secret/key"])

    assert {p.name: p.stat().st_mode & 0o077 for p in path.parent.iterdir()} == {
        "queue.db": 0,
        "queue.db-wal": 0,
        "queue.db-shm": 0,
    }


def test_a_folder_that_is_missing_is_said(tmp_path):
    with pytest.raises(ConfigError, match="folder exists"):
        SqliteQueue(tmp_path / "no" / "queue.db")


def test_a_folder_in_place_of_the_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot be opened"):
        SqliteQueue(tmp_path)


def test_a_file_that_was_removed_fails_the_ping(path, queue):
    path.unlink()

    with pytest.raises(Unavailable, match="removed while it was in use"):
        queue.ping()


def test_a_clock_that_was_ahead_does_not_hide_messages_for_ever(path):
    queue = SqliteQueue(path)
    queue.send(["from the future"])
    queue._db.execute("UPDATE message SET due_at = due_at + 1e9")
    queue.close()
    queue = SqliteQueue(path)

    assert [m.body for m in queue.receive(1, 0)] == ["from the future"]
    queue.close()


def test_closing_ends_a_wait(path):
    queue = SqliteQueue(path)
    waiting = threading.Thread(target=queue.receive, args=(1, 30))
    waiting.start()
    time.sleep(0.05)
    queue.close()
    waiting.join(5)

    assert not waiting.is_alive()


def test_threads_end_without_leaving_files_open(path, queue):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        at_once([lambda: queue.send(["body"]), lambda: queue.depth()] * 4)

    assert len(os.listdir("/proc/self/fd")) == before


def test_a_backlog_does_not_slow_the_queue_down(queue):
    queue.send(["x" * 300] * 50_000)
    for _ in range(20):
        for message in queue.receive(50, 0):
            queue.bury(message, "dead")
    started = time.monotonic()
    for _ in range(100):
        queue.ack(queue.receive(10, 0))
        queue.nack(queue.dead(10, 0), 60)
    took = time.monotonic() - started
    started = time.monotonic()
    depth = queue.depth()

    assert (depth.waiting, depth.in_flight) == (48_000, 0)
    assert took < 2, "4 ms a message would be a scan of the table"
    assert time.monotonic() - started < 0.5


def test_a_url_names_file_queue_lease_and_deliveries(tmp_path):
    path = tmp_path / "a b?.db"
    queue = open_sqlite(f"sqlite://{tmp_path}/a%20b%3F.db?name=retro&lease=7.5&max_deliveries=2")
    queue.send(["body"])
    (message,) = queue.receive(1, 0)
    queue.close()

    assert path.exists()
    assert queue.max_deliveries == 2
    assert message.leased_until == pytest.approx(time.time() + 7.5, abs=1)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://relative.db",
        "sqlite:relative.db",
        "sqlite://",
        "sqlite:///",
        "sqlite:///a/folder/",
        "sqlite:///q.db?lease=-1",
        "sqlite:///q.db?max_deliveries=many",
        "sqlite:///q.db?path=/etc/passwd",
        "sqlite://me:secret@host/q.db",
        "file:///q.db",
    ],
)
def test_a_bad_url_is_refused_without_repeating_secrets(url):
    with pytest.raises(ConfigError) as caught:
        open_sqlite(url)

    assert "secret" not in str(caught.value)


def test_nothing_that_it_says_ends_in_a_body(queue):
    with pytest.raises(Unsupported) as caught:
        queue.send(["private" * 50_000])

    assert "private" not in str(caught.value)


def test_it_needs_no_permissions():
    assert sqlite.PERMISSIONS == {}
    assert Path(sqlite.__file__).exists()
