"""The SQS queue keeps the contract, and says what is wrong when SQS does not."""

import http.client
import http.server
import json
import re
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from bucketward.errors import ConfigError, Denied, NotFound, Unavailable, Unsupported
from bucketward.model import Credentials
from bucketward.queues import sqs
from bucketward.queues.sqs import open_sqs
from bucketward.testing.queue import LIMIT, QueueSuite, at_once, take


def credentials():
    return Credentials("AKIAIOSFODNN7EXAMPLE", "test-secret")


def make(client, max_deliveries=3, **attributes):
    """Make a queue with a dead-letter queue and return its name."""
    name = f"q-{uuid4().hex}"
    client.create_queue(QueueName=f"{name}-dead")
    redrive = {
        "deadLetterTargetArn": f"arn:aws:sqs:us-east-1:123456789012:{name}-dead",
        "maxReceiveCount": max_deliveries,
    }
    client.create_queue(
        QueueName=name, Attributes={"RedrivePolicy": json.dumps(redrive)} | attributes
    )
    return name


def empty(client, name):
    """Make the two queues anew, which is quicker than to look for what is left in them."""
    attributes = client.get_queue_attributes(QueueUrl=name, AttributeNames=["RedrivePolicy"])
    for each in (f"{name}-dead", name):
        client.delete_queue(QueueUrl=each)
        more = attributes["Attributes"] if each == name else {}
        client.create_queue(QueueName=each, Attributes=more)


@pytest.fixture(scope="module")
def client(moto):
    client = moto.client("sqs")
    yield client
    client.close()


@pytest.fixture(scope="module")
def opened(moto, client):
    name = make(client, TestSqsQueue.max_deliveries)
    queue = open_sqs(f"sqs://us-east-1/{name}?endpoint={moto.url}&lease=2", credentials)
    yield name, queue
    queue.close()


class TestSqsQueue(QueueSuite):
    lease = 2.0
    tick = 1.0
    max_deliveries = 2
    many = 80
    is_exact = False
    # moto 5.2 takes every receipt handle that a message ever had for a good one.
    knows_spent_receipts = False

    @pytest.fixture
    def queue(self, opened, client):
        name, queue = opened
        empty(client, name)
        return queue

    def test_it_closes_twice(self, moto, client):
        queue = open_sqs(f"sqs://us-east-1/{make(client)}?endpoint={moto.url}", credentials)
        super().test_it_closes_twice(queue)


class Proxy:
    """Stands between boto3 and moto, keeps what was asked, and does what moto never does."""

    def __init__(self, url):
        self.url = url
        self.asked = []
        self.headers = []
        self.faults = []

    def on(self, action, fault, times=1):
        self.faults += [(action, fault)] * times

    def actions(self):
        return [action for action, _ in self.asked]

    def bodies(self, action):
        return [body for asked, body in self.asked if asked == action]

    def answer(self, handler):
        action = handler.headers["X-Amz-Target"].partition(".")[2]
        sent = handler.rfile.read(int(handler.headers["Content-Length"]))
        self.asked.append((action, json.loads(sent)))
        self.headers.append(handler.headers)
        for at, (name, fault) in enumerate(self.faults):
            if name in (action, "*"):
                del self.faults[at]
                return fault(lambda: self.forward(handler, sent))
        return self.forward(handler, sent)

    def forward(self, handler, sent):
        there = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        headers = {k: v for k, v in handler.headers.items() if k != "Content-Length"}
        there.request("POST", handler.path, sent, headers)
        reply = there.getresponse()
        body = reply.read()
        there.close()
        kept = {k: v for k, v in reply.getheaders() if k.lower() == "x-amzn-query-error"}
        return reply.status, kept, body


def says(status, code, text="no"):
    """Answer as SQS does: `code` is the one of its older protocol, which boto3 shows."""

    def fault(_forward):
        body = json.dumps({"__type": f"com.amazonaws.sqs#{code}", "message": text}).encode()
        sender = "Sender" if status < 500 else "Receiver"
        return status, {"x-amzn-query-error": f"{code};{sender}"}, body

    return fault


def fails(code, *, sender=False, only=None):
    """Let the request pass, then say of its entries (or some) that they failed."""

    def fault(forward):
        status, headers, body = forward()
        reply = json.loads(body)
        entries = reply.pop("Successful", []) + reply.get("Failed", [])
        bad = [e for e in entries if only is None or int(e["Id"]) in only]
        reply["Successful"] = [e for e in entries if e not in bad]
        reply["Failed"] = [
            {"Id": e["Id"], "Code": code, "SenderFault": sender, "Message": code} for e in bad
        ]
        return status, headers, json.dumps(reply).encode()

    return fault


def hangs_up(_forward):
    return None


def hangs_up_after(forward):
    forward()


@contextmanager
def running(proxy):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            answer = proxy.answer(self)
            if answer is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            status, headers, body = answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/x-amz-json-1.0")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def once():
    """Make botocore try each request once, so that one fault is enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        yield


@pytest.fixture(scope="module")
def shared(once, moto, client):
    """One queue behind one proxy: making them anew takes longer than most tests."""
    name, proxy = make(client), Proxy(moto.url)
    with running(proxy) as url:
        queue = open_sqs(f"sqs://us-east-1/{name}?endpoint={url}&lease=30", credentials)
        yield name, proxy, queue
        queue.close()


@pytest.fixture
def name(shared, client):
    empty(client, shared[0])
    return shared[0]


@pytest.fixture
def proxy(shared, name):
    proxy = shared[1]
    proxy.asked.clear()
    proxy.headers.clear()
    yield proxy
    proxy.faults.clear()


@pytest.fixture
def queue(shared, proxy):
    return shared[2]


# What is sent


def test_requests_hold_ten_messages_and_256_kib_at_most(queue, proxy):
    bodies = ["é" * 60_000] * 3 + ["x" * LIMIT] + [str(i) for i in range(25)]
    queue.send(bodies)
    sizes = [
        (len(b["Entries"]), sum(len(e["MessageBody"].encode()) for e in b["Entries"]))
        for b in proxy.bodies("SendMessageBatch")
    ]

    assert sorted(m.body for m in take(queue, len(bodies))) == sorted(bodies)
    assert all(number <= 10 and size <= LIMIT for number, size in sizes)
    assert len(sizes) == 6


def test_a_large_receive_takes_several_requests_but_waits_in_none_of_the_later(queue, proxy):
    queue.send([str(i) for i in range(23)])
    messages = queue.receive(25, 20)
    asked = proxy.bodies("ReceiveMessage")

    assert len(messages) == 23
    assert [b["MaxNumberOfMessages"] for b in asked] == [10, 10, 5]
    assert [b["WaitTimeSeconds"] for b in asked] == [20, 0, 0]
    assert {b["VisibilityTimeout"] for b in asked} == {30}


def test_what_was_received_is_kept_when_a_later_request_fails(queue, proxy):
    queue.send([str(i) for i in range(20)])
    proxy.on("ReceiveMessage", lambda forward: forward())
    proxy.on("ReceiveMessage", says(503, "ServiceUnavailable"))

    assert len(queue.receive(20, 1)) == 10


@pytest.mark.parametrize(
    ("wait", "asked"), [(0, 0), (0.9, 0), (1.7, 1), (19.99, 20), (20, 20), (300, 20)]
)
def test_waits_are_whole_seconds_rounded_down(queue, proxy, wait, asked):
    queue.send(["body"])

    assert len(queue.receive(1, wait)) == 1
    assert [b["WaitTimeSeconds"] for b in proxy.bodies("ReceiveMessage")] == [asked]


def test_a_wait_goes_on_after_a_long_poll_ended_empty(queue, proxy):
    proxy.on("ReceiveMessage", lambda _forward: (200, {}, b"{}"), times=2)
    queue.send(["body"])

    assert len(queue.receive(1, 60)) == 1
    assert len(proxy.bodies("ReceiveMessage")) == 3


def test_an_endpoint_that_does_not_wait_is_not_asked_for_ever(queue, proxy):
    proxy.on("ReceiveMessage", lambda _forward: (200, {}, b"{}"), times=50)

    assert queue.receive(1, 60) == []
    assert len(proxy.bodies("ReceiveMessage")) <= 4


def test_deliveries_and_time_are_those_of_sqs(queue, client, name):
    client.send_message(QueueUrl=name, MessageBody="body")
    sent = time.time()
    for delivery in (1, 2, 3):
        (message,) = queue.receive(1, 1)
        assert message.deliveries == delivery
        assert message.sent_at.timestamp() == pytest.approx(sent, abs=2)
        queue.nack([message])


def test_a_message_of_somebody_else_cannot_pretend_to_be_buried(queue, client, name):
    attribute = {"DataType": "String", "StringValue": "forged"}
    client.send_message(
        QueueUrl=name,
        MessageBody="body",
        MessageAttributes={"bucketward-id": attribute, "bucketward-reason": attribute},
    )
    (message,) = queue.receive(1, 1)

    assert message.id != "forged"
    assert message.reason == ""


def test_a_foreign_dead_letter_with_odd_attributes_is_received(queue, client, name):
    attributes = {
        "bucketward-sent-at": {"DataType": "String", "StringValue": "soon"},
        "bucketward-id": {"DataType": "Binary", "BinaryValue": b"x"},
    }
    client.send_message(QueueUrl=f"{name}-dead", MessageBody="body", MessageAttributes=attributes)
    (message,) = queue.dead(1, 1)

    assert message.body == "body"
    assert message.id
    queue.ack([message])
    assert queue.dead(1, 0) == []


def test_many_threads_share_the_connections(queue):
    at_once([queue.depth] * 20)


def test_keys_are_asked_of_the_provider_every_time(once, proxy, name):
    keys = iter(range(1000))

    def changing():
        return Credentials(f"AKIA{next(keys):016}", "secret", "session-token")

    with running(proxy) as url:
        queue = open_sqs(f"sqs://us-east-1/{name}?endpoint={url}", changing)
        queue.depth()
        queue.depth()
        queue.close()
    used = [re.search(r"Credential=(\w+)/", h["Authorization"])[1] for h in proxy.headers]

    assert len(set(used)) == len(used)
    assert {h["X-Amz-Security-Token"] for h in proxy.headers} == {"session-token"}


def test_a_provider_that_fails_is_heard(moto, name):
    def failing():
        raise Denied("assume the role", backend="sts", reason="sts:AssumeRole")

    with pytest.raises(Denied) as caught:
        open_sqs(f"sqs://us-east-1/{name}?endpoint={moto.url}", failing)
    assert caught.value.reason == "sts:AssumeRole"


def test_without_any_credentials_it_says_so(moto, name):
    with pytest.raises(Denied, match="no AWS credentials"):
        open_sqs(f"sqs://us-east-1/{name}?endpoint={moto.url}")


# Leases


def test_a_lease_never_goes_past_twelve_hours(queue):
    queue.send(["body"])
    (message,) = queue.receive(1, 1)
    (held,) = queue.extend([message], 1e6)

    assert held.leased_until == pytest.approx(time.time() + 12 * 3600 - 10, abs=3)
    queue.nack([held], 1e6)
    assert queue.receive(1, 0) == []


def test_near_the_twelve_hours_the_rest_is_given_and_then_nothing(queue):
    queue.send(["body"])
    (message,) = queue.receive(1, 1)
    side, at, handle = message.receipt.split(":", 2)
    old = replace(message, receipt=f"{side}:{int(at) - 12 * 3600 + 40}:{handle}")
    (held,) = queue.extend([old], 3600)
    over = replace(message, receipt=f"{side}:{int(at) - 12 * 3600}:{handle}")

    assert held.leased_until == pytest.approx(time.time() + 30, abs=3)
    assert queue.extend([over], 3600) == []


@pytest.mark.parametrize(
    "code",
    [
        "ReceiptHandleIsInvalid",
        "InvalidParameterValue",
        "AWS.SimpleQueueService.MessageNotInflight",
    ],
)
def test_a_receipt_that_is_good_no_more_is_lost_but_no_error(queue, proxy, code):
    queue.send([str(i) for i in range(3)])
    messages = take(queue, 3)
    proxy.on("ChangeMessageVisibilityBatch", fails(code, sender=True, only=[1]))
    held = queue.extend(messages, 60)
    proxy.on("ChangeMessageVisibilityBatch", fails(code, sender=True))
    queue.nack(messages)
    proxy.on("DeleteMessageBatch", fails(code, sender=True))
    queue.ack(messages)

    assert [m.id for m in held] == [messages[0].id, messages[2].id]


def test_a_lapsed_lease_is_not_asked_for_again(queue, proxy):
    # SQS would answer "fine" and do nothing (localstack #9632), or hide it from its new holder.
    queue.send(["body"])
    (message,) = queue.receive(1, 1)
    lapsed = replace(message, leased_until=time.time() - 1)

    assert queue.extend([lapsed], 30) == []
    queue.nack([lapsed])
    assert "ChangeMessageVisibilityBatch" not in proxy.actions()


# Partial failures


@pytest.mark.parametrize("action", ["ack", "nack", "extend"])
def test_what_sqs_failed_at_is_tried_once_more(queue, proxy, action):
    queue.send([str(i) for i in range(12)])
    messages = take(queue, 12)
    batch = "DeleteMessageBatch" if action == "ack" else "ChangeMessageVisibilityBatch"
    proxy.on(batch, fails("InternalError", only=[0, 3]))
    more = (60,) if action == "extend" else ()
    getattr(queue, action)(messages, *more)

    assert [len(b["Entries"]) for b in proxy.bodies(batch)] == [10, 2, 2]


def test_all_are_tried_before_an_ack_fails(queue, proxy):
    queue.send([str(i) for i in range(25)])
    messages = take(queue, 25)
    proxy.on("DeleteMessageBatch", says(503, "ServiceUnavailable"))

    with pytest.raises(Unavailable):
        queue.ack(messages)
    depth = queue.depth()
    assert (depth.waiting, depth.in_flight) == (0, 10)
    queue.ack(messages)
    assert queue.depth().in_flight == 0


def test_a_send_that_failed_in_part_is_unavailable(queue, proxy):
    proxy.on("SendMessageBatch", fails("InternalError", only=[1]), times=2)

    with pytest.raises(Unavailable):
        queue.send(["1", "2", "3"])


def test_an_entry_without_an_answer_is_a_failure(queue, proxy):
    def forgets(forward):
        status, headers, body = forward()
        reply = json.loads(body)
        reply["Successful"].pop()
        return status, headers, json.dumps(reply).encode()

    queue.send(["body"])
    messages = take(queue, 1)
    proxy.on("DeleteMessageBatch", forgets, times=2)

    with pytest.raises(Unavailable, match="no answer"):
        queue.ack(messages)


def test_of_many_failures_the_one_that_waiting_does_not_mend_is_raised(queue, proxy):
    queue.send([str(i) for i in range(25)])
    messages = take(queue, 25)
    proxy.on("DeleteMessageBatch", says(503, "ServiceUnavailable"))
    proxy.on("DeleteMessageBatch", says(400, "AccessDenied"))

    with pytest.raises(Denied):
        queue.ack(messages)


# Burying


def test_the_dead_letter_queue_has_the_body_with_its_reason_beside_it(queue, client, name):
    queue.send(["body"])
    (message,) = take(queue, 1)
    queue.bury(message, "why\x00 not")
    (found,) = client.receive_message(QueueUrl=f"{name}-dead", MessageAttributeNames=["All"])[
        "Messages"
    ]

    assert found["Body"] == "body"
    assert {k: v["StringValue"] for k, v in found["MessageAttributes"].items()} == {
        "bucketward-id": message.id,
        "bucketward-reason": "why\ufffd not",
        "bucketward-sent-at": str(round(message.sent_at.timestamp() * 1000)),
    }


def test_a_message_that_could_not_be_buried_stays(queue, proxy):
    queue.send(["body"])
    (message,) = take(queue, 1)
    proxy.on("SendMessage", says(503, "ServiceUnavailable"))

    with pytest.raises(Unavailable):
        queue.bury(message, "why")
    assert "DeleteMessageBatch" not in proxy.actions()
    queue.nack([message])
    assert len(take(queue, 1)) == 1


def test_burying_again_after_half_of_it_failed_does_not_double_the_letter(queue, proxy):
    queue.send(["body"])
    (message,) = take(queue, 1)
    proxy.on("DeleteMessageBatch", says(503, "ServiceUnavailable"))

    with pytest.raises(Unavailable):
        queue.bury(message, "why")
    queue.bury(message, "why")
    assert len(take(queue, 1, dead=True)) == 1
    assert queue.dead(10, 0) == []
    assert queue.depth().in_flight == 0


def test_a_body_that_leaves_no_room_for_the_reason_is_buried_without(queue, proxy):
    queue.send(["x" * LIMIT])
    (message,) = take(queue, 1)
    too_long = "One or more parameters are invalid. Reason: Message must be shorter than 262144."
    proxy.on("SendMessage", says(400, "InvalidParameterValue", too_long))
    queue.bury(message, "why")
    (dead,) = take(queue, 1, dead=True)

    assert dead.body == message.body
    assert dead.reason == ""


def test_dead_letters_are_settled_in_their_own_queue(queue, proxy, name):
    queue.send(["dead", "live"])
    dead, live = sorted(take(queue, 2), key=lambda m: m.body)
    queue.bury(dead, "why")
    (dead,) = take(queue, 1, dead=True)
    proxy.asked.clear()
    assert len(queue.extend([dead, live], 60)) == 2
    queue.nack([dead], 30)
    queue.ack([dead, live])
    asked = {
        (action, body["QueueUrl"].rpartition("/")[2], len(body["Entries"]))
        for action, body in proxy.asked
    }

    assert asked == {
        (action, each, 1)
        for action in ("ChangeMessageVisibilityBatch", "DeleteMessageBatch")
        for each in (name, f"{name}-dead")
    }


# What can be wrong


FAULTS = [
    (says(400, "AccessDenied"), Denied, "allow us sqs:"),
    (says(403, "AccessDeniedException"), Denied, "allow us sqs:"),
    (says(403, "InvalidClientTokenId"), Denied, "credentials"),
    (says(403, "ExpiredToken"), Denied, "credentials"),
    (says(403, "SignatureDoesNotMatch"), Denied, "clock"),
    (says(400, "KMS.AccessDeniedException"), Denied, "kms:Decrypt"),
    (says(400, "KmsAccessDenied"), Denied, "kms:Decrypt"),
    (says(400, "KMS.DisabledException"), Unavailable, "enabled"),
    (says(400, "AWS.SimpleQueueService.NonExistentQueue"), NotFound, "make the queue"),
    (says(400, "QueueDoesNotExist"), NotFound, "make the queue"),
    (says(400, "RequestThrottled"), Unavailable, "too often"),
    (says(400, "Throttling"), Unavailable, "too often"),
    (says(403, "RequestLimitExceeded"), Unavailable, "too often"),
    (says(403, "AWS.SimpleQueueService.OverLimit"), Unavailable, "in flight"),
    (says(500, "InternalError"), Unavailable, "InternalError"),
    (says(503, "ServiceUnavailable"), Unavailable, "ServiceUnavailable"),
    (says(400, "SomethingNew"), Unavailable, "SomethingNew"),
    (hangs_up, Unavailable, "cannot be reached"),
]


@pytest.mark.parametrize(("fault", "kind", "text"), FAULTS)
def test_what_sqs_says_becomes_one_of_six_errors(queue, proxy, fault, kind, text):
    for call in (queue.ping, lambda: queue.receive(1, 0), lambda: queue.send(["body"])):
        proxy.on("*", fault)
        with pytest.raises(kind, match=text) as caught:
            call()
        assert proxy.faults == []
        assert caught.value.backend == "sqs"
        assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (says(403, "AccessDenied"), Denied),
        (says(503, "ServiceUnavailable"), Unavailable),
        (hangs_up, Unavailable),
    ],
)
def test_every_call_says_what_is_wrong(queue, proxy, fault, kind):
    queue.send(["1", "2"])
    messages = take(queue, 2)
    for call in (
        lambda: queue.dead(1, 0),
        lambda: queue.ack(messages),
        lambda: queue.nack(messages),
        lambda: queue.extend(messages, 30),
        lambda: queue.bury(messages[0], "why"),
        queue.depth,
    ):
        proxy.on("*", fault)
        with pytest.raises(kind):
            call()


def test_every_missing_permission_is_named_and_found_by_ping(queue, proxy):
    requests = {
        "GetQueueUrl": "GetQueueUrl",
        "GetQueueAttributes": "GetQueueAttributes",
        "SendMessageBatch": "SendMessage",
        "ReceiveMessage": "ReceiveMessage",
        "DeleteMessageBatch": "DeleteMessage",
        "ChangeMessageVisibilityBatch": "ChangeMessageVisibility",
    }
    for request, permission in requests.items():
        proxy.on(request, says(403, "AccessDenied"))
        with pytest.raises(Denied) as caught:
            queue.ping()
        assert caught.value.reason == f"sqs:{permission}"
        assert caught.value.reason in sqs.PERMISSIONS
    queue.ping()


def test_a_missing_permission_for_the_dead_letters_is_found_too(queue, proxy, name):
    proxy.on("ReceiveMessage", lambda forward: forward())
    proxy.on("ReceiveMessage", says(403, "AccessDenied"))

    with pytest.raises(Denied, match=f"{name}-dead"):
        queue.ping()


def test_a_key_that_we_may_not_use_is_named(once, client, proxy):
    key = "arn:aws:kms:us-east-1:123456789012:key/0a1b"
    name = make(client, KmsMasterKeyId=key)
    with running(proxy) as url:
        queue = open_sqs(f"sqs://us-east-1/{name}?endpoint={url}", credentials)
        proxy.on("ReceiveMessage", says(400, "KMS.AccessDeniedException"))
        with pytest.raises(Denied, match=key) as receiving:
            queue.receive(1, 0)
        proxy.on("SendMessageBatch", fails("KMS.AccessDeniedException", sender=True))
        with pytest.raises(Denied, match=key) as sending:
            queue.send(["body"])
        queue.close()

    assert receiving.value.reason == "kms:Decrypt"
    assert sending.value.reason == "kms:GenerateDataKey"


TOO_LONG = "One or more parameters are invalid. Reason: Message must be shorter than 1024 bytes."


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (says(400, "InvalidMessageContents"), "unsupported"),
        (says(400, "AWS.SimpleQueueService.BatchRequestTooLong"), "too-large"),
        (says(400, "InvalidParameterValue", TOO_LONG), "too-large"),
    ],
)
def test_a_body_that_this_queue_does_not_take_is_unsupported(queue, proxy, fault, reason):
    proxy.on("SendMessageBatch", fault)

    with pytest.raises(Unsupported) as caught:
        queue.send(["body"])
    assert caught.value.reason == reason


@pytest.mark.parametrize("body", [b"<html>not SQS", b"{}", b"[]", b'{"Messages": [{}]}'])
def test_an_answer_that_is_not_of_sqs_is_unavailable(queue, proxy, body):
    queue.send(["1"])
    messages = take(queue, 1)
    calls = [
        lambda: queue.send(["body"]),
        lambda: queue.ack(messages),
        lambda: queue.extend(messages, 30),
        queue.depth,
        queue.ping,
    ]
    if b"Messages" in body:
        calls.append(lambda: queue.receive(1, 0))
    for call in calls:
        proxy.on("*", lambda _forward: (200, {}, body), times=2)
        with pytest.raises(Unavailable):
            call()
        proxy.faults.clear()


def test_a_request_whose_answer_is_lost_is_unavailable_and_loses_nothing(queue, proxy):
    proxy.on("SendMessageBatch", hangs_up_after)

    with pytest.raises(Unavailable):
        queue.send(["body"])
    queue.send(["body"])
    assert len(take(queue, 2)) == 2


def test_botocore_tries_again_what_may_pass(proxy, name, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    with running(proxy) as url:
        queue = open_sqs(f"sqs://us-east-1/{name}?endpoint={url}", credentials)
        proxy.on("SendMessageBatch", says(503, "ServiceUnavailable"))
        queue.send(["body"])
        assert len(take(queue, 1)) == 1
        queue.close()


def test_nobody_at_the_endpoint_is_unavailable(once):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]

    with pytest.raises(Unavailable, match="cannot be reached"):
        open_sqs(f"sqs://us-east-1/events?endpoint=http://127.0.0.1:{port}", credentials)


def test_a_queue_that_is_not_there_is_not_found(moto):
    with pytest.raises(NotFound, match="sqs://us-east-1/nowhere does not exist"):
        open_sqs(f"sqs://us-east-1/nowhere?endpoint={moto.url}", credentials)


def test_a_queue_that_vanishes_is_not_found(moto, client):
    name = make(client)
    queue = open_sqs(f"sqs://us-east-1/{name}?endpoint={moto.url}", credentials)
    client.delete_queue(QueueUrl=name)

    with pytest.raises(NotFound):
        queue.ping()
    with pytest.raises(NotFound):
        queue.send(["body"])
    queue.close()


def test_a_dead_letter_queue_that_vanished_is_not_found(moto, client):
    name = make(client)
    client.delete_queue(QueueUrl=f"{name}-dead")

    with pytest.raises(NotFound, match=f"{name}-dead does not exist"):
        open_sqs(f"sqs://us-east-1/{name}?endpoint={moto.url}", credentials)


def test_a_queue_without_dead_letters_is_refused(moto, client):
    name = f"lonely-{uuid4().hex}"
    client.create_queue(QueueName=name)

    with pytest.raises(ConfigError, match="has no dead-letter queue"):
        open_sqs(f"sqs://us-east-1/{name}?endpoint={moto.url}", credentials)


def test_a_changed_redrive_policy_is_seen_by_ping(moto, client):
    name = make(client)
    queue = open_sqs(f"sqs://us-east-1/{name}?endpoint={moto.url}", credentials)
    policy = client.get_queue_attributes(QueueUrl=name, AttributeNames=["RedrivePolicy"])
    redrive = json.loads(policy["Attributes"]["RedrivePolicy"]) | {"maxReceiveCount": 7}
    client.set_queue_attributes(QueueUrl=name, Attributes={"RedrivePolicy": json.dumps(redrive)})
    queue.ping()
    queue.close()

    assert queue.max_deliveries == 7


def test_a_queue_whose_leases_last_no_time_is_refused(moto, client):
    name = make(client, VisibilityTimeout="0")

    with pytest.raises(ConfigError, match="visibility timeout"):
        open_sqs(f"sqs://us-east-1/{name}?endpoint={moto.url}", credentials)


def test_the_lease_is_the_queues_own_unless_told_otherwise(moto, client):
    name = make(client, VisibilityTimeout="77")
    queue = open_sqs(f"sqs://us-east-1/123456789012/{name}?endpoint={moto.url}", credentials)
    queue.send(["body"])
    (message,) = take(queue, 1)
    queue.close()

    assert message.leased_until == pytest.approx(time.time() + 77, abs=2)


@pytest.mark.parametrize(
    "url",
    [
        "sqs://",
        "sqs://events",
        "sqs://us-east-1/",
        "sqs://us-east-1/12345/events",
        "sqs://us-east-1/123456789012/a/b",
        "sqs://us-east-1/events.fifo",
        "sqs://us-east-1/ev%2Fents",
        "sqs://AKIA:secret@us-east-1/events",
        "sqs://us-east-1/events?secret_key=secret",
        "sqs://us-east-1/events?endpoint=ftp://host",
        "sqs://us-east-1/events?endpoint=http://me:secret@host",
        "sqs://us-east-1/events?lease=0",
        "sqs://us-east-1/events?lease=43201",
        "https://sqs.us-east-1.amazonaws.com/123456789012/events",
    ],
)
def test_a_bad_url_is_refused_without_repeating_secrets(url):
    with pytest.raises(ConfigError) as caught:
        open_sqs(url, credentials)

    assert "=secret" not in str(caught.value)
    assert ":secret" not in str(caught.value)
