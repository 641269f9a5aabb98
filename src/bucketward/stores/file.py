"""A directory as a bucket: each regular file below it is an object, tagged by extended attributes.

A file is pinned by inode, times and size.  There are no versions, and whoever may write to the
directory may change a file in place, so tag writes and deletes are not atomic conditions here.
"""

# ruff: noqa: D102 - the docstrings are the Protocol's

from __future__ import annotations

import errno
import fcntl
import heapq
import json
import logging
import os
import re
import stat
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from secrets import token_hex
from typing import Literal
from urllib.parse import unquote_to_bytes, urlsplit

from bucketward.errors import (
    Changed,
    ConfigError,
    Denied,
    Error,
    NotFound,
    Unavailable,
    Unsupported,
)
from bucketward.interfaces import Store
from bucketward.model import NOTHING, ObjectInfo, ObjectRef, Page

PERMISSIONS: Mapping[str, str] = {
    "directory:read": "list the objects",
    "directory:search": "reach the objects",
    "directory:write": "put and delete objects, in the directory and in its .bucketward",
    "file:read": "read the objects to be scanned, and their tags",
    "file:write": "tag objects",
}

log = logging.getLogger(__name__)

PRIVATE = ".bucketward"
"""Below the bucket's own directory: what is being written or deleted.  Never an object."""

_TAGS = "user.bucketward.tags"
_META = "user.bucketward.meta"

_QUOTE = "\U0010fe00"
_MORE = "\U0010fe01"
_BYTE = 0x10FF00
_MORE_END = _MORE.encode()
_MARK = re.compile(f"[{_QUOTE}{_MORE}{chr(_BYTE)}-{chr(_BYTE + 255)}]")
_NO_TEXT = re.compile(f"[{_QUOTE}{_MORE}{chr(_BYTE)}-{chr(_BYTE + 255)}\udc80-\udcff]")
_NAME_MAX = 255
_MOST_PIECES = 6
"""No component of a key of 1,024 bytes fills more names."""

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LISTED = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_CLOCK_REALTIME_COARSE = 5
"""The clock that file times are taken from (clock_getres(2)); `time` has no name for it."""

_FS_IOC_GETFLAGS = 0x80086601
_KEPT_FLAGS = 0x10 | 0x20
"""Immutable and append-only (chattr(1)): the locks that a file system knows."""

_LEFT_AFTER = 3600.0
"""After how many seconds without a write something private was left by a process that died."""

_BATCH = 32_768
_WALKS_KEPT = 4
_OWN_CHANGES_KEPT = 10_000
_CHUNK = 64 << 20
_BOUNCE = 1 << 20


def open_file(url: str) -> FileStore:
    """Open ``file:///absolute/directory``; ``%``, ``?`` and ``#`` in it are percent-encoded."""
    parts = urlsplit(url)
    path = unquote_to_bytes(parts.path)
    is_plain = not parts.query and not parts.fragment and parts.netloc in {"", "localhost"}
    if parts.scheme != "file" or not is_plain or not path.startswith(b"/") or b"\0" in path:
        raise ConfigError(f"{url} is not file:///absolute/directory", backend="file")
    return FileStore(Path(os.fsdecode(path)))


def names_of(key: str) -> list[bytes]:
    """Return the file names, one below the other, that hold `key`; the inverse of `key_of`.

    Most keys are their own path.  The rest are told apart with private-use characters of plane
    16, which are legal wherever text is (JSON, XML, SQS):

    - a component that cannot be a name (empty, ``.``, ``..``, our private directory), or that
      would be taken for the escape of another, has U+10FE00 before it;
    - a component of more than 255 bytes goes over several names, all but the last with U+10FE01
      at the end;
    - in the other direction, a file name that is not UTF-8, or that contains such characters
      without need, has each offending byte as U+10FF00 + byte in its key.

    `Unsupported` if it cannot be: NUL, and the few keys that spell out the escape of a file name
    which means something else there.
    """
    try:
        key.encode()
    except UnicodeEncodeError:
        raise Unsupported(f"{key[:40]!r} is no key: it is not UTF-8", backend="file") from None
    if not key or "\0" in key:
        message = f"{key[:40]!r} cannot be a file: it is empty or contains NUL"
        raise Unsupported(message, backend="file")
    parts = key.split("/")
    names: list[bytes] = []
    for n, part in enumerate(parts):
        names += _split(_name_of(part, _place(n, n == len(parts) - 1)))
    if key_of(names) != key:
        message = f"{key[:40]!r} spells out escapes of this store that mean another file"
        raise Unsupported(message, backend="file")
    return names


def key_of(names: Sequence[bytes]) -> str:
    """Return the key of the file that is reached by `names`, whatever their bytes."""
    parts: list[str] = []
    n = 0
    while n < len(names):
        end = n
        while end < min(len(names) - 1, n + _MOST_PIECES) and names[end].endswith(_MORE_END):
            end += 1
        if end > n:
            place = _place(n, end == len(names) - 1)
            pieces = [name[: -len(_MORE_END)] for name in names[n:end]]
            part = _part_of(b"".join([*pieces, names[end]]), place)
            if _split(_name_of(part, place)) == list(names[n : end + 1]):
                parts.append(part)
                n = end + 1
                continue
        parts.append(_part_of(names[n], _place(n, n == len(names) - 1)))
        n += 1
    return "/".join(parts)


_Place = Literal["only", "first", "later"]
"""Where a component stands in its key: there is no empty key, and ours is the first."""


def _place(n: int, is_last: bool) -> _Place:
    if n > 0:
        return "later"
    return "only" if is_last else "first"


def _name_of(part: str, place: _Place) -> bytes:
    """Return the name of one component: longer than names can be, or b"" if it can have none."""
    if place == "only" and not part:
        return b""
    if _is_natural(part, place):
        return part.encode()
    # It may be what `_part_of` makes of a name that is not text; then that name it is.
    raw = b"".join(
        bytes([ord(char) - _BYTE]) if ord(char) >= _BYTE else char.encode() for char in part
    )
    is_name = 0 < len(raw) <= _NAME_MAX and not {0, 0x2F} & set(raw) and raw not in {b".", b".."}
    is_private = place != "later" and raw == PRIVATE.encode()
    if is_name and not is_private and _part_of(raw, place) == part:
        return raw
    return (_QUOTE + part).encode()


def _part_of(name: bytes, place: _Place) -> str:
    """Return the component that one name, or several joined, stand for."""
    text = name.decode("utf-8", "surrogateescape")
    is_text = text.isascii() or not _NO_TEXT.search(text)
    if is_text and _is_natural(text, place):
        return text
    if text.startswith(_QUOTE):
        with suppress(UnicodeEncodeError):
            if _name_of(text[1:], place) == name:
                return text[1:]
    return _NO_TEXT.sub(
        lambda found: "".join(
            chr(_BYTE + byte) for byte in found[0].encode("utf-8", "surrogateescape")
        ),
        text,
    )


def _is_natural(part: str, place: _Place) -> bool:
    if part in {"", ".", ".."} or (place != "later" and part == PRIVATE):
        return False
    return part.isascii() or not _MARK.search(part)


def _split(name: bytes) -> list[bytes]:
    pieces = []
    while len(name) > _NAME_MAX:
        cut = _NAME_MAX - len(_MORE_END)
        while name[cut] & 0xC0 == 0x80:  # not in the middle of a character
            cut -= 1
        pieces.append(name[:cut] + _MORE_END)
        name = name[cut:]
    return [*pieces, name]


class FileStore:
    """One directory.

    Symbolic links, devices, sockets and pipes are not objects: they are never followed, opened or
    listed, and a key that leads over one is `NotFound`.  Hard links are objects like others.
    File systems mounted below the directory belong to it, but nothing can be put there.

    Files may have longer paths than keys can be: `list` shows them nevertheless, because what
    is not seen is not scanned, and all but `put` and `copy_from` take such keys.  A directory
    that may not be read stops no listing, but makes its end `Denied`.

    A key cannot lie below another object's key (``a`` and ``a/b``): the second put is
    `Unsupported`.  Directories made for a put stay when their last object is deleted.

    `etag` is made of inode, modification time and size, and `token` of the change time, which no
    user can set; this store knows the changes that its own tag writes made.  Another process
    that tags, chmods or links the file makes older pins `Changed`, which costs a second look.

    Windows: who changes a file in place within microseconds of our tag write or delete goes
    unnoticed, hence neither ``tag`` nor ``delete`` is among the conditions.  Replacing the file
    (a rename over it) is always noticed.
    """

    account = ""
    region = ""
    has_versions = False
    conditions = frozenset({"read", "put-absent", "copy-source", "copy-absent"})

    def __init__(
        self, directory: Path, *, page_size: int = 1000, has_tags: bool | None = None
    ) -> None:
        """Open a directory that exists; `has_tags` `None` asks the file system."""
        path = os.path.abspath(directory)  # noqa: PTH100 - resolve() would follow links
        self.bucket = "file://" + _url_path(path)
        self._path = path
        self._page_size = page_size
        self._lock = threading.RLock()
        self._walks: OrderedDict[str, _Walk] = OrderedDict()
        self._own_changes: OrderedDict[str, str] = OrderedDict()
        self._last_time = 0
        self._root = -1
        with _translating(f"directory {path}", "directory:search"):
            self._root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self.has_tags = _has_attributes(self._root) if has_tags is None else has_tags
        self.max_tags = 10 if self.has_tags else 0
        try:
            self._clean()
        except (OSError, Error) as error:
            log.warning("cannot clean %s/%s: %s", path, PRIVATE, error)

    def ping(self) -> None:
        with _translating(f"directory {self._path}", "directory:search"):
            ours, there = os.fstat(self._root), Path(self._path).stat()
        if (ours.st_dev, ours.st_ino) != (there.st_dev, there.st_ino):
            message = f"another directory is at {self._path} than was opened: restart"
            raise NotFound(message, backend="file")
        for mode, name in ((os.R_OK, "read"), (os.X_OK, "search"), (os.W_OK, "write")):
            if not os.access(".", mode, dir_fd=self._root, effective_ids=True):
                message = (
                    f"no permission to {name} in {self._path}, or its file system is read-only"
                )
                raise Denied(message, backend="file", reason=f"directory:{name}")

    def close(self) -> None:
        with self._lock:
            root, self._root = self._root, -1
        if root >= 0:
            os.close(root)

    def list(
        self, prefix: str = "", *, cursor: str = "", versions: bool = False
    ) -> Page[ObjectInfo]:
        # The cursor is the id of a walk that we may still remember, the last key, from which any
        # process can go on, and what could not be read so far.
        del versions
        if os.fstat(self._root).st_nlink == 0:
            raise NotFound(f"directory {self._path} was removed", backend="file")
        with self._lock:
            walk = self._walks.pop(cursor, None)
        if walk is None:
            _, last, denied = json.loads(cursor) if cursor else ("", "", "")
            walk = _Walk(self._root, prefix, names_of(last) if last else [])
            walk.denied = denied
        items = [self._info(key, status) for key, status in walk.take(self._page_size)]
        if not walk.frames:
            if not walk.denied:
                return Page(items)
            if not items:
                raise Denied(walk.denied, backend="file", reason="directory:read")
        cursor = json.dumps([walk.id, items[-1].key, walk.denied])
        with self._lock:
            self._walks[cursor] = walk
            while len(self._walks) > _WALKS_KEPT:
                self._walks.popitem(last=False)
        return Page(items, cursor)

    def prefixes(self, prefix: str = "", delimiter: str = "/") -> Iterator[str]:
        seen: set[str] = set()

        def beginning(text: str) -> str:
            end = text.find(delimiter, len(prefix))
            return text[: end + len(delimiter)] if end >= 0 else ""

        def is_news(text: str, is_dir: bool) -> bool:
            begin = beginning(text)
            return begin not in seen if begin else is_dir

        walk = _Walk(self._root, prefix, [], is_news)
        while found := walk.take(1):
            begin = beginning(found[0][0])
            seen.add(begin)
            yield begin
        if walk.denied:
            raise Denied(walk.denied, backend="file", reason="directory:read")

    def stat(self, ref: ObjectRef) -> ObjectInfo:
        with self._opened(ref) as (fd, status):
            return self._info(ref.key, status, fd)

    def read(
        self,
        ref: ObjectRef | ObjectInfo,
        accept: Callable[[ObjectInfo], int],
        *,
        start: int = 0,
        length: int | None = None,
    ) -> ObjectInfo:
        with self._opened(ref, is_read=True) as (fd, status):
            info = self._info(ref.key, status, fd)
            size = max(0, info.size - start)
            size = size if length is None else min(size, length)
            target = accept(info)
            with _translating(f"{ref.key!r} in {self.bucket}", "file:read"):
                moved = _transfer(fd, start, target, size)
                self._check_still(info, fd)
            if moved < size:
                message = f"only {moved} of {size} bytes of {ref.key!r} could be read"
                raise Unavailable(message, backend="file")
            return info

    def tags(self, info: ObjectInfo) -> Mapping[str, str]:
        with self._opened(info) as (fd, _):
            return self._attribute(fd, _TAGS)

    def replace_tags(self, info: ObjectInfo, tags: Mapping[str, str]) -> None:
        if not self.has_tags:
            raise Unsupported(f"{self.bucket} has no tags", backend="file")
        value = self._checked(tags)
        with self._opened(info) as (fd, status), _translating(f"{info.key!r}", "file:write"):
            path = f"/proc/self/fd/{fd}"
            try:
                before = os.getxattr(path, _TAGS)
            except OSError as error:
                if error.errno != errno.ENODATA:
                    raise
                before = b"{}"
            with self._lock:
                latest = os.fstat(fd)
                if not self._is_unchanged(_token(status), latest):
                    raise Changed(f"{info.key!r} changed while it was tagged", backend="file")
                self._write_tags(path, value, info.key)
                self._note_own_change(_token(latest), _token(os.fstat(fd)))
            try:
                with self._opened(ObjectRef(self.bucket, info.key, etag=info.etag)):
                    pass
            except (Changed, NotFound):
                os.setxattr(path, _TAGS, before)
                raise

    def put(
        self,
        key: str,
        fd: int,
        size: int,
        *,
        tags: Mapping[str, str] = NOTHING,
        metadata: Mapping[str, str] = NOTHING,
        headers: Mapping[str, str] = NOTHING,
        if_absent: bool = False,
    ) -> ObjectInfo:
        names = _target_names(key)
        attributes = self._attributes(tags, metadata, headers)
        with self._staged(key) as (private, temporary, target):
            moved = _transfer(fd, 0, target, size)
            if moved < size:
                message = f"only {moved} of {size} bytes are there to put under {key!r}"
                raise Unavailable(message, backend="file")
            return self._publish(private, temporary, target, names, attributes, if_absent=if_absent)

    def copy_from(
        self,
        source: Store,
        info: ObjectInfo,
        key: str,
        *,
        tags: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        if_absent: bool = False,
    ) -> ObjectInfo:
        if not isinstance(source, FileStore):
            raise Unsupported("can copy only from a directory: read and put", backend="file")
        names = _target_names(key)
        with source._opened(info, is_read=True) as (fd, status):  # noqa: SLF001 - another of us
            known = source._info(info.key, status, fd)  # noqa: SLF001
            attributes = self._attributes(
                source._attribute(fd, _TAGS) if tags is None else tags,  # noqa: SLF001
                known.metadata if metadata is None else metadata,
                known.headers,
            )
            with self._staged(key) as (private, temporary, target):
                moved = _transfer(fd, 0, target, known.size)
                source._check_still(known, fd)  # noqa: SLF001
                if moved < known.size:
                    message = f"only {moved} of {known.size} bytes of {info.key!r} could be read"
                    raise Unavailable(message, backend="file")
                return self._publish(
                    private, temporary, target, names, attributes, if_absent=if_absent
                )

    def delete(self, info: ObjectInfo) -> None:
        # What is moved aside is judged there, where nobody can replace it.  A journal says where
        # it belongs, so that `_clean` can put it back if we die in between.
        with ExitStack() as stack:
            fd, status = stack.enter_context(self._opened(info))
            stack.enter_context(_translating(f"{info.key!r} in {self.bucket}", "directory:write"))
            names = names_of(info.key)
            private = stack.enter_context(self._private())
            parent = stack.enter_context(_closing(self._open_parent(names)))
            aside = f"del-{token_hex(8)}"
            _write_journal(private, f"{aside}.key", b"/".join(names))
            try:
                os.rename(names[-1], aside, src_dir_fd=parent, dst_dir_fd=private)
            except OSError as error:
                os.unlink(f"{aside}.key", dir_fd=private)
                if error.errno == errno.EPERM and _is_kept(fd):
                    message = f"{info.key!r} is immutable: chattr -i -a, if that is meant"
                    raise Denied(message, backend="file", reason="object-lock") from error
                if error.errno == errno.EXDEV:
                    message = f"{info.key!r} is on another file system than {self._path}"
                    raise Unsupported(message, backend="file") from error
                raise
            moved = os.stat(aside, dir_fd=private, follow_symlinks=False)
            if (moved.st_dev, moved.st_ino) == (status.st_dev, status.st_ino) and (
                _etag(moved) == info.etag
            ):
                os.unlink(aside, dir_fd=private)
                os.unlink(f"{aside}.key", dir_fd=private)
                _sync(parent)
                return
            self._put_back(private, aside, names)
            raise Changed(f"{info.key!r} in {self.bucket} was replaced", backend="file")

    def _info(self, key: str, status: os.stat_result, fd: int | None = None) -> ObjectInfo:
        """Return the pin, with tags and metadata if there is an `fd` to ask."""
        meta = self._attribute(fd, _META) if fd is not None else NOTHING
        return ObjectInfo(
            self.bucket,
            key,
            status.st_size,
            _etag(status),
            _time(status),
            token=_token(status),
            tag_count=len(self._attribute(fd, _TAGS)) if fd is not None else None,
            metadata={k[1:]: v for k, v in meta.items() if k.startswith("m")},
            headers={k[1:]: v for k, v in meta.items() if k.startswith("h")},
        )

    @contextmanager
    def _opened(
        self, ref: ObjectRef | ObjectInfo, *, is_read: bool = False
    ) -> Iterator[tuple[int, os.stat_result]]:
        """Yield a descriptor and the state of exactly what `ref` names.

        The descriptor can be asked for everything, but read only with `is_read`.
        """
        what = f"{ref.key!r} in {self.bucket}"
        missing = NotFound(f"there is no {what}", backend="file")
        with ExitStack() as stack:
            with _translating(what, "directory:search"):
                try:
                    names = names_of(ref.key)
                except Unsupported:
                    raise missing from None
                if ref.version_id is not None:
                    raise missing
                parent = stack.enter_context(_closing(self._open_parent(names)))
                # O_PATH, because opening a pipe or a device for reading does something.
                flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = stack.enter_context(_closing(os.open(names[-1], flags, dir_fd=parent)))
                status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise missing
            if is_read:
                with _translating(what, "file:read"):
                    flags = os.O_RDONLY | os.O_CLOEXEC
                    fd = stack.enter_context(_closing(os.open(f"/proc/self/fd/{fd}", flags)))
                    status = _settled(fd)
            token = ref.token if isinstance(ref, ObjectInfo) else ""
            is_other = ref.etag is not None and ref.etag != _etag(status)
            if is_other or (token and not self._is_unchanged(token, status)):
                # A delete under way elsewhere changes the time of what it has taken away.
                with _translating(what, "directory:search"):
                    os.stat(names[-1], dir_fd=parent, follow_symlinks=False)
                raise Changed(f"{what} was changed or replaced", backend="file")
            yield fd, status

    def _check_still(self, info: ObjectInfo, fd: int) -> None:
        """Raise `Changed` if the open file is no longer as `info` says.

        When its last name has gone, its change time has moved for that reason alone.
        """
        now = os.fstat(fd)
        is_same = _etag(now) == info.etag
        if not is_same or not (now.st_nlink == 0 or self._is_unchanged(info.token, now)):
            raise Changed(f"{info.key!r} changed while it was read", backend="file")

    def _is_unchanged(self, token: str, status: os.stat_result) -> bool:
        current = _token(status)
        with self._lock:
            for _ in range(100):  # a clock set back may make a circle
                if token == current:
                    return True
                token = self._own_changes.get(token, "")
        return False

    def _note_own_change(self, before: str, after: str) -> None:
        if before != after:
            with self._lock:
                self._own_changes[before] = after
                while len(self._own_changes) > _OWN_CHANGES_KEPT:
                    self._own_changes.popitem(last=False)

    def _open_parent(self, names: Sequence[bytes], made: MutableSequence[int] | None = None) -> int:
        """Open the directory that holds the last of `names`, following no links.

        With `made`, directories are made and their depths added to it.
        """
        fd = os.dup(self._root)
        try:
            for depth, name in enumerate(names[:-1]):
                try:
                    below = os.open(name, _DIRECTORY, dir_fd=fd)
                except FileNotFoundError:
                    if made is None:
                        raise
                    made.append(depth)
                    with suppress(FileExistsError):
                        os.mkdir(name, dir_fd=fd)
                    below = os.open(name, _DIRECTORY, dir_fd=fd)
                except NotADirectoryError:
                    if made is None:
                        raise
                    taken = key_of(names[: depth + 1])
                    message = f"no object can be below {taken!r}, which is no directory here"
                    raise Unsupported(message, backend="file") from None
                os.close(fd)
                fd = below
        except BaseException:
            os.close(fd)
            raise
        return fd

    @contextmanager
    def _private(self, *, make: bool = True) -> Iterator[int]:
        """Yield our private directory, once it is sure that it is ours alone."""
        if make:
            with suppress(FileExistsError):
                os.mkdir(PRIVATE, 0o700, dir_fd=self._root)
        not_ours = f"{self._path}/{PRIVATE} is no directory of our own: remove it"
        try:
            opened = os.open(PRIVATE, _LISTED, dir_fd=self._root)
        except NotADirectoryError as error:
            raise Denied(not_ours, backend="file", reason="directory:write") from error
        with _closing(opened) as fd:
            status = os.fstat(fd)
            if status.st_uid != os.geteuid():
                raise Denied(not_ours, backend="file", reason="directory:write")
            if status.st_mode & 0o077:
                os.fchmod(fd, 0o700)
            try:
                other = os.stat(PRIVATE.upper(), dir_fd=self._root, follow_symlinks=False)
            except FileNotFoundError:
                pass
            else:
                if other.st_ino == status.st_ino:
                    message = f"{self._path} does not tell upper from lower case"
                    raise Unsupported(message, backend="file")
            yield fd

    @contextmanager
    def _staged(self, key: str) -> Iterator[tuple[int, str, int]]:
        """Yield our private directory, the name of a new file in it and the file."""
        # Nothing that is missing here is the object, so `NotFound` would tell a lie.
        what = f"place for {key!r} in {self.bucket}"
        with _translating(what, "directory:write", Unavailable), ExitStack() as stack:
            private = stack.enter_context(self._private())
            name = f"put-{token_hex(8)}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = stack.enter_context(_closing(os.open(name, flags, 0o666, dir_fd=private)))
            try:
                yield private, name, fd
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=private)

    def _publish(
        self,
        private: int,
        temporary: str,
        fd: int,
        names: Sequence[bytes],
        attributes: Mapping[str, bytes],
        *,
        if_absent: bool,
    ) -> ObjectInfo:
        """Give the finished file its place, at once and for good."""
        key = key_of(names)
        for name, value in attributes.items():
            self._write_tags(fd, value, key, name)
        # The kernel's own times may be as coarse as 10 ms; an inode may be used again sooner.
        with self._lock:
            self._last_time = max(self._last_time + 1, time.time_ns())
            now = self._last_time
        os.utime(fd, ns=(now, now))
        os.fsync(fd)
        made: list[int] = []
        try:
            with _closing(self._open_parent(names, made)) as parent:
                if if_absent:
                    os.link(
                        temporary,
                        names[-1],
                        src_dir_fd=private,
                        dst_dir_fd=parent,
                        follow_symlinks=False,
                    )
                    os.unlink(temporary, dir_fd=private)
                else:
                    self._check_place(parent, names, is_taken=False)
                    os.rename(temporary, names[-1], src_dir_fd=private, dst_dir_fd=parent)
        except (FileExistsError, IsADirectoryError):
            with _closing(self._open_parent(names)) as parent:
                self._check_place(parent, names, is_taken=if_absent)
            raise
        except FileNotFoundError as error:
            message = f"the directory of {key!r} was removed under our hands: try again"
            raise Unavailable(message, backend="file") from error
        self._sync_path(names, {*made, len(names) - 1})
        return self._info(key, os.fstat(fd), fd)

    def _check_place(self, parent: int, names: Sequence[bytes], *, is_taken: bool) -> None:
        """Raise if the last of `names` is there: as no object, or with `is_taken` at all."""
        try:
            status = os.stat(names[-1], dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return
        key = key_of(names)
        if not stat.S_ISREG(status.st_mode):
            message = f"{key!r} is a directory or the like here and cannot be an object too"
            raise Unsupported(message, backend="file")
        if is_taken:
            raise Changed(f"{key!r} in {self.bucket} is taken", backend="file")

    def _sync_path(self, names: Sequence[bytes], depths: set[int]) -> None:
        """Make the entries at these depths of the path durable."""
        fd = os.dup(self._root)
        try:
            for depth, name in enumerate(names):
                if depth in depths:
                    _sync(fd)
                if depth < len(names) - 1:
                    below = os.open(name, _DIRECTORY, dir_fd=fd)
                    os.close(fd)
                    fd = below
        except (FileNotFoundError, NotADirectoryError):
            pass  # somebody has moved it already
        finally:
            os.close(fd)

    def _put_back(self, private: int, aside: str, names: Sequence[bytes]) -> None:
        """Return what `delete` took away, unless something newer is in its place."""
        with _closing(self._open_parent(names, [])) as parent:
            if stat.S_ISDIR(os.stat(aside, dir_fd=private, follow_symlinks=False).st_mode):
                os.rename(aside, names[-1], src_dir_fd=private, dst_dir_fd=parent)
            else:
                with suppress(FileExistsError):
                    os.link(
                        aside,
                        names[-1],
                        src_dir_fd=private,
                        dst_dir_fd=parent,
                        follow_symlinks=False,
                    )
                os.unlink(aside, dir_fd=private)
            os.unlink(f"{aside}.key", dir_fd=private)
            _sync(parent)

    def _clean(self) -> None:
        """Finish what a process that died has left in our private directory."""
        with ExitStack() as stack:
            try:
                private = stack.enter_context(self._private(make=False))
            except FileNotFoundError:
                return
            for name in os.listdir(private):  # noqa: PTH208 - a descriptor, no path
                age = time.time() - os.stat(name, dir_fd=private, follow_symlinks=False).st_mtime
                if age < _LEFT_AFTER:
                    continue
                if name.startswith("put-"):
                    os.unlink(name, dir_fd=private)
                elif name.endswith(".key"):
                    self._finish(private, name)

    def _finish(self, private: int, journal: str) -> None:
        with _closing(os.open(journal, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=private)) as fd:
            path = os.read(fd, os.fstat(fd).st_size)
        aside = journal.removesuffix(".key")
        try:
            os.stat(aside, dir_fd=private, follow_symlinks=False)
        except FileNotFoundError:
            os.unlink(journal, dir_fd=private)
            return
        names = path.split(b"/")
        if not path or {b"", b".", b".."} & set(names) or names[0] == PRIVATE.encode():
            log.warning("%s/%s/%s belongs nowhere: look at it", self._path, PRIVATE, aside)
            return
        log.warning("putting %r back: its deletion was cut short", key_of(names))
        self._put_back(private, aside, names)

    def _attribute(self, fd: int, name: str) -> Mapping[str, str]:
        """Return the strings in an attribute, which anybody may have written."""
        if not self.has_tags:
            return {}
        with _translating("an extended attribute", "file:read"):
            try:
                found = json.loads(os.getxattr(f"/proc/self/fd/{fd}", name))
            except OSError as error:
                if error.errno in {errno.ENODATA, errno.EOPNOTSUPP}:
                    return {}
                raise
            except (ValueError, RecursionError):
                return {}
        if not isinstance(found, dict):
            return {}
        return {k: v for k, v in found.items() if isinstance(v, str)}

    def _attributes(
        self, tags: Mapping[str, str], metadata: Mapping[str, str], headers: Mapping[str, str]
    ) -> Mapping[str, bytes]:
        found = {}
        if tags:
            found[_TAGS] = self._checked(tags)
        if metadata or headers:
            if not self.has_tags:
                message = f"the file system of {self._path} has no place for metadata"
                raise Unsupported(message, backend="file")
            both = {f"m{k}": v for k, v in metadata.items()}
            both.update({f"h{k}": v for k, v in headers.items()})
            found[_META] = _json(both)
        return found

    def _checked(self, tags: Mapping[str, str]) -> bytes:
        is_fine = len(tags) <= self.max_tags and all(
            1 <= len(name) <= 128 and len(value) <= 256 for name, value in tags.items()
        )
        if not is_fine:
            message = f"at most {self.max_tags} tags, names of 128 and values of 256 characters"
            raise Unsupported(message, backend="file", reason="tag-limit")
        return _json(tags)

    def _write_tags(self, file: int | str, value: bytes, key: str, name: str = _TAGS) -> None:
        try:
            os.setxattr(file, name, value)
        except OSError as error:
            # ext4 keeps all attributes of a file in one block, and says that the disk is full.
            if error.errno in {errno.ENOSPC, errno.E2BIG, errno.ERANGE, errno.EDQUOT}:
                message = f"the tags and metadata of {key!r} are too large for its file system"
                raise Unsupported(message, backend="file", reason="tag-limit") from error
            raise


@dataclass(slots=True)
class _Frame:
    """The names of one directory that are still to come, the next one last."""

    low: bytes
    is_low_done: bool
    names: list[tuple[bytes, bool]] = field(default_factory=list)
    has_more: bool = True


class _Walk:
    """A walk over all objects below a prefix, in the order of bytes, directory by directory.

    It holds no descriptor between two calls of `take`, one at a time within, and never more than
    some ten thousand names: a directory with more is read again, behind the last name.  `denied`
    tells the first thing that could not be read.
    """

    def __init__(
        self,
        root: int,
        prefix: str,
        after: Sequence[bytes],
        is_wanted: Callable[[str, bool], bool] | None = None,
    ) -> None:
        self.id = token_hex(6)
        self.frames: list[_Frame] = []
        self.denied = ""
        self._root = root
        self._prefix = prefix
        self._after = list(after)
        self._is_wanted = is_wanted
        self._path: list[bytes] = []
        self._push()

    def take(self, limit: int) -> list[tuple[str, os.stat_result]]:
        """Return the next objects, with their keys; fewer than `limit` only at the end."""
        found: list[tuple[str, os.stat_result]] = []
        fd = -1
        try:
            while self.frames and len(found) < limit:
                frame = self.frames[-1]
                if not frame.names and not frame.has_more:
                    self.frames.pop()
                    if self._path:
                        self._path.pop()
                    fd = _closed(fd)
                    continue
                if fd < 0:
                    fd = self._open()
                if fd < 0:
                    frame.names, frame.has_more = [], False
                    continue
                if not frame.names:
                    self._fill(frame, fd)
                    continue
                name, is_dir = frame.names.pop()
                if is_dir:
                    if self._is_skipped(name):
                        continue
                    self._path.append(name)
                    self._push()
                    below = self._open_below(fd, name)
                    _closed(fd)
                    fd = below
                    self.frames[-1].has_more = fd >= 0
                    continue
                key = key_of([*self._path, name])
                if not key.startswith(self._prefix):
                    continue
                if self._is_wanted is not None and not self._is_wanted(key, False):
                    continue
                status = self._stat(fd, name, key)
                if status is not None:
                    found.append((key, status))
        finally:
            _closed(fd)
        return found

    def _push(self) -> None:
        depth = len(self._path)
        if depth < len(self._after) and self._path == self._after[:depth]:
            self.frames.append(_Frame(self._after[depth], depth == len(self._after) - 1))
        else:
            self.frames.append(_Frame(b"", is_low_done=True))

    def _open(self) -> int:
        """Open the current directory from the top; -1 if it is gone."""
        fd = os.dup(self._root)
        for name in self._path:
            below = self._open_below(fd, name, _DIRECTORY)
            os.close(fd)
            fd = below
            if fd < 0:
                return fd
        below = self._open_below(fd, b".")
        os.close(fd)
        return below

    def _is_skipped(self, name: bytes) -> bool:
        """Return whether nothing below a directory is wanted, as far as its name tells."""
        if self._is_wanted is None or name.endswith(_MORE_END):
            return False
        return not self._is_wanted(_beginning_of([*self._path, name]), True)

    def _open_below(self, fd: int, name: bytes, flags: int = _LISTED) -> int:
        """Open a directory; -1 if it is gone, or replaced, since its name was read, or denied."""
        try:
            return os.open(name, flags, dir_fd=fd)
        except (FileNotFoundError, NotADirectoryError):
            return -1
        except OSError as error:
            path = key_of(self._path)
            try:
                with _translating(f"directory {path!r} in the bucket", "directory:read"):
                    raise error from None
            except Denied as denied:
                self.denied = self.denied or denied.message
                return -1

    def _stat(self, fd: int, name: bytes, key: str) -> os.stat_result | None:
        try:
            with _translating(f"{key!r} in the bucket", "directory:search"):
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except NotFound:
            return None
        except Denied as error:
            self.denied = self.denied or error.message
            return None
        return status if stat.S_ISREG(status.st_mode) else None

    def _fill(self, frame: _Frame, fd: int) -> None:
        most = max(256, _BATCH >> len(self.frames))
        with _translating("a directory in the bucket", "directory:read"), os.scandir(fd) as entries:
            names = heapq.nsmallest(most, self._candidates(frame, entries))
        frame.has_more = len(names) == most
        if names:
            frame.low, frame.is_low_done = names[-1][0], True
        frame.names = names[::-1]

    def _candidates(
        self, frame: _Frame, entries: Iterator[os.DirEntry[str]]
    ) -> Iterator[tuple[bytes, bool]]:
        # While a component is not complete, nobody knows what it will be.
        is_open = bool(self._path) and self._path[-1].endswith(_MORE_END)
        is_narrowed = bool(self._prefix) and not is_open
        base = _beginning_of(self._path) if is_narrowed else ""
        for entry in entries:
            name = os.fsencode(entry.name)
            if name < frame.low or (name == frame.low and frame.is_low_done):
                continue
            if not self._path and entry.name == PRIVATE:
                continue
            is_dir = entry.is_dir(follow_symlinks=False)
            if not is_dir and not entry.is_file(follow_symlinks=False):
                log.debug("%r is no regular file and thus no object", entry.name)
                continue
            if is_narrowed and not (is_dir and name.endswith(_MORE_END)):
                place = _place(len(self._path), not is_dir)
                text = base + _part_of(name, place) + "/" * is_dir
                if not text.startswith(self._prefix) and not (
                    is_dir and self._prefix.startswith(text)
                ):
                    continue
            yield name, is_dir


def _beginning_of(names: Sequence[bytes]) -> str:
    """Return how all keys below a directory begin."""
    return key_of([*names, b"x"])[:-1]


def _target_names(key: str) -> list[bytes]:
    names = names_of(key)
    if len(key.encode()) > 1024:
        message = f"{key[:40]!r}... is no key: those have at most 1,024 bytes of UTF-8"
        raise Unsupported(message, backend="file")
    return names


def _etag(status: os.stat_result) -> str:
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def _token(status: os.stat_result) -> str:
    return f"{status.st_ino:x}-{status.st_ctime_ns:x}"


def _time(status: os.stat_result) -> datetime:
    # Anybody can set any time, also one that no calendar has.
    try:
        microseconds = timedelta(microseconds=status.st_mtime_ns // 1000)
        return datetime(1970, 1, 1, tzinfo=UTC) + microseconds
    except OverflowError:
        return datetime(9999 if status.st_mtime_ns > 0 else 1, 1, 1, tzinfo=UTC)


def _settled(fd: int) -> os.stat_result:
    """Return the state of a file once another change could not leave it the same times."""
    status = os.fstat(fd)
    if status.st_ctime_ns >= time.clock_gettime_ns(_CLOCK_REALTIME_COARSE):
        time.sleep(0.01)
        status = os.fstat(fd)
    return status


def _transfer(source: int, start: int, target: int, size: int) -> int:
    """Move `size` bytes to the start of `target`, in the kernel if it can; return how many came."""
    with suppress(OSError):  # a pipe has no start
        os.lseek(target, 0, os.SEEK_SET)
    done = 0
    ways: list[Callable[[int, int], int]] = [
        lambda at, most: os.copy_file_range(source, target, most, at),
        lambda at, most: os.sendfile(target, source, at, most),
        lambda at, most: _bounce(source, target, at, most),
    ]
    while done < size:
        try:
            moved = ways[0](start + done, min(size - done, _CHUNK))
        except OSError as error:
            # Not between these two: other file systems, a device, an appending descriptor.
            refusals = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}
            if len(ways) == 1 or error.errno not in refusals:
                raise
            del ways[0]
            continue
        if not moved:
            break
        done += moved
    return done


def _bounce(source: int, target: int, at: int, most: int) -> int:
    view = memoryview(os.pread(source, min(most, _BOUNCE), at))
    done = 0
    while done < len(view):
        done += os.write(target, view[done:])
    return done


def _json(texts: Mapping[str, str]) -> bytes:
    try:
        return json.dumps(dict(texts), ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        message = "a tag or metadata is not UTF-8"
        raise Unsupported(message, backend="file", reason="tag-limit") from None


def _has_attributes(root: int) -> bool:
    try:
        os.getxattr(f"/proc/self/fd/{root}", _TAGS)
    except OSError as error:
        return error.errno not in {errno.ENOTSUP, errno.ENOSYS}
    return True


def _is_kept(fd: int) -> bool:
    flags = b""
    with suppress(OSError), _closing(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)) as opened:
        flags = fcntl.ioctl(opened, _FS_IOC_GETFLAGS, bytes(8))
    return bool(flags) and bool(struct.unpack("=I", flags[:4])[0] & _KEPT_FLAGS)


def _write_journal(directory: int, name: str, text: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with _closing(os.open(name, flags, 0o600, dir_fd=directory)) as fd:
        os.write(fd, text)


def _sync(directory: int) -> None:
    # A directory that we may write but not read cannot be opened for this.
    with suppress(PermissionError), _closing(os.open(".", _LISTED, dir_fd=directory)) as fd:
        os.fsync(fd)


@contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _closed(fd: int) -> int:
    if fd >= 0:
        os.close(fd)
    return -1


def _url_path(path: str) -> str:
    """Return an absolute path as it stands in a URL: only what would end or garble it encoded."""
    text = os.fsencode(path).decode("utf-8", "surrogateescape")
    return re.sub(
        "[%?#\x00-\x1f\x7f\udc80-\udcff]",
        lambda found: f"%{found[0].encode('utf-8', 'surrogateescape')[0]:02X}",
        text,
    )


@contextmanager
def _translating(what: str, permission: str, missing: type[Error] = NotFound) -> Iterator[None]:
    """Turn what the operating system says of `what` into our errors."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        match error.errno:
            case errno.ENOENT | errno.ENOTDIR | errno.ELOOP:
                raise missing(f"there is no {what}", backend="file") from error
            case errno.EACCES | errno.EPERM | errno.EROFS:
                message = f"{what}: {reason}; {permission} is needed"
                raise Denied(message, backend="file", reason=permission) from error
            case (
                errno.ENAMETOOLONG
                | errno.EINVAL
                | errno.EILSEQ
                | errno.EISDIR
                | errno.EXDEV
                | errno.EOPNOTSUPP
            ):
                message = f"the file system cannot do this with {what}: {reason}"
                raise Unsupported(message, backend="file") from error
            case _:
                raise Unavailable(f"{what}: {reason}", backend="file") from error
