"""`bucketward scan` and its neighbours as their users meet them: processes, files, exit codes."""

import fcntl
import hashlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
import zipfile
from contextlib import contextmanager

import psutil
import pytest
import pyzipper

from conftest import eicar
from running import Process
from servers import need

COMMAND = [sys.executable, "-m", "bucketward"]
FIELDS = [
    "bucket",
    "key",
    "version_id",
    "size",
    "sha256",
    "verdict",
    "reasons",
    "findings",
    "seconds",
]
MARK = b"a most peculiar sequence of bytes"
RULE = 'rule Peculiar { strings: $a = "most peculiar" condition: $a }'


@pytest.fixture(autouse=True)
def clamd():
    need("clamd")


@pytest.fixture
def here(tmp_path):
    """Yield a folder to run in, and see that nothing is left of what ran there."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "here").mkdir()
    yield tmp_path / "here"
    left = [p for p in psutil.process_iter(["environ"]) if str(tmp_path) in str(p.info["environ"])]
    for process in left:
        process.kill()
    assert not left
    assert not list((tmp_path / "tmp").glob("bucketward-*"))


def environ(here, **more):
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "HOME": str(here),
        "TMPDIR": str(here.parent / "tmp"),
        "LANG": "C.UTF-8",
        **more,
    }


def run(here, *args, stdin=b"", prefix=(), env=None):
    """Run a command to its end; return it with its results as `lines`."""
    done = subprocess.run(
        [*prefix, *COMMAND, *args],
        check=False,
        cwd=here,
        env=environ(here, **(env or {})),
        input=stdin,
        capture_output=True,
        timeout=60,
    )
    done.err = done.stderr.decode()
    assert "Traceback" not in done.err
    assert "internal error" not in done.err
    done.lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"{")]
    done.verdicts = {line["key"]: line["verdict"] for line in done.lines}
    return done


def scan(here, *targets, **more):
    return run(here, "scan", *targets, **more)


@contextmanager
def started(here, *args, **more):
    """Start a command for the length of a block; nothing of it lives longer."""
    process = subprocess.Popen(
        [*COMMAND, *args],
        cwd=here,
        env=environ(here, **more.pop("env", {})),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def own_signatures(folder):
    folder.mkdir(mode=0o700)
    (folder / "own.ndb").write_text(f"Own.Test:0:*:{MARK.hex()}\n")
    return folder


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def zipped(members, password=None):
    held = io.BytesIO()
    with pyzipper.AESZipFile(held, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        if password:
            archive.setpassword(password)
            archive.setencryption(pyzipper.WZ_AES)
        for name, body in members.items():
            archive.writestr(name, body)
    return held.getvalue()


# -- what there is to scan -----------------------------------------------------------------------


def test_a_mixed_directory_is_told_object_by_object(here):
    drop = here / "drop"
    (drop / "sub").mkdir(parents=True)
    (drop / "clean.txt").write_bytes(b"hello")
    (drop / "empty").write_bytes(b"")
    (drop / "sub" / "evil.zip").write_bytes(zipped({"inner/evil.com": eicar()}))
    (drop / "secret.zip").write_bytes(zipped({"a": b"x"}, password=b"never told"))
    os.symlink("clean.txt", drop / "link")
    os.symlink("/etc", drop / "etc")
    os.mkfifo(drop / "fifo")

    done = scan(here, "drop")

    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == len(done.lines) == 4
    assert done.verdicts == {
        "clean.txt": "Clean",
        "empty": "Clean",
        "secret.zip": "Unscannable",
        "sub/evil.zip": "Infected",
    }
    by_key = {line["key"]: line for line in done.lines}
    for line in done.lines:
        assert list(line)[: len(FIELDS)] == FIELDS
        assert set(line) <= {*FIELDS, "message"}
        assert line["bucket"] == f"file://{drop}"
        assert line["version_id"] is None
        assert isinstance(line["seconds"], float)
    assert by_key["clean.txt"]["size"] == 5
    assert by_key["clean.txt"]["sha256"] == hashlib.sha256(b"hello").hexdigest()
    assert by_key["clean.txt"]["reasons"] == by_key["clean.txt"]["findings"] == []
    assert by_key["secret.zip"]["reasons"] == ["encrypted"]
    [finding] = by_key["sub/evil.zip"]["findings"]
    assert set(finding) == {"engine", "signature", "member"}
    assert finding["engine"] == "clamav"
    assert "eicar" in finding["signature"].lower()
    assert "4 scanned" in done.err
    assert "2 Clean, 1 Infected, 1 Unscannable" in done.err
    assert "DEMONSTRATION SIGNATURES" in done.err


def test_the_exit_code_says_whether_all_is_clean(here):
    (here / "clean").mkdir()
    (here / "clean" / "a").write_bytes(b"a")
    (here / "encrypted.zip").write_bytes(zipped({"a": b"x"}, password=b"never told"))
    (here / "evil").write_bytes(eicar())

    clean = scan(here, "clean", "clean/a")
    assert clean.returncode == 0
    assert [line["key"] for line in clean.lines] == ["a", "a"]
    encrypted = scan(here, "encrypted.zip")
    assert encrypted.returncode == 2
    assert [(encrypted.lines[0]["bucket"], *encrypted.verdicts.items())] == [
        (f"file://{here}", ("encrypted.zip", "Unscannable"))
    ]
    both = scan(here, "encrypted.zip", "evil", "missing")
    assert both.returncode == 1
    assert "missing: there is no such file or directory" in both.err
    assert not (here / "bucketward-data").exists()


def test_what_yields_nothing_is_not_clean(here):
    (here / "nothing").mkdir()
    (here / "links").mkdir()
    (here / "file").write_bytes(b"x")
    os.symlink(here / "file", here / "links" / "link")
    os.symlink(here / "links", here / "link")
    os.mkfifo(here / "fifo")

    targets = ["missing", "nothing", "links", "link", "link/", "fifo"]
    done = scan(here, *targets)

    assert done.returncode == 2
    assert done.stdout == b""
    assert [line.partition(":")[0] for line in done.err.splitlines()[1:-1]] == targets
    assert "0 scanned" in done.err
    # And one such target is enough.
    assert scan(here, "file", "nothing").returncode == 2


def test_names_that_mean_harm_are_only_names(here):
    names = [
        b"-rf",
        b"--help",
        b"new\nline",
        b'quo"te',
        b"\xff\xfe",
        b"\x1b[2J\x1b[31m",
        b"a%2Fb",
        b"s3:",
        "ünï".encode(),
    ]
    folder = here / "dir \n%41?#"
    folder.mkdir()
    for name in names:
        (folder / os.fsdecode(name)).write_bytes(name)
    (folder / "sub").mkdir()
    (folder / "sub" / ".bucketward").write_bytes(eicar())

    done = scan(here, folder.name, "--", "-rf", os.fsdecode(b"gone\x1b[2J\xff\n0 scanned"))

    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == len(names) + 1
    assert {line["sha256"] for line in done.lines} == {
        hashlib.sha256(body).hexdigest() for body in [*names, eicar()]
    }
    assert all(line["bucket"] == f"file://{here}/dir %0A%2541%3F%23" for line in done.lines)
    assert done.verdicts["sub/.bucketward"] == "Infected"
    assert b"\x1b" not in done.stdout + done.stderr
    assert [line.partition(":")[0] for line in done.err.splitlines()[1:-1]] == [
        "-rf",
        r"gone\x1b[2J\udcff\n0 scanned",
    ]

    # The configuration is made of the folder's name as well.
    bare = [os.fsdecode(name) for name in (b"-rf", b"\xff\xfe", b"new\nline")]
    single = run(folder, "scan", "--", *bare, env={"TMPDIR": environ(here)["TMPDIR"]})
    assert single.returncode == 0
    assert [line["size"] for line in single.lines] == [3, 2, 8]
    assert single.lines[0]["key"] == "-rf"


def test_no_folder_hides_behind_the_name_of_our_own(here):
    (here / "d" / ".bucketward").mkdir(parents=True)
    (here / "d" / ".bucketward" / "evil").write_bytes(eicar())
    (here / "f").mkdir()
    (here / "f" / ".bucketward").write_bytes(eicar())

    inside = scan(here, "d")
    assert inside.returncode == 1
    assert inside.verdicts == {"evil": "Infected"}
    assert inside.lines[0]["bucket"] == f"file://{here}/d/.bucketward"
    # The store has no key for such a file: that is said, and is not Clean.
    itself = scan(here, "f")
    assert itself.returncode == 2
    assert list(itself.verdicts.values()) == ["Error"]


def test_standard_input_is_an_object_without_a_bucket(here):
    done = scan(here, "-", stdin=zipped({"evil": eicar()}))
    assert done.returncode == 1
    [line] = done.lines
    assert list(line)[: len(FIELDS)] == FIELDS
    assert (line["bucket"], line["key"], line["version_id"]) == ("", "-", None)
    assert line["sha256"]

    assert scan(here, "-").returncode == 0
    twice = scan(here, "-", "-", stdin=eicar())
    assert twice.returncode == 64
    assert "twice" in twice.err


def test_a_file_beyond_every_engine_is_not_even_read(here):
    with (here / "sparse").open("wb") as file:
        file.write(eicar())
        file.truncate(3 << 30)
    began = time.monotonic()

    done = scan(here, "sparse")

    assert done.returncode == 2
    [line] = done.lines
    assert (line["verdict"], line["reasons"]) == ("Unscannable", ["too-large"])
    assert (line["size"], line["sha256"]) == (3 << 30, None)
    assert time.monotonic() - began < 20


def test_what_may_not_be_read_is_said_and_the_rest_scanned(here):
    more = {}
    if os.geteuid() == 0:
        # Root may read everything, unless that is taken away; then clamd has to be root's as well.
        more["prefix"] = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
        more["env"] = {"BUCKETWARD_ENGINES__CLAMAV__USER": "root"}
    (here / "secret").mkdir(mode=0o700)
    (here / "secret" / "a").write_bytes(b"a")
    (here / "unreadable").write_bytes(b"a")
    (here / "unreadable").chmod(0)
    (here / "readable").write_bytes(eicar())
    (here / "secret").chmod(0)
    (here / "shut").mkdir()
    (here / "shut" / "a").write_bytes(b"a")
    here_mode = here.stat().st_mode
    here.chmod(0o500)  # nothing has to be written into what is scanned

    try:
        done = scan(here, ".", **more)
        alone = scan(here, "secret", "unreadable", **more)
    finally:
        here.chmod(here_mode)
        (here / "secret").chmod(0o700)

    assert done.returncode == 1
    assert done.verdicts == {"readable": "Infected", "shut/a": "Clean", "unreadable": "Error"}
    assert "secret" in done.err
    assert alone.returncode == 2
    assert "secret" in alone.err
    assert alone.verdicts == {"unreadable": "Error"}


# -- what judges ---------------------------------------------------------------------------------


def test_signatures_and_rules_of_ones_own(here):
    own = own_signatures(here / "own")
    rules = here / "rules"
    rules.mkdir()
    (rules / "mine.yar").write_text(RULE.replace("most peculiar", "quite another"))
    (here / "marked").write_bytes(MARK)
    (here / "ruled").write_bytes(b"this is quite another matter")
    (here / "eicar").write_bytes(eicar())

    done = scan(here, "marked", "ruled", "eicar", "--signatures", str(own), "--rules", "rules")

    assert done.returncode == 1
    assert done.verdicts == {"marked": "Infected", "ruled": "Infected", "eicar": "Clean"}
    found = {line["key"]: line["findings"] for line in done.lines}
    assert found["marked"][0]["engine"] == "clamav"
    assert found["marked"][0]["signature"].startswith("Own.Test")
    assert found["ruled"] == [{"engine": "yara", "signature": "Peculiar", "member": ""}]
    assert "DEMONSTRATION" not in done.err


def test_what_to_judge_by_that_is_missing_or_broken_is_said_at_once(here):
    (here / "file").write_bytes(b"x")
    (here / "empty").mkdir()
    (here / "broken").mkdir()
    (here / "broken" / "own.ndb").write_text("this is no signature\n")
    (here / "broken" / "own.yar").write_text("rule Broken { condition: nonsense }")
    began = time.monotonic()

    for option, folder, what in [
        ("--signatures", "missing", "there is no directory missing"),
        ("--signatures", "empty", "holds no ClamAV database"),
        ("--signatures", "broken", "clamd does not start with the signatures"),
        ("--rules", "missing", "there is no directory missing"),
        ("--rules", "empty", "no rules in"),
        ("--rules", "broken", "nonsense"),
    ]:
        done = scan(here, "file", option, folder)
        assert (done.returncode, done.stdout) == (64, b""), (option, folder, done)
        assert what in done.err, (option, folder)
    assert time.monotonic() - began < 60


def test_two_scans_at_once_do_not_meet(here):
    (here / "evil").write_bytes(eicar())
    with started(here, "scan", "evil") as one, started(here, "scan", "evil") as two:
        assert [p.wait(30) for p in (one, two)] == [1, 1]


def test_a_running_up_lends_its_engine(here):
    (here / "evil").write_bytes(eicar())
    data = here / "bucketward-data"
    up = Process(["up"], cwd=here, environ=environ(here), log=here / "up.log")
    try:
        up.wait_for('"ready"')
        before = (data / "clamd" / "current").readlink()
        with started(here, "scan", "-", "evil", stdin=subprocess.PIPE) as process:
            time.sleep(1.5)
            assert not psutil.Process(process.pid).children(recursive=True)
            out, _ = process.communicate(b"hello")
        assert process.returncode == 1
        assert [json.loads(line)["verdict"] for line in out.splitlines()] == ["Clean", "Infected"]
        assert (data / "clamd" / "current").readlink() == before
        own = own_signatures(here / "own")
        assert scan(here, "evil", "--signatures", str(own)).returncode == 0
    finally:
        assert up.stop() == 0
    # And when it is gone, nothing is left to be borrowed.
    assert (data / "clamd" / "lock").exists()
    assert scan(here, "evil").returncode == 1
    assert not (data / "clamd" / "sets").exists()


# -- ends ----------------------------------------------------------------------------------------


def many(here, count=400):
    folder = here / "many"
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:04}").write_bytes(b"%d" % number)
    return folder


def test_a_reader_that_has_seen_enough_is_no_error(here):
    many(here)
    with started(here, "scan", "many") as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 128 + signal.SIGPIPE
        assert process.stderr.read().decode().count("\n") <= 1  # the warning about the demo


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_scan_ends_at_once_and_leaves_nothing(here, number):
    many(here)
    with started(here, "scan", "many", "-", stdin=subprocess.PIPE) as process:
        process.stdout.readline()  # and no more: it may be writing, which must not keep it either
        children = psutil.Process(process.pid).children(recursive=True)
        assert [child for child in children if child.name() == "clamd"]
        # It is either among the files, or waits for standard input: neither may keep it.
        time.sleep(0.2)
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(10) == 128 + number
        assert time.monotonic() - began < 5
        assert b"Traceback" not in process.stderr.read()
        assert not psutil.wait_procs(children, 2)[1]


def test_interrupted_while_the_engine_loads(here):
    (here / "file").write_bytes(b"x")
    with started(here, "scan", "file") as process:
        wait_for(lambda: list((here.parent / "tmp").glob("bucketward-*")))
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert b"Traceback" not in process.stderr.read()


def test_a_killed_scan_takes_its_engine_along(here):
    with started(here, "scan", "-", stdin=subprocess.PIPE) as process:
        children = wait_for(
            lambda: [
                child
                for child in psutil.Process(process.pid).children(recursive=True)
                if child.name() == "clamd"
            ]
        )
        process.kill()
        process.wait()
        assert not psutil.wait_procs(children, 5)[1]
    for folder in (here.parent / "tmp").glob("bucketward-*"):
        subprocess.run(["rm", "-r", folder], check=True)  # what nobody could clean


def test_progress_is_shown_on_a_terminal_and_results_stay_clean(here):
    folder = many(here)
    (folder / "\x1b[31m[red]x").write_bytes(eicar())
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x18\0\x50\0\0\0\0\0")
    shown = b""
    results = (here / "results").open("wb")
    with (
        results,
        started(
            here, "scan", "many", stdin=theirs, stdout=results, stderr=theirs, env={"TERM": "xterm"}
        ) as process,
    ):
        os.close(theirs)
        while select.select([ours], [], [], 30)[0]:
            try:
                shown += os.read(ours, 65536)
            except OSError:
                break
        assert process.wait(20) == 1
    os.close(ours)
    lines = (here / "results").read_bytes().splitlines()
    assert len([json.loads(line) for line in lines]) == 401, shown
    assert b"scanned" in shown
    assert b"\x1b[31m[red]x" not in shown
    # The last thing on the terminal is the summary, alone on its line, the cursor shown again.
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l")
    last = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown.splitlines()[-1])
    assert last.strip().decode().startswith("401 scanned in ")


# -- usage ---------------------------------------------------------------------------------------


def test_help_and_version_are_there_without_anything(here):
    for args in (
        ["--help"],
        ["scan", "--help"],
        ["bucket", "--help"],
        ["bucket", "list", "--help"],
    ):
        done = run(here, *args, env={"BUCKETWARD_NONSENSE": "1"})
        assert done.returncode == 0
        assert b"Usage:" in done.stdout
    assert re.fullmatch(rb"bucketward \d+\.\d+\.\d+\n", run(here, "version").stdout)


@pytest.mark.parametrize(
    "args",
    [[], ["scan"], ["nonsense"], ["scan", "--nonsense", "x"], ["bucket"], ["bucket", "protect"]],
)
def test_wrong_usage_is_64_and_explained(here, args):
    done = run(here, *args)
    assert done.returncode == 64
    assert done.stdout == b""
    assert "Usage: " in done.err


def test_every_problem_of_the_configuration_is_named_at_once(here):
    (here / "bucketward.toml").write_text(
        'quarantine = "nowhere"\n[event]\nthreads = 0\nthread = 1\n[engins.clamav]\n'
    )
    (here / "file").write_bytes(b"x")

    for command in (["scan", "file"], ["up"], ["check"], ["bucket", "list"]):
        done = run(here, *command, env={"BUCKETWARD_RECEIVER__PORT": "many"})
        assert (done.returncode, done.stdout) == (64, b"")
        for what in (
            "quarantine",
            "event.threads",
            "event.thread:",
            "engins",
            "BUCKETWARD_RECEIVER__PORT",
        ):
            assert what in done.err, what
    assert not (here / "bucketward-data").exists()

    missing = run(here, "scan", "file", "--config", "missing.toml")
    assert missing.returncode == 64
    assert "missing.toml" in missing.err
