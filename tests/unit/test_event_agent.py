import time

import pytest

from bucketward.engines.memory import MemoryEngine
from bucketward.errors import ConfigError, Denied, NotFound, Unavailable, Unsupported
from bucketward.events import encode
from bucketward.ledger import Protected, QueuedResults, object_id
from bucketward.model import ObjectRef, Verdict
from bucketward.queues.memory import MemoryQueue
from house_kit import MARK, Failing, Kit, away, get, listing, put, today, wait_for


@pytest.fixture(params=[True, False], ids=["versioned", "unversioned"])
def kit(request):
    return Kit(versioned=request.param)


def test_a_clean_object_is_tagged_recorded_and_acknowledged(kit):
    info = put(kit.store, "a b+c", b"hello", tags={"team": "blue"})
    kit.announce("a b+c")
    (result,) = kit.run_until_idle(1)

    assert result.verdict is Verdict.CLEAN
    tags = kit.store.tags(kit.store.stat(info.ref))
    assert tags["scan-result"] == "Clean"
    assert tags["team"] == "blue"
    assert kit.ledger.result(result.id).verdict is Verdict.CLEAN
    assert kit.ledger.verdicts([info])[0].verdict is Verdict.CLEAN
    assert kit.ledger.counters("memory://in", today()) == {"Clean": 1, "Clean.bytes": 5}
    assert (result.account, result.region) == ("acc", "reg")


def test_an_infected_object_is_moved_by_version(kit):
    info = put(kit.store, "x/evil", MARK, tags={"team": "blue"}, metadata={"who": "me"})
    kit.announce("x/evil", version_id=info.version_id, uploaded_by="eve")
    (result,) = kit.run_until_idle(1)

    assert result.verdict is Verdict.INFECTED
    assert listing(kit.store, versions=True) == []
    (moved,) = listing(kit.quarantine)
    assert (moved.bucket, moved.key) == result.moved_to
    assert get(kit.quarantine, moved) == MARK
    tags = kit.quarantine.tags(moved)
    assert (tags["scan-result"], tags["team"]) == ("Infected", "blue")
    assert kit.quarantine.stat(moved.ref).metadata == {"who": "me"}
    stored = kit.ledger.result(result.id)
    assert (stored.action, stored.action_state) == ("move", "done")
    assert stored.findings[0].signature == "Test.Mark"
    assert kit.ledger.verdicts([info]) == [None]


def test_the_newer_version_of_an_infected_one_stays():
    kit = Kit()
    evil = put(kit.store, "k", MARK)
    good = put(kit.store, "k", b"good")
    kit.announce("k", version_id=evil.version_id)
    kit.announce("k", version_id=good.version_id)
    kit.run_until_idle(2)

    (left,) = listing(kit.store, versions=True)
    assert left.version_id == good.version_id
    assert kit.store.tags(left)["scan-result"] == "Clean"


@pytest.mark.parametrize(("action", "left"), [("delete", 0), ("keep", 1)])
def test_the_policy_decides(action, left):
    kit = Kit(settings={"infected": action})
    put(kit.store, "k", MARK)
    kit.announce("k")
    (result,) = kit.run_until_idle(1)

    assert len(listing(kit.store)) == left
    assert listing(kit.quarantine) == []
    assert result.action == action
    if left:
        assert kit.store.tags(listing(kit.store)[0])["scan-result"] == "Infected"


def test_a_server_side_copy_that_is_refused_is_streamed(kit):
    put(kit.store, "k", MARK, headers={"content-type": "text/x"})
    kit.quarantine.fail["copy_from"] = [Denied("no", reason="s3:GetObject")]
    kit.announce("k")
    kit.run_until_idle(1)

    (moved,) = listing(kit.quarantine)
    assert get(kit.quarantine, moved) == MARK
    assert kit.quarantine.stat(moved.ref).headers["content-type"] == "text/x"


def test_a_quarantine_that_is_not_there_loses_no_verdict(kit):
    info = put(kit.store, "k", MARK)
    missing = NotFound("no such bucket")
    kit.quarantine.fail["copy_from"] = [missing]
    kit.announce("k")
    (result,) = kit.run_until_idle(1)

    assert (result.verdict, result.action_state) == (Verdict.INFECTED, "failed")
    assert "quarantine is not there" in result.message
    assert kit.store.tags(info)["scan-result"] == "Infected"
    assert kit.ledger.verdicts([info])[0].verdict is Verdict.INFECTED


def test_a_quarantine_that_cannot_be_opened_loses_no_verdict(kit):
    info = put(kit.store, "k", MARK)
    kit.quarantine.fail["copy_from"] = [ConfigError("no such region")]
    kit.announce("k")
    (result,) = kit.run_until_idle(1)

    assert (result.verdict, result.action_state) == (Verdict.INFECTED, "failed")
    assert kit.store.tags(info)["scan-result"] == "Infected"


def test_a_locked_object_is_reported_and_kept(kit):
    put(kit.store, "k", MARK)
    kit.store.fail["delete"] = [Denied("locked", reason="object-lock")]
    kit.announce("k")
    (result,) = kit.run_until_idle(1)

    assert result.action_state == "failed"
    assert "locked" in result.message
    assert len(listing(kit.store)) == 1
    assert kit.ledger.verdicts([result.object])[0].verdict is Verdict.INFECTED


def test_at_the_tag_limit_ours_are_dropped_and_the_result_is_recorded(kit):
    foreign = {f"t{i}": "x" for i in range(10)}
    info = put(kit.store, "k", b"hello", tags=foreign)
    kit.announce("k")
    (result,) = kit.run_until_idle(1)

    assert kit.store.tags(info) == foreign
    assert "no room" in result.tag_note
    assert kit.ledger.result(result.id).tag_note == result.tag_note


def test_tags_that_cannot_be_read_are_not_written(kit):
    info = put(kit.store, "k", b"hello", tags={"team": "blue"})
    kit.store.fail["tags"] = [Denied("no", reason="s3:GetObjectTagging")]
    kit.announce("k")
    (result,) = kit.run_until_idle(1)

    assert kit.store.inner.tags(info) == {"team": "blue"}
    assert "s3:GetObjectTagging" in result.tag_note or "no" in result.tag_note


def test_a_tag_writer_who_comes_between_is_merged_with(kit):
    info = put(kit.store, "k", b"hello", tags={"team": "blue"})
    reads = []

    def somebody_else(_info):
        reads.append(1)
        if len(reads) == 2:  # after our write, before we look whether it held
            kit.store.inner.replace_tags(info, {"team": "red", "cost": "1"})

    kit.store.fail["tags"] = somebody_else
    kit.announce("k")
    kit.run_until_idle(1)

    tags = kit.store.inner.tags(info)
    assert (tags["team"], tags["cost"], tags["scan-result"]) == ("red", "1", "Clean")


def test_an_object_overwritten_before_the_read_is_scanned_as_what_it_is_now():
    kit = Kit(versioned=False)
    old = put(kit.store, "k", b"hello")
    put(kit.store, "k", MARK)
    kit.announce("k", etag=old.etag)
    (result,) = kit.run_until_idle(1)

    assert result.verdict is Verdict.INFECTED
    assert listing(kit.store) == []


def test_an_object_overwritten_while_it_is_scanned_is_never_deleted():
    kit = Kit(versioned=False)
    put(kit.store, "k", MARK)
    overwritten = []

    def overwrite(_info):
        if not overwritten:
            overwritten.append(put(kit.store.inner, "k", b"new and good"))

    kit.store.fail["delete"] = overwrite
    kit.announce("k")
    kit.run_until_idle(2)

    (left,) = listing(kit.store)
    assert get(kit.store, left) == b"new and good"
    assert kit.store.tags(left)["scan-result"] == "Clean"
    assert [get(kit.quarantine, m) for m in listing(kit.quarantine)] == [MARK]


def test_our_tags_come_off_an_object_that_slid_in_under_them():
    kit = Kit(versioned=False)
    kit.store.inner.conditions = kit.store.inner.conditions - {"tag"}
    put(kit.store, "k", b"hello")
    replaced = []

    def slide_in(info, tags):
        if not replaced:
            replaced.append(put(kit.store.inner, "k", MARK, tags={**tags, "team": "blue"}))

    kit.store.fail["replace_tags"] = slide_in
    kit.announce("k")
    kit.run_until_idle(1)

    (moved,) = listing(kit.quarantine)
    tags = kit.quarantine.tags(moved)
    assert (tags["scan-result"], tags["team"]) == ("Infected", "blue")
    assert [r.verdict for r in kit.seen] == [Verdict.INFECTED]


def test_a_vanished_object_is_acknowledged_and_nothing_is_recorded(kit):
    kit.announce("nothing here")
    kit.run_until_idle()

    assert kit.seen == []
    assert kit.queue.inner.depth().waiting == 0


def test_a_body_that_is_no_event_is_buried_with_the_reason(kit):
    kit.queue.send(["{}", "rubbish \x00", encode([ObjectRef("memory://in", "gone")])])
    kit.run_until_idle()

    dead = kit.queue.dead(10, 0)
    assert len(dead) == 2
    assert all(letter.reason for letter in dead)


def test_an_event_for_a_foreign_bucket_is_refused_and_logged(kit, caplog):
    kit.queue.send([encode([ObjectRef("memory://other", "k")])])
    kit.run_until_idle()

    assert kit.seen == []
    assert "memory://other is not a protected bucket" in caplog.text


def test_a_bucket_that_was_protected_a_moment_ago_is_not_refused():
    kit = Kit()
    kit.ledger.unprotect("memory://in")
    stale = kit.settings.refresh()
    kit.ledger.protect(Protected("memory://in", "memory://in"))
    put(kit.store, "k", b"hello")
    kit.announce("k")
    with kit.agent(snapshot=lambda: stale, refresh=kit.settings.refresh):
        wait_for(lambda: kit.seen)

    assert kit.seen[0].verdict is Verdict.CLEAN


def test_many_records_in_one_message_are_all_done(kit):
    refs = []
    for i in range(30):
        put(kit.store, f"k{i}", MARK if i % 3 == 0 else b"hello")
        refs.append(ObjectRef("memory://in", f"k{i}"))
    kit.queue.send([encode(refs)])
    results = kit.run_until_idle(30)

    assert sum(r.verdict is Verdict.INFECTED for r in results) == 10
    assert len(listing(kit.store)) == 20


def test_duplicates_and_redeliveries_count_once_per_message(kit):
    put(kit.store, "k", b"hello")
    body = encode([ObjectRef("memory://in", "k")])
    kit.queue.send([body, body])
    kit.run_until_idle(2)

    assert kit.ledger.counters("memory://in", today())["Clean"] == 2
    assert len({r.id for r in kit.seen}) == 2


def test_an_engine_that_is_down_burns_no_deliveries():
    kit = Kit(max_deliveries=1)
    put(kit.store, "k", b"hello")
    kit.engine.fail["ping"] = [away() for _ in range(2)]
    kit.announce("k")
    (result,) = kit.run_until_idle(1, seconds=20)

    assert result.verdict is Verdict.CLEAN
    assert kit.queue.calls.count("nack") == 0


def test_an_optional_engine_that_is_broken_holds_up_nobody():
    kit = Kit()
    broken = Failing(MemoryEngine("yara", patterns={}))
    broken.fail["ping"] = lambda: (_ for _ in ()).throw(away())
    broken.fail["scan"] = [away()]
    kit.engines["yara"] = broken
    put(kit.store, "k", b"hello")
    kit.announce("k")
    (result,) = kit.run_until_idle(1)

    assert result.verdict is Verdict.CLEAN


def test_only_optional_engines_that_are_all_broken_are_waited_for():
    kit = Kit(settings={"engines": [{"engine": "clamav", "required": False}]})
    put(kit.store, "k", b"hello")
    kit.engine.fail["ping"] = [away(), away()]
    kit.announce("k")
    (result,) = kit.run_until_idle(1)

    assert result.verdict is Verdict.CLEAN


def test_an_engine_that_goes_down_in_the_middle_is_waited_for():
    kit = Kit(max_deliveries=1)
    put(kit.store, "k", b"hello")

    def break_down(*_args, **_kwargs):
        kit.engine.fail["scan"] = []
        kit.engine.fail["ping"] = [away(), away()]
        raise away()

    kit.engine.fail["scan"] = break_down
    kit.announce("k")
    (result,) = kit.run_until_idle(1, seconds=20)

    assert result.verdict is Verdict.CLEAN


def test_a_state_that_is_down_keeps_results_until_it_is_back():
    kit = Kit(max_deliveries=1)
    put(kit.store, "k", b"hello")
    kit.announce("k")
    kit.state.fail["commit"] = [away(), away()]
    (result,) = kit.run_until_idle(1, seconds=20)

    assert kit.ledger.result(result.id).verdict is Verdict.CLEAN
    assert kit.engine.calls.count("scan") == 1


def test_what_never_works_ends_as_error_among_the_dead_letters():
    kit = Kit(max_deliveries=2)
    put(kit.store, "k", b"hello")
    kit.store.fail["read"] = [Unavailable("500") for _ in range(99)]
    kit.queue.fail["nack"] = lambda messages, delay=0: None
    real = kit.queue.inner.nack
    kit.queue.inner.nack = lambda messages, delay=0: real(messages, 0)
    kit.announce("k")
    (result,) = kit.run_until_idle(1)

    assert result.verdict is Verdict.ERROR
    assert result.reasons == ("gave-up",)
    (letter,) = kit.queue.dead(10, 0)
    assert "500" in letter.reason
    assert kit.ledger.due_retries() == []


def test_the_last_delivery_runs_alone():
    kit = Kit(max_deliveries=2)
    put(kit.store, "k", b"hello")
    alone = []
    kit.engine.fail["scan"] = lambda *_args, alone=False: seen(alone)

    def seen(value):
        alone.append(value)
        if len(alone) == 1:
            raise Unavailable("died")

    real = kit.queue.inner.nack
    kit.queue.inner.nack = lambda messages, delay=0: real(messages, 0)
    kit.announce("k")
    kit.run_until_idle(1)

    assert alone == [False, True]


def test_a_death_between_record_and_deletion_is_made_good(kit):
    info = put(kit.store, "k", MARK)
    kit.store.fail["delete"] = [RuntimeError("as if we died here")]
    real = kit.queue.inner.nack
    kit.queue.inner.nack = lambda messages, delay=0: real(messages, 0)
    kit.announce("k", version_id=info.version_id)
    (result,) = kit.run_until_idle(1)

    assert listing(kit.store, versions=True) == []
    assert len(listing(kit.quarantine)) == 1
    assert kit.ledger.result(result.id).action_state == "done"
    assert kit.ledger.counters("memory://in", today())["Infected"] == 1


def test_a_death_between_deletion_and_record_is_made_good(kit):
    info = put(kit.store, "k", MARK)
    kit.announce("k", version_id=info.version_id)

    def die_after(_info):
        kit.store.fail["delete"] = []
        kit.store.inner.delete(info)
        raise RuntimeError("as if we died here")

    kit.store.fail["delete"] = die_after
    real = kit.queue.inner.nack
    kit.queue.inner.nack = lambda messages, delay=0: real(messages, 0)
    kit.run_until_idle()

    (stored,) = kit.ledger.results("verdict", f"Infected|{today()}").items
    assert stored.action_state == "done"
    assert kit.ledger.counters("memory://in", today())["Infected"] == 1
    assert kit.ledger.verdicts([info]) == [None]


def test_an_object_above_every_limit_is_not_fetched(kit):
    kit.engine.inner.max_size = 10
    info = put(kit.store, "k", b"x" * 11)
    kit.announce("k")
    (result,) = kit.run_until_idle(1)

    assert (result.verdict, result.reasons) == (Verdict.UNSCANNABLE, ("too-large",))
    assert result.sha256 is None
    assert kit.engine.calls.count("scan") == 0
    assert kit.store.tags(info)["scan-result"] == "Unscannable"


def test_what_the_lists_leave_out_is_never_clean():
    kit = Kit(settings={"skip": {"extensions": ["mp4"]}})
    put(kit.store, "film.MP4", MARK)
    kit.announce("film.MP4")
    (result,) = kit.run_until_idle(1)

    assert (result.verdict, result.reasons) == (Verdict.UNSCANNABLE, ("skipped",))
    assert len(listing(kit.store)) == 1
    assert kit.store.tags(listing(kit.store)[0]) == {}


@pytest.mark.parametrize(
    ("error", "verdict", "reason"),
    [
        (Denied("no", reason="s3:GetObject"), Verdict.ERROR, "denied"),
        (
            Unsupported("cold", reason="archived-storage-class"),
            Verdict.UNSCANNABLE,
            "archived-storage-class",
        ),
        (Unsupported("sse-c", reason="customer-key"), Verdict.UNSCANNABLE, "customer-key"),
        (Unsupported("odd"), Verdict.ERROR, "unsupported"),
    ],
)
def test_what_cannot_be_read_has_a_verdict_that_says_why(kit, error, verdict, reason):
    put(kit.store, "k", MARK)
    kit.store.fail["read"] = [error]
    kit.announce("k")
    (result,) = kit.run_until_idle(1)

    assert (result.verdict, result.reasons) == (verdict, (reason,))


def test_no_engine_is_never_clean():
    kit = Kit()
    kit.engines.clear()
    put(kit.store, "k", b"hello")
    kit.announce("k")
    (result,) = kit.run_until_idle(1)

    assert result.verdict is Verdict.ERROR


def test_a_body_that_ends_early_is_not_clean(kit):
    put(kit.store, "k", b"hello")
    inner = kit.store.inner.read

    def short(ref, accept, **more):
        import os
        from dataclasses import replace

        info = inner(ref, accept, **more)
        return replace(info, size=info.size + 1) if os else info

    kit.store.inner.read = short
    real = kit.queue.inner.nack
    kit.queue.inner.nack = lambda messages, delay=0: real(messages, 0)
    kit.announce("k")
    (result,) = kit.run_until_idle(1)

    assert result.verdict is Verdict.ERROR


def test_a_deletion_forgets_the_verdict(kit):
    info = put(kit.store, "k", b"hello")
    kit.announce("k")
    kit.run_until_idle(1)
    assert kit.ledger.verdicts([info])[0]
    kit.store.delete(info)
    kit.announce("k")
    kit.run_until_idle()

    assert kit.ledger.verdicts([info]) == [None]


def test_stopping_gives_back_what_was_not_begun():
    kit = Kit()
    for i in range(20):
        put(kit.store, f"k{i}", b"hello")
        kit.announce(f"k{i}")
    started = []
    kit.engine.fail["scan"] = lambda *_a, **_k: (started.append(1), time.sleep(0.3))
    with kit.agent(threads=1):
        wait_for(lambda: started)

    again = []
    while messages := kit.queue.inner.receive(10, 0):
        again += messages
    assert len(again) + len(kit.seen) == 20
    assert len(kit.seen) < 5


def test_a_lease_is_extended_while_work_runs(monkeypatch):
    monkeypatch.setattr("bucketward.agents.event._LEASE", 0.6)
    kit = Kit(lease=0.4)
    put(kit.store, "k", b"hello")
    kit.engine.fail["scan"] = lambda *_a, **_k: time.sleep(1.5)
    kit.announce("k")
    kit.run_until_idle(1)

    assert kit.engine.calls.count("scan") == 1


def test_a_full_spool_makes_objects_wait_not_fail():
    kit = Kit()
    kit.spool.__init__(memory=1000, disk=100, in_memory_below=1000)
    for i in range(20):
        put(kit.store, f"k{i}", b"x" * 900)
        kit.announce(f"k{i}")
    results = kit.run_until_idle(20)

    assert {r.verdict for r in results} == {Verdict.CLEAN}
    assert kit.spool.used == 0


def test_a_result_that_cannot_be_recorded_does_not_hold_up_the_others():
    kit = Kit(max_deliveries=2)
    for i in range(10):
        put(kit.store, f"k{i}", b"hello")
        kit.announce(f"k{i}")
    real = kit.queue.inner.nack
    kit.queue.inner.nack = lambda messages, delay=0: real(messages, 0)

    def refuse(changes):
        for change in changes:
            body = getattr(getattr(change, "record", None), "body", "")
            if '"k3"' in body and '"verdict": "Clean"' in body:
                raise Unsupported("too odd for this state")

    kit.state.fail["commit"] = refuse
    results = kit.run_until_idle(10, seconds=20)

    assert sum(r.verdict is Verdict.CLEAN for r in results) == 9
    assert [r.object.key for r in results if r.verdict is Verdict.ERROR] == ["k3"]


def test_results_may_travel_by_queue_and_end_in_the_ledger():
    kit = Kit()
    info = put(kit.store, "evil", MARK)
    put(kit.store, "good", b"hello")
    kit.announce("evil")
    kit.announce("good")
    kit.announce("gone")
    results = MemoryQueue(max_deliveries=3)
    with kit.agent(results=QueuedResults(results)):
        wait_for(lambda: len(kit.seen) == 2 and results.depth().waiting >= 4)
    assert kit.ledger.counters("memory://in", today()) == {}
    kit.keeper(results=results).drain_results()

    assert results.dead(10, 0) == []
    counters = kit.ledger.counters("memory://in", today())
    assert (counters["Clean"], counters["Infected"]) == (1, 1)
    (stored,) = kit.ledger.results("verdict", f"Infected|{today()}").items
    assert stored.action_state == "done"
    assert kit.ledger.verdicts([info]) == [None]


@pytest.mark.parametrize("is_queued", [False, True], ids=["directly", "through-a-queue"])
@pytest.mark.parametrize("is_pinned", [False, True], ids=["by-key", "by-etag"])
def test_what_was_pending_on_an_overwritten_object_is_ended(is_queued, is_pinned):
    kit = Kit(versioned=False)
    evil = put(kit.store, "k", MARK)

    def overwritten(*_args, **_more):
        kit.store.fail.clear()
        put(kit.store, "k", b"hello")
        raise away()

    kit.store.fail["delete"] = overwritten
    real = kit.queue.inner.nack
    kit.queue.inner.nack = lambda messages, delay=0: real(messages, 0)
    results = MemoryQueue()
    kit.announce("k", **({"etag": evil.etag} if is_pinned else {}))
    with kit.agent(**({"results": QueuedResults(results)} if is_queued else {})):
        wait_for(lambda: kit.seen)
    kit.keeper(results=results).drain_results()

    found = list(kit.ledger.results("object", object_id("memory://in", "k")).items)
    assert {(r.verdict, r.action_state) for r in found} == {
        (Verdict.INFECTED, "done"),
        (Verdict.CLEAN, "done"),
    }
    there = kit.store.stat(ObjectRef("memory://in", "k"))
    assert kit.ledger.verdicts([there])[0].verdict is Verdict.CLEAN
    assert kit.ledger.counters("memory://in", today())["Infected"] == 1
