"""What an attacker sends, through everything from the event to the quarantine and the ledger."""

import gzip
import hashlib
import io
import json
import os
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager

import psutil
import pytest

import hostile
from bucketward.engines.clamav import Limits, demo_signatures, open_clamav
from bucketward.engines.yara import open_yara
from bucketward.errors import ConfigError, NotFound, Unsupported
from bucketward.ledger import QueuedResults
from bucketward.model import ObjectRef, Verdict
from bucketward.queues.sqlite import SqliteQueue
from bucketward.spool import MIB
from conftest import eicar
from house_kit import put, wait_for
from pipeline_kit import Meddler, Peak, Pipeline, WatchedSpool

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
    monkeypatch.setattr("bucketward.agents.event._BACKOFF_MAX", 0.2)
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
    "zip-with-path": lambda: hostile.zipped({"../../../../../etc/cron.d/x": eicar()}),
}

HARMLESS_ZIP = hostile.zipped({"a": b"fine"})


def _hidden_member():
    """Return a zip with a member in front that its directory does not name."""
    whole = bytearray(HARMLESS_ZIP)
    first = hostile.zipped({"b": eicar()})
    first = first[: first.index(b"PK\1\2")]
    directory, end = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")
    whole[directory + 42 : directory + 46] = struct.pack("<I", len(first))
    whole[end + 16 : end + 20] = struct.pack("<I", len(first) + directory)
    return first + bytes(whole)


# What some reader unpacks and ClamAV does not see: at the very least it is not Clean.
SLY = {
    "zip-behind-zip": lambda: HARMLESS_ZIP + hostile.zipped({"a": eicar()}),
    "zip-before-zip": lambda: hostile.zipped({"a": eicar()}) + HARMLESS_ZIP,
    "zip-with-hidden-member": _hidden_member,
    "zip-behind-tar": lambda: hostile.tarred(b"fine") + hostile.zipped({"a": eicar()}),
    "zip-behind-gzip": lambda: gzip.compress(b"fine") + hostile.zipped({"a": eicar()}),
}


@pytest.fixture(scope="module")
def rogues(tmp_path_factory, clamav):
    """Every hostile file at once, among clean ones; what came of each is what the tests ask."""
    pipeline = Pipeline(
        tmp_path_factory.mktemp("rogues") / "house", {"clamav": clamav}, policy=POLICY
    )
    bodies = {case.name: case.make(eicar()) for case in hostile.HOSTILE}
    bodies |= {name: make() for name, make in (INFECTED | SLY).items()}
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


@pytest.mark.parametrize("name", SLY)
def test_what_two_readers_read_differently_is_not_clean(rogues, name):
    pipeline, bodies, results = rogues

    assert results[name].reasons == ("container-unopened",)
    assert _fate(pipeline, name, bodies[name]) == KEPT


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
    assert (results["huge"].verdict, results["huge"].reasons) == (
        Verdict.UNSCANNABLE,
        ("too-large",),
    )
    assert results["huge"].sha256 is None
    assert (pipeline.spool.taken, pipeline.spool.peak) == (1, len(b"small"))
    assert path.stat().st_size == 3 << 30
    assert pipeline.tags("huge")["scan-result"] == "Unscannable"


# -- names -----------------------------------------------------------------------------------------

NAMES = (
    "../../etc/passwd",
    "/etc/passwd",
    "//x//",
    "./.",
    "x/..",
    ".bucketward/x",
    "a/.bucketward/x",
    "x" * 255,
    "y" * 1024,
    "z" * 256 + "/" + "é" * 200,
    "\U0001f480" * 256,
    "new\nline",
    "tab\tand\x1b[2Jescape\x7f",
    "right\u202eto-left\u2066",
    "-rf *; $(reboot) `id` 'quoted\"",
    "back\\slash",
    "%2e%2e%2f",
    "percent%",
    "question?mark#hash",
    "\U0010fe00x",
    "\u2028separator",
    "e\u0301 and \u00e9",
    "file:///etc/passwd",
    "con.",
    " ",
)
RAW = (b"not-utf8-\xff\xfe", b"\x80/\xc3\x28/eicar", b"surrogate-\xed\xa0\x80", b"\x01\x02\x03")


def _everything_but(folder, *skipped):
    return {
        os.path.join(root, name): os.lstat(os.path.join(root, name)).st_size
        for root, _, names in os.walk(folder)
        for name in names
        if not any(root.startswith(str(skip)) for skip in skipped)
    }


def test_no_name_leads_out_of_its_bucket_and_each_object_is_treated_by_its_own(make):
    pipeline = make()
    around = _everything_but("/etc")
    mine = _everything_but(pipeline.folder, pipeline.drop, pipeline.jail)
    bodies = {}
    for n, key in enumerate(NAMES):
        put(pipeline.store, key, eicar() + b"%d" % n if n % 2 else b"clean %d" % n)
    for n, name in enumerate(RAW):
        pipeline.upload(name, eicar() + b"raw %d" % n)
    bodies = pipeline.kept()
    assert pipeline.sweep() == len(bodies) == len(NAMES) + len(RAW)
    results = pipeline.run(len(bodies))

    assert set(results) == set(bodies) >= set(NAMES)
    for key, body in bodies.items():
        is_bad = body.startswith(eicar())
        assert results[key].verdict is (Verdict.INFECTED if is_bad else Verdict.CLEAN), key
    infected = sorted(body for body in bodies.values() if body.startswith(eicar()))
    assert sorted(pipeline.jailed()) == infected
    assert pipeline.kept() == {k: b for k, b in bodies.items() if b not in infected}
    assert _everything_but("/etc") == around
    after = _everything_but(pipeline.folder, pipeline.drop, pipeline.jail)
    assert set(after) == set(mine)
    for key, result in results.items():
        assert pipeline.ledger.result(result.id).object.key == key


def test_events_of_names_that_cannot_be_are_work_for_nobody(make):
    pipeline = make()
    secret = pipeline.folder / "secret"
    secret.write_bytes(eicar())
    pipeline.announce(
        "../secret", str(secret), "x/../../secret", "nul\0byte", "lone\ud800surrogate",
        "k" * 100_000, ".bucketward/../../secret", "/", "drop/../../secret",
    )  # fmt: skip
    pipeline.upload("fine", b"fine")
    pipeline.announce("fine")
    results = pipeline.run(1)

    assert set(results) == {"fine"}
    assert secret.read_bytes() == eicar()
    assert pipeline.jailed() == []
    assert pipeline.dead() == []


def test_pipes_devices_sockets_and_links_hold_nobody_up(make):
    pipeline = make()
    os.mkfifo(pipeline.drop / "pipe")
    (pipeline.drop / "link").symlink_to("/dev/zero")
    (pipeline.drop / "proc").symlink_to("/proc/self/mem")
    (pipeline.drop / "loop").symlink_to("loop")
    (pipeline.drop / "folder").symlink_to(pipeline.folder)
    special = ["pipe", "link", "proc", "loop", "folder/state.db", "socket"]
    if os.geteuid() == 0:
        os.mknod(pipeline.drop / "zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
        os.mknod(pipeline.drop / "disk", 0o600 | stat.S_IFBLK, os.makedev(7, 0))
        special += ["zero", "disk"]
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(pipeline.drop, os.O_PATH)
        listener.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
        pipeline.upload("bad", eicar())
        before = sorted(os.listdir(pipeline.drop))
        assert pipeline.sweep() == 1
        pipeline.announce(*special)
        results = pipeline.run(1, seconds=10)

    assert {key: result.verdict for key, result in results.items()} == {"bad": Verdict.INFECTED}
    assert set(before) - set(os.listdir(pipeline.drop)) == {"bad"}
    assert pipeline.dead() == []


def test_thousands_of_tiny_files_all_get_their_verdict(make):
    pipeline = make(threads=16)
    for n in range(2000):
        pipeline.upload(f"{n % 7}/{n}", eicar() if n % 100 == 0 else b"%d" % n)
    assert pipeline.sweep() == 2000
    results = pipeline.run(2000)

    bad = {key for key, result in results.items() if result.verdict is Verdict.INFECTED}
    assert bad == {f"{n % 7}/{n}" for n in range(0, 2000, 100)}
    assert sum(result.verdict is Verdict.CLEAN for result in results.values()) == 1980
    assert len(pipeline.jailed()) == 20
    assert pipeline.sweep() == 0


def test_a_name_too_long_for_any_message_does_not_keep_the_sweep_from_the_rest(make):
    """Whoever may write into a directory can make paths that no queue can carry."""
    pipeline = make()
    folder = os.open(pipeline.drop, os.O_PATH)
    for _ in range(100):
        os.mkdir(b"\xff" * 255, dir_fd=folder)
        below = os.open(b"\xff" * 255, os.O_PATH, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(os.open(b"\xff" * 255, os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)
    pipeline.upload("zz", eicar())
    pipeline.upload("aa", b"clean")
    pipeline.sweep()
    results = pipeline.run(2)

    assert results["zz"].verdict is Verdict.INFECTED
    assert results["aa"].verdict is Verdict.CLEAN


# -- what changes under our hands ------------------------------------------------------------------

NEW = b"somebody's new work, not infected"


def _replaced(path, body):
    path.with_name("upload.tmp").write_bytes(body)
    path.with_name("upload.tmp").replace(path)


def _in_place(path, body):
    path.write_bytes(body)


def _in_place_with_old_times(path, body):
    before = path.stat()
    with path.open("r+b") as file:
        file.write(body.ljust(before.st_size)[: before.st_size])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = (_replaced, _in_place, _in_place_with_old_times)


@pytest.mark.parametrize("action", ["move", "delete", "keep"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_replaces_an_infected_file_after_the_scan_is_never_touched(
    make, clamav, change, action
):
    changed = []

    def meddle(_):
        if not changed:
            changed.append(pipeline.drop / "doc")
            change(changed[0], NEW.ljust(100))

    pipeline = make({"clamav": Meddler(clamav, after=meddle)}, policy={"infected": action})
    path = pipeline.upload("doc", eicar().ljust(100))
    pipeline.announce("doc")
    results = pipeline.run(1)

    assert changed
    assert path.read_bytes() == NEW.ljust(100)
    assert pipeline.tags("doc")["scan-result"] == "Clean"
    assert "virus-name" not in pipeline.tags("doc")
    assert results["doc"].verdict is Verdict.CLEAN
    assert pipeline.verdict("doc") is Verdict.CLEAN
    # A copy of what was scanned may have been made; of the new bytes never.
    assert set(pipeline.jailed()) <= {eicar().ljust(100)}


@pytest.mark.parametrize("change", CHANGES)
def test_what_replaces_a_clean_file_after_the_scan_is_not_called_clean(make, clamav, change):
    changed = []

    def meddle(_):
        if not changed:
            changed.append(pipeline.drop / "doc")
            change(changed[0], eicar().ljust(100))

    pipeline = make({"clamav": Meddler(clamav, after=meddle)})
    path = pipeline.upload("doc", NEW.ljust(100))
    pipeline.announce("doc")
    results = pipeline.run(1)

    assert results["doc"].verdict is Verdict.INFECTED
    assert not path.exists()
    assert pipeline.jailed() == [eicar().ljust(100)]
    assert not any(result.verdict is Verdict.CLEAN for result in pipeline.seen)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_replaced_after_its_announcement_is_judged_as_what_it_is(make, change):
    pipeline = make()
    path = pipeline.upload("doc", NEW.ljust(100))
    other = pipeline.upload("other", eicar().ljust(100))
    for key in ("doc", "other"):
        info = pipeline.store.stat(ObjectRef(pipeline.store.bucket, key))
        pipeline.announce(key, etag=info.etag, size=info.size)
    change(path, eicar().ljust(100))
    change(other, NEW.ljust(100))
    results = pipeline.run(2)

    assert results["doc"].verdict is Verdict.INFECTED
    assert results["other"].verdict is Verdict.CLEAN
    assert not path.exists()
    assert other.read_bytes() == NEW.ljust(100)


@pytest.mark.parametrize("what", ["gone", "link", "folder", "pipe"])
def test_what_is_no_file_any_more_when_it_is_to_be_moved_stays_as_it_is(make, clamav, what):
    outside = []

    def meddle(_):
        path = pipeline.drop / "doc"
        if outside or not path.is_file():
            return
        outside.append(pipeline.folder / "outside")
        outside[0].write_bytes(eicar())
        path.unlink()
        if what == "link":
            path.symlink_to(outside[0])
        elif what == "folder":
            path.mkdir()
            (path / "inner").write_bytes(eicar())
        elif what == "pipe":
            os.mkfifo(path)

    pipeline = make({"clamav": Meddler(clamav, after=meddle)})
    path = pipeline.upload("doc", eicar())
    pipeline.announce("doc")
    with pipeline.agent() as agent:
        wait_for(lambda: outside and pipeline.is_done(agent), 20)

    assert outside[0].read_bytes() == eicar()
    assert os.path.lexists(path) is (what != "gone")
    if what == "folder":
        assert (path / "inner").read_bytes() == eicar()
    assert pipeline.dead() == []


def test_a_directory_swapped_for_a_link_in_mid_run_leads_nobody_outside(make, clamav):
    swapped = []

    def meddle(_):
        if not swapped:
            swapped.append(True)
            (pipeline.drop / "sub").rename(pipeline.folder / "taken")
            (pipeline.drop / "sub").symlink_to(pipeline.folder / "outside")

    pipeline = make({"clamav": Meddler(clamav, after=meddle)}, threads=1)
    (pipeline.folder / "outside").mkdir()
    for n in range(20):
        pipeline.upload(f"sub/{n}", eicar() + b"%d" % n)
        (pipeline.folder / "outside" / str(n)).write_bytes(eicar() + b"outside %d" % n)
    pipeline.upload("last", eicar() + b"last")
    pipeline.sweep()
    pipeline.announce("last")
    with pipeline.agent() as agent:
        wait_for(lambda: swapped and pipeline.is_done(agent), 20)

    assert len(os.listdir(pipeline.folder / "outside")) == 20
    assert all(b"outside" in p.read_bytes() for p in (pipeline.folder / "outside").iterdir())
    assert not any(b"outside" in body for body in pipeline.jailed())
    assert not (pipeline.drop / "last").exists()


def test_a_bucket_whose_own_directory_was_swapped_is_not_followed(make):
    pipeline = make()
    pipeline.upload("doc", eicar())
    pipeline.announce("doc")
    pipeline.drop.rename(pipeline.folder / "moved-away")
    (pipeline.folder / "outside").mkdir()
    (pipeline.folder / "outside" / "doc").write_bytes(eicar() + b"outside")
    pipeline.drop.symlink_to(pipeline.folder / "outside")
    pipeline.run(1)

    assert (pipeline.folder / "outside" / "doc").read_bytes() == eicar() + b"outside"
    assert pipeline.jailed() == [eicar()]
    with pytest.raises(NotFound, match="another directory"):
        pipeline.store.ping()


def test_a_file_that_never_rests_holds_nobody_up_and_is_judged_when_it_does(make, clamav):
    still = threading.Event()

    def meddle(_):
        if not still.is_set():
            with (pipeline.drop / "restless").open("ab") as file:
                file.write(b"x")

    pipeline = make({"clamav": Meddler(clamav, before=meddle, after=meddle)}, threads=4)
    pipeline.upload("restless", eicar())
    pipeline.announce("restless")
    for n in range(100):
        pipeline.upload(f"{n}", b"%d" % n)
    pipeline.announce(*map(str, range(100)))
    with pipeline.agent() as agent:
        wait_for(lambda: len(pipeline.seen) >= 100, 20)
        assert "restless" not in {result.object.key for result in pipeline.seen}
        assert (pipeline.drop / "restless").exists()
        still.set()
        wait_for(lambda: len(pipeline.seen) == 101 and pipeline.is_done(agent), 20)

    assert pipeline.seen[-1].verdict is Verdict.INFECTED
    assert not (pipeline.drop / "restless").exists()


# -- what is in a message --------------------------------------------------------------------------


def _record(bucket="somewhere-else", key="k", **more):
    return {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "eventName": "ObjectCreated:Put",
        "s3": {"bucket": {"name": bucket}, "object": {"key": key, **more}},
    }


def _own(bucket, *keys, **more):
    refs = [{"bucket": bucket, "key": key, **more} for key in keys]
    return json.dumps({"bucketward": 1, "refs": refs}, ensure_ascii=False)


# Bodies that nobody can understand: each is buried with a word on why.
RUBBISH = {
    "empty": ("", "not JSON"),
    "noise": ("\x01\x02\ufffd" * 1000, "not JSON"),
    "nul": ("\0" * 1000, "not JSON"),
    "as-long-as-may-be": ("\0" * (256 << 10), "not JSON"),
    "as-long-in-emoji": ("\U0001f480" * (64 << 10), "not JSON"),
    "deep-lists": ("[" * 200_000, "too deep"),
    "deep-tables": ('{"Records":' * 20_000 + "1" + "}" * 20_000, "too deep"),
    "number": ("1", "not an object"),
    "long-number": ('{"Records": %s}' % ("9" * 100_000), "not JSON"),
    "nan": ('{"Records": NaN}', "no list"),
    "other": ('{"hello": "world"}', "no S3"),
    "records-of-rubbish": (json.dumps({"Records": [1, None, "x", [], {}]}), "record 0"),
    "key-of-nothing": (json.dumps({"Records": [_record(key="")]}), "key is missing"),
    "key-too-long": (json.dumps({"Records": [_record(key="\U0001f480" * 257)]}), "1028 bytes"),
    "key-half-encoded": (json.dumps({"Records": [_record(key="a%zz")]}), "percent sign"),
    "key-not-utf8": (json.dumps({"Records": [_record(key="%ff%fe")]}), "not UTF-8"),
    "key-lone-surrogate": (json.dumps({"Records": [_record(key="a\ud800")]}), "not UTF-8"),
    "bucket-is-a-path": (json.dumps({"Records": [_record(bucket="../../x")]}), "no bucket name"),
    "version-of-newlines": (json.dumps({"Records": [_record(versionId="a\nb")]}), "no version id"),
    "sns-in-sns-in-sns": (
        json.dumps({"Type": "Notification", "Message": json.dumps({"Type": "Notification", "Message": json.dumps({"Type": "Notification", "Message": "{}"})})}),
        "wrapped",
    ),
    "sns-without-text": (json.dumps({"Type": "Notification", "Message": {"a": 1}}), "without a text"),
    "bridge-of-another": (json.dumps({"detail-type": "Object Created", "source": "evil"}), "aws.s3"),
    "bridge-without-detail": (json.dumps({"detail-type": "Object Created", "source": "aws.s3"}), "detail"),
    "own-of-tomorrow": ('{"bucketward": 2, "refs": []}', "another version"),
    "own-of-rubbish": ('{"bucketward": 1, "refs": [1, {"bucket": 1}]}', "ref 0"),
}  # fmt: skip


def test_rubbish_in_messages_is_buried_with_a_reason_and_the_rest_goes_on(make):
    pipeline = make()
    pipeline.upload("bad", eicar())
    for body, _ in RUBBISH.values():
        pipeline.queue.send([body])
    pipeline.announce("bad")
    results = pipeline.run(1)
    letters = pipeline.dead()

    assert results["bad"].verdict is Verdict.INFECTED
    assert len(pipeline.seen) == 1
    assert len(letters) == len(RUBBISH)
    for body, why in RUBBISH.values():
        (reason,) = {
            letter["reason"] for letter in letters
            if letter["body"] == body or (len(body) > 30_000 and body.startswith(letter["body"][:1000]) and len(letter["body"]) > 1000)
        }  # fmt: skip
        assert why in reason, reason
    assert pipeline.queue.dead(10, 0) == []


@pytest.mark.parametrize("body", ["x" * (1 << 20), "lone\ud800"])
def test_a_message_that_no_queue_takes_is_refused_where_it_is_sent(make, body):
    pipeline = make()
    with pytest.raises(Unsupported):
        pipeline.queue.send([body])

    assert pipeline.queue.depth().waiting == 0


def test_events_of_buckets_that_are_not_ours_are_refused_without_a_look(make, caplog):
    pipeline = make()
    outside = pipeline.folder / "outside"
    outside.mkdir()
    (outside / "doc").write_bytes(eicar())
    pipeline.upload("doc", eicar() + b"mine")
    ours = pipeline.store.bucket
    for bucket in (f"file://{outside}", f"{ours}/../outside", f"{ours}/", "file:///", "", "s3://x"):
        pipeline.queue.send([_own(bucket, "doc")])
    pipeline.queue.send([json.dumps({"Records": [_record() for _ in range(800)]})])
    pipeline.queue.send([_own(ours, "doc")])
    results = pipeline.run(1)

    assert list(results) == ["doc"]
    assert (outside / "doc").read_bytes() == eicar()
    assert pipeline.jailed() == [eicar() + b"mine"]
    assert "is not a protected bucket" in caplog.text


def test_thousands_of_objects_in_one_message_are_all_judged(make):
    pipeline = make()
    for n in range(1000):
        pipeline.upload(f"{n}", eicar() if n == 500 else b"%d" % n)
    bucket = pipeline.store.bucket
    keys = [f"{n % 1000}" for n in range(1500)] + [f"no{n}" for n in range(300)]
    body = _own(bucket, *keys)
    assert len(body) < 256 << 10
    pipeline.queue.send([body])
    pipeline.run(1499)

    assert {result.object.key for result in pipeline.seen} == {f"{n}" for n in range(1000)}
    assert [r.object.key for r in pipeline.seen if r.verdict is Verdict.INFECTED] == ["500"]
    day = pipeline.seen[0].scanned_at.strftime("%Y-%m-%d")
    assert pipeline.ledger.counters(bucket, day)["Clean"] == 999
    assert pipeline.dead() == []


@pytest.mark.parametrize(
    "more",
    [
        {"uploaded_by": "\U0001f480" * 60_000},
        {"uploaded_by": ["7aCA" * 60_000]},
        {"sequencer": "\U0001f480" * 60_000},
        {"size": -1},
        {"size": 2**63},
        {"event_at": "9999-12-31T23:59:59-14:00"},
        {"etag": ""},
    ],
    ids=["uploader", "surrogates", "sequencer", "negative", "huge", "late", "no-etag"],
)
def test_a_claim_that_is_out_of_all_bounds_stops_nobody(make, more):
    """Ours are the messages of our own form, but whoever may send to the queue can forge them."""
    pipeline = make()
    pipeline.upload("doc", eicar())
    pipeline.upload("next", b"clean")
    pipeline.queue.send([_own(pipeline.store.bucket, "doc", **more)])
    pipeline.announce("next")
    results = pipeline.run(2, seconds=15)

    assert results["doc"].verdict is Verdict.INFECTED
    assert results["next"].verdict is Verdict.CLEAN
    assert pipeline.jailed() == [eicar()]


def test_a_result_that_cannot_be_recorded_is_buried_and_stops_nobody(make):
    """A path that just fits into a message; with all that was found out it is too much."""
    pipeline = make()
    room = (256 << 10) - len(_own(pipeline.store.bucket, "", size=5)) - 100
    pieces = room // 12 // 250
    folder = os.open(pipeline.drop, os.O_PATH)
    for _ in range(pieces):
        os.mkdir(b"\xff" * 250, dir_fd=folder)
        below = os.open(b"\xff" * 250, os.O_PATH, dir_fd=folder)
        os.close(folder)
        folder = below
    name = b"\xff" * ((room - pieces * (250 * 12 + 1)) // 12)
    fd = os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=folder)
    os.write(fd, b"clean")
    os.close(fd)
    os.close(folder)
    pipeline.upload("next", b"clean")
    assert pipeline.sweep() == 2
    pipeline.run(1, seconds=15)

    assert [result.object.key for result in pipeline.seen] == ["next"]
    assert len(wait_for(pipeline.dead)) == 1
    assert pipeline.queue.dead(10, 0) == []


def test_results_from_elsewhere_that_are_rubbish_stop_no_others(make):
    pipeline = make()
    pipeline.upload("doc", b"clean")
    sent = SqliteQueue(pipeline.folder / "results.db")
    for body in (
        "", "[]", "1", "{}", '{"gone": 1}', '{"gone": [1, 2, 3]}', '{"object": 1}', "[" * 100_000,
        '{"gone": [null, null, null]}',
        '{"object": {"modified_at": 1}, "moved_to": null}',
    ):  # fmt: skip
        sent.send([body])
    pipeline.announce("doc")
    with pipeline.agent(results=QueuedResults(sent)) as agent:
        wait_for(lambda: pipeline.seen and pipeline.is_done(agent), 20)
    pipeline.keeper(results=sent).drain_results()

    assert pipeline.verdict("doc") is Verdict.CLEAN
    assert len(sent.dead(100, 0)) == 10
    assert sent.depth().waiting == sent.depth().in_flight == 0
    sent.close()


# -- engines that hang, lie and die ----------------------------------------------------------------


def _daemon(engine):
    return psutil.Process(engine._managed.clamd.wait(time.monotonic() + 20).pid)


def test_an_engine_that_hangs_costs_the_late_file_its_verdict_and_no_other(make, clamav):
    pipeline = make(buckets={"hurried": {"deadline": 1.0}})
    pipeline.upload("late", b"late", folder="hurried")
    for n in range(30):
        pipeline.upload(f"{n}", eicar() if n % 3 == 0 else b"%d" % n)
    hung = _daemon(clamav)
    with pipeline.agent() as agent:
        pipeline.upload("warm", b"warm")
        pipeline.announce("warm")
        wait_for(lambda: pipeline.seen)
        hung.send_signal(signal.SIGSTOP)
        pipeline.announce("late", folder="hurried")
        pipeline.announce(*(f"{n}" for n in range(30)))
        wait_for(lambda: len(pipeline.seen) == 32 and pipeline.is_done(agent), 30)
    results = {result.object.key: result for result in pipeline.seen}

    assert (results["late"].verdict, results["late"].reasons) == (
        Verdict.UNSCANNABLE,
        ("timed-out",),
    )
    assert (pipeline.folder / "hurried" / "late").read_bytes() == b"late"
    for n in range(30):
        expected = Verdict.INFECTED if n % 3 == 0 else Verdict.CLEAN
        assert results[f"{n}"].verdict is expected
    assert not hung.is_running()
    assert _daemon(clamav).pid != hung.pid
    assert pipeline.dead() == []


def test_an_engine_that_hangs_before_we_begin_is_started_anew(make, clamav):
    pipeline = make()
    hung = _daemon(clamav)
    hung.send_signal(signal.SIGSTOP)
    results = pipeline.scan(doc=eicar())

    assert results["doc"].verdict is Verdict.INFECTED
    assert not hung.is_running()


def test_an_engine_that_is_killed_over_and_over_loses_nothing(make, clamav):
    pipeline = make()
    for n in range(300):
        pipeline.upload(f"{n}", eicar() if n % 10 == 0 else b"%d" % n)
    pipeline.sweep()
    with pipeline.agent() as agent:
        for _ in range(3):
            _daemon(clamav).kill()
            time.sleep(0.2)
        wait_for(lambda: len(pipeline.seen) >= 300 and pipeline.is_done(agent), 40)

    verdicts = {result.object.key: result.verdict for result in pipeline.seen}
    assert verdicts == {
        f"{n}": Verdict.INFECTED if n % 10 == 0 else Verdict.CLEAN for n in range(300)
    }
    assert pipeline.dead() == []


class Impostor:
    """Listens where a clamd should, passes its examination, then answers as `say` does."""

    def __init__(self, path):
        self.path = str(path)
        self.say = None
        self.asked = 0
        self._stopping = threading.Event()
        self._thread = None

    def start(self):
        self._stopping.clear()
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self.path)
        self._server.listen(50)
        self._server.settimeout(0.05)
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def stop(self):
        self._stopping.set()
        self._thread.join()
        self._server.close()
        os.unlink(self.path)

    def _accept(self):
        while not self._stopping.is_set():
            try:
                connection, _ = self._server.accept()
            except OSError:
                continue
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection):
        with connection:
            connection.settimeout(10)
            try:
                if connection.recv(11, socket.MSG_PEEK).startswith(b"zVERSION"):
                    connection.sendall(b"ClamAV 1.4.6\0")
                    return
                connection.recv(11)
                number = 0
                while not self._stopping.is_set() and connection.recv(8, socket.MSG_WAITALL):
                    number += 1
                    _, fds, _, _ = socket.recv_fds(connection, 1, 1)
                    body = os.pread(fds[0], 100, 0)
                    os.close(fds[0])
                    if body.startswith(b"PK\3\4"):
                        found = b"Heuristics.Encrypted.Zip"
                        connection.sendall(b"%d: fd[7]: %s FOUND\0" % (number, found))
                        continue
                    self.asked += 1
                    if self.say is None:
                        connection.sendall(b"%d: fd[7]: OK\0" % number)
                        continue
                    self.say(connection)
                    return
            except (OSError, ValueError):
                return


def _flood(connection):
    while True:
        connection.sendall(b"x" * 65_536)


LIES = {
    "closes": lambda c: None,
    "resets": lambda c: c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)),
    "rubbish": lambda c: c.sendall(b"\xff\xfe\0\1" * 100),
    "bare-ok": lambda c: c.sendall(b"OK\0"),
    "the-answer-of-another": lambda c: c.sendall(b"77: fd[7]: OK\0"),
    "half-an-answer": lambda c: c.sendall(b"1: fd[7]: O"),
    "out-of-memory": lambda c: c.sendall(b"1: Can't allocate memory ERROR\0"),
    "never-ends": _flood,
}


@pytest.fixture
def impostor(tmp_path):
    engine = None
    fake = Impostor(tmp_path / "clamd.ctl")
    fake.start()
    try:
        engine = open_clamav(f"clamav://{fake.path}")
        fake.engine = engine
        yield fake
    finally:
        if fake._thread.is_alive():
            fake.stop()
        if engine:
            engine.close()


@pytest.mark.parametrize("say", LIES.values(), ids=LIES)
def test_an_engine_that_gives_no_answer_makes_an_error_in_the_end_and_never_clean(
    make, impostor, say
):
    pipeline = make({"clamav": impostor.engine}, max_deliveries=2)
    impostor.say = say
    pipeline.upload("doc", b"harmless")
    pipeline.announce("doc")
    (result,) = pipeline.run(1).values()

    assert result.verdict is Verdict.ERROR
    assert impostor.asked >= 2
    assert pipeline.kept() == {"doc": b"harmless"}
    assert pipeline.verdict("doc") in {Verdict.ERROR, None}
    assert set(pipeline.ledger.counters(pipeline.store.bucket, _today(result))) >= {"Error"}
    if result.reasons == ("gave-up",):
        (letter,) = pipeline.dead()
        assert "gave up after 2 deliveries" in letter["reason"]
    else:
        assert result.reasons == ("engine-failed",)
        assert pipeline.dead() == []
    assert pipeline.queue.dead(10, 0) == []


def _today(result):
    return result.scanned_at.strftime("%Y-%m-%d")


def test_an_engine_that_goes_away_for_a_while_burns_no_deliveries(make, impostor):
    pipeline = make({"clamav": impostor.engine}, max_deliveries=2)
    pipeline.scan(warm=b"warm")
    impostor.stop()
    for n in range(40):
        pipeline.upload(f"{n}", b"%d" % n)
    pipeline.sweep()
    with pipeline.agent() as agent:
        time.sleep(2.5)
        assert len(pipeline.seen) == 1
        impostor.start()
        wait_for(lambda: len(pipeline.seen) == 41 and pipeline.is_done(agent), 20)

    assert {result.verdict for result in pipeline.seen} == {Verdict.CLEAN}
    assert pipeline.dead() == []


def test_without_a_signature_database_nothing_is_received_and_nothing_is_lost(make, tmp_path):
    signatures = tmp_path / "signatures"
    signatures.mkdir()
    engine = open_clamav(
        "clamav:managed", data_dir=tmp_path / "own", signatures_dir=signatures, poll=0.1
    )
    try:
        pipeline = make({"clamav": engine})
        for n in range(20):
            pipeline.upload(f"{n}", eicar() if n == 7 else b"%d" % n)
        pipeline.sweep()
        with pipeline.agent() as agent:
            time.sleep(1.5)
            assert pipeline.seen == []
            depth = pipeline.queue.depth()
            assert (depth.waiting, depth.in_flight) == (20, 0)
            demo = next(demo_signatures().glob("*.ndb"))
            (signatures / "test.ndb").write_bytes(demo.read_bytes())
            wait_for(lambda: len(pipeline.seen) == 20 and pipeline.is_done(agent), 20)
    finally:
        engine.close()

    verdicts = {result.object.key: result.verdict for result in pipeline.seen}
    assert [key for key, verdict in verdicts.items() if verdict is Verdict.INFECTED] == ["7"]
    assert set(verdicts.values()) == {Verdict.INFECTED, Verdict.CLEAN}


# -- two engines -----------------------------------------------------------------------------------

MARKED = b"marker-of-yara-only"
SLOW = "rule Slow { condition: uint8(0) == 0x21 and for all i in (0..filesize * 100000) : (uint8(i % 3) + 1 > 0) }\n"
RULES = f"""
rule Eicar {{ strings: $a = {{ {eicar().hex()} }} condition: $a }}
rule Marked {{ strings: $a = "{MARKED.decode()}" condition: $a }}
rule Mild {{ meta: severity = "suspicious" strings: $a = "mild-one" condition: $a }}
{SLOW}
"""


@contextmanager
def _yara(folder, text=RULES, **more):
    folder.mkdir(exist_ok=True)
    (folder / "rules.yar").write_text(text)
    engine = open_yara(f"yara://{folder}", poll=0.1, **more)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def yara(tmp_path_factory):
    with _yara(tmp_path_factory.mktemp("rules")) as engine:
        yield engine


def _engines(**required):
    return [{"engine": name, "required": is_required} for name, is_required in required.items()]


def _asked(result):
    return [report.engine for report in result.reports]


def test_two_engines_judge_in_series(make, clamav, yara):
    both = {"clamav": clamav, "yara": yara}
    pipeline = make(both, policy={"engines": _engines(clamav=True, yara=True)})
    results = pipeline.scan(
        plain=b"plain",
        eicar=eicar(),
        marked=MARKED,
        mild=b"mild-one",
        zip=hostile.zipped({"a": b"fine"}),
        badzip=hostile.zipped({"a": eicar()}),
        locked=hostile.encrypted_zip(b"x", aes=True),
    )

    assert {key: result.verdict for key, result in results.items()} == {
        "plain": Verdict.CLEAN,
        "eicar": Verdict.INFECTED,
        "marked": Verdict.INFECTED,
        "mild": Verdict.SUSPICIOUS,
        "zip": Verdict.CLEAN,
        "badzip": Verdict.INFECTED,
        "locked": Verdict.UNSCANNABLE,
    }
    assert {tuple(_asked(result)) for result in results.values()} == {("clamav", "yara")}
    assert results["zip"].reports[1].coverage == ("container-unopened",)
    assert "encrypted" in results["locked"].reasons
    assert {f.engine for f in results["eicar"].findings} == {"clamav", "yara"}


def test_the_first_hit_ends_it_where_the_policy_says_so(make, clamav, yara):
    policy = {"engines": _engines(yara=True, clamav=True), "stop_at_first_hit": True}
    pipeline = make({"clamav": clamav, "yara": yara}, policy=policy)
    results = pipeline.scan(eicar=eicar(), badzip=hostile.zipped({"a": eicar()}), mild=b"mild-one")

    assert _asked(results["eicar"]) == ["yara"]
    assert _asked(results["badzip"]) == _asked(results["mild"]) == ["yara", "clamav"]
    assert results["badzip"].verdict is Verdict.INFECTED
    assert results["mild"].verdict is Verdict.SUSPICIOUS


def test_yara_by_itself_does_not_make_a_container_clean(make, yara):
    policy = {"engines": _engines(yara=True), "unscannable": {"container-unopened": "move"}}
    pipeline = make({"yara": yara}, policy=policy)
    body = hostile.zipped({"a": b"fine"})
    results = pipeline.scan(zip=body, plain=b"plain")

    assert results["zip"].verdict is Verdict.UNSCANNABLE
    assert results["zip"].reasons == ("container-unopened",)
    assert results["plain"].verdict is Verdict.CLEAN
    assert pipeline.jailed() == [body]


@pytest.mark.parametrize("required", [True, False])
def test_an_engine_that_is_not_there_matters_if_it_is_required(make, clamav, required):
    pipeline = make({"clamav": clamav}, policy={"engines": _engines(clamav=True, yara=required)})
    results = pipeline.scan(plain=b"plain", eicar=eicar())

    assert results["eicar"].verdict is Verdict.INFECTED
    assert results["plain"].verdict is (Verdict.ERROR if required else Verdict.CLEAN)
    if required:
        assert results["plain"].reasons == ("engine-failed",)
        assert "yara" in results["plain"].message


def test_rules_that_do_not_compile_are_named_at_the_start_and_refused_later(
    make, clamav, tmp_path, caplog
):
    broken = tmp_path / "broken"
    with pytest.raises(ConfigError, match="rules.yar, line 1"), _yara(broken, "rule {"):
        pass
    with _yara(tmp_path / "rules") as yara:
        (tmp_path / "rules" / "more.yar").write_text("rule Broken { condition: nonsense }")
        wait_for(lambda: "stay in use" in caplog.text)
        both = {"clamav": clamav, "yara": yara}
        pipeline = make(both, policy={"engines": _engines(clamav=True, yara=True)})
        results = pipeline.scan(marked=MARKED, plain=b"plain")

    assert results["marked"].verdict is Verdict.INFECTED
    assert results["plain"].verdict is Verdict.CLEAN


def _yara_workers():
    return [child for child in psutil.Process().children() if "yara" in child.cmdline()[-5:]]


def test_yara_workers_that_are_killed_lose_nothing(make, clamav, tmp_path):
    with _yara(tmp_path / "rules", workers=2) as yara:
        both = {"clamav": clamav, "yara": yara}
        pipeline = make(
            both, policy={"engines": _engines(clamav=True, yara=True)}, max_deliveries=10
        )
        for n in range(200):
            pipeline.upload(f"{n}", MARKED if n % 10 == 0 else b"%d" % n)
        pipeline.sweep()
        killed = 0
        with pipeline.agent() as agent:
            while killed < 4 and not pipeline.is_done(agent):
                mine = {worker._process.pid for worker in yara._workers._idle}
                for worker in _yara_workers():
                    if worker.pid in mine:
                        worker.kill()
                        killed += 1
                time.sleep(0.02)
            wait_for(lambda: len(pipeline.seen) >= 200 and pipeline.is_done(agent), 30)

    assert killed >= 4
    verdicts = {result.object.key: result.verdict for result in pipeline.seen}
    assert verdicts == {
        f"{n}": Verdict.INFECTED if n % 10 == 0 else Verdict.CLEAN for n in range(200)
    }


@pytest.mark.parametrize("required", [True, False])
def test_a_rule_without_end_is_ended_at_the_deadline(make, clamav, yara, required):
    policy = {"deadline": 2.0, "engines": _engines(clamav=True, yara=required)}
    pipeline = make({"clamav": clamav, "yara": yara}, policy=policy)
    with pipeline.upload("slow", b"!").open("r+b") as file:
        file.truncate(50 << 20)
    pipeline.upload("plain", b"plain")
    pipeline.upload("marked", MARKED)
    pipeline.announce("slow", "plain", "marked")
    started = time.monotonic()
    results = pipeline.run(3)

    assert time.monotonic() - started < 8
    assert "timed-out" in results["slow"].reports[1].coverage
    if required:
        assert (results["slow"].verdict, results["slow"].reasons) == (
            Verdict.UNSCANNABLE,
            ("timed-out",),
        )
    else:
        assert results["slow"].verdict is Verdict.CLEAN
    assert results["plain"].verdict is Verdict.CLEAN
    assert results["marked"].verdict is Verdict.INFECTED
    assert all(worker.cpu_percent(0.1) < 50 for worker in _yara_workers())
