"""A bucket in this process's memory: every feature of S3's that the Protocol knows, for tests."""

# ruff: noqa: D102 - the docstrings are the Protocol's

from __future__ import annotations

import os
import re
import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import count
from types import MappingProxyType
from urllib.parse import parse_qsl, urlsplit

from bucketward.errors import Changed, ConfigError, Denied, NotFound, Unavailable, Unsupported
from bucketward.interfaces import Store
from bucketward.model import NOTHING, ObjectInfo, ObjectRef, Page

PERMISSIONS: Mapping[str, str] = {}

_ALL_CONDITIONS = frozenset({"read", "tag", "put-absent", "copy-source", "copy-absent", "delete"})
_TAG_TEXT = re.compile(r"[\w \t+\-=.:/@]*")
"""S3 user guide, "Categorizing your objects using tags": letters, digits, spaces, ``+-=._:/@``."""

_LOCK = threading.RLock()
"""One for all buckets, so that a copy sees its source and its target in one moment."""

_numbers = count(1)


@dataclass(slots=True)
class _Version:
    """What one write made; `info.is_latest` is found out when it is asked for."""

    number: int
    info: ObjectInfo
    data: bytes
    tags: Mapping[str, str] = field(default_factory=dict)
    is_marker: bool = False
    is_held: bool = False


def open_memory(url: str) -> MemoryStore:
    """Open a new, empty bucket: ``memory://name?versioned=0&tags=0&page_size=100``.

    Versions and tags are kept unless switched off.  Every call makes a bucket of its own.
    """
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    switches = {"0": False, "1": True}
    try:
        versioned = switches[options.pop("versioned", "1")]
        has_tags = switches[options.pop("tags", "1")]
        page_size = int(options.pop("page_size", "1000"))
    except (KeyError, ValueError):
        raise ConfigError(f"{url}: versioned and tags are 0 or 1, page_size a number") from None
    if parts.scheme != "memory" or not parts.netloc or parts.path.strip("/") or options:
        message = f"{url} is not memory://name with versioned, tags or page_size"
        raise ConfigError(message, backend="memory")
    return MemoryStore(
        f"memory://{parts.netloc}", versioned=versioned, has_tags=has_tags, page_size=page_size
    )


class MemoryStore:
    """A bucket as strict as S3, with its tag alphabet and its limits."""

    def __init__(
        self,
        bucket: str = "memory://bucket",
        *,
        versioned: bool = True,
        page_size: int = 1000,
        has_tags: bool = True,
        account: str = "",
        region: str = "",
    ) -> None:
        self.bucket = bucket
        self.account = account
        self.region = region
        self.has_tags = has_tags
        self.max_tags = 10 if has_tags else 0
        self.has_versions = versioned
        self.conditions = _ALL_CONDITIONS
        self._page_size = page_size
        self._keys: list[str] = []
        """Sorted; exactly those of `_versions`."""
        self._versions: dict[str, list[_Version]] = {}
        """Oldest first; never empty."""

    def ping(self) -> None:
        pass

    def close(self) -> None:
        pass

    def list(
        self, prefix: str = "", *, cursor: str = "", versions: bool = False
    ) -> Page[ObjectInfo]:
        # The cursor is the number of the last version shown and its key.  Keys are in order, and
        # the versions of one key come newest first, so their numbers fall.
        number, _, after = cursor.partition(":")
        items: list[ObjectInfo] = []
        cursor = ""
        with _LOCK:
            for key in self._keys_from(max(prefix, after)):
                if not key.startswith(prefix):
                    break
                chain = self._versions[key]
                for version in reversed(chain if versions else chain[-1:]):
                    was_shown = (
                        bool(number)
                        and key == after
                        and (not versions or version.number >= int(number))
                    )
                    if was_shown or version.is_marker:
                        continue
                    if len(items) == self._page_size:
                        return Page(items, cursor)
                    items.append(self._shown(version))
                    cursor = f"{version.number}:{key}"
        return Page(items)

    def prefixes(self, prefix: str = "", delimiter: str = "/") -> Iterator[str]:
        found = ""
        while True:
            with _LOCK:
                for key in self._keys_from(prefix, behind=found):
                    if not key.startswith(prefix):
                        return
                    end = key.find(delimiter, len(prefix))
                    if end >= 0 and not self._versions[key][-1].is_marker:
                        found = key[: end + len(delimiter)]
                        break
                else:
                    return
            yield found

    def stat(self, ref: ObjectRef) -> ObjectInfo:
        with _LOCK:
            return self._shown(self._find(ref))

    def read(
        self,
        ref: ObjectRef | ObjectInfo,
        accept: Callable[[ObjectInfo], int],
        *,
        start: int = 0,
        length: int | None = None,
    ) -> ObjectInfo:
        with _LOCK:
            version = self._find(ref)
            info = self._shown(version)
        if info.storage_class == "GLACIER":
            raise Unsupported(
                f"{ref.key!r} is archived: restore it first",
                backend="memory",
                reason="archived-storage-class",
            )
        fd = accept(info)
        end = info.size if length is None else start + length
        with memoryview(version.data) as whole, whole[start:end] as body:
            done = 0
            try:
                while done < len(body):
                    done += os.pwrite(fd, body[done:], done)
            except OSError as error:
                message = f"cannot write what was read of {ref.key!r}: {error.strerror}"
                raise Unavailable(message, backend="memory") from error
        return info

    def tags(self, info: ObjectInfo) -> Mapping[str, str]:
        with _LOCK:
            return self._find(info).tags

    def replace_tags(self, info: ObjectInfo, tags: Mapping[str, str]) -> None:
        if not self.has_tags:
            raise Unsupported(f"{self.bucket} has no tags", backend="memory")
        with _LOCK:
            version = self._find(info)
            version.tags = self._checked(tags)
            version.info = replace(version.info, tag_count=len(tags))

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
        try:
            data = b"".join(_pieces(fd, size))
        except OSError as error:
            message = f"cannot read what to put under {key!r}: {error.strerror}"
            raise Unavailable(message, backend="memory") from error
        if len(data) < size:
            message = f"only {len(data)} of {size} bytes are there to put under {key!r}"
            raise Unavailable(message, backend="memory")
        return self._add(key, data, tags, metadata, headers, if_absent=if_absent)

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
        if not isinstance(source, MemoryStore):
            raise Unsupported("can copy only from memory: read and put", backend="memory")
        with _LOCK:
            original = source._find(info)  # noqa: SLF001 - another of us
            return self._add(
                key,
                original.data,
                original.tags if tags is None else tags,
                original.info.metadata if metadata is None else metadata,
                original.info.headers,
                if_absent=if_absent,
                storage_class=original.info.storage_class,
            )

    def delete(self, info: ObjectInfo) -> None:
        with _LOCK:
            version = self._find(info)
            if version.is_held:
                message = f"a lock keeps {info.key!r}: lift it, or wait for its end"
                raise Denied(message, backend="memory", reason="object-lock")
            chain = self._versions[info.key]
            chain.remove(version)
            if not chain:
                del self._versions[info.key]
                del self._keys[bisect_left(self._keys, info.key)]

    # What only the owner of a bucket does.

    def mark_deleted(self, key: str) -> str:
        """Put a delete marker on `key`, as a delete without a version does; return its version."""
        if not self.has_versions:
            raise Unsupported(f"{self.bucket} keeps no versions", backend="memory")
        with _LOCK:
            return self._write(key, b"", {}, is_marker=True).identity

    def hold(self, info: ObjectInfo, is_held: bool = True) -> None:
        """Put exactly this object under a legal hold, or lift it."""
        with _LOCK:
            self._find(info).is_held = is_held

    def archive(self, info: ObjectInfo) -> None:
        """Move exactly this object to a storage class that cannot be read."""
        with _LOCK:
            version = self._find(info)
            version.info = replace(version.info, storage_class="GLACIER")

    def _keys_from(self, first: str, behind: str = "") -> Iterator[str]:
        """Yield the keys from `first` on, without all that begin with `behind`."""
        n = bisect_left(self._keys, first)
        if behind:
            n = bisect_right(self._keys, behind, lo=n, key=lambda key: key[: len(behind)])
        return (self._keys[n] for n in range(n, len(self._keys)))

    def _find(self, ref: ObjectRef | ObjectInfo) -> _Version:
        chain = self._versions.get(ref.key, [])
        if ref.version_id is None:
            chain = chain[-1:]
        else:
            chain = [version for version in chain if version.info.version_id == ref.version_id]
        if not chain or chain[0].is_marker:
            raise NotFound(f"there is no {ref.key!r} in {self.bucket}", backend="memory")
        if ref.etag is not None and ref.etag != chain[0].info.etag:
            raise Changed(f"{ref.key!r} in {self.bucket} was replaced", backend="memory")
        return chain[0]

    def _shown(self, version: _Version) -> ObjectInfo:
        # A version may be deleted while it is being read; then it is no longer the latest.
        chain = self._versions.get(version.info.key)
        return replace(version.info, is_latest=chain is not None and chain[-1] is version)

    def _add(
        self,
        key: str,
        data: bytes,
        tags: Mapping[str, str],
        metadata: Mapping[str, str],
        headers: Mapping[str, str],
        *,
        if_absent: bool,
        storage_class: str = "",
    ) -> ObjectInfo:
        try:
            length = len(key.encode())
        except UnicodeEncodeError:
            length = 0
        if not 1 <= length <= 1024:
            message = f"{key[:40]!r} is no key: those have 1 to 1,024 bytes of UTF-8"
            raise Unsupported(message, backend="memory")
        tags = self._checked(tags)
        with _LOCK:
            chain = self._versions.get(key)
            if if_absent and chain and not chain[-1].is_marker:
                raise Changed(f"{key!r} in {self.bucket} is taken", backend="memory")
            return self._write(
                key,
                data,
                tags,
                metadata=metadata,
                headers=headers,
                storage_class=storage_class,
            )

    def _write(
        self,
        key: str,
        data: bytes,
        tags: Mapping[str, str],
        *,
        metadata: Mapping[str, str] = NOTHING,
        headers: Mapping[str, str] = NOTHING,
        storage_class: str = "",
        is_marker: bool = False,
    ) -> ObjectInfo:
        number = next(_numbers)
        info = ObjectInfo(
            self.bucket,
            key,
            len(data),
            etag=f"{number:032x}",
            modified_at=datetime.now(UTC),
            version_id=f"v{number}" if self.has_versions else None,
            tag_count=len(tags),
            storage_class=storage_class,
            metadata=MappingProxyType(dict(metadata)),
            headers=MappingProxyType(dict(headers)),
        )
        if key not in self._versions:
            insort(self._keys, key)
        chain = self._versions.setdefault(key, [])
        if not self.has_versions:
            chain.clear()
        chain.append(_Version(number, info, data, tags, is_marker))
        return info

    def _checked(self, tags: Mapping[str, str]) -> Mapping[str, str]:
        is_fine = len(tags) <= self.max_tags and all(
            1 <= len(name) <= 128
            and len(value) <= 256
            and _TAG_TEXT.fullmatch(name)
            and _TAG_TEXT.fullmatch(value)
            for name, value in tags.items()
        )
        if not is_fine:
            message = f"at most {self.max_tags} tags, names of 128 and values of 256 characters"
            raise Unsupported(message, backend="memory", reason="tag-limit")
        return MappingProxyType(dict(tags))


def _pieces(fd: int, size: int) -> Iterator[bytes]:
    done = 0
    while done < size and (piece := os.pread(fd, min(size - done, 1 << 20), done)):
        done += len(piece)
        yield piece
