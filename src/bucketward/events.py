"""What a queued message says: storage providers' notifications, and our own form, as refs.

Pure, and hostile input throughout: for any text `decode` returns an `Event` or raises
`Unsupported` with reason ``not-an-event``.

Sources, and how each writes a key.  A wrong guess names another object, so the table decides and
nothing is guessed from the look of a key:

==============  =======  ========================================================================
source          key      known from
==============  =======  ========================================================================
``aws:s3``      form     S3 user guide, "Event message structure": "red flower.jpg" becomes
                         "red+flower.jpg".  The slash may be ``%2F`` or itself; a moto server and
                         LocalStack write it so, too.
``minio:s3``    form     minio issues 7665, 11665, 15200: ``users%2FABC``, "working as intended".
``ceph:s3``     raw      Ceph `rgw_notify.cc`: ``record.object_key = key.name``, never encoded.
``aws.s3``      raw      EventBridge; the S3 user guide, "EventBridge event message structure",
                         shows plain keys, and moto's `notifications.py` sends `key.name` as it is.
any other       form     It speaks S3's format, so S3's rule holds.  A percent sign that encodes
                         nothing makes the record malformed, never a wrong key.
==============  =======  ========================================================================
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote_plus

from bucketward.errors import Unsupported
from bucketward.model import ObjectRef

MAX_BODY = 1 << 20
"""Longer bodies are refused, in characters.  S3 sends at most 64 KB, a queue holds 256 KiB."""

MAX_KEY = 1024
"""The longest key of a provider's event, in bytes of UTF-8 (S3's limit)."""

_MAX_WRAPPINGS = 3
_MAX_TEXTS = 100
_MAX_SIZE = 2**63 - 1

_CREATED = "created"
_REMOVED = "removed"
_EVENTS = {
    "objectrestore:completed": _CREATED,
    # Ceph: written by multisite replication, under either name.
    "objectsynced:create": _CREATED,
    "replication:create": _CREATED,
    "objectsynced:delete": _REMOVED,
    "objectsynced:deletionmarkercreated": _REMOVED,
    "replication:delete": _REMOVED,
    "replication:deletionmarkercreated": _REMOVED,
    "lifecycleexpiration:delete": _REMOVED,
    "lifecycleexpiration:deletemarkercreated": _REMOVED,
    # Ceph's own names, before it took over those of S3.
    "objectlifecycle:expiration:current": _REMOVED,
    "objectlifecycle:expiration:noncurrent": _REMOVED,
    "objectlifecycle:expiration:deletemarker": _REMOVED,
    # MinIO calls these creations although no byte was written.  Scanning would tag, and tagging
    # would make the next such event, for ever.
    "objectcreated:puttagging": "",
    "objectcreated:deletetagging": "",
    "objectcreated:putretention": "",
    "objectcreated:putlegalhold": "",
}
_DETAIL_TYPES = {
    "Object Created": _CREATED,
    "Object Restore Completed": _CREATED,
    "Object Deleted": _REMOVED,
}

_BUCKET_NAME = re.compile(r"(?!\.*\Z)[A-Za-z0-9._-]{1,255}")
_PRINTABLE = re.compile(r"[\x21-\x7e]{1,1024}")
_HEX = re.compile(r"[0-9A-Fa-f]{1,64}")
_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Event:
    """What one message body says.

    `refs` are objects that are there now and want a scan: created, restored, or in our own form.
    `removed` are deleted objects; `version_id` is that of the version deleted for good, or of the
    delete marker where one was made (the versions under it remain), or `None` where there is no
    version, so look what is there.  `ignored` says of each other record why it is no work, and
    `malformed` why it cannot be understood: those are never dropped silently, the caller logs or
    buries the body.  Each text is short; at most 100 are kept, and the last says how many more.

    `job` is the retro job that asked, `attempt` how often this was enqueued again; both only in
    our own form.
    """

    refs: tuple[ObjectRef, ...] = ()
    removed: tuple[ObjectRef, ...] = ()
    ignored: tuple[str, ...] = ()
    malformed: tuple[str, ...] = ()
    job: str = ""
    attempt: int = 0


def decode(body: str) -> Event:
    """Return what `body` says, in the order in which it says it.

    Understood are S3's event JSON (Amazon's, MinIO's, Ceph's), EventBridge's, both also inside an
    SNS notification, and what `encode` wrote.  One bad record does not lose the good ones, see
    `Event.malformed`.  Raises `Unsupported` with reason ``not-an-event`` for everything else.
    """
    for _ in range(_MAX_WRAPPINGS):
        document = _load(body)
        kind = document.get("Type")
        if not (isinstance(kind, str) and ("TopicArn" in document or "Message" in document)):
            return _decode(document)
        # https://docs.aws.amazon.com/sns/latest/dg/sns-message-and-json-formats.html
        if kind != "Notification":
            return Event(ignored=(f"SNS {_short(kind)}, no notification",))
        message = document.get("Message")
        if not isinstance(message, str):
            raise _no_event("an SNS notification without a text in Message")
        body = message
    raise _no_event(f"an SNS notification wrapped more than {_MAX_WRAPPINGS - 1} times")


def encode(refs: Sequence[ObjectRef], *, job: str = "", attempt: int = 0) -> str:
    """Return our own form of a message about `refs`: ASCII JSON.

    ``decode(encode(refs)).refs == refs``, whatever the keys hold.  The caller keeps the body below
    the queue's limit; one ref takes up to 6 bytes per byte of its texts and 200 more.
    """
    document: dict[str, Any] = {"bucketward": 1, "refs": [_encode_ref(ref) for ref in refs]}
    if job:
        document["job"] = _encode_text(job)
    if attempt:
        document["attempt"] = attempt
    return json.dumps(document, ensure_ascii=True, separators=(",", ":"))


def newer(a: str, b: str) -> int | None:
    """Compare two sequencers of one key: above 0 if `a` is newer, below 0 if `b` is.

    `None` if that cannot be told: one is absent, both are equal (LocalStack sends a constant), or
    they come from different forms of event (EventBridge's have 16 digits, those of S3's own
    form a leading ``00``).

    "To compare, first right pad the shorter value with zeros, and then do a lexicographical
    comparison" - S3 user guide, "Event message structure"; it holds for PUTs and DELETEs of one
    key.  `decode` has turned Ceph's into what can be compared so.
    """
    a, b = a.lower(), b.lower()
    if not a or not b or a.startswith("00") != b.startswith("00"):
        return None
    width = max(len(a), len(b))
    a, b = a.ljust(width, "0"), b.ljust(width, "0")
    if a == b:
        return None
    return 1 if a > b else -1


@dataclass(slots=True)
class _Notes:
    """Short texts, of which only the first hundred are kept."""

    texts: list[str] = field(default_factory=list)
    more: int = 0

    def add(self, text: str) -> None:
        if len(self.texts) < _MAX_TEXTS - 1:
            self.texts.append(text)
        else:
            self.more += 1

    def all(self) -> tuple[str, ...]:
        more = (f"and {self.more} more",) if self.more else ()
        return (*self.texts, *more)


class _BadRecord(Exception):  # noqa: N818 - it names the record, and never leaves this module
    """Why a record cannot be understood."""


def _load(body: str) -> dict[str, Any]:
    if len(body) > MAX_BODY:
        raise _no_event(f"{len(body)} characters long")
    try:
        document = json.loads(body)
    except RecursionError:
        raise _no_event("JSON nested too deep") from None
    except ValueError:  # also an integer of more than 4,300 digits
        raise _no_event("not JSON") from None
    if not isinstance(document, dict):
        raise _no_event(f"a JSON {type(document).__name__}, not an object")
    return document


def _decode(document: dict[str, Any]) -> Event:
    if "bucketward" in document:
        return _decode_own(document)
    if "Records" in document:
        return _decode_records(document["Records"])
    if "detail-type" in document:
        return _decode_bridge(document)
    # No Records there: Service, Event, Time and Bucket at the top.
    if document.get("Event") == "s3:TestEvent":
        return Event(ignored=("s3:TestEvent, sent when notifications were set up",))
    raise _no_event("a JSON object that is no S3, EventBridge, SNS or Bucketward message")


def _decode_records(records: Any) -> Event:
    if not isinstance(records, list):
        raise _no_event("an S3 event whose Records are no list")
    refs: list[ObjectRef] = []
    removed: list[ObjectRef] = []
    ignored, malformed = _Notes(), _Notes()
    for number, record in enumerate(records):
        try:
            name = _event_name(record)
            kind = _kind(name)
            if kind == _CREATED:
                refs.append(_record_ref(record))
            elif kind == _REMOVED:
                removed.append(_record_ref(record))
            else:
                ignored.add(f"{_short(name)}, no new bytes")
        except _BadRecord as bad:
            malformed.add(f"record {number}: {bad}")
    if not records:
        ignored.add("an S3 event without records")
    return Event(tuple(refs), tuple(removed), ignored.all(), malformed.all())


def _event_name(record: Any) -> str:
    if not isinstance(record, dict):
        raise _BadRecord("is no object")
    # "2.x": consumers are told to check the major version only (S3 user guide).
    version = record.get("eventVersion", "2")
    if not isinstance(version, str) or version.partition(".")[0] != "2":
        raise _BadRecord(f"eventVersion {_short(version)}, only 2 is understood")
    name = record.get("eventName")
    if not isinstance(name, str) or not name:
        raise _BadRecord("eventName is missing")
    return name


def _kind(name: str) -> str:
    # Amazon and newer Ceph leave "s3:" out, MinIO and older Ceph do not.
    name = name.lower().removeprefix("s3:")
    kind = _EVENTS.get(name)
    if kind is not None:
        return kind
    if name.startswith("objectcreated:"):
        return _CREATED  # a kind we never heard of is scanned once too often, not too seldom
    return _REMOVED if name.startswith("objectremoved:") else ""


def _record_ref(record: dict[str, Any]) -> ObjectRef:
    is_ceph = record.get("eventSource") == "ceph:s3"
    s3 = _table(record, "s3")
    bucket, thing = _table(s3, "bucket"), _table(s3, "object")
    sequencer = _sequencer(thing.get("sequencer"))
    return ObjectRef(
        bucket=_bucket(bucket.get("name")),
        key=_key(thing.get("key"), is_raw=is_ceph),
        version_id=_version_id(thing.get("versionId")),
        etag=_etag(thing.get("eTag")),
        size=_size(thing.get("size")),
        sequencer=_ceph_sequencer(sequencer) if is_ceph else sequencer,
        event_at=_time(record.get("eventTime")),
        uploaded_by=_who(record.get("userIdentity"), "principalId"),
    )


def _decode_bridge(document: dict[str, Any]) -> Event:
    kind = document["detail-type"]
    if not isinstance(kind, str) or document.get("source") != "aws.s3":
        raise _no_event("an EventBridge event that is not from aws.s3")
    what = _DETAIL_TYPES.get(kind)
    if what is None:
        return Event(ignored=(f"{_short(kind)}, no new bytes",))
    try:
        detail = _table(document, "detail")
        bucket, thing = _table(detail, "bucket"), _table(detail, "object")
        ref = ObjectRef(
            bucket=_bucket(bucket.get("name")),
            key=_key(thing.get("key"), is_raw=True),
            version_id=_version_id(thing.get("version-id")),
            etag=_etag(thing.get("etag")),
            size=_size(thing.get("size")),
            sequencer=_sequencer(thing.get("sequencer")),
            event_at=_time(document.get("time")),
            uploaded_by=_who(detail, "requester"),
        )
    except _BadRecord as bad:
        return Event(malformed=(f"{kind}: {bad}",))
    return Event(refs=(ref,)) if what == _CREATED else Event(removed=(ref,))


def _table(parent: dict[str, Any], name: str) -> dict[str, Any]:
    value = parent.get(name)
    if not isinstance(value, dict):
        raise _BadRecord(f"{name} is missing")
    return value


def _bucket(name: Any) -> str:
    if not isinstance(name, str) or not _BUCKET_NAME.fullmatch(name):
        raise _BadRecord(f"{_short(name)} is no bucket name")
    return f"s3://{name}"


def _key(value: Any, *, is_raw: bool) -> str:
    if not isinstance(value, str) or not value:
        raise _BadRecord("key is missing")
    # An encoded byte takes at most three characters; what is longer need not be decoded.
    if len(value) > 3 * MAX_KEY:
        raise _BadRecord(f"key is longer than {MAX_KEY} bytes")
    key = value
    if not is_raw:
        if _BARE_PERCENT.search(value):
            raise _BadRecord(f"key {_short(value)} has a percent sign that encodes nothing")
        try:
            key = unquote_plus(value, errors="strict")
        except UnicodeDecodeError:
            raise _BadRecord(f"key {_short(value)} is not UTF-8") from None
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise _BadRecord(f"key {_short(value)} is not UTF-8") from None
    if size > MAX_KEY:
        raise _BadRecord(f"key is {size} bytes long, more than {MAX_KEY}")
    return key


def _version_id(value: Any) -> str | None:
    # "null" is S3's name for what was written without versioning; the store, asked for the key's
    # current object, finds it and checks the etag.
    if value is None or value in ("", "null"):
        return None
    if not isinstance(value, str) or not _PRINTABLE.fullmatch(value):
        raise _BadRecord(f"{_short(value)} is no version id")
    return value


def _etag(value: Any) -> str | None:
    # A claim that helps to notice a change; without it the read looks at what is there.
    if not isinstance(value, str):
        return None
    value = value.strip('"')
    return value if _PRINTABLE.fullmatch(value) and '"' not in value else None


def _size(value: Any) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value <= _MAX_SIZE else None


def _sequencer(value: Any) -> str:
    return value if isinstance(value, str) and _HEX.fullmatch(value) else ""


def _ceph_sequencer(value: str) -> str:
    # RGW writes the memory of a utime_t in hex: two 32-bit numbers, seconds and nanoseconds,
    # lowest byte first (rgw_notify.cc).  Turned around they sort by time.
    if len(value) != 16:
        return ""
    raw = bytes.fromhex(value)
    return (raw[3::-1] + raw[:3:-1]).hex()


def _time(value: Any) -> datetime | None:
    if not isinstance(value, str):
        return None
    try:
        at = datetime.fromisoformat(value)
        return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def _who(parent: Any, name: str) -> str:
    value = parent.get(name) if isinstance(parent, dict) else None
    return _SURROGATE.sub("?", value[:256]) if isinstance(value, str) else ""


def _encode_text(text: str) -> str | list[str]:
    # Two lone surrogates side by side would come back from JSON as one character.
    if _SURROGATE.search(text):
        return [base64.b64encode(text.encode("utf-8", "surrogatepass")).decode()]
    return text


def _decode_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        try:
            return base64.b64decode(value[0], validate=True).decode("utf-8", "surrogatepass")
        except (binascii.Error, ValueError):
            pass
    raise _BadRecord(f"{_short(value)} is no text")


def _encode_ref(ref: ObjectRef) -> dict[str, Any]:
    fields: dict[str, Any] = {"bucket": _encode_text(ref.bucket), "key": _encode_text(ref.key)}
    if ref.version_id is not None:
        fields["version_id"] = _encode_text(ref.version_id)
    if ref.etag is not None:
        fields["etag"] = _encode_text(ref.etag)
    if ref.size is not None:
        fields["size"] = ref.size
    if ref.sequencer:
        fields["sequencer"] = _encode_text(ref.sequencer)
    if ref.event_at is not None:
        fields["event_at"] = ref.event_at.isoformat()
    if ref.uploaded_by:
        fields["uploaded_by"] = _encode_text(ref.uploaded_by)
    return fields


def _decode_own(document: dict[str, Any]) -> Event:
    refs = document.get("refs")
    if document["bucketward"] != 1 or not isinstance(refs, list):
        raise _no_event("a Bucketward message of another version")
    good: list[ObjectRef] = []
    malformed = _Notes()
    for number, fields in enumerate(refs):
        try:
            good.append(_decode_ref(fields))
        except _BadRecord as bad:
            malformed.add(f"ref {number}: {bad}")
    try:
        job = _decode_text(document.get("job", ""))
    except _BadRecord as bad:
        malformed.add(f"job: {bad}")
        job = ""
    return Event(
        refs=tuple(good),
        malformed=malformed.all(),
        job=job,
        attempt=_size(document.get("attempt")) or 0,
    )


def _decode_ref(fields: Any) -> ObjectRef:
    if not isinstance(fields, dict):
        raise _BadRecord("is no object")
    bucket, key = _decode_text(fields.get("bucket")), _decode_text(fields.get("key"))
    if not bucket or not key:
        raise _BadRecord("bucket or key is empty")
    version_id, etag = fields.get("version_id"), fields.get("etag")
    return ObjectRef(
        bucket=bucket,
        key=key,
        version_id=None if version_id is None else _decode_text(version_id),
        etag=None if etag is None else _decode_text(etag),
        size=_size(fields.get("size")),
        sequencer=_decode_text(fields.get("sequencer", "")),
        event_at=_time(fields.get("event_at")),
        uploaded_by=_decode_text(fields.get("uploaded_by", "")),
    )


def _short(value: Any) -> str:
    """Return at most some 80 printable ASCII characters that show `value`, for a message."""
    if isinstance(value, str):
        text = ascii(value[:60])
        return text[:80] + "..." if len(value) > 60 or len(text) > 80 else text
    if value is None or isinstance(value, bool | float):
        return json.dumps(value)
    return f"a JSON {type(value).__name__}"


def _no_event(what: str) -> Unsupported:
    return Unsupported(
        f"the message is {what}; send only object events to this queue", reason="not-an-event"
    )
