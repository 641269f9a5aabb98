"""The nouns: frozen, and free of any provider or framework.

Sizes are bytes, durations are seconds as `float`, times are aware UTC `datetime` and end in `_at`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, BinaryIO, Generic, TypeVar

T = TypeVar("T")


class _Nothing(Mapping[str, Any]):
    """An empty mapping that is hashable, so that a frozen dataclass takes it as a default."""

    def __getitem__(self, key: str) -> Any:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and not other

    def __repr__(self) -> str:
        return "{}"


NOTHING: Mapping[str, Any] = _Nothing()
"""The empty, immutable mapping."""


class Verdict(StrEnum):
    """What we say about one object.  The values are the tag values that users filter on."""

    CLEAN = "Clean"
    INFECTED = "Infected"
    INFECTED_ALLOWED = "InfectedAllowed"
    """Infected, and an administrator allowed exactly this.  Engines never say it."""
    SUSPICIOUS = "Suspicious"
    UNSCANNABLE = "Unscannable"
    ERROR = "Error"


class Reason(StrEnum):
    """Why something was not judged as a whole.  Each has a policy of its own."""

    TOO_LARGE = "too-large"
    """Larger than the engine can scan, or than the spool can ever hold."""
    ENCRYPTED = "encrypted"
    ARCHIVE_LIMIT = "archive-limit"
    """Nesting, number of members, unpacked size or unpacking time above the engine's limits."""
    CONTAINER_UNOPENED = "container-unopened"
    """A container that this engine does not look into."""
    CORRUPT = "corrupt"
    ARCHIVED_STORAGE_CLASS = "archived-storage-class"
    """In Glacier or the like: it has to be restored before it can be read."""
    CUSTOMER_KEY = "customer-key"
    """Encrypted with a key that only the customer holds (SSE-C)."""
    TIMED_OUT = "timed-out"
    SKIPPED = "skipped"
    """A scan or skip list of the bucket's policy leaves it out."""
    NO_ENGINE = "no-engine"
    """No engine was chosen for it."""
    ENGINE_FAILED = "engine-failed"
    DENIED = "denied"
    """We may not read it; the message names the missing permission."""
    UNSUPPORTED = "unsupported"
    GAVE_UP = "gave-up"
    """It was delivered as often as the queue allows and never came to an end."""


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """An object as an event, a crawl or a caller names it; a claim, which may be stale.

    `bucket` is the bucket's identity, a URL without query: ``s3://name``, ``file:///abs/dir``.
    `key` is exact and decoded.  `sequencer` orders events of one key where the provider gives one
    (compare as text after padding to equal length; S3 event message structure), and is "" or a
    constant elsewhere.
    """

    bucket: str
    key: str
    version_id: str | None = None
    etag: str | None = None
    size: int | None = None
    sequencer: str = ""
    event_at: datetime | None = None
    uploaded_by: str = ""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One exact object: the pin that every later read, tag, copy and delete names.

    `etag` is opaque, without quotes; it is not a digest of the content.  `version_id` is `None`
    where the bucket keeps no versions (also for S3's "null" version in a bucket that never had
    any).  `token` is the backend's own opaque pin where the etag is not enough.  `tag_count` is
    `None` where the store did not say, which means unknown, not zero.  `metadata` is the user's
    (names without ``x-amz-meta-``), `headers` are the object's own HTTP headers such as
    ``content-type``, in lower case; a listing may leave both empty.
    """

    bucket: str
    key: str
    size: int
    etag: str
    modified_at: datetime
    version_id: str | None = None
    token: str = ""
    tag_count: int | None = None
    storage_class: str = ""
    metadata: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    headers: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    is_latest: bool = True

    @property
    def identity(self) -> str:
        """Return what tells this exact object from every other: the version id, or the etag."""
        return self.version_id if self.version_id is not None else f"etag:{self.etag}"

    @property
    def ref(self) -> ObjectRef:
        """Return the reference that names exactly this object."""
        return ObjectRef(self.bucket, self.key, self.version_id, self.etag, self.size)


@dataclass(frozen=True, slots=True)
class Spooled:
    """The bytes of one object, held locally for the engines; read-only.

    `fd` is a descriptor that cannot be written through; its file position is shared, so use
    `os.pread`, `mmap` or `open()`.  `path` opens the same bytes by name within this process
    (``/proc/self/fd/N``) or, for a real file, from any.  `name` is a hint for engines that look at
    the ending; it is hostile input and never a path.  `window` is `(offset, total)` where these
    bytes are a part of something larger, else `None`.
    """

    fd: int
    size: int
    path: str
    name: str = ""
    window: tuple[int, int] | None = None

    def open(self) -> BinaryIO:
        """Open the bytes afresh, at their start, with a position of their own."""
        return os.fdopen(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), "rb")


@dataclass(frozen=True, slots=True)
class Finding:
    """One signature that one engine recognised, in one archive member if the engine says which."""

    engine: str
    signature: str
    member: str = ""


@dataclass(frozen=True, slots=True)
class Signatures:
    """What an engine judges by.

    `digest` covers everything that can change a verdict: the engine's version, its database files,
    rules, limits and options.  `version` is for people.  `updated_at` is the date of the newest
    database, `None` if it bears none.  `count` is the number of signatures, 0 if unknown.
    `is_demo` says that nothing but Bucketward's own demonstration signatures are loaded.
    """

    digest: str
    version: str
    updated_at: datetime | None = None
    count: int = 0
    is_demo: bool = False


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What one engine says of one file.

    `coverage` is empty if the engine looked at every byte and every member, else the reasons
    why it did not.  `verdict` is about what it did look at, so an engine that opens no containers
    reports Clean with coverage ``(container-unopened,)``; a report without full coverage never
    makes an object Clean.  Verdicts are Clean, Infected, Suspicious, Unscannable or Error; Clean
    comes with no findings, Infected and Suspicious with at least one, Unscannable and Error with
    at least one reason in `coverage`.
    """

    engine: str
    verdict: Verdict
    coverage: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    signatures: Signatures | None = None
    seconds: float = 0.0
    message: str = ""

    def __post_init__(self) -> None:
        if self.verdict is Verdict.INFECTED_ALLOWED:
            raise ValueError("an engine never says InfectedAllowed")
        if self.verdict in (Verdict.UNSCANNABLE, Verdict.ERROR) and not self.coverage:
            raise ValueError(f"{self.verdict} needs a reason in coverage")
        if (self.verdict in (Verdict.INFECTED, Verdict.SUSPICIOUS)) != bool(self.findings):
            raise ValueError(f"{self.verdict} with {len(self.findings)} findings")

    @property
    def is_full(self) -> bool:
        """Return whether every byte and every member was looked at."""
        return not self.coverage


@dataclass(frozen=True, slots=True)
class ScanResult:
    """The record of one scan of one exact object.

    `id` is the same for every delivery of the same message about the same object, so recording a
    result twice changes nothing.  `sha256` is `None` where no byte was read.  `reasons` are why
    the verdict is not Clean although nothing was found.  `engines` is the digest of the engine
    set and its signatures.  `action` is what the policy decided (keep, move, delete);
    `action_state` is "done", "pending" (decided, the object still where it was), "failed", or
    what somebody did afterwards: "restored", "deleted";
    `moved_to` is the bucket and key it was moved to.  `tag_note` says why our tags are not on the
    object, if so.  `cached_from` is the id of the scan whose reports these are, where the same
    bytes were judged before by the same engines and signatures; "" where they were scanned.
    """

    id: str
    object: ObjectInfo
    verdict: Verdict
    scanned_at: datetime
    reasons: tuple[str, ...] = ()
    reports: tuple[EngineReport, ...] = ()
    sha256: str | None = None
    seconds: float = 0.0
    message: str = ""
    engines: str = ""
    uploaded_by: str = ""
    sequencer: str = ""
    agent: str = ""
    account: str = ""
    region: str = ""
    action: str = "keep"
    action_state: str = "done"
    moved_to: tuple[str, str] | None = None
    tag_note: str = ""
    cached_from: str = ""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Return every finding of every engine."""
        return tuple(f for report in self.reports for f in report.findings)


def scan_id(ref: ObjectRef | ObjectInfo, cause: str) -> str:
    """Return the id of the scan of `ref` that `cause` (a message, request or job id) asked for."""
    identity = ref.version_id if ref.version_id is not None else ref.etag or ""
    text = "\0".join((ref.bucket, ref.key, identity, cause))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some items, and the cursor that continues behind them; "" means there are no more."""

    items: Sequence[T]
    cursor: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One delivery of one queued message.

    `id` is the same in every delivery, `receipt` only in this one.  `deliveries` counts this one
    too, so it is at least 1.  The lease ends at `leased_until`, on the clock of `time.time()`.
    `reason` is why a dead letter was buried.
    """

    id: str
    body: str
    receipt: str
    deliveries: int
    sent_at: datetime
    leased_until: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Depth:
    """How full a queue is, approximately.  `oldest_age` is in seconds, `None` if unknown."""

    waiting: int
    in_flight: int
    oldest_age: float | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a `State`.

    `version` counts the writes of this record from 1.  `body` is JSON text.  `indexes` maps an
    index name to `(value, sort)`: `State.query` finds records by value and orders them by sort.
    """

    key: str
    body: str
    version: int = 0
    indexes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Put:
    """Write a record if the stored version is `version`: 0 for "must not exist", `None` for any.

    `record.version` is ignored; the backend counts.
    """

    table: str
    record: Record
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a record if the stored version is `version`, `None` for any; absent is fine then."""

    table: str
    key: str
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Add:
    """Add to named integer counters in the body (a JSON object) of a record, made if absent."""

    table: str
    key: str
    amounts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Note:
    """One notification.

    `id` is stable over retries, for consumers to discard duplicates.  `type` is ``scanResult``
    and the like.  `attributes` are what subscription filters see; `body` is JSON text.
    """

    id: str
    type: str
    subject: str
    body: str
    attributes: Mapping[str, str] = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True, slots=True)
class BucketInfo:
    """A bucket as its cloud describes it.  `None` means that we could not find out."""

    bucket: str
    account: str = ""
    region: str = ""
    created_at: datetime | None = None
    has_versions: bool | None = None
    is_public: bool | None = None
    encryption: str | None = None
    requester_pays: bool | None = None
    tags: Mapping[str, str] = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True, slots=True)
class QuarantineSpec:
    """A quarantine bucket to make: `name` without scheme, `expire_days` 0 for never."""

    name: str
    region: str = ""
    expire_days: int = 0
    kms_key: str = ""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a provider's credential chain yields for one account and purpose.

    Never logged, never stored: `repr` shows nothing but the key id.
    """

    access_key: str
    secret_key: str = field(repr=False)
    session_token: str = field(default="", repr=False)
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: a person, an API key or a part of Bucketward itself."""

    id: str
    role: str
    groups: frozenset[str] = frozenset()
