"""The memory state keeps the contract."""

from datetime import UTC, datetime, timedelta

import pytest

from bucketward.model import Put, Record
from bucketward.states.memory import MemoryState, open_memory
from bucketward.testing.state import StateSuite, put


class TestMemoryState(StateSuite):
    @pytest.fixture
    def state(self):
        state = MemoryState(self.TABLES)
        yield state
        state.close()


def test_each_url_opens_a_new_one():
    first, second = (open_memory("memory://", StateSuite.TABLES) for _ in range(2))
    first.commit([put("key")])

    assert second.get("results", ["key"]) == {}


def test_expired_records_are_removed_in_time():
    state = MemoryState(StateSuite.TABLES)
    past = datetime.now(UTC) - timedelta(seconds=1)
    state.commit(
        [Put("results", Record(str(i), "{}", 0, {"day": ("d", "")}, past)) for i in range(100)]
    )
    state._sweep_at = 0
    state.commit([put("kept")])

    assert list(state._tables["results"].records) == ["kept"]
    assert state._tables["results"].entries == {}


def test_a_time_without_a_zone_is_a_bug():
    naive = Record("key", "{}", expires_at=datetime(2999, 1, 1))
    with pytest.raises(ValueError, match="aware"):
        MemoryState(StateSuite.TABLES).commit([Put("results", naive)])
