"""A short fault run, and proof that its checker would notice.  `make faults` is the long one."""

import os
import sys
from dataclasses import replace

import pytest

from bucketward.events import encode
from bucketward.ledger import dump_result, load_result, verdict_id
from bucketward.model import Add, Delete, ObjectRef, Put, Record
from faults.run_faults import content, make_plan, run
from servers import need

SEED = int(os.environ.get("BUCKETWARD_FAULT_SEED", "3"))


@pytest.fixture(autouse=True)
def _clamd():
    need("clamd")


def test_nothing_is_lost_or_stuck_when_agents_are_killed_thirty_times(tmp_path):
    seen = []
    report = run(
        tmp_path, SEED, 30, 120, settle=90, out=sys.stdout, after=lambda r: seen.append(r.faults)
    )
    assert not report.problems, report.problems
    (faults,) = seen
    assert faults["agents killed"] == 30
    assert not faults["bugs in logs"]
    assert report.counts["in quarantine"] > 20
    assert report.counts["live and clean"] > 20


def test_a_seed_is_a_plan():
    assert make_plan(5, 40, 200) == make_plan(5, 40, 200) != make_plan(6, 40, 200)
    assert content(7, infected=False) == content(7, infected=False) != content(8, infected=False)


def test_the_checker_notices_what_is_wrong(tmp_path):
    report = run(tmp_path, 1, 1, 20, settle=60, after=spoil)
    assert not report.problems, report.problems


def spoil(running):
    """Do one wrong thing after another to a run that is right, and see each found."""
    clean = [each for each in running.truth.last().values() if not each.infected]
    moved = [each for each in running.truth.last().values() if each.infected]
    assert len(clean) > 4
    assert len(moved) > 1
    state, source, bucket = running.state, running.source_folder, running.source.bucket

    def expect(text):
        found = running.check().problems
        assert any(text in problem for problem in found), (text, found)

    info = running.source.stat(ObjectRef(bucket, clean[0].info.key))
    running.source.replace_tags(info, {"scan-result": "Infected", "other": "x"})
    expect("its tag says Infected")
    if clean[0].tags:
        expect("lost its owner's tag")
    state.commit([Delete("verdicts", verdict_id(bucket, clean[1].info.key, None))])
    expect("has no current verdict")
    (source / clean[2].info.key).write_bytes(b"something else")
    expect("has other bytes than written")
    (source / clean[3].info.key).unlink()
    expect("is lost")
    (source / moved[0].info.key).write_bytes(moved[0].body)
    expect("is in the source, but infected")
    running.quarantine.delete(
        running.quarantine.stat(ObjectRef(running.quarantine.bucket, moved[0].quarantine_key))
    )
    expect("is not in quarantine")
    stored = state.export("results").items[0]
    result = load_result(stored.body)
    text = dump_result(replace(result, action_state="pending"))
    state.commit([Put("results", Record(stored.key, text, indexes=stored.indexes))])
    expect("is pending")
    day = f"{result.scanned_at:%Y-%m-%d}"
    state.commit([Add("counters", f"{day}|{bucket}", {"Clean": 1})])
    expect("counters say")
    running.queue.send([encode([ObjectRef(bucket, "nothing")])])
    expect("the queue is not empty")
    running.ledger.bury("id", "not planted", "because")
    expect("a dead letter that nobody planted")
    running.truth.poison.add("planted")
    expect("a planted dead letter that is nowhere")
