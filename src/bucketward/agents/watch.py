"""The directory watch: announces what is written into directory buckets, when it is at rest.

It is built on inotify itself.  watchfiles 1.3 was tried: one file name that is not UTF-8 makes it
raise for ever after, and the kernel's word that events were lost does not get through (its issue
348).  Neither it nor we hear of what other machines do on a network file system, of writes
through a mapping, or of a file that is written in place and never closed: the keeper's sweep finds
those.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import os
import select
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bucketward.errors import ConfigError, Error
from bucketward.model import ObjectRef

log = logging.getLogger(__name__)

PRIVATE = b".bucketward"
"""At a bucket's root: the store's own."""

_BATCH = 500
_MAX_RETRY_SECONDS = 30.0
_MEND_SECONDS = 2.0
_FOLLOW_SECONDS = 2.0

# linux/inotify.h
_IN_CLOSE_WRITE, _IN_MOVED_FROM, _IN_MOVED_TO, _IN_CREATE = 0x8, 0x40, 0x80, 0x100
_IN_DELETE_SELF, _IN_MOVE_SELF, _IN_UNMOUNT, _IN_Q_OVERFLOW = 0x400, 0x800, 0x2000, 0x4000
_IN_IGNORED, _IN_ONLYDIR, _IN_DONT_FOLLOW, _IN_ISDIR = 0x8000, 0x1000000, 0x2000000, 0x40000000
# Not IN_MODIFY: three busy writers made 300,000 of them a second and the queue holds 16,384.
_WANTED = (
    _IN_CLOSE_WRITE | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE_SELF | _IN_MOVE_SELF
)
_HEADER = struct.Struct("iIII")

Place = tuple[str, bytes]
"""A bucket and the path of a file below its root."""


@dataclass(slots=True)
class _Pending:
    seen: tuple[int, int, int]
    due: float


class Watch:
    """Watches `directories` (by bucket identity), each with all that is below it.

    A file that was created, written and closed, or moved in is given to `enqueue` once its size
    and time have not changed for `settle` seconds; again whenever that happens again.  What
    `enqueue` refuses with an `Error` is kept and offered again.  Symbolic links, special files,
    the private directory and what `key_of` has no key for (`None`) are passed over; `key_of` gets
    a bucket and the path of a file below its root.

    Where something may have been missed, `resync` is called with the bucket, to order that a
    listing be compared with the ledger.  That is so at the start, as what was there before is not
    announced; when the kernel or `max_pending` lost events; and when a directory could not be
    watched.  All callbacks are made on the one thread of the watch, and should not keep it.
    """

    def __init__(
        self,
        directories: Mapping[str, Path],
        enqueue: Callable[[Sequence[ObjectRef]], None],
        *,
        key_of: Callable[[str, bytes], str | None],
        resync: Callable[[str], None],
        settle: float = 1.0,
        max_pending: int = 100_000,
    ) -> None:
        self._enqueue = enqueue
        self._key_of = key_of
        self._resync = resync
        self._settle = settle
        self._max_pending = max_pending
        self._trees = {
            bucket: _Tree(bucket, os.fsencode(path), self._expect, self._doubt)
            for bucket, path in directories.items()
        }
        # All wait equally long, so the first one is due first.
        self._pending: dict[Place, _Pending] = {}
        self._retry_at = 0.0
        self._retry_seconds = 0.0
        self._doubts: dict[str, float] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._wake = -1

    def start(self) -> None:
        """Watch from now on, in a thread; `ConfigError` if a directory is not there."""
        try:
            for tree in self._trees.values():
                tree.open()
        except ConfigError:
            self._close()
            raise
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="watch")
        self._thread.start()

    def stop(self) -> None:
        """Stop at once; what was not announced yet is for the sweep.  Stopping twice is fine."""
        self._stopping.set()
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            self._thread = None
            self._close()
            os.close(self._wake)

    def _close(self) -> None:
        for tree in self._trees.values():
            tree.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                for tree in self._trees.values():
                    tree.mend(self._stopping)
                self._wait()
                for tree in self._trees.values():
                    tree.hear(self._stopping)
                self._announce()
                self._settle_doubts()
            except Exception:
                # A bug must not end the watch, and what it cost must not be lost.
                log.exception("the directory watch failed")
                self._pending.clear()
                for bucket in self._trees:
                    self._doubt(bucket)
                self._stopping.wait(max(self._settle, 1.0))

    def _wait(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        dues = list(self._doubts.values())
        for tree in self._trees.values():
            if tree.is_open:
                poller.register(tree.fd, select.POLLIN)
            else:
                dues.append(tree.mend_at)
        if self._pending:
            dues.append(max(next(iter(self._pending.values())).due, self._retry_at))
        poller.poll(max(0.0, min(dues) - time.monotonic()) * 1000 + 1 if dues else None)

    def _expect(self, bucket: str, path: bytes) -> None:
        place = (bucket, path)
        if place in self._pending:
            return
        if len(self._pending) >= self._max_pending:
            log.warning("%d files wait to be at rest: sweeping instead", len(self._pending))
            for each in {bucket, *(bucket for bucket, _ in self._pending)}:
                self._doubt(each)
            self._pending.clear()
            return
        seen = self._trees[bucket].look(path)
        if seen is not None:
            self._pending[place] = _Pending(seen, time.monotonic() + self._settle)

    def _announce(self) -> None:
        now = time.monotonic()
        if now < self._retry_at:
            return
        ready: dict[Place, ObjectRef] = {}
        for place in list(itertools.islice(self._pending, _BATCH)):
            entry = self._pending[place]
            if entry.due > now:
                break
            seen = self._trees[place[0]].look(place[1])
            if seen == entry.seen and (key := self._key_of(*place)) is not None:
                ready[place] = ObjectRef(place[0], key, event_at=datetime.now(UTC))
                continue
            del self._pending[place]
            if seen is not None and seen != entry.seen:
                self._pending[place] = _Pending(seen, now + self._settle)
        if not ready:
            return
        try:
            self._enqueue(list(ready.values()))
        except Error as error:
            self._retry_seconds = min(max(1.0, self._retry_seconds * 2), _MAX_RETRY_SECONDS)
            self._retry_at = time.monotonic() + self._retry_seconds
            log.error(
                "%d new files could not be queued, trying again in %.0f s: %s",
                len(self._pending),
                self._retry_seconds,
                error,
            )
            return
        self._retry_seconds = 0.0
        for place in ready:
            del self._pending[place]

    def _doubt(self, bucket: str) -> None:
        # After a pause: doubts come in crowds, and what is being written gets its rest.
        self._doubts.setdefault(bucket, time.monotonic() + self._settle)

    def _settle_doubts(self) -> None:
        for bucket, due in list(self._doubts.items()):
            if due > time.monotonic():
                continue
            try:
                self._resync(bucket)
            except Error as error:
                log.error("no sweep of %s could be ordered, trying again: %s", bucket, error)
                self._doubts[bucket] = time.monotonic() + max(self._settle, 1.0)
            else:
                del self._doubts[bucket]


class Watches:
    """One watch for each protected directory, in step with what is protected."""

    def __init__(
        self, wanted: Callable[[], Mapping[str, Path]], make: Callable[[str, Path], Watch]
    ) -> None:
        self._wanted = wanted
        self._make = make
        self._running: dict[str, Watch] = {}
        self._problem = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watches")

    def start(self) -> None:
        """Watch what is protected now, and from now on; `ConfigError` if that cannot be."""
        try:
            self._step()
        except BaseException:
            self._stop_all()
            raise
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stopping.set()
        self._thread.join()
        self._stop_all()

    def _stop_all(self) -> None:
        while self._running:
            self._running.popitem()[1].stop()

    def _follow(self) -> None:
        while not self._stopping.wait(_FOLLOW_SECONDS):
            try:
                self._step()
                self._problem = ""
            except Error as error:
                if str(error) != self._problem:
                    self._problem = str(error)
                    log.error("%s", error)

    def _step(self) -> None:
        wanted = self._wanted()
        for bucket in self._running.keys() - wanted.keys():
            self._running.pop(bucket).stop()
            log.info("%s is not watched any more", bucket)
        problem: Error | None = None
        for bucket in wanted.keys() - self._running.keys():
            watch = self._make(bucket, wanted[bucket])
            try:
                watch.start()
            except Error as error:
                problem = error
                continue
            self._running[bucket] = watch
            log.info("drop a file into %s and its verdict appears here", wanted[bucket])
        if problem is not None:
            raise problem


class _Tree:
    """One bucket's directories and what the kernel says of them."""

    def __init__(
        self,
        bucket: str,
        root: bytes,
        expect: Callable[[str, bytes], None],
        doubt: Callable[[str], None],
    ) -> None:
        self._bucket = bucket
        self._root = root
        self._expect = expect
        self._doubt = doubt
        self._inotify: _Inotify | None = None
        self._is_fresh = False
        # The kernel watches directories, not paths: one that is moved keeps its number.
        self._paths: dict[int, bytes] = {}
        self._numbers: dict[bytes, int] = {}
        self.mend_at = 0.0

    @property
    def is_open(self) -> bool:
        return self._inotify is not None

    @property
    def fd(self) -> int:
        assert self._inotify is not None
        return self._inotify.fd

    def open(self) -> None:
        """Watch the root; the directories below it with the first `mend`."""
        self._inotify = _Inotify()
        try:
            self._watch(b"")
        except OSError as error:
            self.close()
            raise ConfigError(
                f"{self._bucket} cannot be watched ({error.strerror}): make the directory and let "
                "our user read it, or take the bucket out of protect",
                backend="watch",
            ) from error
        self._is_fresh = True

    def close(self) -> None:
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None
        self._paths.clear()
        self._numbers.clear()

    def mend(self, stopping: threading.Event) -> None:
        """Watch again what is not watched any more, if it is time to try."""
        if self._inotify is None and time.monotonic() >= self.mend_at:
            try:
                self.open()
            except ConfigError:
                self.mend_at = time.monotonic() + _MEND_SECONDS
                return
            log.warning("%s is watched again", self._bucket)
        if self._is_fresh:
            self._is_fresh = False
            self._take_in(b"", stopping, announce=False)
            # Only now: what comes after this is announced.
            self._doubt(self._bucket)

    def look(self, path: bytes) -> tuple[int, int, int] | None:
        """Return what changes when a regular file does; `None` if there is no regular file."""
        try:
            found = os.lstat(self._full(path))
        except OSError:
            return None
        if not stat.S_ISREG(found.st_mode):
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def hear(self, stopping: threading.Event) -> None:
        """Act on what happened since."""
        for number, mask, name in self._inotify.read() if self._inotify else ():
            if mask & _IN_Q_OVERFLOW:
                self._give_up("the kernel dropped events", 0.0)
                return
            directory = self._paths.get(number)
            if directory is None:
                continue
            if mask & (_IN_IGNORED | _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_UNMOUNT):
                # Where another directory is now, its new parent's event says; the root has none.
                if not directory:
                    self._give_up("it was moved, deleted or unmounted", _MEND_SECONDS)
                    return
                if mask & _IN_IGNORED:
                    self._drop(number)
                continue
            path = _join(directory, name)
            if path == PRIVATE:
                continue
            if not mask & _IN_ISDIR:
                if not mask & _IN_MOVED_FROM:
                    self._expect(self._bucket, path)
            elif mask & _IN_MOVED_FROM:
                self._forget(path)
            else:
                self._take_in(path, stopping, announce=True)

    def _give_up(self, why: str, seconds: float) -> None:
        log.error("the watch of %s has a gap: %s", self._bucket, why)
        self.close()
        self.mend_at = time.monotonic() + seconds

    def _take_in(self, path: bytes, stopping: threading.Event, *, announce: bool) -> None:
        """Watch a directory and all below it; with `announce`, expect each file that is there.

        Each directory is watched before it is listed, so nothing falls between.
        """
        directories = [path]
        while directories and not stopping.is_set():
            directory = directories.pop()
            try:
                self._watch(directory)
                with os.scandir(self._full(directory)) as entries:
                    for entry in entries:
                        below = _join(directory, entry.name)
                        if below == PRIVATE:
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            directories.append(below)
                        elif announce and entry.is_file(follow_symlinks=False):
                            self._expect(self._bucket, below)
            except OSError as error:
                # It may have been removed or replaced meanwhile.
                if error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                    self._complain(directory, error)

    def _complain(self, directory: bytes, error: OSError) -> None:
        advice = "let our user read it"
        if error.errno == errno.ENOSPC:
            advice = "raise the sysctl fs.inotify.max_user_watches"
        log.error(
            "%s: directory %r cannot be watched (%s), only sweeps find its files: %s",
            self._bucket,
            directory,
            error.strerror,
            advice,
        )
        self._doubt(self._bucket)

    def _watch(self, directory: bytes) -> None:
        assert self._inotify is not None
        number = self._inotify.add(self._full(directory))
        self._drop(number)
        self._paths[number] = directory
        self._numbers[directory] = number

    def _drop(self, number: int) -> None:
        path = self._paths.pop(number, None)
        if path is not None and self._numbers.get(path) == number:
            del self._numbers[path]

    def _forget(self, path: bytes) -> None:
        """Stop watching `path` and all below it, which is elsewhere now."""
        assert self._inotify is not None
        for known, number in list(self._numbers.items()):
            if known == path or known.startswith(path + b"/"):
                self._drop(number)
                self._inotify.remove(number)

    def _full(self, path: bytes) -> bytes:
        # The root may be a symbolic link, what is below it not: hence the slash, also for "".
        return self._root + b"/" + path


def _join(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


class _Inotify:
    """The three system calls of inotify(7) that the standard library lacks."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        try:
            self.fd = self._checked(self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        except AttributeError:
            raise ConfigError(
                "directories can only be watched on Linux: set watch.enabled = false",
                backend="watch",
            ) from None
        except OSError as error:
            raise ConfigError(
                f"inotify is not to be had ({error.strerror}): raise the sysctl "
                "fs.inotify.max_user_instances, or set watch.enabled = false",
                backend="watch",
            ) from error

    def add(self, path: bytes) -> int:
        """Watch the directory `path`, return its number; an `OSError` says what is wrong."""
        flags = _WANTED | _IN_ONLYDIR | _IN_DONT_FOLLOW
        return self._checked(self._libc.inotify_add_watch(self.fd, path, flags))

    def remove(self, watch: int) -> None:
        """Stop watching; fine if that is over already."""
        self._libc.inotify_rm_watch(self.fd, watch)

    def read(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield number, mask and name of what happened so far, at most a bufferful."""
        try:
            data = os.read(self.fd, 1 << 20)
        except BlockingIOError:
            return
        offset = 0
        while offset < len(data):
            watch, mask, _, length = _HEADER.unpack_from(data, offset)
            offset += _HEADER.size
            yield watch, mask, data[offset : offset + length].rstrip(b"\0")
            offset += length

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.fd)

    def _checked(self, answer: int) -> int:
        if answer < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return answer
