from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from bucketward.errors import Changed, Unavailable
from bucketward.ledger import (
    RETRY_AFTER,
    TABLES,
    Due,
    Ledger,
    Protected,
    SettingsReader,
    dump_gone,
    dump_result,
    load_gone,
    load_result,
    object_id,
)
from bucketward.model import (
    EngineReport,
    Finding,
    Note,
    ObjectInfo,
    ObjectRef,
    ScanResult,
    Signatures,
    Verdict,
    scan_id,
)
from bucketward.states.memory import MemoryState

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


class Clock:
    def __init__(self):
        self.now = NOW

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(clock):
    return Ledger(
        MemoryState(TABLES),
        now=clock,
        notes=lambda result: [Due("log", Note(f"{result.id}.scanResult", "scanResult", "s", "{}"))],
    )


def result(key="a", verdict=Verdict.CLEAN, *, version="v1", cause="m1", **more):
    info = ObjectInfo("memory://b", key, 10, "etag", NOW, version_id=version)
    findings = ()
    coverage = ()
    if verdict in (Verdict.INFECTED, Verdict.SUSPICIOUS):
        findings = (Finding("clamav", "Eicar", "member\n1"),)
    if verdict in (Verdict.ERROR, Verdict.UNSCANNABLE):
        coverage = ("encrypted",)
    report = EngineReport(
        "clamav", verdict, coverage, findings, Signatures("d", "v", NOW, 3, True), 0.5, "said"
    )
    return ScanResult(
        id=scan_id(info, cause),
        object=info,
        verdict=verdict,
        scanned_at=NOW,
        reasons=coverage,
        reports=(report,),
        sha256="00",
        engines="e",
        **more,
    )


@pytest.mark.parametrize("verdict", [v for v in Verdict if v is not Verdict.INFECTED_ALLOWED])
def test_a_result_comes_back_as_it_was(ledger, verdict):
    one = result("k\udcff \n\x01é/..//", verdict, message="m", uploaded_by="u", tag_note="t")
    ledger.record([one])

    assert ledger.result(one.id) == one
    assert load_result(dump_result(one)) == one


def test_recording_twice_changes_nothing(ledger):
    one, two = result("a"), result("b")
    ledger.record([one])
    ledger.record([one, two])
    ledger.record([one, two])

    assert ledger.counters("memory://b", "2026-11-21") == {"Clean": 2, "Clean.bytes": 20}
    assert [due.note.id for due in ledger.due_notes()] == [
        f"{i}.scanResult" for i in sorted([one.id, two.id])
    ]


def test_a_pending_action_becomes_done_and_is_counted_once(ledger):
    pending = result("a", Verdict.INFECTED, action="move", action_state="pending")
    done = replace(pending, action_state="done")
    ledger.record([pending])
    assert ledger.verdicts([pending.object])[0].verdict is Verdict.INFECTED
    assert ledger.due_notes() == []
    ledger.record([done])
    ledger.record([pending])
    ledger.record([done])
    assert len(ledger.due_notes()) == 1

    assert ledger.result(done.id).action_state == "done"
    assert ledger.verdicts([pending.object]) == [None]
    assert ledger.counters("memory://b", "2026-11-21")["Infected"] == 1


def test_done_before_pending_is_counted_once_as_well(ledger):
    pending = result("a", Verdict.INFECTED, action="delete", action_state="pending")
    ledger.record([replace(pending, action_state="done")])
    ledger.record([pending])

    assert ledger.result(pending.id).action_state == "done"
    assert ledger.counters("memory://b", "2026-11-21")["Infected"] == 1


def test_what_vanished_with_a_pending_action_is_done(ledger):
    pending = result("a", Verdict.INFECTED, action="move", action_state="pending")
    ledger.record([pending])
    ledger.forget([ObjectRef("memory://b", "a", "v1")])

    assert ledger.result(pending.id).action_state == "done"
    assert ledger.verdicts([pending.object]) == [None]


def test_what_was_overwritten_with_a_pending_action_is_done_and_the_new_verdict_stays(ledger):
    old = result("a", Verdict.INFECTED, action="move", action_state="pending", version=None)
    new = result("a", cause="m2", version=None)
    new = replace(new, object=replace(new.object, etag="another"))
    ledger.record([old])
    ledger.record([new])
    ledger.replaced([load_gone(dump_gone(new.object.ref, holds="another"))])

    assert ledger.result(old.id).action_state == "done"
    assert ledger.verdicts([new.object])[0].verdict is Verdict.CLEAN
    assert ledger.counters("memory://b", "2026-11-21")["Infected"] == 1
    assert len(ledger.due_notes()) == 2


def test_what_is_pending_on_what_is_there_stays_pending(ledger):
    there = result("a", Verdict.INFECTED, action="move", action_state="pending", version=None)
    ledger.record([there])
    ledger.replaced([ObjectRef("memory://b", "a", etag=there.object.etag)])

    assert ledger.result(there.id).action_state == "pending"


def test_a_hundred_and_more_results_are_recorded_together(ledger):
    many = [result(f"k{i}", cause=f"m{i}") for i in range(257)]
    ledger.record(many)

    assert None not in ledger.verdicts([one.object for one in many])
    assert ledger.counters("memory://b", "2026-11-21")["Clean"] == 257


def test_one_object_twice_in_a_batch_is_no_conflict(ledger):
    ledger.record([result(cause="m1"), result(cause="m2", verdict=Verdict.INFECTED)])

    history = ledger.results("object", object_id("memory://b", "a")).items
    assert len(history) == 2


def test_clean_is_not_indexed_by_verdict(ledger):
    ledger.record([result("a"), result("b", Verdict.INFECTED)])

    assert ledger.results("verdict", "Clean|2026-11-21").items == []
    assert len(ledger.results("verdict", "Infected|2026-11-21").items) == 1
    assert len(ledger.results("bucket", "memory://b|2026-11-21").items) == 2


def test_keeping_problems_only_still_keeps_the_verdict_and_counts_once(clock):
    ledger = Ledger(MemoryState(TABLES), keep="problems", now=clock)
    ledger.record([result("a"), result("b", Verdict.INFECTED)])
    ledger.record([result("a"), result("b", Verdict.INFECTED)])

    assert ledger.result(result("a").id) is None
    assert ledger.result(result("b", Verdict.INFECTED).id) is not None
    assert ledger.verdicts([result("a").object])[0].verdict is Verdict.CLEAN
    assert ledger.counters("memory://b", "2026-11-21")["Clean"] == 1


def test_error_is_retried_later_each_time_and_not_for_ever(ledger, clock):
    for attempt, delay in enumerate(RETRY_AFTER):
        clock.now = NOW + timedelta(seconds=attempt * 100_000)
        one = replace(result(verdict=Verdict.ERROR, cause=f"m{attempt}"), scanned_at=clock.now)
        ledger.record([one])
        clock.now += timedelta(seconds=delay - 1)
        assert ledger.due_retries() == []
        clock.now += timedelta(seconds=2)
        (due,) = ledger.due_retries()
        assert (due.bucket, due.key, due.identity) == ("memory://b", "a", "v1")
        ledger.retried(due)
        assert ledger.due_retries() == []

    ledger.record([result(verdict=Verdict.ERROR, cause="last")])
    clock.now += timedelta(days=30)
    assert ledger.due_retries() == []


def test_forgetting_a_key_leaves_its_neighbours(ledger):
    ledger.record([result("a"), result("a", version="v2"), result("a\0"), result("ab")])
    ledger.forget([ObjectRef("memory://b", "a")])

    kept = ledger.verdicts(
        [result(k, version=v).object for k, v in [("a", "v1"), ("a", "v2"), ("ab", "v1")]]
    )
    assert [one is not None for one in kept] == [False, False, True]


def test_of_two_writers_of_settings_one_is_changed(ledger):
    assert ledger.settings() == ("{}", 0)
    assert ledger.change_settings('{"global": {}}', 0, "ann") == 1
    with pytest.raises(Changed):
        ledger.change_settings('{"global": {"infected": "keep"}}', 0, "bob")

    assert ledger.settings() == ('{"global": {}}', 1)


def test_a_bucket_is_protected_once(ledger):
    one = Protected("s3://b", "s3://b?region=x", "1", "x")

    assert ledger.protect(one) is True
    assert ledger.protect(replace(one, url="s3://b?region=y")) is False
    assert ledger.protected() == {"s3://b": one}
    ledger.unprotect("s3://b")
    assert ledger.protected() == {}


def test_a_lease_is_held_by_one_and_lapses(ledger, clock):
    assert ledger.lease("sweep", "one", 60)
    assert not ledger.lease("sweep", "two", 60)
    assert ledger.lease("sweep", "one", 60)
    clock.now += timedelta(seconds=61)
    assert ledger.lease("sweep", "two", 60)
    assert not ledger.lease("sweep", "one", 60)


def test_a_failed_note_comes_back_later(ledger, clock):
    ledger.record([result()])
    (due,) = ledger.due_notes()
    ledger.note_failed(due, 30)
    assert ledger.due_notes() == []
    clock.now += timedelta(seconds=31)
    (again,) = ledger.due_notes()

    assert again == replace(due, tries=1)
    ledger.noted([again])
    assert ledger.due_notes() == []


class FailingState(MemoryState):
    failing = False

    def get(self, table, keys):
        if self.failing:
            raise Unavailable("away")
        return super().get(table, keys)


def test_the_last_good_settings_are_used_while_the_ledger_is_away():
    state = FailingState(TABLES)
    ledger = Ledger(state)
    ledger.change_settings('{"global": {"infected": "delete"}}', 0, "ann")
    reader = SettingsReader(ledger, every=0)
    state.failing = True

    assert reader.current().policy(Protected("b", "b")).infected == "delete"
    state.failing = False
    ledger.change_settings('{"global": {"infected": "keep"}}', 1, "ann")
    assert reader.current().policy(Protected("b", "b")).infected == "keep"


def test_dead_letters_can_be_read_by_day(ledger):
    ledger.bury("m1", "body\n", "because")

    (one,) = ledger.dead("2026-11-21").items
    assert (one["id"], one["body"], one["reason"]) == ("m1", "body\n", "because")


def test_a_result_fits_whatever_the_engines_have_to_say():
    findings = tuple(Finding("yara", f"rule{i}" * 999, "m" * 99_999) for i in range(5_000))
    report = EngineReport("yara", Verdict.INFECTED, (), findings, message="x" * 999_999)
    one = replace(result("k", Verdict.INFECTED), reports=(report,) * 2, message="y" * 999_999)
    text = dump_result(one)

    assert len(text) < 256 * 1024
    assert load_result(text).verdict is Verdict.INFECTED
    assert load_result(text).findings[0].signature.startswith("rule0")


def test_an_unversioned_key_has_one_verdict_however_often_it_is_overwritten(ledger):
    many = []
    for i in range(20):
        one = result("k", version=None, cause=f"m{i}")
        many.append(replace(one, object=replace(one.object, etag=f"e{i}"), id=f"id{i}"))
    ledger.record(many)

    verdicts = ledger.verdicts([one.object for one in many])
    assert [verdict is not None for verdict in verdicts] == [False] * 19 + [True]
    assert len(ledger.state.export("verdicts").items) == 1
