"""Every form of event that a queue may hold, and everything else that somebody may put there."""

import copy
import json
from datetime import UTC, datetime, timedelta, timezone
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketward.errors import Unsupported
from bucketward.events import MAX_BODY, Event, decode, encode, newer
from bucketward.model import ObjectRef

# S3 user guide, "Event message structure".
AWS_RECORD = {
    "eventVersion": "2.1",
    "eventSource": "aws:s3",
    "awsRegion": "us-west-2",
    "eventTime": "1970-01-01T00:00:00.000Z",
    "eventName": "ObjectCreated:Put",
    "userIdentity": {"principalId": "AWS:AIDAJDPLRKLG7UEXAMPLE"},
    "requestParameters": {"sourceIPAddress": "127.0.0.1"},
    "responseElements": {
        "x-amz-request-id": "C3D13FE58DE4C810",
        "x-amz-id-2": "FMyUVURIY8/IgAtTv8xRjskZQpcIZ9KG4V5Wp6S7S/JRWeUWerMUE5JgHvANOjpD",
    },
    "s3": {
        "s3SchemaVersion": "1.0",
        "configurationId": "testConfigRule",
        "bucket": {
            "name": "amzn-s3-demo-bucket",
            "ownerIdentity": {"principalId": "A3NL1KOZZKExample"},
            "arn": "arn:aws:s3:::amzn-s3-demo-bucket",
        },
        "object": {
            "key": "HappyFace.jpg",
            "size": 1024,
            "eTag": "d41d8cd98f00b204e9800998ecf8427e",
            "versionId": "096fKKXTRTtl3on89fVO.nfljtsv6qko",
            "sequencer": "0055AED6DCD90281E5",
        },
    },
}
AWS_REF = ObjectRef(
    bucket="s3://amzn-s3-demo-bucket",
    key="HappyFace.jpg",
    version_id="096fKKXTRTtl3on89fVO.nfljtsv6qko",
    etag="d41d8cd98f00b204e9800998ecf8427e",
    size=1024,
    sequencer="0055AED6DCD90281E5",
    event_at=datetime(1970, 1, 1, tzinfo=UTC),
    uploaded_by="AWS:AIDAJDPLRKLG7UEXAMPLE",
)

# S3 user guide, "EventBridge event message structure".
BRIDGE = {
    "version": "0",
    "id": "17793124-05d4-b198-2fde-7ededc63b103",
    "detail-type": "Object Created",
    "source": "aws.s3",
    "account": "111122223333",
    "time": "2021-11-12T00:00:00Z",
    "region": "ca-central-1",
    "resources": ["arn:aws:s3:::amzn-s3-demo-bucket1"],
    "detail": {
        "version": "0",
        "bucket": {"name": "amzn-s3-demo-bucket1"},
        "object": {
            "key": "example-key",
            "size": 5,
            "etag": "b1946ac92492d2347c6235b4d2611184",
            "version-id": "IYV3p45BT0ac8hjHg1houSdS1a.Mro8e",
            "sequencer": "617f08299329d189",
        },
        "request-id": "N4N7GDK58NMKJ12R",
        "requester": "123456789012",
        "source-ip-address": "1.2.3.4",
        "reason": "PutObject",
    },
}
BRIDGE_REF = ObjectRef(
    bucket="s3://amzn-s3-demo-bucket1",
    key="example-key",
    version_id="IYV3p45BT0ac8hjHg1houSdS1a.Mro8e",
    etag="b1946ac92492d2347c6235b4d2611184",
    size=5,
    sequencer="617f08299329d189",
    event_at=datetime(2021, 11, 12, tzinfo=UTC),
    uploaded_by="123456789012",
)

# minio issue 7665, with the rest of the record as in issue 15200.
MINIO = {
    "EventName": "s3:ObjectCreated:Put",
    "Key": "mybucket/5cdfb588cea4de1db3034a87/colors.xml",
    "Records": [
        {
            "eventVersion": "2.0",
            "eventSource": "minio:s3",
            "awsRegion": "",
            "eventTime": "2019-05-18T07:34:32Z",
            "eventName": "s3:ObjectCreated:Put",
            "userIdentity": {"principalId": "minio"},
            "requestParameters": {"accessKey": "minio", "region": "", "sourceIPAddress": "172.1"},
            "responseElements": {"x-amz-request-id": "159FB6B233B08AF0"},
            "s3": {
                "s3SchemaVersion": "1.0",
                "configurationId": "Config",
                "bucket": {
                    "name": "mybucket",
                    "ownerIdentity": {"principalId": "minio"},
                    "arn": "arn:aws:s3:::mybucket",
                },
                "object": {
                    "key": "5cdfb588cea4de1db3034a87%2Fcolors.xml",
                    "size": 3357,
                    "eTag": "5b4fa6a4a2f6b1f0e1bb3b3d0f0f9c0e",
                    "contentType": "application/xml",
                    "userMetadata": {"content-type": "application/xml"},
                    "sequencer": "159FB6B233B08AF0",
                },
            },
            "source": {"host": "172.18.0.1", "port": "", "userAgent": "MinIO (linux; amd64)"},
        }
    ],
}

# Ceph documentation, "Bucket Notifications", "Events".
CEPH = {
    "Records": [
        {
            "eventVersion": "2.1",
            "eventSource": "ceph:s3",
            "awsRegion": "us-east-1",
            "eventTime": "2019-11-22T13:47:35.124724Z",
            "eventName": "ObjectCreated:Put",
            "userIdentity": {"principalId": "tester"},
            "requestParameters": {"sourceIPAddress": ""},
            "responseElements": {
                "x-amz-request-id": "503a4c37-85eb-47cd-8681-2817e80b4281.5330.903595",
                "x-amz-id-2": "14d2-zone1-zonegroup1",
            },
            "s3": {
                "s3SchemaVersion": "1.0",
                "configurationId": "mynotif1",
                "bucket": {
                    "name": "mybucket1",
                    "ownerIdentity": {"principalId": "tester"},
                    "arn": "arn:aws:s3:us-east-1::mybucket1",
                    "id": "503a4c37-85eb-47cd-8681-2817e80b4281.5332.38",
                },
                "object": {
                    "key": "myimage1.jpg",
                    "size": "1024",
                    "eTag": "37b51d194a7513e45b56f6524f2d51f2",
                    "versionId": "",
                    "sequencer": "F7E6D75DC742D108",
                    "metadata": [],
                    "tags": [],
                },
            },
            "eventId": "",
            "opaqueData": "me@example.com",
        }
    ]
}

TEST_EVENT = {
    "Service": "Amazon S3",
    "Event": "s3:TestEvent",
    "Time": "2014-10-13T15:57:02.089Z",
    "Bucket": "amzn-s3-demo-bucket",
    "RequestId": "5582815E1AEA5ADF",
    "HostId": "8cLeGAmw098X5cv4Zkwcmo8vvZa3eH3eKxsPzbB9wrR+YstdA6Knx4Ip8EXAMPLE",
}


def s3(*records, **extra):
    return json.dumps({"Records": list(records), **extra})


def aws(name="ObjectCreated:Put", source="aws:s3", **changes):
    """Return Amazon's record with another name, source and object."""
    record = copy.deepcopy(AWS_RECORD)
    record["eventName"], record["eventSource"] = name, source
    record["s3"]["object"].update(changes)
    return record


def bridge(kind="Object Created", /, *, detail=None, **changes):
    event = copy.deepcopy(BRIDGE)
    event["detail-type"] = kind
    event["detail"].update(detail or {})
    event["detail"]["object"].update(changes)
    return json.dumps(event)


def sns(message, **changes):
    return json.dumps(
        {
            "Type": "Notification",
            "MessageId": "22b80b92-fdea-4c2c-8f9d-bdfb0c7bf324",
            "TopicArn": "arn:aws:sns:us-west-2:123456789012:MyTopic",
            "Subject": "Amazon S3 Notification",
            "Message": message,
            "Timestamp": "2012-05-02T00:54:06.655Z",
            "SignatureVersion": "1",
            "Signature": "EXAMPLE",
            "SigningCertURL": "https://sns.us-west-2.amazonaws.com/SimpleNotificationService.pem",
            "UnsubscribeURL": "https://sns.us-west-2.amazonaws.com/?Action=Unsubscribe",
            **changes,
        }
    )


def key_of(body):
    (ref,) = decode(body).refs
    return ref.key


def only_malformed(body):
    event = decode(body)
    assert event == Event(malformed=event.malformed)
    (text,) = event.malformed
    return text


def test_amazons_event_names_the_exact_object():
    assert decode(s3(AWS_RECORD)) == Event(refs=(AWS_REF,))


def test_events_come_through_sns_wrapped_and_raw():
    assert decode(sns(s3(AWS_RECORD))) == decode(s3(AWS_RECORD))
    assert decode(sns(bridge())) == decode(bridge())
    assert decode(sns(sns(s3(AWS_RECORD)))) == decode(s3(AWS_RECORD))


def test_an_event_through_eventbridge_names_the_exact_object():
    assert decode(bridge()) == Event(refs=(BRIDGE_REF,))


def test_minios_event_is_decoded_by_its_records():
    assert decode(json.dumps(MINIO)).refs == (
        ObjectRef(
            bucket="s3://mybucket",
            key="5cdfb588cea4de1db3034a87/colors.xml",
            etag="5b4fa6a4a2f6b1f0e1bb3b3d0f0f9c0e",
            size=3357,
            sequencer="159FB6B233B08AF0",
            event_at=datetime(2019, 5, 18, 7, 34, 32, tzinfo=UTC),
            uploaded_by="minio",
        ),
    )


def test_cephs_event_is_decoded_with_its_size_in_text_and_no_version():
    assert decode(json.dumps(CEPH)).refs == (
        ObjectRef(
            bucket="s3://mybucket1",
            key="myimage1.jpg",
            etag="37b51d194a7513e45b56f6524f2d51f2",
            size=1024,
            sequencer="5dd7e6f708d142c7",
            event_at=datetime(2019, 11, 22, 13, 47, 35, 124724, tzinfo=UTC),
            uploaded_by="tester",
        ),
    )


def test_cephs_sequencers_compare_by_time_although_it_writes_their_lowest_byte_first():
    def at(seconds, nanoseconds):
        event = copy.deepcopy(CEPH)
        raw = seconds.to_bytes(4, "little") + nanoseconds.to_bytes(4, "little")
        event["Records"][0]["s3"]["object"]["sequencer"] = raw.hex().upper()
        return decode(json.dumps(event)).refs[0].sequencer

    older, later, latest = at(0x5DD7E6FF, 9), at(0x5DD7E700, 0), at(0x5DD7E700, 1)

    assert newer(later, older) > 0
    assert newer(latest, later) > 0
    assert newer(older, latest) < 0


@pytest.mark.parametrize("source", ["aws:s3", "minio:s3", "rustfs:s3", "", None])
@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("red+flower.jpg", "red flower.jpg"),
        ("red%20flower.jpg", "red flower.jpg"),
        ("c%2B%2B.txt", "c++.txt"),
        ("100%25.txt", "100%.txt"),
        ("a%252Fb", "a%2Fb"),
        ("a%2Fb/c", "a/b/c"),
        ("%2F..%2F..%2Fetc%2Fpasswd", "/../../etc/passwd"),
        ("../x", "../x"),
        ("a//b/", "a//b/"),
        ("%C3%BC.txt", "ü.txt"),
        ("ü.txt", "ü.txt"),
        ("%F0%9F%92%A9", "\U0001f4a9"),
        ("a%00b%0A%1F", "a\0b\n\x1f"),
        ("%26%3D%3B%3F%23", "&=;?#"),
        ("a=b&c", "a=b&c"),
        ("+", " "),
    ],
)
def test_keys_are_form_encoded_unless_the_source_is_known_not_to(source, written, key):
    assert key_of(s3(aws(key=written, source=source))) == key


@pytest.mark.parametrize("key", ["red+flower.jpg", "100%.txt", "a%2Fb", "a b", "ü", "%FF", "a\nb"])
def test_ceph_and_eventbridge_write_keys_as_they_are(key):
    assert key_of(s3(aws(key=key, source="ceph:s3"))) == key
    assert key_of(bridge(key=key)) == key


@given(st.text(min_size=1, max_size=300).filter(lambda key: len(key.encode()) <= 1024))
def test_any_key_is_the_same_from_every_source(key):
    assert key_of(s3(aws(key=quote_plus(key)))) == key
    assert key_of(s3(aws(key=quote(key)))) == key
    assert key_of(s3(aws(key=key, source="ceph:s3"))) == key
    assert key_of(bridge(key=key)) == key


@pytest.mark.parametrize("key", ["%FF", "%C3%28", "%ED%A0%80", "%zz", "100%", "%2", "\ud800", ""])
def test_a_key_that_cannot_be_decoded_is_malformed_and_never_another_key(key):
    assert only_malformed(s3(aws(key=key))).startswith("record 0: key")


@pytest.mark.parametrize("source", ["aws:s3", "ceph:s3"])
def test_a_key_of_1024_bytes_is_the_longest(source):
    key = "ü" * 512
    assert key_of(s3(aws(key=key, source=source))) == key
    assert key_of(s3(aws(key=quote(key) if source == "aws:s3" else key, source=source))) == key
    assert "1024" in only_malformed(s3(aws(key=key + "a", source=source)))
    assert "1024" in only_malformed(s3(aws(key="a" * 5000, source=source)))


def test_many_records_keep_their_order():
    records = [aws(key=f"k{number}") for number in range(50)]

    assert [ref.key for ref in decode(s3(*records)).refs] == [f"k{n}" for n in range(50)]


@pytest.mark.parametrize(
    "name",
    [
        "ObjectCreated:Put",
        "ObjectCreated:Post",
        "ObjectCreated:Copy",
        "ObjectCreated:CompleteMultipartUpload",
        "s3:ObjectCreated:Put",
        "s3:ObjectCreated:*",
        "ObjectCreated:SomethingNew",
        "ObjectRestore:Completed",
        "s3:ObjectSynced:Create",
        "Replication:Create",
    ],
)
def test_what_is_there_now_wants_a_scan(name):
    assert decode(s3(aws(name))) == Event(refs=(AWS_REF,))


@pytest.mark.parametrize(
    "name",
    [
        "ObjectRemoved:Delete",
        "ObjectRemoved:DeleteMarkerCreated",
        "s3:ObjectRemoved:*",
        "LifecycleExpiration:Delete",
        "LifecycleExpiration:DeleteMarkerCreated",
        "s3:ObjectLifecycle:Expiration:Current",
        "s3:ObjectLifecycle:Expiration:Noncurrent",
        "ObjectLifecycle:Expiration:NonCurrent",
        "s3:ObjectSynced:DeletionMarkerCreated",
    ],
)
def test_what_is_gone_is_removed_with_the_version_the_event_names(name):
    assert decode(s3(aws(name))) == Event(removed=(AWS_REF,))


@pytest.mark.parametrize(
    "name",
    [
        "ObjectTagging:Put",
        "ObjectTagging:Delete",
        "ObjectAcl:Put",
        "ObjectRestore:Post",
        "ObjectRestore:Delete",
        "LifecycleTransition",
        "IntelligentTiering",
        "ReducedRedundancyLostObject",
        "Replication:OperationFailedReplication",
        "Replication:OperationReplicatedAfterThreshold",
        "s3:ObjectLifecycle:Expiration:AbortMPU",
        "s3:ObjectAccessed:Get",
        "s3:ObjectCreated:PutRetention",
        "s3:ObjectCreated:PutLegalHold",
        "SomethingElse",
    ],
)
def test_what_writes_no_bytes_is_ignored_and_says_so(name):
    event = decode(s3(aws(name)))

    assert event == Event(ignored=event.ignored)
    assert name in event.ignored[0]


def test_our_own_tagging_on_minio_does_not_ask_for_a_scan_that_would_tag_again():
    event = decode(s3(aws("s3:ObjectCreated:PutTagging", source="minio:s3")))

    assert event.refs == ()
    assert "PutTagging" in event.ignored[0]


def test_a_delete_through_eventbridge_is_removed():
    kinds = {"reason": "DeleteObject", "deletion-type": "Delete Marker Created"}
    event = decode(bridge("Object Deleted", detail=kinds, size=None))

    assert event.refs == ()
    assert event.removed[0].key == "example-key"
    assert event.removed[0].version_id == "IYV3p45BT0ac8hjHg1houSdS1a.Mro8e"


def test_a_restore_through_eventbridge_wants_a_scan_when_it_is_complete():
    assert decode(bridge("Object Restore Completed")).refs == (BRIDGE_REF,)
    assert decode(bridge("Object Restore Initiated")).refs == ()


@pytest.mark.parametrize(
    "kind",
    ["Object Tags Added", "Object ACL Updated", "Object Storage Class Changed",
     "Object Restore Expired", "AWS API Call via CloudTrail"],
)  # fmt: skip
def test_other_eventbridge_events_are_ignored_and_say_so(kind):
    event = decode(bridge(kind))

    assert event == Event(ignored=event.ignored)
    assert kind in event.ignored[0]


def test_a_test_event_and_the_confirmation_of_a_subscription_are_no_work():
    for body in (
        json.dumps(TEST_EVENT),
        sns(json.dumps(TEST_EVENT)),
        sns("You have chosen to subscribe", Type="SubscriptionConfirmation"),
        s3(),
    ):
        event = decode(body)
        assert event == Event(ignored=event.ignored)
        assert len(event.ignored) == 1


def test_a_bad_record_neither_takes_the_good_ones_with_it_nor_vanishes():
    bad = aws()
    del bad["s3"]["object"]["key"]

    event = decode(s3(aws(key="a"), bad, aws("ObjectRemoved:Delete"), 7, aws(key="b")))

    assert [ref.key for ref in event.refs] == ["a", "b"]
    assert len(event.removed) == 1
    assert event.malformed == ("record 1: key is missing", "record 3: is no object")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("s3",), None),
        (("s3", "bucket"), "amzn-s3-demo-bucket"),
        (("s3", "bucket", "name"), None),
        (("s3", "bucket", "name"), ""),
        (("s3", "bucket", "name"), ".."),
        (("s3", "bucket", "name"), "a/b"),
        (("s3", "bucket", "name"), "a?b=c"),
        (("s3", "bucket", "name"), "a\nb"),
        (("s3", "bucket", "name"), "bucket\n"),
        (("s3", "bucket", "name"), "user@host"),
        (("s3", "bucket", "name"), "a" * 256),
        (("s3", "object"), []),
        (("s3", "object", "key"), 5),
        (("s3", "object", "versionId"), ["x"]),
        (("s3", "object", "versionId"), {}),
        (("s3", "object", "versionId"), "a b"),
        (("s3", "object", "versionId"), "v\r\nX-Evil: 1"),
        (("s3", "object", "versionId"), "v" * 1025),
        (("eventVersion",), "3.0"),
        (("eventVersion",), 2),
        (("eventName",), None),
        (("eventName",), ""),
    ],
)
def test_a_record_that_does_not_name_one_object_for_certain_is_malformed(path, value):
    record = aws()
    place = record
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value

    assert len(only_malformed(s3(record))) < 200


@pytest.mark.parametrize("version", ["2.0", "2.1", "2.2", "2.3", "2.6"])
def test_all_minor_versions_of_the_event_are_understood(version):
    assert decode(s3({**AWS_RECORD, "eventVersion": version})).refs == (AWS_REF,)


def test_an_eventbridge_event_without_a_key_is_malformed():
    assert only_malformed(bridge(key=None)) == "Object Created: key is missing"


@pytest.mark.parametrize("version", [None, "", "null"])
def test_objects_without_versions_have_none(version):
    assert decode(s3(aws(versionId=version))).refs[0].version_id is None
    assert decode(bridge(**{"version-id": version})).refs[0].version_id is None


@pytest.mark.parametrize(
    ("claimed", "etag"),
    [('"abc-2"', "abc-2"), ("abc", "abc"), ("", None), (None, None), (7, None), ([], None),
     ('"a"b"', None), ("a\r\nb", None), ("ü", None), ("x" * 2000, None)],
)  # fmt: skip
def test_an_etag_has_no_quotes_and_a_strange_one_is_no_claim(claimed, etag):
    assert decode(s3(aws(eTag=claimed))).refs[0].etag == etag


@pytest.mark.parametrize(
    ("claimed", "size"),
    [(0, 0), (5, 5), ("1024", 1024), (2**63 - 1, 2**63 - 1), (2**63, None), (-1, None),
     ("-1", None), ("", None), ("1e3", None), ("٣", None), ("9" * 400, None), (1.5, None),
     (True, None), (None, None), ([], None), (10**4000, None)],
)  # fmt: skip
def test_a_size_is_a_sane_number_of_bytes_or_unknown(claimed, size):
    assert decode(s3(aws(size=claimed))).refs[0].size == size


@pytest.mark.parametrize(
    ("claimed", "at"),
    [
        ("2023-02-03T04:05:06.789Z", datetime(2023, 2, 3, 4, 5, 6, 789000, tzinfo=UTC)),
        ("2023-02-03T04:05:06.123456789Z", datetime(2023, 2, 3, 4, 5, 6, 123456, tzinfo=UTC)),
        ("2023-02-03T06:05:06+02:00", datetime(2023, 2, 3, 4, 5, 6, tzinfo=UTC)),
        ("2023-02-03T04:05:06", datetime(2023, 2, 3, 4, 5, 6, tzinfo=UTC)),
        ("0001-01-01T00:00:00+14:00", None),
        ("yesterday", None),
        ("", None),
        (0, None),
        (None, None),
    ],
)
def test_a_time_is_utc_or_unknown(claimed, at):
    assert decode(s3({**AWS_RECORD, "eventTime": claimed})).refs[0].event_at == at


@pytest.mark.parametrize("claimed", [None, "", 5, "not hex", "0" * 65, "12\n", []])
def test_a_sequencer_that_is_no_hex_number_is_absent(claimed):
    assert decode(s3(aws(sequencer=claimed))).refs[0].sequencer == ""
    assert decode(s3(aws(sequencer=claimed, source="ceph:s3"))).refs[0].sequencer == ""


def test_a_huge_or_strange_user_is_cut_and_can_be_stored_as_utf8():
    record = {**AWS_RECORD, "userIdentity": {"principalId": "\ud800" + "x" * 9999}}
    who = decode(s3(record)).refs[0].uploaded_by

    assert who == "?" + "x" * 255
    assert decode(s3({**AWS_RECORD, "userIdentity": "me"})).refs[0].uploaded_by == ""


def refuses(body):
    with pytest.raises(Unsupported) as caught:
        decode(body)
    assert caught.value.reason == "not-an-event"
    assert len(caught.value.message) < 300
    return caught.value.message


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("", "not JSON"),
        ("hello", "not JSON"),
        ("{", "not JSON"),
        ("9" * 5000, "not JSON"),
        ("[]", "a JSON list"),
        ('"x"', "a JSON str"),
        ("null", "a JSON NoneType"),
        ("{}", "no S3, EventBridge, SNS or Bucketward message"),
        ('{"Records": {}}', "Records are no list"),
        ('{"detail-type": "Object Created", "source": "my.app"}', "not from aws.s3"),
        ('{"detail-type": 7, "source": "aws.s3"}', "not from aws.s3"),
        ('{"Type": "Notification", "Message": 7}', "without a text in Message"),
        ('{"Type": "Notification", "TopicArn": "t"}', "without a text in Message"),
        (sns("hello"), "not JSON"),
        (sns(sns(sns(s3(AWS_RECORD)))), "wrapped more than 2 times"),
        ('{"bucketward": 2, "refs": []}', "another version"),
        ('{"bucketward": 1}', "another version"),
        ("[" * 100_000, "nested too deep"),
        ('{"Records":' * 50_000, "nested too deep"),
        (" " * (MAX_BODY + 1), "characters long"),
    ],
)
def test_what_is_no_event_is_refused_with_what_it_is_instead(body, what):
    assert what in refuses(body)


def test_a_refusal_repeats_nothing_of_the_body():
    assert "s3cret" not in refuses('{"password": "s3cret"}')


def test_a_body_full_of_rubbish_makes_a_bounded_report():
    event = decode(s3(*[0] * 300_000))

    assert len(event.malformed) == 100
    assert event.malformed[-1] == "and 299901 more"


any_text = st.text(alphabet=st.characters(exclude_categories=()))
refs = st.builds(
    ObjectRef,
    bucket=any_text.filter(bool),
    key=any_text.filter(bool),
    version_id=st.none() | any_text,
    etag=st.none() | any_text,
    size=st.none() | st.integers(0, 2**63 - 1),
    sequencer=any_text,
    event_at=st.none()
    | st.datetimes(
        timezones=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=45))]),
        min_value=datetime(2, 1, 1),
        max_value=datetime(9998, 1, 1),
    ),
    uploaded_by=any_text,
)


@given(st.lists(refs, max_size=3), any_text, st.integers(0, 2**63 - 1))
def test_our_own_form_comes_back_as_it_was(things, job, attempt):
    body = encode(things, job=job, attempt=attempt)

    assert body.isascii()
    assert decode(body) == Event(refs=tuple(things), job=job, attempt=attempt)


@pytest.mark.parametrize(
    "key", ["\ud800\udc00", "\U00010000", "\udcff", "a\0b", "\x1b[31m", '"\\', "\u2028", "\ufeff"]
)
def test_our_own_form_confuses_no_two_keys(key):
    ref = ObjectRef("file:///drop", key)

    assert decode(encode([ref])).refs == (ref,)


def test_our_own_form_survives_sns_too():
    ref = ObjectRef("s3://b", "k", "v", "e", 3)

    assert decode(sns(encode([ref], job="j"))) == Event(refs=(ref,), job="j")


@pytest.mark.parametrize(
    "fields",
    [
        None,
        {},
        {"bucket": "s3://b"},
        {"bucket": "", "key": "k"},
        {"bucket": "s3://b", "key": 7},
        {"bucket": "s3://b", "key": ["***"]},
        {"bucket": "s3://b", "key": ["/w=="]},
        {"bucket": "s3://b", "key": ["aw==", "aw=="]},
        {"bucket": "s3://b", "key": "k", "version_id": 7},
        {"bucket": "s3://b", "key": "k", "uploaded_by": None},
    ],
)
def test_a_bad_ref_of_our_own_form_does_not_lose_the_good_ones(fields):
    good = {"bucket": "s3://b", "key": "good"}
    event = decode(json.dumps({"bucketward": 1, "refs": [fields, good], "attempt": -3}))

    assert event.refs == (ObjectRef("s3://b", "good"),)
    assert event.malformed[0].startswith("ref 0: ")
    assert event.attempt == 0


def test_a_job_that_is_no_text_is_malformed():
    assert decode('{"bucketward": 1, "refs": [], "job": 7}').malformed == (
        "job: a JSON int is no text",
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from([
                "Records", "Type", "Message", "TopicArn", "detail-type", "source", "detail",
                "bucketward", "refs", "s3", "bucket", "object", "key", "name", "eventName",
                "eventSource", "eventVersion", "versionId", "job", "attempt",
            ])
            | any_text,
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)  # fmt: skip


def decodes_or_refuses(body):
    try:
        event = decode(body)
    except Unsupported as error:
        assert error.reason == "not-an-event"
        assert error.message.isprintable()
    else:
        assert event.refs or event.removed or event.ignored or event.malformed or "refs" in body
        for ref in event.refs + event.removed:
            assert ref.key
            assert ref.bucket
        for text in event.ignored + event.malformed:
            assert text.isprintable()
            assert len(text) < 300


@given(any_text)
def test_no_text_brings_it_down(body):
    decodes_or_refuses(body)


@given(json_values)
def test_no_json_brings_it_down(value):
    decodes_or_refuses(json.dumps(value))
    decodes_or_refuses(sns(json.dumps(value)))


def paths(value, path=()):
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from paths(item, (*path, name))


@given(
    st.sampled_from([{"Records": [AWS_RECORD]}, BRIDGE, MINIO, CEPH, TEST_EVENT]),
    st.data(),
    json_values,
)
def test_no_change_to_a_real_event_brings_it_down(event, data, value):
    event = copy.deepcopy(event)
    path = data.draw(st.sampled_from([path for path in paths(event) if path]))
    place = event
    for name in path[:-1]:
        place = place[name]
    if data.draw(st.booleans()):
        del place[path[-1]]
    else:
        place[path[-1]] = value

    decodes_or_refuses(json.dumps(event))


@given(st.sampled_from([s3(AWS_RECORD), bridge(), sns(s3(AWS_RECORD))]), st.data())
def test_no_cut_or_swapped_character_brings_it_down(body, data):
    place = data.draw(st.integers(0, len(body) - 1))
    text = data.draw(any_text)
    decodes_or_refuses(body[:place])
    decodes_or_refuses(body[:place] + text + body[place + 1 :])


@pytest.mark.parametrize(
    ("a", "b", "answer"),
    [
        ("0055AED6DCD90281E6", "0055AED6DCD90281E5", 1),
        ("0055AED6DCD90281E5", "0055AED6DCD90281E6", -1),
        ("0055aed6dcd90281e6", "0055AED6DCD90281E5", 1),
        ("0055AED6DCD9", "0055AED6DCD90281E5", -1),
        ("0055AED6DD", "0055AED6DCD90281E5", 1),
        ("0055AED6DCD90281E5", "0055AED6DCD90281E5", None),
        ("0055AED6DC", "0055AED6DC00", None),
        ("", "0055AED6DCD90281E5", None),
        ("0055AED6DCD90281E5", "", None),
        ("", "", None),
        ("617f08299329d189", "617f0837b476e463", -1),
        ("617f08299329d189", "0055AED6DCD90281E5", None),
    ],
)
def test_sequencers_are_compared_after_padding_on_the_right(a, b, answer):
    assert newer(a, b) == answer


hexes = st.text("0123456789abcdefABCDEF", max_size=20)


@given(hexes, hexes)
def test_comparing_the_other_way_round_gives_the_opposite(a, b):
    there, back = newer(a, b), newer(b, a)

    assert (there is None) == (back is None)
    assert there is None or there == -back
