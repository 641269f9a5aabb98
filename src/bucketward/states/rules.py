"""What every state checks and computes alike, before it touches its storage."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence

from bucketward.errors import Unsupported
from bucketward.model import Add, Delete, Put, Reason

Tables = Mapping[str, Sequence[str]]
"""The tables of a state, each with the names of its indexes."""

MAX_CHANGES = 100
MAX_KEYS = 100
MAX_BODY = 256 * 1024
_SHOWN = 200


def named(table: str, key: str) -> str:
    """Return how a message names a record; keys are hostile and may be long."""
    return f"record {key[:_SHOWN]!a} of table {table}"


def check_index(tables: Tables, table: str, index: str, backend: str) -> None:
    """Raise `Unsupported` unless `tables` has `table` and that has `index`."""
    check_table(tables, table, backend)
    if index not in tables[table]:
        raise Unsupported(
            f"table {table} has no index {index[:_SHOWN]!a}: add it to the list of tables",
            backend=backend,
        )


def check_table(tables: Tables, table: str, backend: str) -> None:
    """Raise `Unsupported` unless `tables` has `table`."""
    if table not in tables:
        raise Unsupported(
            f"there is no table {table[:_SHOWN]!a}: add it to the list of tables", backend=backend
        )


def check_keys(keys: Sequence[str], backend: str) -> None:
    """Raise `Unsupported` if `get` cannot take so many keys."""
    if len(keys) > MAX_KEYS:
        raise Unsupported(
            f"{len(keys)} keys in one get, {MAX_KEYS} are allowed: ask in parts", backend=backend
        )


def check_changes(tables: Tables, changes: Sequence[Put | Delete | Add], backend: str) -> None:
    """Raise `Unsupported` if no state of these tables may commit `changes`, whatever it holds."""
    if len(changes) > MAX_CHANGES:
        raise Unsupported(
            f"{len(changes)} changes in one commit, {MAX_CHANGES} are allowed: commit in parts",
            backend=backend,
        )
    seen: set[tuple[str, str]] = set()
    for change in changes:
        key = change.record.key if isinstance(change, Put) else change.key
        check_table(tables, change.table, backend)
        if (change.table, key) in seen:
            raise Unsupported(
                f"{named(change.table, key)} stands twice in one commit: merge the changes",
                backend=backend,
            )
        seen.add((change.table, key))
        if isinstance(change, Put):
            for index in change.record.indexes:
                check_index(tables, change.table, index, backend)
            check_body(change.table, key, change.record.body, backend)
            expires_at = change.record.expires_at
            if expires_at is not None and expires_at.utcoffset() is None:
                raise ValueError("expires_at is not an aware datetime")


def check_body(table: str, key: str, body: str, backend: str) -> None:
    """Raise `Unsupported` if `body` is larger than a record may be."""
    # The encoding is only needed where the number of characters does not settle it.
    if len(body) * 4 <= MAX_BODY or len(body.encode("utf-8", "surrogatepass")) <= MAX_BODY:
        return
    raise Unsupported(
        f"the body of {named(table, key)} is over {MAX_BODY // 1024} KiB: leave details out",
        backend=backend,
        reason=Reason.TOO_LARGE,
    )


def check_limit(limit: int) -> None:
    """Raise `ValueError`, for it is a bug, if a page is asked to hold nothing."""
    if limit < 1:
        raise ValueError(f"limit is {limit}, not at least 1")


def added(change: Add, body: str, backend: str) -> str:
    """Return `body` with the amounts of `change` added.

    `Unsupported` if it is not a JSON object, a counter is not an integer, or it becomes too large.
    """
    name = named(change.table, change.key)
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Unsupported(f"{name} is not JSON: nothing can be added", backend=backend) from error
    if not isinstance(fields, dict):
        raise Unsupported(f"{name} is not a JSON object: nothing can be added", backend=backend)
    for counter, amount in change.amounts.items():
        value = fields.get(counter, 0)
        if not isinstance(value, int) or isinstance(value, bool):
            raise Unsupported(
                f"{counter[:_SHOWN]!a} in {name} is not an integer: nothing can be added",
                backend=backend,
            )
        fields[counter] = value + amount
    result = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    check_body(change.table, change.key, result, backend)
    return result


def to_cursor(*position: str) -> str:
    """Return a position in some order as opaque text."""
    return base64.urlsafe_b64encode(json.dumps(position).encode()).decode()


def from_cursor(cursor: str, length: int, backend: str) -> list[str]:
    """Return the position of `length` texts in `cursor`, which may come from anybody."""
    try:
        position = json.loads(base64.b64decode(cursor, altchars=b"-_", validate=True))
    except (ValueError, RecursionError):
        position = None
    if (
        not isinstance(position, list)
        or len(position) != length
        or not all(isinstance(text, str) for text in position)
    ):
        raise Unsupported(
            "the cursor is not from a page of this query: start without one", backend=backend
        )
    return position
