"""Messages in a SQLite file, for one host: any number of threads and processes, no daemon.

The file is the queue's own, apart from the state's: the two never wait for each other's write
lock, and each can be thrown away without the other.  It is driven by `sqlite3` and not by
SQLAlchemy Core, which made the same statements two to eleven times as slow.  WAL needs shared
memory, so the file has to be on a local file system.
"""
# ruff: noqa: D102 - the docstrings are the Protocol's

from __future__ import annotations

import os
import secrets
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Condition

from bucketward.errors import ConfigError, Error, Unavailable
from bucketward.model import Depth, Message
from bucketward.queues.rules import check_bodies, parse_url

PERMISSIONS: Mapping[str, str] = {}

_LEASE = 30.0
_MAX_DELIVERIES = 5
_LOCK_SECONDS = 5.0
"""How long one process waits for another's write, which takes a millisecond."""
_POLL_SECONDS = 0.1
"""How soon a message from another process, or a lapsed lease, is noticed."""
_LONGEST = 12 * 3600.0
"""The longest lease and delay, as on SQS: what falls due later than that was written under a
clock that was wrong."""

_SMALLEST = 512
"""Bytes in the smallest database (sqlite.org/fileformat2.html, section 1.3)."""
_APPLICATION = 0x42575131  # "BWQ1", in the header of the file for file(1) and for us
_SCHEMA = 1

_WAITING, _LAST, _DEAD = 0, 1, 2
"""The states of a message.  Out on its last delivery it is neither waiting nor dead: unless it is
acked it falls due among the dead letters, and nobody has to look for it in between."""

_CREATE = f"""
CREATE TABLE message (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  queue TEXT NOT NULL,
  state INTEGER NOT NULL,
  due_at REAL NOT NULL,
  deliveries INTEGER NOT NULL DEFAULT 0,
  lease TEXT NOT NULL DEFAULT '',
  sent_at REAL NOT NULL,
  id TEXT NOT NULL,
  reason TEXT NOT NULL DEFAULT '',
  body TEXT NOT NULL
);
CREATE INDEX message_due ON message (queue, state, due_at);
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_SCHEMA};
"""

_SEND = "INSERT INTO message (queue, state, due_at, sent_at, id, body) VALUES (?, ?, ?, ?, ?, ?)"

_IS_DUE = "SELECT 1 FROM message WHERE queue = ? AND state = ? AND due_at <= ? LIMIT 1"

_TAKE = """
UPDATE message SET deliveries = deliveries + 1, lease = :lease, due_at = :until,
  state = CASE
    WHEN state <> 0 THEN 2
    WHEN :max_deliveries > 0 AND deliveries + 1 >= :max_deliveries THEN 1
    ELSE 0 END
WHERE seq IN (
  SELECT seq FROM message WHERE queue = :queue AND state = :state AND due_at <= :now
  ORDER BY due_at LIMIT :limit)
RETURNING seq, id, body, deliveries, sent_at, reason
"""

_ACK = "DELETE FROM message WHERE seq = ? AND lease = ?"

_NACK = """
UPDATE message SET lease = '', due_at = ?, state = CASE state WHEN 0 THEN 0 ELSE 2 END
WHERE seq = ? AND lease = ?
"""

_EXTEND = "UPDATE message SET due_at = ? WHERE seq = ? AND lease = ?"

_BURY = """
UPDATE message SET state = 2, lease = '', due_at = ?, reason = ?
WHERE seq = ? AND id = ? AND state <> 2
"""

_COUNT = """
SELECT
  (SELECT count(*) FROM message WHERE queue = :queue AND state = 0 AND due_at <= :now),
  (SELECT count(*) FROM message WHERE queue = :queue AND state IN (0, 1) AND due_at > :now),
  (SELECT sent_at FROM message NOT INDEXED WHERE queue = :queue AND state < 2
    ORDER BY seq LIMIT 1)
"""

_MEND_CLOCK = "UPDATE message SET due_at = ? WHERE due_at > ?"


def open_sqlite(url: str) -> SqliteQueue:
    """Open ``sqlite:///absolute/path.db?name=events&lease=30&max_deliveries=5``."""
    address = parse_url(url, "sqlite", frozenset({"name", "lease", "max_deliveries"}))
    if address.host or not address.path.startswith("/") or address.path.endswith("/"):
        raise ConfigError(
            "a sqlite URL has three slashes and the absolute path of a file", backend="sqlite"
        )
    return SqliteQueue(
        address.path,
        name=address.options.get("name", "events"),
        lease=address.seconds("lease", _LEASE),
        max_deliveries=address.count("max_deliveries", _MAX_DELIVERIES),
    )


class SqliteQueue:
    """The queue `name` in the file `path`, which is made if it is not there.

    A lapsed lease is still good until somebody else takes the message.  A body that was sent
    survives a power failure; the rest (who holds what, what was acked) survives the death of the
    process, while after a power failure a moment of it may be undone and done again.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str = "events",
        lease: float = _LEASE,
        max_deliveries: int = _MAX_DELIVERIES,
    ) -> None:
        self.max_deliveries = max_deliveries
        self._path = os.fspath(path)
        self._name = name
        self._lease = min(lease, _LONGEST)
        # One connection: writers take turns in SQLite anyway, and waiting for a lock of ours is
        # prompt and fair where SQLite polls.
        self._changed = Condition()
        self._db: sqlite3.Connection | None = _open(self._path)

    def ping(self) -> None:
        with self._write():
            pass
        if not Path(self._path).exists():
            raise Unavailable(
                f"{self._path} was removed while it was in use; restart to begin a new queue",
                backend="sqlite",
            )

    def close(self) -> None:
        with self._changed:
            if self._db is not None:
                self._db.close()
            self._db = None
            self._changed.notify_all()

    def send(self, bodies: Sequence[str]) -> None:
        check_bodies(bodies, "sqlite")
        if not bodies:
            return
        with self._write(is_durable=True) as db:
            now = time.time()
            db.executemany(
                _SEND,
                [(self._name, _WAITING, now, now, uuid.uuid4().hex, body) for body in bodies],
            )
            self._changed.notify_all()

    def receive(self, limit: int, wait: float) -> Sequence[Message]:
        return self._take(limit, wait, (_WAITING,))

    def ack(self, messages: Sequence[Message]) -> None:
        if messages:
            with self._write() as db:
                db.executemany(_ACK, [_lease(message) for message in messages])

    def nack(self, messages: Sequence[Message], delay: float = 0) -> None:
        if messages:
            with self._write() as db:
                due_at = time.time() + min(max(delay, 0), _LONGEST)
                db.executemany(_NACK, [(due_at, *_lease(message)) for message in messages])
                self._changed.notify_all()

    def extend(self, messages: Sequence[Message], seconds: float) -> Sequence[Message]:
        if not messages:
            return []
        with self._write() as db:
            until = time.time() + min(seconds, _LONGEST)
            return [
                replace(message, leased_until=until)
                for message in messages
                if db.execute(_EXTEND, (until, *_lease(message))).rowcount
            ]

    def bury(self, message: Message, reason: str) -> None:
        seq, _ = _lease(message)
        with self._write() as db:
            text = reason.encode(errors="replace").decode()  # it may quote a file name
            db.execute(_BURY, (time.time(), text, seq, message.id))
            self._changed.notify_all()

    def dead(self, limit: int, wait: float) -> Sequence[Message]:
        return self._take(limit, wait, (_LAST, _DEAD))

    def depth(self) -> Depth:
        """Count a message given back with a delay as in flight, as SQS does."""
        now = time.time()
        with self._read() as db:
            row = db.execute(_COUNT, {"queue": self._name, "now": now}).fetchone()
        waiting, in_flight, oldest = row
        return Depth(waiting, in_flight, 0.0 if oldest is None else max(now - oldest, 0.0))

    def _take(self, limit: int, wait: float, states: Sequence[int]) -> list[Message]:
        deadline = time.monotonic() + wait
        with self._changed:
            while limit > 0 and self._db is not None:
                taken: list[Message] = []
                for state in states:
                    if len(taken) < limit and self._is_due(state):
                        taken += self._take_from(state, limit - len(taken))
                left = deadline - time.monotonic()
                if taken or left <= 0:
                    return taken
                self._changed.wait(min(left, _POLL_SECONDS))
        return []

    def _is_due(self, state: int) -> bool:
        """Look without the write lock, so that waiting disturbs nobody."""
        with self._read() as db:
            row = db.execute(_IS_DUE, (self._name, state, time.time())).fetchone()
        return row is not None

    def _take_from(self, state: int, limit: int) -> list[Message]:
        lease = secrets.token_hex(8)
        with self._write() as db:
            now = time.time()
            until = now + self._lease
            rows = db.execute(
                _TAKE,
                {
                    "queue": self._name,
                    "state": state,
                    "now": now,
                    "limit": limit,
                    "lease": lease,
                    "until": until,
                    "max_deliveries": self.max_deliveries,
                },
            ).fetchall()
        return [
            Message(
                id=key,
                body=body,
                receipt=f"{seq}:{lease}",
                deliveries=deliveries,
                sent_at=datetime.fromtimestamp(sent_at, UTC),
                leased_until=until,
                reason=reason,
            )
            for seq, key, body, deliveries, sent_at, reason in sorted(rows)
        ]

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._changed, _translating(self._path):
            if self._db is None:
                raise RuntimeError("the queue is closed")
            yield self._db

    @contextmanager
    def _write(self, *, is_durable: bool = False) -> Iterator[sqlite3.Connection]:
        with self._read() as db:
            db.execute("PRAGMA synchronous = FULL" if is_durable else "PRAGMA synchronous = NORMAL")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise


def _lease(message: Message) -> tuple[int, str]:
    seq, _, lease = message.receipt.partition(":")
    return int(seq), lease


def _open(path: str) -> sqlite3.Connection:
    """Open the file, or make it; one that is not ours is left as it is."""
    with _translating(path, is_start=True):
        # SQLite would make it readable by everybody.  An existing file is not even opened here:
        # closing it again would drop the locks that SQLite holds on it in this process.
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        if 0 < Path(path).stat().st_size < _SMALLEST:
            # SQLite takes it for an empty file and would write over it.
            raise ConfigError(f"{path} {_WHAT[sqlite3.SQLITE_NOTADB]}", backend="sqlite")
        db = sqlite3.connect(
            path, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            if not _is_ours(db, path):
                _make(db, path)
            _set_wal(db, path)
            db.execute("PRAGMA journal_size_limit = 67108864")
            now = time.time()
            db.execute(_MEND_CLOCK, (now, now + 2 * _LONGEST))
        except BaseException:
            db.close()
            raise
        return db


def _is_ours(db: sqlite3.Connection, path: str) -> bool:
    """Return whether the queue is there already, False for an empty file."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (schema,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application == _APPLICATION and schema == _SCHEMA and tables:
        return True
    if application == _APPLICATION:
        raise ConfigError(
            f"{path} was written by another release of Bucketward (schema {schema}, this one has "
            f"{_SCHEMA}); run that release, or move the file away",
            backend="sqlite",
        )
    if application or schema or tables:
        raise ConfigError(
            f"{path} is a database of something else and was left as it is; give the queue a "
            "file of its own",
            backend="sqlite",
        )
    return False


def _make(db: sqlite3.Connection, path: str) -> None:
    db.execute("BEGIN IMMEDIATE")
    if not _is_ours(db, path):  # another process may have been quicker
        for statement in _CREATE.split(";"):
            db.execute(statement)
    db.execute("COMMIT")


def _set_wal(db: sqlite3.Connection, path: str) -> None:
    """Switch to WAL, for which SQLite does not wait by itself while others are at the file."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
            continue
        if mode == "wal":
            return
        raise ConfigError(
            f"{path} is on a file system without shared memory; put the queue on a local disk",
            backend="sqlite",
        )


_WHAT = {
    sqlite3.SQLITE_BUSY: "is locked by another process; end what holds it open",
    sqlite3.SQLITE_LOCKED: "is locked by another process; end what holds it open",
    sqlite3.SQLITE_FULL: "cannot grow: the disk is full; make room",
    sqlite3.SQLITE_IOERR: "cannot be read or written; see whether the disk is full or failing",
    sqlite3.SQLITE_READONLY: "is read-only; let our user write it and its folder",
    sqlite3.SQLITE_PERM: "is not ours to open; let our user read and write it",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; see that its folder exists and is ours to write",
    sqlite3.SQLITE_CORRUPT: "is damaged and was left as it is; move it away or restore it",
    sqlite3.SQLITE_NOTADB: "is no SQLite file and was left as it is; give the queue another path",
}
_MAY_PASS = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
}


@contextmanager
def _translating(path: str, *, is_start: bool = False) -> Iterator[None]:
    """Turn what SQLite and the system raise into our errors; at the start most need an operator."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        what = _WHAT.get(code)
        if what is None and not isinstance(error, sqlite3.OperationalError):
            raise
        kind: type[Error] = ConfigError if is_start and code not in _MAY_PASS else Unavailable
        raise kind(f"{path} {what or f'failed: {error}'}", backend="sqlite") from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be made: {error.strerror}; see that its folder exists and is ours to "
            "write",
            backend="sqlite",
        ) from error
