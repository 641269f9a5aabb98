"""SNS, EventBridge and Security Hub are told, and say what they did not take."""

import json
import re
import socket
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from bucketward import notes
from bucketward.errors import ConfigError, Denied, NotFound, Unavailable, Unsupported
from bucketward.model import (
    EngineReport,
    Finding,
    Note,
    ObjectInfo,
    ScanResult,
    Verdict,
)
from bucketward.notifiers.eventbridge import open_eventbridge
from bucketward.notifiers.securityhub import open_securityhub
from bucketward.notifiers.sns import open_sns
from bucketward.testing.notifier import NotifierSuite, note
from servers.meddler import run_meddler

ACCOUNT = "123456789012"
REGION = "us-east-1"
QUERY_ERROR = """<ErrorResponse><Error><Type>Sender</Type><Code>%s</Code>
<Message>Invalid parameter</Message></Error></ErrorResponse>"""


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")


@pytest.fixture
def meddler(moto):
    with run_meddler(moto.url) as meddler:
        yield meddler


class Queue:
    """An SQS queue and everything that was ever taken from it."""

    def __init__(self, moto):
        self.client = moto.client("sqs")
        name = f"q-{uuid4().hex}"
        self.url = self.client.create_queue(QueueName=name)["QueueUrl"]
        self.arn = f"arn:aws:sqs:{REGION}:{ACCOUNT}:{name}"
        self.taken = []

    def read(self):
        while True:
            answer = self.client.receive_message(QueueUrl=self.url, MaxNumberOfMessages=10)
            messages = answer.get("Messages", [])
            if not messages:
                return self.taken
            self.taken += [json.loads(message["Body"]) for message in messages]
            for message in messages:
                handle = message["ReceiptHandle"]
                self.client.delete_message(QueueUrl=self.url, ReceiptHandle=handle)


@pytest.fixture
def queue(moto):
    queue = Queue(moto)
    yield queue
    queue.client.delete_queue(QueueUrl=queue.url)
    queue.client.close()


def result(verdict=Verdict.INFECTED, *, bucket="s3://in", key="a.exe", findings=1, moved_to=None):
    found = tuple(Finding("clamav", f"Win.Test.{i}") for i in range(findings))
    return ScanResult(
        uuid4().hex,
        ObjectInfo(bucket, key, 7, '"e"', datetime.now(UTC), version_id="v1"),
        verdict,
        datetime.now(UTC),
        reports=(EngineReport("clamav", Verdict.INFECTED, (), found),) if found else (),
        sha256="0" * 64,
        account=ACCOUNT,
        region=REGION,
        action="move" if moved_to else "keep",
        moved_to=moved_to,
    )


class TestSns(NotifierSuite):
    @pytest.fixture
    def notifier(self, moto, meddler, queue):
        self.queue, self.meddler = queue, meddler
        sns = moto.client("sns")
        name = f"t-{uuid4().hex}"
        self.topic = sns.create_topic(Name=name)["TopicArn"]
        sns.subscribe(TopicArn=self.topic, Protocol="sqs", Endpoint=queue.arn)
        notifier = open_sns(f"sns://{REGION}/{ACCOUNT}/{name}?endpoint={meddler.url}")
        yield notifier
        notifier.close()
        sns.delete_topic(TopicArn=self.topic)
        sns.close()

    def received(self, notifier):
        return [
            (each["MessageAttributes"]["noteId"]["Value"], each["Message"])
            for each in self.queue.read()
        ]

    def refuse(self, notifier, note_id):
        self.meddler.refused = f"StringValue={note_id}&"
        self.meddler.refusal = (400, QUERY_ERROR % "InvalidParameter")

    def test_a_filter_on_clean_selects_exactly_the_clean_ones(self, moto, notifier):
        sns, chosen = moto.client("sns"), Queue(moto)
        policy = {"notificationType": ["scanResult"], "scanResult": ["Clean"]}
        sns.subscribe(
            TopicArn=self.topic,
            Protocol="sqs",
            Endpoint=chosen.arn,
            Attributes={"FilterPolicy": json.dumps(policy)},
        )
        results = [result(verdict, findings=0) for verdict in Verdict for _ in range(3)]
        made = [notes.scan_result(each) for each in results]
        other = Note("other", "deadLetter", "s", "{}", {"notificationType": "deadLetter"})

        assert notifier.send([*made, other]) == {}

        got = [json.loads(each["Message"]) for each in chosen.read()]
        clean = {each.id for each in results if each.verdict is Verdict.CLEAN}
        assert {each["scanId"] for each in got} == clean
        assert len(got) == len(clean) == 3
        assert len(self.queue.read()) == len(made) + 1
        sns.close()
        chosen.client.close()

    def test_the_attributes_are_those_that_are_promised(self, notifier):
        made = notes.scan_result(result())

        notifier.send([made])

        (got,) = self.queue.read()
        values = {name: each["Value"] for name, each in got["MessageAttributes"].items()}
        assert values == {
            "notificationType": "scanResult",
            "scanResult": "Infected",
            "bucket": "s3://in",
            "account": ACCOUNT,
            "region": REGION,
            "noteId": made.id,
        }
        assert got["Message"] == made.body

    def test_requests_hold_ten_notes_and_256_kib_at_most(self, notifier):
        small = [note(f"s{i}", {"n": f"-{i}-"}) for i in range(23)]
        notifier.send(small)
        assert len(self.meddler.requests) == 3
        self.meddler.requests.clear()

        large = [note(f"l{i}", "x" * 100_000) for i in range(5)]

        assert notifier.send(large) == {}
        assert len(self.meddler.requests) == 3
        assert all(len(each) < 256 * 1024 for each in self.meddler.requests)
        assert len(self.received(notifier)) == 28

    def test_a_note_that_is_too_large_fails_alone(self, notifier):
        failures = notifier.send([note("a", 1), note("big", "x" * 256 * 1024), note("c", 3)])

        assert failures["big"].reason == "too-large"
        assert isinstance(failures["big"], Unsupported)
        assert {name for name, _ in self.received(notifier)} == {"a", "c"}

    def test_the_note_of_a_hundred_thousand_findings_fits(self, notifier):
        made = notes.scan_result(result(findings=100_000))

        assert notifier.send([made]) == {}
        ((_, body),) = self.received(notifier)
        assert json.loads(body)["findingsTotal"] == 100_000
        assert json.loads(body)["truncated"]

    def test_what_sns_reports_failed_has_failed_and_nothing_else(self, notifier):
        failed = (
            b"<Failed><member><Id>1</Id><Code>InternalError</Code><Message>m</Message>"
            b"<SenderFault>false</SenderFault></member></Failed>"
        )

        def rewrite(_, answer):
            members = re.findall(rb"<member>.*?</member>", answer, re.DOTALL)
            answer = re.sub(rb"<Failed>.*</Failed>|<Failed\s*/>", b"", answer, flags=re.DOTALL)
            kept = answer.replace(members[1], b"")
            return kept.replace(b"</Successful>", b"</Successful>" + failed)

        self.meddler.rewrite = rewrite

        failures = notifier.send([note("a", 1), note("b", 2), note("c", 3)])

        assert set(failures) == {"b"}
        assert isinstance(failures["b"], Unavailable)
        assert "InternalError" in str(failures["b"])

    def test_what_sns_does_not_mention_has_failed(self, notifier):
        def rewrite(_, answer):
            start = answer.index(b"<member>")
            return answer[:start] + answer[answer.index(b"</member>") + len(b"</member>") :]

        self.meddler.rewrite = rewrite

        failures = notifier.send([note("a", 1), note("b", 2)])

        assert set(failures) == {"a"}
        assert isinstance(failures["a"], Unavailable)

    def test_a_missing_topic_is_named(self, moto):
        notifier = open_sns(f"sns://{REGION}/{ACCOUNT}/no-such?endpoint={moto.url}")

        with pytest.raises(NotFound, match="no-such"):
            notifier.ping()
        assert isinstance(notifier.send([note("a", 1)])["a"], NotFound)
        notifier.close()

    def test_a_refused_permission_is_named(self, notifier):
        self.meddler.refused = "Message=1"
        self.meddler.refusal = (403, QUERY_ERROR % "AuthorizationError")

        error = notifier.send([note("a", 1), note("b", 2)])["a"]

        assert isinstance(error, Denied)
        assert error.reason == "sns:Publish"


class TestEventBridge(NotifierSuite):
    @pytest.fixture
    def notifier(self, moto, meddler, queue):
        self.queue, self.meddler = queue, meddler
        self.events = moto.client("events")
        self.bus = f"b-{uuid4().hex}"
        self.events.create_event_bus(Name=self.bus)
        self.route({"source": ["bucketward"]}, queue)
        notifier = open_eventbridge(f"eventbridge://{REGION}/{self.bus}?endpoint={meddler.url}")
        yield notifier
        notifier.close()
        self.events.close()

    def route(self, pattern, queue):
        name = f"r-{uuid4().hex}"
        self.events.put_rule(Name=name, EventBusName=self.bus, EventPattern=json.dumps(pattern))
        self.events.put_targets(
            Rule=name, EventBusName=self.bus, Targets=[{"Id": "1", "Arn": queue.arn}]
        )

    def received(self, notifier):
        return [
            (each["detail"]["id"], json.dumps(each["detail"]["data"])) for each in self.queue.read()
        ]

    def refuse(self, notifier, note_id):
        self.meddler.refused = f'\\"id\\": \\"{note_id}\\"'
        self.meddler.refusal = (400, '{"__type": "ValidationException", "message": "no"}')

    def test_a_rule_as_it_is_documented_selects_exactly_the_infected(self, moto, notifier):
        chosen = Queue(moto)
        self.route(
            {
                "source": ["bucketward"],
                "detail-type": ["scanResult"],
                "detail": {"data": {"scanResult": ["Infected"]}},
            },
            chosen,
        )
        results = [result(verdict) for verdict in Verdict for _ in range(3)]

        assert notifier.send([notes.scan_result(each) for each in results]) == {}

        infected = {each.id for each in results if each.verdict is Verdict.INFECTED}
        got = [each["detail"]["data"]["scanId"] for each in chosen.read()]
        assert sorted(got) == sorted(infected)
        chosen.client.close()

    def test_what_eventbridge_reports_failed_has_failed_and_nothing_else(self, notifier):
        def rewrite(_, answer):
            fields = json.loads(answer)
            fields["FailedEntryCount"] = 1
            fields["Entries"][1] = {"ErrorCode": "ThrottlingException", "ErrorMessage": "slow"}
            return json.dumps(fields).encode()

        self.meddler.rewrite = rewrite

        failures = notifier.send([note("a", 1), note("b", 2), note("c", 3)])

        assert set(failures) == {"b"}
        assert isinstance(failures["b"], Unavailable)

    def test_requests_hold_ten_notes_at_most_and_what_is_too_large_fails_alone(self, notifier):
        big = note("big", "x" * 256 * 1024)

        failures = notifier.send([*(note(f"n{i}", {"i": i}) for i in range(21)), big])

        assert set(failures) == {"big"}
        assert failures["big"].reason == "too-large"
        assert len(self.meddler.requests) == 3

    def test_a_missing_bus_is_named(self, moto):
        notifier = open_eventbridge(f"eventbridge://{REGION}/no-such?endpoint={moto.url}")

        with pytest.raises(NotFound, match="no-such"):
            notifier.ping()
        notifier.close()


class TestSecurityHub(NotifierSuite):
    keeps_bodies = False  # ASFF is a format of its own

    @pytest.fixture
    def notifier(self, moto, meddler):
        self.meddler = meddler
        self.hub = moto.client("securityhub")
        self.hub.enable_security_hub()
        self.known = {each["Id"] for each in self.findings()}
        notifier = open_securityhub(f"securityhub://{REGION}/{ACCOUNT}?endpoint={meddler.url}")
        yield notifier
        notifier.close()
        self.hub.disable_security_hub()
        self.hub.close()
        moto.reset()

    def findings(self):
        pages = self.hub.get_paginator("get_findings").paginate()
        return [each for page in pages for each in page["Findings"]]

    def received(self, notifier):
        return [(each["Id"], "{}") for each in self.findings()]

    def refuse(self, notifier, note_id):
        self.meddler.refused = f'"Id": "{note_id}"'
        self.meddler.refusal = (400, '{"__type": "InvalidInputException", "message": "no"}')

    def test_only_the_infected_are_findings_and_the_others_no_failures(self, notifier):
        results = [result(verdict) for verdict in Verdict for _ in range(2)]
        made = [notes.scan_result(each) for each in results]

        assert notifier.send(made) == {}

        infected = {m.id for r, m in zip(results, made, strict=True) if r.verdict == "Infected"}
        assert {each["Id"] for each in self.findings()} == infected
        assert len(infected) == 2

    def test_a_finding_says_what_was_found_where_and_what_became_of_it(self, notifier):
        scanned = result(key="dir/a.exe", findings=9, moved_to=("s3://jail", "in/dir/a.exe"))
        made = notes.scan_result(scanned)

        notifier.send([made])

        (found,) = self.findings()
        assert found["SchemaVersion"] == "2018-10-08"
        assert found["ProductArn"] == (
            f"arn:aws:securityhub:{REGION}:{ACCOUNT}:product/{ACCOUNT}/default"
        )
        assert found["Resources"] == [
            {
                "Type": "AwsS3Object",
                "Id": "arn:aws:s3:::in/dir/a.exe",
                "Partition": "aws",
                "Region": REGION,
                "Details": {"AwsS3Object": {"ETag": '"e"', "VersionId": "v1"}},
            }
        ]
        assert [each["Name"] for each in found["Malware"]] == [f"Win.Test.{i}" for i in range(5)]
        assert {each["State"] for each in found["Malware"]} == {"REMOVED"}
        assert found["ProductFields"]["bucketward/scanId"] == scanned.id
        assert found["ProductFields"]["bucketward/findingsTotal"] == "9"

    def test_an_object_that_is_not_in_s3_is_named_too(self, notifier):
        notifier.send([notes.scan_result(result(bucket="file:///srv/drop"))])

        (found,) = self.findings()
        assert found["Resources"][0]["Type"] == "Other"
        assert found["Resources"][0]["Id"] == "file:///srv/drop/a.exe"
        assert found["Malware"][0]["State"] == "OBSERVED"

    def test_the_longest_key_and_signature_are_cut_to_what_asff_takes(self, notifier):
        scanned = result(key="\u6f22" * 1024)
        made = notes.scan_result(scanned)

        assert notifier.send([made]) == {}
        (found,) = self.findings()
        assert len(found["Title"]) <= 256
        assert len(found["Resources"][0]["Id"]) <= 512
        assert len(found["Description"]) <= 1024
        assert len(found["Malware"][0]["Path"]) <= 512

    def test_what_security_hub_reports_failed_has_failed_and_nothing_else(self, notifier):
        def rewrite(_, answer):
            fields = json.loads(answer)
            failed = {"Id": "b", "ErrorCode": "InvalidInput", "ErrorMessage": "m"}
            return json.dumps(fields | {"FailedCount": 1, "FailedFindings": [failed]}).encode()

        self.meddler.rewrite = rewrite

        failures = notifier.send([note("a", 1), note("b", 2), note("c", 3)])

        assert set(failures) == {"b"}
        assert isinstance(failures["b"], Unsupported)

    def test_a_hub_that_is_not_enabled_is_said_to_be_so(self, moto, notifier):
        self.hub.disable_security_hub()
        try:
            with pytest.raises(Denied, match="enabled"):
                notifier.ping()
        finally:
            self.hub.enable_security_hub()


OPENERS = {
    "sns": (open_sns, f"sns://{REGION}/{ACCOUNT}/topic"),
    "eventbridge": (open_eventbridge, f"eventbridge://{REGION}/bus"),
    "securityhub": (open_securityhub, f"securityhub://{REGION}/{ACCOUNT}"),
}


@pytest.mark.parametrize("scheme", OPENERS)
def test_the_address_has_nothing_but_what_is_documented(scheme):
    opened, url = OPENERS[scheme]
    opened(url).close()

    for wrong in (
        url + "/more/x y",
        url + "?token=x",
        url + "?endpoint=ftp://x",
        url + "?endpoint=http://user:pass@x",
        url.replace(REGION, "moon"),
        url.replace(REGION, ""),
        url + "#f",
        f"{scheme}://[",
        f"{scheme}:",
    ):
        with pytest.raises(ConfigError, match=f"{scheme}://<region>"):
            opened(wrong)


@pytest.mark.parametrize("scheme", OPENERS)
def test_a_service_that_is_down_keeps_every_note_and_raises_nothing(scheme, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    opened, url = OPENERS[scheme]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        notifier = opened(f"{url}?endpoint=http://127.0.0.1:{unused.getsockname()[1]}")

        failures = notifier.send([note("a", 1), note("b", 2)])

    assert set(failures) == {"a", "b"}
    assert all(isinstance(error, Unavailable) for error in failures.values())
    notifier.close()


@pytest.mark.parametrize("scheme", OPENERS)
def test_no_credentials_are_denied_with_a_word_on_what_to_do(scheme, moto, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    opened, url = OPENERS[scheme]
    notifier = opened(f"{url}?endpoint={moto.url}")

    error = notifier.send([note("a", 1)])["a"]

    assert isinstance(error, Denied)
    assert "no credentials" in str(error)
    notifier.close()
