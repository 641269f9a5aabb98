"""One AWS account in one region: its buckets, and how their events come to a queue."""

# ruff: noqa: D102 - the docstrings are the Protocol's

from __future__ import annotations

import hashlib
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import boto3
import botocore.session
from botocore.config import Config
from botocore.credentials import CredentialProvider, CredentialResolver
from botocore.credentials import Credentials as BotoCredentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)

from bucketward.errors import (
    Changed,
    ConfigError,
    Denied,
    Error,
    NotFound,
    Unavailable,
    Unsupported,
)
from bucketward.interfaces import CredentialsProvider
from bucketward.model import BucketInfo, QuarantineSpec

PERMISSIONS: Mapping[str, str] = {
    "account:ListRegions": "list the regions that the account has enabled",
    "events:DeleteRule": "take back the rule of a bucket that is no longer protected",
    "events:DescribeRule": "see whether a bucket's events come by EventBridge",
    "events:ListRules": "see whether others rely on a bucket's events in EventBridge",
    "events:ListTagsForResource": "see whether we turned a bucket's EventBridge events on",
    "events:ListTargetsByRule": "keep a rule of ours that the owner uses too",
    "events:PutRule": "hear of new objects where the owner's own notification is in the way",
    "events:PutTargets": "send those events to the queue",
    "events:RemoveTargets": "stop sending those events",
    "events:TagResource": "remember that we turned a bucket's EventBridge events on",
    "kms:Decrypt": "read objects encrypted with a key of the account",
    "s3:CreateBucket": "make the quarantine bucket",
    "s3:DeleteBucketPolicy": "take the guard off a bucket that had no policy before",
    "s3:DeleteObjectVersion": "delete or move away exactly the version that was scanned",
    "s3:GetAccountPublicAccessBlock": "find out whether a bucket is public",
    "s3:GetBucketAcl": "find out whether a bucket is public",
    "s3:GetBucketLocation": "find out the region of a bucket",
    "s3:GetBucketNotification": "keep the owner's notifications when adding ours",
    "s3:GetBucketOwnershipControls": "see that the quarantine bucket is still locked down",
    "s3:GetBucketPolicy": "keep the owner's statements when adding the guard",
    "s3:GetBucketPolicyStatus": "find out whether a bucket is public",
    "s3:GetBucketPublicAccessBlock": "find out whether a bucket is public",
    "s3:GetBucketRequestPayment": "find out who pays for reading",
    "s3:GetBucketTagging": "show a bucket's tags and recognise our quarantine",
    "s3:GetBucketVersioning": "find out whether versions can be named",
    "s3:GetEncryptionConfiguration": "show how a bucket encrypts",
    "s3:GetLifecycleConfiguration": "keep other rules of the quarantine bucket",
    "s3:GetObject": "read the object to be scanned",
    "s3:GetObjectTagging": "keep the owner's tags when adding ours",
    "s3:GetObjectVersion": "read exactly the version that the event named",
    "s3:GetObjectVersionTagging": "keep the owner's tags when adding ours",
    "s3:ListAllMyBuckets": "list the account's buckets",
    "s3:ListBucket": "see that a bucket is there, whose and where, and crawl it",
    "s3:ListBucketVersions": "crawl every version",
    "s3:PutBucketNotification": "be told of new objects",
    "s3:PutBucketOwnershipControls": "lock the quarantine bucket down",
    "s3:PutBucketPolicy": "guard a bucket, and lock the quarantine bucket down",
    "s3:PutBucketPublicAccessBlock": "lock the quarantine bucket down",
    "s3:PutBucketTagging": "mark the quarantine bucket as ours",
    "s3:PutBucketVersioning": "keep every version in quarantine",
    "s3:PutEncryptionConfiguration": "encrypt the quarantine bucket",
    "s3:PutLifecycleConfiguration": "let objects in quarantine expire",
    "s3:PutObjectTagging": "write the verdict on an object",
    "s3:PutObjectVersionTagging": "write the verdict on exactly the version that was scanned",
    "s3:TagResource": "mark the quarantine bucket as ours while it is made",
    "sns:CreateTopic": "make the topic that buckets tell of new objects",
    "sns:GetTopicAttributes": "keep other statements of the topic's policy",
    "sns:SetTopicAttributes": "let buckets publish to the topic",
    "sns:Subscribe": "bring what the topic hears to the queue",
    "sqs:GetQueueAttributes": "keep other statements of the queue's policy",
    "sqs:GetQueueUrl": "find the queue",
    "sqs:SetQueueAttributes": "let the topic and the rules send to the queue",
}

_EVENTS = ["s3:ObjectCreated:*"]
_PUBLIC_GRANTEES = frozenset(
    f"http://acs.amazonaws.com/groups/global/{group}"
    for group in ("AllUsers", "AuthenticatedUsers")
)
_APPLICATION = re.compile(r"[a-z][a-z0-9-]{0,19}")
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def open_aws(url: str, credentials: CredentialsProvider | None = None) -> AwsCloud:
    """Open ``aws://<account>/<region>?endpoint=...&application=...``; nothing is connected yet."""
    parts = urlsplit(url)
    account, region = parts.netloc, parts.path.strip("/")
    options = dict(parse_qsl(parts.query))
    endpoint, application = options.pop("endpoint", None), options.pop("application", "bucketward")
    if (
        parts.scheme != "aws"
        or not re.fullmatch(r"[0-9]{12}", account)
        or not re.fullmatch(r"[a-z0-9-]+", region)
        or options
    ):
        raise ConfigError(
            "an AWS account is named aws://<12 digits>/<region>, "
            "with ?endpoint=... and &application=... if need be",
            backend="aws",
        )
    return AwsCloud(
        account, region, credentials=credentials, endpoint=endpoint, application_id=application
    )


class AwsCloud:
    """One account in one region, by boto3.

    A queue is named as the SQS backend is (``sqs://region/account/name``, where the account may
    be left out), by its ARN or by its URL at AWS.  It has to belong to this account; it may lie
    in another region, but then only the route ``sns`` leads to it.

    `enrol` takes the route ``sns`` (bucket -> one topic per queue -> queue) unless a notification
    of the owner for created objects is in the way, as S3 refuses two rules for the same event
    (S3 user guide, "Configuring event notifications using object key name filtering"); then
    ``eventbridge`` (bucket -> default bus -> one rule per bucket -> queue), which goes beside
    any rule.  `withdraw` leaves the topic and the queue's policy, which other buckets share.  It
    turns EventBridge off again only if `enrol` turned it on and no other rule hears S3.

    Ours is what bears a name made of `application_id`, and nothing else is ever taken away.
    Notification configurations and policies have no conditional write: we read them just before,
    and whoever writes in that moment is overwritten.
    """

    def __init__(
        self,
        account: str,
        region: str,
        *,
        credentials: CredentialsProvider | None = None,
        endpoint: str | None = None,
        application_id: str = "bucketward",
    ) -> None:
        if not _APPLICATION.fullmatch(application_id):
            raise ConfigError(
                "an application id is 1 to 20 of a-z, 0-9 and -, beginning with a letter",
                backend="aws",
            )
        self.account = account
        self.region = region
        self._endpoint = endpoint
        session = _session(credentials)
        try:
            partition = session.get_partition_for_region(region) if not endpoint else "aws"
        except BotoCoreError as error:
            raise ConfigError(f"AWS has no region {region}", backend="aws") from error
        self._names = _Names(application_id, partition, account)
        config = Config(
            connect_timeout=5,
            read_timeout=30,
            retries={"mode": "standard", "total_max_attempts": 3},
            s3={"addressing_style": "path"} if endpoint else {},
        )

        def client(service: str, at: str = region) -> Any:
            return session.client(service, region_name=at, endpoint_url=endpoint, config=config)

        with _translating(f"account {account}"):
            self._s3 = client("s3")
            self._s3control = client("s3control")
            self._sns = client("sns")
            self._events = client("events")
            self._sts = client("sts")
            self._account = client("account")
        self._client = client
        self._sqs_by_region: dict[str, Any] = {}
        self._lock = threading.Lock()

    def ping(self) -> None:
        with _translating(f"account {self.account}"):
            account = self._sts.get_caller_identity()["Account"]
        if account != self.account:
            raise ConfigError(
                f"the credentials are those of account {account}, not {self.account}; "
                "name that account, or use a role of this one",
                backend="aws",
            )
        with _translating(f"account {self.account}"):
            self._s3.list_buckets(MaxBuckets=1)

    def close(self) -> None:
        with self._lock:
            queues = list(self._sqs_by_region.values())
        for client in (
            self._s3,
            self._s3control,
            self._sns,
            self._events,
            self._sts,
            self._account,
            *queues,
        ):
            client.close()

    def buckets(self) -> Sequence[str]:
        return [
            f"s3://{name}"
            for name, region in self._list_buckets(BucketRegion=self.region)
            if region == self.region
        ]

    def describe(self, bucket: str) -> BucketInfo:
        """Return what can be found out; ACLs of single objects are not looked at."""
        at = self._at(bucket)

        def ask(call: Callable[..., Any]) -> Any:
            """Return the reply, {} if nothing is configured, `None` if we may not know."""
            try:
                with _translating(bucket):
                    return call(**at)
            except NotFound:
                return {}
            except (Denied, Unsupported):
                return None

        versioning = ask(self._s3.get_bucket_versioning)
        payer = (ask(self._s3.get_bucket_request_payment) or {}).get("Payer")
        tagging = ask(self._s3.get_bucket_tagging)
        return BucketInfo(
            bucket=bucket,
            account=self.account,
            region=self.region,
            created_at=self._created_at(at["Bucket"]),
            has_versions=None if versioning is None else versioning.get("Status") == "Enabled",
            is_public=self._is_public(ask),
            encryption=_encryption(ask(self._s3.get_bucket_encryption)),
            requester_pays=payer and payer == "Requester",
            tags=_tags(tagging or {}),
        )

    def enrol(self, bucket: str, queue: str) -> str:
        at = self._at(bucket)
        target = _parse_queue(queue, self._names.partition, self.account, self.region)
        if target.account != self.account:
            raise Unsupported(
                f"{target.arn} belongs to another account; give {bucket} a queue of account "
                f"{self.account}",
                backend="aws",
            )
        if target.name.endswith(".fifo"):
            raise Unsupported(
                f"{target.arn} is a FIFO queue, which events of S3 cannot reach; "
                "make a standard one",
                backend="aws",
            )
        config = self._notifications(bucket, at)
        ours = [t for t in config.get("TopicConfigurations", ()) if self._is_ours(t)]
        owners = _overlapping(config, self._names.notification)
        rule = self._rule(at["Bucket"])
        if not ours and (owners or rule is not None):
            try:
                self._enrol_by_eventbridge(bucket, at, target, config, rule)
            except Unsupported as error:
                if not owners:
                    raise
                raise Unsupported(
                    f"{bucket} tells {', '.join(owners)} of new objects already, and S3 allows no "
                    f"second notification for the same events ({error.message}); let that be a "
                    f"topic and subscribe {target.arn} to it",
                    backend="aws",
                ) from error
            return "eventbridge"
        self._enrol_by_sns(bucket, at, target, config)
        return "sns"

    def withdraw(self, bucket: str) -> None:
        name = _bucket_name(bucket)
        rule = self._rule(name)
        # A bucket that is gone, or is no longer here, may have left its rule behind.
        with suppress(NotFound):
            at = self._at(bucket)
            config = self._notifications(bucket, at)
            topics = config.get("TopicConfigurations", [])
            others = [t for t in topics if not self._is_ours(t)]
            turn_off = rule is not None and self._turned_on(rule) and not self._others_hear(name)
            if len(others) != len(topics) or turn_off:
                config["TopicConfigurations"] = others
                if turn_off:
                    config.pop("EventBridgeConfiguration", None)
                self._put_notifications(bucket, at, config, skip_validation=True)
        if rule is None:
            return
        with suppress(NotFound), _translating(f"rule {rule['Name']}"):
            reply = self._events.remove_targets(Rule=rule["Name"], Ids=[self._names.target])
            _all_entries(reply, rule["Name"])
            if not self._events.list_targets_by_rule(Rule=rule["Name"])["Targets"]:
                self._events.delete_rule(Name=rule["Name"])

    def make_quarantine(self, spec: QuarantineSpec) -> str:
        """Make the bucket, or mend it if it bears our mark.

        Versioned, encrypted, no public access, no ACLs, TLS only (but over a plain http
        endpoint), expiring after `expire_days`.  `Denied` also for a bucket of this account that
        does not bear our mark: what lies in it is not ours to expire.
        """
        bucket = f"s3://{spec.name}"
        if not _BUCKET_NAME.fullmatch(spec.name):
            raise Unsupported(
                f"{spec.name[:64]!a} cannot be a bucket's name; "
                "use 3 to 63 of a-z, 0-9, full stop and hyphen",
                backend="aws",
            )
        if spec.region not in ("", self.region):
            raise Unsupported(
                f"{bucket} is to be in {spec.region}, but this is {self.region}", backend="aws"
            )
        try:
            at = self._at(bucket)
        except NotFound:
            at = self._create(bucket, spec.name)
        except Denied as error:
            raise Denied(
                f"{bucket} belongs to somebody else, or s3:ListBucket is missing; "
                "choose another name",
                backend="aws",
                reason=error.reason,
            ) from error
        else:
            if self._read_tags(bucket, at).get(self._names.mark) != "quarantine":
                raise Denied(
                    f"{bucket} is there already and is not marked as a quarantine; choose another "
                    f"name, or tag it {self._names.mark}=quarantine to have it locked down",
                    backend="aws",
                )
        self._lock_down(bucket, at, spec)
        return bucket

    def bucket_policy(self, bucket: str) -> str:
        return self._read_policy(bucket, self._at(bucket))

    def replace_bucket_policy(self, bucket: str, document: str, expected: str) -> None:
        """Replace the policy, comparing it as JSON just before: a window of milliseconds."""
        at = self._at(bucket)
        try:
            wanted = _canonical(document)
        except ValueError as error:
            raise Unsupported(f"the policy for {bucket} is not JSON", backend="aws") from error
        current = self._read_policy(bucket, at)
        try:
            is_expected = _canonical(current) == _canonical(expected)
        except ValueError:
            is_expected = False
        if not is_expected:
            raise Changed(f"the policy of {bucket} is no longer what it was", backend="aws")
        with _translating(bucket):
            if document:
                if _canonical(current) != wanted:
                    self._s3.put_bucket_policy(**at, Policy=document)
            elif current:
                self._s3.delete_bucket_policy(**at)

    def missing_permissions(self, bucket: str) -> Mapping[str, str]:
        """Try what changes nothing: reading, and writing to a key that does not exist.

        Permissions that only a real change would show (``s3:PutBucketNotification``,
        ``s3:PutBucketPolicy``, ``s3:DeleteObject`` and those for topics and rules) are not tried.
        Where ``s3:ListBucket`` is missing, S3 does not tell a missing object from a forbidden
        one, so nothing on objects is tried either.
        """
        try:
            at = self._at(bucket)
        except Denied as error:
            if not error.reason:
                raise
            at = {"Bucket": _bucket_name(bucket), "ExpectedBucketOwner": self.account}
        missing: dict[str, str] = {}

        def attempt(permission: str, call: Callable[..., Any], **more: Any) -> Any:
            try:
                with _translating(bucket):
                    return call(**at, **more)
            except Denied as error:
                if not error.reason:
                    raise  # the credentials themselves
                # S3 names a KMS permission in its message where that is what is missing.
                name = error.reason if error.reason.startswith("kms:") else permission
                missing[name] = PERMISSIONS.get(name, "use the objects' key")
            except (NotFound, Unsupported):
                pass
            return None

        s3 = self._s3
        listing = attempt("s3:ListBucket", s3.list_objects_v2, MaxKeys=1)
        attempt("s3:ListBucketVersions", s3.list_object_versions, MaxKeys=1)
        attempt("s3:GetBucketVersioning", s3.get_bucket_versioning)
        attempt("s3:GetBucketNotification", s3.get_bucket_notification_configuration)
        attempt("s3:GetBucketPolicy", s3.get_bucket_policy)
        if "s3:ListBucket" in missing:
            return missing
        for entry in (listing or {}).get("Contents", ()):
            reply = attempt("s3:GetObject", s3.get_object, Key=entry["Key"], Range="bytes=0-0")
            if reply is not None:
                reply["Body"].close()
        nowhere: dict[str, Any] = {"Key": f"{self._names.mark}-probe-{uuid.uuid4().hex}"}
        version = {**nowhere, "VersionId": "null"}
        tagging: dict[str, Any] = {"Tagging": {"TagSet": []}}
        attempt("s3:GetObject", s3.get_object, **nowhere)
        attempt("s3:GetObjectVersion", s3.get_object, **version)
        attempt("s3:GetObjectTagging", s3.get_object_tagging, **nowhere)
        attempt("s3:GetObjectVersionTagging", s3.get_object_tagging, **version)
        attempt("s3:PutObjectTagging", s3.put_object_tagging, **nowhere, **tagging)
        attempt("s3:PutObjectVersionTagging", s3.put_object_tagging, **version, **tagging)
        # Deleting a version that is not there does nothing and makes no delete marker.
        attempt("s3:DeleteObjectVersion", s3.delete_object, **version)
        return missing

    def regions(self) -> Sequence[str]:
        """Return the enabled regions or, where we may not know them, those with buckets."""
        found = {self.region}
        try:
            with _translating(f"account {self.account}"):
                pages = self._account.get_paginator("list_regions").paginate(
                    RegionOptStatusContains=["ENABLED", "ENABLED_BY_DEFAULT"]
                )
                found.update(r["RegionName"] for page in pages for r in page["Regions"])
        except (Denied, Unsupported, NotFound):
            found.update(region for _, region in self._list_buckets())
        return sorted(found)

    def _list_buckets(self, **more: str) -> Iterator[tuple[str, str]]:
        with _translating(f"account {self.account}"):
            for page in self._s3.get_paginator("list_buckets").paginate(**more):
                for entry in page.get("Buckets", ()):
                    # Servers that do not know the filter do not name the region either.
                    region = entry.get("BucketRegion") or self._region_of(entry["Name"])
                    yield entry["Name"], region

    def _region_of(self, name: str) -> str:
        constraint = self._s3.get_bucket_location(Bucket=name).get("LocationConstraint")
        return {"": "us-east-1", "EU": "eu-west-1"}.get(constraint or "", str(constraint))

    def _at(self, bucket: str) -> dict[str, Any]:
        """Return the arguments that name `bucket`, having seen that it is ours and here.

        The owner is part of every request: a name that was given up may be somebody else's now.
        """
        at = {"Bucket": _bucket_name(bucket), "ExpectedBucketOwner": self.account}
        with _translating(bucket):
            head = self._s3.head_bucket(**at)
            region = head.get("BucketRegion") or self._region_of(at["Bucket"])
        if region != self.region:
            raise NotFound(f"{bucket} is in {region}, not in {self.region}", backend="aws")
        return at

    def _created_at(self, name: str) -> datetime | None:
        with suppress(Denied, Unsupported), _translating(f"s3://{name}"):
            reply = self._s3.list_buckets(Prefix=name, BucketRegion=self.region)
            for entry in reply.get("Buckets", ()):
                if entry["Name"] == name:
                    created: datetime = entry["CreationDate"]
                    return created
        return None

    def _is_public(self, ask: Callable[[Callable[..., Any]], Any]) -> bool | None:
        status = ask(self._s3.get_bucket_policy_status)
        acl = ask(self._s3.get_bucket_acl)
        by_policy = None if status is None else bool(status.get("PolicyStatus", {}).get("IsPublic"))
        by_acl = None if acl is None else _grants_public(acl)
        blocks = [ask(self._s3.get_public_access_block)]

        def answer() -> bool | None:
            answers = (
                _unless(by_policy, blocks, "RestrictPublicBuckets"),
                _unless(by_acl, blocks, "IgnorePublicAcls"),
            )
            return True if True in answers else None if None in answers else False

        if answer() is not False and not self._endpoint:  # the account may forbid it as a whole
            blocks.append(
                ask(lambda **_: self._s3control.get_public_access_block(AccountId=self.account))
            )
        return answer()

    def _is_ours(self, notification: Mapping[str, Any]) -> bool:
        return notification.get("Id") == self._names.notification

    def _notifications(self, bucket: str, at: Mapping[str, Any]) -> dict[str, Any]:
        with _translating(bucket):
            reply = self._s3.get_bucket_notification_configuration(**at)
        return {name: value for name, value in reply.items() if name != "ResponseMetadata"}

    def _put_notifications(
        self,
        bucket: str,
        at: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        skip_validation: bool,
    ) -> None:
        # Validating sends a test event to every destination, the owner's too.
        try:
            with _translating(bucket):
                self._s3.put_bucket_notification_configuration(
                    **at,
                    NotificationConfiguration=config,
                    SkipDestinationValidation=skip_validation,
                )
        except Unsupported as error:
            if "validate the following destination" not in error.message:
                raise
            raise Unavailable(
                f"S3 cannot deliver to a destination of {bucket}'s notifications: ours, which may "
                "just be too new, or one of the owner's that has been removed; try again, then "
                f"look at them ({error.message})",
                backend="aws",
            ) from error

    def _rule(self, name: str) -> dict[str, Any] | None:
        try:
            with _translating(f"rule {self._names.rule(name)}"):
                found: dict[str, Any] = self._events.describe_rule(Name=self._names.rule(name))
                return found
        except NotFound:
            return None

    def _enrol_by_sns(
        self, bucket: str, at: Mapping[str, Any], target: _Queue, config: dict[str, Any]
    ) -> None:
        name = self._names.topic(target.arn)
        with _translating(f"topic {name}"):
            topic = self._sns.create_topic(Name=name)["TopicArn"]
            attributes = self._sns.get_topic_attributes(TopicArn=topic)["Attributes"]
            policy = _with_statement(
                attributes.get("Policy", ""), self._names.from_s3(topic, self.account)
            )
            if policy is not None:
                self._sns.set_topic_attributes(
                    TopicArn=topic, AttributeName="Policy", AttributeValue=policy
                )
        self._let_send(target, self._names.from_sns(target))
        with _translating(f"topic {name}"):
            self._sns.subscribe(
                TopicArn=topic, Protocol="sqs", Endpoint=target.arn, ReturnSubscriptionArn=True
            )
        entry = {"Id": self._names.notification, "TopicArn": topic, "Events": _EVENTS}
        topics = config.get("TopicConfigurations", [])
        if entry not in topics:
            others = [t for t in topics if not self._is_ours(t)]
            config = {**config, "TopicConfigurations": [*others, entry]}
            self._put_notifications(bucket, at, config, skip_validation=False)

    def _enrol_by_eventbridge(
        self,
        bucket: str,
        at: Mapping[str, Any],
        target: _Queue,
        config: dict[str, Any],
        rule: Mapping[str, Any] | None,
    ) -> None:
        if target.region != self.region:
            raise Unsupported(
                f"EventBridge reaches no queue of another region, and {target.arn} is not in "
                f"{self.region}",
                backend="aws",
            )
        name = self._names.rule(at["Bucket"])
        is_on = "EventBridgeConfiguration" in config
        pattern = {
            "source": ["aws.s3"],
            "detail-type": ["Object Created"],
            "detail": {"bucket": {"name": [at["Bucket"]]}},
        }
        fresh = {"Tags": [{"Key": self._names.mark, "Value": _was(is_on)}]} if rule is None else {}
        with _translating(f"rule {name}"):
            if (
                rule is None
                or json.loads(rule.get("EventPattern", "{}")) != pattern
                or rule.get("State") != "ENABLED"
            ):
                # The tag is of the first time only: AWS ignores it for a rule that is there.
                self._events.put_rule(
                    Name=name, EventPattern=json.dumps(pattern), State="ENABLED", **fresh
                )
        self._let_send(target, self._names.from_eventbridge(target))
        with _translating(f"rule {name}"):
            reply = self._events.put_targets(
                Rule=name, Targets=[{"Id": self._names.target, "Arn": target.arn}]
            )
            _all_entries(reply, name)
        if not is_on:
            config = {**config, "EventBridgeConfiguration": {}}
            self._put_notifications(bucket, at, config, skip_validation=True)

    def _turned_on(self, rule: Mapping[str, Any]) -> bool:
        with _translating(f"rule {rule['Name']}"):
            tags = self._events.list_tags_for_resource(ResourceARN=rule["Arn"])["Tags"]
        return {"Key": self._names.mark, "Value": _was(is_on=False)} in tags

    def _others_hear(self, name: str) -> bool:
        """Return whether any rule but ours may be there for S3's events of the bucket `name`."""
        try:
            with _translating("the rules of the default bus"):
                for page in self._events.get_paginator("list_rules").paginate():
                    for rule in page["Rules"]:
                        if not self._names.is_rule(rule["Name"]) and _may_hear(rule, name):
                            return True
        except Denied:
            return True
        return False

    def _let_send(self, target: _Queue, statement: Mapping[str, Any]) -> None:
        with self._lock:
            if target.region not in self._sqs_by_region:
                self._sqs_by_region[target.region] = self._client("sqs", target.region)
            sqs = self._sqs_by_region[target.region]
        with _translating(target.arn):
            url = sqs.get_queue_url(QueueName=target.name, QueueOwnerAWSAccountId=target.account)[
                "QueueUrl"
            ]
            attributes = sqs.get_queue_attributes(
                QueueUrl=url, AttributeNames=["Policy", "KmsMasterKeyId"]
            ).get("Attributes", {})
            if attributes.get("KmsMasterKeyId", "").endswith("alias/aws/sqs"):
                raise Unsupported(
                    f"{target.arn} is encrypted with AWS's own KMS key, which SNS and EventBridge "
                    "may not use; change it to SSE-SQS, or to a key whose policy allows them",
                    backend="aws",
                )
            policy = _with_statement(attributes.get("Policy", ""), statement)
            if policy is not None:
                sqs.set_queue_attributes(QueueUrl=url, Attributes={"Policy": policy})

    def _create(self, bucket: str, name: str) -> dict[str, Any]:
        where = {} if self.region == "us-east-1" else {"LocationConstraint": self.region}
        try:
            with _translating(bucket):
                self._s3.create_bucket(
                    Bucket=name,
                    ObjectOwnership="BucketOwnerEnforced",
                    CreateBucketConfiguration={
                        **where,
                        "Tags": [{"Key": self._names.mark, "Value": "quarantine"}],
                    },
                )
        except Changed as error:  # between our look and now, or in another region
            raise Denied(
                f"{bucket} is there already, but not as a quarantine in {self.region}; "
                "choose another name",
                backend="aws",
            ) from error
        at = {"Bucket": name, "ExpectedBucketOwner": self.account}
        tags = self._read_tags(bucket, at)
        if tags.get(self._names.mark) != "quarantine":  # a server that makes buckets without tags
            tags[self._names.mark] = "quarantine"
            with _translating(bucket):
                self._s3.put_bucket_tagging(
                    **at,
                    Tagging={"TagSet": [{"Key": k, "Value": v} for k, v in tags.items()]},
                )
        return at

    def _lock_down(self, bucket: str, at: Mapping[str, Any], spec: QuarantineSpec) -> None:
        s3 = self._s3
        with _translating(bucket):
            s3.put_public_access_block(
                **at,
                PublicAccessBlockConfiguration={
                    "BlockPublicAcls": True,
                    "IgnorePublicAcls": True,
                    "BlockPublicPolicy": True,
                    "RestrictPublicBuckets": True,
                },
            )
            controls = {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
            if self._read(bucket, s3.get_bucket_ownership_controls, at, "OwnershipControls") != (
                controls
            ):
                s3.put_bucket_ownership_controls(**at, OwnershipControls=controls)
            if s3.get_bucket_versioning(**at).get("Status") != "Enabled":
                s3.put_bucket_versioning(**at, VersioningConfiguration={"Status": "Enabled"})
            has = _encryption(self._read(bucket, s3.get_bucket_encryption, at))
            if not has or (spec.kms_key and has != f"aws:kms {spec.kms_key}"):
                s3.put_bucket_encryption(
                    **at, ServerSideEncryptionConfiguration=_encrypt_with(spec.kms_key)
                )
            if not (self._endpoint or "").startswith("http:"):  # or we would lock ourselves out
                policy = _with_statement(
                    self._read_policy(bucket, at), self._names.tls_only(at["Bucket"])
                )
                if policy is not None:
                    s3.put_bucket_policy(**at, Policy=policy)
            rules = self._read(bucket, s3.get_bucket_lifecycle_configuration, at, "Rules") or []
            wanted = [r for r in rules if r.get("ID") != self._names.lifecycle]
            if spec.expire_days:
                wanted.append(_expiry(self._names.lifecycle, spec.expire_days))
            if wanted == rules:
                return
            if wanted:
                s3.put_bucket_lifecycle_configuration(
                    **at, LifecycleConfiguration={"Rules": wanted}
                )
            else:
                s3.delete_bucket_lifecycle(**at)

    def _read(
        self, bucket: str, call: Callable[..., Any], at: Mapping[str, Any], name: str = ""
    ) -> Any:
        """Return what is configured, or the part of it called `name`; {} if nothing is."""
        try:
            with _translating(bucket):
                reply = call(**at)
        except NotFound:
            return {}
        return reply[name] if name else reply

    def _read_tags(self, bucket: str, at: Mapping[str, Any]) -> dict[str, str]:
        return _tags(self._read(bucket, self._s3.get_bucket_tagging, at))

    def _read_policy(self, bucket: str, at: Mapping[str, Any]) -> str:
        policy: str = self._read(bucket, self._s3.get_bucket_policy, at).get("Policy", "")
        return policy


@dataclass(frozen=True, slots=True)
class _Queue:
    arn: str
    region: str
    account: str
    name: str


@dataclass(frozen=True, slots=True)
class _Names:
    """Every name that we give to something in the account, and what we write under it."""

    application: str
    partition: str
    account: str

    @property
    def mark(self) -> str:
        return self.application

    @property
    def notification(self) -> str:
        return f"{self.application}-objects"

    @property
    def target(self) -> str:
        return f"{self.application}-queue"

    @property
    def lifecycle(self) -> str:
        return f"{self.application}-expire"

    def topic(self, queue: str) -> str:
        return f"{self.application}-objects-{_digest(queue)}"

    def rule(self, bucket: str) -> str:
        return f"{self.application}-objects-{_digest(bucket)}"

    def is_rule(self, name: str) -> bool:
        return re.fullmatch(f"{self.application}-objects-[0-9a-f]{{16}}", name) is not None

    def from_s3(self, topic: str, account: str) -> Mapping[str, Any]:
        """Let the account's own buckets publish, and no other account through S3."""
        return {
            "Sid": self._sid("FromS3"),
            "Effect": "Allow",
            "Principal": {"Service": "s3.amazonaws.com"},
            "Action": "sns:Publish",
            "Resource": topic,
            "Condition": {
                "StringEquals": {"aws:SourceAccount": account},
                "ArnLike": {"aws:SourceArn": f"arn:{self.partition}:s3:*:*:*"},
            },
        }

    def from_sns(self, queue: _Queue) -> Mapping[str, Any]:
        source = f"arn:{self.partition}:sns:*:{self.account}:{self.topic(queue.arn)}"
        return self._to_queue("FromSns", "sns.amazonaws.com", queue, source)

    def from_eventbridge(self, queue: _Queue) -> Mapping[str, Any]:
        source = (
            f"arn:{self.partition}:events:{queue.region}:{self.account}:"
            f"rule/{self.application}-objects-*"
        )
        return self._to_queue("FromEventBridge", "events.amazonaws.com", queue, source)

    def tls_only(self, bucket: str) -> Mapping[str, Any]:
        arn = f"arn:{self.partition}:s3:::{bucket}"
        return {
            "Sid": self._sid("TlsOnly"),
            "Effect": "Deny",
            "Principal": "*",
            "Action": "s3:*",
            "Resource": [arn, f"{arn}/*"],
            "Condition": {"Bool": {"aws:SecureTransport": "false"}},
        }

    def _to_queue(self, what: str, service: str, queue: _Queue, source: str) -> Mapping[str, Any]:
        return {
            "Sid": self._sid(what),
            "Effect": "Allow",
            "Principal": {"Service": service},
            "Action": "sqs:SendMessage",
            "Resource": queue.arn,
            "Condition": {"ArnLike": {"aws:SourceArn": source}},
        }

    def _sid(self, what: str) -> str:
        return "".join(part.capitalize() for part in self.application.split("-")) + what


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _bucket_name(bucket: str) -> str:
    scheme, _, name = bucket.partition("://")
    if scheme != "s3" or not _BUCKET_NAME.fullmatch(name):
        raise NotFound(
            f"{bucket[:80]!a} is not a bucket of AWS; one is named s3://name", backend="aws"
        )
    return name


def _parse_queue(queue: str, partition: str, account: str, region: str) -> _Queue:
    if found := re.fullmatch(r"arn:[a-z-]+:sqs:([a-z0-9-]+):([0-9]{12}):([A-Za-z0-9_.-]+)", queue):
        return _Queue(queue, found[1], found[2], found[3])
    parts = urlsplit(queue)
    path, name = parts.path.strip("/").split("/"), ""
    if parts.scheme == "sqs" and len(path) <= 2:
        region, account, name = parts.netloc, *[account, *path][-2:]
    elif parts.scheme in ("http", "https") and len(path) >= 2:
        account, name = path[-2:]
        if found := re.fullmatch(r"sqs\.([a-z0-9-]+)\.amazonaws\.com(\.cn)?", parts.netloc):
            region = found[1]
    if (
        not re.fullmatch(r"[a-z0-9-]+", region)
        or not re.fullmatch(r"[0-9]{12}", account)
        or not re.fullmatch(r"[A-Za-z0-9_.-]+", name)
    ):
        raise Unsupported(
            "events of S3 go to an SQS queue, named by sqs://region/account/name, its ARN or its "
            "URL",
            backend="aws",
        )
    return _Queue(f"arn:{partition}:sqs:{region}:{account}:{name}", region, account, name)


def _overlapping(config: Mapping[str, Any], ours: str) -> list[str]:
    """Return the owner's destinations for created objects.

    Ours is for every key, so any rule for any way of creating an object overlaps with it.
    """
    return [
        entry.get("TopicArn") or entry.get("QueueArn") or entry.get("LambdaFunctionArn", "?")
        for kind in ("Topic", "Queue", "LambdaFunction")
        for entry in config.get(f"{kind}Configurations", ())
        if entry.get("Id") != ours
        and any(event.startswith("s3:ObjectCreated:") for event in entry["Events"])
    ]


def _may_hear(rule: Mapping[str, Any], bucket: str) -> bool:
    if "EventPattern" not in rule:
        return False  # a schedule
    pattern: Any = json.loads(rule["EventPattern"])

    def excludes(allowed: Any, value: str) -> bool:
        is_plain = isinstance(allowed, list) and all(isinstance(a, str) for a in allowed)
        return is_plain and value not in allowed

    names = pattern.get("detail", {}).get("bucket", {}).get("name")
    return not excludes(pattern.get("source"), "aws.s3") and not excludes(names, bucket)


def _was(is_on: bool) -> str:
    return "eventbridge-was-on" if is_on else "eventbridge-was-off"


def _all_entries(reply: Mapping[str, Any], rule: str) -> None:
    """Raise if EventBridge refused an entry, which it only says in its reply."""
    for entry in reply.get("FailedEntries", ()):
        raise Unavailable(
            f"EventBridge did not change the targets of {rule}: {entry.get('ErrorCode')}",
            backend="aws",
        )


def _with_statement(document: str, statement: Mapping[str, Any]) -> str | None:
    """Return the policy with `statement` in the place of ours, `None` if that changes nothing."""
    policy: Any = json.loads(document) if document else {"Version": "2012-10-17"}
    found = policy.get("Statement", [])
    statements = found if isinstance(found, list) else [found]
    if statement in statements:
        return None
    others = [s for s in statements if s.get("Sid") != statement["Sid"]]
    return json.dumps({**policy, "Statement": [*others, statement]})


def _canonical(document: str) -> str:
    return json.dumps(json.loads(document), sort_keys=True) if document else ""


def _tags(reply: Mapping[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in reply.get("TagSet", ())}


def _encryption(reply: Mapping[str, Any] | None) -> str | None:
    """Return the algorithm and the key if one is named, "" if there is none."""
    if reply is None:
        return None
    rules = reply.get("ServerSideEncryptionConfiguration", {}).get("Rules", ())
    for rule in rules:
        default = rule.get("ApplyServerSideEncryptionByDefault", {})
        return f"{default.get('SSEAlgorithm', '')} {default.get('KMSMasterKeyID', '')}".strip()
    return ""


def _encrypt_with(key: str) -> Mapping[str, Any]:
    by = {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key} if key else {"SSEAlgorithm": "AES256"}
    return {"Rules": [{"ApplyServerSideEncryptionByDefault": by, "BucketKeyEnabled": bool(key)}]}


def _expiry(name: str, days: int) -> Mapping[str, Any]:
    # With Days, S3 removes the delete markers that are left alone too (S3 user guide,
    # "Lifecycle configuration elements").
    return {
        "ID": name,
        "Status": "Enabled",
        "Filter": {"Prefix": ""},
        "Expiration": {"Days": days},
        "NoncurrentVersionExpiration": {"NoncurrentDays": 1},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7},
    }


def _grants_public(acl: Mapping[str, Any]) -> bool:
    return any(g.get("Grantee", {}).get("URI") in _PUBLIC_GRANTEES for g in acl.get("Grants", ()))


def _unless(is_open: bool | None, blocks: Sequence[Any], flag: str) -> bool | None:
    """Return whether the bucket is open, as nothing blocks it; `None` where either is unknown."""
    blocked = [
        None if b is None else b.get("PublicAccessBlockConfiguration", {}).get(flag, False)
        for b in blocks
    ]
    if is_open is False or True in blocked:
        return False
    return None if is_open is None or None in blocked else True


def _session(credentials: CredentialsProvider | None) -> boto3.Session:
    core = botocore.session.get_session()
    if credentials is not None:
        core.register_component("credential_provider", CredentialResolver([_Provider(credentials)]))
    return boto3.Session(botocore_session=core)


class _Provider(CredentialProvider):
    """What botocore asks for credentials when it makes a client."""

    METHOD = CANONICAL_NAME = "bucketward"

    def __init__(self, provide: CredentialsProvider) -> None:
        super().__init__()
        self._provide = provide

    def load(self) -> BotoCredentials:
        return _Provided(self._provide)


class _Provided(BotoCredentials):
    """Credentials that are asked for again for each request; the provider caches."""

    def __init__(self, provide: CredentialsProvider) -> None:
        super().__init__("", "", method=_Provider.METHOD)
        self._provide = provide

    def get_frozen_credentials(self) -> Any:
        now = self._provide()
        return BotoCredentials(
            now.access_key, now.secret_key, now.session_token or None
        ).get_frozen_credentials()


_NOT_FOUND = {  # besides status 404; the last two are another region's
    "ResourceNotFoundException",
    "AWS.SimpleQueueService.NonExistentQueue",
    "QueueDoesNotExist",
    "PermanentRedirect",
    "301",
}
_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "RequestExpired",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
}
_DENIED = {"AccessDenied", "AccessDeniedException", "AuthorizationError"}  # besides 401 and 403
_UNAVAILABLE = {  # besides 429 and 5xx
    "ConcurrentModificationException",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
}
_ACTIONS = {
    "DeleteObject": "s3:DeleteObjectVersion",
    "GetBucketEncryption": "s3:GetEncryptionConfiguration",
    "GetBucketLifecycleConfiguration": "s3:GetLifecycleConfiguration",
    "GetBucketNotificationConfiguration": "s3:GetBucketNotification",
    "GetPublicAccessBlock": "s3:GetBucketPublicAccessBlock",
    "HeadBucket": "s3:ListBucket",
    "ListBuckets": "s3:ListAllMyBuckets",
    "ListObjectVersions": "s3:ListBucketVersions",
    "ListObjectsV2": "s3:ListBucket",
    "DeleteBucketLifecycle": "s3:PutLifecycleConfiguration",
    "PutBucketEncryption": "s3:PutEncryptionConfiguration",
    "PutBucketLifecycleConfiguration": "s3:PutLifecycleConfiguration",
    "PutBucketNotificationConfiguration": "s3:PutBucketNotification",
    "PutPublicAccessBlock": "s3:PutBucketPublicAccessBlock",
}
"""The permissions that are not called what their operation is (Service Authorization Reference)."""
_BY_OPERATION = {action.partition(":")[2]: action for action in PERMISSIONS} | _ACTIONS


@contextmanager
def _translating(what: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        raise _translated(what, error) from error
    except (
        NoCredentialsError,
        PartialCredentialsError,
        CredentialRetrievalError,
        ProfileNotFound,
    ) as error:
        raise Denied(
            f"{what}: no credentials for AWS; give this machine a role, or set a profile or keys",
            backend="aws",
        ) from error
    except ParamValidationError as error:
        raise Unsupported(f"{what}: AWS does not take such a value", backend="aws") from error
    except BotoCoreError as error:
        raise Unavailable(
            f"{what}: AWS cannot be reached ({type(error).__name__}); it will be tried again",
            backend="aws",
        ) from error


def _translated(what: str, error: ClientError) -> Error:
    code = str(error.response.get("Error", {}).get("Code", ""))
    said = str(error.response.get("Error", {}).get("Message", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    operation = error.operation_name
    if code in _CREDENTIALS:
        return Denied(
            f"{what}: AWS does not accept the credentials ({code}); renew or correct them, "
            "and see that the clock is right",
            backend="aws",
        )
    if code == "BucketAlreadyExists":
        return Denied(f"{what} belongs to somebody else; choose another name", backend="aws")
    if code == "BucketAlreadyOwnedByYou":
        return Changed(f"{what} is there already", backend="aws")
    if code in _NOT_FOUND or status == 404:
        return NotFound(f"{what}: there is none ({operation}: {code})", backend="aws")
    if code in _UNAVAILABLE or status == 429 or (status >= 500 and status != 501):
        return Unavailable(f"{what}: {operation} failed ({code}); try again", backend="aws")
    if code in _DENIED or status in (401, 403):
        named = re.search(r"not authorized to perform: ([a-z0-9-]+:[A-Za-z]+)", said)
        permission = named[1] if named else _BY_OPERATION.get(operation, operation)
        return Denied(
            f"{what}: not allowed to {permission}; grant it to the role that Bucketward has",
            backend="aws",
            reason=permission,
        )
    detail = re.sub(r"[^ -~]+", " ", said)[:300]
    return Unsupported(f"{what}: {operation} was refused ({code}: {detail})", backend="aws")
