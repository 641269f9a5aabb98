"""What every `Store` promises, as tests: subclass `StoreSuite`, provide two buckets, run pytest.

class TestMyStore(StoreSuite):
    @pytest.fixture
    def store(self) -> Iterator[Store]: ...
    @pytest.fixture
    def other_store(self) -> Iterator[Store]: ...
"""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from threading import Barrier, Event, Lock
from typing import Any, ClassVar, TypeVar, cast
from urllib.parse import quote, unquote, unquote_plus
from uuid import uuid4

import pytest

from bucketward.errors import Changed, Error, NotFound, Unavailable, Unsupported
from bucketward.interfaces import Store
from bucketward.model import ObjectInfo, ObjectRef

T = TypeVar("T")

THREADS = 8
MEBIBYTE = 1 << 20
LARGE = 12 * MEBIBYTE
"""Above what any SDK sends or fetches in a single part."""

CONDITIONS = {"read", "tag", "put-absent", "copy-source", "copy-absent", "delete"}

NASTY_KEYS: Mapping[str, Callable[[str], str]] = {
    "plain": lambda u: f"{u}/plain.txt",
    "spaces": lambda u: f" {u} a  b ",
    "plus": lambda u: f"{u}/a+b",
    "percent": lambda u: f"{u}/100%",
    "percent-escape": lambda u: f"{u}/a%20b%2Fc%2fd%25%00%zz",
    "slash-inside-twice": lambda u: f"{u}//a///b",
    "slash-first": lambda u: f"/{u}",
    "slashes-first": lambda u: f"//{u}",
    "slash-last": lambda u: f"{u}/",
    "slashes-last": lambda u: f"{u}//",
    "dot": lambda u: f"./{u}",
    "dot-dot": lambda u: f"../{u}",
    "dot-dot-often": lambda u: f"../../../../../../../../../../{u}",
    "dot-dot-inside": lambda u: f"{u}/../../x",
    "dot-inside": lambda u: f"{u}/./x",
    "dot-last": lambda u: f"{u}/.",
    "dot-dot-last": lambda u: f"{u}/..",
    "hidden": lambda u: f".{u}",
    "backslash": lambda u: f"..\\{u}\\a",
    "drive": lambda u: f"C:{u}",
    "query": lambda u: f"{u}?versionId=null&acl#fragment;x=y",
    "markup": lambda u: f"{u}/<a href=\"x\" b='y'>&amp;</a>]]>",
    "control": lambda u: u + "".join(map(chr, [*range(1, 32), 127])),
    "newlines-last": lambda u: f"{u}\r\n",
    "delete-characters": lambda u: f"{u}\u0080\u009f\u00a0\u00ad",
    "composed": lambda u: f"{u}/\u00e9\u00c5",
    "decomposed": lambda u: f"{u}/e\u0301A\u030a",
    "emoji": lambda u: f"{u}/\U0001f9ea\U0001f468\u200d\U0001f4bb",
    "right-to-left": lambda u: f"{u}/\u202egnp.exe",
    "invisible": lambda u: f"{u}/\ufeff\u200b",
    "private-use": lambda u: f"{u}/\ue000\U0010fe00\U0010fe01\U0010ff41",
    "not-a-character": lambda u: f"{u}/\ufffd\U0010ffff",
    "upper-case": lambda u: f"{u}/ABC".upper(),
    "shell": lambda u: f"{u}/$(id)`id`|;*?[a]~!'\"",
    "option": lambda u: f"--{u}",
    "longest": lambda u: u + "k" * (1024 - len(u)),
    "longest-deep": lambda u: u + "/d" * ((1024 - len(u)) // 2),
    "longest-wide-characters": lambda u: u + "\U0001f9ea" * ((1024 - len(u)) // 4),
}
"""Keys that somebody's software gets wrong, by name; each from a text that makes it unique."""

NEIGHBOURS: Mapping[str, Sequence[str]] = {
    "escapes": ("a", "a b", "a+b", "a%20b", "a%2Bb", "a%2bb", "a%252Bb", "a  b", "a%b", "ab"),
    "slashes": ("x/y", "x//y", "x%2Fy", "x/./y", "x/../y", "x\\y", "x/y ", "x/ y", "/x/y", "y"),
    "unicode": ("\u00e9", "e\u0301", "\u00c9", "e", "\u212b", "\u00c5", "A\u030a", "\ufb01", "fi"),
    "markup": ("<&>\"'", "&lt;&amp;&gt;&quot;&apos;", "&#60;&#38;", "%3C%26%3E"),
    "newlines": ("n\nl", "n\rl", "n\r\nl", "n&#10;l", "n%0Al", "nl"),
    "case": ("aB", "Ab", "ab", "AB"),
    "ends": ("t", "t ", " t", "t.", "t\t", ".t", "t~"),
}
"""Keys that all exist at once and that nobody may take for each other."""

TAG_VALUES: Mapping[str, str] = {
    "verdict": "Clean",
    "bucketward:date": "2026-01-02T03:04:05+00:00",
    "a b": "x y  z",
    "a+b": "1+1=2",
    "path/like": "a/b-c_d.e:f@g",
    "ends": "=+-",
    "empty": "",
}
"""Tags of the alphabet that is common to the providers."""


@contextmanager
def file_of(data: bytes) -> Iterator[int]:
    """Yield a descriptor of `data` whose position is anywhere but at the start."""
    fd = os.memfd_create("suite", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        yield fd
    finally:
        os.close(fd)


def put(store: Store, key: str, data: bytes, **options: Any) -> ObjectInfo:
    """Store `data` under `key`."""
    with file_of(data) as fd:
        return store.put(key, fd, len(data), **options)


class Acceptor:
    """An `accept` that counts its calls and keeps what it was told."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("suite", os.MFD_CLOEXEC)
        self.infos: list[ObjectInfo] = []
        os.lseek(self.fd, 5, os.SEEK_SET)

    def __call__(self, info: ObjectInfo) -> int:
        self.infos.append(info)
        return self.fd

    def data(self) -> bytes:
        """Return what was written, which needs the descriptor to be open still."""
        size, data = os.fstat(self.fd).st_size, b""
        while len(data) < size:
            data += os.pread(self.fd, size - len(data), len(data))
        return data

    def close(self) -> None:
        os.close(self.fd)


def fetch(
    store: Store, ref: ObjectRef | ObjectInfo, *, start: int = 0, length: int | None = None
) -> tuple[ObjectInfo, bytes]:
    """Read an object or a range of it, and check what `read` promises of `accept`."""
    accept = Acceptor()
    try:
        info = store.read(ref, accept, start=start, length=length)

        assert len(accept.infos) == 1
        assert accept.infos[0].identity == info.identity
        assert accept.infos[0].size == info.size
        assert (info.bucket, info.key) == (ref.bucket, ref.key)
        return info, accept.data()
    finally:
        accept.close()


def listing(store: Store, prefix: str, *, versions: bool = False) -> list[ObjectInfo]:
    """Return everything below `prefix`, over all pages."""
    found: list[ObjectInfo] = []
    cursor = ""
    while True:
        page = store.list(prefix, cursor=cursor, versions=versions)
        found += page.items
        if not page.cursor:
            return found
        cursor = page.cursor


def keys_of(infos: Sequence[ObjectInfo]) -> list[str]:
    """Return the keys in order."""
    return sorted(info.key for info in infos)


def at_once(count: int, work: Callable[[int], T]) -> list[T]:
    """Run `work(n)` in `count` threads that begin together, and return the results."""
    barrier = Barrier(count)

    def begin(n: int) -> T:
        barrier.wait()
        return work(n)

    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(begin, n) for n in range(count)]]


def mangled(key: str) -> list[str]:
    """Return what careless software makes of `key`."""
    forms = [
        quote(key),
        unquote(key, errors="ignore"),
        unquote_plus(key, errors="ignore"),
        key.replace(" ", "+"),
        posixpath.normpath(key),
        key.strip("/"),
        f"{key}/",
        key.strip(),
        unicodedata.normalize("NFC", key),
        unicodedata.normalize("NFD", key),
        key[:-1],
    ]
    return [form for form in dict.fromkeys(forms) if form != key and 0 < len(form.encode()) <= 1024]


class StoreSuite:
    """The promises of `Store`.

    `store` and `other_store` are two buckets of the same kind, empty at first; they may live as
    long as the class, for every test keeps to keys of its own.  `refused_keys` names those of
    `NASTY_KEYS` that the store answers with `Unsupported`, and without `has_metadata` the store
    answers so to metadata and headers.
    """

    objects_past_one_page: ClassVar[int] = 1_005
    refused_keys: ClassVar[frozenset[str]] = frozenset()
    has_metadata: ClassVar[bool] = True

    @pytest.fixture
    def store(self) -> Any:
        """Yield the bucket under test."""
        raise NotImplementedError("a store suite needs a fixture `store`")

    @pytest.fixture
    def other_store(self) -> Any:
        """Yield a second bucket of the same kind, from which `store` can copy and vice versa."""
        raise NotImplementedError("a store suite needs a fixture `other_store`")

    def overwrite_behind(self, store: Store, key: str, data: bytes) -> None:
        """Replace an object as a stranger would, behind the back of `store`."""
        put(store, key, data)

    def make_delete_marker(self, store: Store, key: str) -> str:
        """Hide `key` behind a delete marker and return the marker's version id."""
        pytest.skip(f"no way to make a delete marker on {key} of {store.bucket}")

    def reopen(self, store: Store) -> Store:
        """Return the same bucket opened afresh, as another process would, if there is a way."""
        return store

    @pytest.fixture
    def unique(self) -> str:
        """Return the beginning of the keys of this test alone."""
        return uuid4().hex

    @pytest.fixture
    def metadata(self) -> Mapping[str, str]:
        """Return some metadata, or none where the store keeps none."""
        return {"m": "1"} if self.has_metadata else {}

    # What it is

    def test_it_is_a_store(self, store: Store) -> None:
        assert isinstance(store, Store)
        assert "?" not in store.bucket
        assert "://" in store.bucket
        assert isinstance(store.account, str)
        assert isinstance(store.region, str)
        assert store.conditions <= CONDITIONS
        assert store.max_tags > 0 or not store.has_tags

    def test_ping_succeeds(self, store: Store) -> None:
        store.ping()

    def test_closing_twice_is_fine(self, store: Store) -> None:
        again = self.reopen(store)
        if again is store:
            pytest.skip("the bucket cannot be opened twice")

        again.close()
        again.close()

    # Keys

    @pytest.mark.parametrize("name", NASTY_KEYS)
    def test_a_key_survives_everything(
        self, store: Store, other_store: Store, unique: str, name: str
    ) -> None:
        key = NASTY_KEYS[name](unique)
        ref = ObjectRef(store.bucket, key)
        if name in self.refused_keys:
            with pytest.raises(Unsupported):
                put(store, key, b"1")
            return

        pin = put(store, key, b"one")

        assert (pin.bucket, pin.key, pin.size) == (store.bucket, key, 3)
        assert store.stat(ref).key == key
        assert fetch(store, ref)[1] == b"one"
        assert [i.key for i in listing(store, key)] == [key]
        assert fetch(store, listing(store, key)[0])[1] == b"one"
        if store.has_tags:
            store.replace_tags(pin, {"a": "1"})
            assert store.tags(pin) == {"a": "1"}
        copied = other_store.copy_from(store, pin, key)
        assert copied.key == key
        assert fetch(other_store, copied)[1] == b"one"
        for form in mangled(key):
            with pytest.raises(NotFound):
                store.stat(ObjectRef(store.bucket, form))
        store.delete(pin)
        with pytest.raises(NotFound):
            store.stat(ref)
        assert listing(store, key) == []
        assert other_store.stat(ObjectRef(other_store.bucket, key)).key == key

    @pytest.mark.parametrize("family", NEIGHBOURS)
    def test_keys_are_never_taken_for_their_neighbours(
        self, store: Store, unique: str, family: str
    ) -> None:
        pins = {
            key: put(store, key, key.encode())
            for key in (f"{unique}-{family}/{name}" for name in NEIGHBOURS[family])
        }

        assert keys_of(listing(store, unique)) == sorted(pins)
        for key, pin in pins.items():
            info, data = fetch(store, ObjectRef(store.bucket, key))
            assert (info.identity, data) == (pin.identity, key.encode())
        gone = list(pins)[::2]
        for key in gone:
            store.delete(pins[key])
        left = sorted(pins.keys() - set(gone))
        assert keys_of(listing(store, unique)) == left
        for key in left:
            assert fetch(store, pins[key])[1] == key.encode()

    def test_an_object_beside_objects_below_its_name_is_kept_or_refused(
        self, store: Store, unique: str
    ) -> None:
        kept: dict[str, ObjectInfo] = {}
        for key in (f"{unique}/a", f"{unique}/a/", f"{unique}/a/b", f"{unique}/a/b/c", unique):
            with suppress(Unsupported):
                kept[key] = put(store, key, key.encode())

        assert f"{unique}/a" in kept
        assert keys_of(listing(store, unique)) == sorted(kept)
        for key, pin in kept.items():
            assert fetch(store, pin)[1] == key.encode()

    @pytest.mark.parametrize(
        "key",
        ["", "k" * 1025, "\u00e9" * 513, "lone \ud800"],
        ids=["empty", "long", "wide", "lone"],
    )
    def test_what_is_no_key_is_refused(self, store: Store, key: str) -> None:
        with pytest.raises(Unsupported):
            put(store, key, b"x")

    # Listing

    def test_a_listing_tells_the_exact_objects(self, store: Store, unique: str) -> None:
        pins = {name: put(store, f"{unique}/{name}", name.encode()) for name in ("a", "bb", "ccc")}

        found = {info.key.rpartition("/")[2]: info for info in listing(store, unique)}

        assert found.keys() == pins.keys()
        for name, info in found.items():
            assert info.bucket == store.bucket
            assert info.size == len(name)
            assert info.etag == pins[name].etag
            assert not info.etag.startswith('"')
            assert info.modified_at.utcoffset() == timedelta(0)
            assert info.is_latest
            assert fetch(store, info)[1] == name.encode()

    def test_a_prefix_is_text_and_not_a_folder(self, store: Store, unique: str) -> None:
        names = ["ab", "abc", "abc/d", "ab c", "ab+c", "ac", "Ab", "a/b", "a%2Fb"]
        kept = []
        for name in names:
            with suppress(Unsupported):
                put(store, f"{unique}/{name}", b"")
                kept.append(name)

        for prefix in ("", "a", "ab", "abc", "abc/", "ab ", "ab+", "a/", "a%", "x", "abc/d/"):
            expected = sorted(f"{unique}/{name}" for name in kept if name.startswith(prefix))
            assert keys_of(listing(store, f"{unique}/{prefix}")) == expected, prefix

    def test_a_listing_past_one_page_yields_what_stays_exactly_once(
        self, store: Store, unique: str
    ) -> None:
        keys = [f"{unique}/{n % 7}/{n:05} +%/o" for n in range(self.objects_past_one_page)]
        with ThreadPoolExecutor(THREADS) as pool:
            pins = {i.key: i for i in pool.map(lambda key: put(store, key, b""), keys)}

        first = store.list(unique)
        assert first.cursor
        assert 0 < len(first.items) < len(keys)
        passing = [info.key for info in (first.items[0], first.items[-1])]
        for key in passing:
            store.delete(pins[key])
        for n in range(7):
            put(store, f"{unique}/{n}/new", b"")
        found, cursor = list(first.items), first.cursor
        while cursor:
            again = self.reopen(store)
            page = again.list(unique, cursor=cursor)
            if again is not store:
                again.close()
            found, cursor = [*found, *page.items], page.cursor

        names = [info.key for info in found]
        assert sorted(name for name in names if not name.endswith("new")) == sorted(keys)
        assert len(set(names)) == len(names)
        assert sorted(store.prefixes(f"{unique}/")) == [f"{unique}/{n}/" for n in range(7)]
        ends = sorted(store.prefixes(f"{unique}/", "%/"))
        assert ends == sorted(key[:-1] for key in set(keys) - set(passing))

    def test_prefixes_are_distinct_and_end_behind_the_first_delimiter(
        self, store: Store, unique: str
    ) -> None:
        for name in ("a/1", "a/2/3", "b+c/1", "b c/1", "d", "-e-/f", "/g", "%2F/h"):
            put(store, f"{unique}/{name}", b"")

        def behind(prefix: str, delimiter: str) -> list[str]:
            found = store.prefixes(f"{unique}/{prefix}", delimiter)
            return sorted(name.removeprefix(f"{unique}/") for name in found)

        assert behind("", "/") == ["%2F/", "-e-/", "/", "a/", "b c/", "b+c/"]
        assert behind("a/", "/") == ["a/2/"]
        assert behind("a", "/") == ["a/"]
        assert behind("", "-") == ["-"]
        assert behind("-", "-") == ["-e-"]
        assert behind("", "/2/") == ["a/2/"]
        assert behind("d", "/") == []
        assert behind("nothing", "/") == []

    # Reading

    def test_what_was_put_is_read(self, store: Store, unique: str) -> None:
        data = bytes(range(256)) * 5

        pin = put(store, unique, data)

        info, body = fetch(store, pin)
        assert body == data
        assert info.identity == pin.identity
        assert info.etag == pin.etag
        assert info.size == pin.size == len(data)
        assert info.modified_at.utcoffset() == timedelta(0)
        assert store.stat(ObjectRef(store.bucket, unique)).identity == pin.identity
        assert store.stat(pin.ref).identity == pin.identity

    def test_an_empty_object_is_an_object(
        self, store: Store, other_store: Store, unique: str
    ) -> None:
        pin = put(store, unique, b"")

        for start, length in ((0, None), (0, 10), (5, None), (0, 0)):
            info, data = fetch(store, pin, start=start, length=length)
            assert (info.identity, info.size, data) == (pin.identity, 0, b"")
        copied = other_store.copy_from(store, pin, unique)
        assert fetch(other_store, copied) == (other_store.stat(copied.ref), b"")
        store.delete(pin)
        with pytest.raises(NotFound):
            fetch(store, pin)

    @pytest.mark.parametrize(
        ("start", "length"),
        [
            (0, 4),
            (3, 4),
            (5, None),
            (9, 1),
            (8, 10),
            (9, None),
            (10, None),
            (10, 5),
            (99, 5),
            (3, 0),
        ],
    )
    def test_a_range_is_cut_at_the_end(
        self, store: Store, unique: str, start: int, length: int | None
    ) -> None:
        data = b"0123456789"
        pin = put(store, unique, data)

        info, body = fetch(store, pin, start=start, length=length)

        assert body == data[start : None if length is None else start + length]
        assert info.size == len(data)

    def test_a_large_object_goes_and_comes_whole(
        self, store: Store, other_store: Store, unique: str, metadata: Mapping[str, str]
    ) -> None:
        data = b"".join(n.to_bytes(4, "big") * 256 for n in range(LARGE // 1024))

        pin = put(store, unique, data, tags=_tags(store, {"a": "1"}), metadata=metadata)

        info, body = fetch(store, pin)
        assert info.identity == pin.identity
        assert body == data
        middle = LARGE // 2 - 7
        assert fetch(store, pin, start=middle, length=99)[1] == data[middle : middle + 99]
        copied = other_store.copy_from(store, pin, unique)
        assert fetch(other_store, copied)[1] == data
        assert other_store.tags(copied) == store.tags(pin) == _tags(store, {"a": "1"})
        assert other_store.stat(copied.ref).metadata == metadata

    @pytest.mark.parametrize("error", [ValueError("mine"), Changed("mine"), OSError("mine")])
    def test_what_accept_raises_is_what_read_raises(
        self, store: Store, unique: str, error: Exception
    ) -> None:
        pin = put(store, unique, b"x" * MEBIBYTE)
        calls = []

        def refuse(info: ObjectInfo) -> int:
            calls.append(info)
            raise error

        with pytest.raises(type(error)) as caught:
            store.read(pin, refuse)
        assert caught.value is error
        assert [info.identity for info in calls] == [pin.identity]
        assert fetch(store, pin)[1] == b"x" * MEBIBYTE

    def test_a_descriptor_that_takes_nothing_is_an_error(self, store: Store, unique: str) -> None:
        pin = put(store, unique, b"x" * 10_000)
        fd = os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)
        try:
            with pytest.raises(Error):
                store.read(pin, lambda _: fd)
            os.fstat(fd)
        finally:
            os.close(fd)

    def test_reading_while_it_is_replaced_gives_the_pin_or_an_error(
        self, store: Store, unique: str
    ) -> None:
        old, new = b"o" * LARGE, b"n" * LARGE
        pin = put(store, unique, old)
        begun = Event()

        def overwrite() -> None:
            begun.wait()
            self.overwrite_behind(store, unique, new)

        accept = Acceptor()

        def begin(info: ObjectInfo) -> int:
            begun.set()
            return accept(info)

        with ThreadPoolExecutor(1) as pool:
            writer = pool.submit(overwrite)
            try:
                info = store.read(ObjectRef(store.bucket, unique), begin)
            except (Changed, Unavailable):
                pass
            else:
                assert info.identity == pin.identity
                assert accept.data() == old
            finally:
                begun.set()
                accept.close()
            writer.result()
        assert fetch(store, ObjectRef(store.bucket, unique))[1] == new

    # Writing

    def test_put_takes_size_bytes_from_the_start_and_leaves_the_descriptor_alone(
        self, store: Store, unique: str
    ) -> None:
        with file_of(b"0123456789") as fd:
            os.lseek(fd, 3, os.SEEK_SET)
            pin = store.put(unique, fd, 6)

            assert os.lseek(fd, 0, os.SEEK_CUR) == 3
        assert pin.size == 6
        assert fetch(store, pin)[1] == b"012345"

    def test_put_of_more_than_there_is_stores_nothing(self, store: Store, unique: str) -> None:
        with file_of(b"0123456789") as fd, pytest.raises(Error):
            store.put(unique, fd, 11)

        assert listing(store, unique) == []

    def test_metadata_and_headers_stay_with_the_object(
        self, store: Store, other_store: Store, unique: str
    ) -> None:
        headers = {
            "content-type": "text/x-test; charset=utf-8",
            "content-disposition": 'attachment; filename="a b.txt"',
            "cache-control": "no-store",
        }
        if not self.has_metadata:
            for options in ({"metadata": {"a": "1"}}, {"headers": headers}):
                with pytest.raises(Unsupported):
                    put(store, unique, b"x", **options)
            assert listing(store, unique) == []
            return
        pin = put(store, unique, b"x", metadata={"a": "1 +%2F", "b-c": "2"}, headers=headers)

        for info in (store.stat(pin.ref), fetch(store, pin)[0]):
            assert info.metadata == {"a": "1 +%2F", "b-c": "2"}
            assert info.headers.items() >= headers.items()
        kept = other_store.copy_from(store, pin, f"{unique}/kept")
        changed = other_store.copy_from(store, pin, f"{unique}/changed", metadata={"d": "3"})
        for info, metadata in ((kept, {"a": "1 +%2F", "b-c": "2"}), (changed, {"d": "3"})):
            copied = other_store.stat(info.ref)
            assert copied.metadata == metadata
            assert copied.headers.items() >= headers.items()

    def test_put_replaces_the_object_with_all_that_is_its(
        self, store: Store, unique: str, metadata: Mapping[str, str]
    ) -> None:
        put(store, unique, b"old", tags=_tags(store, {"a": "1"}), metadata=metadata)

        pin = put(store, unique, b"new!")

        assert fetch(store, ObjectRef(store.bucket, unique))[1] == b"new!"
        assert store.stat(ObjectRef(store.bucket, unique)).metadata == {}
        assert store.tags(pin) == {}
        assert [i.identity for i in listing(store, unique)] == [pin.identity]
        if not store.has_versions:
            assert [i.identity for i in listing(store, unique, versions=True)] == [pin.identity]
            store.delete(pin)
            assert listing(store, unique, versions=True) == []

    def test_put_if_absent_takes_only_a_free_key(self, store: Store, unique: str) -> None:
        pin = put(store, unique, b"first", if_absent=True)

        with pytest.raises(Changed):
            put(store, unique, b"second", if_absent=True)
        assert fetch(store, ObjectRef(store.bucket, unique))[1] == b"first"
        assert len(listing(store, unique, versions=True)) == 1
        store.delete(pin)
        put(store, unique, b"third", if_absent=True)
        assert fetch(store, ObjectRef(store.bucket, unique))[1] == b"third"

    def test_readers_see_the_old_object_or_the_new_one_whole(
        self, store: Store, unique: str
    ) -> None:
        ref = ObjectRef(store.bucket, unique)
        pins = [put(store, unique, b"\0" * MEBIBYTE, tags=_tags(store, {"n": "0"}))]
        done = Event()

        def write() -> None:
            try:
                for n in range(1, 9):
                    tags = _tags(store, {"n": str(n)})
                    pins.append(put(store, unique, bytes([n]) * (MEBIBYTE - n), tags=tags))
            finally:
                done.set()

        def look(_: int) -> list[tuple[ObjectInfo, int]]:
            seen = []
            while not done.is_set():
                # A store without the condition `read` or `tag` may say Changed of what changes.
                with suppress(Changed):
                    info, data = fetch(store, ref)
                    assert data == data[:1] * (MEBIBYTE - data[0])
                    seen.append((info, data[0]))
                with suppress(Changed):
                    assert not store.has_tags or store.tags(store.stat(ref)).keys() == {"n"}
            return seen

        with ThreadPoolExecutor(4) as pool:
            readers = [pool.submit(look, n) for n in range(3)]
            pool.submit(write).result()
            seen = [found for reader in readers for found in reader.result()]

        assert seen
        for info, n in seen:
            assert (info.identity, info.size) == (pins[n].identity, MEBIBYTE - n)

    # Tags

    def test_tags_are_there_from_the_first_moment(self, store: Store, unique: str) -> None:
        _needs_tags(store)

        pin = put(store, unique, b"x", tags=TAG_VALUES)

        assert store.tags(pin) == TAG_VALUES
        assert store.stat(pin.ref).tag_count in {None, len(TAG_VALUES)}
        assert fetch(store, pin)[0].tag_count in {None, len(TAG_VALUES)}

    def test_tags_are_replaced_as_a_set(self, store: Store, unique: str) -> None:
        _needs_tags(store)
        pin = put(store, unique, b"x", tags={"theirs": "1", "ours": "2"})

        store.replace_tags(pin, TAG_VALUES)
        assert store.tags(pin) == TAG_VALUES
        store.replace_tags(pin, {"theirs": "1"})
        assert store.tags(pin) == {"theirs": "1"}
        store.replace_tags(pin, {})
        assert store.tags(pin) == {}
        info, data = fetch(store, pin)
        assert (info.identity, data) == (pin.identity, b"x")

    def test_the_tag_limit_is_the_one_declared(
        self, store: Store, other_store: Store, unique: str
    ) -> None:
        _needs_tags(store)
        most = {f"k{n}": f"v{n}" for n in range(store.max_tags)}
        too_many = {**most, "one": "more"}
        pin = put(store, unique, b"x", tags={"a": "1"})
        refused: list[Callable[[], object]] = [
            lambda: store.replace_tags(pin, too_many),
            lambda: put(store, f"{unique}-put", b"x", tags=too_many),
            lambda: other_store.copy_from(store, pin, f"{unique}-copy", tags=too_many),
            lambda: store.replace_tags(pin, {"a": "x" * 100_000}),
        ]

        for attempt in refused:
            with pytest.raises(Unsupported) as caught:
                attempt()
            assert caught.value.reason == "tag-limit"
        assert store.tags(pin) == {"a": "1"}
        assert keys_of(listing(store, unique)) == [unique]
        assert listing(other_store, unique) == []
        store.replace_tags(pin, most)
        assert store.tags(pin) == most

    def test_a_store_without_tags_says_so(self, store: Store, unique: str) -> None:
        if store.has_tags:
            pytest.skip("has tags")
        pin = put(store, unique, b"x")

        assert store.tags(pin) == {}
        with pytest.raises(Unsupported):
            store.replace_tags(pin, {"a": "1"})
        with pytest.raises(Unsupported):
            put(store, f"{unique}-tagged", b"x", tags={"a": "1"})
        assert keys_of(listing(store, unique)) == [unique]

    # Copying

    @pytest.mark.parametrize("within", [True, False], ids=["within", "across"])
    def test_a_copy_keeps_or_replaces_tags(
        self, store: Store, other_store: Store, unique: str, within: bool
    ) -> None:
        _needs_tags(store)
        target = store if within else other_store
        pin = put(store, unique, b"x" * 1000, tags=TAG_VALUES)

        kept = target.copy_from(store, pin, f"{unique}-kept")
        replaced = target.copy_from(store, pin, f"{unique}-replaced", tags={"b": "2 +"})
        removed = target.copy_from(store, pin, f"{unique}-removed", tags={})

        for info, tags in ((kept, TAG_VALUES), (replaced, {"b": "2 +"}), (removed, {})):
            assert (info.bucket, info.size) == (target.bucket, 1000)
            assert target.stat(info.ref).identity == info.identity
            assert target.tags(info) == tags
            assert fetch(target, info)[1] == b"x" * 1000
        assert store.tags(pin) == TAG_VALUES

    def test_a_copy_replaces_what_was_there(
        self, store: Store, other_store: Store, unique: str, metadata: Mapping[str, str]
    ) -> None:
        put(other_store, unique, b"was there", tags=_tags(store, {"a": "1"}), metadata=metadata)
        pin = put(store, unique, b"source")

        copied = other_store.copy_from(store, pin, unique)

        assert fetch(other_store, ObjectRef(other_store.bucket, unique))[1] == b"source"
        assert other_store.tags(copied) == {}
        assert other_store.stat(copied.ref).metadata == {}
        assert fetch(store, pin)[1] == b"source"

    def test_copy_if_absent_takes_only_a_free_key(
        self, store: Store, other_store: Store, unique: str
    ) -> None:
        first, second = put(store, f"{unique}-1", b"1"), put(store, f"{unique}-2", b"2")
        other_store.copy_from(store, first, unique, if_absent=True)

        with pytest.raises(Changed):
            other_store.copy_from(store, second, unique, if_absent=True)

        assert fetch(other_store, ObjectRef(other_store.bucket, unique))[1] == b"1"
        assert len(listing(other_store, unique, versions=True)) == 1

    def test_a_copy_from_a_stranger_is_unsupported(self, store: Store, unique: str) -> None:
        pin = put(store, unique, b"x")

        with pytest.raises(Unsupported):
            store.copy_from(cast("Store", object()), pin, f"{unique}-copy")

        assert keys_of(listing(store, unique)) == [unique]

    # The exact object

    def test_what_was_overwritten_is_changed_and_nothing_is_done(
        self, store: Store, other_store: Store, unique: str
    ) -> None:
        if store.has_versions:
            pytest.skip("keeps versions: the old one is still there")
        old = put(store, unique, b"old", tags=_tags(store, {"old": "1"}))
        target = put(other_store, unique, b"target")
        self.overwrite_behind(store, unique, b"new")
        new = store.stat(ObjectRef(store.bucket, unique))
        if store.has_tags:
            store.replace_tags(new, {"new": "1"})
        accept = Acceptor()

        for attempt in (
            lambda: store.stat(old.ref),
            lambda: store.read(old, accept),
            lambda: store.read(old.ref, accept, start=1, length=1),
            lambda: store.tags(old),
            lambda: other_store.copy_from(store, old, unique),
            lambda: other_store.copy_from(store, old, f"{unique}-copy", tags={}, if_absent=True),
            lambda: store.delete(old),
        ):
            with pytest.raises(Changed):
                attempt()
        if store.has_tags:
            with pytest.raises(Changed):
                store.replace_tags(old, {"ours": "1"})

        assert accept.infos == []
        accept.close()
        assert fetch(store, ObjectRef(store.bucket, unique)) == (store.stat(new.ref), b"new")
        assert store.tags(new) == _tags(store, {"new": "1"})
        assert [i.identity for i in listing(other_store, unique)] == [target.identity]

    def test_what_is_gone_is_not_found(self, store: Store, other_store: Store, unique: str) -> None:
        pin = put(store, unique, b"x")
        store.delete(pin)
        accept = Acceptor()

        for attempt in (
            lambda: store.stat(ObjectRef(store.bucket, unique)),
            lambda: store.stat(pin.ref),
            lambda: store.read(ObjectRef(store.bucket, unique), accept),
            lambda: store.read(pin, accept),
            lambda: store.read(pin, accept, start=1, length=1),
            lambda: store.tags(pin),
            lambda: other_store.copy_from(store, pin, unique),
            lambda: store.delete(pin),
        ):
            with pytest.raises(NotFound):
                attempt()
        if store.has_tags:
            with pytest.raises(NotFound):
                store.replace_tags(pin, {"a": "1"})

        assert accept.infos == []
        accept.close()
        assert listing(store, unique, versions=True) == []
        assert listing(other_store, unique) == []

    def test_a_reference_with_an_etag_names_only_that(self, store: Store, unique: str) -> None:
        old = put(store, unique, b"old")
        ref = ObjectRef(store.bucket, unique, etag=old.etag)
        assert fetch(store, ref)[1] == b"old"
        self.overwrite_behind(store, unique, b"new")

        with pytest.raises(Changed):
            store.stat(ref)
        with pytest.raises(Changed):
            fetch(store, ref)

    def test_what_came_back_after_a_delete_is_another_object(
        self, store: Store, unique: str
    ) -> None:
        old = put(store, unique, b"old")
        store.delete(old)
        new = put(store, unique, b"new")

        with pytest.raises(NotFound if store.has_versions else Changed):
            store.delete(old)

        assert fetch(store, new)[1] == b"new"

    # Versions

    def test_an_old_version_stays_until_it_is_deleted(
        self, store: Store, other_store: Store, unique: str
    ) -> None:
        _needs_versions(store)
        old = put(store, unique, b"old", tags=_tags(store, {"n": "old"}))
        self.overwrite_behind(store, unique, b"new")
        new = store.stat(ObjectRef(store.bucket, unique))
        assert None not in {old.version_id, new.version_id}
        assert old.version_id != new.version_id

        assert fetch(store, old)[1] == b"old"
        assert fetch(store, old.ref, start=1, length=1)[1] == b"l"
        assert store.stat(old.ref).identity == old.identity
        assert fetch(store, new)[1] == b"new"
        if store.has_tags:
            store.replace_tags(old, {"n": "older"})
            assert store.tags(old) == {"n": "older"}
            assert store.tags(new) == {}
        copied = other_store.copy_from(store, old, unique)
        assert fetch(other_store, copied)[1] == b"old"
        assert other_store.tags(copied) == _tags(store, {"n": "older"})
        found = {i.version_id: i.is_latest for i in listing(store, unique, versions=True)}
        assert found == {old.version_id: False, new.version_id: True}
        assert [i.version_id for i in listing(store, unique)] == [new.version_id]
        store.delete(old)
        with pytest.raises(NotFound):
            store.stat(old.ref)
        assert fetch(store, ObjectRef(store.bucket, unique))[1] == b"new"
        assert [i.version_id for i in listing(store, unique, versions=True)] == [new.version_id]

    def test_without_the_latest_version_the_one_before_is_current(
        self, store: Store, unique: str
    ) -> None:
        _needs_versions(store)
        pins = [put(store, unique, data) for data in (b"1", b"22", b"333")]

        store.delete(pins[2])

        assert fetch(store, ObjectRef(store.bucket, unique))[1] == b"22"
        found = {i.version_id: i.is_latest for i in listing(store, unique, versions=True)}
        assert found == {pins[0].version_id: False, pins[1].version_id: True}

    def test_a_version_with_another_etag_is_changed(self, store: Store, unique: str) -> None:
        _needs_versions(store)
        old, new = put(store, unique, b"old"), put(store, unique, b"new")
        wrong = replace(old.ref, etag=new.etag)

        with pytest.raises(Changed):
            store.stat(wrong)
        with pytest.raises(Changed):
            fetch(store, wrong)

    def test_the_versions_of_one_key_fill_several_pages(self, store: Store, unique: str) -> None:
        _needs_versions(store)
        key, count = f"{unique}/a +%", self.objects_past_one_page
        with ThreadPoolExecutor(THREADS) as pool:
            pins = list(pool.map(lambda _: put(store, key, b""), range(count)))
        put(store, f"{unique}/b", b"")

        found = listing(store, unique, versions=True)

        versions = [info.version_id for info in found if info.key == key]
        assert len(versions) == count
        assert set(versions) == {pin.version_id for pin in pins}
        current = store.stat(ObjectRef(store.bucket, key)).version_id
        latest = [info.version_id for info in found if info.is_latest and info.key == key]
        assert latest == [current]
        assert len(found) == count + 1

    def test_a_delete_marker_hides_the_object_and_is_none(self, store: Store, unique: str) -> None:
        _needs_versions(store)
        pin = put(store, unique, b"x")
        marker = self.make_delete_marker(store, unique)
        ref = ObjectRef(store.bucket, unique)

        for gone in (ref, replace(ref, version_id=marker)):
            with pytest.raises(NotFound):
                store.stat(gone)
            with pytest.raises(NotFound):
                fetch(store, gone)
        assert listing(store, unique) == []
        found = listing(store, unique, versions=True)
        assert [(i.version_id, i.is_latest) for i in found] == [(pin.version_id, False)]
        assert fetch(store, pin)[1] == b"x"
        put(store, unique, b"again", if_absent=True)
        assert fetch(store, ref)[1] == b"again"

    # Many at once

    def test_eight_threads_do_everything_at_once(self, store: Store, unique: str) -> None:
        def work(n: int) -> None:
            for turn in range(3):
                key, data = f"{unique}/{n}", f"{n} {turn} ".encode() * 1000
                pin = put(store, key, data, tags=_tags(store, {"n": str(n)}))
                assert fetch(store, pin) == (store.stat(pin.ref), data)
                if store.has_tags:
                    store.replace_tags(pin, {"turn": str(turn)})
                    assert store.tags(pin) == {"turn": str(turn)}
                assert [i.identity for i in listing(store, key)] == [pin.identity]
                copied = store.copy_from(store, pin, f"{unique}/{n}-copy")
                assert fetch(store, copied)[1] == data
                store.delete(copied)
                store.delete(pin)

        at_once(THREADS, work)

        assert listing(store, unique, versions=True) == []

    @pytest.mark.parametrize("condition", ["put-absent", "copy-absent"])
    def test_of_eight_that_want_a_free_key_one_gets_it(
        self, store: Store, other_store: Store, unique: str, condition: str
    ) -> None:
        sources = [put(other_store, f"{unique}/{n}", str(n).encode()) for n in range(THREADS)]
        lock, winners = Lock(), list[tuple[int, ObjectInfo]]()

        def attempt(n: int) -> None:
            with suppress(Changed):
                if condition == "put-absent":
                    pin = put(store, unique, str(n).encode(), if_absent=True)
                else:
                    pin = store.copy_from(other_store, sources[n], unique, if_absent=True)
                with lock:
                    winners.append((n, pin))

        at_once(THREADS, attempt)

        assert winners
        info, data = fetch(store, ObjectRef(store.bucket, unique))
        assert (data, info.identity) in [(str(n).encode(), pin.identity) for n, pin in winners]
        if condition in store.conditions:
            assert len(winners) == 1

    def test_of_eight_that_delete_an_object_none_deletes_another(
        self, store: Store, unique: str
    ) -> None:
        pin = put(store, unique, b"x")

        def attempt(_: int) -> bool:
            try:
                store.delete(pin)
            except NotFound:
                return False
            return True

        deleted = at_once(THREADS, attempt)

        assert any(deleted)
        assert listing(store, unique, versions=True) == []

    # Errors

    def test_errors_name_the_backend_and_the_thing(self, store: Store, unique: str) -> None:
        put(store, unique, b"x")
        attempts: list[Callable[[], object]] = [
            lambda: store.stat(ObjectRef(store.bucket, f"{unique}-none")),
            lambda: store.stat(ObjectRef(store.bucket, unique, etag="other")),
            lambda: put(store, unique, b"y", if_absent=True),
        ]

        for attempt in attempts:
            with pytest.raises((NotFound, Changed)) as caught:
                attempt()
            assert caught.value.backend
            assert unique in caught.value.message


def _tags(store: Store, tags: Mapping[str, str]) -> Mapping[str, str]:
    return tags if store.has_tags else {}


def _needs_tags(store: Store) -> None:
    if not store.has_tags:
        pytest.skip("has no tags")


def _needs_versions(store: Store) -> None:
    if not store.has_versions:
        pytest.skip("keeps no versions")
