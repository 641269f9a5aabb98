"""The YARA engine keeps the contract, and its own promises."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import hostile
from bucketward.engines.yara import YaraEngine, open_yara
from bucketward.errors import ConfigError, Error, Unavailable
from bucketward.interfaces import Engine
from bucketward.model import Reason, Verdict
from bucketward.testing.engine import EngineSuite, eicar, spool

EICAR_RULE = f"rule Eicar {{ strings: $a = {{ {eicar().hex()} }} condition: $a }}\n"
MORE = """
private rule Marked { strings: $a = "marker-one" condition: $a }
rule Mild : tag { meta: severity = "suspicious" condition: Marked }
rule Slow { strings: $a = /(a+)+b[^x]{1000,2000}(c|d)+e/ condition: #a > 1000000 and filesize < 0 }
"""
SLEEPS = "rule Long { condition: for all i in (0..filesize * 100000) : (uint8(i % 3) + 1 > 0) }\n"


def rules(folder: Path, text: str = EICAR_RULE + MORE, name: str = "rules.yar") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder


def until(true: Callable[[], bool], seconds: float = 10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def workers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if "yara" in child.cmdline()[-5:]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[Engine]:
    engine = open_yara(f"yara://{rules(tmp_path_factory.mktemp('rules'))}", poll=0.1)
    yield engine
    engine.close()


class TestYaraEngine(EngineSuite):
    @pytest.fixture
    def engine(self, shared: Engine) -> Engine:
        return shared

    @pytest.fixture
    def own(self, tmp_path) -> Iterator[Engine]:
        """Yield an engine whose rules may be changed."""
        engine = open_yara(f"yara://{rules(tmp_path / 'rules')}", poll=0.1)
        yield engine
        engine.close()

    def test_closing_twice_is_fine(self, own: Engine):
        self.judge(own, b"x")
        own.close()
        own.close()

    def test_a_rule_that_says_so_is_suspicious(self, engine: YaraEngine):
        report = self.judge(engine, b"a marker-one b")

        assert report.verdict is Verdict.SUSPICIOUS
        assert [finding.signature for finding in report.findings] == ["Mild"]

    def test_an_infection_beside_a_suspicion_is_infected(self, engine: YaraEngine):
        report = self.judge(engine, b"marker-one" + eicar())

        assert report.verdict is Verdict.INFECTED
        assert {finding.signature for finding in report.findings} == {"Mild", "Eicar"}

    @pytest.mark.parametrize(
        "body",
        [
            hostile.zipped({"a": b"x"}),
            hostile.seven_zip(b"x"),
            hostile.tarred(b"x"),
            hostile.tarred(b"x", "w:gz"),
            hostile.tarred(b"x", "w:bz2"),
            hostile.tarred(b"x", "w:xz"),
            hostile.rar4(b"x"),
            hostile.rar5(b"x"),
            hostile.pdf(b"x"),
            hostile.ooxml(b"x"),
            hostile.encrypted_ooxml(b"x"),
            b"From: a@example.org\r\nTo: b@example.org\r\nMIME-Version: 1.0\r\n\r\nhello\r\n",
            b"\x28\xb5\x2f\xfd" + bytes(20),
            bytes(32_769) + b"CD001" + bytes(2000),
        ],
        ids=[
            "zip",
            "7z",
            "tar",
            "tgz",
            "tbz",
            "txz",
            "rar4",
            "rar5",
            "pdf",
            "docx",
            "encrypted-docx",
            "mail",
            "zstd",
            "iso",
        ],
    )
    def test_a_container_is_never_fully_covered(self, engine: YaraEngine, body: bytes):
        report = self.judge(engine, body)

        assert report.coverage == (Reason.CONTAINER_UNOPENED,)

    def test_a_large_file_that_only_its_owner_may_open(self, tmp_path, engine: YaraEngine):
        path = tmp_path / "large"
        with path.open("wb") as file:
            file.truncate(70 << 20)
            file.seek(0, 2)
            file.write(eicar())
        path.chmod(0o600)
        from bucketward.model import Spooled

        fd = os.open(path, os.O_RDONLY)
        path.unlink()
        try:
            size = os.fstat(fd).st_size
            file = Spooled(fd, size, f"/proc/self/fd/{fd}")
            report = engine.scan(file, time.monotonic() + 60)
        finally:
            os.close(fd)

        assert report.verdict is Verdict.INFECTED

    def test_changed_rules_are_followed(self, tmp_path, own: YaraEngine):
        before = own.signatures()
        rules(tmp_path / "rules", 'rule New { strings: $a = "brand-new" condition: $a }', "b.yara")
        until(lambda: own.signatures() != before)

        assert self.judge(own, b"brand-new").findings[0].signature == "New"
        assert self.judge(own, eicar()).verdict is Verdict.INFECTED

    def test_broken_rules_do_not_replace_good_ones(self, tmp_path, own: YaraEngine, caplog):
        before = own.signatures()
        rules(tmp_path / "rules", "rule Broken {\n condition: nonsense }", "b.yar")
        until(lambda: "b.yar, line 2" in caplog.text)

        assert own.signatures() == before
        assert self.judge(own, eicar()).verdict is Verdict.INFECTED

    def test_a_worker_that_is_killed_is_replaced(self, engine: YaraEngine):
        self.judge(engine, b"x")
        for worker in workers():
            worker.send_signal(signal.SIGKILL)
            worker.wait()

        assert self.judge(engine, eicar()).verdict is Verdict.INFECTED

    def test_workers_have_no_rights_and_no_secrets(self, engine: YaraEngine, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
        self.judge(engine, b"x", alone=False)
        worker = workers()[0]
        status = Path(f"/proc/{worker.pid}/status").read_text()
        network = Path(f"/proc/{worker.pid}/net/dev").read_text()

        assert worker.environ() == {} or set(worker.environ()) <= {"LC_CTYPE"}
        assert "NoNewPrivs:\t1" in status
        if os.geteuid() == 0:
            assert 0 not in worker.uids()
            assert "CapEff:\t0000000000000000" in status
        assert "eth0" not in network


def test_rules_that_do_not_compile_name_file_and_line(tmp_path):
    folder = rules(tmp_path / "rules", "\n\nrule Broken { condition: nonsense }")

    with pytest.raises(ConfigError, match=r"rules\.yar, line 3: unknown identifier"):
        open_yara(f"yara://{folder}")


def test_rules_cannot_include_files(tmp_path):
    folder = rules(tmp_path / "rules", 'include "/etc/passwd"')

    with pytest.raises(ConfigError, match="include"):
        open_yara(f"yara://{folder}")


def test_a_directory_without_rules_is_unavailable_until_there_are_some(tmp_path):
    engine = open_yara(f"yara://{tmp_path}", poll=0.05)
    try:
        with pytest.raises(Unavailable, match="no rules in"):
            engine.ping()
        rules(tmp_path)
        until(lambda: engine._signatures is not None)
        with spool(eicar()) as file:
            report = engine.scan(file, time.monotonic() + 30)
    finally:
        engine.close()

    assert report.verdict is Verdict.INFECTED


def test_a_rule_that_takes_for_ever_is_ended_at_the_deadline(tmp_path):
    engine = open_yara(f"yara://{rules(tmp_path / 'rules', SLEEPS + EICAR_RULE)}", workers=1)
    try:
        with spool(b"x" * 100_000) as file:
            started = time.monotonic()
            report = engine.scan(file, started + 1.5)
            took = time.monotonic() - started
        with spool(b"") as file:
            after = engine.scan(file, time.monotonic() + 30)
    finally:
        engine.close()

    assert report.coverage == (Reason.TIMED_OUT,)
    assert took < 4
    assert after.verdict is not Verdict.ERROR


def test_a_worker_that_dies_is_unavailable_and_alone_an_error(tmp_path):
    # A memory bound that the file does not fit into: the worker ends over this file.
    folder = rules(tmp_path / "rules")
    engine = YaraEngine(folder, workers=1, memory=600 << 20)
    try:
        with spool(eicar()) as file:
            assert engine.scan(file, time.monotonic() + 30).verdict is Verdict.INFECTED
        with spool(b"", size=(64 << 20) - 1) as file:
            engine._workers._memory = engine._compiler._memory = 10 << 20
            engine._workers.renew()
            with pytest.raises(Unavailable):
                engine.scan(file, time.monotonic() + 30)
            report = engine.scan(file, time.monotonic() + 30, alone=True)
    finally:
        engine.close()

    assert report.verdict is Verdict.ERROR
    assert report.coverage == (Reason.ENGINE_FAILED,)


@pytest.mark.parametrize(
    "url", ["yara:rules", "yara://host/rules", "http:///rules", "yara:///no/such"]
)
def test_a_url_that_makes_no_sense_is_refused(url: str):
    with pytest.raises(Error, match="yara"):
        open_yara(url)
