"""The memory store keeps the Store promises, with versions and without."""

from collections.abc import Iterator

import pytest

from bucketward.errors import ConfigError, Denied, Unsupported
from bucketward.stores.memory import MemoryStore, open_memory
from bucketward.testing.store import StoreSuite, fetch, put


class TestMemoryStore(StoreSuite):
    objects_past_one_page = 120

    @pytest.fixture
    def store(self) -> Iterator[MemoryStore]:
        store = MemoryStore("memory://one", page_size=50)
        yield store
        store.close()

    @pytest.fixture
    def other_store(self) -> Iterator[MemoryStore]:
        store = MemoryStore("memory://other", page_size=50)
        yield store
        store.close()

    def make_delete_marker(self, store, key) -> str:
        return store.mark_deleted(key)


class TestUnversionedMemoryStore(TestMemoryStore):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore("memory://one", page_size=50, versioned=False)

    @pytest.fixture
    def other_store(self) -> MemoryStore:
        return MemoryStore("memory://other", page_size=50, versioned=False)


class TestMemoryStoreWithoutTags(TestMemoryStore):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore("memory://one", page_size=50, has_tags=False)

    @pytest.fixture
    def other_store(self) -> MemoryStore:
        return MemoryStore("memory://other", page_size=50, has_tags=False)


def test_a_hold_keeps_exactly_that_version():
    store = MemoryStore()
    held, free = put(store, "k", b"held"), put(store, "k", b"free")
    store.hold(held)

    with pytest.raises(Denied) as caught:
        store.delete(held)
    store.delete(free)

    assert caught.value.reason == "object-lock"
    assert fetch(store, held)[1] == b"held"
    store.hold(held, False)
    store.delete(held)


def test_an_archived_object_is_known_but_not_read():
    store = MemoryStore()
    pin = put(store, "k", b"x")
    store.archive(pin)

    with pytest.raises(Unsupported) as caught:
        fetch(store, pin)

    assert caught.value.reason == "archived-storage-class"
    assert store.stat(pin.ref).storage_class == "GLACIER"


@pytest.mark.parametrize(
    "tags", [{"a": "semi;colon"}, {"": "x"}, {"a" * 129: "x"}, {"a": "x" * 257}]
)
def test_tags_are_as_strict_as_on_s3(tags):
    store = MemoryStore()

    with pytest.raises(Unsupported) as caught:
        put(store, "k", b"x", tags=tags)

    assert caught.value.reason == "tag-limit"


def test_a_url_opens_a_bucket():
    store = open_memory("memory://name?versioned=0&page_size=7&tags=0")

    assert store.bucket == "memory://name"
    assert (store.has_versions, store.has_tags) == (False, False)
    assert open_memory("memory://name").has_versions


@pytest.mark.parametrize(
    "url",
    ["memory://", "memory://n/path", "memory://n?versioned=yes", "memory://n?x=1", "file:///n"],
)
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ConfigError):
        open_memory(url)
