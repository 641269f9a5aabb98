"""The bucket policies of an S3-compatible server that has no AWS control plane around it."""

# ruff: noqa: D102 - the docstrings are the Protocol's

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn
from urllib.parse import parse_qsl, urlsplit

from bucketward.clouds.aws import AwsCloud, _bucket_name, _translating
from bucketward.errors import ConfigError, Unsupported
from bucketward.interfaces import CredentialsProvider
from bucketward.model import QuarantineSpec

PERMISSIONS: Mapping[str, str] = {}


def open_s3(url: str, credentials: CredentialsProvider | None = None) -> S3Cloud:
    """Open ``s3:///<region>?endpoint=...``; nothing is connected yet.

    Without `endpoint` it is Amazon's S3, of which nothing but S3 itself is used.
    """
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    endpoint = options.pop("endpoint", None)
    if parts.scheme != "s3" or parts.netloc or not parts.path.strip("/") or options:
        raise ConfigError("expected s3:///<region>?endpoint=...", backend="s3")
    return S3Cloud(parts.path.strip("/"), credentials=credentials, endpoint=endpoint)


class S3Cloud(AwsCloud):
    """What the S3 API alone can do: describe buckets, read and replace their policies."""

    def __init__(
        self,
        region: str,
        *,
        credentials: CredentialsProvider | None = None,
        endpoint: str | None = None,
    ) -> None:
        super().__init__("", region, credentials=credentials, endpoint=endpoint)

    def ping(self) -> None:
        with _translating(self._endpoint or "S3"):
            self._s3.list_buckets()

    def buckets(self) -> Sequence[str]:
        with _translating(self._endpoint or "S3"):
            reply = self._s3.list_buckets()
        return [f"s3://{entry['Name']}" for entry in reply.get("Buckets", ())]

    def enrol(self, bucket: str, queue: str) -> str:  # noqa: ARG002 - the Protocol's
        _by_hand(f"{bucket} cannot be set up to announce its objects from here; set up its events")

    def withdraw(self, bucket: str) -> None:
        """Do nothing: nothing was enrolled."""

    def make_quarantine(self, spec: QuarantineSpec) -> str:
        _by_hand(f"the quarantine {spec.name} is not made here; make a bucket and name it")

    def missing_permissions(self, bucket: str) -> Mapping[str, str]:
        _by_hand(f"the permissions on {bucket} cannot be tried without AWS; use bucketward check")

    def regions(self) -> Sequence[str]:
        return [self.region]

    def _at(self, bucket: str) -> dict[str, Any]:
        at = {"Bucket": _bucket_name(bucket)}
        with _translating(bucket):
            self._s3.head_bucket(**at)
        return at


def _by_hand(message: str) -> NoReturn:
    raise Unsupported(message, backend="s3")
