"""`bucketward up` in a folder of its own, as whoever tries it first meets it: drop, look, break."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime

import psutil
import pytest

from bucketward.ledger import TABLES, Ledger
from bucketward.model import ObjectRef
from bucketward.states.sqlite import SqliteState
from bucketward.stores.file import FileStore
from conftest import eicar
from running import Process, free_port
from servers import need

MARK = b"a most peculiar sequence of bytes"


@pytest.fixture(autouse=True)
def clamd():
    need("clamd")


class Folder:
    """An empty folder, what runs in it, and what that leaves there."""

    def __init__(self, path):
        self.path = path
        self.data = path / "bucketward-data"
        self.drop = self.data / "drop"
        self.quarantine = self.data / "quarantine"
        self.environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": str(path),
            "LANG": "C.UTF-8",
            "BUCKETWARD_WATCH__SETTLE_SECONDS": "0.2",
            "BUCKETWARD_METRICS__PORT": "0",
        }

    def start(self, *command, **environ):
        process = Process(
            command or ["up"],
            cwd=self.path,
            environ={**self.environ, **environ},
            log=self.path / "up.log",
        )
        process.wait_for("drop a file into")
        return process

    @contextmanager
    def up(self, **environ):
        """Run `up` for the length of a block; it ends soon and well and leaves no process."""
        (self.path / "up.log").unlink(missing_ok=True)
        process = self.start(**environ)
        try:
            yield process
        except BaseException:
            process.stop(signal.SIGKILL)
            raise
        children = psutil.Process(process.pid).children(recursive=True)
        began = time.monotonic()
        code = process.stop()
        assert code == 0, process.log
        assert time.monotonic() - began < 10
        assert not psutil.wait_procs(children, 3)[1]
        assert "Traceback" not in process.log

    def run(self, *args, **environ):
        done = subprocess.run(
            [sys.executable, "-m", "bucketward", *args],
            check=False,
            cwd=self.path,
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in done.stderr
        assert "internal error" not in done.stderr
        return done

    @contextmanager
    def ledger(self):
        state = SqliteState(self.data / "state.db", TABLES)
        try:
            yield Ledger(state)
        finally:
            state.close()

    def quarantined(self):
        """Return the bodies in quarantine."""
        return [
            path.read_bytes()
            for path in self.quarantine.rglob("*")
            if path.is_file() and ".bucketward" not in path.parts
        ]


@pytest.fixture
def folder(tmp_path):
    """Yield an empty folder, and see that no process of it is left."""
    yield Folder(tmp_path)
    left = [p for p in psutil.process_iter(["environ"]) if str(tmp_path) in str(p.info["environ"])]
    for process in left:
        process.kill()
    assert not left


def results(process):
    """Return what was logged of results, by key."""
    found = {}
    for line in process.log.splitlines():
        record = json.loads(line)
        if record["logger"] == "bucketward.results":
            found.setdefault(record["key"], []).append(record)
    return found


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def verdict_of(process, key):
    return wait_for(lambda: results(process).get(key))[-1]["verdict"]


# -- the first minutes ---------------------------------------------------------------------------


def test_the_first_minutes_in_an_empty_folder(folder):
    with folder.up() as up:
        assert str(folder.drop) in up.log
        assert str(folder.quarantine) in up.log
        (folder.drop / "evil.com").write_bytes(eicar())
        (folder.drop / "fine.txt").write_bytes(b"hello")
        forged = '\n{"level": "info", "message": "forged"}\n\x1b[2J'
        (folder.drop / forged).write_bytes(b"hello")
        (folder.drop / "sub").mkdir()
        (folder.drop / "sub" / "évil.com").write_bytes(eicar())
        os.symlink("fine.txt", folder.drop / "link")

        assert verdict_of(up, "fine.txt") == "Clean"
        assert verdict_of(up, "evil.com") == "Infected"
        assert verdict_of(up, "sub/évil.com") == "Infected"
        assert verdict_of(up, forged) == "Clean"
        assert "\x1b" not in up.log

        # Whoever reads the log is told what and where; JSON, as this is no terminal.
        [record] = results(up)["evil.com"]
        assert record["bucket"] == f"file://{folder.drop}"
        assert "eicar" in record["signature"].lower()
        assert (record["level"], record["action"]) == ("warning", "move")
        # The demonstration is said to be one, loudly.
        [warning] = [line for line in up.log.splitlines() if "DEMONSTRATION SIGNATURES" in line]
        assert json.loads(warning)["level"] == "warning"

        # A second one is refused and does no harm.
        second = folder.run("up")
        assert second.returncode == 64
        assert f"process {up.pid}" in second.stderr

        # A file is judged when it is whole, and once.
        body = MARK + eicar()
        with (folder.drop / "slow").open("wb") as file:
            for at in range(0, len(body), 20):
                file.write(body[at : at + 20])
                file.flush()
                time.sleep(0.12)
            assert "slow" not in results(up)
        assert verdict_of(up, "slow") == "Infected"
        assert results(up)["slow"][0]["size"] == len(body)
        assert len(results(up)["slow"]) == 1

    assert not (folder.drop / "evil.com").exists()
    assert not (folder.drop / "sub" / "évil.com").exists()
    assert sorted(folder.quarantined()) == [eicar(), eicar(), body]
    assert folder.quarantine.stat().st_mode & 0o777 == 0o700
    assert (folder.drop / "fine.txt").read_bytes() == b"hello"
    with_tags = FileStore(folder.drop)
    if with_tags.has_tags:
        tags = with_tags.tags(with_tags.stat(ObjectRef(with_tags.bucket, "fine.txt")))
        assert "Clean" in tags.values()
    with_tags.close()

    # What came while nobody was there is found by the next one.
    (folder.drop / "meanwhile.com").write_bytes(eicar())
    (folder.drop / "tomorrow.com").write_bytes(eicar())
    os.utime(folder.drop / "tomorrow.com", (time.time() + 86400,) * 2)
    with folder.up() as up:
        (folder.drop / "now.com").write_bytes(eicar())
        for key in ("meanwhile.com", "tomorrow.com", "now.com"):
            assert verdict_of(up, key) == "Infected"
        wait_for(lambda: not list(folder.drop.glob("*.com")))
        time.sleep(0.5)
        # Once each, and the rest has its verdict already.
        found = {key: len(records) for key, records in results(up).items()}
        assert found == {"meanwhile.com": 1, "tomorrow.com": 1, "now.com": 1}


def test_five_hundred_at_once_all_get_their_verdict(folder):
    began = datetime.now(UTC).date()
    with folder.up() as up:
        up.wait_for('"ready"')
        for number in range(500):
            body = eicar() if number % 50 == 0 else b"%d" % number
            (folder.drop / f"{number:03}").write_bytes(body)
        wait_for(lambda: len(results(up)) == 500)
        logged = {key: record[0]["verdict"] for key, record in results(up).items()}

    with folder.ledger() as ledger:
        store = FileStore(folder.drop)
        infos = store.list().items
        assert len(infos) == 490
        assert {verdict and verdict.verdict for verdict in ledger.verdicts(infos)} == {"Clean"}
        store.close()
        counted = Counter()
        for day in {began, datetime.now(UTC).date()}:
            counted.update(ledger.counters(f"file://{folder.drop}", day.isoformat()))
        assert (counted["Clean"], counted["Infected"]) == (490, 10), counted
    assert sorted(key for key, verdict in logged.items() if verdict == "Infected") == [
        f"{number:03}" for number in range(0, 500, 50)
    ]
    assert len(folder.quarantined()) == 10


# -- faults --------------------------------------------------------------------------------------


def test_killed_in_the_middle_it_goes_on_where_it_was(folder):
    infected = {f"{number:03}" for number in range(0, 300, 3)}
    up = folder.start()
    up.wait_for('"ready"')
    children = psutil.Process(up.pid).children(recursive=True)
    for number in range(300):
        key = f"{number:03}"
        body = eicar() + b" " * number if key in infected else b"%d" % number
        (folder.drop / key).write_bytes(body)
    wait_for(lambda: len(results(up)) >= 50)
    os.kill(up.pid, signal.SIGKILL)
    up.stop()
    assert not psutil.wait_procs(children, 5)[1]
    assert len(results(up)) < 300, "it was too fast to be killed in the middle"

    with folder.up(BUCKETWARD_QUEUE__LEASE="5"):
        wait_for(lambda: {path.name for path in folder.drop.iterdir()} & infected == set())
        with folder.ledger() as ledger:
            store = FileStore(folder.drop)
            infos = store.list().items
            assert len(infos) == 200
            wait_for(lambda: all(ledger.verdicts(infos)), 60)
            assert {verdict.verdict for verdict in ledger.verdicts(infos)} == {"Clean"}
            store.close()
    assert sorted(map(len, folder.quarantined())) == sorted(
        len(eicar()) + int(key) for key in infected
    )


def test_a_clamd_that_is_killed_again_and_again_costs_no_verdict(folder):
    stop = threading.Event()

    def kill():
        while not stop.wait(0.4):
            for child in psutil.Process(up.pid).children(recursive=True):
                if child.name() == "clamd":
                    child.kill()

    with folder.up() as up:
        up.wait_for('"ready"')
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            for number in range(150):
                body = eicar() if number % 10 == 0 else b"%d" % number
                (folder.drop / f"{number:03}").write_bytes(body)
            time.sleep(1.5)
        finally:
            stop.set()
            killer.join()
        wait_for(lambda: len(results(up)) == 150, 60)
        for key, records in results(up).items():
            expected = "Infected" if int(key) % 10 == 0 else "Clean"
            assert records[-1]["verdict"] == expected, records
    assert len(folder.quarantined()) == 15


def test_new_signatures_are_picked_up(folder):
    with folder.up() as up:
        (folder.drop / "before").write_bytes(MARK)
        assert verdict_of(up, "before") == "Clean"
        (folder.data / "signatures" / "own.ndb").write_text(f"Own.Test:0:*:{MARK.hex()}\n")
        up.wait_for("judging by", 40)
        (folder.drop / "after").write_bytes(MARK)
        assert verdict_of(up, "after") == "Infected"


# -- buckets -------------------------------------------------------------------------------------


def test_directories_are_protected_while_it_runs(folder):
    other = folder.path / "oth er%41"
    other.mkdir()
    (other / "old.com").write_bytes(eicar())
    with folder.up() as up:
        up.wait_for('"ready"')
        done = folder.run("bucket", "protect", other.name)
        assert (done.returncode, done.stderr) == (0, "")
        bucket = f"file://{folder.path}/oth er%2541"
        assert done.stdout.startswith(f"{bucket} is protected now")
        assert "already" in folder.run("bucket", "protect", str(other)).stdout

        assert verdict_of(up, "old.com") == "Infected"
        (other / "new.com").write_bytes(eicar())
        assert verdict_of(up, "new.com") == "Infected"
        wait_for(lambda: not list(other.glob("*.com")))

        listed = [json.loads(line) for line in folder.run("bucket", "list").stdout.splitlines()]
        assert {line["bucket"] for line in listed} == {bucket, f"file://{folder.drop}"}
        assert folder.run("bucket", "unprotect", str(other)).returncode == 0
        up.wait_for("is not watched any more")
        (other / "later.com").write_bytes(eicar())
        (folder.drop / "fence").write_bytes(b"x")
        assert verdict_of(up, "fence") == "Clean"
        assert "later.com" not in results(up)

    unknown = folder.run("bucket", "unprotect", "file:///nowhere")
    assert unknown.returncode == 2
    assert "is not protected" in unknown.stderr


def test_what_would_go_in_circles_is_refused(folder):
    folder.run("bucket", "list")
    for url in (f"file://{folder.data}", f"file://{folder.quarantine}"):
        done = folder.run("bucket", "protect", url)
        assert done.returncode == 64, url
        assert "quarantine" in done.stderr
    assert folder.run("bucket", "list").stdout == ""


# -- check ---------------------------------------------------------------------------------------


def checked(done):
    """Return the names that `check` printed, and what it said of those with a problem."""
    lines = done.stdout.splitlines()
    assert all(re.match(r"(ok      |PROBLEM )\S", line) for line in lines)
    problems = [line[8:] for line in lines if line.startswith("PROBLEM")]
    return [line[8:] for line in lines if line.startswith("ok")], problems


def test_check_finds_nothing_wrong_where_nothing_is(folder):
    port = free_port()
    with folder.up(**receiver(port)):
        while_up = folder.run("check", **receiver(port))
        assert while_up.returncode == 0, while_up
    done = folder.run("check", **receiver(free_port()))
    assert done.returncode == 0, done
    good, problems = checked(done)
    assert problems == []
    for name in (
        "state",
        "queue",
        "engine clamav",
        "spool",
        "receiver",
        "policies",
        "bucket file:///",
    ):
        assert any(line.startswith(name) for line in good), name
    assert "DEMONSTRATION" in done.stdout


def receiver(port):
    return {
        "BUCKETWARD_RECEIVER__ENABLED": "1",
        "BUCKETWARD_RECEIVER__PORT": str(port),
        "BUCKETWARD_RECEIVER__SECRET": "x" * 16,
    }


def test_check_names_each_problem_and_what_to_do(folder):
    with folder.up():
        pass
    folder.drop.rmdir()
    (folder.path / "bucketward.toml").write_text(
        f"""
        quarantine = "file://{folder.path}"
        protect = []
        [engines.clamav]
        url = "clamav:///nowhere/clamd.ctl"
        [engines.yara]
        rules = "rules"
        [notifiers.hook]
        url = "https://hook.invalid/"
        """
    )
    (folder.path / "rules").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        began = time.monotonic()
        done = folder.run("check", **receiver(taken.getsockname()[1]))
        assert time.monotonic() - began < 30
    assert done.returncode == 2
    _, problems = checked(done)
    said = {" ".join(line.split()[:2]).rstrip(":"): line for line in problems}
    assert "/nowhere/clamd.ctl" in said["engine clamav"]
    assert "no rules" in said["engine yara"]
    assert "secret" in said["notifier hook"]
    assert "receiver.port" in next(line for line in problems if line.startswith("receiver"))
    assert "contains" in next(line for line in problems if line.startswith("policies"))
    assert "no directory" in said[f"bucket file://{folder.drop}"].lower() or str(
        folder.drop
    ) in str(said)


def test_a_port_that_is_taken_stops_the_start(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = folder.run("up", **receiver(taken.getsockname()[1]))
    assert done.returncode == 64
    assert "receiver.port" in done.stderr


# -- the terminal --------------------------------------------------------------------------------


def test_no_name_can_forge_a_line_on_the_terminal(folder):
    names = ["\x1b[2J\x1b[1;1H", "a\nInfected        b", "c\r\x1b[31mClean", "\u202egpj.exe"]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "bucketward", "up"],
        cwd=folder.path,
        env=folder.environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""

    def read_until(condition):
        nonlocal shown
        end = time.monotonic() + 30
        while not condition(shown):
            assert time.monotonic() < end, shown
            if select.select([ours], [], [], 1)[0]:
                shown += os.read(ours, 65536)

    try:
        read_until(lambda text: b"  ready" in text)
        time.sleep(0.5)  # the comparison at the start finds nothing
        assert b"{" not in shown
        for name in names:
            (folder.drop / name).write_bytes(eicar())
        read_until(lambda text: text.count(b"warning: Infected  ") >= len(names))
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        os.close(ours)
    text = shown.decode()
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if line]
    assert all(re.match(r"\d\d:\d\d:\d\d  \S", line) for line in lines)
    assert all(line.isprintable() for line in lines)
    assert len([line for line in lines if line[10:].startswith("warning: Infected  ")]) == len(
        names
    )
    assert "DEMONSTRATION" in text
    assert r"\x1b[2J\x1b[1;1H" in text
    assert len(folder.quarantined()) == len(names)
