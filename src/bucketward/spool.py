"""Where the bytes of an object wait for the engines: memory or disk, under one budget."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from bucketward.errors import Unavailable, Unsupported
from bucketward.model import Reason, Spooled

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Spool:
    """A budget of bytes, and the files that live on it.

    An object below `in_memory_below` is held in a memfd and counts against `memory`, a larger one
    in an unlinked file in `directory` and counts against `disk`.  Whoever waits for room is served
    first come, first served, each kind by itself, so that a large object is never starved by
    small ones.  Safe to use from any thread.
    """

    def __init__(
        self,
        *,
        memory: int = 256 * MIB,
        disk: int = 10 * GIB,
        in_memory_below: int = 16 * MIB,
        directory: Path | None = None,
    ) -> None:
        self.memory = memory
        self.disk = disk
        self.in_memory_below = min(in_memory_below, memory)
        self.directory = directory if directory is not None else Path(tempfile.gettempdir())
        self._room = {"memory": memory, "disk": disk}
        self._waiting: dict[str, deque[object]] = {"memory": deque(), "disk": deque()}
        self._changed = threading.Condition()

    @property
    def largest(self) -> int:
        """Return the size of the largest object that can ever be held."""
        return max(self.disk, self.in_memory_below - 1)

    @property
    def used(self) -> int:
        """Return how many bytes are reserved now."""
        with self._changed:
            return self.memory + self.disk - sum(self._room.values())

    def reserve(self, size: int, *, deadline: float | None = None) -> Slot:
        """Wait for room for `size` bytes and take it, until `deadline` (`time.monotonic`).

        `Unsupported` with reason ``too-large`` if it can never fit, `Unavailable` when the
        deadline passes first.
        """
        kind = self._kind(size)
        ticket = object()
        with self._changed:
            line = self._waiting[kind]
            line.append(ticket)
            try:
                while line[0] is not ticket or self._room[kind] < size:
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        raise Unavailable(
                            f"no room for {size} bytes in the {kind} spool in time", backend="spool"
                        )
                    self._changed.wait(left)
                self._room[kind] -= size
            finally:
                line.remove(ticket)
                self._changed.notify_all()
        return Slot(self, kind, size)

    def try_reserve(self, size: int) -> Slot | None:
        """Take room for `size` bytes if it is there and nobody waits for it, else return `None`."""
        kind = self._kind(size)
        with self._changed:
            if self._waiting[kind] or self._room[kind] < size:
                return None
            self._room[kind] -= size
        return Slot(self, kind, size)

    def _kind(self, size: int) -> str:
        kind = "memory" if size < self.in_memory_below else "disk"
        if size > (self.memory if kind == "memory" else self.disk):
            raise Unsupported(
                f"{size} bytes are more than the spool can hold; raise spool.{kind}",
                backend="spool",
                reason=Reason.TOO_LARGE,
            )
        return kind

    def _release(self, kind: str, size: int) -> None:
        with self._changed:
            self._room[kind] += size
            self._changed.notify_all()


class Slot:
    """Room for one object; a context manager that gives everything back."""

    def __init__(self, spool: Spool, kind: str, size: int) -> None:
        self.size = size
        self._spool = spool
        self._kind = kind
        self._fd = -1

    def writable(self) -> int:
        """Return the descriptor to fill; the same on every call, emptied.

        `Unavailable` if the disk is full although the budget is not.
        """
        if self._fd < 0:
            self._fd = self._create()
        os.ftruncate(self._fd, 0)
        if self._kind == "disk" and self.size:
            try:
                os.posix_fallocate(self._fd, 0, self.size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise Unavailable(
                        f"the disk under the spool has no room for {self.size} bytes; "
                        "free some or lower spool.disk",
                        backend="spool",
                    ) from error
                raise
            os.ftruncate(self._fd, 0)
        return self._fd

    def seal(self, name: str = "") -> Spooled:
        """Return what was written, read-only from here on: nobody can alter what engines judge."""
        if self._fd < 0:
            self._fd = self._create()
        writable = self._fd
        if self._kind == "memory":
            fcntl.fcntl(writable, fcntl.F_ADD_SEALS, _SEALS)
        else:
            os.fchmod(writable, 0o444)  # engines run as somebody else
        self._fd = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
        os.close(writable)
        return Spooled(self._fd, os.fstat(self._fd).st_size, f"/proc/self/fd/{self._fd}", name)

    def close(self) -> None:
        """Free the bytes and the room; closing twice is fine."""
        spool, self._spool = self._spool, _CLOSED
        if spool is _CLOSED:
            return
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        spool._release(self._kind, self.size)  # noqa: SLF001 - the two halves of one thing

    def __enter__(self) -> Slot:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _create(self) -> int:
        if self._kind == "memory":
            return os.memfd_create("bucketward", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        directory = self._spool.directory
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                    raise
                fd, path = tempfile.mkstemp(dir=directory)
                Path(path).unlink()
                return fd
        except OSError as error:
            raise Unavailable(
                f"cannot spool to {directory}: {error.strerror}; see spool.directory",
                backend="spool",
            ) from error


_CLOSED = Spool(memory=0, disk=0)


def sha256(file: Spooled) -> str:
    """Return the SHA-256 of all of `file` in hex; reads it once, without a large buffer."""
    digest = hashlib.sha256()
    for piece in pieces(file):
        digest.update(piece)
    return digest.hexdigest()


def pieces(file: Spooled, size: int = MIB) -> Iterable[bytes]:
    """Yield the bytes of `file` in order, `size` at a time, leaving its position alone."""
    offset = 0
    while piece := os.pread(file.fd, size, offset):
        yield piece
        offset += len(piece)
