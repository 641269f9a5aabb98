"""The six Protocols.  Their docstrings are the specification that `bucketward.testing` checks.

Rules for every method of every backend:

- it raises only the classes of `bucketward.errors`, with `backend` set; a bug is anything else;
- it may be called from any thread, and from several at once;
- it does not retry beyond what the provider's SDK does for a single request; the caller knows
  better what waiting costs (the queue redelivers);
- it is idempotent unless it says otherwise;
- it blocks: natively, without holding the interpreter lock for long;
- nothing is called after `close`.

Every backend module also has ``PERMISSIONS: Mapping[str, str]``, the provider permissions that it
uses, each with its reason, and an opener ``open_<product>(url, ...)`` that `wiring` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from bucketward.errors import Error
from bucketward.model import (
    NOTHING,
    Add,
    BucketInfo,
    Credentials,
    Delete,
    Depth,
    EngineReport,
    Message,
    Note,
    ObjectInfo,
    ObjectRef,
    Page,
    Put,
    QuarantineSpec,
    Record,
    Signatures,
    Spooled,
)

CredentialsProvider = Callable[[], Credentials]
"""Yields credentials that are valid now; called often, caches by itself.  `None` in place of a
provider means the platform's own chain (environment, profile, instance or task role)."""


class Backend(Protocol):
    """What all backends share."""

    def ping(self) -> None:
        """Prove cheaply that we can reach it with the permissions we need.

        Raises the error that says what is wrong and how to mend it: `Denied` with the missing
        permission, `Unavailable`, `NotFound` (no such bucket, queue, table) or `ConfigError`.
        """

    def close(self) -> None:
        """Release sockets, files, threads and processes.  Closing twice is fine."""


@runtime_checkable
class Store(Backend, Protocol):
    """One bucket.

    A method given an `ObjectInfo` acts on exactly that object.  If the key (or version) now holds
    another, it raises `Changed` and has done nothing; if it holds none, `NotFound`.  Where the
    store has no condition for an operation (its name is then absent from `conditions`), the
    backend looks before the operation and, for `read`, `replace_tags` and `copy_from`, after it
    too: a change it notices is still `Changed`, and what is left is a documented window.

    Keys are any text of 1 to 1,024 bytes in UTF-8.  A backend whose medium cannot hold a key as
    it is escapes it reversibly or raises `Unsupported`; it never drops, rewrites or confuses
    keys, and no key ever names anything outside the bucket.
    """

    bucket: str
    """The bucket's identity: its URL without a query, as in `ObjectInfo.bucket`."""

    account: str
    """The account that owns the bucket, "" if unknown or none."""

    region: str
    """The bucket's region, "" if unknown or none."""

    has_tags: bool
    """Whether objects can carry tags here; if not, `tags` is empty and `replace_tags` raises
    `Unsupported`."""

    max_tags: int
    """How many tags one object can carry, ours and others' together (S3: 10)."""

    has_versions: bool
    """Whether each write makes a new version that can be named for ever.  A bucket whose
    versioning is suspended says False."""

    conditions: frozenset[str]
    """What this server enforces by itself, atomically, of: ``read`` (a read by etag),
    ``tag`` (a tag write by etag or version), ``put-absent`` (`if_absent` of `put`),
    ``copy-source`` (a copy by the source's etag or version), ``copy-absent`` (`if_absent` of
    `copy_from`), ``delete`` (a delete by etag or version).  On a versioned bucket naming the
    version is the condition."""

    def list(
        self, prefix: str = "", *, cursor: str = "", versions: bool = False
    ) -> Page[ObjectInfo]:
        """Return one page of objects whose key begins with `prefix`.

        Following `cursor` to its end yields every object that existed throughout, once; the
        order is not promised.  A cursor is opaque text and can be used later, by another
        process.  With `versions`, every version is listed (`is_latest` tells the current ones);
        delete markers never are.  `tag_count`, `metadata` and `headers` may be missing.
        """

    def prefixes(self, prefix: str = "", delimiter: str = "/") -> Iterator[str]:
        """Yield each distinct beginning of keys up to the first `delimiter` behind `prefix`."""

    def stat(self, ref: ObjectRef) -> ObjectInfo:
        """Return what `ref` names: its version if it has one, else the current object.

        `Changed` if `ref.etag` is given and differs.  `NotFound` if there is none or it is a
        delete marker.
        """

    def read(
        self,
        ref: ObjectRef | ObjectInfo,
        accept: Callable[[ObjectInfo], int],
        *,
        start: int = 0,
        length: int | None = None,
    ) -> ObjectInfo:
        """Read the object that `ref` names, whole or a range, and return the pin: what was read.

        One request.  When the store has said what the object is, `accept` is called exactly once,
        on any thread, with the pin (`size` is the whole object's, also for a range); it returns a
        writable descriptor, which is filled from its position 0 and never closed, or it raises:
        then no body is transferred and `read` raises that same exception.  A zero-byte object
        calls `accept` too.  On return exactly the bytes of the pin, or of the range, have been
        written; a body that ends early is `Unavailable`.  A range beyond the end is cut.

        `Changed` if the object is another than `ref` names (version, or etag where given).
        `Unsupported` with reason ``archived-storage-class`` or ``customer-key`` where it cannot be
        read by its nature; `Denied` with the missing permission, a KMS key's included.
        """

    def tags(self, info: ObjectInfo) -> Mapping[str, str]:
        """Return the tags of exactly this object."""

    def replace_tags(self, info: ObjectInfo, tags: Mapping[str, str]) -> None:
        """Set the whole tag set of exactly this object; what is not in `tags` is removed.

        Callers merge, backends do not.  `Unsupported` with reason ``tag-limit`` above the store's
        limits.
        """

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
        """Store `size` bytes of `fd` from its position 0 under `key` and return the new pin.

        Atomic: a reader sees the old object or the new one, whole, with its tags.  With
        `if_absent`, `Changed` if the key holds an object already.  `fd` is read with positions of
        our own and not closed.  `Unsupported` with reason ``tag-limit`` above the store's limits.
        """

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
        """Copy exactly `info` of `source` to `key` of this bucket, without the bytes passing here.

        Headers and storage class stay; `tags` and `metadata` replace the source's unless `None`.
        `Changed` if the source is no longer `info`, and with `if_absent` if `key` is taken; then
        nothing is left under `key` that was not there before.  `Unsupported` or `Denied`: the
        caller may read and put instead.
        """

    def delete(self, info: ObjectInfo) -> None:
        """Delete exactly this object: its version, or the key while it still holds `info`.

        `NotFound` if it is gone already.  `Denied` if a lock or legal hold keeps it, with reason
        ``object-lock``.
        """


@runtime_checkable
class Queue(Backend, Protocol):
    """At-least-once delivery of text messages, each under a lease while somebody works on it.

    Order is not promised.  A message that is neither acked nor nacked is delivered again once its
    lease has lapsed.  `max_deliveries` is how often one message is delivered before the queue
    itself sets it aside among the dead letters, 0 if it never does.
    """

    max_deliveries: int

    def send(self, bodies: Sequence[str]) -> None:
        """Enqueue every body, durably.  Not idempotent.

        On `Unavailable` some may have been enqueued: the caller sends all again, which at most
        duplicates.  `Unsupported` with reason ``too-large`` for a body over 256 KiB of UTF-8.
        """

    def receive(self, limit: int, wait: float) -> Sequence[Message]:
        """Lease up to `limit` messages, waiting up to `wait` seconds for the first one.

        Returns at once when there is at least one; may be empty, may be fewer than are there.
        """

    def ack(self, messages: Sequence[Message]) -> None:
        """Done with these for good.

        Acking twice, or after the lease lapsed, is no error.  All are tried; `Unavailable` if any
        is left.
        """

    def nack(self, messages: Sequence[Message], delay: float = 0) -> None:
        """Give these back, to be delivered again after `delay` seconds; lapsed leases are fine."""

    def extend(self, messages: Sequence[Message], seconds: float) -> Sequence[Message]:
        """Make each lease end `seconds` from now and return the messages still held.

        Returned messages carry fresh `receipt` and `leased_until`, which may be earlier than asked
        where the queue has a maximum (SQS: 12 hours from the receipt).  Those missing were lost:
        somebody else may have them.
        """

    def bury(self, message: Message, reason: str) -> None:
        """Move the message to the dead letters, with the reason; it is not delivered again.

        Idempotent by message id as far as the queue can tell; never loses the message: at worst
        it stands among the dead letters twice.
        """

    def dead(self, limit: int, wait: float) -> Sequence[Message]:
        """Lease dead letters, like `receive`; ack, nack and extend take them too.

        Includes those that the queue set aside by itself; `Message.reason` is what was given to
        `bury`, "" for those.
        """

    def depth(self) -> Depth:
        """Return about how full the queue is; dead letters do not count."""


@runtime_checkable
class Engine(Backend, Protocol):
    """One antivirus engine, which runs outside this process and knows nothing of storage.

    `ping` raises `Unavailable` until the engine has loaded a signature database and `scan` would
    work.
    """

    name: str
    max_size: int
    """The largest file, in bytes, that it looks at as a whole; callers compare before fetching."""

    opens_containers: bool
    """Whether it looks into archives, documents and other containers."""

    def scan(self, file: Spooled, deadline: float, *, alone: bool = False) -> EngineReport:
        """Judge all of `file`.

        Silence is never Clean: a limit, a password, a nesting too deep, a file cut short is
        Unscannable with its reason; only the engine's own explicit word is Clean.

        `deadline` is on the clock of `time.monotonic`.  Past it the work is ended, in the engine
        too, and the report is Unscannable ``timed-out``.  A failure of the engine that another
        try may mend raises `Unavailable`; one about this file in particular is a report with
        verdict Error and reason ``engine-failed``.

        `alone` is for a file that may have killed the engine before: it is judged in a fresh
        engine, with no other file in it, which is thrown away afterwards.  If the engine dies on
        it then, the report is Error ``engine-failed``.
        """

    def signatures(self) -> Signatures:
        """Return what the engine judges by now.  Cheap; follows a reload by itself.

        `Unavailable` while there is none.
        """


@runtime_checkable
class State(Backend, Protocol):
    """Small records by table and key, with optimistic locking and named indexes.

    The ceiling is DynamoDB's: no joins, no scans but `export`, a body of at most 256 KiB, at
    most 100 changes in one commit.  Tables and indexes are those of the list that the opener was
    given; others are `Unsupported`.  Expired records (`expires_at` past) may be returned for a
    while and vanish by themselves.
    """

    def get(self, table: str, keys: Sequence[str]) -> Mapping[str, Record]:
        """Return the records that exist among `keys` (at most 100), by key; strongly consistent."""

    def commit(self, changes: Sequence[Put | Delete | Add]) -> None:
        """Make all changes or none, durably.

        `Changed` if any condition fails, and then nothing is written; the message names the first
        such record.  At most 100 changes, no record twice.  `Add` is not idempotent: give it
        company, a `Put(version=0)` that fails the second time.
        """

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
        """Return records whose `index` has exactly `value`, ordered by sort, then key.

        Order is by Unicode code point.  `low` is inclusive, `high` exclusive, "" for open.
        `after` is the cursor of an earlier page of the same query.  `newest_first` turns the
        order around.
        """

    def export(self, table: str, cursor: str = "") -> Page[Record]:
        """Return every record of a table, page by page, in no promised order; for migration."""


@runtime_checkable
class Notifier(Backend, Protocol):
    """One place that is told about results and events."""

    def send(self, notes: Sequence[Note]) -> Mapping[str, Error]:
        """Deliver the notes, each at least once, and return the failures by note id.

        A failure is `Unavailable` (worth another try) or anything else (not).  Never raises for a
        single note's sake.  Callers keep failed notes and try again, so a receiver may see a note
        id twice.
        """


@runtime_checkable
class Cloud(Backend, Protocol):
    """The control plane of one account in one region.

    Only buckets of that region are described or changed.  What the owner has configured stays:
    everything is merged in, and only what bears our mark is taken away.
    """

    account: str
    region: str

    def buckets(self) -> Sequence[str]:
        """Return the identities of the buckets here."""

    def describe(self, bucket: str) -> BucketInfo:
        """Return what can be found out about `bucket`; `NotFound` if there is none."""

    def enrol(self, bucket: str, queue: str) -> str:
        """Make new objects of `bucket` announce themselves to `queue` and return the route taken.

        The route is a short word such as ``sns``, ``eventbridge``, ``watch``.  Enrolling twice
        changes nothing.  `Unsupported` where the store must be set up by hand; the message says
        how.
        """

    def withdraw(self, bucket: str) -> None:
        """Undo `enrol`; fine if it never happened."""

    def make_quarantine(self, spec: QuarantineSpec) -> str:
        """Make the quarantine bucket unless it exists, locked down, and return its identity.

        `Denied` if a bucket of that name belongs to somebody else.
        """

    def bucket_policy(self, bucket: str) -> str:
        """Return the provider's policy document as JSON text, "" if there is none."""

    def replace_bucket_policy(self, bucket: str, document: str, expected: str) -> None:
        """Replace the policy document if it still is `expected`, else `Changed`; "" removes it."""

    def missing_permissions(self, bucket: str) -> Mapping[str, str]:
        """Try what protecting `bucket` needs; return the permissions missing, with reasons."""

    def regions(self) -> Sequence[str]:
        """Return the regions that this account can use, at least our own."""
