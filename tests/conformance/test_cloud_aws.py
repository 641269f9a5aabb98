import datetime as dt
import json
import threading
import time
import urllib.request
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote_plus

import boto3
import pytest

from bucketward.clouds.aws import PERMISSIONS, AwsCloud, open_aws
from bucketward.errors import ConfigError, Denied, NotFound, Unavailable, Unsupported
from bucketward.model import Credentials, QuarantineSpec
from bucketward.testing.cloud import CloudSuite
from servers.moto import run_moto
from servers.pki import make_certificate

ACCOUNT = "123456789012"  # moto's
REGION = "eu-west-1"
KEY = "in coming/a+b %41/ünï;&=.txt"


def credentials():
    return Credentials("AKIAIOSFODNN7EXAMPLE", "test-secret")


EVENTBRIDGE_IS_ON = set()


def open_moto(moto, region=REGION, **more):
    """Open moto's account, its one forgetfulness mended.

    moto acts on a bucket's EventBridgeConfiguration but does not return it as AWS does.
    """
    cloud = AwsCloud(
        ACCOUNT, region, credentials=more.pop("credentials", credentials), endpoint=moto.url, **more
    )

    def remember(params, **_):
        turn = EVENTBRIDGE_IS_ON.add
        if "EventBridgeConfiguration" not in params["NotificationConfiguration"]:
            turn = EVENTBRIDGE_IS_ON.discard
        turn(f"{moto.url}/{params['Bucket']}")

    def recall(parsed, http_response, **_):
        if http_response.url.partition("?")[0] in EVENTBRIDGE_IS_ON:
            parsed["EventBridgeConfiguration"] = {}

    events = cloud._s3.meta.events
    events.register("provide-client-params.s3.PutBucketNotificationConfiguration", remember)
    events.register("after-call.s3.GetBucketNotificationConfiguration", recall)
    return cloud


def make_bucket(moto, region=REGION, **more):
    name = f"uploads-{uuid.uuid4().hex[:12]}"
    where = (
        {}
        if region == "us-east-1"
        else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    )
    moto.client("s3", region).create_bucket(Bucket=name, **where, **more)
    return name


def make_queue(moto, region=REGION, **attributes):
    sqs = moto.client("sqs", region)
    name = f"queue-{uuid.uuid4().hex[:12]}"
    if attributes.get("FifoQueue"):
        name += ".fifo"
    url = sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]
    return url, f"arn:aws:sqs:{region}:{ACCOUNT}:{name}"


@pytest.fixture(scope="module")
def shared(moto):
    cloud = open_moto(moto)
    yield cloud
    cloud.close()


@pytest.fixture
def cloud(shared):
    return shared


@pytest.fixture
def name(moto):
    return make_bucket(moto)


@pytest.fixture
def queue(moto):
    return make_queue(moto)


def keys_in(moto, url, *, expect=1, region=REGION):
    """Return the keys of created objects that a queue was told of, whatever the envelope."""
    sqs = moto.client("sqs", region)
    found = []
    deadline = time.monotonic() + (10 if expect else 0.5)
    while time.monotonic() < deadline and (not expect or len(found) < expect):
        for message in sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get(
            "Messages", ()
        ):
            sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
            body = json.loads(message["Body"])
            if body.get("Type") == "Notification":
                body = json.loads(body["Message"])
            if body.get("detail-type") == "Object Created":
                found.append(body["detail"]["object"]["key"])
            found += [unquote_plus(r["s3"]["object"]["key"]) for r in body.get("Records", ())]
    return found


def notifications(moto, name):
    reply = moto.client("s3", REGION).get_bucket_notification_configuration(Bucket=name)
    return {kind: value for kind, value in reply.items() if kind != "ResponseMetadata"}


def rules(moto, name):
    pages = moto.client("events", REGION).get_paginator("list_rules").paginate()
    return [r for page in pages for r in page["Rules"] if name in r.get("EventPattern", "")]


def own(moto, name, *, events=("s3:ObjectCreated:Put",), prefix="in coming/"):
    """Configure a notification as the owner of the bucket, to a queue of the owner's."""
    url, arn = make_queue(moto)
    moto.client("s3", REGION).put_bucket_notification_configuration(
        Bucket=name,
        NotificationConfiguration={
            "QueueConfigurations": [
                {
                    "Id": "the-owners",
                    "QueueArn": arn,
                    "Events": list(events),
                    "Filter": {"Key": {"FilterRules": [{"Name": "prefix", "Value": prefix}]}},
                }
            ]
        },
    )
    return url, arn


class TestAwsCloud(CloudSuite):
    @pytest.fixture
    def cloud(self, moto, shared):
        self.moto = moto
        return shared

    @pytest.fixture
    def bucket(self, moto):
        return f"s3://{make_bucket(moto)}"

    @pytest.fixture
    def queue(self, moto):
        return make_queue(moto)[1]

    def configuration(self, cloud, bucket):
        name = bucket.removeprefix("s3://")
        return (
            CloudSuite.configuration(self, cloud, bucket),
            notifications(self.moto, name),
            rules(self.moto, name),
        )

    def configure_as_owner(self, cloud, bucket):
        name = bucket.removeprefix("s3://")
        own(self.moto, name, events=["s3:ObjectRemoved:*"])
        return lambda: notifications(self.moto, name)["QueueConfigurations"]

    def foreign_name(self, cloud):
        other = self.moto.client("sts").assume_role(
            RoleArn="arn:aws:iam::222222222222:role/other", RoleSessionName="other"
        )["Credentials"]
        name = f"foreign-{uuid.uuid4().hex[:12]}"
        boto3.client(
            "s3",
            endpoint_url=self.moto.url,
            region_name=REGION,
            aws_access_key_id=other["AccessKeyId"],
            aws_secret_access_key=other["SecretAccessKey"],
            aws_session_token=other["SessionToken"],
        ).create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
        return name

    def policy(self, bucket):
        return json.dumps(
            {
                "Version": "2012-10-17",
                "Statement": [
                    {
                        "Sid": "Guard",
                        "Effect": "Deny",
                        "Principal": "*",
                        "Action": "s3:GetObject",
                        "Resource": f"arn:aws:s3:::{bucket.removeprefix('s3://')}/*",
                    }
                ],
            }
        )


class TestAwsCloudBesideTheOwnersRule:
    """What concerns enrolling, with the owner's own notification in the way of ours."""

    cloud, queue = TestAwsCloud.cloud, TestAwsCloud.queue
    configuration, missing = TestAwsCloud.configuration, TestAwsCloud.missing
    test_enrolling_again_changes_nothing = CloudSuite.test_enrolling_again_changes_nothing
    test_withdrawing_undoes_it = CloudSuite.test_withdrawing_undoes_it
    test_enrolling_after_withdrawing_works = CloudSuite.test_enrolling_after_withdrawing_works
    test_what_the_owner_configured_stays = CloudSuite.test_what_the_owner_configured_stays
    test_eight_threads_enrol_as_one = CloudSuite.test_eight_threads_enrol_as_one

    @pytest.fixture
    def bucket(self, moto):
        name = make_bucket(moto)
        own(moto, name)
        return f"s3://{name}"

    def configure_as_owner(self, cloud, bucket):
        name = bucket.removeprefix("s3://")
        return lambda: notifications(self.moto, name)["QueueConfigurations"]


# Events really arrive


def test_after_enrolling_a_new_object_announces_itself_until_withdrawn(moto, cloud, name, queue):
    url, arn = queue
    s3 = moto.client("s3", REGION)
    s3.put_object(Bucket=name, Key="before", Body=b"")

    assert cloud.enrol(f"s3://{name}", arn) == "sns"
    s3.put_object(Bucket=name, Key=KEY, Body=b"x")
    assert keys_in(moto, url) == [KEY]

    cloud.withdraw(f"s3://{name}")
    s3.put_object(Bucket=name, Key="after", Body=b"x")
    assert keys_in(moto, url, expect=0) == []


def test_the_owners_own_notification_works_before_during_and_after(moto, cloud, name, queue):
    url, arn = queue
    owners_url, _ = own(moto, name)
    before = notifications(moto, name)
    s3 = moto.client("s3", REGION)

    assert cloud.enrol(f"s3://{name}", arn) == "eventbridge"
    s3.put_object(Bucket=name, Key=KEY, Body=b"x")
    assert keys_in(moto, url) == [KEY]
    assert keys_in(moto, owners_url) == [KEY]

    cloud.withdraw(f"s3://{name}")
    assert notifications(moto, name) == before
    assert rules(moto, name) == []
    s3.put_object(Bucket=name, Key=KEY, Body=b"y")
    assert keys_in(moto, owners_url) == [KEY]
    assert keys_in(moto, url, expect=0) == []


def test_a_rule_of_the_owners_for_other_events_is_not_in_the_way(moto, cloud, name, queue):
    owners_url, owners_arn = own(moto, name, events=["s3:ObjectRemoved:*"])

    assert cloud.enrol(f"s3://{name}", queue[1]) == "sns"
    s3 = moto.client("s3", REGION)
    s3.put_object(Bucket=name, Key=KEY, Body=b"x")
    s3.delete_object(Bucket=name, Key=KEY)

    assert keys_in(moto, queue[0]) == [KEY]
    assert keys_in(moto, owners_url) == [KEY]
    assert notifications(moto, name)["QueueConfigurations"][0]["QueueArn"] == owners_arn


def test_two_buckets_share_one_topic_and_withdrawing_one_leaves_the_other(moto, cloud, queue):
    url, arn = queue
    first, second = make_bucket(moto), make_bucket(moto)
    s3 = moto.client("s3", REGION)
    for bucket in (first, second):
        cloud.enrol(f"s3://{bucket}", arn)

    cloud.withdraw(f"s3://{first}")
    s3.put_object(Bucket=first, Key="first", Body=b"")
    s3.put_object(Bucket=second, Key="second", Body=b"")

    assert keys_in(moto, url) == ["second"]


def test_a_bucket_enrolled_with_another_queue_moves_to_it(moto, cloud, name, queue):
    new_url, new_arn = make_queue(moto)
    cloud.enrol(f"s3://{name}", queue[1])
    cloud.enrol(f"s3://{name}", new_arn)

    moto.client("s3", REGION).put_object(Bucket=name, Key=KEY, Body=b"x")

    assert keys_in(moto, new_url) == [KEY]
    assert keys_in(moto, queue[0], expect=0) == []


def test_a_queue_may_lie_in_another_region(moto, cloud, name):
    url, arn = make_queue(moto, "us-east-1")

    assert cloud.enrol(f"s3://{name}", arn) == "sns"
    moto.client("s3", REGION).put_object(Bucket=name, Key=KEY, Body=b"x")

    assert keys_in(moto, url, region="us-east-1") == [KEY]


def test_two_installations_on_one_bucket_do_not_disturb_each_other(moto, cloud, name, queue):
    other = open_moto(moto, application_id="bucketward-test")
    other_url, other_arn = make_queue(moto)
    bucket = f"s3://{name}"
    s3 = moto.client("s3", REGION)

    assert (cloud.enrol(bucket, queue[1]), other.enrol(bucket, other_arn)) == ("sns", "eventbridge")
    s3.put_object(Bucket=name, Key="both", Body=b"x")
    assert (keys_in(moto, queue[0]), keys_in(moto, other_url)) == (["both"], ["both"])

    cloud.withdraw(bucket)
    s3.put_object(Bucket=name, Key="second", Body=b"x")
    assert keys_in(moto, other_url) == ["second"]
    assert keys_in(moto, queue[0], expect=0) == []

    # Now sns would be free, but who is enrolled stays where he is.
    assert other.enrol(bucket, other_arn) == "eventbridge"
    other.withdraw(bucket)
    other.close()
    assert (rules(moto, name), notifications(moto, name)) == ([], {})


@pytest.mark.parametrize(
    "form",
    [
        "{arn}",
        "{url}",
        "https://sqs.eu-west-1.amazonaws.com/123456789012/{name}",
        "sqs://eu-west-1/123456789012/{name}",
        "sqs://eu-west-1/{name}?endpoint=http://127.0.0.1:1&lease=30",
    ],
)
def test_a_queue_is_named_by_its_arn_its_url_or_its_name(moto, cloud, name, queue, form):
    url, arn = queue
    cloud.enrol(f"s3://{name}", form.format(arn=arn, url=url, name=arn.rpartition(":")[2]))

    moto.client("s3", REGION).put_object(Bucket=name, Key=KEY, Body=b"x")
    assert keys_in(moto, url) == [KEY]


def test_a_queue_that_events_cannot_reach_is_refused_with_advice(moto, cloud, name):
    bucket = f"s3://{name}"
    _, fifo = make_queue(moto, FifoQueue="true")
    _, encrypted = make_queue(moto, KmsMasterKeyId="alias/aws/sqs")
    for queue, advice in [
        (f"arn:aws:sqs:{REGION}:222222222222:q", "another account"),
        (fifo, "FIFO"),
        (encrypted, "SSE-SQS"),
        ("sqlite:///queue.db", "SQS"),
        ("sqs://eu-west-1", "SQS"),
        ("sqs://eu-west-1/222222222222/q", "another account"),
        ("sqs://eu-west-1/x/q", "SQS"),
        ("https://evil.example/", "SQS"),
        ("", "SQS"),
    ]:
        with pytest.raises(Unsupported, match=advice):
            cloud.enrol(bucket, queue)
        assert notifications(moto, name) == {}
    with pytest.raises(NotFound):
        cloud.enrol(bucket, f"arn:aws:sqs:{REGION}:{ACCOUNT}:no-such-queue")
    assert notifications(moto, name) == {}


def test_where_no_route_is_left_the_owners_destination_is_named(moto, cloud, name):
    _, owners_arn = own(moto, name)
    _, far = make_queue(moto, "us-east-1")

    with pytest.raises(Unsupported, match="subscribe") as caught:
        cloud.enrol(f"s3://{name}", far)

    assert owners_arn in str(caught.value)
    assert far in str(caught.value)
    assert rules(moto, name) == []


def test_the_queue_is_opened_to_our_topic_and_rules_only_and_once(moto, cloud, name, queue):
    url, arn = queue
    sqs = moto.client("sqs", REGION)
    owners = {
        "Sid": "TheOwners",
        "Effect": "Allow",
        "Principal": {"AWS": "123456789012"},
        "Action": "sqs:SendMessage",
        "Resource": arn,
    }
    sqs.set_queue_attributes(
        QueueUrl=url,
        Attributes={"Policy": json.dumps({"Version": "2012-10-17", "Statement": owners})},
    )
    other = make_bucket(moto)
    own(moto, other)
    for _ in range(2):
        for bucket in (name, make_bucket(moto), other):
            cloud.enrol(f"s3://{bucket}", arn)

    policy = json.loads(
        sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["Policy"])["Attributes"]["Policy"]
    )

    assert [s["Sid"] for s in policy["Statement"]] == [
        "TheOwners",
        "BucketwardFromSns",
        "BucketwardFromEventBridge",
    ]
    assert policy["Statement"][0] == owners
    topic = notifications(moto, name)["TopicConfigurations"][0]["TopicArn"]
    assert policy["Statement"][1]["Condition"] == {
        "ArnLike": {"aws:SourceArn": topic.replace(f":{REGION}:", ":*:")}
    }
    source = policy["Statement"][2]["Condition"]["ArnLike"]["aws:SourceArn"]
    assert source == f"arn:aws:events:{REGION}:{ACCOUNT}:rule/bucketward-objects-*"
    assert rules(moto, other)[0]["Arn"].startswith(source[:-1])


def test_the_topic_hears_buckets_of_this_account_only(moto, cloud, name, queue):
    cloud.enrol(f"s3://{name}", queue[1])
    topic = notifications(moto, name)["TopicConfigurations"][0]["TopicArn"]
    attributes = moto.client("sns", REGION).get_topic_attributes(TopicArn=topic)["Attributes"]

    (ours,) = [
        s for s in json.loads(attributes["Policy"])["Statement"] if s["Sid"] == "BucketwardFromS3"
    ]

    assert ours["Condition"]["StringEquals"] == {"aws:SourceAccount": ACCOUNT}
    assert ours["Principal"] == {"Service": "s3.amazonaws.com"}
    assert "bucketward" in topic
    assert any(
        s["Sid"] != "BucketwardFromS3" for s in json.loads(attributes["Policy"])["Statement"]
    )


def test_eventbridge_stays_on_for_others_who_came_to_rely_on_it(moto, cloud, name, queue):
    own(moto, name)
    url, arn = make_queue(moto)
    events = moto.client("events", REGION)
    cloud.enrol(f"s3://{name}", queue[1])
    rule = f"others-{uuid.uuid4().hex[:8]}"
    events.put_rule(
        Name=rule,
        EventPattern=json.dumps(
            {"source": ["aws.s3"], "detail": {"bucket": {"name": [{"prefix": name[:20]}]}}}
        ),
    )
    events.put_targets(Rule=rule, Targets=[{"Id": "q", "Arn": arn}])

    cloud.withdraw(f"s3://{name}")

    moto.client("s3", REGION).put_object(Bucket=name, Key=KEY, Body=b"x")
    assert keys_in(moto, url) == [KEY]
    assert keys_in(moto, queue[0], expect=0) == []
    events.remove_targets(Rule=rule, Ids=["q"])
    events.delete_rule(Name=rule)


def test_a_target_the_owner_hung_on_our_rule_is_not_taken_away(moto, cloud, name, queue):
    own(moto, name)
    cloud.enrol(f"s3://{name}", queue[1])
    (rule,) = rules(moto, name)
    events = moto.client("events", REGION)
    _, arn = make_queue(moto)
    events.put_targets(Rule=rule["Name"], Targets=[{"Id": "theirs", "Arn": arn}])

    cloud.withdraw(f"s3://{name}")

    targets = events.list_targets_by_rule(Rule=rule["Name"])["Targets"]
    assert [t["Id"] for t in targets] == ["theirs"]
    events.remove_targets(Rule=rule["Name"], Ids=["theirs"])
    events.delete_rule(Name=rule["Name"])


def test_the_rule_of_a_bucket_that_is_gone_is_cleared_away(moto, cloud, name, queue):
    own(moto, name)
    cloud.enrol(f"s3://{name}", queue[1])
    moto.client("s3", REGION).delete_bucket(Bucket=name)

    cloud.withdraw(f"s3://{name}")

    assert rules(moto, name) == []


# Buckets


def test_buckets_of_other_regions_are_neither_listed_nor_touched(moto, cloud, queue):
    there = make_bucket(moto, "us-east-1")
    bucket = f"s3://{there}"

    assert bucket not in cloud.buckets()
    for call in (
        lambda: cloud.describe(bucket),
        lambda: cloud.enrol(bucket, queue[1]),
        lambda: cloud.bucket_policy(bucket),
        lambda: cloud.replace_bucket_policy(bucket, "{}", ""),
        lambda: cloud.missing_permissions(bucket),
    ):
        with pytest.raises(NotFound, match="is in us-east-1"):
            call()
    with pytest.raises(Denied):
        cloud.make_quarantine(QuarantineSpec(there))
    east = open_moto(moto, "us-east-1")
    assert bucket in east.buckets()
    assert east.describe(bucket).region == "us-east-1"
    east.close()


def test_a_bucket_is_described_as_it_is(moto, cloud, name):
    s3 = moto.client("s3", REGION)
    bucket = f"s3://{name}"
    info = cloud.describe(bucket)
    assert (info.has_versions, info.is_public, info.encryption) == (False, False, "")
    assert dict(info.tags) == {}
    assert abs(info.created_at - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=1)

    s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    s3.put_bucket_tagging(Bucket=name, Tagging={"TagSet": [{"Key": "team", "Value": "ü"}]})
    s3.put_bucket_encryption(
        Bucket=name,
        ServerSideEncryptionConfiguration={
            "Rules": [
                {
                    "ApplyServerSideEncryptionByDefault": {
                        "SSEAlgorithm": "aws:kms",
                        "KMSMasterKeyID": "alias/k",
                    }
                }
            ]
        },
    )
    info = cloud.describe(bucket)
    assert (info.has_versions, info.encryption) == (True, "aws:kms alias/k")
    assert dict(info.tags) == {"team": "ü"}

    s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Suspended"})
    assert cloud.describe(bucket).has_versions is False


def block(**flags):
    names = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    return {name: flags.get(name, False) for name in names}


def test_public_is_what_a_policy_or_an_acl_opens_and_no_block_closes(moto, cloud, name):
    s3 = moto.client("s3", REGION)
    bucket = f"s3://{name}"
    s3.put_bucket_acl(Bucket=name, ACL="public-read")
    assert cloud.describe(bucket).is_public is True

    s3.put_public_access_block(
        Bucket=name, PublicAccessBlockConfiguration=block(RestrictPublicBuckets=True)
    )
    assert cloud.describe(bucket).is_public is True

    s3.put_public_access_block(
        Bucket=name, PublicAccessBlockConfiguration=block(IgnorePublicAcls=True)
    )
    assert cloud.describe(bucket).is_public is False

    s3.put_bucket_acl(Bucket=name, ACL="private")
    s3.delete_public_access_block(Bucket=name)
    s3.put_bucket_policy(
        Bucket=name,
        Policy=json.dumps(
            {
                "Version": "2012-10-17",
                "Statement": [
                    {
                        "Effect": "Allow",
                        "Principal": "*",
                        "Action": "s3:GetObject",
                        "Resource": f"arn:aws:s3:::{name}/*",
                    }
                ],
            }
        ),
    )
    assert cloud.describe(bucket).is_public is True

    s3.put_public_access_block(
        Bucket=name, PublicAccessBlockConfiguration=block(RestrictPublicBuckets=True)
    )
    assert cloud.describe(bucket).is_public is False


def test_every_request_about_a_bucket_names_its_owner(moto, cloud, name, queue):
    # moto does not check it; AWS answers 403 if the bucket has become somebody else's
    # (S3 user guide, "Verifying bucket ownership with bucket owner condition").
    without = []

    def look(request, **_):
        path = request.url.partition("://")[2].partition("/")[2].partition("?")[0]
        if path and not request.headers.get("x-amz-expected-bucket-owner"):
            without.append((request.method, request.url))

    cloud._s3.meta.events.register("before-send.s3", look)
    bucket = f"s3://{name}"
    cloud.describe(bucket)
    cloud.enrol(bucket, queue[1])
    cloud.withdraw(bucket)
    cloud.missing_permissions(bucket)
    cloud.replace_bucket_policy(bucket, "{}", "")
    cloud.replace_bucket_policy(bucket, "", "{}")
    assert without == []

    made = f"quarantine-{uuid.uuid4().hex[:12]}"
    cloud.make_quarantine(QuarantineSpec(made, expire_days=1))
    cloud.make_quarantine(QuarantineSpec(made))
    assert [method for method, _ in without] == ["PUT"]  # making it, which AWS takes no owner for


# Quarantine


def locked(moto, name):
    s3 = moto.client("s3", REGION)
    assert all(s3.get_public_access_block(Bucket=name)["PublicAccessBlockConfiguration"].values())
    assert s3.get_bucket_versioning(Bucket=name)["Status"] == "Enabled"
    ownership = s3.get_bucket_ownership_controls(Bucket=name)["OwnershipControls"]["Rules"]
    assert ownership == [{"ObjectOwnership": "BucketOwnerEnforced"}]
    tags = s3.get_bucket_tagging(Bucket=name)["TagSet"]
    assert {"Key": "bucketward", "Value": "quarantine"} in tags
    rules = s3.get_bucket_encryption(Bucket=name)["ServerSideEncryptionConfiguration"]["Rules"]
    return rules[0]["ApplyServerSideEncryptionByDefault"]


def lifecycle(moto, name):
    s3 = moto.client("s3", REGION)
    try:
        rules = s3.get_bucket_lifecycle_configuration(Bucket=name)["Rules"]
    except s3.exceptions.ClientError:
        return {}
    return {rule["ID"]: rule for rule in rules}


def test_a_quarantine_is_locked_down_and_what_was_loosened_is_mended(moto, cloud):
    name = f"quarantine-{uuid.uuid4().hex[:12]}"
    s3 = moto.client("s3", REGION)
    cloud.make_quarantine(QuarantineSpec(name, expire_days=30))
    assert locked(moto, name) == {"SSEAlgorithm": "AES256"}
    assert lifecycle(moto, name)["bucketward-expire"]["Expiration"] == {"Days": 30}

    s3.delete_public_access_block(Bucket=name)
    s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Suspended"})
    s3.delete_bucket_encryption(Bucket=name)
    s3.delete_bucket_ownership_controls(Bucket=name)
    cloud.make_quarantine(QuarantineSpec(name, expire_days=7))

    assert locked(moto, name) == {"SSEAlgorithm": "AES256"}
    assert lifecycle(moto, name)["bucketward-expire"]["Expiration"] == {"Days": 7}
    assert lifecycle(moto, name)["bucketward-expire"]["NoncurrentVersionExpiration"] == {
        "NoncurrentDays": 1
    }


def test_what_an_operator_added_to_the_quarantine_stays(moto, cloud):
    name = f"quarantine-{uuid.uuid4().hex[:12]}"
    s3 = moto.client("s3", REGION)
    cloud.make_quarantine(QuarantineSpec(name, expire_days=30))
    theirs = {
        "ID": "theirs",
        "Status": "Enabled",
        "Filter": {"Prefix": "logs/"},
        "Expiration": {"Days": 1},
    }
    s3.put_bucket_lifecycle_configuration(
        Bucket=name,
        LifecycleConfiguration={"Rules": [*lifecycle(moto, name).values(), theirs]},
    )
    s3.put_bucket_tagging(
        Bucket=name,
        Tagging={
            "TagSet": [{"Key": "bucketward", "Value": "quarantine"}, {"Key": "t", "Value": "1"}]
        },
    )
    kms = {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": "alias/theirs"}
    s3.put_bucket_encryption(
        Bucket=name,
        ServerSideEncryptionConfiguration={"Rules": [{"ApplyServerSideEncryptionByDefault": kms}]},
    )

    cloud.make_quarantine(QuarantineSpec(name))

    assert locked(moto, name) == kms
    assert set(lifecycle(moto, name)) == {"theirs"}
    assert dict(cloud.describe(f"s3://{name}").tags) == {"bucketward": "quarantine", "t": "1"}

    cloud.make_quarantine(QuarantineSpec(name, kms_key="alias/ours"))
    assert locked(moto, name)["KMSMasterKeyID"] == "alias/ours"


def test_a_bucket_of_the_account_that_is_no_quarantine_is_not_touched(moto, cloud, name):
    before = cloud.describe(f"s3://{name}")

    with pytest.raises(Denied, match="bucketward=quarantine"):
        cloud.make_quarantine(QuarantineSpec(name, expire_days=1))

    assert cloud.describe(f"s3://{name}") == before
    assert lifecycle(moto, name) == {}


def test_a_quarantine_in_us_east_1_needs_no_location(moto):
    east = open_moto(moto, "us-east-1")
    name = f"quarantine-{uuid.uuid4().hex[:12]}"

    assert east.make_quarantine(QuarantineSpec(name)) == f"s3://{name}"
    assert east.make_quarantine(QuarantineSpec(name)) == f"s3://{name}"
    assert east.describe(f"s3://{name}").region == "us-east-1"
    east.close()


def test_over_https_a_quarantine_refuses_plain_http(tmp_path, monkeypatch):
    certificate = make_certificate(tmp_path, "127.0.0.1")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    with run_moto("-c", str(certificate), "-k", str(certificate)) as server:
        assert server.url.startswith("https:")
        cloud = open_moto(server)
        name = f"quarantine-{uuid.uuid4().hex[:12]}"
        bucket = cloud.make_quarantine(QuarantineSpec(name))
        first = json.loads(cloud.bucket_policy(bucket))
        theirs = {**first["Statement"][0], "Sid": "Theirs", "Action": "s3:PutObject"}
        both = {**first, "Statement": [theirs]}
        cloud.replace_bucket_policy(bucket, json.dumps(both), json.dumps(first))
        cloud.make_quarantine(QuarantineSpec(name))
        second = json.loads(cloud.bucket_policy(bucket))
        cloud.close()

    (statement,) = first["Statement"]
    assert statement["Effect"] == "Deny"
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert statement["Resource"] == [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"]
    assert second["Statement"] == [theirs, statement]


# Permissions, credentials and failures


@pytest.fixture(scope="module")
def strict():
    """Yield clouds of users with different policies on a moto that checks them."""
    with run_moto() as server:
        iam = server.client("iam")
        made = make_bucket(server)
        server.client("s3", REGION).put_object(Bucket=made, Key="an object", Body=b"x")
        users = {}
        for user, document in {
            "all": allow("*"),
            "declared": allow(*PERMISSIONS, "sts:GetCallerIdentity"),
            "reader": allow(*(p for p in PERMISSIONS if p.startswith(("s3:Get", "s3:List")))),
            "no-bucket": allow("s3:GetObject"),
            "blind": allow("s3:ListBucket", "s3:ListAllMyBuckets", "s3:GetBucketVersioning"),
        }.items():
            iam.create_user(UserName=user)
            iam.put_user_policy(UserName=user, PolicyName="p", PolicyDocument=document)
            key = iam.create_access_key(UserName=user)["AccessKey"]
            users[user] = Credentials(key["AccessKeyId"], key["SecretAccessKey"])
        post(server, "reset-auth", b"0")
        opened = {user: open_moto(server, credentials=lambda c=c: c) for user, c in users.items()}
        yield opened, f"s3://{made}", server
        for cloud in opened.values():
            cloud.close()


MOTOS = ["s3:HeadBucket"]
"""Actions that moto asks for and IAM does not have."""


def allow(*actions):
    return json.dumps(
        {
            "Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", "Action": [*actions, *MOTOS], "Resource": "*"}],
        }
    )


def post(server, what, body):
    request = urllib.request.Request(
        f"{server.url}/moto-api/{what}", body, {"Content-Type": "text/plain"}, method="POST"
    )
    urllib.request.urlopen(request, timeout=10).close()


def test_the_declared_permissions_are_enough_for_everything(strict):
    opened, bucket, _ = strict
    cloud = opened["declared"]
    cloud.ping()
    assert bucket in cloud.buckets()
    assert cloud.describe(bucket).has_versions is False
    assert cloud.missing_permissions(bucket) == {}
    made = cloud.make_quarantine(QuarantineSpec(f"q-{uuid.uuid4().hex[:8]}", expire_days=3))
    cloud.make_quarantine(QuarantineSpec(made.removeprefix("s3://")))
    policy = json.dumps(
        {
            "Version": "2012-10-17",
            "Statement": [
                {
                    "Effect": "Deny",
                    "Principal": "*",
                    "Action": "s3:PutObject",
                    "Resource": f"arn:aws:s3:::{bucket[5:]}/no",
                }
            ],
        }
    )
    cloud.replace_bucket_policy(bucket, policy, "")
    cloud.replace_bucket_policy(bucket, "", policy)
    cloud.regions()


def test_what_is_missing_is_named_with_its_reason(strict):
    opened, bucket, _ = strict

    missing = opened["reader"].missing_permissions(bucket)
    assert set(missing) == {
        "s3:PutObjectTagging",
        "s3:PutObjectVersionTagging",
        "s3:DeleteObjectVersion",
    }
    assert missing["s3:PutObjectTagging"] == PERMISSIONS["s3:PutObjectTagging"]

    missing = opened["blind"].missing_permissions(bucket)
    assert {"s3:GetObject", "s3:GetObjectTagging", "s3:GetBucketNotification"} <= set(missing)
    assert "s3:ListBucket" not in missing


def test_without_listing_nothing_else_is_claimed_about_objects(strict):
    opened, bucket, _ = strict

    missing = opened["no-bucket"].missing_permissions(bucket)

    assert "s3:ListBucket" in missing
    assert not any("Object" in permission for permission in missing)


def test_what_we_may_not_know_of_a_bucket_is_none_and_not_guessed(strict):
    opened, bucket, _ = strict

    info = opened["no-bucket"].describe(bucket)

    assert (info.has_versions, info.is_public, info.encryption) == (None, None, None)
    assert (info.created_at, info.requester_pays) == (None, None)
    info = opened["all"].describe(bucket)
    assert (info.has_versions, info.is_public, info.encryption) == (False, False, "")


def test_a_denial_names_the_permission_and_keeps_the_secret(strict):
    opened, bucket, _ = strict

    with pytest.raises(Denied) as caught:
        opened["reader"].replace_bucket_policy(bucket, "{}", "")

    assert caught.value.reason == "s3:PutBucketPolicy"
    assert "s3:PutBucketPolicy" in str(caught.value)
    assert bucket in str(caught.value)


def test_credentials_that_nobody_knows_are_denied_as_such(strict):
    _, bucket, server = strict
    cloud = open_moto(server, credentials=lambda: Credentials("AKIANOBODYKNOWSTHIS1", "s3cr3t"))

    for call in (
        cloud.ping,
        cloud.buckets,
        lambda: cloud.describe(bucket),
        lambda: cloud.missing_permissions(bucket),
    ):
        with pytest.raises(Denied) as caught:
            call()
        assert "s3cr3t" not in str(caught.value)
    cloud.close()


def test_credentials_are_asked_for_again_so_that_they_may_change(moto):
    asked = []

    def rotating():
        asked.append(None)
        return Credentials("AKIAIOSFODNN7EXAMPLE", f"secret-{len(asked)}", "token")

    cloud = open_moto(moto, credentials=rotating)
    cloud.ping()
    first = len(asked)
    cloud.ping()

    assert 0 < first < len(asked)
    cloud.close()


def test_a_provider_of_credentials_that_fails_says_so_itself(moto):
    def failing():
        raise Denied("the role cannot be assumed", backend="sts", reason="sts:AssumeRole")

    cloud = open_moto(moto, credentials=failing)
    with pytest.raises(Denied, match="cannot be assumed"):
        cloud.buckets()
    cloud.close()


def test_without_any_credentials_the_operator_is_told_what_to_do(moto):
    cloud = AwsCloud(ACCOUNT, REGION, endpoint=moto.url)

    with pytest.raises(Denied, match="no credentials"):
        cloud.ping()
    cloud.close()


def test_credentials_of_another_account_are_refused_by_ping(moto):
    cloud = AwsCloud("222222222222", REGION, credentials=credentials, endpoint=moto.url)

    with pytest.raises(ConfigError, match="123456789012"):
        cloud.ping()
    cloud.close()


def test_where_nobody_answers_it_is_tried_again_later():
    cloud = AwsCloud(ACCOUNT, REGION, credentials=credentials, endpoint="http://127.0.0.1:1")

    with pytest.raises(Unavailable, match="cannot be reached"):
        cloud.buckets()
    cloud.close()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (503, "SlowDown", Unavailable),
        (409, "OperationAborted", Unavailable),
        (403, "SignatureDoesNotMatch", Denied),
        (400, "ExpiredToken", Denied),
        (403, "AllAccessDisabled", Denied),
        (501, "NotImplemented", Unsupported),
        (405, "MethodNotAllowed", Unsupported),
        (404, "NoSuchBucket", NotFound),
    ],
)
def test_every_error_of_the_provider_becomes_one_of_the_six(status, code, expected):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = (
                f"<Error><Code>{code}</Code><Message>\n\u202ehostile\r\n</Message></Error>".encode()
            )
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        cloud = AwsCloud(
            ACCOUNT,
            REGION,
            credentials=credentials,
            endpoint=f"http://127.0.0.1:{server.server_address[1]}",
        )
        try:
            with pytest.raises(expected) as caught:
                cloud.buckets()
        finally:
            cloud.close()
            server.shutdown()
            thread.join()

    assert caught.value.backend == "aws"
    assert str(caught.value).isprintable()


def test_regions_that_we_may_not_list_are_those_with_buckets(moto, cloud):
    make_bucket(moto, "ap-south-1")

    assert {"ap-south-1", REGION} <= set(cloud.regions())


def test_it_is_opened_by_a_url():
    cloud = open_aws(
        "aws://123456789012/eu-north-1?endpoint=http%3A%2F%2F127.0.0.1%3A1&application=ward-2"
    )
    assert (cloud.account, cloud.region) == ("123456789012", "eu-north-1")
    cloud.close()

    for url in (
        "aws://",
        "aws://123/eu-west-1",
        "aws://123456789012",
        "aws://123456789012/nowhere-9",
        "aws://123456789012/EU",
        "aws://123456789012/eu-west-1?x=1",
        "aws://123456789012/eu-west-1?application=No_Good",
        "s3://123456789012/eu-west-1",
    ):
        with pytest.raises(ConfigError):
            open_aws(url)
