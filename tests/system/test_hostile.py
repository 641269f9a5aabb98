"""What an attacker sends, and what goes wrong with ClamAV: none of it is Clean, none stays stuck."""

import bz2
import gzip
import io
import lzma
import os
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import hostile
from bucketward.engines import containers
from bucketward.engines.clamav import ClamAVEngine, Limits, _Managed, demo_signatures, open_clamav
from bucketward.engines.clamd import Clamd
from bucketward.errors import Unavailable
from bucketward.model import EngineReport, Reason, Verdict
from bucketward.testing.engine import eicar, spool

LIMITS = Limits(scan_size=100 << 20, files=10_000, threads=8)
TEST_FILES = Path("/usr/share/clamav-testfiles")


@contextmanager
def managed(data: Path, signatures: Path | None = None, **options) -> Iterator[ClamAVEngine]:
    options.setdefault("limits", LIMITS)
    engine = open_clamav(
        "clamav:managed", data_dir=data, signatures_dir=signatures, poll=0.1, **options
    )
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[ClamAVEngine]:
    with managed(tmp_path_factory.mktemp("hostile")) as engine:
        yield engine


def judge(engine: ClamAVEngine, body: bytes, seconds: float = 60, **how) -> EngineReport:
    with spool(body) as file:
        return engine.scan(file, time.monotonic() + seconds, **how)


def until(true: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def daemon_of(engine: ClamAVEngine) -> psutil.Process:
    return psutil.Process(engine._managed.clamd.wait(time.monotonic() + 20).pid)


@pytest.mark.parametrize("case", hostile.HOSTILE, ids=lambda case: case.name)
def test_a_hostile_file_is_not_clean(engine: ClamAVEngine, case: hostile.Hostile):
    report = judge(engine, case.make(eicar()))

    if case.found and report.verdict is Verdict.INFECTED:
        return
    assert report.verdict is Verdict.UNSCANNABLE
    assert set(report.coverage) & case.reasons


def test_an_infection_in_ten_archives_is_found(engine: ClamAVEngine):
    assert judge(engine, hostile.nested(eicar(), 10)).verdict is Verdict.INFECTED


@pytest.mark.parametrize(
    "make",
    [
        lambda p: hostile.zipped({"a": p}),
        lambda p: hostile.zipped({"a": p}, zipfile.ZIP_BZIP2),
        lambda p: b"#!/bin/sh\nexit\n" + hostile.zipped({"a": p}),
        hostile.seven_zip,
        hostile.tarred,
        lambda p: hostile.tarred(p, "w:gz"),
        lambda p: hostile.tarred(p, "w:xz"),
        gzip.compress,
        lambda p: gzip.compress(b"a") + gzip.compress(p),
        bz2.compress,
        lzma.compress,
        hostile.pdf,
        hostile.ooxml,
    ],
    ids=[
        "zip",
        "zip-bz2",
        "zip-behind-script",
        "7z",
        "tar",
        "tgz",
        "txz",
        "gz",
        "gz-twice",
        "bz2",
        "xz",
        "pdf",
        "docx",
    ],
)
def test_a_whole_container_is_judged_by_what_is_in_it(engine: ClamAVEngine, make):
    clean = judge(engine, make(b"nothing to see" * 2000))

    assert (clean.verdict, clean.coverage, clean.message) == (Verdict.CLEAN, (), "")
    assert judge(engine, make(b"x" * 3000 + eicar())).verdict is Verdict.INFECTED


def _streamed_zip() -> bytes:
    """Return a zip as written to a pipe: sizes stand behind the members."""

    class Pipe(io.RawIOBase):
        def __init__(self):
            self.parts = []

        def writable(self):
            return True

        def write(self, data):
            self.parts.append(bytes(data))
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"text" * 1000)
        archive.writestr("folder/", b"")
    return b"".join(pipe.parts)


def _zip64() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, archive.open("a", "w", force_zip64=True) as member:
        member.write(b"text" * 1000)
    return out.getvalue()


def _odd_tar() -> bytes:
    """Return one with no end blocks, links, long names, and a last member without padding."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "target"
        archive.addfile(link)
        member = tarfile.TarInfo("name" * 60)
        member.size = 700
        archive.addfile(member, io.BytesIO(b"t" * 700))
        end = archive.offset
    return out.getvalue()[: end - 300]


@pytest.mark.parametrize(
    "body",
    [
        hostile.zipped({}),
        _streamed_zip(),
        _zip64(),
        _odd_tar(),
        hostile.tarred(b"x") + bytes(50_000),
        gzip.compress(b"x") + bytes(512),
        hostile.pdf(b"x") + b"\r\n\0\0\0",
        hostile.pdf(b"x") + b"<!-- a web server's comment -->" * 100,
        b"PK is not always a zip",
        b"BZhello",
        b"LZIP is a program",
        b"A text about %PDF-1.4 and its syntax: 1 0 obj\n",
        b"HTTP/1.1 200 OK\n\n" + hostile.pdf(b"x"),
        b"BZ",
        b"\x1f",
        b"\xff\xd8\xff\xe0" + b"JFIF" * 50,
        b"MZ" + bytes(300),
        b"%PDX-1.4",
        b"To: be or not to be\nthat is the question\n",
    ],
)
def test_an_unusual_file_without_fault_is_clean(engine: ClamAVEngine, body: bytes):
    report = judge(engine, body)

    assert (report.verdict, report.message) == (Verdict.CLEAN, "")


@pytest.mark.parametrize(
    "body",
    [
        hostile.zipped({"a": hostile.filler(eicar())}, zipfile.ZIP_LZMA),
        bz2.compress(b"harmless") + bz2.compress(eicar()),
        lzma.compress(eicar(), format=lzma.FORMAT_ALONE),
        hostile.rar5(b"harmless"),
        hostile.rar4(b"harmless"),
        b"\x28\xb5\x2f\xfd" + bytes(100),
        b"!<arch>\n" + bytes(100),
    ],
    ids=["zip-lzma", "bz2-twice", "lzma", "rar5", "rar4", "zstd", "ar"],
)
def test_what_clamav_does_not_open_is_not_clean(engine: ClamAVEngine, body: bytes):
    report = judge(engine, body)

    assert report.verdict is Verdict.UNSCANNABLE
    assert report.coverage == (Reason.CONTAINER_UNOPENED,)


@pytest.mark.parametrize("method", ["BZIP2", "DEFLATE", "PPMD", "BROTLI", "DELTA"])
def test_what_clamav_does_not_unpack_in_7z_is_not_clean(engine: ClamAVEngine, method: str):
    import py7zr

    first = {"id": getattr(py7zr, f"FILTER_{method}")}
    if method == "PPMD":
        first |= {"order": 6, "mem": 24}
    if method == "BROTLI":
        first |= {"level": 3}
    filters = [first] + ([{"id": py7zr.FILTER_LZMA2, "preset": 5}] if method == "DELTA" else [])
    out = io.BytesIO()
    with py7zr.SevenZipFile(out, "w", filters=filters) as archive:
        archive.writestr(hostile.filler(eicar()) + b"A" * 5000 + eicar(), "member")
    report = judge(engine, out.getvalue())

    assert report.verdict is Verdict.INFECTED or report.coverage == (Reason.CONTAINER_UNOPENED,)


def _pdf_with(stream_is_packed: bool, password: str) -> bytes:
    import pypdf
    from pypdf.generic import NameObject, StreamObject

    writer = pypdf.PdfWriter()
    writer.add_blank_page(200, 200)
    stream = StreamObject()
    stream._data = b"A" * 5000 + eicar()
    stream[NameObject("/Type")] = NameObject("/EmbeddedFile")
    writer._add_object(stream.flate_encode() if stream_is_packed else stream)
    writer.encrypt(password, "owner", algorithm="AES-256")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


@pytest.mark.parametrize("password", ["", "secret"])
@pytest.mark.parametrize("stream_is_packed", [False, True])
def test_an_encrypted_pdf_is_clean_only_if_it_could_be_read(
    engine: ClamAVEngine, stream_is_packed: bool, password: str
):
    """ClamAV decrypts with an empty password, but only streams that have a filter."""
    report = judge(engine, _pdf_with(stream_is_packed, password))

    if stream_is_packed and not password:
        assert report.verdict is Verdict.INFECTED
    else:
        assert report.coverage == (Reason.ENCRYPTED,)


def test_a_flipped_bit_in_an_archive_is_corrupt(engine: ClamAVEngine):
    for whole in (hostile.zipped({"a": hostile.filler(b"")}), gzip.compress(hostile.filler(b""))):
        broken = bytearray(whole)
        broken[len(broken) // 2] ^= 0x10

        assert judge(engine, bytes(broken)).coverage == (Reason.CORRUPT,)


def test_every_kind_of_container_that_debian_tests_is_opened(tmp_path):
    """One hash of the program inside is enough to find it in all."""
    source = tmp_path / "signatures"
    source.mkdir()
    line = subprocess.run(
        ["sigtool", "--md5", TEST_FILES / "clam.exe"], check=True, capture_output=True, text=True
    ).stdout
    (source / "test.hdb").write_text(line.replace("clam.exe", "Test.Hash.MD5"))
    missed = []
    with managed(tmp_path / "data", source) as engine:
        files = sorted(TEST_FILES.iterdir())
        for path in files:
            report = judge(engine, path.read_bytes())
            if report.verdict is not Verdict.INFECTED:
                missed.append((path.name, report))

    assert len(files) >= 44
    assert not missed


def test_whole_files_of_every_kind_that_debian_tests_are_not_called_broken(engine: ClamAVEngine):
    wrong = []
    for path in sorted(TEST_FILES.iterdir()):
        report = judge(engine, path.read_bytes())
        if report.verdict is not Verdict.CLEAN:
            wrong.append((path.name, report.coverage, report.message))

    assert not wrong


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        (
            ("a.ndb", "Html:3:*:" + b"hidden-marker".hex()),
            b"<html><body>"
            + b"word " * 9_000_000
            + b"".join(b"&#%d;" % c for c in b"hidden-marker"),
        ),
        (
            ("a.ndb", "Script:7:*:" + b"scriptmarker".hex()),
            b"// a script\n" + b"word word\n" * 2_200_000 + b"scriptMARKER\n",
        ),
        (
            ("a.ldb", f"Pcre;Engine:81-255,Target:0;0&1;{b'anchor'.hex()};0/mark[0-9]{{3}}er/"),
            b"anchor" + b"word word\n" * 11_000_000 + b"mark123er",
        ),
    ],
    ids=["MaxHTMLNormalize", "MaxScriptNormalize", "PCREMaxFileSize"],
)
def test_limits_of_which_clamd_says_nothing_do_not_hide_an_infection(tmp_path, signature, body):
    """With the limits that clamd has by default, it says OK of each of these."""
    source = tmp_path / "signatures"
    source.mkdir()
    (source / signature[0]).write_text(signature[1] + "\n")
    with managed(tmp_path / "data", source, limits=Limits()) as engine:
        report = judge(engine, body)

    assert report.verdict is Verdict.INFECTED


def test_a_sparse_file_of_three_gigabytes_is_too_large(engine: ClamAVEngine):
    with spool(eicar(), size=3 << 30) as file:
        started = time.monotonic()
        report = engine.scan(file, started + 60)

    assert report.coverage == (Reason.TOO_LARGE,)
    assert time.monotonic() - started < 1


def test_clamd_hangs_and_is_replaced_at_the_deadline(tmp_path):
    with managed(tmp_path) as engine:
        judge(engine, b"warm")
        hung = daemon_of(engine)
        hung.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with ThreadPoolExecutor(8) as threads:
            late = threads.submit(judge, engine, b"the one with little time", 1.0)
            neighbours = [threads.submit(judge, engine, eicar(), 30) for _ in range(6)]
            verdicts = {future.result().verdict for future in neighbours}
        took = time.monotonic() - started
        fresh = daemon_of(engine)

    assert late.result().coverage == (Reason.TIMED_OUT,)
    assert verdicts == {Verdict.INFECTED}
    assert fresh.pid != hung.pid
    assert took < 10


def test_one_hang_costs_one_file_of_those_that_began_together(tmp_path):
    with managed(tmp_path) as engine:
        judge(engine, b"warm")
        daemon_of(engine).send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor(8) as threads:
            reports = list(threads.map(lambda _: judge(engine, eicar(), 2.0), range(8)))

    late = [report for report in reports if report.coverage == (Reason.TIMED_OUT,)]
    assert len(late) == 1
    assert sum(report.verdict is Verdict.INFECTED for report in reports) == 7


def test_clamd_is_killed_and_every_file_still_gets_its_verdict(tmp_path):
    with managed(tmp_path) as engine, ThreadPoolExecutor(6) as threads:
        judge(engine, b"warm")
        work = [
            threads.submit(judge, engine, eicar() if n % 2 else b"clean %d" % n, 60)
            for n in range(600)
        ]
        for _ in range(3):
            daemon_of(engine).kill()
            time.sleep(0.3)
        verdicts = [future.result().verdict for future in work]

    assert verdicts == [Verdict.INFECTED if n % 2 else Verdict.CLEAN for n in range(600)]


def test_one_engine_ends_the_hung_clamd_that_another_one_started(tmp_path):
    with managed(tmp_path) as first:
        judge(first, b"warm")
        with managed(tmp_path) as second:
            judge(second, b"warm")
            hung = daemon_of(second)
            hung.send_signal(signal.SIGSTOP)
            report = judge(second, b"x", 0.5)
            verdicts = {judge(engine, eicar()).verdict for engine in (first, second)}
            pids = {daemon_of(engine).pid for engine in (first, second)}

    assert report.coverage == (Reason.TIMED_OUT,)
    assert verdicts == {Verdict.INFECTED}
    assert len(pids) == 1
    assert hung.pid not in pids


def mad(tmp_path: Path) -> ClamAVEngine:
    program = tmp_path / "clamd"
    script = Path(__file__).parents[1] / "servers" / "mad_clamd.py"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    clamd = Clamd(tmp_path / "data", demo_signatures(), program=str(program), user="root")
    return ClamAVEngine(_Managed(clamd), containers.Examiner())


def test_a_file_that_kills_clamd_takes_nobody_with_it(tmp_path):
    engine = mad(tmp_path)
    try:
        judge(engine, b"warm")
        with ThreadPoolExecutor(6) as threads:
            neighbours = [threads.submit(judge, engine, b"slow %d" % n, 60) for n in range(3)]
            time.sleep(0.2)
            with pytest.raises(Unavailable):
                judge(engine, b"die", 60)
            verdicts = {future.result().verdict for future in neighbours}
        alone = judge(engine, b"die", 60, alone=True)
        after = judge(engine, b"fine", 60)
    finally:
        engine.close()

    assert verdicts == {Verdict.CLEAN}
    assert alone.verdict is Verdict.ERROR
    assert alone.coverage == (Reason.ENGINE_FAILED,)
    assert after.verdict is Verdict.CLEAN


def test_a_file_that_makes_clamd_hang_or_babble_is_not_clean(tmp_path):
    engine = mad(tmp_path)
    try:
        hung = judge(engine, b"hang", 1.0)
        alone = judge(engine, b"hang", 1.0, alone=True)
        with pytest.raises(Unavailable):
            judge(engine, b"babble", 30)
        after = judge(engine, b"fine", 60)
    finally:
        engine.close()

    assert hung.coverage == alone.coverage == (Reason.TIMED_OUT,)
    assert after.verdict is Verdict.CLEAN


def endless(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"x" * 65_536)


RUBBISH: dict[str, Callable[[socket.socket], object]] = {
    "closes": lambda c: None,
    "nothing": lambda c: c.sendall(b"\0"),
    "garbage": lambda c: c.sendall(b"\xff\xfe\x00\x01" * 100),
    "bare-ok": lambda c: c.sendall(b"OK\0"),
    "stream-ok-without-id": lambda c: c.sendall(b"stream: OK\0"),
    "other-id": lambda c: c.sendall(b"2: stream: OK\0"),
    "no-end": lambda c: c.sendall(b"1: stream: OK"),
    "newline-end": lambda c: c.sendall(b"1: stream: OK\n"),
    "two-answers": lambda c: c.sendall(b"1: stream: OK\x001: stream: OK\0"),
    "ok-inside": lambda c: c.sendall(b"1: stream: not OK\0"),
    "lower-case": lambda c: c.sendall(b"1: stream: ok\0"),
    "error": lambda c: c.sendall(b"1: stream: Can't allocate memory ERROR\0"),
    "http": lambda c: c.sendall(b"HTTP/1.1 200 OK\r\n\r\nOK"),
    "endless": endless,
    "found-nothing": lambda c: c.sendall(b"1: stream:  FOUND\0"),
}


def stream(connection: socket.socket) -> bytes:
    """Return what comes by INSTREAM."""
    assert connection.recv(10, socket.MSG_WAITALL) == b"zINSTREAM\0"
    body = b""
    while size := int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big"):
        body += connection.recv(size, socket.MSG_WAITALL)
    return body


@contextmanager
def talker(say: Callable[[socket.socket], object]) -> Iterator[int]:
    """Listen like clamd, pass the tests that a client makes first, then `say` something."""
    stopping = threading.Event()
    heard = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(5)
            try:
                head = connection.recv(11, socket.MSG_WAITALL)
                if head.startswith(b"zVERSION"):
                    connection.sendall(b"ClamAV 1.4.6\0")
                    return
                if b"PK\3\4" in stream(connection):
                    connection.sendall(
                        b"1: stream: Heuristics.Limits.Exceeded.MaxRecursion FOUND\0"
                    )
                    stream(connection)
                    connection.sendall(b"2: stream: Heuristics.Encrypted.Zip FOUND\0")
                    connection.recv(1)
                    return
                heard.set()
                say(connection)
            except OSError:
                return

    def accept() -> None:
        while not stopping.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                continue
            threading.Thread(target=serve, args=[connection], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            stopping.set()
            thread.join()
    assert heard.is_set()


@pytest.mark.parametrize("say", RUBBISH.values(), ids=RUBBISH)
def test_what_is_no_answer_is_never_clean(say):
    with talker(say) as port:
        engine = open_clamav(f"clamav://127.0.0.1:{port}")
        try:
            with pytest.raises(Unavailable):
                judge(engine, b"clean", 5)
        finally:
            engine.close()


def test_an_answer_that_trickles_in_past_the_deadline_is_timed_out():
    def trickle(connection: socket.socket) -> None:
        for byte in b"1: stream: OK\0":
            connection.sendall(bytes([byte]))
            time.sleep(0.3)

    with talker(trickle) as port:
        engine = open_clamav(f"clamav://127.0.0.1:{port}")
        started = time.monotonic()
        report = judge(engine, b"clean", 1.0)
        took = time.monotonic() - started
        engine.close()

    assert report.coverage == (Reason.TIMED_OUT,)
    assert took < 2


def test_new_signatures_are_followed_and_broken_ones_refused(tmp_path, caplog):
    source = tmp_path / "signatures"
    source.mkdir(mode=0o700)
    (source / "one.ndb").write_bytes(next(demo_signatures().glob("*.ndb")).read_bytes())
    (source / "one.ndb").chmod(0o600)
    with managed(tmp_path / "data", source) as engine:
        first = judge(engine, eicar())
        (source / "two.ndb").write_text("Brand.New:0:*:" + b"brand-new".hex() + "\n")
        until(lambda: engine.signatures() != first.signatures)
        second = judge(engine, b"it is brand-new")
        (source / "three.ndb").write_text("this is : no signature\n\0\xff" * 20)
        until(lambda: "stay in use" in caplog.text)
        third = judge(engine, b"it is brand-new")
        (source / "three.ndb").unlink()
        (source / "two.ndb").unlink()
        until(lambda: engine.signatures() == first.signatures)
        fourth = judge(engine, b"it is brand-new")

    assert first.verdict is second.verdict is third.verdict is Verdict.INFECTED
    assert first.signatures.is_demo
    assert not second.signatures.is_demo
    assert second.signatures == third.signatures
    assert second.signatures.count == 2
    assert fourth.verdict is Verdict.CLEAN


def test_scans_go_on_while_signatures_change(tmp_path):
    source = tmp_path / "signatures"
    source.mkdir()
    demo = next(demo_signatures().glob("*.ndb")).read_bytes()
    (source / "one.ndb").write_bytes(demo)
    with managed(tmp_path / "data", source) as engine, ThreadPoolExecutor(4) as threads:
        stop = threading.Event()

        def scan() -> set[Verdict]:
            seen = set()
            while not stop.is_set():
                seen.add(judge(engine, eicar()).verdict)
            return seen

        work = [threads.submit(scan) for _ in range(4)]
        try:
            judge(engine, b"warm")
            for number in range(3):
                before = engine.signatures()
                (source / f"{number}.ndb").write_text(f"New.{number}:0:*:{os.urandom(8).hex()}\n")
                until(lambda before=before: engine.signatures() != before)
        finally:
            stop.set()
        verdicts = set().union(*(future.result() for future in work))

    assert verdicts == {Verdict.INFECTED}


def test_new_signatures_are_loaded_where_memory_holds_one_set_only(tmp_path, monkeypatch, caplog):
    source = tmp_path / "signatures"
    source.mkdir()
    (source / "one.ndb").write_text("One:0:*:" + b"number-one".hex() + "\n")
    monkeypatch.setattr("bucketward.engines.clamd._memory_available", lambda: 0)
    with managed(tmp_path / "data", source) as engine:
        before = judge(engine, b"number-two").signatures
        (source / "two.ndb").write_text("Two:0:*:" + b"number-two".hex() + "\n")
        until(lambda: "are available" in caplog.text)
        after = judge(engine, b"number-two")
        (source / "three.ndb").write_text("no signature\0\xff")
        until(lambda: "does not start" in caplog.text)
        until(lambda: judge(engine, b"number-two").signatures == after.signatures)

    assert before != after.signatures
    assert after.verdict is Verdict.INFECTED


def test_signatures_that_are_all_broken_are_named_as_the_problem(tmp_path):
    source = tmp_path / "signatures"
    source.mkdir()
    (source / "bad.ndb").write_text("this is : no signature\n")
    with managed(tmp_path / "data", source) as engine:
        with pytest.raises(Unavailable, match="does not start with the signatures"):
            judge(engine, b"x", 20)
        (source / "bad.ndb").write_text("Good:0:*:" + b"good-one".hex() + "\n")
        until(lambda: not _unavailable(engine))
        report = judge(engine, b"good-one")

    assert report.verdict is Verdict.INFECTED


def _unavailable(engine: ClamAVEngine) -> bool:
    try:
        engine.ping()
    except Unavailable:
        return True
    return False


def test_clamd_has_no_rights_and_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    with managed(tmp_path) as engine:
        daemon = daemon_of(engine)
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        network = Path(f"/proc/{daemon.pid}/net/dev").read_text()

        assert set(daemon.environ()) <= {"PATH", "LC_CTYPE"}
        assert "NoNewPrivs:\t1" in status
        assert "eth0" not in network
        if os.geteuid() == 0:
            assert 0 not in daemon.uids()
            assert "CapEff:\t0000000000000000" in status


OWNER = """
import sys, time
from pathlib import Path
from bucketward.engines.clamav import open_clamav
engine = open_clamav("clamav:managed", data_dir=Path(sys.argv[1]), poll=0.1)
while True:
    try:
        engine.ping()
        break
    except Exception:
        time.sleep(0.02)
print("ready", flush=True)
time.sleep(1000)
"""


def test_processes_share_one_clamd_and_the_next_takes_over(tmp_path):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, tmp_path],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert owner.stdout.readline() == b"ready\n"
        with managed(tmp_path, limits=None) as engine:
            before = judge(engine, eicar())
            daemon = daemon_of(engine)
            children = psutil.Process(owner.pid).children()
            assert [child.pid for child in children] == [daemon.pid]
            owner.kill()
            owner.wait()
            until(lambda: not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE)
            after = judge(engine, eicar())
            assert daemon_of(engine).ppid() == os.getpid()
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()

    assert before.verdict is after.verdict is Verdict.INFECTED
    assert before.signatures == after.signatures


def test_nothing_is_left_running_or_lying_about(tmp_path):
    with managed(tmp_path) as engine:
        judge(engine, hostile.zipped({"a": eicar()}))
        judge(engine, hostile.zipped({"a": b"clean"}))
        judge(engine, hostile.nested(b"x", 42))
        daemon = daemon_of(engine)
        workers = [worker._process.pid for worker in engine._examiner._workers._idle]
    left = [path.name for path in (tmp_path / "clamd").rglob("*") if path.is_file()]

    assert not daemon.is_running()
    assert len(workers) == 1
    assert not psutil.pid_exists(workers[0])
    assert left in ([], ["lock"])
