"""A state in one SQLite file, for everything on one host.  Several processes may share the file.

Each table is a table of its own, named ``state_<table>``, in which a named index is two columns,
``<index>_value`` and ``<index>_sort``, under a real index.  Keys, values and sorts are UTF-8 in
BLOBs: compared by bytes, that is the order of code points, and it takes NUL and lone surrogates;
``SELECT CAST(key AS TEXT), body FROM state_<table>`` shows them to people.
"""

from __future__ import annotations

import itertools
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from bucketward.errors import Changed, ConfigError, Denied, Error, Unavailable
from bucketward.model import Add, Delete, Page, Put, Record
from bucketward.states.rules import (
    Tables,
    added,
    check_changes,
    check_index,
    check_keys,
    check_limit,
    check_table,
    from_cursor,
    named,
    to_cursor,
)

PERMISSIONS: Mapping[str, str] = {}

_BACKEND = "sqlite"
_APPLICATION = 0x42575331  # "BWS1", in the header of the file for file(1) and for us
_SCHEMA_VERSION = 1
_SMALLEST = 512
"""Bytes in the smallest database (sqlite.org/fileformat2.html, section 1.3)."""
_EXPORTED = 500
_PAGE_CHARACTERS = 4 * 1024 * 1024
"""A page ends early when its bodies are longer than this together."""
_PURGED = 200
"""How many expired records of each table one commit removes at most."""
_PURGE_SECONDS = 1.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NAME = re.compile(r"[a-z][a-z0-9_-]*", re.ASCII)
_SURROGATE = re.compile("[\ud800-\udfff]")


def open_sqlite(url: str, tables: Tables) -> SqliteState:
    """Open ``sqlite:///absolute/path.db``; anything unusual in the path is percent-encoded."""
    parts = urlsplit(url)
    path = unquote(parts.path, errors="surrogateescape")
    is_file = path.startswith("/") and not path.endswith("/") and "\0" not in path
    if parts.scheme != "sqlite" or parts.netloc or parts.query or parts.fragment or not is_file:
        raise ConfigError(
            "the URL of a SQLite state is sqlite:///absolute/path.db and nothing else",
            backend=_BACKEND,
        )
    return SqliteState(path, tables)


class SqliteState:
    """A `State` that is durable: what was committed survives a kill and a loss of power.

    `lock_timeout` is for how many seconds another writer is waited for.  Expired records are
    never returned.
    """

    def __init__(
        self, path: str | os.PathLike[str], tables: Tables, *, lock_timeout: float = 10.0
    ) -> None:
        self._path = str(Path(path).absolute())
        self._names = {table: tuple(indexes) for table, indexes in tables.items()}
        self._tables = _tables(self._names)
        self._upserts: dict[str, sa.Insert] = {}
        self._deletes: dict[str, sa.Delete] = {}
        self._lock_timeout = lock_timeout
        self._lock = threading.Lock()
        self._purge_at = 0.0
        self._writer = self._engine(pool_size=1)
        sa.event.listen(self._writer, "begin", _begin_immediate)
        self._readers = self._engine(pool_size=8, max_overflow=-1)
        try:
            with _translating(self._path, starting=True):
                self._inode = _make_file(self._path)
                self._make_schema()
        except BaseException:
            self._dispose()
            raise

    def ping(self) -> None:
        """Take the write lock for a moment: proves that nobody else sits on it."""
        with self._writing() as connection:
            connection.execute(sa.select(_meta.c.value)).fetchall()

    def close(self) -> None:
        """Bring everything from the write-ahead log into the file, unless another reads it."""
        try:
            with _translating(self._path), self._readers.connect() as connection:
                connection.exec_driver_sql("PRAGMA busy_timeout = 0")
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                connection.invalidate()
        except Error:
            pass  # the log stays, and whoever opens the file next reads it
        finally:
            self._dispose()

    def get(self, table: str, keys: Sequence[str]) -> Mapping[str, Record]:
        """Read all in one statement, so they are of one moment."""
        check_table(self._names, table, _BACKEND)
        check_keys(keys, _BACKEND)
        columns = self._tables[table].c
        statement = sa.select(self._tables[table]).where(
            columns.key.in_([_to_blob(key) for key in keys]), _is_live(columns)
        )
        with self._reading() as connection:
            records = [self._record(table, row) for row in connection.execute(statement)]
        return {record.key: record for record in records}

    def commit(self, changes: Sequence[Put | Delete | Add]) -> None:
        """Write in one transaction, which is on the disk when this returns."""
        check_changes(self._names, changes, _BACKEND)
        if not changes:
            return
        # All work that needs no lock comes before it.
        keys = [
            _to_blob(change.record.key if isinstance(change, Put) else change.key)
            for change in changes
        ]
        rows = [self._row(change.table, change.record) if isinstance(change, Put) else {}
                for change in changes]  # fmt: skip
        with self._writing() as connection:
            stored = self._stored(connection, changes, keys)
            writes: dict[str, list[dict[str, Any]]] = {}
            deletes: dict[str, list[dict[str, Any]]] = {}
            for change, key, row in zip(changes, keys, rows, strict=True):
                old = stored.get((change.table, key))
                version = old["version"] if old else 0
                if isinstance(change, Add):
                    base = old or self._row(change.table, Record(change.key, "{}"))
                    body = _to_text(added(change, base["body"], _BACKEND))
                    row = {**base, "body": body}  # noqa: PLW2901
                elif change.version is not None and (
                    change.version != version or (isinstance(change, Delete) and not old)
                ):
                    shown = change.record.key if isinstance(change, Put) else change.key
                    raise Changed(
                        f"{named(change.table, shown)} has version {version}, not {change.version}",
                        backend=_BACKEND,
                    )
                if isinstance(change, Delete):
                    deletes.setdefault(change.table, []).append({"old_key": key})
                else:
                    row["version"] = version + 1
                    writes.setdefault(change.table, []).append(row)
            for table, items in deletes.items():
                connection.execute(self._deletes[table], items)
            for table, items in writes.items():
                connection.execute(self._upserts[table], items)
            self._purge(connection)

    def query(
        self,
        table: str,
        index: str,
        value: str,
        *,
        low: str = "",
        high: str = "",
        after: str = "",
        limit: int = 100,
        newest_first: bool = False,
    ) -> Page[Record]:
        """Read one range of the index; very long bodies make a page shorter than `limit`."""
        check_index(self._names, table, index, _BACKEND)
        check_limit(limit)
        columns = self._tables[table].c
        sort, key = columns[f"{index}_sort"], columns.key
        # SQLite uses one lower and one upper bound to seek and compares the others row by row,
        # so each page gets the one nearest to it.
        place = sa.tuple_(sort, key)
        start, stop = (low, ""), (high, "") if high else None
        bounds = []
        if after:
            last = from_cursor(after, 2, _BACKEND)
            position = (last[0], last[1])
            if newest_first:
                stop = position if stop is None else min(position, stop)
            elif position >= start:
                start = position
                bounds.append(place > _bound(position))
        if low and not bounds:
            bounds.append(sort >= _to_blob(low))
        if stop is not None:
            bounds.append(place < _bound(stop))
        order = (sort.desc(), key.desc()) if newest_first else (sort, key)
        statement = (
            sa.select(self._tables[table])
            .where(columns[f"{index}_value"] == _to_blob(value), *bounds, _is_live(columns))
            .order_by(*order)
            .limit(limit + 1)
        )
        items, is_last = self._page(table, statement, limit)
        return Page(items, "" if is_last else to_cursor(items[-1].indexes[index][1], items[-1].key))

    def export(self, table: str, cursor: str = "") -> Page[Record]:
        """Return the records in the order of their keys."""
        check_table(self._names, table, _BACKEND)
        columns = self._tables[table].c
        statement = sa.select(self._tables[table]).where(_is_live(columns)).order_by(columns.key)
        if cursor:
            (after,) = from_cursor(cursor, 1, _BACKEND)
            statement = statement.where(columns.key > _to_blob(after))
        items, is_last = self._page(table, statement.limit(_EXPORTED + 1), _EXPORTED)
        return Page(items, "" if is_last else to_cursor(items[-1].key))

    def _engine(self, **pool: int) -> sa.Engine:
        return sa.create_engine(
            "sqlite+pysqlite://",
            creator=lambda: _connect(self._path, self._lock_timeout),
            poolclass=QueuePool,
            hide_parameters=True,  # they are keys and bodies, and errors end in logs
            **pool,
        )

    def _dispose(self) -> None:
        self._writer.dispose()
        self._readers.dispose()

    def _make_schema(self) -> None:
        with self._writer.begin() as connection:
            if _is_ours(connection, self._path):
                version = connection.execute(
                    sa.select(_meta.c.value).where(_meta.c.name == "schema_version")
                ).scalar()
                if version != str(_SCHEMA_VERSION):
                    raise ConfigError(
                        f"{self._path} was written by another release of Bucketward (schema"
                        f" {version}, this one has {_SCHEMA_VERSION}): run that release",
                        backend=_BACKEND,
                    )
            else:
                connection.exec_driver_sql(f"PRAGMA application_id = {_APPLICATION}")
                _meta.create(connection)
                row = {"name": "schema_version", "value": str(_SCHEMA_VERSION)}
                connection.execute(sa.insert(_meta), row)
            for table in self._tables.values():
                _make_table(connection, table)
        with self._readers.connect() as connection:
            _use_wal(connection, self._path, self._lock_timeout)
        for name, table in self._tables.items():
            upsert = insert(table)
            others = {c.name: upsert.excluded[c.name] for c in table.c if c.name != "key"}
            self._upserts[name] = upsert.on_conflict_do_update(["key"], set_=others)
            self._deletes[name] = sa.delete(table).where(table.c.key == sa.bindparam("old_key"))

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with _translating(self._path), self._readers.connect() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """Hold the one transaction that may write; SQLite's own lock keeps other processes out."""
        if not self._lock.acquire(timeout=self._lock_timeout):
            raise _locked(self._path)
        try:
            with _translating(self._path), self._writer.connect() as connection:
                self._check_file()
                try:
                    with connection.begin():
                        yield connection
                except DBAPIError:
                    connection.invalidate()  # after a full disk, say, begin with a fresh one
                    raise
        finally:
            self._lock.release()

    def _check_file(self) -> None:
        # SQLite goes on writing into a file that was deleted, and all of it would be lost.
        try:
            found = Path(self._path).stat()
            is_ours = (found.st_dev, found.st_ino) == self._inode
        except OSError:
            is_ours = False
        if not is_ours:
            raise Unavailable(
                f"{self._path} was removed or replaced while in use: put it back, or restart",
                backend=_BACKEND,
            )

    def _stored(
        self,
        connection: sa.Connection,
        changes: Sequence[Put | Delete | Add],
        keys: Sequence[bytes],
    ) -> dict[tuple[str, bytes], dict[str, Any]]:
        """Return the columns of the records that `changes` are about: all for `Add`, else two."""
        wanted: dict[tuple[str, bool], list[bytes]] = {}
        for change, key in zip(changes, keys, strict=True):
            wanted.setdefault((change.table, isinstance(change, Add)), []).append(key)
        stored = {}
        for (name, is_whole), some in wanted.items():
            table = self._tables[name]
            columns = table.c
            select = sa.select(table) if is_whole else sa.select(columns.key, columns.version)
            statement = select.where(columns.key.in_(some), _is_live(columns))
            for row in connection.execute(statement).mappings():
                stored[name, row["key"]] = {**row}
        return stored

    def _row(self, table: str, record: Record) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(self._tables[table].c.keys())
        row["key"] = _to_blob(record.key)
        row["body"] = _to_text(record.body)
        if record.expires_at is not None:
            row["expires_at"] = (record.expires_at - _EPOCH) // _MICROSECOND
        for index, (value, sort) in record.indexes.items():
            row[f"{index}_value"] = _to_blob(value)
            row[f"{index}_sort"] = _to_blob(sort)
        return row

    def _record(self, table: str, row: sa.Row[Any]) -> Record:
        key, version, body, expires_at, *pairs = tuple(row)
        return Record(
            _from_blob(key),
            body,
            version,
            {
                index: (_from_blob(value), _from_blob(sort))
                for index, value, sort in zip(
                    self._names[table], pairs[::2], pairs[1::2], strict=False
                )
                if value is not None
            },
            None if expires_at is None else _EPOCH + expires_at * _MICROSECOND,
        )

    def _page(self, table: str, statement: sa.Select[Any], limit: int) -> tuple[list[Record], bool]:
        """Return at most `limit` records and whether there are no more behind them."""
        items: list[Record] = []
        characters = 0
        with self._reading() as connection, connection.execute(statement) as rows:
            for row in rows:
                if len(items) == limit or characters > _PAGE_CHARACTERS:
                    return items, False
                items.append(self._record(table, row))
                characters += len(items[-1].body)
        return items, True

    def _purge(self, connection: sa.Connection) -> None:
        """Remove some expired records, in the transaction of a commit that had to wait anyway."""
        now = time.monotonic()
        if now < self._purge_at:
            return
        self._purge_at = now + _PURGE_SECONDS
        for table in self._tables.values():
            columns = table.c
            some = sa.select(columns.key).where(columns.expires_at <= _now()).limit(_PURGED)
            removed = connection.execute(sa.delete(table).where(columns.key.in_(some))).rowcount
            if removed == _PURGED:
                self._purge_at = now


_meta = sa.Table(
    "state",
    sa.MetaData(),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)


def _tables(names: Tables) -> dict[str, sa.Table]:
    for name in itertools.chain(names, *names.values()):
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a table or index")
    metadata = sa.MetaData()
    return {table: _table(metadata, table, indexes) for table, indexes in names.items()}


def _table(metadata: sa.MetaData, name: str, indexes: Sequence[str]) -> sa.Table:
    table = sa.Table(
        f"state_{name}",
        metadata,
        sa.Column("key", sa.LargeBinary, primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("expires_at", sa.BigInteger),  # microseconds since 1970
        *(
            sa.Column(f"{index}_{part}", sa.LargeBinary)
            for index in indexes
            for part in ("value", "sort")
        ),
    )
    # Names of tables and indexes share one space, so these have dots, which ours never do.
    columns = table.c
    for index in indexes:
        value = columns[f"{index}_value"]
        sa.Index(
            f"{table.name}.{index}",
            value,
            columns[f"{index}_sort"],
            columns.key,
            sqlite_where=value.is_not(None),
        )
    sa.Index(
        f"{table.name}..expires",
        columns.expires_at,
        sqlite_where=columns.expires_at.is_not(None),
    )
    return table


def _make_table(connection: sa.Connection, table: sa.Table) -> None:
    """Make the table, or the indexes that came to the list since it was made."""
    inspector = sa.inspect(connection)
    if not inspector.has_table(table.name):
        table.create(connection)
        return
    existing = {column["name"] for column in inspector.get_columns(table.name)}
    for column in table.columns:
        if column.name not in existing:
            kind = column.type.compile(connection.dialect)
            connection.exec_driver_sql(
                f'ALTER TABLE "{table.name}" ADD COLUMN "{column.name}" {kind}'
            )
    for index in table.indexes:
        index.create(connection, checkfirst=True)
    # Indexes that left the list stay, and every write empties them in its record: if they come
    # back, they say nothing that is no longer so.
    for name in sorted(existing - set(table.columns.keys())):
        table.append_column(sa.Column(name, sa.LargeBinary))


def _make_file(path: str) -> tuple[int, int]:
    """Make the file, for our eyes only, unless it is there; return what tells it from others."""
    # An existing file is not opened here: closing it would drop the locks that SQLite holds on it
    # in this process (sqlite.org/howtocorrupt.html, section 2.2).
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    found = Path(path).stat()
    if 0 < found.st_size < _SMALLEST:
        # SQLite takes it for an empty file and would write over it.
        raise ConfigError(_not_a_database(path, "too small"), backend=_BACKEND)
    return found.st_dev, found.st_ino


def _is_ours(connection: sa.Connection, path: str) -> bool:
    """Return whether a state is there already, False for an empty file."""
    application = connection.exec_driver_sql("PRAGMA application_id").scalar()
    if application == _APPLICATION:
        return True
    if application or connection.exec_driver_sql("SELECT count(*) FROM sqlite_schema").scalar():
        raise ConfigError(
            f"{path} is a database of something else and was left as it is: give the state a"
            " file of its own",
            backend=_BACKEND,
        )
    return False


def _connect(path: str, lock_timeout: float) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"file:{quote(os.fsencode(path))}?mode=rw",  # never makes a file: `_make_file` did
        uri=True,
        timeout=lock_timeout,
        isolation_level=None,  # transactions begin where we say so
        check_same_thread=False,  # the pool hands it to one thread at a time
    )
    try:
        # One fsync per commit.  NORMAL would survive a kill as well, but a loss of power could
        # take results back whose messages are acked.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA journal_size_limit = 67108864")
        # 16 MB of log instead of 4: a fifth less time per commit, for pages are written back once
        # that changed many times.
        connection.execute("PRAGMA wal_autocheckpoint = 4000")
    except BaseException:
        connection.close()
        raise
    return connection


def _begin_immediate(connection: sa.Connection) -> None:
    # A deferred transaction that reads first cannot wait for the lock: it fails at once.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _use_wal(connection: sa.Connection, path: str, lock_timeout: float) -> None:
    """Switch the file to write-ahead logging, in which reads and the writer never wait."""
    deadline = time.monotonic() + lock_timeout
    while True:
        try:
            mode = connection.exec_driver_sql("PRAGMA journal_mode = WAL").scalar()
            break
        except DBAPIError as error:
            # While another process does the same, this does not wait by itself.
            code = getattr(error.orig, "sqlite_errorcode", 0)
            if code & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    if mode != "wal":
        raise ConfigError(
            f"{path} cannot have a write-ahead log: put it on a local file system",
            backend=_BACKEND,
        )


def _is_live(
    columns: sa.sql.base.ReadOnlyColumnCollection[str, sa.Column[Any]],
) -> sa.ColumnElement[bool]:
    return sa.or_(columns.expires_at.is_(None), columns.expires_at > _now())


def _now() -> int:
    return time.time_ns() // 1000


def _bound(position: tuple[str, str]) -> sa.ColumnElement[Any]:
    return sa.tuple_(
        sa.literal(_to_blob(position[0]), sa.LargeBinary),
        sa.literal(_to_blob(position[1]), sa.LargeBinary),
    )


def _to_blob(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _from_blob(blob: bytes) -> str:
    return blob.decode("utf-8", "surrogatepass")


def _to_text(body: str) -> str:
    """Return the same JSON without lone surrogates, which no TEXT can hold."""
    if body.isascii():
        return body
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", body)


def _locked(path: str) -> Unavailable:
    return Unavailable(
        f"{path} stays locked by another writer: end what holds it, if this goes on",
        backend=_BACKEND,
    )


@contextmanager
def _translating(path: str, *, starting: bool = False) -> Iterator[None]:
    """Raise one of our errors for one of SQLite's.

    What an operator has to mend is `ConfigError` if we are `starting`, and may happen to a running
    process too, as `Denied` and `Unavailable`.
    """
    try:
        yield
    except DBAPIError as error:
        # Text that is not UTF-8, which we never wrote, comes without a code.
        code = getattr(error.orig, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        match code:
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED | sqlite3.SQLITE_PROTOCOL:
                raise _locked(path) from error.orig
            case sqlite3.SQLITE_FULL:
                kind: type[Error] = Unavailable
                message = f"the disk is full, {path} cannot grow: free some space"
            case sqlite3.SQLITE_IOERR | sqlite3.SQLITE_NOMEM:
                kind = Unavailable
                message = f"{path} cannot be read or written now ({error.orig}): look at the disk"
            case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
                is_denied = code != sqlite3.SQLITE_CANTOPEN
                kind = ConfigError if starting else Denied if is_denied else Unavailable
                message = _not_ours(path, str(error.orig))
            case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
                kind = ConfigError if starting else Unavailable
                message = _not_a_database(path, str(error.orig))
            case _:
                raise  # a bug of ours
        raise kind(message, backend=_BACKEND) from error.orig
    except OSError as error:
        if not starting:
            raise
        raise ConfigError(_not_ours(path, error.strerror or "unknown"), backend=_BACKEND) from error


def _not_ours(path: str, why: str) -> str:
    return (
        f"{path} cannot be opened for writing ({why}): make it a file in a folder where uid"
        f" {os.geteuid()} may write"
    )


def _not_a_database(path: str, why: str) -> str:
    return (
        f"{path} is damaged or no SQLite database ({why}) and was left as it is: restore it from"
        " a backup, or move it away to begin an empty one"
    )
