"""ClamAV keeps the contract: managed, external by socket and external by network."""

import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bucketward.engines.clamav import Limits, demo_signatures, open_clamav
from bucketward.errors import ConfigError, Unavailable
from bucketward.interfaces import Engine
from bucketward.model import Reason, Verdict
from bucketward.testing.engine import EngineSuite, eicar, spool
from servers.clamd import External, run_clamd

LIMITS = Limits(scan_size=200 << 20, files=10_000, threads=8)


@pytest.fixture(scope="module")
def managed(tmp_path_factory) -> Iterator[Engine]:
    engine = open_clamav(
        "clamav:managed", data_dir=tmp_path_factory.mktemp("managed"), limits=LIMITS, poll=0.1
    )
    yield engine
    engine.close()


class TestManagedClamAV(EngineSuite):
    @pytest.fixture
    def engine(self, managed: Engine) -> Engine:
        return managed

    def test_closing_twice_is_fine(self, tmp_path):
        engine = open_clamav("clamav:managed", data_dir=tmp_path)
        engine.close()
        engine.close()

    def test_demonstration_signatures_are_said_to_be_that(self, engine: Engine):
        signatures = engine.signatures()

        assert signatures.is_demo
        assert signatures.count == 1
        assert signatures.updated_at is None
        assert signatures.version.startswith("ClamAV ")


def test_two_that_share_a_clamd_judge_files_alone_without_harm_to_each_other(tmp_path):
    engines = [
        open_clamav("clamav:managed", data_dir=tmp_path, limits=LIMITS, poll=0.1) for _ in "ab"
    ]

    def judge(number):
        body = eicar() if number % 3 == 0 else b"clean %d" % number
        with spool(body) as file:
            alone = number % 4 < 2
            report = engines[number % 2].scan(file, time.monotonic() + 60, alone=alone)
        return number % 3 == 0, report.verdict

    with ThreadPoolExecutor(6) as threads:
        verdicts = set(threads.map(judge, range(24)))
    for engine in engines:
        engine.close()

    assert verdicts == {(True, Verdict.INFECTED), (False, Verdict.CLEAN)}


@pytest.fixture(scope="module")
def clamd(tmp_path_factory) -> Iterator[External]:
    with run_clamd(tmp_path_factory.mktemp("external")) as server:
        yield server


class TestExternalClamAVByDescriptor(EngineSuite):
    @pytest.fixture
    def engine(self, clamd: External) -> Iterator[Engine]:
        engine = open_clamav(f"clamav://{clamd.socket}")
        yield engine
        engine.close()


class TestExternalClamAVByStream(EngineSuite):
    @pytest.fixture
    def engine(self, clamd: External) -> Iterator[Engine]:
        engine = open_clamav(f"clamav://127.0.0.1:{clamd.port}")
        yield engine
        engine.close()

    def test_a_stream_above_the_limit_of_clamd_is_too_large(self, engine: Engine, clamd: External):
        for size in (clamd.stream_limit + 1, clamd.stream_limit * 3):
            with spool(b"", size=size) as file:
                report = engine.scan(file, time.monotonic() + 60)

            assert report.verdict is Verdict.UNSCANNABLE
            assert report.coverage == (Reason.TOO_LARGE,)
        assert self.judge(engine, b"clean").verdict is Verdict.CLEAN


def test_an_external_clamd_that_hides_its_limits_is_refused(tmp_path):
    with run_clamd(tmp_path, alerts=False) as server:
        engine = open_clamav(f"clamav://{server.socket}")
        with pytest.raises(ConfigError, match="AlertExceedsMax yes"):
            engine.ping()
        with spool(b"clean") as file, pytest.raises(ConfigError):
            engine.scan(file, time.monotonic() + 10)
        engine.close()


def test_an_external_clamd_that_is_not_there_is_unavailable(tmp_path):
    for url in (f"clamav://{tmp_path}/none.sock", "clamav://127.0.0.1:1"):
        engine = open_clamav(url)
        with pytest.raises(Unavailable, match="cannot reach clamd"):
            engine.ping()
        with spool(b"x") as file, pytest.raises(Unavailable):
            engine.scan(file, time.monotonic() + 5)


def test_an_external_clamd_that_comes_back_is_used_again(tmp_path):
    with run_clamd(tmp_path / "one") as server:
        engine = open_clamav(f"clamav://{server.socket}")
        with spool(b"clean") as file:
            assert engine.scan(file, time.monotonic() + 10).verdict is Verdict.CLEAN
    with spool(b"clean") as file, pytest.raises(Unavailable):
        engine.scan(file, time.monotonic() + 10)
    with run_clamd(tmp_path / "one"), spool(b"clean") as file:
        assert engine.scan(file, time.monotonic() + 10).verdict is Verdict.CLEAN
    engine.close()


def test_the_date_of_a_database_is_its_own(tmp_path):
    """The date comes from the header of a .cud, as sigtool builds it."""
    build = tmp_path / "build"
    build.mkdir()
    (build / "daily.ndb").write_bytes(next(demo_signatures().glob("*.ndb")).read_bytes())
    (build / "COPYING").touch()  # sigtool insists on one
    subprocess.run(
        ["sigtool", "--unsigned", "--cvd-version=77", "--build=daily.cud", f"--datadir={build}"],
        cwd=build,
        input=b"builder\n",
        check=True,
    )
    source = tmp_path / "signatures"
    source.mkdir()
    (build / "daily.cud").rename(source / "daily.cud")
    engine = open_clamav("clamav:managed", data_dir=tmp_path / "data", signatures_dir=source)
    try:
        with spool(b"x") as file:
            signatures = engine.scan(file, time.monotonic() + 30).signatures
    finally:
        engine.close()

    assert signatures.updated_at is not None
    assert abs(signatures.updated_at.timestamp() - time.time()) < 86_400
    assert "/77/" in signatures.version
    assert not signatures.is_demo


@pytest.mark.parametrize(
    "url", ["clamav:", "clamav:other", "clamd://x", "clamav://host:99999", "clamav://host/path"]
)
def test_a_url_that_makes_no_sense_is_refused(url: str, tmp_path):
    with pytest.raises(ConfigError, match="clamav"):
        open_clamav(url, data_dir=tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"AlertExceedsMax": "no"}, {"VirusEvent": "/bin/sh"}, {"PCREMatchLimit": "1\nUser root"}],
)
def test_options_on_which_verdicts_rest_are_refused(options, tmp_path):
    with pytest.raises(ConfigError, match="verdicts rest"):
        open_clamav("clamav:managed", data_dir=tmp_path, options=options)


def test_a_classification_with_an_unknown_meaning_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no meaning"):
        open_clamav("clamav:managed", data_dir=tmp_path, classify={"X.*": "Harmless"})


def test_a_classification_of_ones_own_comes_first(tmp_path):
    engine = open_clamav("clamav:managed", data_dir=tmp_path, classify={"Eicar-*": "Suspicious"})
    try:
        report = EngineSuite().judge(engine, eicar())
    finally:
        engine.close()

    assert report.verdict is Verdict.SUSPICIOUS


def test_without_signatures_it_says_what_to_do(tmp_path):
    source = tmp_path / "none"
    source.mkdir()
    engine = open_clamav(
        "clamav:managed", data_dir=tmp_path / "data", signatures_dir=source, poll=0.05
    )
    try:
        deadline = time.monotonic() + 10
        while "no signature database" not in _ping_problem(engine):
            assert time.monotonic() < deadline
        with spool(b"x") as file, pytest.raises(Unavailable, match="run freshclam"):
            engine.scan(file, time.monotonic() + 10)
        (source / "some.ndb").write_bytes(next(demo_signatures().glob("*.ndb")).read_bytes())
        while _ping_problem(engine):
            assert time.monotonic() < deadline
    finally:
        engine.close()


def _ping_problem(engine: Engine) -> str:
    time.sleep(0.02)
    try:
        engine.ping()
    except Unavailable as error:
        return str(error)
    return ""


def test_a_data_directory_with_a_long_name_and_no_access_for_others_works(tmp_path):
    data = tmp_path / ("long " * 30) / "data"
    data.mkdir(parents=True)
    data.parent.chmod(0o700)
    data.chmod(0o700)
    engine = open_clamav("clamav:managed", data_dir=data)
    try:
        report = EngineSuite().judge(engine, b"clean")
    finally:
        engine.close()

    assert report.verdict is Verdict.CLEAN
    assert Path(data, "clamd").is_dir()
