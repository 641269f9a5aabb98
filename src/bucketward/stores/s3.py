"""An S3 bucket, of Amazon or of anything that speaks S3: the exact object, over one CRT plane."""

# ruff: noqa: D102, SLF001 - the docstrings are the Protocol's; a source of a copy is an S3Store too

from __future__ import annotations

import json
import os
import re
import threading
import time
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.utils import parsedate_to_datetime
from hashlib import md5
from types import MappingProxyType
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote_plus, urlsplit
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers.expat import ExpatError, ParserCreate
from xml.sax.saxutils import escape

from bucketward.errors import (
    Changed,
    ConfigError,
    Denied,
    Error,
    NotFound,
    Unavailable,
    Unsupported,
)
from bucketward.interfaces import CredentialsProvider, Store
from bucketward.model import NOTHING, ObjectInfo, ObjectRef, Page, Reason
from bucketward.stores.s3_http import Connections, FileBody, Headers, Origin, Response, Signer

T = TypeVar("T")

PERMISSIONS: Mapping[str, str] = {
    "s3:ListBucket": "list the bucket, and tell an object that is gone from one that is denied",
    "s3:ListBucketVersions": "list every version, and the version that is current",
    "s3:GetBucketVersioning": "know whether an object can be named by its version",
    "s3:GetObject": "read objects",
    "s3:GetObjectVersion": "read exactly the version that was named",
    "s3:GetObjectTagging": "keep other people's tags when ours are written, and when copying",
    "s3:GetObjectVersionTagging": "the same for a version",
    "s3:PutObjectTagging": "write the verdict on the object",
    "s3:PutObjectVersionTagging": "write the verdict on exactly the version that was scanned",
    "s3:DeleteObjectTagging": "take the verdict off again where it turned out another object's",
    "s3:DeleteObjectVersionTagging": "the same for a version",
    "s3:PutObject": "store and copy objects in quarantine and clean buckets",
    "s3:AbortMultipartUpload": "leave no parts behind when a large upload or copy fails",
    "s3:DeleteObject": "delete or move an infected object",
    "s3:DeleteObjectVersion": "delete or move exactly the version that was scanned",
    "kms:Decrypt": "read objects that are encrypted with a KMS key",
    "kms:GenerateDataKey": "store objects in a bucket that is encrypted with a KMS key",
}

MAX_TAGS = 10
MAX_REPLY = 16 << 20
REMEMBERED = 300.0
"""How many seconds a bucket's versioning and a server's conditions are believed."""

_AWS = re.compile(r"(^|\.)amazonaws\.com(\.cn)?$")
_AWS_CONDITIONS = frozenset({"put-absent", "copy-source", "copy-absent", "delete"})
"""S3 API reference: If-None-Match of PutObject, CompleteMultipartUpload and CopyObject,
x-amz-copy-source-if-match, If-Match of DeleteObject in general purpose buckets."""

_HEADERS = frozenset(
    {
        "cache-control",
        "content-disposition",
        "content-encoding",
        "content-language",
        "content-type",
        "expires",
        "x-amz-website-redirect-location",
    }
)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_MONTHS = {
    name: number
    for number, name in enumerate(
        ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"), 1
    )
}


def open_s3(
    url: str,
    credentials: CredentialsProvider | None = None,
    *,
    connections: Connections | None = None,
    account: str = "",
) -> S3Store:
    """Open ``s3://bucket?region=eu-west-1&endpoint=http://host:9000&style=path&...``.

    All of the query is optional.  `region` is the bucket's, us-east-1 unless given.  `endpoint`
    names a server other than Amazon's, or one of its special endpoints.  `style` is ``path``, the
    default with an endpoint, or ``virtual``, the default on Amazon.  ``requester_pays=1`` agrees
    to pay.  ``probe=0`` forbids the small objects named ``.bucketward-probe-...`` by which
    `S3Store.conditions` finds out what a server other than Amazon's enforces; it is then taken to
    enforce nothing.

    `connections` is shared by all stores of a process; a store that is given none makes its own.
    Credentials in the URL are refused.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigError("this is no URL of a bucket", backend="s3") from None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    region = options.pop("region", "") or "us-east-1"
    endpoint = options.pop("endpoint", "")
    style = options.pop("style", "")
    flags = {name: options.pop(name, usual) for name, usual in _FLAGS.items()}
    shown = f"s3://{parts.netloc.rpartition('@')[2]}"
    if "@" in parts.netloc or "@" in endpoint:
        raise ConfigError(
            f"{shown}: no credentials in URLs; use the environment, a profile or a role",
            backend="s3",
        )
    if parts.scheme != "s3" or not _BUCKET.fullmatch(parts.netloc) or parts.path.strip("/"):
        raise ConfigError(f"{shown}{parts.path}: expected s3://bucket", backend="s3")
    if options:
        names = ", ".join(sorted(options))
        raise ConfigError(f"{shown}: unknown option {names}", backend="s3")
    if style not in ("", "path", "virtual") or not set(flags.values()) <= {"0", "1"}:
        raise ConfigError(
            f"{shown}: style is path or virtual; requester_pays and probe are 0 or 1",
            backend="s3",
        )
    return S3Store(
        parts.netloc,
        region=region,
        endpoint=endpoint,
        is_virtual=None if not style else style == "virtual",
        pays=flags["requester_pays"] == "1",
        may_probe=flags["probe"] == "1",
        credentials=credentials,
        connections=connections,
        account=account,
    )


_FLAGS = {"requester_pays": "0", "probe": "1"}


class S3Store:
    """One S3 bucket.

    `ObjectInfo.token` is ``null`` for S3's "null" version in a bucket that knows versions: it is
    named by ``versionId=null``, but can be overwritten, so its etag is checked as well.

    What S3 itself has no condition for: tagging an object that has no version id.  Servers other
    than Amazon's may ignore more; `conditions` finds out by trying.  Where a condition is missing
    the object is looked at before and, where the Protocol asks for it, after.
    """

    has_tags = True
    max_tags = MAX_TAGS

    def __init__(
        self,
        name: str,
        *,
        region: str = "us-east-1",
        endpoint: str = "",
        is_virtual: bool | None = None,
        pays: bool = False,
        may_probe: bool = True,
        credentials: CredentialsProvider | None = None,
        connections: Connections | None = None,
        account: str = "",
        page_size: int = 1000,
        put_limit: int = 64 << 20,
        copy_limit: int = 5 << 30,
        part_size: int = 16 << 20,
        copy_part_size: int = 512 << 20,
    ) -> None:
        """Open `name` without talking to it.

        Above `put_limit` and `copy_limit` bytes an object is put and copied in parts of at least
        `part_size` and `copy_part_size` (S3: no copy above 5 GiB in one request, no part but the
        last below 5 MiB, at most 10,000 parts).
        """
        self.bucket = f"s3://{name}"
        self.account = account
        self.region = region
        self._name = name
        self._owns_connections = connections is None
        self._connections = connections or Connections()
        self._signer = Signer(region, credentials or self._connections.platform_credentials())
        server = _origin(endpoint, region)
        self._is_aws = bool(_AWS.search(server.host))
        self._server = "aws" if self._is_aws else server.url
        if is_virtual is None:
            # The certificate of *.s3.region.amazonaws.com does not cover a name with dots.
            is_virtual = self._is_aws and "." not in name
        self._origin = replace(server, host=f"{name}.{server.host}") if is_virtual else server
        self._path = "/" if is_virtual else f"/{quote(name)}/"
        self._usual: list[tuple[str, str]] = [("x-amz-request-payer", "requester")] if pays else []
        self._may_probe = may_probe
        self._page_size = page_size
        self._put_limit = put_limit
        self._copy_limit = copy_limit
        self._part_size = part_size
        self._copy_part_size = copy_part_size
        self._remembered: dict[str, tuple[float, Any]] = {}
        self._lock = threading.RLock()

    @property
    def has_versions(self) -> bool:
        return self._versioning() == "Enabled"

    @property
    def conditions(self) -> frozenset[str]:
        """What is enforced; on a server other than Amazon's found out by a few small objects.

        ``read`` always is: the answer to a GET says which object its body belongs to.
        """
        by_version = {"tag", "copy-source", "delete"} if self.has_versions else set()
        return frozenset({"read"} | by_version | self._honoured())

    def ping(self) -> None:
        self._xml("GET", {"list-type": "2", "max-keys": "1"}, may="s3:ListBucket")
        self._xml("GET", {"versioning": ""}, may="s3:GetBucketVersioning")

    def close(self) -> None:
        if self._owns_connections:
            self._connections.close()

    def list(
        self, prefix: str = "", *, cursor: str = "", versions: bool = False
    ) -> Page[ObjectInfo]:
        # Where there are versions the plain listing is one of versions too: S3's own does not
        # tell the version ids, and an object without one is not pinned.
        if versions or self._versioning():
            return self._list_versions(prefix, cursor, only_latest=not versions)
        query: dict[str, str | None] = {"list-type": "2", "prefix": prefix}
        if cursor:
            query["start-after"] = _cursor(cursor)[0]
        page = self._listing(query, may="s3:ListBucket")
        items = [self._listed(entry, page) for entry in page.iter("Contents")]
        if _text(page, "IsTruncated") != "true" or not items:
            return Page(items)
        return Page(items, self._advanced(cursor, [items[-1].key, ""]))

    def prefixes(self, prefix: str = "", delimiter: str = "/") -> Iterator[str]:
        query: dict[str, str | None]
        query = {"list-type": "2", "prefix": prefix, "delimiter": delimiter}
        while True:
            page = self._listing(query, may="s3:ListBucket")
            for entry in page.iter("CommonPrefixes"):
                yield _decoded(_text(entry, "Prefix"), page)
            token = _text(page, "NextContinuationToken")
            if _text(page, "IsTruncated") != "true" or not token:
                return
            query["continuation-token"] = token

    def stat(self, ref: ObjectRef) -> ObjectInfo:
        info = self._head(ref.key, ref.version_id)
        self._expect(info, ref.version_id, ref.etag)
        return info

    def read(
        self,
        ref: ObjectRef | ObjectInfo,
        accept: Callable[[ObjectInfo], int],
        *,
        start: int = 0,
        length: int | None = None,
    ) -> ObjectInfo:
        key, version = ref.key, _version_of(ref)
        headers = list(self._usual)
        if ref.etag and not version and _is_header(ref.etag):
            headers.append(("If-Match", f'"{ref.etag}"'))
        is_range = start > 0 or length is not None
        if is_range:
            if length == 0:
                return self._read_nothing(ref, accept)
            end = "" if length is None else start + length - 1
            headers.append(("Range", f"bytes={start}-{end}"))
        may = "s3:GetObjectVersion" if version else "s3:GetObject"
        with self._open("GET", key, {"versionId": version}, headers) as response:
            if response.status == 416 and is_range:  # begins at or behind the end
                response.close()
                return self._read_nothing(ref, accept)
            if response.status not in (200, 206):
                raise self._error(response, key, version, may=may)
            info = self._pin(key, response.headers)
            self._expect(info, ref.version_id, ref.etag)
            skip = start if response.status == 200 else 0
            if response.status == 206:
                told = response.headers.get("content-range", "")
                if not told.startswith(f"bytes {start}-"):
                    message = f"{self._thing(key, version)}: the server sent another range"
                    raise Unavailable(message, backend="s3")
            wanted = info.size - start if length is None else length
            wanted = max(0, min(wanted, info.size - start))
            written = _write_all(response.chunks(), accept(info), skip, wanted)
        if written != wanted:
            message = f"{self._thing(key, version)}: {written} of {wanted} bytes came"
            raise Unavailable(message, backend="s3")
        return info

    def tags(self, info: ObjectInfo) -> Mapping[str, str]:
        version = _version_of(info)
        if info.version_id is None:
            self._look(info)
        may = "s3:GetObjectVersionTagging" if version else "s3:GetObjectTagging"
        query = {"tagging": "", "versionId": version}
        content, _ = self._do("GET", query, info.key, may=may)
        if not content and not self._is_aws:  # Ceph 16, of an object made in parts
            return {}
        reply = _parse(content, self._thing(info.key, version))
        return {_text(tag, "Key"): _text(tag, "Value") for tag in reply.iter("Tag")}

    def replace_tags(self, info: ObjectInfo, tags: Mapping[str, str]) -> None:
        _check_tags(tags)
        version = _version_of(info)
        tag_set = "".join(
            f"<Tag><Key>{escape(name)}</Key><Value>{escape(value)}</Value></Tag>"
            for name, value in tags.items()
        )
        body = f"<Tagging><TagSet>{tag_set}</TagSet></Tagging>".encode()
        if info.version_id is None:
            self._look(info)
        may = "s3:PutObjectVersionTagging" if version else "s3:PutObjectTagging"
        query = {"tagging": "", "versionId": version}
        if tags:
            self._do("PUT", query, info.key, body=body, may=may)
        else:  # what an empty set means is not said
            self._do("DELETE", query, info.key, may=may.replace("Put", "Delete"))
        if info.version_id is None:
            self._look(info)

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
        _check_tags(tags)
        thing = self._thing(key)
        if os.fstat(fd).st_size < size:
            raise Unavailable(f"{thing}: there are less than {size} bytes to store", backend="s3")
        if not all(map(_is_header, headers.values())):
            message = f"{thing}: a header has control characters"
            raise Unsupported(message, backend="s3", reason=Reason.UNSUPPORTED)
        fields = [*headers.items(), *_metadata_fields(metadata)]
        if tags:
            fields.append(("x-amz-tagging", _tag_field(tags)))
        absent = self._if_absent(key, "put-absent", is_wanted=if_absent)
        if size > self._put_limit:

            def upload(number: int, start: int, length: int, upload_id: str) -> str:
                query = {"partNumber": str(number), "uploadId": upload_id}
                part = FileBody(fd, start, length)
                _, reply = self._do("PUT", query, key, body=part, may="s3:PutObject")
                return reply.get("etag", "")

            info = self._in_parts(key, size, self._part_size, fields, upload, if_absent=if_absent)
            self._mend_tags(info, tags)
            return info
        _, reply = self._do(
            "PUT",
            {},
            key,
            [*fields, *absent],
            body=FileBody(fd, 0, size),
            may="s3:PutObject",
            is_retried=not absent,
        )
        return self._written(key, size, reply.get("x-amz-version-id"), reply.get("etag", ""), reply)

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
        if not isinstance(source, S3Store) or source._server != self._server:
            raise Unsupported(
                f"{self.bucket}: only another bucket of the same S3 server can be copied from",
                backend="s3",
                reason=Reason.UNSUPPORTED,
            )
        _check_tags(tags or NOTHING)
        is_exact = info.version_id is not None or "copy-source" in self._honoured()
        in_parts = info.size > self._copy_limit
        if not is_exact or in_parts or metadata is not None:
            info = source._look(info)
        condition = [
            ("x-amz-copy-source", source._copy_source(info)),
            ("x-amz-copy-source-if-match", f'"{info.etag}"'),
        ]
        origin = source._thing(info.key, info.version_id)
        absent = self._if_absent(key, "copy-absent", is_wanted=if_absent)
        fields: list[tuple[str, str]] = []
        if info.storage_class:
            fields.append(("x-amz-storage-class", info.storage_class))
        if in_parts:
            kept = source.tags(info) if tags is None else tags
            fields += [*info.headers.items()]
            fields += _metadata_fields(info.metadata if metadata is None else metadata)
            fields += [("x-amz-tagging", _tag_field(kept))] if kept else []

            def copy(number: int, start: int, length: int, upload_id: str) -> str:
                query = {"partNumber": str(number), "uploadId": upload_id}
                part = ("x-amz-copy-source-range", f"bytes={start}-{start + length - 1}")
                fields = [*condition, part]
                reply = self._xml(
                    "PUT", query, key, fields, body=b"", may="s3:PutObject", source=origin
                )
                return _text(reply, "ETag")

            def complete() -> None:
                if not is_exact:
                    source._look(info)

            copied = self._in_parts(
                key,
                info.size,
                self._copy_part_size,
                fields,
                copy,
                if_absent=if_absent,
                before_completion=complete,
            )
            self._mend_tags(copied, kept)
            return copied
        if tags is not None:
            fields.append(("x-amz-tagging-directive", "REPLACE"))
            fields.append(("x-amz-tagging", _tag_field(tags)))
        if metadata is not None:
            fields.append(("x-amz-metadata-directive", "REPLACE"))
            fields += [*info.headers.items(), *_metadata_fields(metadata)]
        content, reply = self._do(
            "PUT",
            {},
            key,
            [*condition, *fields, *absent],
            body=b"",
            may="s3:PutObject",
            is_retried=not absent,
            source=origin,
        )
        etag = _text(_parse(content, self._thing(key)), "ETag")
        copied = self._written(key, info.size, reply.get("x-amz-version-id"), etag, reply)
        if not is_exact:
            try:
                source._look(info)
            except (Changed, NotFound):
                with suppress(NotFound, Changed):
                    self.delete(copied)
                raise
        if tags is not None:
            self._mend_tags(copied, tags)
        return copied

    def delete(self, info: ObjectInfo) -> None:
        # S3 answers 204 for what is not there, so a look has to say that it is.
        headers = self._look_headers(info)
        version = _version_of(info)
        condition = []
        if not version and "delete" in self._honoured():
            condition.append(("If-Match", f'"{info.etag}"'))
        may = "s3:DeleteObjectVersion" if version else "s3:DeleteObject"
        try:
            query = {"versionId": version}
            self._do("DELETE", query, info.key, condition, may=may, is_retried=not condition)
        except Denied as error:
            if _is_locked(headers):
                error.reason = "object-lock"
            raise

    # One exact object

    def _head(self, key: str, version: str | None) -> ObjectInfo:
        return self._pin(key, self._head_fields(key, version))

    def _head_fields(self, key: str, version: str | None) -> Mapping[str, str]:
        may = "s3:GetObjectVersion" if version else "s3:GetObject"
        query = {"versionId": version}
        with self._open("HEAD", key, query, self._usual) as response:
            if response.status == 200:
                return response.headers
            if response.status in (404, 405, 412) or response.status >= 500:
                raise self._error(response, key, version, may=may)
        # The answer to a HEAD has no body, so it does not say why; that to a GET does.
        headers = [*self._usual, ("Range", "bytes=0-0")]
        with self._open("GET", key, query, headers) as response:
            if response.status in (200, 206):
                return response.headers
            raise self._error(response, key, version, may=may)

    def _look(self, info: ObjectInfo) -> ObjectInfo:
        """Return what is there now, or say that it is no longer `info`."""
        return self._pin(info.key, self._look_headers(info))

    def _look_headers(self, info: ObjectInfo) -> Mapping[str, str]:
        headers = self._head_fields(info.key, _version_of(info))
        self._expect(self._pin(info.key, headers), info.version_id, info.etag)
        return headers

    def _expect(self, info: ObjectInfo, version: str | None, etag: str | None) -> None:
        if version and version not in (info.version_id, info.token):
            found = f"version {info.version_id}"
        elif etag and etag != info.etag:
            found = f"etag {info.etag}"
        else:
            return
        message = f"{self._thing(info.key, version)} is another object now ({found})"
        raise Changed(message, backend="s3")

    def _pin(self, key: str, headers: Mapping[str, str]) -> ObjectInfo:
        """Return the pin that the headers of a GET or HEAD answer tell."""
        try:
            whole = headers.get("content-range")
            size = int(whole.rpartition("/")[2] if whole else headers["content-length"])
            etag = headers["etag"].strip('"')
            modified_at = _http_date(headers["last-modified"])
        except (KeyError, ValueError) as error:
            message = f"{self._thing(key)}: the server did not say size, etag and date"
            raise Unavailable(message, backend="s3") from error
        version = headers.get("x-amz-version-id") or None
        token = ""
        # Amazon always says "null"; Ceph 16 says nothing.
        if version == "null" or (version is None and not self._is_aws and self._versioning()):
            version, token = None, "null"
        tag_count = headers.get("x-amz-tagging-count", "")
        storage_class = headers.get("x-amz-storage-class", "")
        return ObjectInfo(
            self.bucket,
            key,
            size,
            etag,
            modified_at,
            version,
            token,
            int(tag_count) if tag_count.isdecimal() else None,
            "" if storage_class == "STANDARD" else storage_class,
            MappingProxyType(
                {
                    name.removeprefix("x-amz-meta-"): _plain(value)
                    for name, value in headers.items()
                    if name.startswith("x-amz-meta-")
                }
            ),
            MappingProxyType({name: headers[name] for name in _HEADERS if name in headers}),
        )

    def _read_nothing(
        self, ref: ObjectRef | ObjectInfo, accept: Callable[[ObjectInfo], int]
    ) -> ObjectInfo:
        info = self._head(ref.key, _version_of(ref))
        self._expect(info, ref.version_id, ref.etag)
        accept(info)
        return info

    def _written(
        self, key: str, size: int, version: str | None, etag: str, reply: Mapping[str, str]
    ) -> ObjectInfo:
        """Return the pin of what we just wrote, although somebody may have written since."""
        etag = etag.strip('"')
        try:
            info = self._head(key, version)
            self._expect(info, version, etag)
        except (NotFound, Changed, Denied):  # who may write need not be allowed to read
            try:
                written_at = _http_date(reply.get("date", ""))
            except ValueError:
                written_at = datetime.now(UTC)
            known = None if version == "null" else version
            token = "null" if version == "null" else ""
            return ObjectInfo(self.bucket, key, size, etag, written_at, known, token)
        return info

    def _mend_tags(self, info: ObjectInfo, tags: Mapping[str, str]) -> None:
        """Set the tags that a server other than Amazon's forgot.

        Ceph 16 ignores those of CreateMultipartUpload, and the tagging directive of a copy.
        """
        if not self._is_aws and self.tags(info) != tags:
            self.replace_tags(info, tags)

    def _if_absent(self, key: str, condition: str, *, is_wanted: bool) -> Headers:
        """Return the condition that `key` is free, having looked where the server has none."""
        if not is_wanted:
            return []
        if condition in self._honoured():
            return [("If-None-Match", "*")]
        self._expect_absent(key)
        return []

    def _expect_absent(self, key: str) -> None:
        with suppress(NotFound):
            self._head(key, None)
            raise Changed(f"{self._thing(key)} exists already", backend="s3")

    def _copy_source(self, info: ObjectInfo) -> str:
        version = _version_of(info)
        named = f"?versionId={quote(version, safe='')}" if version else ""
        return f"/{quote(self._name)}/{_encoded(info.key)}{named}"

    def _in_parts(
        self,
        key: str,
        size: int,
        part_size: int,
        fields: Headers,
        part: Callable[[int, int, int, str], str],
        *,
        if_absent: bool,
        before_completion: Callable[[], None] = lambda: None,
    ) -> ObjectInfo:
        """Make one object of parts, four at a time; nothing is left of it if that fails."""
        reply = self._xml("POST", {"uploads": ""}, key, fields, body=b"", may="s3:PutObject")
        upload_id = _text(reply, "UploadId")
        query = {"uploadId": upload_id}
        part_size = max(part_size, -(-size // 10_000))
        starts = range(0, size, part_size)
        try:
            with ThreadPoolExecutor(4, thread_name_prefix="s3-parts") as pool:
                parts = [
                    pool.submit(part, number, start, min(part_size, size - start), upload_id)
                    for number, start in enumerate(starts, 1)
                ]
                try:
                    etags = [done.result().strip('"') for done in parts]
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
            body = "".join(
                f'<Part><PartNumber>{number}</PartNumber><ETag>"{escape(etag)}"</ETag></Part>'
                for number, etag in enumerate(etags, 1)
            )
            before_completion()
            condition: Headers = []
            if if_absent:
                # Ceph 16 enforces this for an object in one piece only, so look in any case.
                self._expect_absent(key)
                condition = self._if_absent(key, "put-absent", is_wanted=True)
            content, headers = self._do(
                "POST",
                query,
                key,
                condition,
                body=f"<CompleteMultipartUpload>{body}</CompleteMultipartUpload>".encode(),
                may="s3:PutObject",
                is_retried=False,
            )
        except BaseException:
            with suppress(Error):
                self._do("DELETE", query, key, may="s3:AbortMultipartUpload")
            raise
        etag = _text(_parse(content, self._thing(key)), "ETag").strip('"')
        if not etag:  # Ceph 16
            digests = b"".join(bytes.fromhex(each) for each in etags)
            etag = f"{md5(digests, usedforsecurity=False).hexdigest()}-{len(etags)}"
        return self._written(key, size, headers.get("x-amz-version-id"), etag, headers)

    # Listings

    def _list_versions(self, prefix: str, cursor: str, *, only_latest: bool) -> Page[ObjectInfo]:
        query: dict[str, str | None] = {"versions": "", "prefix": prefix}
        if cursor:
            key, version = _cursor(cursor)
            query |= {"key-marker": key, "version-id-marker": version or None}
        while True:
            page = self._listing(query, may="s3:ListBucketVersions")
            items = [self._listed(entry, page) for entry in page.iter("Version")]
            entries = [e for e in page if e.tag in ("Version", "DeleteMarker")]
            marker = None
            if _text(page, "IsTruncated") == "true" and entries:
                # Not NextKeyMarker, which Ceph 16 leaves unencoded.  The latest version of a key
                # comes first, so the rest of the key can be left out if only that is wanted.
                version = "" if only_latest else _text(entries[-1], "VersionId")
                marker = [_decoded(_text(entries[-1], "Key"), page), version]
            if only_latest:
                items = [item for item in items if item.is_latest]
            if marker is None:
                return Page(items)
            cursor = self._advanced(cursor, marker)
            if items:
                return Page(items, cursor)
            query |= {"key-marker": marker[0], "version-id-marker": marker[1] or None}

    def _advanced(self, cursor: str, marker: Sequence[str]) -> str:
        """Return the cursor behind `marker`, having seen that the server's listing goes on."""
        after = json.dumps(marker)
        if after == cursor:
            message = f"{self.bucket}: the server lists the same page again and again"
            raise Unavailable(message, backend="s3")
        return after

    def _listing(self, query: Mapping[str, str | None], *, may: str) -> Element:
        # Only so can a key with a control character be told: XML cannot hold those.
        usual = {"encoding-type": "url", "max-keys": str(self._page_size)}
        return self._xml("GET", {**query, **usual}, may=may)

    def _listed(self, entry: Element, page: Element) -> ObjectInfo:
        version = _text(entry, "VersionId") or None
        token = ""
        if version == "null":
            version, token = None, "null" if self._versioning() else ""
        storage_class = _text(entry, "StorageClass")
        try:
            size = int(_text(entry, "Size"))
            modified_at = datetime.fromisoformat(_text(entry, "LastModified")).astimezone(UTC)
        except ValueError as error:
            message = f"{self.bucket}: the listing does not tell size and date"
            raise Unavailable(message, backend="s3") from error
        return ObjectInfo(
            self.bucket,
            _decoded(_text(entry, "Key"), page),
            size,
            _text(entry, "ETag").strip('"'),
            modified_at,
            version,
            token,
            storage_class="" if storage_class == "STANDARD" else storage_class,
            is_latest=_text(entry, "IsLatest") != "false",
        )

    # The bucket and the server

    def _versioning(self) -> str:
        """Return "Enabled", "Suspended", or "" if the bucket never had versions."""

        def ask() -> str:
            try:
                reply = self._xml("GET", {"versioning": ""}, may="s3:GetBucketVersioning")
            except Denied:  # `ping` says so; each object still tells its version
                return ""
            return _text(reply, "Status")

        return self._remember("versioning", ask)

    def _honoured(self) -> frozenset[str]:
        """Return the conditions by etag or absence that the server enforces."""
        if self._is_aws:
            return _AWS_CONDITIONS
        if not self._may_probe:
            return frozenset()
        return self._remember("conditions", self._probe)

    def _probe(self) -> frozenset[str]:
        """Try each condition on objects of our own, which are gone afterwards."""
        first, second = (f".bucketward-probe-{uuid.uuid4().hex}" for _ in range(2))
        absent, wrong = ("If-None-Match", "*"), '"00000000000000000000000000000000"'
        source = ("x-amz-copy-source", f"/{quote(self._name)}/{first}")
        source_if = ("x-amz-copy-source-if-match", wrong)
        honoured = set()
        try:
            self._do("PUT", {}, first, body=b"1", may="s3:PutObject")
            for condition, method, key, headers in (
                ("put-absent", "PUT", first, [absent]),
                ("copy-source", "PUT", second, [source, source_if]),
                ("copy-absent", "PUT", first, [source, absent, ("x-amz-meta-a", "1"), _REPLACE]),
                ("delete", "DELETE", first, [("If-Match", wrong)]),
            ):
                body = None if method == "DELETE" else b""
                try:
                    self._do(method, {}, key, headers, body=body, may="s3:PutObject")
                except Changed:
                    honoured.add(condition)
                except (NotFound, Unsupported):
                    pass
        except Denied:  # we may not write here: nothing depends on it then
            return frozenset()
        finally:
            for key in (first, second):
                with suppress(Error):
                    self._remove_every_version(key)
        return frozenset(honoured)

    def _remove_every_version(self, key: str) -> None:
        if not self._versioning():
            self._do("DELETE", {}, key, may="s3:DeleteObject")
            return
        page = self._listing({"versions": "", "prefix": key}, may="s3:ListBucketVersions")
        for entry in (*page.iter("Version"), *page.iter("DeleteMarker")):
            query = {"versionId": _text(entry, "VersionId")}
            self._do("DELETE", query, key, may="s3:DeleteObjectVersion")

    def _remember(self, name: str, ask: Callable[[], T]) -> T:
        known = self._remembered.get(name)
        if known is None or known[0] < time.monotonic():
            with self._lock:
                known = self._remembered.get(name)
                if known is None or known[0] < time.monotonic():
                    known = (time.monotonic() + REMEMBERED, ask())
                    self._remembered[name] = known
        value: T = known[1]
        return value

    # Requests

    def _open(
        self,
        method: str,
        key: str | None,
        query: Mapping[str, str | None],
        headers: Headers,
        *,
        body: bytes | FileBody | None = None,
        is_retried: bool = True,
        patience: float = 1.0,
    ) -> Response:
        """Send one request; in `query` what is `None` is left out."""
        target = self._path if key is None else self._path + _encoded(key)
        fields = "&".join(
            f"{name}={_quoted(value)}" if value else name
            for name, value in query.items()
            if value is not None
        )
        return self._connections.open(
            self._origin,
            method,
            f"{target}?{fields}" if fields else target,
            headers,
            self._signer,
            thing=self._thing(key),
            body=body,
            is_retried=is_retried,
            patience=patience,
        )

    def _do(
        self,
        method: str,
        query: Mapping[str, str | None],
        key: str | None = None,
        headers: Headers = (),
        *,
        may: str,
        body: bytes | FileBody | None = None,
        is_retried: bool = True,
        source: str = "",
    ) -> tuple[bytes, Mapping[str, str]]:
        """Return body and headers of the answer, or raise what it says.

        `may` is the permission that allows it, `source` the object that a copy is made of.
        """
        with self._open(
            method,
            key,
            query,
            [*self._usual, *headers],
            body=body,
            is_retried=is_retried,
            # The server is at work on gigabytes; Amazon's sends blanks meanwhile, others nothing.
            patience=20.0 if source or method == "POST" else 1.0,
        ) as response:
            version = query.get("versionId")
            if not 200 <= response.status < 300:
                raise self._error(response, key, version, may=may, source=source)
            content = response.read(MAX_REPLY)
            # A copy or a completion that takes long is begun with 200 and may fail all the same.
            if b"<Error>" in content[:1000] and method in ("PUT", "POST"):
                raise self._error(response, key, version, may=may, source=source, body=content)
            return content, response.headers

    def _xml(
        self,
        method: str,
        query: Mapping[str, str | None],
        key: str | None = None,
        headers: Headers = (),
        *,
        may: str,
        body: bytes | None = None,
        source: str = "",
    ) -> Element:
        content, _ = self._do(method, query, key, headers, may=may, body=body, source=source)
        return _parse(content, self._thing(key))

    def _thing(self, key: str | None = None, version: str | None = None) -> str:
        """Return what a message names: printable, and no longer than a line or two."""
        if key is None:
            return self.bucket
        named = f" version {_printable(version, 80)}" if version else ""
        return f"{self.bucket}/{_printable(key, 300)}{named}"

    def _error(
        self,
        response: Response,
        key: str | None,
        version: str | None,
        *,
        may: str,
        source: str = "",
        body: bytes | None = None,
    ) -> Error:
        if body is None:
            try:
                body = response.read(64 << 10)
            except Unavailable:
                body = b""
        if response.status == 400 and key and "\0" in key and may.startswith("s3:Get"):
            message = f"{self._thing(key)}: there are no such keys here"  # Ceph 16
            return NotFound(message, backend="s3")
        return _translated(
            response.status,
            response.headers,
            body,
            thing=f"{source} as {self._thing(key)}" if source else self._thing(key, version),
            bucket=self.bucket,
            region=self.region,
            may=may,
        )


def _origin(endpoint: str, region: str) -> Origin:
    if not endpoint:
        if not re.fullmatch(r"[a-z0-9-]+", region):
            raise ConfigError(f"{_printable(region, 80)} is no AWS region", backend="s3")
        suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
        return Origin(f"s3.{region}.{suffix}", 443, is_secure=True)
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
        raise ConfigError("endpoint is http[s]://host[:port] and nothing more", backend="s3")
    is_secure = parts.scheme == "https"
    return Origin(parts.hostname, port or (443 if is_secure else 80), is_secure)


def _version_of(ref: ObjectRef | ObjectInfo) -> str | None:
    """Return what `versionId` names it, if anything does."""
    token = ref.token if isinstance(ref, ObjectInfo) else ""
    return ref.version_id or token or None


def _encoded(key: str) -> str:
    """Return `key` as it stands in a URL; a key that S3 cannot have is `Unsupported`."""
    try:
        data = key.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        data = b""
    if not 1 <= len(data) <= 1024:
        raise Unsupported(
            f"{_printable(key, 80)!r} is no key: S3's are 1 to 1,024 bytes of UTF-8",
            backend="s3",
            reason=Reason.UNSUPPORTED,
        )
    return quote(data)


def _quoted(text: str) -> str:
    try:
        return quote(text, safe="", errors="surrogateescape")
    except UnicodeEncodeError as error:
        message = f"{_printable(text, 80)!r} cannot be written in UTF-8"
        raise Unsupported(message, backend="s3", reason=Reason.UNSUPPORTED) from error


def _is_header(value: str) -> bool:
    """Return whether `value` can stand in a header: no line of its own, nothing a CRT refuses."""
    return value.isprintable()


def _decoded(text: str, page: Element) -> str:
    # A space is encoded as "+" by Amazon and as "%20" by others; a plus is "%2B" everywhere.
    is_encoded = _text(page, "EncodingType") == "url"
    return unquote_plus(text, errors="surrogateescape") if is_encoded else text


def _cursor(text: str) -> tuple[str, str]:
    try:
        key, version = json.loads(text)
    except (TypeError, ValueError):
        key = version = None
    if not isinstance(key, str) or not isinstance(version, str):
        raise Unsupported("this is no cursor of an S3 listing", backend="s3")
    return key, version


def _check_tags(tags: Mapping[str, str]) -> None:
    """Refuse what is above S3's limits (user guide: ten tags, 128 and 256 UTF-16 units)."""
    is_over = len(tags) > MAX_TAGS or any(
        not 1 <= _units(name) <= 128 or _units(value) > 256 or not (name + value).isprintable()
        for name, value in tags.items()
    )
    if is_over:
        message = f"at most {MAX_TAGS} tags, with names up to 128 and values up to 256 characters"
        raise Unsupported(message, backend="s3", reason="tag-limit")


def _units(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-16-le", "surrogatepass")) // 2


def _tag_field(tags: Mapping[str, str]) -> str:
    return "&".join(f"{quote(name, safe='')}={quote(tags[name], safe='')}" for name in tags)


def _metadata_fields(metadata: Mapping[str, str]) -> Headers:
    """Return the headers; what is not plain ASCII goes as S3 itself returns it (RFC 2047)."""
    fields = []
    for name, value in metadata.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$&'*+.^_`|~-]+", name):
            message = f"{_printable(name, 80)!r} cannot be the name of metadata"
            raise Unsupported(message, backend="s3", reason=Reason.UNSUPPORTED)
        is_plain = value.isascii() and (not value or value.isprintable()) and value == value.strip()
        if not is_plain or "=?" in value:
            data = b64encode(value.encode("utf-8", "replace")).decode("ascii")
            value = f"=?UTF-8?B?{data}?="  # noqa: PLW2901 - the same value, as it travels
        fields.append((f"x-amz-meta-{name}", value))
    return fields


def _plain(value: str) -> str:
    if "=?" not in value:
        return value
    try:
        return str(make_header(decode_header(value)))
    except (HeaderParseError, LookupError, ValueError):
        return value


def _http_date(text: str) -> datetime:
    """Parse ``Sat, 21 Nov 2026 02:05:44 GMT``, and by the library what is written otherwise."""
    try:
        return datetime(
            int(text[12:16]),
            _MONTHS[text[8:11]],
            int(text[5:7]),
            int(text[17:19]),
            int(text[20:22]),
            int(text[23:25]),
            tzinfo=UTC,
        )
    except (KeyError, ValueError):
        return parsedate_to_datetime(text).astimezone(UTC)


def _write_all(chunks: Iterator[bytes], fd: int, skip: int, wanted: int) -> int:
    """Write `wanted` bytes behind the first `skip` to `fd` and return how many came."""
    written = 0
    for chunk in chunks:
        if skip >= len(chunk):
            skip -= len(chunk)
            continue
        view = memoryview(chunk)[skip : skip + wanted - written]
        skip = 0
        while view:
            try:
                count = os.pwrite(fd, view, written)
            except OSError as error:
                message = f"cannot keep what is read: {error.strerror}"
                raise Unavailable(message, backend="s3") from error
            written += count
            view = view[count:]
    return written


def _is_locked(headers: Mapping[str, str]) -> bool:
    if headers.get("x-amz-object-lock-legal-hold") == "ON":
        return True
    try:
        until = datetime.fromisoformat(headers["x-amz-object-lock-retain-until-date"])
    except (KeyError, ValueError):
        return False
    return until.astimezone(UTC) > datetime.now(UTC)


def _text(element: Element, name: str) -> str:
    return element.findtext(name) or ""


def _parse(body: bytes, thing: str) -> Element:
    """Parse a reply; no document type, so no entities."""
    if b"<EncodingType>url<" in body:
        # Ceph 16 echoes a prefix with control characters as it is, and then it is no XML.
        body = _NO_XML.sub(b"?", body)

    def refuse(*_: object) -> None:
        raise Unavailable(f"{thing}: the reply has a document type", backend="s3")

    builder = TreeBuilder()
    parser = ParserCreate()
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = lambda name, _: builder.start(name.rpartition(":")[2], {})
    parser.EndElementHandler = lambda name: builder.end(name.rpartition(":")[2])
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(body, True)
        return builder.close()
    except (ExpatError, AssertionError) as error:
        raise Unavailable(f"{thing}: the reply is no XML", backend="s3") from error


def _printable(text: str, limit: int) -> str:
    """Return `text` fit for a message: hostile input, so neither control characters nor length."""
    shown = text if len(text) <= limit else f"{text[:limit]}..."
    return shown if shown.isprintable() else shown.encode("unicode_escape").decode("ascii")


_REPLACE = ("x-amz-metadata-directive", "REPLACE")

_NO_XML = re.compile(
    rb"[\x00-\x08\x0b\x0c\x0e-\x1f]|&#(?:[0-8]|1[124-9]|2\d|3[01]|x0*(?:[0-8bcefBCEF]|1[0-9a-fA-F]));"
)
_PERMISSION = re.compile(r"to perform: ([\w-]+:\w+)(?:\W+on resource:? \W*([\w:/.*-]+))?")
_LOCKED = re.compile(r"object.?lock|legal.?hold|retention|WORM", re.IGNORECASE)
_CUSTOMER_KEY = re.compile(r"server.side.encryption|customer.(provided|key)|SSE-C", re.IGNORECASE)
_WRONG_REGION = frozenset(
    {
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "PermanentRedirect",
    }
)
_EXPIRED = frozenset(
    {"ExpiredToken", "RequestExpired", "RequestTimeTooSkewed", "TokenRefreshRequired"}
)
_BAD_CREDENTIALS = frozenset({"InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"})
_LATER = frozenset(
    {
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
    }
)


def _translated(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    thing: str,
    bucket: str,
    region: str,
    may: str,
) -> Error:
    """Return the error that an answer means; `may` is the permission that would have allowed it.

    Codes and messages: S3 API reference, "Error responses"; IAM user guide, "access denied".
    """
    code = said = ""
    home = headers.get("x-amz-bucket-region", "")
    with suppress(Unavailable):
        reply = _parse(body, bucket)
        code, said = _printable(_text(reply, "Code"), 80), _printable(_text(reply, "Message"), 300)
        home = _text(reply, "Region") or home
    why = f"({code or status}: {said})" if said else f"({code or status})"
    seconds = headers.get("retry-after", "")
    retry_after = float(seconds) if seconds.isdecimal() else None
    named = _PERMISSION.search(said)
    action, resource = (named[1], named[2] or "") if named else (may, "")

    def make(kind: type[Error], message: str, reason: str = "") -> Error:
        return kind(f"{message} {why}", backend="s3", reason=reason, retry_after=retry_after)

    if code == "NoSuchBucket":
        return make(NotFound, f"there is no bucket {bucket}")
    if status in (301, 307, 308) or code in _WRONG_REGION:
        if home and home != region:
            return make(ConfigError, f"{bucket} is in region {home}: open it with region={home}")
        return make(ConfigError, f"{bucket}: region or endpoint is wrong")
    if status == 412 or code == "PreconditionFailed":
        return make(Changed, f"{thing} is another object now, or exists already")
    if status == 416:
        return make(Changed, f"{thing} is shorter than it was")
    if code == "InvalidObjectState":
        message = f"{thing} is archived and has to be restored before it can be read"
        return make(Unsupported, message, Reason.ARCHIVED_STORAGE_CLASS)
    if code.startswith("KMS.") or "kms:" in said:
        action = action if action.startswith("kms:") else "kms:Decrypt"
        where = f" on {resource}" if resource else ""
        return make(
            Denied, f"{thing}: its KMS key is not ours to use, allow {action}{where}", action
        )
    if status == 400 and _CUSTOMER_KEY.search(said):
        message = f"{thing} is encrypted with a key that only its owner holds"
        return make(Unsupported, message, Reason.CUSTOMER_KEY)
    if status == 400 and "tag" in f"{code} {said}".lower():
        return make(Unsupported, f"{thing}: the server refuses these tags", "tag-limit")
    if code in _EXPIRED:
        return make(Unavailable, f"{thing}: the credentials have expired or a clock is wrong")
    if code in _BAD_CREDENTIALS:
        return make(Denied, f"{bucket}: the server does not know these credentials", "credentials")
    if status in (401, 403) or code == "AccessDenied":
        if _LOCKED.search(said):
            return make(Denied, f"{thing}: a lock or legal hold keeps it", "object-lock")
        return make(Denied, f"{thing}: allow {action} (S3 says so of missing keys too)", action)
    if status in (409, 429) or (status >= 500 and status != 501) or code in _LATER:
        return make(Unavailable, f"{thing}: the server cannot do it now")
    is_no_version = code == "InvalidArgument" and "version" in said.lower()
    if status in (404, 405) or is_no_version or code in ("NoSuchKey", "NoSuchVersion"):
        return make(NotFound, f"{thing} is gone")
    return make(Unsupported, f"{thing}: the server will not do it", Reason.UNSUPPORTED)
