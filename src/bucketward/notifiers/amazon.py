"""What the notifiers that speak to Amazon share: addresses, clients, batches and errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)

from bucketward.errors import ConfigError, Denied, Error, NotFound, Unavailable, Unsupported
from bucketward.model import Note

_FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What is no character of XML 1.0, which is what these services take."""

Entry = TypeVar("Entry")


def parse(url: str, path: str, example: str) -> tuple[str, re.Match[str], str]:
    """Return region, the match of `path` (a pattern) and the endpoint; `ConfigError` names both."""
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
    except ValueError:
        parts, options = urlsplit(""), {}
    endpoint = options.pop("endpoint", "")
    found = re.fullmatch(path, parts.path.removeprefix("/"), re.ASCII)
    if (
        not re.fullmatch(r"[a-z]+(-[a-z0-9]+)+", parts.netloc)
        or found is None
        or options
        or parts.fragment
        or not re.fullmatch(r"(https?://[^/?#@\s]+/?)?", endpoint)
    ):
        raise ConfigError(
            f"the address is {example}, with ?endpoint=https://... if need be",
            backend=example.partition(":")[0],
        )
    return parts.netloc, found, endpoint


def client(service: str, region: str, endpoint: str, backend: str) -> Any:
    """Return a client of `service` with the platform's own credentials; nothing is connected."""
    config = Config(
        connect_timeout=5,
        read_timeout=30,
        max_pool_connections=10,
        retries={"mode": "standard", "total_max_attempts": 3},
    )
    with translating(backend, service):
        return boto3.Session().client(
            service,
            region_name=region,
            endpoint_url=endpoint or None,
            config=config,
        )


def partition(region: str) -> str:
    """Return the part of the ARN that says which Amazon a region belongs to."""
    try:
        return str(boto3.Session().get_partition_for_region(region))
    except BotoCoreError:
        return "aws"  # a region of a stand-in, or newer than this botocore


def clean(text: str, limit: int) -> str:
    """Return `text` with what the services do not take replaced, and at most `limit` long."""
    return _FORBIDDEN.sub("\ufffd", text)[:limit]


def batches(
    pairs: Sequence[tuple[Note, Entry]],
    size: Callable[[Entry], int],
    *,
    entries: int,
    total: int,
) -> Iterator[Sequence[tuple[Note, Entry]]]:
    """Yield the pairs in order, at most `entries` and `total` bytes at a time."""
    batch: list[tuple[Note, Entry]] = []
    taken = 0
    for pair in pairs:
        length = size(pair[1])
        if batch and (len(batch) == entries or taken + length > total):
            yield batch
            batch, taken = [], 0
        batch.append(pair)
        taken += length
    if batch:
        yield batch


def deliver(
    batch: Sequence[tuple[Note, Entry]],
    send: Callable[[Sequence[tuple[Note, Entry]]], Mapping[str, Error]],
) -> dict[str, Error]:
    """Return what `send` says about a batch.

    A request that is refused as a whole is tried again in halves, so that the one note it is
    refused for keeps none of the others back.
    """
    try:
        return dict(send(batch))
    except Unsupported as error:
        if len(batch) == 1:
            return {batch[0][0].id: error}
    except Error as error:
        return {note.id: error for note, _ in batch}
    half = len(batch) // 2
    return deliver(batch[:half], send) | deliver(batch[half:], send)


def too_large(backend: str, note: Note) -> Unsupported:
    """Return the error for a note that no request has room for."""
    return Unsupported(
        f"the note {note.id[:64]!a} is larger than {backend} takes",
        backend=backend,
        reason="too-large",
    )


def refused(backend: str, what: str, code: str, said: str, fault: bool = True) -> Error:
    """Return the error for one entry that was refused; `fault` says that it is ours."""
    if not code or not fault or code in _UNAVAILABLE:
        return Unavailable(
            f"{what} was not taken ({code or 'no answer'}); try again", backend=backend
        )
    if code in _DENIED:
        return Denied(
            f"{what} was not taken ({code}); grant it to the role that Bucketward has",
            backend=backend,
        )
    return Unsupported(f"{what} was refused ({code}: {_plain(said)})", backend=backend)


_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "IncompleteSignature",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "MissingAuthenticationToken",
    "RequestExpired",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
}
_DENIED = {
    "AccessDenied",
    "AccessDeniedException",
    "AuthorizationError",
    "InvalidAccessException",  # Security Hub is not enabled
    "KMSAccessDenied",
    "KMSDisabled",
    "NotAuthorizedForSourceException",
}
_NOT_FOUND = {"NotFound", "NotFoundException", "ResourceNotFoundException"}
_UNAVAILABLE = {
    "InternalError",
    "InternalException",
    "InternalFailure",
    "KMSThrottling",
    "LimitExceededException",
    "ServiceUnavailable",
    "Throttled",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
}


def _plain(said: str) -> str:
    return re.sub(r"[^ -~]+", " ", said)[:300]


@contextmanager
def translating(backend: str, what: str, permission: str = "") -> Iterator[None]:
    """Turn what boto3 raises into our errors; `permission` is what the call needs."""
    try:
        yield
    except ClientError as error:
        raise _translated(backend, what, permission, error) from error
    except (
        NoCredentialsError,
        PartialCredentialsError,
        CredentialRetrievalError,
        ProfileNotFound,
    ) as error:
        raise Denied(
            f"{what}: no credentials for AWS; give this machine a role, or set a profile or keys",
            backend=backend,
        ) from error
    except (ParamValidationError, UnicodeError) as error:
        raise Unsupported(f"{what}: AWS does not take such a note", backend=backend) from error
    except BotoCoreError as error:
        raise Unavailable(
            f"{what} cannot be reached ({type(error).__name__}): see the network and its endpoint",
            backend=backend,
        ) from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Unavailable(
            f"what answers for {what} does not speak as AWS does: see its endpoint",
            backend=backend,
        ) from error


def _translated(backend: str, what: str, permission: str, error: ClientError) -> Error:
    code = str(error.response.get("Error", {}).get("Code", ""))
    said = str(error.response.get("Error", {}).get("Message", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _CREDENTIALS:
        return Denied(
            f"{what}: AWS does not accept the credentials ({code}); renew or correct them, "
            "and see that the clock is right",
            backend=backend,
        )
    if code in _DENIED or code.startswith("KMS") or status in (401, 403):
        return Denied(
            f"{what}: not allowed to {permission} ({code}); grant it to the role that "
            "Bucketward has, and see that the service is enabled",
            backend=backend,
            reason=permission,
        )
    if code in _UNAVAILABLE or status == 429 or status >= 500:
        return Unavailable(f"{what}: {permission} failed ({code}); try again", backend=backend)
    if code in _NOT_FOUND or status == 404:
        return NotFound(f"{what}: there is none ({code}); create it", backend=backend)
    return Unsupported(
        f"{what}: {permission} was refused ({code}: {_plain(said)})", backend=backend
    )
