"""ClamAV, through clamd: one that Bucketward manages itself, or one that is there already.

Bytes go by descriptor (FILDES) where the socket is local, else by INSTREAM, over sessions
(IDSESSION) that stay open.  The protocol is that of clamd(8); what it does not say was found out
with clamd 1.4 and is written down in docs/clamav-limits.md.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import logging
import os
import re
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol, overload
from urllib.parse import unquote, urlsplit

from bucketward.engines.clamd import Clamd, Daemon, Limits, demo_signatures
from bucketward.engines.containers import EXAMINER_VERSION, Examiner
from bucketward.errors import ConfigError, Unavailable
from bucketward.model import EngineReport, Finding, Reason, Signatures, Spooled, Verdict

__all__ = [
    "CLASSIFICATION",
    "MAX_SIZE",
    "PERMISSIONS",
    "ClamAVEngine",
    "Limits",
    "demo_signatures",
    "open_clamav",
]

log = logging.getLogger(__name__)

PERMISSIONS: Mapping[str, str] = {}

MAX_SIZE = 2_147_483_645
"""libclamav never looks at a larger file, whatever its limits say (clamav #344)."""

CLASSIFICATION: Mapping[str, str] = {
    "Heuristics.Limits.Exceeded.MaxFileSize": Reason.TOO_LARGE,
    "Heuristics.Limits.Exceeded.MaxScanTime": Reason.TIMED_OUT,
    "Heuristics.Limits.Exceeded*": Reason.ARCHIVE_LIMIT,
    "Heuristics.XZ.DicSizeLimit": Reason.ARCHIVE_LIMIT,
    "Heuristics.Encrypted.*": Reason.ENCRYPTED,
    "Heuristics.Broken.*": Reason.CORRUPT,
    # "(null) FOUND" is what clamd says of some files above a limit (clamav #720).
    "(null)": Reason.ARCHIVE_LIMIT,
    "PUA.*": Verdict.SUSPICIOUS,
    "Heuristics.*": Verdict.SUSPICIOUS,
}
"""What a signature name means: the first pattern that fits; anything else is Infected.

A value is a `Verdict`, or the `Reason` of an Unscannable."""

_REPLY_LIMIT = 4096
_CHUNK = 256 * 1024
_SETTLED = 900.0
"""Seconds after which an external clamd has loaded what lies there (SelfCheck: 600)."""
_GRACE = 30.0
"""Seconds that a scan has once more when clamd was ended because of another file."""
_PATIENCE = 10
"""How often a scan is begun anew because the daemon went away under it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of clamd: ``ok``, ``found`` with the signature, or ``error`` with the text."""

    kind: str
    text: str = ""


def decode_reply(line: bytes, number: int) -> Reply:
    """Decode one answer, without its terminator, to the command `number` of a session.

    Anything but exactly the form that clamd uses is a `ValueError`: a guess could be a Clean.
    """
    match = _REPLY.fullmatch(line)
    if match is None or int(match["number"]) != number:
        raise ValueError("not an answer to what we asked")
    if match["ok"]:
        return Reply("ok")
    if match["found"] is not None:
        return Reply("found", match["found"].decode("utf-8", "replace"))
    return Reply("error", match["error"].decode("utf-8", "replace"))


_REPLY = re.compile(
    rb"(?P<number>[0-9]{1,18}): (?:"
    rb"(?:fd\[[0-9]+\]|stream|instream\(.{1,100}\)): "
    rb"(?:(?P<ok>OK)|(?P<found>[^\x00-\x1f]{1,1000}) FOUND)"
    rb"|(?P<error>[^\x00-\x1f]{1,1000}) ERROR)"
)


def classify(signature: str, table: Mapping[str, str]) -> Verdict | Reason:
    """Return what a signature means by `table`, then by `CLASSIFICATION`."""
    # The suffix says only that the database was not ClamAV's own.
    name = signature.removesuffix(".UNOFFICIAL")
    for patterns in (table, CLASSIFICATION):
        for pattern, value in patterns.items():
            if fnmatch.fnmatchcase(name, pattern):
                return Verdict(value) if value in _VERDICTS else Reason(value)
    return Verdict.INFECTED


_VERDICTS = frozenset({Verdict.INFECTED, Verdict.SUSPICIOUS})


_PASSED_OVER = (
    b"ID3",
    b"\xff\xfb\x90",
    b"OggS",
    b".RMF",
    b"SIP-HIT (SIP/H",
    b"SYMC\1\0",
    b"SQLite format 3\0",
    b"\x37\x7f\x06\x82\0\x2d\xe2\x18",
    b"\x37\x7f\x06\x83\0\x2d\xe2\x18",
    b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7",
)
_PASSED_OVER_INSIDE = b"/RGB\nID\n" + b"\xff" * 24
_FRONT = b"\n" * 256


def _is_passed_over(file: Spooled) -> bool:
    """Return whether ClamAV says OK of `file` without a look, for what its first bytes say.

    These are the CL_TYPE_IGNORED of filetypes_int.h in 1.4: music, SQLite files and the like.  Some
    readers find an archive behind such a beginning all the same, unzip(1) for one.
    """
    head = os.pread(file.fd, 256, 0)
    return head.startswith(_PASSED_OVER) or _PASSED_OVER_INSIDE in head


class _Broken(Exception):  # noqa: N818 - never leaves this module
    """The connection broke, or what came over it makes no sense."""


class _Late(Exception):  # noqa: N818
    """The deadline passed while clamd worked."""

    def __str__(self) -> str:
        return "it takes too long"


class _Session:
    """One IDSESSION, used by one thread at a time, one command in flight."""

    __slots__ = ("_socket", "daemon", "is_local", "number")

    def __init__(self, connection: socket.socket, daemon: Daemon | None) -> None:
        self._socket = connection
        self.daemon = daemon
        self.is_local = connection.family == socket.AF_UNIX
        self.number = 0
        connection.sendall(b"zIDSESSION\0")

    def scan(self, file: Spooled, deadline: float) -> Reply:
        """Ask for a verdict on `file`.  Raises `_Broken` or `_Late`; then close it."""
        reply = self._ask(file, deadline)
        if reply.kind == "ok" and _is_passed_over(file):
            # It has not looked.  With something in front it does not know the file for what it is.
            reply = self._ask(file, deadline, _FRONT)
        return reply

    def _ask(self, file: Spooled, deadline: float, front: bytes = b"") -> Reply:
        self.number += 1
        try:
            if self.is_local and not front:
                self._socket.sendall(b"zFILDES\0")
                # Opened anew: clamd moves the position, which a descriptor shares with its copies.
                fd = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    # The descriptor goes with a message of one byte (clamd(8)).
                    socket.send_fds(self._socket, [b"\0"], [fd])
                finally:
                    os.close(fd)
            else:
                self._stream(file, deadline, front)
            return decode_reply(self._line(deadline), self.number)
        except TimeoutError:
            raise _Late from None
        except (OSError, ValueError) as error:
            raise _Broken(str(error) or "it closed the connection") from error

    def ping(self, deadline: float) -> None:
        """Have clamd say that it works.  Raises `_Broken` or `_Late`."""
        self.number += 1
        try:
            self._socket.sendall(b"zPING\0")
            if self._line(deadline) != b"%d: PONG" % self.number:
                raise _Broken("it does not answer PING")
        except TimeoutError:
            raise _Late from None
        except (OSError, ValueError) as error:
            raise _Broken(str(error)) from error

    def close(self) -> None:
        self._socket.close()

    def _limit(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _stream(self, file: Spooled, deadline: float, front: bytes) -> None:
        self._socket.sendall(b"zINSTREAM\0")
        if front:
            self._limit(deadline)
            self._socket.sendall(struct.pack("!I", len(front)) + front)
        offset = 0
        # Above StreamMaxLength it answers while we still send, and hangs up.
        answered = select.poll()
        answered.register(self._socket, select.POLLIN)
        try:
            while offset < file.size:
                chunk = os.pread(file.fd, min(_CHUNK, file.size - offset), offset)
                if not chunk:
                    raise ValueError("the file is shorter than it was said to be")
                if answered.poll(0):
                    return
                self._limit(deadline)
                self._socket.sendall(struct.pack("!I", len(chunk)))
                self._socket.sendall(chunk)
                offset += len(chunk)
            self._socket.sendall(bytes(4))
        except (BrokenPipeError, ConnectionResetError):
            return

    def _line(self, deadline: float) -> bytes:
        data = b""
        while True:
            self._limit(deadline)
            part = self._socket.recv(_REPLY_LIMIT)
            if not part:
                raise ConnectionResetError("it closed the connection without an answer")
            data += part
            end = data.find(b"\0")
            if end >= 0:
                if end != len(data) - 1:
                    raise ValueError("it answered more than was asked")
                return data[:end]
            if len(data) > _REPLY_LIMIT:
                raise ValueError("its answer does not end")


class _Source(Protocol):
    """Where sessions come from: a managed clamd or an external one."""

    def connect(self, deadline: float) -> _Session: ...

    def is_fresh(self, session: _Session) -> bool: ...

    def signatures(self) -> Signatures: ...

    def close(self) -> None: ...


class _Gate:
    """Lets many scans in, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._is_closed = False

    @contextmanager
    def enter(self, deadline: float, *, alone: bool) -> Iterator[None]:
        with self._changed:
            if not self._wait(lambda: not self._is_closed, deadline):
                raise _busy()
            if alone:
                self._is_closed = True
                if not self._wait(lambda: not self._inside, deadline):
                    self._is_closed = False
                    self._changed.notify_all()
                    raise _busy()
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                if alone:
                    self._is_closed = False
                if alone or (self._is_closed and not self._inside):
                    self._changed.notify_all()

    def _wait(self, true: Callable[[], bool], deadline: float) -> bool:
        return true() or self._changed.wait_for(true, max(0.0, deadline - time.monotonic()))


def _busy() -> Unavailable:
    return Unavailable("the engine judges a file alone; try again later", backend="clamav")


class ClamAVEngine:
    """ClamAV behind a clamd.  Use `open_clamav`.

    A report bears the signatures of the daemon that judged: they never change under a daemon that
    Bucketward manages.  An external clamd cannot be ended: past the deadline its session is closed
    and it works on in vain, up to its MaxScanTime; nor can it be had afresh for a file alone.
    """

    opens_containers = True

    def __init__(
        self,
        source: _Source,
        examiner: Examiner,
        *,
        name: str = "clamav",
        max_size: int = MAX_SIZE,
        classify: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.max_size = min(max_size, MAX_SIZE)
        self._source = source
        self._managed = source if isinstance(source, _Managed) else None
        self._examiner = examiner
        self._table = dict(classify or {})
        self._idle: list[_Session] = []
        self._gate = _Gate()
        self._in_use: dict[str, int] = {}
        self._counting = threading.Lock()
        self._ended_by_us: set[str] = set()
        self._ending = threading.Lock()
        self._opens_rar: bool | None = None
        if self._managed is not None:
            self._managed.clamd.on_replace(lambda number: self._in_use.get(number, 0))

    def ping(self) -> None:
        """Ask clamd; one that would hide its limits is a `ConfigError`."""
        deadline = time.monotonic() + 5
        with contextlib.closing(self._source.connect(deadline)) as session:
            try:
                session.ping(deadline)
            except (_Broken, _Late) as error:
                daemon = session.daemon
                # While it does not answer nothing is sent to it, so no file's deadline ends it.
                if isinstance(error, _Late) and daemon and not self._in_use.get(daemon.number):
                    log.warning("clamav: clamd does not answer; it is started anew")
                    self._recycle(daemon)
                raise Unavailable(f"clamd does not answer: {error}", backend="clamav") from error
        self._source.signatures()

    def close(self) -> None:
        """Close the sessions and end a managed clamd, unless another process keeps it."""
        while self._idle:
            self._idle.pop().close()
        self._source.close()
        self._examiner.close()

    def scan(self, file: Spooled, deadline: float, *, alone: bool = False) -> EngineReport:
        """Send the file again, to a new daemon, if the managed one goes away under it."""
        started = time.monotonic()
        if file.size > self.max_size:
            return self._unscannable(
                started,
                self._source.signatures(),
                Reason.TOO_LARGE,
                f"{file.size} bytes; ClamAV looks at no more than {self.max_size}",
            )
        if started >= deadline:
            return self._unscannable(
                started, self._source.signatures(), Reason.TIMED_OUT, "no time was left to scan"
            )
        if alone:
            return self._scan_alone(file, started, deadline)
        suspected = False
        deaths = 0
        grace = min(deadline - started, _GRACE)
        tries = 0
        while tries < _PATIENCE:
            tries += 1
            with self._gate.enter(deadline, alone=suspected):
                session = self._session(deadline)
                signatures = self._judged_by(session)
                try:
                    reply = session.scan(file, deadline)
                except _Late:
                    late = self._late(session, signatures, started, has_grace=grace > 0)
                    if late is not None:
                        return late
                    deadline, grace = time.monotonic() + grace, 0.0
                    problem = _Broken("clamd was started anew")
                    continue
                except _Broken as error:
                    self._drop(session)
                    problem = error
                    if session.daemon is not None and self._ended_here(session.daemon):
                        tries -= 1  # for the sake of another file: that is not this one's doing
                        deadline, grace = max(deadline, time.monotonic() + grace), 0.0
                    if self._managed is None or session.daemon is None:
                        if session.number == 1:
                            break
                        # It was idle for too long, or clamd was started anew.
                        continue
                    if isinstance(error.__cause__, ValueError):
                        # Whatever it is that answers there, it is not to be asked again.
                        self._recycle(session.daemon)
                        break
                    if self._managed.lost(session.daemon) and not self._ended_here(session.daemon):
                        # It died: of one of the files that it had.  Each of them goes again by
                        # itself, so that one dies alone.  Once it may have been another process's.
                        deaths += suspected
                        suspected = True
                        if deaths == 2:
                            break
                    continue
                self._keep(session)
            return self._report(file, reply, signatures, started, deadline)
        raise Unavailable(f"clamd gave no verdict: {problem}", backend="clamav")

    def signatures(self) -> Signatures:
        """Return what the daemon that serves now judges by."""
        return self._source.signatures()

    def _scan_alone(self, file: Spooled, started: float, deadline: float) -> EngineReport:
        with self._gate.enter(deadline, alone=True), contextlib.ExitStack() as stack:
            if self._managed is None:
                return self._judge_alone(file, started, deadline, is_last=True)
            try:
                stack.enter_context(self._managed.clamd.alone(deadline))
            except TimeoutError:
                raise _busy() from None
            # It may have ended with the process that kept it: that is not the file's doing twice.
            report = self._judge_alone(file, started, deadline, is_last=False)
            return report or self._judge_alone(file, started, deadline, is_last=True)

    @overload
    def _judge_alone(
        self, file: Spooled, started: float, deadline: float, *, is_last: Literal[True]
    ) -> EngineReport: ...

    @overload
    def _judge_alone(
        self, file: Spooled, started: float, deadline: float, *, is_last: Literal[False]
    ) -> EngineReport | None: ...

    def _judge_alone(
        self, file: Spooled, started: float, deadline: float, *, is_last: bool
    ) -> EngineReport | None:
        """Judge the file in a fresh daemon; `None` if that ended and it is not the last try."""
        if self._managed is not None:
            with contextlib.suppress(Unavailable):
                self._recycle(self._managed.clamd.current())
        while self._idle:
            self._idle.pop().close()
        session = self._session(deadline)
        signatures = self._judged_by(session)
        try:
            reply = session.scan(file, deadline)
        except _Late:
            late = self._late(session, signatures, started, has_grace=False)
            assert late is not None
            return late
        except _Broken as error:
            self._drop(session)
            if not is_last:
                return None
            return EngineReport(
                self.name,
                Verdict.ERROR,
                coverage=(Reason.ENGINE_FAILED,),
                signatures=signatures,
                seconds=time.monotonic() - started,
                message=f"clamd failed on this file: {error}",
            )
        self._drop(session)
        if session.daemon is not None:
            self._recycle(session.daemon)
        return self._report(file, reply, signatures, started, deadline)

    def _session(self, deadline: float) -> _Session:
        """Return a session that nobody else uses, to the daemon that serves now."""
        session = None
        with contextlib.suppress(IndexError):
            session = self._idle.pop()
        while session is not None and not self._source.is_fresh(session):
            session.close()
            session = None
            with contextlib.suppress(IndexError):
                session = self._idle.pop()
        if session is None:
            session = self._source.connect(deadline)
        if session.daemon is not None:
            with self._counting:
                number = session.daemon.number
                self._in_use[number] = self._in_use.get(number, 0) + 1
        return session

    def _judged_by(self, session: _Session) -> Signatures:
        """Return what a scan that begins now is judged by, or by something newer."""
        return session.daemon.signatures if session.daemon else self._source.signatures()

    def _keep(self, session: _Session) -> None:
        self._done_with(session)
        self._idle.append(session)

    def _drop(self, session: _Session) -> None:
        self._done_with(session)
        session.close()

    def _done_with(self, session: _Session) -> None:
        if session.daemon is None:
            return
        number = session.daemon.number
        with self._counting:
            left = self._in_use[number] - 1
            if left:
                self._in_use[number] = left
            else:
                del self._in_use[number]

    def _ended_here(self, daemon: Daemon) -> bool:
        if daemon.number in self._ended_by_us:
            return True
        return self._managed is not None and self._managed.clamd.was_meant_to_end(daemon)

    def _recycle(self, daemon: Daemon) -> bool:
        """End a daemon; return whether we are the first who did."""
        assert self._managed is not None
        with self._ending:
            if len(self._ended_by_us) > 1000:
                self._ended_by_us.clear()
            is_first = daemon.number not in self._ended_by_us
            self._ended_by_us.add(daemon.number)
        self._managed.clamd.recycle(daemon)
        return is_first

    def _late(
        self, session: _Session, signatures: Signatures, started: float, *, has_grace: bool
    ) -> EngineReport | None:
        """Return the report on a file that was late, `None` if the daemon hung because of another.

        One file that hangs clamd makes every other late that began with it; the first one that is
        late answers for it, and the others have a grace, once, with a new daemon.
        """
        self._drop(session)
        if session.daemon is not None and not self._recycle(session.daemon) and has_grace:
            return None
        log.warning("clamav: a file took too long")
        return self._unscannable(started, signatures, Reason.TIMED_OUT, "clamd took too long")

    def _report(
        self, file: Spooled, reply: Reply, signatures: Signatures, started: float, deadline: float
    ) -> EngineReport:
        if reply.kind == "error":
            if "size limit exceeded" in reply.text:
                return self._unscannable(
                    started, signatures, Reason.TOO_LARGE, "above clamd's StreamMaxLength"
                )
            raise Unavailable(f"clamd could not scan: {reply.text}", backend="clamav")
        if reply.kind == "found":
            meaning = classify(reply.text, self._table)
            if isinstance(meaning, Reason):
                return self._unscannable(started, signatures, meaning, reply.text)
            return EngineReport(
                self.name,
                meaning,
                findings=(Finding(self.name, reply.text),),
                signatures=signatures,
                seconds=time.monotonic() - started,
            )
        reasons, message = self._examiner.examine(
            file, deadline, opens_rar=lambda: self._has_rar(deadline)
        )
        if reasons:
            return EngineReport(
                self.name,
                Verdict.UNSCANNABLE,
                coverage=reasons,
                signatures=signatures,
                seconds=time.monotonic() - started,
                message=message,
            )
        return EngineReport(
            self.name, Verdict.CLEAN, signatures=signatures, seconds=time.monotonic() - started
        )

    def _has_rar(self, deadline: float) -> bool:
        """Tell whether this ClamAV was built with unrar, which is not free software.

        Only one that was knows that the bait needs a password.
        """
        if self._opens_rar is None:
            with _bytes_as_file(_RAR_BAIT) as bait:
                session = self._session(deadline)
                try:
                    reply = session.scan(bait, deadline)
                except (_Late, _Broken):
                    self._drop(session)
                    return False
                self._keep(session)
            self._opens_rar = reply.kind == "found" and "Encrypted.RAR" in reply.text
        return self._opens_rar

    def _unscannable(
        self, started: float, signatures: Signatures, reason: Reason, message: str
    ) -> EngineReport:
        return EngineReport(
            self.name,
            Verdict.UNSCANNABLE,
            coverage=(reason,),
            signatures=signatures,
            seconds=time.monotonic() - started,
            message=message,
        )


class _Managed:
    """Sessions to a clamd of our own."""

    def __init__(self, clamd: Clamd) -> None:
        self.clamd = clamd
        self._lost: deque[str] = deque(maxlen=20)

    def lost(self, daemon: Daemon) -> bool:
        """Tell whether `daemon` is gone; then nobody gets a session to it any more."""
        if self.clamd.has_ended(daemon):
            self._lost.append(daemon.number)
            return True
        return False

    def connect(self, deadline: float) -> _Session:
        while True:
            daemon = self.clamd.wait(deadline)
            try:
                if daemon.number in self._lost:
                    raise ConnectionRefusedError("it has just ended")
                left = max(0.01, deadline - time.monotonic())
                return _Session(self.clamd.connect(daemon, left), daemon)
            except OSError as error:
                # It went between the two, or it never answers: then it is not the one we want.
                if time.monotonic() >= deadline:
                    raise Unavailable(
                        f"clamd takes no connection: {error}", backend="clamav"
                    ) from error
                time.sleep(0.02)

    def is_fresh(self, session: _Session) -> bool:
        assert session.daemon is not None
        number = session.daemon.number
        try:
            return number not in self._lost and number == self.clamd.current().number
        except Unavailable:
            return False

    def signatures(self) -> Signatures:
        return self.clamd.current().signatures

    def close(self) -> None:
        self.clamd.close()


class _External:
    """Sessions to a clamd that somebody else runs, which has to be set up as we need it."""

    def __init__(self, address: str | tuple[str, int], salt: str) -> None:
        self._address = address
        self._salt = salt
        self._checking = threading.Lock()
        self._checked_at = -1e9
        self._signatures: Signatures | None = None
        self._next: tuple[Signatures, float] | None = None
        self._is_proven = False

    def connect(self, deadline: float) -> _Session:
        if not self._is_proven:
            self._prove(deadline)
        try:
            return _Session(self._open(deadline), None)
        except OSError as error:
            raise self._unreachable(error) from error

    def is_fresh(self, session: _Session) -> bool:
        del session
        return True

    def signatures(self) -> Signatures:
        """Ask clamd's VERSION at most once in five seconds.

        It names the database files that lie there (clamd reads their headers for every VERSION),
        which clamd may load ten minutes later.  So a new version is believed when it is old
        enough: what was judged in between is judged again rather than never.
        """
        now = time.monotonic()
        if self._signatures is not None and now - self._checked_at < 5:
            return self._signatures
        with self._checking:
            if self._signatures is not None and now - self._checked_at < 5:
                return self._signatures
            asked = self._ask()
            if self._signatures is None or asked == self._signatures:
                self._signatures, self._next = asked, None
            elif self._next is None or self._next[0] != asked:
                self._next = asked, now
            elif now - self._next[1] > _SETTLED:
                self._signatures, self._next = asked, None
            self._checked_at = now
            return self._signatures

    def close(self) -> None:
        """Nothing is ours here but the sessions."""

    def _open(self, deadline: float) -> socket.socket:
        left = min(5.0, max(0.01, deadline - time.monotonic()))
        if isinstance(self._address, tuple):
            return socket.create_connection(self._address, left)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.settimeout(left)
            connection.connect(self._address)
        except BaseException:
            connection.close()
            raise
        return connection

    def _ask(self) -> Signatures:
        try:
            with self._open(time.monotonic() + 5) as connection:
                connection.sendall(b"zVERSION\0")
                answer = connection.recv(200)
        except OSError as error:
            raise self._unreachable(error) from error
        if not answer.startswith(b"ClamAV ") or not answer.endswith(b"\0"):
            raise Unavailable(f"what answers at {self._where} is not clamd", backend="clamav")
        version = answer[:-1].decode("ascii", "replace")
        digest = hashlib.sha256(f"external\0{version}\0{self._salt}".encode()).hexdigest()
        return Signatures(digest, version, _dated(version))

    def _prove(self, deadline: float) -> None:
        """Refuse a clamd that would say OK where it stopped looking.

        A zip nested deeper than any MaxRecursion allows, and one with a password: only
        AlertExceedsMax and AlertEncrypted make it speak of them.
        """
        try:
            with contextlib.closing(_Session(self._open(deadline), None)) as session:
                for body in (_nested(120), _locked()):
                    with _bytes_as_file(body) as bait:
                        reply = session.scan(bait, min(deadline, time.monotonic() + 30))
                    if reply.kind != "found":
                        break
        except OSError as error:
            raise self._unreachable(error) from error
        except (_Broken, _Late) as error:
            raise Unavailable(
                f"clamd at {self._where} gives no sensible answer: {error}", backend="clamav"
            ) from error
        if reply.kind == "ok":
            raise ConfigError(
                f"clamd at {self._where} says OK where it stopped looking: set AlertExceedsMax yes "
                "and AlertEncrypted yes in its clamd.conf",
                backend="clamav",
            )
        self._is_proven = reply.kind == "found"

    @property
    def _where(self) -> str:
        if isinstance(self._address, tuple):
            return f"{self._address[0]}:{self._address[1]}"
        return self._address

    def _unreachable(self, error: OSError) -> Unavailable:
        return Unavailable(f"cannot reach clamd at {self._where}: {error}", backend="clamav")


@contextmanager
def _bytes_as_file(body: bytes) -> Iterator[Spooled]:
    fd = os.memfd_create("bait", os.MFD_CLOEXEC)
    try:
        os.write(fd, body)
        yield Spooled(fd, len(body), f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


_RAR_BAIT = bytes.fromhex(
    "526172211a0700cf907300000d00000000000000"  # marker, archive header
    "ae8d74048026000a0000000a00000002f6ebf73c215a00001d3006002000000073656372"
    "6574382f39313f2e2d3b283ec43d7b00400700"
)
"""A RAR 4 archive with one encrypted member of no use (technote.txt of WinRAR 4)."""


def _locked() -> bytes:
    """Return a zip archive that says its member needs a password."""
    body = bytearray(_nested(1))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        body[body.index(mark) + place] |= 1
    return bytes(body)


def _nested(levels: int) -> bytes:
    """Return zip archives in one another, stored."""
    import io
    import zipfile

    body = b"bucketward"
    for _ in range(levels):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr(zipfile.ZipInfo("a"), body)
        body = out.getvalue()
    return body


def _dated(version: str) -> datetime | None:
    """Return the date in ``ClamAV 1.4.6/27810/Fri Nov 20 08:21:05 2026``, if there is one."""
    parts = version.split("/")
    if len(parts) == 3:
        with contextlib.suppress(ValueError):
            # clamd writes its own local time without a zone; UTC is right on servers.
            return datetime.strptime(parts[2], "%a %b %d %H:%M:%S %Y").replace(tzinfo=UTC)
    return None


def open_clamav(
    url: str,
    *,
    data_dir: Path | None = None,
    signatures_dir: Path | None = None,
    name: str = "clamav",
    max_size: int = MAX_SIZE,
    limits: Limits | None = None,
    options: Mapping[str, str] | None = None,
    classify: Mapping[str, str] | None = None,
    user: str = "",
    poll: float = 5.0,
) -> ClamAVEngine:
    """Open ``clamav:managed``, ``clamav:///run/clamav/clamd.ctl`` or ``clamav://host:3310``.

    The managed clamd lives in ``data_dir/clamd``, where all processes with that directory share
    it; the settings of the one that started it count.  It loads the signature files of
    `signatures_dir`, by default Bucketward's demonstration signatures, following changes within
    twice `poll` seconds.  `classify` is consulted before `CLASSIFICATION`.  `limits`, `options`
    (further lines of clamd.conf), `user` and `poll` are for the managed clamd only.
    """
    table = dict(classify or {})
    for value in table.values():
        if value not in _VERDICTS and value not in frozenset(Reason):
            raise ConfigError(
                f"{value!r} is no meaning for a signature: use Infected, Suspicious or a reason",
                backend="clamav",
            )
    parts = urlsplit(url)
    salt = repr((sorted(table.items()), max_size, EXAMINER_VERSION))
    source: _Source
    if parts.scheme != "clamav":
        raise ConfigError(f"{url!r} is not a clamav URL", backend="clamav")
    if not parts.netloc and parts.path == "managed":
        if data_dir is None:
            raise ConfigError("a managed clamd needs a data directory", backend="clamav")
        limits = limits or Limits()
        max_size = min(max_size, limits.file_size)
        source = _Managed(
            Clamd(
                data_dir / "clamd",
                signatures_dir or demo_signatures(),
                limits=limits,
                options=options,
                user=user,
                poll=poll,
                salt=salt,
            )
        )
    elif not parts.netloc and parts.path.startswith("/"):
        source = _External(unquote(parts.path), salt)
    else:
        try:
            host, port = parts.hostname, parts.port or 3310
        except ValueError:
            host, port = None, 0
        if not host or parts.path not in ("", "/"):
            raise ConfigError(
                f"{url!r}: use clamav:managed, clamav:///path/of/socket or clamav://host:port",
                backend="clamav",
            )
        source = _External((host, port), salt)
    return ClamAVEngine(source, Examiner(), name=name, max_size=max_size, classify=table)
