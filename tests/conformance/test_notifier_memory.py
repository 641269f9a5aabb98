import pytest

from bucketward.errors import Unavailable
from bucketward.notifiers.memory import MemoryNotifier, open_memory
from bucketward.testing.notifier import NotifierSuite, note


class TestMemoryNotifier(NotifierSuite):
    @pytest.fixture
    def notifier(self):
        return MemoryNotifier()

    def received(self, notifier):
        return [(n.id, n.body) for n in notifier.notes]

    def refuse(self, notifier, note_id):
        notifier.fail(Unavailable("told to fail", backend="memory"), note_id)


def test_it_fails_as_told_and_is_mended():
    notifier = open_memory("memory://")
    notifier.fail(Unavailable("told to fail", backend="memory"))

    assert set(notifier.send([note("a", 1), note("b", 2)])) == {"a", "b"}
    with pytest.raises(Unavailable):
        notifier.ping()

    notifier.mend()
    notifier.ping()
    assert notifier.send([note("a", 1)]) == {}
    assert [n.id for n in notifier.notes] == ["a"]
