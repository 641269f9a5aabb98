"""What every `Engine` keeps to; `spool` makes the files for it."""

from __future__ import annotations

import fcntl
import io
import os
import random
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from bucketward.errors import Error
from bucketward.interfaces import Engine
from bucketward.model import EngineReport, Reason, Spooled, Verdict

_SEALS = 0x0001 | 0x0002 | 0x0004 | 0x0008  # F_SEAL_SEAL, SHRINK, GROW, WRITE (fcntl(2))
_ADD_SEALS = 1033


@contextmanager
def spool(body: bytes, name: str = "file.bin", *, size: int | None = None) -> Iterator[Spooled]:
    """Yield `body` as a pipeline hands it to an engine: sealed and opened for reading only.

    With `size`, the file is made that long, which takes no room.
    """
    writable = os.memfd_create("spooled", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(writable, "wb", closefd=False) as file:
            file.write(body)
        if size is not None:
            os.ftruncate(writable, size)
        fcntl.fcntl(writable, _ADD_SEALS, _SEALS)
        fd = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writable)
    try:
        yield Spooled(fd, len(body) if size is None else size, f"/proc/self/fd/{fd}", name)
    finally:
        os.close(fd)


def eicar() -> bytes:
    """Return the EICAR test file, assembled here so that a checkout never trips an antivirus."""
    return b"X5O!P%@AP[4\\PZX54(P^)7CC)7}$EICAR-STAND" + b"ARD-ANTIVIRUS-TEST-FILE!$H+H*"


class EngineSuite:
    """Subclass with a fixture `engine`, and `infected` if the engine does not know EICAR.

    `seconds` is how long the engine may take for a small file, start included.
    """

    seconds = 60.0

    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        """Yield the engine to test, loaded and ready."""
        raise NotImplementedError

    @pytest.fixture
    def infected(self) -> bytes:
        """Return a small file that the engine must find."""
        return eicar()

    def judge(
        self, engine: Engine, body: bytes, *, name: str = "file.bin", alone: bool = False
    ) -> EngineReport:
        """Have `body` judged, with time enough, and check what every report keeps to."""
        with spool(body, name) as file:
            report = engine.scan(file, time.monotonic() + self.seconds, alone=alone)

        assert report.engine == engine.name
        assert report.signatures is not None
        assert report.signatures.digest
        assert report.seconds >= 0
        assert all(finding.engine == engine.name for finding in report.findings)
        return report

    def test_is_an_engine(self, engine: Engine) -> None:
        assert isinstance(engine, Engine)
        assert engine.name
        assert engine.max_size > 0

    def test_ping_says_that_it_is_ready(self, engine: Engine) -> None:
        engine.ping()

    def test_clean_bytes_are_clean_and_fully_covered(self, engine: Engine) -> None:
        report = self.judge(engine, b"nothing to see here\n" * 50)

        assert report.verdict is Verdict.CLEAN
        assert report.is_full

    def test_an_infection_is_found(self, engine: Engine, infected: bytes) -> None:
        report = self.judge(engine, infected)

        assert report.verdict is Verdict.INFECTED
        assert report.findings[0].signature

    def test_megabytes_of_noise_are_clean(self, engine: Engine) -> None:
        noise = random.Random(1).randbytes(1000) * 3000  # noqa: S311 - bulk, not a secret

        report = self.judge(engine, noise)

        assert report.verdict is Verdict.CLEAN
        assert report.is_full

    def test_a_file_without_a_byte_is_clean(self, engine: Engine) -> None:
        report = self.judge(engine, b"")

        assert report.verdict is Verdict.CLEAN
        assert report.is_full

    def test_a_file_above_max_size_is_unscannable(self, engine: Engine) -> None:
        with spool(b"", size=engine.max_size + 1) as file:
            report = engine.scan(file, time.monotonic() + self.seconds)

        assert report.verdict is Verdict.UNSCANNABLE
        assert report.coverage == (Reason.TOO_LARGE,)

    def test_a_deadline_that_has_passed_is_timed_out(self, engine: Engine, infected: bytes) -> None:
        for body in (b"clean", infected):
            with spool(body) as file:
                report = engine.scan(file, time.monotonic() - 1)

            assert report.verdict is Verdict.UNSCANNABLE
            assert report.coverage == (Reason.TIMED_OUT,)
        assert self.judge(engine, infected).verdict is Verdict.INFECTED

    def test_a_deadline_that_passes_at_any_moment_never_gives_clean_unread(
        self, engine: Engine, infected: bytes
    ) -> None:
        self.judge(engine, infected)
        for exponent in range(6):
            with spool(infected) as file:
                try:
                    report = engine.scan(file, time.monotonic() + 1e-5 * 4**exponent)
                except Error:
                    continue

            assert report.verdict in (Verdict.INFECTED, Verdict.UNSCANNABLE)
        assert self.judge(engine, infected).verdict is Verdict.INFECTED
        assert self.judge(engine, b"clean").verdict is Verdict.CLEAN

    def test_eight_threads_each_get_their_own_answer(self, engine: Engine, infected: bytes) -> None:
        def one(number: int) -> tuple[bool, Verdict]:
            sick = number % 3 == 0
            body = infected if sick else b"file %d\n" % number * (1 + number % 50)
            return sick, self.judge(engine, body).verdict

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(one, range(200)))

        wrong = [
            (sick, verdict)
            for sick, verdict in answers
            if verdict is not (Verdict.INFECTED if sick else Verdict.CLEAN)
        ]
        assert not wrong

    def test_the_descriptor_is_left_as_it_was(self, engine: Engine, infected: bytes) -> None:
        for body in (infected, b"clean" * 100):
            with spool(body) as file:
                os.lseek(file.fd, 3, os.SEEK_SET)
                engine.scan(file, time.monotonic() + self.seconds)
                position = os.lseek(file.fd, 0, os.SEEK_CUR)
                after = os.pread(file.fd, len(body) + 1, 0)

            assert position == 3
            assert after == body

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "../../../../etc/passwd",
            "/etc/passwd",
            "a\nb: OK",
            "a\0OK\0",
            "zINSTREAM\0",
            "n" * 5000,
            "file.zip",
            "\udcff\udc80",
            "$(reboot)",
            "-V",
        ],
    )
    def test_a_hostile_name_changes_nothing(
        self, engine: Engine, infected: bytes, name: str
    ) -> None:
        assert self.judge(engine, infected, name=name).verdict is Verdict.INFECTED
        assert self.judge(engine, b"clean", name=name).verdict is Verdict.CLEAN

    def test_a_file_can_be_judged_alone(self, engine: Engine, infected: bytes) -> None:
        assert self.judge(engine, infected, alone=True).verdict is Verdict.INFECTED
        assert self.judge(engine, b"clean", alone=True).verdict is Verdict.CLEAN
        assert self.judge(engine, infected).verdict is Verdict.INFECTED

    def test_a_file_judged_alone_does_not_disturb_the_others(
        self, engine: Engine, infected: bytes
    ) -> None:
        def one(number: int) -> Verdict:
            return self.judge(engine, infected, alone=number == 6).verdict

        with ThreadPoolExecutor(4) as threads:
            verdicts = set(threads.map(one, range(24)))

        assert verdicts == {Verdict.INFECTED}

    def test_signatures_are_named_and_stay_the_same(self, engine: Engine, infected: bytes) -> None:
        first = engine.signatures()
        used = self.judge(engine, infected).signatures

        assert first.digest
        assert first.version
        assert engine.signatures() == first
        assert used == first

    def test_a_container_is_opened_or_said_to_be_unopened(
        self, engine: Engine, infected: bytes
    ) -> None:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("member", bytes(1000) + infected)

        report = self.judge(engine, out.getvalue())

        if engine.opens_containers:
            assert report.verdict is Verdict.INFECTED
        else:
            assert Reason.CONTAINER_UNOPENED in report.coverage

    def test_a_window_of_something_larger_is_judged_like_a_file(
        self, engine: Engine, infected: bytes
    ) -> None:
        with spool(infected) as file:
            window = Spooled(file.fd, file.size, file.path, file.name, (1 << 30, 5 << 30))
            report = engine.scan(window, time.monotonic() + self.seconds)

        assert report.verdict is Verdict.INFECTED

    def test_closing_twice_is_fine(self, engine: Engine) -> None:
        engine.close()
        engine.close()
