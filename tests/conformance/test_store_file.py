"""A directory keeps the Store promises, and nothing in it leads anywhere else."""

import ctypes
import os
import resource
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import pytest

from bucketward.errors import (
    Changed,
    ConfigError,
    Denied,
    Error,
    NotFound,
    Unavailable,
    Unsupported,
)
from bucketward.model import ObjectInfo, ObjectRef
from bucketward.stores import file
from bucketward.stores.file import PERMISSIONS, FileStore, names_of, open_file
from bucketward.testing.store import Acceptor, StoreSuite, fetch, keys_of, listing, put


class TestFileStore(StoreSuite):
    objects_past_one_page = 120

    @pytest.fixture
    def store(self, tmp_path: Path):
        (tmp_path / "one").mkdir()
        store = FileStore(tmp_path / "one", page_size=50)
        yield store
        store.close()

    @pytest.fixture
    def other_store(self, tmp_path: Path):
        (tmp_path / "other").mkdir()
        store = FileStore(tmp_path / "other", page_size=50)
        yield store
        store.close()

    def reopen(self, store: FileStore) -> FileStore:
        return FileStore(Path(store._path), page_size=50)


class TestFileStoreWithoutAttributes(TestFileStore):
    has_metadata = False

    @pytest.fixture
    def store(self, tmp_path: Path):
        (tmp_path / "one").mkdir()
        store = FileStore(tmp_path / "one", page_size=50, has_tags=False)
        yield store
        store.close()

    @pytest.fixture
    def other_store(self, tmp_path: Path):
        (tmp_path / "other").mkdir()
        store = FileStore(tmp_path / "other", page_size=50, has_tags=False)
        yield store
        store.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"


@pytest.fixture
def store(root: Path) -> Iterator[FileStore]:
    store = FileStore(root, page_size=50)
    yield store
    store.close()


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_bytes(b"secret")
    return folder


@contextmanager
def as_nobody() -> Iterator[None]:
    """Give up root's power to ignore permissions."""
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(uid)


def current(store: FileStore, key: str) -> ObjectInfo:
    return store.stat(ObjectRef(store.bucket, key))


def keys_in(store: FileStore, prefix: str = "") -> list[str]:
    return keys_of(listing(store, prefix))


def claim(store: FileStore, key: str, path: Path) -> ObjectInfo:
    """Return the pin that an attacker would forge for a file."""
    status = path.stat()
    return ObjectInfo(store.bucket, key, status.st_size, file._etag(status), file._time(status))


# Links


@pytest.mark.parametrize("key", ["link", "folder/secret", "a/folder/secret"])
def test_no_symbolic_link_is_followed(store: FileStore, root: Path, outside: Path, key: str):
    (root / "a").mkdir()
    (root / "link").symlink_to(outside / "secret")
    (root / "folder").symlink_to(outside)
    (root / "a/folder").symlink_to("../../outside")
    pin = put(store, "own", b"own")
    forged = claim(store, key, outside / "secret")

    for attempt in (
        lambda: store.stat(ObjectRef(store.bucket, key)),
        lambda: fetch(store, ObjectRef(store.bucket, key)),
        lambda: fetch(store, forged),
        lambda: store.tags(forged),
        lambda: store.replace_tags(forged, {"a": "1"}),
        lambda: store.copy_from(store, forged, "copy"),
        lambda: store.delete(forged),
    ):
        with pytest.raises(NotFound):
            attempt()
    for attempt in (
        lambda: put(store, key, b"x"),
        lambda: put(store, key, b"x", if_absent=True),
        lambda: store.copy_from(store, pin, key),
        lambda: put(store, f"{key}/below", b"x"),
    ):
        with pytest.raises(Unsupported):
            attempt()
    assert keys_in(store) == ["own"]
    assert keys_in(store, key) == []
    assert list(store.prefixes()) == []
    assert os.listdir(outside) == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"
    assert os.listxattr(outside / "secret") == []


def test_a_link_swapped_in_meanwhile_leads_nowhere(store: FileStore, root: Path, outside: Path):
    (root / "d").mkdir()
    (root / "d/secret").write_bytes(b"harmless")
    forged = claim(store, "d/secret", outside / "secret")
    done = Event()

    (root / "link").symlink_to(outside)
    libc = ctypes.CDLL(None)

    def swap() -> None:
        while not done.is_set():
            here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
            libc.renameat2(here, bytes(root / "d"), here, bytes(root / "link"), exchange)

    read = 0
    with ThreadPoolExecutor(1) as pool:
        swapper = pool.submit(swap)
        try:
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                with suppress(Error):
                    assert fetch(store, ObjectRef(store.bucket, "d/secret"))[1] == b"harmless"
                    read += 1
                with suppress(Error):
                    put(store, "d/new", b"new")
                with suppress(Error):
                    store.delete(forged)
                with suppress(Error):
                    store.replace_tags(forged, {"a": "1"})
                for info in listing(store, ""):
                    assert info.etag != forged.etag
        finally:
            done.set()
        swapper.result()

    assert read
    assert os.listdir(outside) == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"
    assert os.listxattr(outside / "secret") == []


def test_a_hard_link_is_an_object_of_its_own(store: FileStore, root: Path):
    put(store, "a", b"x")
    os.link(root / "a", root / "b")

    store.delete(current(store, "a"))

    assert keys_in(store) == ["b"]
    assert fetch(store, ObjectRef(store.bucket, "b"))[1] == b"x"


def test_pipes_and_sockets_are_neither_opened_nor_replaced(store: FileStore, root: Path):
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket"))

        for key in ("pipe", "socket"):
            with pytest.raises(NotFound):
                fetch(store, ObjectRef(store.bucket, key))
            with pytest.raises(NotFound):
                store.delete(claim(store, key, root / key))
            with pytest.raises(Unsupported):
                put(store, key, b"x")
            with pytest.raises(Unsupported):
                put(store, key, b"x", if_absent=True)
        assert keys_in(store) == []
        assert sorted(os.listdir(root)) == [".bucketward", "pipe", "socket"]


# Names


def test_files_with_any_name_are_objects(store: FileStore, root: Path):
    top = os.fsencode(root)
    names = [b"\xff\xfe.txt", b"caf\xe9", "café".encode(), "\U0010fe00".encode(), b"\n", b" "]
    names += ["\U0010fe00a".encode(), "b\U0010fe01".encode(), "\U0010ff41".encode(), b"\xff" * 255]
    os.mkdir(top + b"/dir\xff")
    os.mkdir(top + "/dir\U0010fe01".encode())
    for folder in (b"", b"dir\xff/", "dir\U0010fe01/".encode()):
        for name in names:
            with open(top + b"/" + folder + name, "wb") as made:
                made.write(folder + name)

    found = listing(store, "")

    assert len({info.key for info in found}) == len(names) * 3
    for info in found:
        _, data = fetch(store, ObjectRef(store.bucket, info.key))
        assert b"/".join(names_of(info.key)) == data
        assert info.key in keys_in(store, info.key)
        store.replace_tags(info, {"a": "1"})
        assert store.tags(current(store, info.key)) == {"a": "1"}
        store.delete(info)
    assert keys_in(store) == []


def test_our_private_directory_has_no_keys(store: FileStore, root: Path):
    put(store, ".bucketward/mine", b"x")
    (root / ".bucketward/put-1").write_bytes(b"half")
    dot = chr(0x10FF00 + ord("."))

    assert keys_in(store) == [".bucketward/mine"]
    for key in (".bucketward/put-1", f"{dot}bucketward/put-1", "./.bucketward/put-1"):
        with pytest.raises(NotFound):
            current(store, key)
        put(store, key, b"y")
    assert os.listdir(root / ".bucketward") == ["put-1"]
    assert (root / ".bucketward/put-1").read_bytes() == b"half"
    assert stat.S_IMODE((root / ".bucketward").stat().st_mode) == 0o700


def test_a_private_directory_that_somebody_planted_is_not_used(
    store: FileStore, root: Path, outside: Path
):
    pin = claim(store, "a", _written(root / "a", b"x"))
    (root / ".bucketward").symlink_to(outside)

    with pytest.raises(Denied):
        put(store, "b", b"x")
    with pytest.raises(Denied):
        store.delete(pin)

    assert os.listdir(outside) == ["secret"]
    assert keys_in(store) == ["a"]


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_name_that_is_taken_by_a_directory_or_below_a_file_says_why(store: FileStore):
    put(store, "a/b", b"x")

    for key, word in (("a", "directory"), ("a/b/c", "no directory")):
        with pytest.raises(Unsupported, match=word):
            put(store, key, b"x")
        with pytest.raises(Unsupported, match=word):
            put(store, key, b"x", if_absent=True)
        with pytest.raises(NotFound):
            current(store, key)


# Changes behind our back


def _rewrite(path: Path) -> None:
    with path.open("r+b") as changed:
        changed.write(b"n")


def _rewrite_in_secret(path: Path) -> None:
    before = path.stat()
    _rewrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "append": lambda path: path.open("ab").write(b"more"),
    "truncate": lambda path: os.truncate(path, 3),
    "empty": lambda path: path.write_bytes(b""),
    "rewrite": _rewrite,
    "rewrite-in-secret": _rewrite_in_secret,
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_changes_while_it_is_read_is_changed(store: FileStore, root: Path, name: str):
    put(store, "k", b"old" * 1000)
    accept = Acceptor()

    def begin(info: ObjectInfo) -> int:
        CHANGES[name](root / "k")
        return accept(info)

    with pytest.raises(Changed):
        store.read(ObjectRef(store.bucket, "k"), begin)
    accept.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_was_changed_is_not_acted_on(store: FileStore, root: Path, name: str):
    pin, _ = fetch(store, put(store, "k", b"old" * 1000))
    CHANGES[name](root / "k")
    now = (root / "k").read_bytes()

    for attempt in (
        lambda: store.tags(pin),
        lambda: store.replace_tags(pin, {"a": "1"}),
        lambda: store.copy_from(store, pin, "copy"),
        lambda: store.delete(pin),
        lambda: fetch(store, pin),
    ):
        with pytest.raises(Changed):
            attempt()

    assert keys_in(store) == ["k"]
    assert (root / "k").read_bytes() == now
    assert store.tags(current(store, "k")) == {}


def test_a_file_replaced_or_removed_while_it_is_read_is_read_as_it_was(
    store: FileStore, root: Path
):
    for change in (lambda: put(store, "k", b"new" * 1000), (root / "k").unlink):
        put(store, "k", b"old" * 1000)
        accept = Acceptor()

        def begin(info: ObjectInfo, change=change, accept=accept) -> int:
            change()
            return accept(info)

        store.read(ObjectRef(store.bucket, "k"), begin)

        assert accept.data() == b"old" * 1000
        accept.close()


def test_our_own_tags_do_not_spoil_a_pin_but_those_of_others_do(store: FileStore, root: Path):
    pin = put(store, "k", b"x")
    store.replace_tags(pin, {"a": "1"})
    later = current(store, "k")
    store.replace_tags(pin, {"a": "2"})
    store.replace_tags(later, {"a": "3"})
    assert store.tags(pin) == {"a": "3"}
    store.copy_from(store, pin, "copy")

    FileStore(root).replace_tags(current(store, "k"), {"theirs": "1"})

    with pytest.raises(Changed):
        store.replace_tags(pin, {"a": "4"})
    assert store.tags(current(store, "k")) == {"theirs": "1"}


def test_a_delete_never_takes_what_has_just_been_put(store: FileStore):
    with ThreadPoolExecutor(2) as pool:
        for n in range(60):
            old = put(store, "k", b"old")

            deleted = pool.submit(store.delete, old)
            new = pool.submit(put, store, "k", f"new {n}".encode())
            with suppress(Changed, NotFound):
                deleted.result()
            new.result()

            assert fetch(store, ObjectRef(store.bucket, "k"))[1] == f"new {n}".encode()
    assert os.listdir(Path(store._path) / ".bucketward") == []


def test_attributes_that_somebody_else_wrote_are_taken_with_care(store: FileStore, root: Path):
    path = _written(root / "k", b"x")
    for hostile in (b"", b"\xff", b"[" * 3000, b'["a"]', b'{"a": 1, "b": "2"}', b'"a"', b"1e999"):
        os.setxattr(path, "user.bucketward.tags", hostile)
        os.setxattr(path, "user.bucketward.meta", hostile[:500])

        info, data = fetch(store, ObjectRef(store.bucket, "k"))

        assert data == b"x"
        assert store.tags(info) == ({"b": "2"} if b"2" in hostile else {})
        assert info.metadata == {}


@pytest.mark.parametrize("seconds", [-(2**33), 2**33, 2**55])
def test_a_time_that_no_calendar_has_is_no_trouble(root: Path, seconds: int):
    # tmpfs stores what others cut.
    with TemporaryDirectory(dir="/dev/shm") as folder:
        store = FileStore(Path(folder))
        os.utime(_written(Path(folder) / "k", b"x"), ns=(0, seconds * 10**9 % 2**63))

        assert keys_in(store) == ["k"]
        assert fetch(store, current(store, "k"))[1] == b"x"
        store.close()


# Processes that die


def run_until_killed(script: str, *arguments: str) -> None:
    """Run a script until it says that it is where we want it, then kill it."""
    script = "import os, sys, time\nfrom pathlib import Path\n" + script
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        child.kill()


WAIT = """
def wait(*_, **__):
    print("here", flush=True)
    time.sleep(100)
from bucketward.stores.file import FileStore
from bucketward.testing.store import put
from bucketward.model import ObjectRef
store = FileStore(Path(sys.argv[1]))
"""


def _age(root: Path) -> None:
    for path in (root / ".bucketward").iterdir():
        os.utime(path, (0, 0))


def test_a_put_that_is_killed_leaves_the_old_object(store: FileStore, root: Path):
    put(store, "k", b"old", tags={"a": "1"})

    run_until_killed(f"{WAIT}os.fsync = wait\nput(store, 'k', b'new')", str(root))

    info, data = fetch(store, ObjectRef(store.bucket, "k"))
    assert (data, store.tags(info)) == (b"old", {"a": "1"})
    assert keys_in(store) == ["k"]
    left = os.listdir(root / ".bucketward")
    assert len(left) == 1
    FileStore(root).close()
    assert os.listdir(root / ".bucketward") == left
    _age(root)
    FileStore(root).close()
    assert os.listdir(root / ".bucketward") == []
    assert fetch(store, info)[1] == b"old"


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_delete_that_is_killed_loses_nothing(store: FileStore, root: Path, is_taken: bool):
    put(store, "a/k", b"old", tags={"a": "1"})
    script = f"{WAIT}os.unlink = wait\nstore.delete(store.stat(ObjectRef('', 'a/k')))"

    run_until_killed(script, str(root))
    if is_taken:
        put(store, "a/k", b"new")
    _age(root)
    FileStore(root).close()

    info, data = fetch(store, ObjectRef(store.bucket, "a/k"))
    assert data == (b"new" if is_taken else b"old")
    assert store.tags(info) == ({} if is_taken else {"a": "1"})
    assert os.listdir(root / ".bucketward") == []


# Sizes


def test_a_huge_file_needs_no_memory(store: FileStore, root: Path):
    with (root / "huge").open("wb") as huge:
        huge.truncate(3 << 30)
    ref = ObjectRef(store.bucket, "huge")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fd = os.open("/dev/null", os.O_WRONLY)

    info = store.read(ref, lambda info: fd, start=(3 << 30) - (256 << 20))

    os.close(fd)
    assert info.size == 3 << 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def test_reading_goes_into_a_pipe_too(store: FileStore):
    put(store, "k", b"x" * 5000)
    reader, writer = os.pipe()

    store.read(ObjectRef(store.bucket, "k"), lambda info: writer)

    assert os.read(reader, 9999) == b"x" * 5000
    os.close(reader)
    os.close(writer)


def test_a_copy_goes_across_file_systems(store: FileStore):
    with TemporaryDirectory(dir="/dev/shm") as folder:
        other = FileStore(Path(folder))
        pin = put(store, "k", b"x" * 100_000, tags={"a": "1"}, headers={"content-type": "t"})

        copied = other.copy_from(store, pin, "a/k")

        assert fetch(other, copied)[1] == b"x" * 100_000
        assert other.tags(copied) == {"a": "1"}
        assert other.stat(copied.ref).headers == {"content-type": "t"}
        other.close()


@pytest.mark.parametrize("is_reopened", [False, True])
def test_a_directory_larger_than_memory_is_read_in_parts(
    store: FileStore, root: Path, monkeypatch, is_reopened: bool
):
    monkeypatch.setattr(file, "_BATCH", 0)  # 256 names at once
    for folder in ("", "m/"):
        (root / folder).mkdir(exist_ok=True)
        for n in range(600):
            (root / f"{folder}{n:03}").touch()

    found, cursor = [], ""
    while True:
        page = (FileStore(root, page_size=70) if is_reopened else store).list(cursor=cursor)
        found += [info.key for info in page.items]
        if not page.cursor:
            break
        cursor = page.cursor

    assert len(found) == 1200
    assert len(set(found)) == 1200
    assert len(keys_in(store, "m/5")) == 100


def test_a_tree_deeper_than_any_path_is_listed_with_few_descriptors(store: FileStore, root: Path):
    depth = 1200
    fd = os.open(root, os.O_PATH)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_PATH, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("deep", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/proc/self/fd"))) + 12
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    try:
        key = "d/" * depth + "deep"
        assert keys_in(store) == [key]
        assert fetch(store, ObjectRef(store.bucket, key))[1] == b""
        store.delete(current(store, key))
        assert keys_in(store) == []
        with pytest.raises(Unsupported):
            put(store, key, b"x")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        subprocess.run(["rm", "-rf", root / "d"], check=True)


# Permissions and file systems


@pytest.mark.parametrize("is_reopened", [False, True])
def test_a_directory_that_may_not_be_read_is_named_when_all_else_is_listed(
    store: FileStore, root: Path, is_reopened: bool
):
    root.chmod(0o755)
    for n in range(120):
        (root / f"d{n:03}").mkdir()
        (root / f"d{n:03}/k").touch()
    (root / "d007").chmod(0)
    found, cursor = [], ""

    with as_nobody(), pytest.raises(Denied, match="'d007'") as caught:
        while True:
            again = store
            if is_reopened:
                again = FileStore.__new__(FileStore)  # nobody can come here by the path
                again.__dict__.update(store.__dict__, _walks=type(store._walks)())
            page = again.list(cursor=cursor)
            found += [info.key for info in page.items]
            cursor = page.cursor
            assert cursor

    assert caught.value.reason == "directory:read"
    assert found == [f"d{n:03}/k" for n in range(120) if n != 7]


def test_what_may_not_be_done_is_denied_with_what_is_missing(store: FileStore, root: Path):
    pin = put(store, "k", b"x")
    (root / "k").chmod(0o444)
    root.chmod(0o555)

    with as_nobody():
        assert keys_in(store) == ["k"]
        for attempt, reason in (
            (lambda: store.replace_tags(current(store, "k"), {"a": "1"}), "file:write"),
            (lambda: store.delete(current(store, "k")), "directory:write"),
            (lambda: put(store, "new", b"x"), "directory:write"),
        ):
            with pytest.raises(Denied) as caught:
                attempt()
            assert caught.value.reason == reason
    root.chmod(0o755)
    (root / "k").chmod(0)
    with as_nobody(), pytest.raises(Denied) as caught:
        fetch(store, ObjectRef(store.bucket, "k"))
    assert caught.value.reason == "file:read"
    assert set(PERMISSIONS) >= {"file:read", "file:write", "directory:write"}
    assert pin.key == "k"


def test_an_immutable_file_is_kept_by_a_lock(store: FileStore, root: Path):
    pin = put(store, "k", b"x")
    if subprocess.run(["chattr", "+i", root / "k"], check=False, capture_output=True).returncode:
        pytest.skip("needs root, and a file system with chattr")
    try:
        with pytest.raises(Denied) as caught:
            store.delete(current(store, "k"))
    finally:
        subprocess.run(["chattr", "-i", root / "k"], check=True)

    assert caught.value.reason == "object-lock"
    assert os.listdir(root / ".bucketward") == []
    assert pin.etag == current(store, "k").etag


def test_a_file_system_without_attributes_is_noticed(tmp_path: Path):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", bytes(tmp_path), b"ramfs", 0, None):
        pytest.skip("needs root, to mount a file system without extended attributes")
    try:
        store = FileStore(tmp_path)
        pin = put(store, "k", b"x")
        with pytest.raises(Unsupported):
            store.replace_tags(pin, {"a": "1"})

        assert (store.has_tags, store.max_tags) == (False, 0)
        assert store.tags(pin) == {}
        assert fetch(store, pin)[1] == b"x"
        store.close()
    finally:
        assert libc.umount2(bytes(tmp_path), 2) == 0


def test_attributes_that_the_file_system_cannot_hold_are_refused_whole(
    store: FileStore, root: Path
):
    put(store, "k", b"old")

    with pytest.raises(Unsupported) as caught:
        put(store, "k", b"new", metadata={"m": "x" * 100_000})

    assert caught.value.reason == "tag-limit"
    assert fetch(store, ObjectRef(store.bucket, "k"))[1] == b"old"
    assert os.listdir(root / ".bucketward") == []


# Opening


@pytest.mark.parametrize("name", ["plain", "a b", "a%20b", "what?#%", "ünï", "new\nline"])
def test_the_identity_of_a_bucket_opens_it(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    (tmp_path / name / "k").touch()
    store = FileStore(tmp_path / name)

    again = open_file(store.bucket)

    assert again.bucket == store.bucket
    assert keys_in(again) == ["k"]
    assert "?" not in store.bucket


@pytest.mark.parametrize(
    "url", ["file://host/d", "file:d", "file:///d?x=1", "s3://d", "/d", "file:///a%00b"]
)
def test_a_url_that_is_none_is_refused(url: str):
    with pytest.raises(ConfigError):
        open_file(url)


def test_a_directory_that_is_none_is_not_found(tmp_path: Path):
    _written(tmp_path / "file", b"")

    for name in ("none", "file"):
        with pytest.raises(NotFound):
            open_file(f"file://{tmp_path}/{name}")


def test_opening_and_listing_write_nothing(root: Path):
    (root / "k").touch()
    store = FileStore(root)

    assert keys_in(store) == ["k"]
    assert os.listdir(root) == ["k"]


def test_ping_tells_what_is_wrong(store: FileStore, root: Path):
    root.chmod(0o555)
    with as_nobody(), pytest.raises(Denied):
        store.ping()
    root.chmod(0o755)
    root.rename(f"{root}-old")
    with pytest.raises(NotFound):
        store.ping()
    root.mkdir()
    with pytest.raises(NotFound, match="another"):
        store.ping()
    root.rmdir()
    Path(f"{root}-old").rmdir()
    with pytest.raises(NotFound):
        store.list()
    with pytest.raises(Unavailable):
        put(store, "k", b"x")
