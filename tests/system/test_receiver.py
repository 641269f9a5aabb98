"""The event receiver over real sockets: stores that push, and those who would like to be one."""

import base64
import http.client
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from urllib.parse import urlsplit

import pytest

from bucketward.agents.receiver import MAX_BODY, Receiver
from bucketward.errors import ConfigError, Unavailable, Unsupported

SECRET = "open-sesame-open-sesame"
BEARER = {"Authorization": f"Bearer {SECRET}"}
EVENT = json.dumps({"Records": [{"eventName": "ObjectCreated:Put"}]})


class Inbox:
    """As much of a queue as a receiver uses, with faults to order."""

    def __init__(self):
        self.bodies = []
        self.fault = None
        self.seconds = 0.0
        self.pings = 0

    def send(self, bodies):
        time.sleep(self.seconds)
        if self.fault:
            raise self.fault
        self.bodies.extend(bodies)

    def ping(self):
        self.pings += 1
        if self.fault:
            raise self.fault


@pytest.fixture(scope="module")
def shared():
    inbox = Inbox()
    with serving(inbox) as receiver:
        yield inbox, receiver


@pytest.fixture
def inbox():
    return Inbox()


@contextmanager
def serving(inbox, *, pause=0.02, **options):
    receiver = Receiver(inbox, port=0, secret=SECRET, pause=pause, **options)
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()


@pytest.fixture
def receiver(shared, inbox):
    """Return a receiver that is there already, and now delivers to this test's inbox."""
    shared[0].__dict__ = inbox.__dict__
    return shared[1]


def address(receiver):
    url = urlsplit(receiver.url)
    return url.hostname, url.port


def ask(receiver, method="POST", path="/events", body=EVENT, headers=BEARER):
    with closing(http.client.HTTPConnection(*address(receiver), timeout=10)) as connection:
        connection.request(method, path, body, dict(headers))
        reply = connection.getresponse()
        return reply.status, reply.headers, json.loads(reply.read() or "null")


@contextmanager
def connected(receiver, data):
    with closing(socket.create_connection(address(receiver), timeout=10)) as connection:
        connection.sendall(data)
        yield connection


def everything(connection):
    data = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    return data


def test_a_store_that_pushes_finds_the_queue(receiver, inbox):
    status, _, _ = ask(receiver)

    assert status == 200
    assert inbox.bodies == [EVENT]


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/events", BEARER),
        ("/events", {"Authorization": f"bearer  {SECRET}"}),
        (
            "/events",
            {"Authorization": "Basic " + base64.b64encode(f"x:{SECRET}".encode()).decode()},
        ),
        (f"/events/{SECRET}", {}),
        (f"/events/{SECRET}/", {}),
        (f"/events/{SECRET}", {"Authorization": "Bearer of-somebody-else"}),
        (f"/events/{SECRET.replace('-', '%2D')}", {}),
    ],
)
def test_the_secret_may_stand_in_a_header_or_end_the_path(receiver, inbox, path, headers):
    status, _, _ = ask(receiver, path=path, headers=headers)

    assert status == 200
    assert inbox.bodies == [EVENT]


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/events", {}),
        ("/events/", {}),
        ("/events/wrong", {}),
        (f"/events/{SECRET}x", {}),
        (f"/events/{SECRET[:-1]}", {}),
        (f"/events/x/{SECRET}", {}),
        (f"/events?{SECRET}", {}),
        ("/events", {"Authorization": "Bearer wrong"}),
        ("/events", {"Authorization": "Bearer"}),
        ("/events", {"Authorization": f"Digest {SECRET}"}),
        ("/events", {"Authorization": SECRET}),
        ("/events", {"Authorization": "Basic !!!"}),
        (
            "/events",
            {"Authorization": "Basic " + base64.b64encode(f"{SECRET}:x".encode()).decode()},
        ),
        ("/events/%ff%fe", {}),
        ("/events/%C3%A9", {}),
    ],
)
def test_without_the_secret_nothing_is_queued(receiver, inbox, path, headers):
    status, _, answer = ask(receiver, path=path, headers=headers)

    assert status == 401
    assert SECRET not in json.dumps(answer)
    assert inbox.bodies == []


def test_other_paths_and_methods_are_refused(receiver, inbox):
    assert ask(receiver, path="/")[0] == 404
    assert ask(receiver, path="/event")[0] == 404
    assert ask(receiver, path="/docs", method="GET")[0] == 404
    status, _, answer = ask(receiver, method="GET")
    assert (status, answer) == (405, {"error": "Method Not Allowed"})
    assert inbox.bodies == []


def test_the_body_is_queued_as_it_is_even_if_it_is_no_event(receiver, inbox):
    texts = ["hello", '{"key": "\\u0000 ä 😀"}', "[]", ' {"a":\r\n\t1} ']

    for text in texts:
        assert ask(receiver, body=text.encode())[0] == 200
    assert inbox.bodies == texts


@pytest.mark.parametrize("body", [b"\xff\xfe{}", b'{"a": "\xed\xa0\x80"}', b"", b"  \n", b"a\0b"])
def test_what_is_no_text_is_refused(receiver, inbox, body):
    assert ask(receiver, body=body)[0] == 400
    assert inbox.bodies == []


def test_a_body_of_just_the_limit_is_taken_and_one_byte_more_is_not(receiver, inbox):
    assert ask(receiver, body="x" * MAX_BODY)[0] == 200
    assert ask(receiver, body="x" * (MAX_BODY + 1))[0] == 413
    assert [len(body) for body in inbox.bodies] == [MAX_BODY]


def test_a_big_body_is_refused_before_it_is_sent(receiver, inbox):
    header = b"POST /events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n" % SECRET.encode()

    with connected(receiver, header + b"Content-Length: 9999999999\r\n\r\n") as connection:
        assert everything(connection).startswith(b"HTTP/1.1 413 ")
    with connected(
        receiver, header + b"Expect: 100-continue\r\nContent-Length: 9999999999\r\n\r\n"
    ) as connection:
        assert everything(connection).startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_is_taken_and_an_endless_one_is_not(receiver, inbox):
    assert ask(receiver, body=iter([b"ab", b"c" * 70000, b"d"]))[0] == 200
    assert inbox.bodies == ["ab" + "c" * 70000 + "d"]

    def endless():
        while True:
            yield b"x" * 65536

    # The answer may be lost in the reset that ends the flood.
    with suppress(ConnectionError):
        assert ask(receiver, body=endless())[0] == 413
    assert len(inbox.bodies) == 1
    assert ask(receiver)[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        b"POST /events/" + b"x" * 20000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /events HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"POST /events HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 20000 + b"\r\n",
        b"\0\0\0\0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
def test_what_is_no_decent_request_is_cut_off(receiver, data):
    with closing(socket.create_connection(address(receiver), timeout=10)) as connection:
        with suppress(ConnectionError):
            connection.sendall(data)
        answer = everything(connection)

    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert ask(receiver)[0] == 200


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"POST /events HTTP/1.1\r\nHost: x\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nPOST /events HTTP/1.1\r\n",
        f"POST /events/{SECRET} HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n".encode(),
        f"POST /events/{SECRET} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode(),
        f"POST /events/{SECRET} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nab".encode(),
    ],
    ids=["nothing", "header", "second header", "body", "chunks", "silence"],
)
def test_who_dribbles_is_cut_off_while_others_are_served(inbox, begun):
    with serving(inbox, header_seconds=0.6, body_seconds=0.6) as receiver:
        began = time.monotonic()
        drop = b"" if b"\r\n\r\nab" in begun else b"1\r\nx\r\n" if b"chunked" in begun else b"X"
        cut = False
        with connected(receiver, begun) as slow:
            slow.settimeout(0.1)
            while time.monotonic() < began + 5 and not cut:
                try:
                    if begun:
                        slow.sendall(drop)
                    cut = slow.recv(4096) == b""
                except TimeoutError:
                    pass
                except ConnectionError:
                    cut = True
                assert ask(receiver)[0] == 200
        assert cut
        assert time.monotonic() - began < 2.5
    assert set(inbox.bodies) == {EVENT}


def test_a_crowd_of_idle_connections_is_bounded_and_goes_away(inbox):
    with serving(inbox, header_seconds=0.5, connections=20) as receiver:
        crowd = [socket.create_connection(address(receiver), timeout=10) for _ in range(60)]
        time.sleep(0.8)
        assert ask(receiver)[0] == 200
        for connection in crowd:
            assert everything(connection) == b""
            connection.close()


def test_a_connection_can_be_used_again_and_after_a_pause(inbox):
    with (
        serving(inbox, header_seconds=1.0) as receiver,
        closing(http.client.HTTPConnection(*address(receiver), timeout=10)) as connection,
    ):
        for pause in (0, 0.6, 0.6):
            time.sleep(pause)
            connection.request("POST", "/events", EVENT, BEARER)
            assert connection.getresponse().read() == b'{"queued":true}'
    assert len(inbox.bodies) == 3


def test_a_slow_queue_is_waited_for_longer_than_a_header(inbox):
    inbox.seconds = 0.8

    with serving(inbox, header_seconds=0.3, body_seconds=0.3) as receiver:
        assert ask(receiver)[0] == 200
    assert inbox.bodies == [EVENT]


def test_success_is_said_only_when_the_queue_has_it(receiver, inbox):
    inbox.seconds = 0.5
    began = time.monotonic()

    assert ask(receiver)[0] == 200
    assert time.monotonic() - began >= 0.5
    assert inbox.bodies == [EVENT]


def test_while_the_queue_is_away_the_store_is_told_to_try_again(receiver, inbox, caplog):
    inbox.fault = Unavailable("no route to the queue", backend="sqs", retry_after=6.2)

    status, headers, answer = ask(receiver)

    assert (status, headers["Retry-After"]) == (503, "7")
    assert answer == {"error": "the queue is not available"}
    assert "no route to the queue" in caplog.text
    inbox.fault = None
    assert ask(receiver)[0] == 200
    assert inbox.bodies == [EVENT]


def test_a_store_that_tries_again_without_pause_neither_floods_us_nor_the_log(inbox, caplog):
    inbox.fault = Unavailable("no route to the queue")
    began = time.monotonic()
    with serving(inbox, pause=0.5) as receiver, ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: ask(receiver)[0], range(40)))
        assert answers == [503] * 40
        assert time.monotonic() - began >= 1
        # Nor does one with the wrong secret, while others are served.
        inbox.fault = None
        wrong = [pool.submit(ask, receiver, headers={}) for _ in range(20)]
        began = time.monotonic()
        assert ask(receiver)[0] == 200
        assert time.monotonic() - began < 0.4
        assert {answer.result()[0] for answer in wrong} == {401}
        assert time.monotonic() - began >= 0.4
    assert caplog.text.count("no route to the queue") == 1


def test_what_the_queue_can_never_hold_is_refused_for_good(receiver, inbox):
    inbox.fault = Unsupported("too much", backend="sqs", reason="too-large")
    assert ask(receiver)[0] == 413
    inbox.fault = Unsupported("no such characters", backend="sqs")
    assert ask(receiver)[0] == 400


def test_a_hundred_stores_at_once_are_all_served(receiver, inbox):
    inbox.seconds = 0.01
    with ThreadPoolExecutor(25) as pool:
        answers = list(pool.map(lambda n: ask(receiver, body=f"event {n}")[0], range(100)))

    assert answers == [200] * 100
    assert sorted(inbox.bodies) == sorted(f"event {n}" for n in range(100))


def test_health_and_readiness_want_no_secret_and_say_nothing_of_us(receiver, inbox):
    assert ask(receiver, "GET", "/health", headers={})[0] == 200
    assert ask(receiver, "GET", "/ready", headers={})[0] == 200
    inbox.fault = Unavailable("sqs in account 123456789012 is away")
    time.sleep(2.1)
    status, _, answer = ask(receiver, "GET", "/ready", headers={})
    assert (status, answer) == (503, {"error": "the queue is not available"})
    assert ask(receiver, "GET", "/health", headers={})[0] == 200
    for _ in range(20):
        ask(receiver, "GET", "/ready", headers={})
    assert inbox.pings <= 3


def test_the_secret_is_never_logged(receiver, inbox, caplog):
    caplog.set_level(logging.DEBUG)
    inbox.fault = Unavailable("away")

    ask(receiver, path=f"/events/{SECRET}", headers={})
    ask(receiver, path=f"/{SECRET}", headers={})
    inbox.fault = ValueError("a bug")
    with closing(socket.create_connection(address(receiver), timeout=10)) as connection:
        connection.sendall(b"POST /events/%b HTTP/1.1\r\nHost: x\r\n" % SECRET.encode())
        connection.sendall(b"Content-Length: 1\r\n\r\nx")
        assert everything(connection).startswith(b"HTTP/1.1 500")
    assert "a bug" in caplog.text
    assert SECRET not in caplog.text


def test_stopping_finishes_what_is_on_its_way_and_is_prompt(inbox):
    inbox.seconds = 0.7
    with serving(inbox) as receiver, connected(receiver, b"POST /events HTTP/1.1\r\n"):
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, receiver)
            time.sleep(0.3)
            began = time.monotonic()
            receiver.stop(3)
            assert time.monotonic() - began < 2
            assert answer.result()[0] == 200
        with pytest.raises(ConnectionError):
            ask(receiver)
    assert inbox.bodies == [EVENT]


def test_stopping_does_not_wait_for_a_queue_that_hangs(inbox):
    release = threading.Event()
    inbox.send = lambda bodies: release.wait(20)
    receiver = Receiver(inbox, port=0, secret=SECRET)
    receiver.start()
    with connected(receiver, b"POST /events/%b HTTP/1.1\r\nHost: x\r\n" % SECRET.encode()) as slow:
        slow.sendall(b"Content-Length: 1\r\n\r\nx")
        time.sleep(0.2)
        began = time.monotonic()
        receiver.stop(1)
        assert time.monotonic() - began < 3
        assert not everything(slow).startswith(b"HTTP/1.1 200")
    release.set()


def test_a_port_that_is_taken_is_named_with_its_option(inbox, receiver):
    _, port = address(receiver)

    with pytest.raises(ConfigError) as caught:
        Receiver(inbox, port=port, secret=SECRET).start()
    assert str(port) in str(caught.value)
    assert "receiver.port" in str(caught.value)


def test_an_address_that_is_not_ours_is_named(inbox):
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 .*receiver\.host"):
        Receiver(inbox, "192.0.2.1", 0, secret=SECRET).start()


@pytest.mark.parametrize("secret", ["", "short"])
def test_without_a_decent_secret_there_is_no_receiver(inbox, secret):
    with pytest.raises(ConfigError, match=r"receiver\.secret"):
        Receiver(inbox, port=0, secret=secret)
