"""Amazon EventBridge: each note one event on a bus."""

# ruff: noqa: D102 - the docstrings are the Protocol's

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from bucketward.errors import Error, Unsupported
from bucketward.model import Note
from bucketward.notifiers.amazon import (
    batches,
    client,
    deliver,
    parse,
    refused,
    too_large,
    translating,
)

PERMISSIONS: Mapping[str, str] = {
    "events:DescribeEventBus": "see that the bus is there",
    "events:PutEvents": "put notes on the bus",
}

SOURCE = "bucketward"
"""The `source` of every event of ours."""

_TEN = 10
_BYTES = 256 * 1024
"""Entries, and bytes of all of them, in one request (PutEvents)."""


def open_eventbridge(url: str) -> EventBridgeNotifier:
    """Open ``eventbridge://<region>/<bus>?endpoint=...``; nothing is connected yet."""
    region, found, endpoint = parse(
        url, r"([/.\w-]{1,256})", "eventbridge://<region>/<name of the bus>"
    )
    return EventBridgeNotifier(found[1], region=region, endpoint=endpoint)


class EventBridgeNotifier:
    """Puts events whose `source` is ``bucketward`` and whose `detail-type` is the note's type.

    The `detail` is ``{"id", "subject", "attributes", "data"}``, `data` being the note's body, so
    that a rule is written ``{"source": ["bucketward"], "detail-type": ["scanResult"], "detail":
    {"data": {"scanResult": ["Infected"]}}}``.
    """

    def __init__(self, bus: str, *, region: str, endpoint: str = "") -> None:
        self._bus = bus
        self._what = f"event bus {bus} in {region}"
        self._events = client("events", region, endpoint, "eventbridge")

    def send(self, notes: Sequence[Note]) -> Mapping[str, Error]:
        failures: dict[str, Error] = {}
        pairs = []
        for note in notes:
            try:
                entry = self._entry(note)
            except Unsupported as error:
                failures[note.id] = error
                continue
            if _size(entry) > _BYTES:
                failures[note.id] = too_large("eventbridge", note)
            else:
                pairs.append((note, entry))
        for batch in batches(pairs, _size, entries=_TEN, total=_BYTES):
            failures |= deliver(batch, self._put)
        return failures

    def ping(self) -> None:
        with translating("eventbridge", self._what, "events:DescribeEventBus"):
            self._events.describe_event_bus(Name=self._bus)

    def close(self) -> None:
        self._events.close()

    def _entry(self, note: Note) -> Mapping[str, str]:
        try:
            detail = {
                "id": note.id,
                "subject": note.subject,
                "attributes": dict(note.attributes),
                "data": json.loads(note.body),
            }
        except (ValueError, RecursionError) as error:
            raise Unsupported(
                f"the body of note {note.id[:64]!a} is not JSON", backend="eventbridge"
            ) from error
        return {
            "EventBusName": self._bus,
            "Source": SOURCE,
            "DetailType": note.type,
            "Detail": json.dumps(detail),
        }

    def _put(self, batch: Sequence[tuple[Note, Mapping[str, str]]]) -> Mapping[str, Error]:
        with translating("eventbridge", self._what, "events:PutEvents"):
            answer = self._events.put_events(Entries=[dict(entry) for _, entry in batch])
            # One for each entry, in order.
            entries = list(answer["Entries"])
        failures = {}
        for (note, _), entry in zip(batch, entries + [{}] * len(batch), strict=False):
            if not entry.get("EventId"):
                failures[note.id] = refused(
                    "eventbridge",
                    f"a note to {self._what}",
                    str(entry.get("ErrorCode", "")),
                    str(entry.get("ErrorMessage", "")),
                )
        return failures


def _size(entry: Mapping[str, str]) -> int:
    return sum(len(entry[name].encode()) for name in ("Source", "DetailType", "Detail"))
