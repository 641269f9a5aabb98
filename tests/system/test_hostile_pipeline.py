"""What an attacker sends, through everything from the event to the quarantine and the ledger."""

import hashlib
import io
import os
import socket
import stat
import time
import zipfile

import pytest

import hostile
from bucketward.engines.clamav import Limits, open_clamav
from bucketward.model import Reason, Verdict
from conftest import eicar
from pipeline_kit import Meddler, Pipeline

LIMITS = Limits(scan_size=100 << 20, files=10_000, threads=8)


@pytest.fixture(scope="module")
def clamav(tmp_path_factory):
    engine = open_clamav(
        "clamav:managed", data_dir=tmp_path_factory.mktemp("engine"), limits=LIMITS, poll=0.2
    )
    yield engine
    engine.close()


@pytest.fixture
def make(tmp_path, clamav, monkeypatch):
    """Return what makes a pipeline; ClamAV is its engine unless others are given."""
    monkeypatch.setattr("bucketward.agents.event._BACKOFF", 0.05)
    made = []

    def make(engines=None, **more):
        folder = tmp_path / f"house{len(made)}"
        made.append(Pipeline(folder, engines or {"clamav": clamav}, **more))
        return made[-1]

    yield make
    for pipeline in made:
        pipeline.close()


# -- what is in a file ---------------------------------------------------------------------------

POLICY = {"unscannable": {"encrypted": "move", "corrupt": "delete", "*": "keep"}}
KEPT, MOVED, DELETED = "kept", "moved", "deleted"


def _with_zip_behind(head):
    out = io.BytesIO(head)
    out.seek(0, io.SEEK_END)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("a", eicar())
    return out.getvalue()


INFECTED = {
    "plain": eicar,
    "in-ten-zips": lambda: hostile.nested(eicar(), 10),
    "tgz-in-zip-in-7z": lambda: hostile.seven_zip(
        hostile.zipped({"a.tgz": hostile.tarred(eicar(), "w:gz")})
    ),
    "attached-to-pdf": lambda: hostile.pdf(hostile.zipped({"a": eicar()})),
    "in-docx": lambda: hostile.ooxml(eicar()),
    "gif-and-zip": lambda: _with_zip_behind(b"GIF89a\1\0\1\0\0\0\0;"),
    "pdf-and-zip": lambda: _with_zip_behind(hostile.pdf(b"harmless")),
    "script-and-zip": lambda: _with_zip_behind(b"#!/bin/sh\nexit\n"),
    "tar-and-zip": lambda: _with_zip_behind(hostile.tarred(b"harmless")),
    "eicar-and-pdf": lambda: eicar() + hostile.pdf(b"harmless"),
    "html-and-script": lambda: b"<html><script>" + eicar() + b"</script></html>",
    "zip-with-path": lambda: hostile.zipped({"../../../../../etc/cron.d/x": eicar()}),
    "zip-twice-the-name": lambda: hostile.zipped({"a": b"fine"}) + hostile.zipped({"a": eicar()}),
}


@pytest.fixture(scope="module")
def rogues(tmp_path_factory, clamav):
    """Every hostile file at once, among clean ones; what came of each is what the tests ask."""
    pipeline = Pipeline(tmp_path_factory.mktemp("rogues") / "house", {"clamav": clamav}, policy=POLICY)
    bodies = {case.name: case.make(eicar()) for case in hostile.HOSTILE}
    bodies |= {name: make() for name, make in INFECTED.items()}
    bodies |= {f"clean-{n}": b"clean %d" % n for n in range(40)}
    for key, body in bodies.items():
        pipeline.upload(key, body)
    pipeline.sweep()
    results = pipeline.run(len(bodies), seconds=80)
    yield pipeline, bodies, results
    pipeline.close()


def _fate(pipeline, key, body):
    """Return what has become of the object, after making sure that it is whole or gone."""
    path = pipeline.drop / key
    is_jailed = body in pipeline.jailed()
    if not path.exists():
        return MOVED if is_jailed else DELETED
    assert path.read_bytes() == body
    assert not is_jailed
    return KEPT


@pytest.mark.parametrize("case", hostile.HOSTILE, ids=lambda case: case.name)
def test_a_hostile_file_is_treated_by_the_reason_for_which_it_is_unscannable(rogues, case):
    pipeline, bodies, results = rogues
    result = results[case.name]
    fate = _fate(pipeline, case.name, bodies[case.name])

    assert result.sha256 == hashlib.sha256(bodies[case.name]).hexdigest()
    if case.found and result.verdict is Verdict.INFECTED:
        assert fate == MOVED
        return
    assert result.verdict is Verdict.UNSCANNABLE
    assert set(result.reasons) & case.reasons
    if "corrupt" in result.reasons:
        assert fate == DELETED
    elif "encrypted" in result.reasons:
        assert fate == MOVED
    else:
        assert fate == KEPT
        assert pipeline.tags(case.name)["scan-result"] == "Unscannable"
        assert pipeline.verdict(case.name) is Verdict.UNSCANNABLE


@pytest.mark.parametrize("name", INFECTED)
def test_an_infection_in_disguise_is_found_and_lies_in_quarantine(rogues, name):
    pipeline, bodies, results = rogues

    assert results[name].verdict is Verdict.INFECTED
    assert _fate(pipeline, name, bodies[name]) == MOVED


def test_the_clean_files_among_them_are_clean(rogues):
    pipeline, bodies, results = rogues
    clean = [name for name in bodies if name.startswith("clean-")]

    assert {results[name].verdict for name in clean} == {Verdict.CLEAN}
    assert {_fate(pipeline, name, bodies[name]) for name in clean} == {KEPT}
    assert {pipeline.tags(name)["scan-result"] for name in clean} == {"Clean"}


def test_nothing_of_them_is_left_anywhere(rogues):
    pipeline, _, _ = rogues

    assert pipeline.spool.used == 0
    assert pipeline.dead() == []
    assert sorted(os.listdir(pipeline.drop / ".bucketward")) == []
    assert sorted(os.listdir(pipeline.folder)) == [
        "drop", "quarantine", "queue.db", "queue.db-shm", "queue.db-wal",
        *(["spool"] if (pipeline.folder / "spool").exists() else []),
        "state.db", "state.db-shm", "state.db-wal",
    ]  # fmt: skip


def test_by_default_what_cannot_be_scanned_is_kept(make):
    pipeline = make()
    bodies = {
        "locked": hostile.encrypted_zip(eicar(), aes=True),
        "broken": hostile.cut(hostile.zipped({"a": hostile.filler(eicar())})),
    }
    results = pipeline.scan(**bodies)

    assert results["locked"].reasons == ("encrypted",)
    assert results["broken"].reasons == ("corrupt",)
    assert pipeline.kept() == bodies
    assert pipeline.tags("locked")["message"].startswith("encrypted")
    assert pipeline.jailed() == []


def test_a_sparse_file_of_three_gigabytes_is_not_even_fetched(make):
    pipeline = make(policy=POLICY)
    path = pipeline.upload("huge", eicar())
    os.truncate(path, 3 << 30)
    pipeline.upload("small", b"small")
    pipeline.announce("huge", "small")
    started = time.monotonic()
    results = pipeline.run(2)

    assert time.monotonic() - started < 5
    assert (results["huge"].verdict, results["huge"].reasons) == (Verdict.UNSCANNABLE, ("too-large",))
    assert results["huge"].sha256 is None
    assert (pipeline.spool.taken, pipeline.spool.peak) == (1, len(b"small"))
    assert path.stat().st_size == 3 << 30
    assert pipeline.tags("huge")["scan-result"] == "Unscannable"
