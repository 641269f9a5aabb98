"""The memory engine keeps the contract."""

from collections.abc import Iterator

import pytest

from bucketward.engines.memory import MemoryEngine
from bucketward.errors import Unavailable
from bucketward.interfaces import Engine
from bucketward.model import Verdict
from bucketward.testing.engine import EngineSuite, eicar


class TestMemoryEngine(EngineSuite):
    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        yield MemoryEngine(patterns={"Eicar": eicar()})

    def test_failure_is_raised_until_it_is_mended(self, engine: MemoryEngine):
        engine.failure = Unavailable("made to fail", backend="memory")
        for call in (engine.ping, lambda: self.judge(engine, b"x")):
            with pytest.raises(Unavailable):
                call()
        engine.failure = None

        assert self.judge(engine, b"x").verdict is Verdict.CLEAN

    def test_delay_ends_at_the_deadline(self, engine: MemoryEngine):
        engine.delay = 60
        engine.max_size = 10
        self.seconds = 0.1

        assert self.judge(engine, b"x").coverage == ("timed-out",)

    def test_suspicious_signatures_are_only_that(self, engine: MemoryEngine):
        engine.suspicious = frozenset({"Eicar"})

        assert self.judge(engine, eicar()).verdict is Verdict.SUSPICIOUS

    def test_a_change_of_version_changes_the_digest(self, engine: MemoryEngine):
        before = engine.signatures().digest
        engine.version = "2"

        assert engine.signatures().digest != before
