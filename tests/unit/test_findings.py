from datetime import UTC, datetime, timedelta

import pytest

from bucketward.engines.memory import MemoryEngine
from bucketward.errors import Changed, NotFound, Unsupported
from bucketward.findings import delete, restore
from bucketward.ledger import Allow
from bucketward.model import ObjectRef, Verdict
from house_kit import MARK, Kit, get, listing, put


@pytest.fixture(params=[True, False], ids=["versioned", "unversioned"])
def kit(request):
    kit = Kit(versioned=request.param)
    put(kit.store, "x/evil", MARK, tags={"team": "blue"}, metadata={"who": "me"})
    kit.announce("x/evil")
    kit.run_until_idle(1)
    return kit


def bring_back(kit, **more):
    result = kit.ledger.result(kit.seen[0].id)
    return restore(
        result,
        ledger=kit.ledger,
        source=kit.store,
        quarantine=lambda: kit.quarantine,
        policy=kit.settings.current().policy(kit.ledger.protected()["memory://in"]),
        spool=kit.spool,
        who="ann",
        reason="ours",
        **more,
    )


def scan_again(kit, key="x/evil", results=2):
    kit.announce(key)
    kit.run_until_idle(results)
    return kit.seen[-1]


def test_a_false_positive_comes_back_and_stays(kit):
    back = bring_back(kit)
    again = scan_again(kit)

    assert (back.bucket, back.key) == ("memory://in", "x/evil")
    assert get(kit.store, back) == MARK
    assert listing(kit.quarantine) == []
    assert again.verdict is Verdict.INFECTED_ALLOWED
    assert again.findings[0].signature == "Test.Mark"
    tags = kit.store.tags(kit.store.stat(ObjectRef("memory://in", "x/evil")))
    assert (tags["scan-result"], tags["team"]) == ("InfectedAllowed", "blue")
    assert kit.store.stat(ObjectRef("memory://in", "x/evil")).metadata == {"who": "me"}
    assert kit.ledger.result(kit.seen[0].id).action_state == "restored"


def test_it_bears_the_tag_from_its_first_moment(kit):
    back = bring_back(kit)

    assert kit.store.tags(back)["scan-result"] == "InfectedAllowed"


def test_other_bytes_with_the_same_signature_are_not_allowed(kit):
    bring_back(kit)
    put(kit.store, "other", MARK + b"!")

    assert scan_again(kit, "other").verdict is Verdict.INFECTED


def test_the_same_bytes_elsewhere_are_allowed_unless_it_is_only_here(kit):
    bring_back(kit, only_here=True)
    put(kit.store, "copy", MARK)

    assert scan_again(kit, "copy").verdict is Verdict.INFECTED
    assert scan_again(kit, results=3).verdict is Verdict.INFECTED_ALLOWED


def test_an_entry_ends_and_can_be_ended(kit):
    bring_back(kit, days=1)
    assert scan_again(kit).verdict is Verdict.INFECTED_ALLOWED
    kit.ledger._now = lambda: datetime.now(UTC) + timedelta(days=2)
    assert scan_again(kit, results=3).verdict is Verdict.INFECTED


def test_one_finding_that_is_not_allowed_is_enough():
    kit = Kit(settings={"stop_at_first_hit": True})
    kit.engines["yara"] = MemoryEngine("yara", patterns={"Other": b"other"})
    put(kit.store, "k", MARK + b" and other")
    kit.announce("k")
    first = kit.run_until_idle(1)[0]
    assert [f.signature for f in first.findings] == ["Test.Mark"]
    entry = Allow(first.sha256, "Test.Mark", "ann", "ours", datetime.now(UTC))
    kit.ledger.allow(entry)
    put(kit.store, "k", MARK + b" and other")
    second = scan_again(kit, "k")

    assert second.verdict is Verdict.INFECTED
    assert {f.signature for f in second.findings} == {"Test.Mark", "Other"}
    kit.ledger.allow(Allow(first.sha256, "Other", "ann", "ours", datetime.now(UTC)))
    put(kit.store, "k", MARK + b" and other")
    assert scan_again(kit, "k", results=3).verdict is Verdict.INFECTED_ALLOWED


def test_allowed_is_not_enough_where_a_required_engine_saw_only_a_part():
    kit = Kit()
    put(kit.store, "k", b"PK\x03\x04" + MARK)
    kit.announce("k")
    first = kit.run_until_idle(1)[0]
    kit.ledger.allow(Allow(first.sha256, "Test.Mark", "ann", "ours", datetime.now(UTC)))
    put(kit.store, "k", b"PK\x03\x04" + MARK)
    second = scan_again(kit, "k")

    if first.reports[0].coverage:
        assert second.verdict is Verdict.UNSCANNABLE
    else:
        assert second.verdict is Verdict.INFECTED_ALLOWED


def test_a_place_that_is_taken_is_left_alone():
    kit = Kit(versioned=False)
    put(kit.store, "k", MARK)
    kit.announce("k")
    kit.run_until_idle(1)
    new = put(kit.store, "k", b"written since")
    with pytest.raises(Changed):
        bring_back(kit)

    assert get(kit.store, new) == b"written since"
    assert len(listing(kit.quarantine)) == 1


def test_what_somebody_changed_in_quarantine_does_not_come_back(kit):
    (kept,) = listing(kit.quarantine)
    put(kit.quarantine, kept.key, b"worse")
    with pytest.raises(Changed):
        bring_back(kit)

    assert listing(kit.store) == []


def test_deleting_for_good_is_for_good_and_may_be_done_twice(kit):
    for _ in range(2):
        result = kit.ledger.result(kit.seen[0].id)
        delete(result, ledger=kit.ledger, quarantine=lambda: kit.quarantine, who="ann")

    assert listing(kit.quarantine, versions=True) == []
    assert kit.ledger.result(kit.seen[0].id).action_state == "deleted"
    with pytest.raises((NotFound, Unsupported)):
        bring_back(kit)


def test_what_was_never_moved_cannot_come_back():
    kit = Kit(settings={"infected": "keep"})
    put(kit.store, "k", MARK)
    kit.announce("k")
    kit.run_until_idle(1)
    with pytest.raises(Unsupported):
        bring_back(kit)

    assert kit.ledger.allow_list().items == []
