import threading
from datetime import UTC, datetime, timedelta

from bucketward.agents.heartbeat import Heartbeat
from bucketward.agents.keeper import sweep
from bucketward.errors import Denied, Unavailable
from bucketward.events import decode
from bucketward.ledger import Protected, dump_result
from bucketward.model import Verdict
from bucketward.queues.memory import MemoryQueue
from house_kit import MARK, Kit, listing, put, today, wait_for


def bodies(queue):
    found = []
    while messages := queue.receive(10, 0):
        found += [decode(m.body).refs[0] for m in messages]
        queue.ack(messages)
    return found


def test_the_sweep_finds_what_has_no_verdict():
    kit = Kit()
    put(kit.store, "seen", b"hello")
    kit.announce("seen")
    kit.run_until_idle(1)
    missed = put(kit.store, "missed", MARK)
    older = put(kit.store, "seen", b"second version, event lost")
    protected = kit.ledger.protected()["memory://in"]

    assert sweep(kit.ledger, kit.queue, kit.store, protected) == 2
    found = {(r.key, r.version_id) for r in bodies(kit.queue)}
    assert found == {("missed", missed.version_id), ("seen", older.version_id)}


def test_the_sweep_leaves_fresh_objects_to_their_event_and_old_ones_to_a_job():
    kit = Kit()
    put(kit.store, "k", b"hello")
    now = datetime.now(UTC)
    protected = Protected("memory://in", "memory://in")
    late = Protected("memory://in", "memory://in", since=(now + timedelta(hours=1)).isoformat())

    assert sweep(kit.ledger, kit.queue, kit.store, protected, older_than=now - timedelta(1)) == 0
    assert sweep(kit.ledger, kit.queue, kit.store, late) == 0
    assert sweep(kit.ledger, kit.queue, kit.store, protected) == 1


def test_everything_swept_ends_with_a_verdict():
    kit = Kit(versioned=False)
    for i in range(50):
        put(kit.store, f"k{i}", MARK if i % 10 == 0 else b"hello")
    protected = kit.ledger.protected()["memory://in"]
    sweep(kit.ledger, kit.queue, kit.store, protected)
    kit.run_until_idle(50)

    assert sweep(kit.ledger, kit.queue, kit.store, protected) == 0
    assert len(listing(kit.quarantine)) == 5


def test_a_dead_letter_becomes_an_error_and_stays_readable():
    kit = Kit(max_deliveries=1)
    put(kit.store, "k", b"hello")
    kit.announce("k")
    (message,) = kit.queue.receive(1, 0)
    kit.queue.bury(message, "poison")
    kit.queue.send(["not an event"])
    (message,) = kit.queue.receive(1, 0)
    kit.queue.bury(message, "rubbish")
    kit.keeper().consume_dead_letters()

    (result,) = kit.ledger.results("verdict", f"Error|{today()}").items
    assert (result.object.key, result.message) == ("k", "poison")
    letters = kit.ledger.dead(today()).items
    assert {letter["reason"] for letter in letters} == {"poison", "rubbish"}
    assert kit.queue.dead(10, 0) == []


def test_an_error_is_enqueued_again_when_its_time_has_come():
    kit = Kit()
    put(kit.store, "k", b"hello")
    kit.engines.clear()
    kit.announce("k")
    kit.run_until_idle(1)
    keeper = kit.keeper()
    keeper.retry_errors()
    assert bodies(kit.queue) == []
    kit.ledger._now = lambda: datetime.now(UTC) + timedelta(hours=2)
    keeper.retry_errors()
    keeper.retry_errors()

    assert [r.key for r in bodies(kit.queue)] == ["k"]


def test_a_failed_notification_never_fails_a_scan_and_is_sent_later():
    kit = Kit()
    put(kit.store, "k", MARK)
    kit.announce("k")
    kit.notifier.fail(Unavailable("away"))
    (result,) = kit.run_until_idle(1)
    keeper = kit.keeper()
    keeper.send_notes()
    assert kit.notifier.notes == []
    kit.notifier.mend()
    kit.ledger._now = lambda: datetime.now(UTC) + timedelta(hours=1)
    keeper.send_notes()
    keeper.send_notes()

    (note,) = kit.notifier.notes
    assert note.id == f"{result.id}.scanResult"
    assert note.attributes["scanResult"] == "Infected"


def test_results_from_elsewhere_reach_the_ledger_once():
    kit = Kit()
    put(kit.store, "k", b"hello")
    kit.announce("k")
    (result,) = kit.run_until_idle(1)
    other = Kit()
    results = MemoryQueue(max_deliveries=3)
    results.send([dump_result(result), "rubbish", dump_result(result)])
    other.keeper(results=results).drain_results()

    assert other.ledger.result(result.id).verdict is Verdict.CLEAN
    assert other.ledger.counters("memory://in", today())["Clean"] == 1
    assert [letter.body for letter in results.dead(10, 0)] == ["rubbish"]


def test_of_three_keepers_one_does_the_work():
    kit = Kit()
    swept = []
    real = kit.store.inner.list
    kit.store.inner.list = lambda *a, **k: (
        swept.append(threading.current_thread()),
        real(*a, **k),
    )[1]
    keepers = []
    for i in range(3):
        keeper = kit.keeper(sweep_every=0.2, sweep_older=0)
        keeper._holder = f"keeper-{i}"
        for chore in keeper._chores:
            chore.due = 0
        keepers.append(keeper)
    for keeper in keepers:
        keeper.start()
    wait_for(lambda: len(swept) >= 2)
    for keeper in keepers:
        keeper.stop()

    assert len({id(thread) for thread in swept}) == 1


def test_a_heartbeat_says_what_an_agent_judges_by():
    kit = Kit()
    Heartbeat(kit.ledger, "agent-1", kit.engines).beat()
    kit.engine.fail["signatures"] = [Unavailable("loading")]
    Heartbeat(kit.ledger, "agent-2", kit.engines).beat()

    one, two = kit.ledger.agents()
    assert one["agent"] == "agent-1"
    assert one["engines"]["clamav"]["digest"] == kit.engine.signatures().digest
    assert "loading" in two["engines"]["clamav"]["problem"]


def test_what_could_not_be_read_is_not_swept_again_and_again():
    kit = Kit(versioned=False)
    put(kit.store, "k", b"hello")
    kit.store.fail["read"] = [Denied("no", reason="s3:GetObject")]
    kit.store.fail["stat"] = [Denied("no", reason="s3:GetObject")]
    kit.announce("k")
    kit.run_until_idle(1)
    protected = kit.ledger.protected()["memory://in"]

    assert sweep(kit.ledger, kit.queue, kit.store, protected) == 0
    put(kit.store, "k", b"written since")
    assert sweep(kit.ledger, kit.queue, kit.store, protected) == 1
