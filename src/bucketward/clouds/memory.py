"""A cloud in this process's memory, with an owner and neighbours of its own: for tests."""

# ruff: noqa: D102 - the docstrings are the Protocol's

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from urllib.parse import urlsplit

from bucketward.errors import Changed, ConfigError, Denied, NotFound, Unsupported
from bucketward.model import NOTHING, BucketInfo, QuarantineSpec

PERMISSIONS: Mapping[str, str] = NOTHING


def open_memory(url: str = "memory://") -> MemoryCloud:
    """Open a new, empty cloud: ``memory://<account>/<region>``, or ``memory://``."""
    parts = urlsplit(url)
    if parts.scheme != "memory" or parts.query or parts.fragment:
        raise ConfigError(
            "a cloud in memory is named memory://<account>/<region>", backend="memory"
        )
    given = {"account": parts.netloc, "region": parts.path.strip("/")}
    return MemoryCloud(**{name: value for name, value in given.items() if value})


@dataclass(slots=True)
class _Bucket:
    info: BucketInfo
    policy: str = ""
    queue: str = ""
    owners: list[str] = field(default_factory=list)
    denied: dict[str, str] = field(default_factory=dict)
    is_quarantine: bool = False


class MemoryCloud:
    """Buckets named ``memory://name``; whatever a provider would keep is in this object."""

    def __init__(self, account: str = "000000000000", region: str = "memory-1") -> None:
        self.account = account
        self.region = region
        self._buckets: dict[str, _Bucket] = {}
        self._foreign: set[str] = set()
        self._lock = threading.RLock()

    def add_bucket(self, name: str, info: BucketInfo | None = None) -> str:
        """Make a bucket of the owner's, described by `info` if given, and return its identity."""
        bucket = f"memory://{name}"
        info = info or BucketInfo(
            bucket,
            created_at=datetime.now(UTC),
            has_versions=True,
            is_public=False,
            encryption="",
            requester_pays=False,
        )
        with self._lock:
            self._buckets[bucket] = _Bucket(
                replace(info, bucket=bucket, account=self.account, region=self.region)
            )
        return bucket

    def add_foreign_bucket(self, name: str) -> None:
        """Let somebody else have a bucket of this name."""
        with self._lock:
            self._foreign.add(f"memory://{name}")

    def remove_bucket(self, bucket: str) -> None:
        """Take a bucket away, as its owner may at any time."""
        with self._lock:
            self._buckets.pop(bucket, None)

    def add_notification(self, bucket: str, destination: str) -> None:
        """Configure, as the owner, that new objects are announced to `destination`."""
        with self._lock:
            self._get(bucket).owners.append(destination)

    def notifications(self, bucket: str) -> Sequence[str]:
        """Return all that new objects are announced to, the owner's destinations first."""
        with self._lock:
            found = self._get(bucket)
            return [*found.owners, *([found.queue] if found.queue else [])]

    def deny(self, bucket: str, permission: str, reason: str) -> None:
        """Take a permission on `bucket` away from Bucketward."""
        with self._lock:
            self._get(bucket).denied[permission] = reason

    def ping(self) -> None:
        pass

    def close(self) -> None:
        pass

    def buckets(self) -> Sequence[str]:
        with self._lock:
            return list(self._buckets)

    def describe(self, bucket: str) -> BucketInfo:
        with self._lock:
            return self._get(bucket).info

    def enrol(self, bucket: str, queue: str) -> str:
        with self._lock:
            self._get(bucket).queue = queue
        return "memory"

    def withdraw(self, bucket: str) -> None:
        with self._lock:
            if bucket in self._buckets:
                self._buckets[bucket].queue = ""

    def make_quarantine(self, spec: QuarantineSpec) -> str:
        bucket = f"memory://{spec.name}"
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,62}", spec.name):
            raise Unsupported(f"{spec.name[:64]!a} cannot be a bucket's name", backend="memory")
        if spec.region not in ("", self.region):
            raise Unsupported(f"this is {self.region}, not {spec.region}", backend="memory")
        with self._lock:
            found = self._buckets.get(bucket)
            if bucket in self._foreign or (found and not found.is_quarantine):
                raise Denied(f"{bucket} is somebody else's; choose another name", backend="memory")
            if found is None:
                self.add_bucket(spec.name)
                self._buckets[bucket].is_quarantine = True
        return bucket

    def bucket_policy(self, bucket: str) -> str:
        with self._lock:
            return self._get(bucket).policy

    def replace_bucket_policy(self, bucket: str, document: str, expected: str) -> None:
        with self._lock:
            found = self._get(bucket)
            try:
                _canonical(document)
            except ValueError as error:
                raise Unsupported(
                    f"the policy for {bucket} is not JSON", backend="memory"
                ) from error
            try:
                is_expected = _canonical(found.policy) == _canonical(expected)
            except ValueError:
                is_expected = False
            if not is_expected:
                raise Changed(f"the policy of {bucket} is no longer what it was", backend="memory")
            found.policy = document

    def missing_permissions(self, bucket: str) -> Mapping[str, str]:
        with self._lock:
            return dict(self._get(bucket).denied)

    def regions(self) -> Sequence[str]:
        return [self.region]

    def _get(self, bucket: str) -> _Bucket:
        found = self._buckets.get(bucket)
        if found is None:
            raise NotFound(f"there is no bucket {bucket[:80]!a}", backend="memory")
        return found


def _canonical(document: str) -> str:
    return json.dumps(json.loads(document), sort_keys=True) if document else ""
