"""Amazon SQS: one standard queue and the dead-letter queue that its redrive policy names."""
# ruff: noqa: D102 - the docstrings are the Protocol's

from __future__ import annotations

import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from threading import Lock
from typing import TYPE_CHECKING, Any

import boto3.session
import botocore.session
from botocore.config import Config
from botocore.credentials import CredentialProvider, ReadOnlyCredentials
from botocore.credentials import Credentials as BotocoreCredentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
)

from bucketward.errors import ConfigError, Denied, Error, NotFound, Unavailable, Unsupported
from bucketward.interfaces import CredentialsProvider
from bucketward.model import Depth, Message, Reason
from bucketward.queues.rules import MAX_BODY, check_bodies, parse_url

if TYPE_CHECKING:
    from mypy_boto3_sqs.client import SQSClient

PERMISSIONS: Mapping[str, str] = {
    "sqs:GetQueueUrl": "find the queue and its dead-letter queue by name",
    "sqs:GetQueueAttributes": "read the redrive policy, and how full the queue is",
    "sqs:SendMessage": "enqueue objects, and bury a message in the dead-letter queue",
    "sqs:ReceiveMessage": "take messages from the queue and from its dead-letter queue",
    "sqs:DeleteMessage": "acknowledge a message",
    "sqs:ChangeMessageVisibility": "keep a message while its object is scanned, or give it back",
    "kms:Decrypt": "read and send messages, if the queue is encrypted with a key of your own",
    "kms:GenerateDataKey": "send messages, if the queue is encrypted with a key of your own",
}

_TEN = 10
"""Entries in one request, at most (SQS quotas, messages)."""
_LONG_POLL = 20
_LONGEST = 12 * 3600 - 10
"""How long after its receipt a message can be kept: 12 hours by the clock of SQS, which started
a little before ours (ChangeMessageVisibility)."""
_REASON_LENGTH = 1000

_FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What is no character of XML 1.0, as SendMessage lists it."""

_ID, _REASON, _SENT = "bucketward-id", "bucketward-reason", "bucketward-sent-at"


def open_sqs(url: str, credentials: CredentialsProvider | None = None) -> SqsQueue:
    """Open ``sqs://region/account/name?endpoint=https://..&lease=30``; the account may be left out.

    The lease is the queue's own visibility timeout unless given; `endpoint` is for VPC endpoints
    and stand-ins.  Asks SQS for the queue, so it raises whatever `ping` may.
    """
    address = parse_url(url, "sqs", frozenset({"endpoint", "lease"}))
    account, _, name = address.path.strip("/").rpartition("/")
    endpoint = address.options.get("endpoint", "")
    if (
        not re.fullmatch(r"[a-z0-9-]+", address.host)
        or not re.fullmatch(r"(\d{12})?", account)
        or not re.fullmatch(r"[\w-]{1,80}", name, re.ASCII)
        or not re.fullmatch(r"(https?://[^/?#@]+/?)?", endpoint)
    ):
        raise ConfigError(
            "an SQS URL is sqs://region/account/name, where the account is twelve digits and the "
            "queue is a standard queue (no .fifo); an endpoint is http(s)://host:port",
            backend="sqs",
        )
    lease = address.seconds("lease", 0) if "lease" in address.options else None
    return SqsQueue(
        name,
        region=address.host,
        account=account,
        endpoint=endpoint,
        credentials=credentials,
        lease=lease,
    )


@dataclass(frozen=True, slots=True)
class _Side:
    """The queue, or its dead-letter queue."""

    url: str
    shown: str
    key: str
    is_dead: bool


class SqsQueue:
    """The queue `name`, which has to have a dead-letter queue in the same region.

    `max_deliveries` is the redrive policy's ``maxReceiveCount``.  SQS counts leases and delays
    in whole seconds: we round up, but waits down, so that a `wait` under a second is a short poll,
    which may miss a message that is there.  `lease` overrides the visibility timeout.

    SQS answers "fine" when an expired receipt is extended or given back, so a lease that has
    lapsed by our clock is taken for lost without asking.  Bodies cannot be empty and have only
    the characters of XML 1.0.  `Depth.oldest_age` is unknown: only CloudWatch tells it.

    Retries within one request are botocore's and follow ``AWS_MAX_ATTEMPTS``.
    """

    max_deliveries: int

    def __init__(
        self,
        name: str,
        *,
        region: str,
        account: str = "",
        endpoint: str = "",
        credentials: CredentialsProvider | None = None,
        lease: float | None = None,
        connections: int = 50,
    ) -> None:
        if lease is not None and not 0 < lease <= _LONGEST:
            raise ConfigError("a lease on SQS lasts 12 hours at most", backend="sqs")
        self._shown = f"sqs://{region}/{account}/{name}" if account else f"sqs://{region}/{name}"
        self._name = name
        self._account = account
        self._given_lease = lease
        self._lock = Lock()
        self._half_buried: OrderedDict[str, None] = OrderedDict()
        """Ids in the dead-letter queue that could not be deleted from the queue yet."""
        try:
            self._client = _client(region, endpoint, credentials, connections)
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(
                f"{self._shown} cannot be asked: see its region and endpoint", backend="sqs"
            ) from error
        try:
            self._load()
        except BaseException:
            self._client.close()
            raise

    def ping(self) -> None:
        """Ask for things that change nothing, so that each permission is tried."""
        self._load()
        bogus: list[dict[str, Any]] = [{"ReceiptHandle": "bucketward-ping"}]
        for side in (self._live, self._dead):
            # An empty batch and a limit of 0 are refused after the permission was looked at.
            self._try("SendMessage", side, self._client.send_message_batch, Entries=[])
            self._try(
                "ReceiveMessage",
                side,
                self._client.receive_message,
                MaxNumberOfMessages=0,
                VisibilityTimeout=0,
            )
            change = [entry | {"VisibilityTimeout": 0} for entry in bogus]
            _raise(self._in_tens("ChangeMessageVisibility", side, change))
            _raise(self._in_tens("DeleteMessage", side, bogus))

    def close(self) -> None:
        self._client.close()

    def send(self, bodies: Sequence[str]) -> None:
        check_bodies(bodies, "sqs")
        for body in bodies:
            if not body or _FORBIDDEN.search(body):
                raise Unsupported(
                    "SQS carries no empty messages, and no characters that XML forbids",
                    backend="sqs",
                    reason=Reason.UNSUPPORTED,
                )
        for batch in _batches(bodies):
            entries = [{"MessageBody": body} for body in batch]
            _raise(self._in_tens("SendMessage", self._live, entries))

    def receive(self, limit: int, wait: float) -> Sequence[Message]:
        return self._take(self._live, limit, wait)

    def ack(self, messages: Sequence[Message]) -> None:
        failures: list[Error] = []
        for side, receipts in self._sides(messages):
            entries = [{"ReceiptHandle": receipt.handle} for receipt in receipts]
            failures += self._in_tens("DeleteMessage", side, entries).values()
        _raise(failures)

    def nack(self, messages: Sequence[Message], delay: float = 0) -> None:
        now = time.time()
        failures: list[Error] = []
        for side, receipts in self._sides([m for m in messages if m.leased_until > now]):
            entries = [
                {
                    "ReceiptHandle": receipt.handle,
                    "VisibilityTimeout": max(0, min(math.ceil(delay), receipt.seconds_left(now))),
                }
                for receipt in receipts
            ]
            failures += self._in_tens("ChangeMessageVisibility", side, entries).values()
        _raise(failures)

    def extend(self, messages: Sequence[Message], seconds: float) -> Sequence[Message]:
        now = time.time()
        asked: dict[str, int] = {}
        for message in messages:
            left = _Receipt.parse(message.receipt).seconds_left(now)
            if message.leased_until > now and left > 0:
                asked[message.receipt] = max(0, min(math.ceil(seconds), left))
        lost: set[str] = set()
        failures: list[Error] = []
        for side, receipts in self._sides([m for m in messages if m.receipt in asked]):
            entries = [
                {"ReceiptHandle": r.handle, "VisibilityTimeout": asked[str(r)]} for r in receipts
            ]
            gone: list[int] = []
            failures += self._in_tens("ChangeMessageVisibility", side, entries, gone).values()
            lost.update(str(receipts[at]) for at in gone)
        _raise(failures)
        return [
            replace(message, leased_until=now + asked[message.receipt])
            for message in messages
            if message.receipt in asked and message.receipt not in lost
        ]

    def bury(self, message: Message, reason: str) -> None:
        """Send to the dead-letter queue, then delete.

        The reason, our id and the time travel as message attributes, and stay behind if the
        dead-letter queue has no room for them beside the body.
        """
        if _Receipt.parse(message.receipt).is_dead:
            return
        with self._lock:
            is_there = message.id in self._half_buried
        if not is_there:
            sent_at = str(round(message.sent_at.timestamp() * 1000))
            texts = {_ID: message.id, _REASON: _clean(reason), _SENT: sent_at}
            try:
                self._bury(message.body, {name: text for name, text in texts.items() if text})
            except Unsupported:
                self._bury(message.body, {})
            with self._lock:
                self._half_buried[message.id] = None
                if len(self._half_buried) > 1000:
                    self._half_buried.popitem(last=False)
        self.ack([message])
        with self._lock:
            self._half_buried.pop(message.id, None)

    def dead(self, limit: int, wait: float) -> Sequence[Message]:
        return self._take(self._dead, limit, wait)

    def depth(self) -> Depth:
        names = ("", "Delayed", "NotVisible")
        found = self._attributes(
            self._live, [f"ApproximateNumberOfMessages{name}" for name in names]
        )
        with _translating("GetQueueAttributes", self._shown):
            visible, delayed, hidden = (
                int(found[f"ApproximateNumberOfMessages{name}"]) for name in names
            )
        return Depth(visible + delayed, hidden)

    def _load(self) -> None:
        """Find both queues and read what they say of themselves."""
        live = _Side(self._find(self._name, self._account, self._shown), self._shown, "", False)
        found = self._attributes(live, ["All"])
        try:
            policy = json.loads(found.get("RedrivePolicy") or "{}")
            arn = str(policy.get("deadLetterTargetArn", "")).split(":")
            count = int(policy.get("maxReceiveCount", 0))
        except (ValueError, AttributeError):
            arn, count = [], 0
        if len(arn) != 6 or count < 1:
            raise ConfigError(
                f"{self._shown} has no dead-letter queue, so a message that cannot be worked on "
                "would come for ever; give it one: a redrive policy with deadLetterTargetArn and "
                "maxReceiveCount",
                backend="sqs",
            )
        if found.get("FifoQueue") == "true":
            raise ConfigError(f"{self._shown} is a FIFO queue; use a standard queue", backend="sqs")
        _, _, _, region, account, name = arn
        shown = f"sqs://{region}/{account}/{name}"
        dead = _Side(self._find(name, account, shown), shown, "", True)
        self._dead = replace(dead, key=self._attributes(dead, ["All"]).get("KmsMasterKeyId", ""))
        self._live = replace(live, key=found.get("KmsMasterKeyId", ""))
        self.max_deliveries = count
        self._lease = math.ceil(self._given_lease or int(found.get("VisibilityTimeout", 30)))
        if not self._lease:
            raise ConfigError(
                f"{self._shown} has a visibility timeout of 0, so everybody gets every message; "
                "set it to a minute",
                backend="sqs",
            )

    def _find(self, name: str, account: str, shown: str) -> str:
        owner = {"QueueOwnerAWSAccountId": account} if account else {}
        with _translating("GetQueueUrl", shown):
            try:
                return self._client.get_queue_url(QueueName=name, **owner)["QueueUrl"]
            except ParamValidationError as error:
                raise ConfigError(f"{shown} cannot be a queue", backend="sqs") from error

    def _attributes(self, side: _Side, names: Sequence[Any]) -> Mapping[Any, str]:
        with _translating("GetQueueAttributes", side.shown, side.key):
            reply = self._client.get_queue_attributes(QueueUrl=side.url, AttributeNames=names)
            return reply["Attributes"]

    def _take(self, side: _Side, limit: int, wait: float) -> list[Message]:
        deadline = time.monotonic() + wait
        if limit <= 0:
            return []
        messages: list[Message] = []
        # Counted, lest an endpoint that does not wait be asked without end.
        for _ in range(1 + math.ceil(wait / _LONG_POLL)):
            # A few milliseconds short of 20 s are still 20 s.
            left = math.floor(deadline - time.monotonic() + 0.05)
            messages = self._receive(side, min(limit, _TEN), max(0, min(left, _LONG_POLL)))
            if messages or deadline - time.monotonic() < 1:
                break
        last = len(messages)
        while last == _TEN and len(messages) < limit:
            try:
                more = self._receive(side, min(limit - len(messages), _TEN), 0)
            except Error:
                break  # those in hand are leased to us; the next call will say what is wrong
            messages += more
            last = len(more)
        return messages

    def _receive(self, side: _Side, limit: int, wait: int) -> list[Message]:
        with _translating("ReceiveMessage", side.shown, side.key):
            reply = self._client.receive_message(
                QueueUrl=side.url,
                MaxNumberOfMessages=limit,
                WaitTimeSeconds=wait,
                VisibilityTimeout=self._lease,
                MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
                MessageAttributeNames=[_ID, _REASON, _SENT] if side.is_dead else [],
            )
            now = time.time()
            return [self._message(side, found, now) for found in reply.get("Messages", [])]

    def _message(self, side: _Side, found: Mapping[str, Any], now: float) -> Message:
        # Only what we buried ourselves has these; what others send to the queue may pretend.
        ours = found.get("MessageAttributes", {}) if side.is_dead else {}
        key, reason, sent = (ours.get(n, {}).get("StringValue", "") for n in (_ID, _REASON, _SENT))
        system = found["Attributes"]
        milliseconds = int(sent if re.fullmatch(r"[0-9]{1,14}", sent) else system["SentTimestamp"])
        return Message(
            id=key or found["MessageId"],
            body=found["Body"],
            receipt=str(_Receipt(side.is_dead, math.floor(now), found["ReceiptHandle"])),
            deliveries=max(1, int(system["ApproximateReceiveCount"])),
            sent_at=datetime.fromtimestamp(milliseconds / 1000, UTC),
            leased_until=now + self._lease,
            reason=reason,
        )

    def _sides(self, messages: Sequence[Message]) -> Iterator[tuple[_Side, list[_Receipt]]]:
        """Yield for each queue what came from it, every receipt once."""
        receipts = [_Receipt.parse(r) for r in dict.fromkeys(m.receipt for m in messages)]
        for side in (self._live, self._dead):
            if ours := [receipt for receipt in receipts if receipt.is_dead == side.is_dead]:
                yield side, ours

    def _in_tens(
        self,
        action: str,
        side: _Side,
        entries: Sequence[Mapping[str, Any]],
        gone: list[int] | None = None,
    ) -> dict[int, Error]:
        """Do `action` for all entries, in tens, and return the failures by position.

        Receipts that are good no more are no failure; their positions go to `gone`.  What SQS
        calls its own fault is tried once more.
        """
        calls: dict[str, Any] = {
            "SendMessage": self._client.send_message_batch,
            "DeleteMessage": self._client.delete_message_batch,
            "ChangeMessageVisibility": self._client.change_message_visibility_batch,
        }
        failures: dict[int, Error] = {}
        for start in range(0, len(entries), _TEN):
            pending = list(range(start, min(start + _TEN, len(entries))))
            for is_last in (False, True):
                try:
                    with _translating(action, side.shown, side.key):
                        reply = calls[action](
                            QueueUrl=side.url,
                            Entries=[{"Id": str(at), **entries[at]} for at in pending],
                        )
                except Error as whole:
                    failures.update(dict.fromkeys(pending, whole))
                    break
                done = {int(entry["Id"]) for entry in reply.get("Successful", [])}
                failed = {int(entry["Id"]): entry for entry in reply.get("Failed", [])}
                again = []
                for at in pending:
                    if at in done and at not in failed:
                        continue
                    entry = failed.get(at, {"Code": "no answer"})
                    if action != "SendMessage" and _is_spent(entry):
                        if gone is not None:
                            gone.append(at)
                        continue
                    error = _error(entry, action, side.shown, side.key)
                    if isinstance(error, Unavailable) and not is_last:
                        again.append(at)
                    else:
                        failures[at] = error
                pending = again
                if not pending:
                    break
        return failures

    def _bury(self, body: str, texts: Mapping[str, str]) -> None:
        with _translating("SendMessage", self._dead.shown, self._dead.key):
            self._client.send_message(
                QueueUrl=self._dead.url,
                MessageBody=body,
                MessageAttributes={
                    name: {"DataType": "String", "StringValue": text}
                    for name, text in texts.items()
                },
            )

    def _try(self, action: str, side: _Side, call: Callable[..., object], **more: Any) -> None:
        """Make a request that is refused in any case, and see that it is not for lack of rights."""
        try:
            with _translating(action, side.shown, side.key):
                call(QueueUrl=side.url, **more)
        except (Unavailable, Unsupported) as error:
            cause = error.__cause__
            if not isinstance(cause, ClientError) or not _is_complaint(cause.response):
                raise


@dataclass(frozen=True, slots=True)
class _Receipt:
    """SQS's receipt handle with what we have to know besides."""

    is_dead: bool
    received_at: int
    handle: str

    @classmethod
    def parse(cls, text: str) -> _Receipt:
        side, at, handle = text.split(":", 2)
        return cls(side == "dead", int(at), handle)

    def __str__(self) -> str:
        return f"{'dead' if self.is_dead else 'live'}:{self.received_at}:{self.handle}"

    def seconds_left(self, now: float) -> int:
        return math.floor(self.received_at + _LONGEST - now)


class _Provided(BotocoreCredentials):
    """Our credentials provider, in the shape that botocore signs with."""

    def __init__(self, provider: CredentialsProvider) -> None:
        super().__init__("", "", method="bucketward")
        self._provider = provider

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        found = self._provider()
        return ReadOnlyCredentials(found.access_key, found.secret_key, found.session_token or None)


class _ProvidedProvider(CredentialProvider):
    METHOD = CANONICAL_NAME = "bucketward"

    def __init__(self, provider: CredentialsProvider) -> None:
        super().__init__()
        self._provider = provider

    def load(self) -> BotocoreCredentials:
        return _Provided(self._provider)


def _client(
    region: str, endpoint: str, credentials: CredentialsProvider | None, connections: int
) -> SQSClient:
    inner = botocore.session.Session()
    if credentials is not None:
        chain = inner.get_component("credential_provider")
        chain.insert_before("env", _ProvidedProvider(credentials))
    client: SQSClient = boto3.session.Session(botocore_session=inner).client(
        "sqs",
        region_name=region,
        endpoint_url=endpoint or None,
        config=Config(
            connect_timeout=5,
            read_timeout=_LONG_POLL + 10,
            max_pool_connections=connections,
            retries={"mode": "standard"},
            tcp_keepalive=True,
            user_agent_extra="bucketward",
        ),
    )
    return client


def _batches(bodies: Sequence[str]) -> Iterator[list[str]]:
    """Yield the bodies in batches of at most ten and, together, 256 KiB."""
    batch: list[str] = []
    size = 0
    for body in bodies:
        length = len(body.encode())
        if len(batch) == _TEN or (batch and size + length > MAX_BODY):
            yield batch
            batch, size = [], 0
        batch.append(body)
        size += length
    if batch:
        yield batch


def _clean(reason: str) -> str:
    return _FORBIDDEN.sub("\ufffd", reason)[:_REASON_LENGTH]


def _raise(failures: Mapping[int, Error] | Sequence[Error]) -> None:
    """Raise the failure that says most: one that waiting would not mend, if there is any."""
    errors = list(failures.values()) if isinstance(failures, Mapping) else failures
    for error in sorted(errors, key=lambda error: isinstance(error, Unavailable)):
        raise error


def _is_spent(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry failed because its receipt, or its 12 hours, are over.

    Which code SQS chooses is not documented well: a made-up receipt is ReceiptHandleIsInvalid,
    one of a deleted message or past the 12 hours is InvalidParameterValue (aws-sdk-java #1628,
    aws-sdk-net #794 and #1927).
    """
    code = str(entry.get("Code", ""))
    return code.rpartition(".")[2] in {
        "ReceiptHandleIsInvalid",
        "MessageNotInflight",
        "InvalidParameterValue",
        "InvalidIdFormat",
    }


_REFUSED = {
    "AccessDenied",
    "AccessDeniedException",
    "AuthorizationError",
    "InvalidSecurity",
}
_UNKNOWN = {
    "ExpiredToken",
    "ExpiredTokenException",
    "IncompleteSignature",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "MissingAuthenticationToken",
    "OptInRequired",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
}
_THROTTLED = {
    "OverLimit",
    "RequestLimitExceeded",
    "RequestThrottled",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
}


def _is_complaint(reply: Mapping[str, Any]) -> bool:
    """Return whether SQS was well and had something against the request."""
    status = reply.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status == 400 and _code(reply.get("Error", {})) not in _THROTTLED


def _code(entry: Mapping[str, Any]) -> str:
    """Return the error code without the prefixes that the older protocol gives it."""
    code = str(entry.get("Code", ""))
    return code if code.upper().startswith("KMS") else code.rpartition(".")[2]


def _error(entry: Mapping[str, Any], action: str, shown: str, key: str) -> Error:
    code, text = _code(entry), str(entry.get("Message", ""))
    if code.upper().startswith("KMS"):
        named = f"the key {key}" if key else "its key"
        if "AccessDenied" in code:
            needed = "kms:GenerateDataKey" if action == "SendMessage" else "kms:Decrypt"
            return Denied(
                f"{shown} is encrypted with {named}: allow us kms:Decrypt and "
                "kms:GenerateDataKey on it",
                backend="sqs",
                reason=needed,
            )
        return Unavailable(
            f"{shown} is encrypted with {named}, which does not serve now ({code}): see that it "
            "exists and is enabled",
            backend="sqs",
        )
    if code in _REFUSED:
        return Denied(f"allow us sqs:{action} on {shown}", backend="sqs", reason=f"sqs:{action}")
    if code in _UNKNOWN:
        return Denied(
            f"{shown} does not accept our credentials ({code}): renew them, and see that the "
            "clock is right",
            backend="sqs",
            reason=f"sqs:{action}",
        )
    if code in {"QueueDoesNotExist", "NonExistentQueue", "InvalidAddress"}:
        return NotFound(
            f"{shown} does not exist, or not for us: make the queue, or correct its region, "
            "account and name",
            backend="sqs",
        )
    if code == "InvalidMessageContents":
        return Unsupported(
            "SQS does not carry a character of this message",
            backend="sqs",
            reason=Reason.UNSUPPORTED,
        )
    if code == "BatchRequestTooLong" or (action == "SendMessage" and "must be shorter" in text):
        return Unsupported(
            f"{shown} takes no message of that size: set its MaximumMessageSize to 256 KiB or more",
            backend="sqs",
            reason=Reason.TOO_LARGE,
        )
    if code in _THROTTLED:
        return Unavailable(
            f"{shown} is asked too often, or has too many messages in flight ({code})",
            backend="sqs",
        )
    return Unavailable(f"{shown} could not {action} ({code or 'no reason given'})", backend="sqs")


@contextmanager
def _translating(action: str, shown: str, key: str = "") -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        raise _error(error.response.get("Error", {}), action, shown, key) from error
    except NoCredentialsError as error:
        raise Denied(
            f"there are no AWS credentials for {shown}: give the process a role, or set them",
            backend="sqs",
            reason=f"sqs:{action}",
        ) from error
    except BotoCoreError as error:
        raise Unavailable(
            f"{shown} cannot be reached ({type(error).__name__}): see the network and its endpoint",
            backend="sqs",
        ) from error
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise Unavailable(
            f"what answers for {shown} does not speak as SQS does: see its endpoint", backend="sqs"
        ) from error
