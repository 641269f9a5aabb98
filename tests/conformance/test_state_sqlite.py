"""The SQLite state keeps the contract, over threads, processes, kills and bad disks."""

import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from bucketward.errors import Changed, ConfigError, Denied, Unavailable, Unsupported
from bucketward.model import Add, Delete, Put, Record
from bucketward.states import sqlite
from bucketward.states.sqlite import SqliteState, open_sqlite
from bucketward.testing.state import StateSuite, at_once, fields, put, versions

TABLES = StateSuite.TABLES


class TestSqliteState(StateSuite):
    @pytest.fixture
    def state(self, tmp_path):
        self.open = SqliteState(tmp_path / "state.db", self.TABLES)
        yield self.open
        self.open.close()

    def reopen(self, state):
        state.close()
        self.open = SqliteState(state._path, self.TABLES)
        return self.open


class TestTwoConnections(StateSuite):
    """The same, with everything done by turns through two states on one file."""

    @pytest.fixture
    def state(self, tmp_path):
        pair = Pair(tmp_path / "state.db", self.TABLES)
        yield pair
        pair.close()


class Pair:
    def __init__(self, *args):
        self.states = [SqliteState(*args), SqliteState(*args)]
        self.turn = 0

    def _next(self):
        self.turn += 1
        return self.states[self.turn % 2]

    def ping(self):
        return self._next().ping()

    def get(self, *args):
        return self._next().get(*args)

    def commit(self, *args):
        return self._next().commit(*args)

    def query(self, *args, **more):
        return self._next().query(*args, **more)

    def export(self, *args):
        return self._next().export(*args)

    def close(self):
        for state in self.states:
            state.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.db"


@pytest.fixture
def state(path):
    state = SqliteState(path, TABLES, lock_timeout=0.3)
    yield state
    state.close()


def run(script, *args):
    """Start a Python process that has what it needs at hand."""
    script = (
        "import sys, time\n"
        "from bucketward.errors import *\n"
        "from bucketward.model import *\n"
        "from bucketward.states.sqlite import SqliteState\n"
        f"state = SqliteState(sys.argv[1], {dict(TABLES)!r})\n"
    ) + textwrap.dedent(script)
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def count(path, table="results"):
    """Return how many rows there really are."""
    with raw(path) as db:
        return db.execute(f"SELECT count(*) FROM state_{table}").fetchone()[0]


def is_sound(path):
    with raw(path) as db:
        return db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@contextmanager
def raw(path):
    db = sqlite3.connect(path, isolation_level=None, timeout=10, check_same_thread=False)
    try:
        yield db
    finally:
        db.close()


# Opening


def test_a_url_names_a_file(tmp_path):
    path = tmp_path / "a b?#%&é.db"
    url = f"sqlite://{tmp_path}/a%20b%3F%23%25%26%C3%A9.db"
    state = open_sqlite(url, TABLES)
    state.commit([put("key")])
    state.close()

    assert path.stat().st_size > 0
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://relative.db",
        "sqlite://host/absolute.db",
        "sqlite://",
        "sqlite:///",
        "sqlite:///folder/",
        "sqlite:///absolute.db?mode=ro",
        "sqlite:///absolute.db#x",
        "sqlite:///nul%00.db",
        "sqlite:relative.db",
        "postgresql:///absolute.db",
    ],
)
def test_another_url_is_refused_with_an_example(url):
    with pytest.raises(ConfigError, match="sqlite:///absolute/path"):
        open_sqlite(url, TABLES)


def test_a_file_name_that_is_not_utf8_is_a_file_name(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.db")
    for number in range(1, 3):
        state = SqliteState(path, TABLES)
        state.commit([put("key", version=number - 1)])
        state.close()

    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff.db"]


@pytest.mark.parametrize("name", ["Results", "a.b", 'a"b', "", "1a", "a b", "é"])
def test_a_name_that_sql_might_take_for_another_is_a_bug(path, name):
    with pytest.raises(ValueError, match="no name"):
        SqliteState(path, {name: ()})
    with pytest.raises(ValueError, match="no name"):
        SqliteState(path, {"results": (name,)})

    assert not path.exists()


def test_names_that_run_together_stay_apart(path):
    tables = {"a": ("b_c", "key", "select"), "a_b": ("c", "expires"), "select": ("table", "a-b")}
    state = SqliteState(path, tables)
    for table, indexes in tables.items():
        for index in indexes:
            record = Record(index, "{}", indexes={index: (table, index)})
            state.commit([Put(table, record, 0)])
    for table, indexes in tables.items():
        for index in indexes:
            assert [r.key for r in state.query(table, index, table).items] == [index]
    state.close()


def test_only_we_may_read_the_file(path, state):
    state.commit([put("key")])

    for name in os.listdir(path.parent):
        assert stat.S_IMODE((path.parent / name).stat().st_mode) == 0o600


def test_closing_leaves_one_file(path, state):
    state.commit([put("key")])
    assert len(os.listdir(path.parent)) > 1
    state.close()

    assert os.listdir(path.parent) == ["state.db"]


def test_closing_does_not_wait_for_others(path, state):
    state.commit([put("key")])
    with raw(path) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("SELECT * FROM state_results").fetchall()
        started = time.monotonic()
        state.close()

        assert time.monotonic() - started < 0.2
    reopened = SqliteState(path, TABLES)
    assert set(reopened.get("results", ["key"])) == {"key"}
    reopened.close()


def test_many_processes_open_a_new_file_at_once(path):
    script = """
        state.commit([Add("counters", "n", {"n": 1})])
        state.close()
    """
    processes = [run(script, path) for _ in range(4)]
    for process in processes:
        process.communicate(timeout=60)

    assert [process.returncode for process in processes] == [0] * 4
    state = SqliteState(path, TABLES)
    assert fields(state, "counters", "n") == {"n": 4}
    state.close()


def test_many_threads_open_a_new_file_at_once(tmp_path):
    # Without waiting for each other's switch to the log, one in two of these rounds fails.
    for number in range(10):
        path = tmp_path / f"{number}.db"
        states = at_once([partial(SqliteState, path, TABLES)] * 8)
        at_once([partial(s.commit, [Add("counters", "n", {"n": 1})]) for s in states])

        assert fields(states[0], "counters", "n") == {"n": 8}
        for state in states:
            state.close()


def test_opening_again_does_not_drop_the_locks_of_the_first(path, state):
    # POSIX locks of a process end when it closes any descriptor of the file.  Then another process
    # takes itself for the last one, and removes the log that we go on writing.
    state.commit([put("before")])
    second = SqliteState(path, TABLES)
    for number in range(2):
        process = run("state.commit([Add('counters', 'n', {'n': 1})]); state.close()", path)
        process.communicate(timeout=60)
        state.commit([put(f"after {number}")])
    process = run("print(sorted(r.key for r in state.export('results').items))", path)

    assert process.communicate(timeout=60)[0] == "['after 0', 'after 1', 'before']\n"
    second.close()


def test_opening_waits_for_those_who_are_in_the_way_of_the_log(path, state):
    state.commit([put("key")])
    state.close()
    with raw(path) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN")
        other.execute("SELECT * FROM state_results").fetchall()
        with pytest.raises(Unavailable):
            SqliteState(path, TABLES, lock_timeout=0.1)
        timer = threading.Timer(0.5, other.execute, ["COMMIT"])
        timer.start()
        state = SqliteState(path, TABLES, lock_timeout=10)
        timer.join()

        assert set(state.get("results", ["key"])) == {"key"}
    state.close()


@pytest.mark.parametrize(
    "content",
    [
        b"x",
        b"# not a database\n" * 1000,
        b"SQLite format 3\0" + b"\xff" * 5000,
        b"SQLite format 3\0",
        os.urandom(8192),
    ],
    ids=["short", "text", "header", "only header", "random"],
)
def test_a_file_that_is_no_database_is_refused_and_left_as_it_was(path, content):
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="left as it is: restore it") as refused:
        SqliteState(path, TABLES)

    assert str(path) in str(refused.value)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["state.db"]


def test_a_damaged_database_is_refused_and_left_as_it_was(path, state):
    for i in range(0, 1000, 100):
        state.commit([put(f"{i + j}", body='"' + "x" * 500 + '"', day="d") for j in range(100)])
    state.close()
    content = path.read_bytes()
    damaged = content[:4096] + b"\xa5" * (len(content) - 4096)
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match="damaged"):
        SqliteState(path, TABLES)

    assert path.read_bytes() == damaged


def test_damage_that_shows_later_is_unavailable(path, state):
    for i in range(0, 1000, 100):
        state.commit([put(f"{i + j}", body='"' + "x" * 500 + '"', day="d") for j in range(100)])
    state.close()
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xa5" * (path.stat().st_size // 3))
    state = SqliteState(path, TABLES)
    with pytest.raises(Unavailable, match="damaged"):
        cursor = ""
        while True:
            cursor = state.export("results", cursor).cursor
            assert cursor, "the export went past the damage"
    state.close()


def test_a_database_of_something_else_is_refused_and_left_as_it_was(path):
    with raw(path) as other:
        other.execute("CREATE TABLE precious (x)")
    content = path.read_bytes()
    with pytest.raises(ConfigError, match="file of its own"):
        SqliteState(path, TABLES)

    assert path.read_bytes() == content


def test_an_empty_file_becomes_a_state(path):
    path.touch()
    state = SqliteState(path, TABLES)
    state.commit([put("key")])
    state.close()


def test_a_newer_schema_is_refused_and_left_as_it_was(path, state):
    state.close()
    with raw(path) as db:
        db.execute("UPDATE state SET value = '2' WHERE name = 'schema_version'")
    content = path.read_bytes()
    with pytest.raises(ConfigError, match="schema 2, this one has 1"):
        SqliteState(path, {**TABLES, "new": ()})

    assert path.read_bytes() == content


def test_tables_and_indexes_may_come_to_the_list(path):
    old = SqliteState(path, {"results": ("day",)})
    old.commit([put("old", day="d")])
    old.close()
    new = SqliteState(path, TABLES)
    record = Record("new", "{}", indexes={"day": ("d", ""), "bucket": ("b", "")})
    new.commit([Put("results", record), Add("counters", "n", {"n": 1}), put("old2", day="d")])

    assert [r.key for r in new.query("results", "day", "d").items] == ["new", "old", "old2"]
    assert [r.key for r in new.query("results", "bucket", "b").items] == ["new"]
    assert new.get("results", ["old"])["old"].indexes == {"day": ("d", "")}
    new.close()


def test_an_index_that_left_the_list_and_comes_back_says_nothing_old(path):
    both = {"day": ("d", ""), "bucket": ("b", "")}
    first = SqliteState(path, TABLES)
    first.commit([Put("results", Record(key, "{}", indexes=both)) for key in ("a", "b", "c")])
    first.close()
    fewer = SqliteState(path, {"results": ("day",)})
    with pytest.raises(Unsupported):
        fewer.query("results", "bucket", "b")
    assert fewer.get("results", ["a"])["a"].indexes == {"day": ("d", "")}
    fewer.commit([put("a", day="d"), put("new", day="d"), Add("results", "c", {"n": 1})])
    fewer.close()
    again = SqliteState(path, TABLES)

    assert [r.key for r in again.query("results", "bucket", "b").items] == ["b", "c"]
    assert again.get("results", ["a"])["a"].indexes == {"day": ("d", "")}
    again.close()


@contextmanager
def unprivileged():
    """Lay the superuser's rights down for a while, for they ignore permissions."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


@pytest.fixture
def public():
    """Yield a folder that everybody may read, made elsewhere than pytest's own."""
    with TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
        os.chmod(name, 0o755)


def test_a_folder_that_cannot_be_written_is_refused_with_what_to_do(public):
    public.chmod(0o555)
    with unprivileged(), pytest.raises(ConfigError, match=r"where uid \d+ may write") as refused:
        SqliteState(public / "state.db", TABLES)

    assert str(public / "state.db") in str(refused.value)
    assert os.listdir(public) == []


@pytest.mark.parametrize("mode", [0o444, 0o000])
def test_a_file_that_cannot_be_written_is_refused_with_what_to_do(public, mode):
    path = public / "state.db"
    SqliteState(path, TABLES).close()
    path.chmod(mode)
    public.chmod(0o555)
    with unprivileged(), pytest.raises(ConfigError, match="may write"):
        SqliteState(path, TABLES)

    assert os.listdir(public) == ["state.db"]


@pytest.mark.parametrize(
    "name", ["missing/state.db", "file/state.db", "folder", "dangling", "n" * 300]
)
def test_a_path_that_cannot_be_a_file_is_refused_with_what_to_do(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing" / "there")
    with pytest.raises(ConfigError, match="make it a file in a folder"):
        SqliteState(tmp_path / name, TABLES)


# Other writers


def test_a_lock_that_somebody_keeps_is_unavailable_and_reads_go_on(path, state):
    state.commit([put("key", day="d")])
    with raw(path) as other:
        other.execute("BEGIN IMMEDIATE")
        for refused in (lambda: state.commit([put("new")]), state.ping):
            started = time.monotonic()
            with pytest.raises(Unavailable, match="locked by another writer"):
                refused()
            assert 0.25 < time.monotonic() - started < 3
        assert set(state.get("results", ["key", "new"])) == {"key"}
        assert len(state.query("results", "day", "d").items) == 1
        assert len(state.export("results").items) == 1
        with pytest.raises(Unavailable, match="locked by another writer"):
            SqliteState(path, TABLES, lock_timeout=0.1)
    state.ping()
    state.commit([put("new")])

    assert set(state.get("results", ["key", "new"])) == {"key", "new"}


def test_reads_see_the_last_commit_while_another_is_being_made(path, state):
    state.commit([put("key", body="1")])
    with raw(path) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE state_results SET body = '2'")

        assert versions(state, "key") == [("1", 1)]
        other.execute("COMMIT")
        assert versions(state, "key") == [("2", 1)]


def test_a_reader_that_never_ends_does_not_stop_a_writer(path, state):
    state.commit([put(f"{i}") for i in range(100)])
    with raw(path) as other:
        rows = other.execute("SELECT * FROM state_results")
        rows.fetchone()
        for _ in range(20):
            state.commit([put(f"{i}") for i in range(100)])

        assert state.get("results", ["0"])["0"].version == 21


def test_pages_leave_no_read_open_that_would_keep_the_log_growing(path, state):
    body = json.dumps("x" * 250_000)
    state.commit([put(f"{i:02}", body=body, day="d") for i in range(40)])
    assert state.query("results", "day", "d").cursor
    assert state.query("results", "day", "d", limit=2).cursor
    assert state.export("results").cursor
    state.commit([put("more")])
    with raw(path) as other:
        busy, log, done = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    assert (busy, log, done) == (0, 0, 0)


def test_processes_and_threads_add_up(path, state):
    script = """
        import threading
        def work(name):
            for i in range(40):
                key = f"{sys.argv[2]} {name} {i}"
                state.commit([
                    Put("results", Record(key, "{}", indexes={"day": ("d", key)}), 0),
                    Add("counters", "n", {"n": 1}),
                ])
        threads = [threading.Thread(target=work, args=[n]) for n in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        state.close()
        print("done")
    """
    processes = [run(script, path, number) for number in range(3)]

    assert [process.communicate(timeout=100)[0] for process in processes] == ["done\n"] * 3
    assert fields(state, "counters", "n") == {"n": 240}
    assert count(path) == 240
    assert is_sound(path)


def test_no_writer_of_several_processes_starves(path):
    script = """
        longest = 0
        end = time.monotonic() + 2
        while time.monotonic() < end:
            started = time.monotonic()
            state.commit([Put("results", Record(f"{sys.argv[2]} {i}", "{}")) for i in range(100)])
            longest = max(longest, time.monotonic() - started)
        print(longest)
    """
    processes = [run(script, path, number) for number in range(2)]
    longest = [float(process.communicate(timeout=60)[0]) for process in processes]

    assert max(longest) < 8, "the time-out is 10"


# Kills


@pytest.mark.parametrize("seed", range(5))
def test_a_kill_loses_nothing_that_was_acknowledged_and_leaves_nothing_half_done(path, seed):
    script = """
        n = 0
        while True:
            state.commit([
                Put("results", Record(f"mark {n}", "{}", indexes={"day": ("marks", f"{n:09}")}), 0),
                *(Put("results", Record(f"{n} {i}", "x" * 300, indexes={"day": (f"batch {n}", "")}), 0)
                  for i in range(30)),
                *([Delete("results", f"{n - 1} 0", 1)] if n else []),
                Add("counters", "n", {"n": 1}),
            ])
            print(n, flush=True)
            n += 1
    """
    process = run(script, path)
    process.stdout.readline()
    time.sleep(random.Random(seed).uniform(0.05, 0.5))
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0].split()
    acknowledged = int(said[-1]) + 1 if said else 1

    assert process.returncode == -signal.SIGKILL
    state = SqliteState(path, TABLES)
    marks = fields(state, "counters", "n")["n"]
    assert marks in {acknowledged, acknowledged + 1}
    assert count(path) == marks * 31 - (marks - 1)
    for n in range(marks):
        keys = {f"{n} {i}" for i in range(0 if n == marks - 1 else 1, 30)}
        assert {r.key for r in state.query("results", "day", f"batch {n}").items} == keys
        assert set(state.get("results", [f"mark {n}"])) == {f"mark {n}"}
    state.commit([put(f"mark {marks}", version=0)])
    state.close()
    assert is_sound(path)


def test_a_commit_is_forced_to_the_disk(state):
    with state._writing() as connection:
        # Cutting the power is beyond a test; 2 is FULL (sqlite.org/pragma.html#pragma_synchronous).
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_an_exception_in_the_middle_gives_the_lock_back(path, state):
    with pytest.raises(KeyboardInterrupt), state._writing() as connection:
        connection.exec_driver_sql("DELETE FROM state")
        raise KeyboardInterrupt
    state.commit([put("key")])
    state.close()

    SqliteState(path, TABLES).close()


# Bad disks


def large_commit(prefix):
    body = json.dumps("x" * 20_000)
    return [put(f"{prefix}{i}", body=body, day="d") for i in range(50)]


def test_a_full_database_is_unavailable_and_the_state_goes_on(path, state):
    state.commit([put("before")])
    with state._writer.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 40")
    with pytest.raises(Unavailable, match="disk is full"):
        state.commit([Add("counters", "n", {"n": 1}), *large_commit("a")])
    assert count(path) == 1
    state.commit([Add("counters", "n", {"n": 1}), *large_commit("b")])

    assert count(path) == 51
    assert fields(state, "counters", "n") == {"n": 1}
    assert is_sound(path)


def test_a_file_that_cannot_grow_is_unavailable_and_the_state_goes_on(path, state):
    state.commit([put("before")])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        for _ in range(2):
            with pytest.raises(Unavailable):
                state.commit(large_commit("a"))
        assert set(state.get("results", ["before", "a1"])) == {"before"}
        state.commit([put("small")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    state.commit(large_commit("b"))

    assert count(path) == 52
    assert is_sound(path)


@pytest.fixture
def small_disk(tmp_path):
    """Yield a folder on a file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if (
        os.geteuid() != 0
        or subprocess.run(command, check=False, capture_output=True).returncode != 0
    ):
        pytest.skip("mounting needs the superuser; the two tests before fill a disk otherwise")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_unavailable_and_the_state_goes_on(small_disk):
    path = small_disk / "state.db"
    filler = small_disk / "filler"
    state = SqliteState(path, TABLES)
    state.commit([put("before")])
    filler.write_bytes(b"x" * 1_200_000)
    for _ in range(3):
        with pytest.raises(Unavailable, match="disk is full"):
            state.commit([Add("counters", "n", {"n": 1}), *large_commit("a")])
        assert set(state.get("results", ["before", "a1"])) == {"before"}
        assert state.query("results", "day", "d").items == []
    filler.unlink()
    state.commit([Add("counters", "n", {"n": 1}), *large_commit("b")[:20]])

    assert count(path) == 21
    assert fields(state, "counters", "n") == {"n": 1}
    assert is_sound(path)
    state.close()


def test_a_file_that_was_removed_or_replaced_is_unavailable(path, state):
    state.commit([put("key")])
    kept = path.rename(path.with_name("kept.db"))
    for _ in range(2):
        for refused in (lambda: state.commit([put("lost")]), state.ping):
            with pytest.raises(Unavailable, match="put it back"):
                refused()
        shutil.copyfile(kept, path)
    assert not set(state.get("results", ["lost"]))
    kept.replace(path)
    state.commit([put("found")])

    assert set(state.get("results", ["key", "found"])) == {"key", "found"}


def test_a_file_that_became_read_only_is_denied(path, state):
    state.commit([put("key")])
    with state._writer.connect() as connection:
        connection.exec_driver_sql("PRAGMA query_only = ON")
    with pytest.raises(Denied, match="may write"):
        state.commit([put("new")])


# What it costs


def test_expired_records_are_removed_by_the_commits_that_follow(path, state, monkeypatch):
    monkeypatch.setattr(sqlite, "_PURGE_SECONDS", 0.1)
    soon = datetime.now(UTC) + timedelta(seconds=0.5)
    far = datetime.now(UTC) + timedelta(hours=1)
    for start in range(0, 600, 100):
        state.commit(
            [Put("results", Record(f"{start + i}", "{}", expires_at=soon)) for i in range(100)]
        )
    state.commit([Put("other", Record(f"{i}", "{}", expires_at=soon)) for i in range(50)])
    state.commit([Put("results", Record("kept", "{}", expires_at=far)), put("kept too")])
    assert count(path) == 602
    time.sleep(0.6)
    removed = [602]
    for number in range(6):
        state.commit([put("kept too")])
        removed.append(count(path))
        if number > 3:
            time.sleep(0.11)

    assert removed[-1] == 2
    assert max(a - b for a, b in pairwise(removed)) <= 200
    assert count(path, "other") == 0


@pytest.mark.parametrize(
    "name",
    [
        "test_expired_records_vanish",
        "test_what_expired_counts_as_absent",
        "test_many_expired_records_do_not_hide_the_others",
    ],
)
def test_expiry_does_not_wait_for_the_removal(state, monkeypatch, name):
    monkeypatch.setattr(sqlite, "_PURGED", 0)

    getattr(StateSuite(), name)(state)


def test_every_page_seeks_to_where_it_begins(state):
    state.commit([put(f"{i}", day="d", sort=f"{i % 10}") for i in range(100)])
    cursor = state.query("results", "day", "d", limit=50).cursor
    plans = []
    for more in (
        {},
        {"low": "3"},
        {"low": "3", "high": "8"},
        {"low": "3", "high": "8", "after": cursor},
        {"high": "8", "after": cursor, "newest_first": True},
        {"low": "3", "newest_first": True},
    ):
        with statements(state._readers) as seen:
            state.query("results", "day", "d", **more)
        ((statement, parameters),) = seen
        with state._reading() as connection:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plans.append([row[3] for row in plan])
    for plan in plans:
        # One search in the index, in its order: nothing is sorted, nothing is read twice.
        assert len(plan) == 1
        assert plan[0].startswith("SEARCH state_results USING INDEX state_results.day")
    assert "sort" in " ".join(plans[1])
    assert "(day_sort,key)>" in plans[3][0]
    assert "(day_sort,key)<" in plans[4][0]


@contextmanager
def statements(engine):
    import sqlalchemy as sa

    seen = []

    def note(_connection, _cursor, statement, parameters, _context, _many):
        seen.append((statement, parameters))

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)


def test_a_page_ends_early_where_bodies_are_long(state):
    body = json.dumps("x" * 250_000)
    state.commit([put(f"{i:02}", body=body, day="d") for i in range(60)])

    for page in (state.query("results", "day", "d"), state.export("results")):
        assert 16 <= len(page.items) <= 18
        assert page.cursor


def test_errors_show_no_bodies_or_statements(state):
    with state._writer.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 40")
    with pytest.raises(Unavailable) as refused:
        state.commit([put(f"{i}", body=json.dumps("secret" * 5000)) for i in range(50)])
    texts = []
    errors = [refused.value]
    while errors:
        error = errors.pop()
        texts.append(f"{error} {error!r}")
        errors += [e for e in (error.__cause__, error.__context__) if e]

    assert len(texts) > 2
    assert not any("secret" in text for text in texts)


def test_reads_and_writes_from_many_threads_never_fail(path):
    state = SqliteState(path, TABLES)
    stop = threading.Event()

    def write(thread):
        for i in range(30):
            record = Record(f"{thread} {i}", "{}", indexes={"day": ("d", "")})
            state.commit([Put("results", record, 0), Add("counters", "n", {"n": 1})])

    def read(_thread):
        while not stop.is_set():
            total = state.get("counters", ["n"])
            found = state.query("results", "day", "d", limit=1000).items
            # Both are in one commit, and the second look is the later one.
            assert len(found) >= (json.loads(total["n"].body)["n"] if total else 0)

    readers = [threading.Thread(target=read, args=[n]) for n in range(4)]
    for reader in readers:
        reader.start()
    at_once([lambda n=n: write(n) for n in range(8)])
    stop.set()
    for reader in readers:
        reader.join()

    assert fields(state, "counters", "n") == {"n": 240}
    with pytest.raises(Changed):
        state.commit([Delete("results", "0 0", 2)])
    state.close()
