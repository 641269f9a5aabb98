"""The directory watch on real directories."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from bucketward.agents import watch as module
from bucketward.agents.watch import Watch
from bucketward.errors import ConfigError, Unavailable

SETTLE = 0.15


class Ear:
    """What a watch calls, and what it said."""

    def __init__(self):
        self.announced = []
        self.resyncs = []
        self.fault = None
        self.refused = 0

    def enqueue(self, refs):
        if self.fault:
            self.refused += 1
            raise self.fault
        self.announced.extend((time.monotonic(), ref) for ref in refs)

    def resync(self, bucket):
        self.resyncs.append(bucket)

    def key_of(self, bucket, path):
        return None if path.endswith(b".ignored") else path.decode("utf-8", "backslashreplace")

    @property
    def keys(self):
        return sorted(ref.key for _, ref in self.announced)


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def quiet():
    """Wait until whatever was going to be announced has been."""
    time.sleep(4 * SETTLE)


@contextmanager
def watching(ear, directories, *, settle=SETTLE, **options):
    watch = Watch(
        directories,
        ear.enqueue,
        key_of=ear.key_of,
        resync=ear.resync,
        settle=settle,
        **options,
    )
    watch.start()
    try:
        wait_for(lambda: len(ear.resyncs) >= len(directories))
        ear.resyncs.clear()
        yield watch
    finally:
        watch.stop()


@pytest.fixture
def ear():
    return Ear()


@pytest.fixture
def drop(tmp_path):
    path = tmp_path / "drop"
    path.mkdir()
    return path


@pytest.fixture
def watch(ear, drop):
    with watching(ear, {"file:///drop": drop}) as watch:
        yield watch


def test_what_is_there_at_the_start_is_left_to_a_sweep(ear, drop):
    (drop / "old").write_text("x")
    (drop / "sub").mkdir()
    (drop / "sub" / "old").write_text("x")
    watch = Watch(
        {"file:///drop": drop}, ear.enqueue, key_of=ear.key_of, resync=ear.resync, settle=0.1
    )
    watch.start()
    wait_for(lambda: ear.resyncs)
    (drop / "sub" / "new").write_text("x")
    wait_for(lambda: ear.announced)
    watch.stop()

    assert ear.resyncs == ["file:///drop"]
    assert ear.keys == ["sub/new"]


def test_a_new_file_is_announced_as_a_claim_without_an_etag(ear, drop, watch):
    (drop / "new.txt").write_text("x")
    wait_for(lambda: ear.announced)

    [(_, ref)] = ear.announced
    assert (ref.bucket, ref.key) == ("file:///drop", "new.txt")
    assert (ref.etag, ref.size, ref.version_id) == (None, None, None)
    assert abs(ref.event_at.timestamp() - time.time()) < 10


def test_a_half_written_file_is_announced_once_and_at_the_end(ear, drop):
    with watching(ear, {"file:///drop": drop}, settle=0.6):
        with (drop / "film").open("wb") as file:
            for _ in range(20):
                file.write(b"x" * 10_000)
                file.flush()
                time.sleep(0.1)
            written = time.monotonic()
        wait_for(lambda: ear.announced)
        time.sleep(0.8)

    [(announced, _)] = ear.announced
    assert announced > written


def test_a_file_whose_writer_pauses_is_announced_again_at_the_end(ear, drop, watch):
    with (drop / "film").open("wb") as file:
        file.write(b"x")
        file.flush()
        wait_for(lambda: ear.announced)
        file.write(b"y")
    wait_for(lambda: len(ear.announced) == 2)
    quiet()

    assert ear.keys == ["film", "film"]


def test_five_hundred_files_at_once_are_all_announced(ear, drop, watch):
    names = [f"{n:03}" for n in range(500)]
    for name in names:
        (drop / name).write_text(name)
    wait_for(lambda: len(ear.announced) >= len(names))
    quiet()

    assert ear.keys == names
    assert ear.resyncs == []


def test_trees_made_with_their_content_at_once_are_announced_as_a_whole(ear, drop, watch):
    script = """if True:
        import os, sys
        for t in range(5):
            for i in range(10):
                os.makedirs(f"{sys.argv[1]}/{t}/{i}/a/b/c/d")
                for path in ("f", "a/f", "a/b/c/d/f"):
                    open(f"{sys.argv[1]}/{t}/{i}/{path}", "w").close()
    """
    subprocess.run([sys.executable, "-c", script, drop], check=True)
    expected = sorted(
        f"{t}/{i}/{path}" for t in range(5) for i in range(10) for path in ("f", "a/f", "a/b/c/d/f")
    )
    wait_for(lambda: set(ear.keys) >= set(expected))

    assert sorted(set(ear.keys)) == expected


def test_trees_that_are_moved_in_and_about_get_their_new_names(ear, drop, watch, tmp_path):
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "f").write_text("x")

    tree.rename(drop / "one")
    wait_for(lambda: ear.keys == ["one/a/b/f"])
    (drop / "one" / "a").rename(drop / "two")
    wait_for(lambda: "two/b/f" in ear.keys)
    (drop / "two" / "b" / "g").write_text("x")
    wait_for(lambda: "two/b/g" in ear.keys)
    quiet()
    assert ear.keys == ["one/a/b/f", "two/b/f", "two/b/g"]


def test_a_tree_that_was_moved_out_is_not_ours_any_more(ear, drop, watch, tmp_path):
    (drop / "a" / "b").mkdir(parents=True)
    (drop / "a" / "b" / "f").write_text("x")
    wait_for(lambda: ear.keys == ["a/b/f"])

    (drop / "a").rename(tmp_path / "away")
    (drop / "a" / "b").mkdir(parents=True)
    quiet()
    (tmp_path / "away" / "b" / "g").write_text("x")
    quiet()
    assert ear.keys == ["a/b/f"]
    (drop / "a" / "b" / "h").write_text("x")
    wait_for(lambda: ear.keys == ["a/b/f", "a/b/h"])


def test_a_file_renamed_linked_or_replaced_into_place_is_announced(ear, drop, watch, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("x")
    outside.rename(drop / "moved")
    wait_for(lambda: ear.keys == ["moved"])

    temporary = drop / ".upload.ignored"
    temporary.write_text("y")
    os.replace(temporary, drop / "moved")
    wait_for(lambda: ear.keys == ["moved", "moved"])

    outside.write_text("z")
    os.link(outside, drop / "linked")
    wait_for(lambda: ear.keys == ["linked", "moved", "moved"])


def test_an_overwritten_file_is_announced_again(ear, drop, watch):
    for times in (1, 2, 3):
        (drop / "f").write_text("x" * times)
        wait_for(lambda n=times: ear.keys == ["f"] * n)


def test_a_file_that_goes_before_it_is_at_rest_is_not_announced(ear, drop, watch):
    (drop / "gone").write_text("x")
    (drop / "gone").unlink()
    (drop / "d").mkdir()
    (drop / "d" / "gone").write_text("x")
    time.sleep(SETTLE / 3)
    (drop / "d" / "gone").unlink()
    (drop / "d").rmdir()
    quiet()

    assert ear.announced == []


def test_only_regular_files_of_the_bucket_itself_are_announced(ear, drop, watch, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_text("secret")
    (drop / "file-link").symlink_to(outside / "f")
    (drop / "directory-link").symlink_to(outside)
    (drop / "dangling").symlink_to("/nowhere")
    os.mkfifo(drop / "fifo")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.fspath(drop / "socket"))
    (drop / ".bucketward").mkdir()
    (drop / ".bucketward" / "journal").write_text("x")
    quiet()
    (outside / "g").write_text("x")
    (drop / ".bucketward" / "deeper").mkdir()
    (drop / ".bucketward" / "deeper" / "f").write_text("x")
    (drop / "f.ignored").write_text("x")
    (drop / "sub").mkdir()
    (drop / "sub" / ".bucketward").write_text("an object like any other")
    quiet()

    assert ear.keys == ["sub/.bucketward"]


def test_names_that_are_no_text_do_not_deafen_the_watch(ear, drop, watch):
    (Path(os.fsdecode(os.fsencode(drop) + b"/\xff\xfe"))).write_text("x")
    directory = Path(os.fsdecode(os.fsencode(drop) + b"/\xe4"))
    directory.mkdir()
    (directory / "\n").write_text("x")
    (drop / ("ä" * 120)).write_text("x")
    wait_for(lambda: len(ear.announced) == 3)

    assert ear.keys == sorted(["\\xff\\xfe", "\\xe4/\n", "ä" * 120])


def test_what_cannot_be_queued_is_offered_again(ear, drop, watch):
    ear.fault = Unavailable("no queue")
    for name in ("a", "b", "changes", "gone"):
        (drop / name).write_text("x")
    wait_for(lambda: ear.refused)
    assert ear.announced == []
    (drop / "changes").write_text("changed")
    (drop / "gone").unlink()
    ear.fault = None
    wait_for(lambda: len(ear.announced) == 3)
    quiet()

    assert ear.keys == ["a", "b", "changes"]
    assert ear.resyncs == []


def test_two_buckets_one_within_the_other_each_hear_of_their_own(ear, drop):
    inner = drop / "inner"
    inner.mkdir()
    with watching(ear, {"file:///drop": drop, "file:///drop/inner": inner}):
        (inner / "f").write_text("x")
        wait_for(lambda: len(ear.announced) == 2)

    assert sorted((ref.bucket, ref.key) for _, ref in ear.announced) == [
        ("file:///drop", "inner/f"),
        ("file:///drop/inner", "f"),
    ]


def test_more_files_than_can_be_kept_are_left_to_a_sweep(ear, drop):
    with watching(ear, {"file:///drop": drop}, max_pending=50):
        for n in range(120):
            (drop / str(n)).write_text("x")
        wait_for(lambda: ear.resyncs)
        quiet()
        assert len(ear.announced) <= 50
        assert set(ear.resyncs) == {"file:///drop"}
        ear.announced.clear()
        (drop / "later").write_text("x")
        wait_for(lambda: ear.keys == ["later"])


def test_events_that_the_kernel_dropped_are_made_up_for_by_a_sweep(ear, drop):
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    blocked = threading.Event()
    ear.key_of = lambda bucket, path: (blocked.wait(60), path.decode())[1]
    with watching(ear, {"file:///drop": drop}):
        (drop / "first").write_text("x")
        time.sleep(2 * SETTLE)
        (drop / "sub").mkdir()
        # Two names in turn: events that repeat the one before are merged.
        for n in range(limit + 100):
            os.close(os.open(drop / f"f{n % 2}", os.O_WRONLY | os.O_CREAT))
        (drop / "sub" / "lost").write_text("x")
        blocked.set()
        wait_for(lambda: ear.resyncs)
        assert ear.resyncs == ["file:///drop"]
        # It is awake again, in the directory too of which it never heard.
        (drop / "sub" / "later").write_text("x")
        wait_for(lambda: "sub/later" in ear.keys)


def test_a_root_that_vanishes_and_comes_back_is_watched_again(ear, drop, watch, monkeypatch):
    monkeypatch.setattr(module, "_MEND_SECONDS", 0.2)
    drop.rename(drop.with_name("away"))
    quiet()
    drop.mkdir()
    wait_for(lambda: ear.resyncs)
    (drop / "f").write_text("x")
    wait_for(lambda: ear.keys == ["f"])


def test_a_bug_does_not_end_the_watch_and_leads_to_a_sweep(ear, drop, watch, caplog):
    ear.fault = ZeroDivisionError("a bug")
    (drop / "f").write_text("x")
    wait_for(lambda: ear.refused)
    ear.fault = None
    wait_for(lambda: ear.resyncs)
    (drop / "g").write_text("x")
    wait_for(lambda: ear.announced)

    assert "a bug" in caplog.text


@pytest.mark.parametrize("busy", [False, True])
def test_stopping_is_prompt_and_can_be_repeated(ear, drop, busy):
    with watching(ear, {"file:///drop": drop}) as watch:
        if busy:
            for n in range(2000):
                (drop / str(n)).write_text("x")
        began = time.monotonic()
        watch.stop()
        watch.stop()
        assert time.monotonic() - began < 0.5


def test_a_directory_that_is_not_there_is_named_with_what_to_do(ear, tmp_path):
    watch = Watch(
        {"file:///nowhere": tmp_path / "nowhere"},
        ear.enqueue,
        key_of=ear.key_of,
        resync=ear.resync,
    )

    with pytest.raises(ConfigError, match=r"file:///nowhere .*protect"):
        watch.start()
    watch.stop()


def test_a_root_that_is_a_link_is_followed(ear, drop, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(drop)
    with watching(ear, {"file:///link": link}):
        (drop / "f").write_text("x")
        wait_for(lambda: ear.keys == ["f"])
