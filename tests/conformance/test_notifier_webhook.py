import base64
import datetime as dt
import email.utils
import ipaddress
import json
import socket
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bucketward.errors import ConfigError, Denied, NotFound, Unavailable, Unsupported
from bucketward.notifiers.webhook import (
    WebhookNotifier,
    is_public,
    new_secret,
    open_webhook,
    sign,
    verify,
)
from bucketward.testing.notifier import NotifierSuite, note
from servers.pki import make_authority, make_certificate

SECRET = (
    "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # the example of the specification's own libraries
)
TOKEN = "T0KEN-in-the-path"


class Hook:
    """A receiver: remembers every request and answers as it is told."""

    def __init__(self, context=None):
        self.requests = []
        self.connections = 0
        self.answer = lambda handler: handler.reply(204)
        hook = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                hook.requests.append((self.path, dict(self.headers), body))
                hook.answer(self)

            def reply(self, status, body=b"", **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def get_request(self):
                sock, address = super().get_request()
                hook.connections += 1
                return sock, address

            def finish_request(self, request, client_address):
                if context is None:
                    super().finish_request(request, client_address)
                    return
                with context.wrap_socket(request, server_side=True) as tls:
                    super().finish_request(tls, client_address)

            def handle_error(self, *args):
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/hook/{TOKEN}?sig={TOKEN}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def hook():
    hook = Hook()
    yield hook
    hook.close()


def open_local(hook, **more):
    return open_webhook(hook.url, secret=SECRET, allow_private=True, **more)


@contextmanager
def raw_server(talk):
    """Serve each connection by `talk(sock)`, on sockets, for what no HTTP library would send."""
    listener = socket.create_server(("127.0.0.1", 0))
    stopping = threading.Event()

    def serve():
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            if stopping.is_set():
                sock.close()
                return
            with sock, suppress(OSError):
                talk(sock, stopping)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/{TOKEN}"
    finally:
        stopping.set()
        socket.create_connection(listener.getsockname()).close()
        thread.join()
        listener.close()


def failure(notifier):
    """Send one note and return how it failed, having seen that no secret is in the message."""
    error = notifier.send([note("n1", {"a": 1})])["n1"]
    assert error.backend == "webhook"
    for secret in (TOKEN, SECRET, SECRET[6:], "sig="):
        assert secret not in str(error)
        assert secret not in repr(error)
        assert secret not in repr(error.__cause__)
    return error


class TestWebhookNotifier(NotifierSuite):
    @pytest.fixture
    def notifier(self, hook):
        self.hook = hook
        self.refused = set()

        hook.answer = lambda handler: handler.reply(
            500 if handler.headers["webhook-id"] in self.refused else 204
        )
        return open_local(hook)

    def received(self, notifier):
        found = []
        for _, headers, body in self.hook.requests:
            verify(headers, body, SECRET)
            if headers["webhook-id"] not in self.refused:
                found.append((headers["webhook-id"], json.dumps(json.loads(body)["data"])))
        return found

    def refuse(self, notifier, note_id):
        self.refused.add(note_id)


# What is sent


def test_a_note_is_one_signed_post(hook):
    assert open_local(hook).send([note("n1", {"key": "ü\n"})]) == {}

    ((path, headers, body),) = hook.requests
    assert path == f"/hook/{TOKEN}?sig={TOKEN}"
    assert headers["Host"] == f"127.0.0.1:{hook.port}"
    assert headers["Content-Type"] == "application/json"
    assert headers["webhook-id"] == "n1"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 5
    assert json.loads(body) == {
        "type": "scanResult",
        "subject": "a subject",
        "attributes": {"scanResult": "Infected"},
        "data": {"key": "ü\n"},
    }
    assert verify(headers, body, SECRET) is None


def test_the_signature_is_the_one_that_standard_webhooks_libraries_expect():
    # https://github.com/standard-webhooks/standard-webhooks: the vector of its libraries' tests
    headers = sign(
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        b'{"test": 2432232314}',
        [base64.b64decode(SECRET.removeprefix("whsec_"))],
        1614265330,
    )

    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_note_that_is_tampered_with_does_not_verify(hook):
    open_local(hook).send([note("n1", {"verdict": "Clean"})])
    ((_, headers, body),) = hook.requests

    forged = [
        (headers, body.replace(b"Clean", b"Dirty")),
        (headers, body + b" "),
        ({**headers, "webhook-id": "n2"}, body),
        ({**headers, "webhook-timestamp": str(int(headers["webhook-timestamp"]) + 1)}, body),
        ({**headers, "webhook-signature": "v1," + base64.b64encode(bytes(32)).decode()}, body),
        ({**headers, "webhook-signature": headers["webhook-signature"][3:]}, body),
        ({**headers, "webhook-signature": headers["webhook-signature"].replace("v1", "v1a")}, body),
        ({**headers, "webhook-signature": "v1,é\udcff"}, body),
        ({**headers, "webhook-signature": ""}, body),
        ({**headers, "webhook-timestamp": "now"}, body),
        ({**headers, "webhook-timestamp": "٣"}, body),
        ({}, body),
    ]
    for bad_headers, bad_body in forged:
        with pytest.raises(Denied):
            verify(bad_headers, bad_body, SECRET)
    with pytest.raises(Denied):
        verify(headers, body, new_secret())


def test_a_moved_full_stop_does_not_verify():
    # "a.1" + "2..." must not be read as "a" + "1.2...": an id with a full stop is refused.
    headers = sign("a.5", b"{}", [base64.b64decode(SECRET[6:])], int(time.time()))

    with pytest.raises(Denied):
        verify(headers, b"{}", SECRET)


def test_an_old_note_does_not_verify_nor_one_from_the_future():
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    for shift in (-301, 301):
        headers = sign("n1", b"{}", [key], int(time.time()) + shift)
        with pytest.raises(Denied, match="clock"):
            verify(headers, b"{}", SECRET)
    verify(sign("n1", b"{}", [key], int(time.time()) - 200), b"{}", SECRET)
    with pytest.raises(Denied):
        verify(sign("n1", b"{}", [key], int(time.time()) - 200), b"{}", SECRET, tolerance=100)


def test_header_names_are_compared_in_any_case(hook):
    open_local(hook).send([note("n1", 1)])
    ((_, headers, body),) = hook.requests

    verify({name.upper(): value for name, value in headers.items()}, body, SECRET)


def test_while_a_secret_is_exchanged_receivers_with_either_are_served(hook):
    old, new = new_secret(), new_secret()
    open_webhook(hook.url, secret=f"{new} {old}", allow_private=True).send([note("n1", 1)])
    ((_, headers, body),) = hook.requests

    verify(headers, body, old)
    verify(headers, body, new)
    verify(headers, body, f"{old} {new_secret()}")


def test_a_retry_bears_the_same_id_and_a_signature_of_its_own(hook):
    notifier = open_local(hook)
    hook.answer = lambda handler: handler.reply(503)
    assert set(notifier.send([note("n1", 1)])) == {"n1"}
    hook.answer = lambda handler: handler.reply(200, b"thanks")
    assert notifier.send([note("n1", 1)]) == {}

    assert [headers["webhook-id"] for _, headers, _ in hook.requests] == ["n1", "n1"]


@pytest.mark.parametrize("bad", ["a b", "a\r\nX-Evil: 1", "a\tb", "", "é", "x" * 256])
def test_an_id_that_could_forge_a_header_or_a_signature_is_not_sent(hook, bad):
    failures = open_local(hook).send([note(bad, 1), note("good", 2)])

    assert set(failures) == {bad}
    assert isinstance(failures[bad], Unsupported)
    assert len(hook.requests) == 1


def test_a_full_stop_in_an_id_does_not_reach_what_is_signed(hook):
    assert open_local(hook).send([note("0123abcd.scanResult", 1)]) == {}
    ((_, headers, body),) = hook.requests

    assert headers["webhook-id"] == "0123abcd-scanResult"
    verify(headers, body, SECRET)


# What is answered


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, Unsupported),
        (401, Denied),
        (403, Denied),
        (404, NotFound),
        (408, Unavailable),
        (410, NotFound),
        (413, Unsupported),
        (425, Unavailable),
        (429, Unavailable),
        (500, Unavailable),
        (502, Unavailable),
        (503, Unavailable),
    ],
)
def test_an_answer_says_whether_to_try_again(hook, status, expected):
    hook.answer = lambda handler: handler.reply(status, b"secret details <b>")

    error = failure(open_local(hook))

    assert type(error) is expected
    assert f"http://127.0.0.1:{hook.port} answered {status}" in str(error)
    assert "details" not in str(error)


def test_retry_after_is_handed_on_within_reason(hook):
    in_a_minute = email.utils.format_datetime(
        dt.datetime.now(dt.UTC) + dt.timedelta(seconds=60), usegmt=True
    )
    for said, low, high in [
        ("7", 7, 7),
        (in_a_minute, 50, 60),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("999999999999", 86400, 86400),
    ]:
        hook.answer = lambda handler, said=said: handler.reply(429, Retry_After=said)
        assert low <= failure(open_local(hook)).retry_after <= high
    for said in ("soon", "-5", "1e9", "", "²", "Wed, 99 Zzz 99999 00:00:00 GMT"):
        hook.answer = lambda handler, said=said: handler.reply(
            429, **{"Retry-After": said.encode("latin-1").decode("latin-1")}
        )
        assert failure(open_local(hook)).retry_after is None


def test_a_redirect_is_a_failure_that_says_so_and_leads_nowhere(hook):
    inner = Hook()
    try:
        for status in (301, 302, 303, 307, 308):
            hook.answer = lambda handler, status=status: handler.reply(
                status, Location=f"http://127.0.0.1:{inner.port}/latest/meta-data"
            )
            error = failure(open_local(hook))

            assert type(error) is Unsupported
            assert "redirect" in str(error)
        assert inner.connections == 0
    finally:
        inner.close()


def test_proxies_of_the_environment_are_not_used(hook, monkeypatch):
    proxy = Hook()
    try:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")

        assert open_local(hook).send([note("n1", 1)]) == {}
        assert (len(hook.requests), proxy.connections) == (1, 0)
    finally:
        proxy.close()


def drip(*, head, step):
    def talk(sock, stopping):
        sock.recv(65536)
        sock.sendall(head)
        while not stopping.is_set():
            sock.sendall(step)
            stopping.wait(0.05)

    return talk


@pytest.mark.parametrize(
    ("head", "step"),
    [
        (b"", b""),  # accepts and says nothing
        (b"HTTP/1.1 200", b" "),  # a status line without end
        (b"HTTP/1.1 200 OK\r\n", b"X"),  # a header without end
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),  # always just about to answer
    ],
)
def test_a_server_that_drips_is_left_at_the_deadline(head, step):
    with raw_server(drip(head=head, step=step)) as url:
        begun = time.monotonic()
        error = failure(open_webhook(url, secret=SECRET, allow_private=True, timeout=0.4))

    assert type(error) is Unavailable
    assert "in time" in str(error)
    assert time.monotonic() - begun < 1.5


def test_a_server_that_does_not_read_is_left_at_the_deadline():
    def talk(sock, stopping):
        stopping.wait(5)

    with raw_server(talk) as url:
        begun = time.monotonic()
        notifier = open_webhook(url, secret=SECRET, allow_private=True, timeout=0.4)
        error = notifier.send([note("n1", "x" * 20_000_000)])["n1"]

    assert type(error) is Unavailable
    assert time.monotonic() - begun < 2


def test_a_huge_or_endless_answer_costs_nothing():
    sent = 0

    def talk(sock, stopping):
        nonlocal sent
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")
        while not stopping.is_set():
            sent += sock.send(bytes(65536))

    with raw_server(talk) as url:
        begun = time.monotonic()
        notifier = open_webhook(url, secret=SECRET, allow_private=True, timeout=5)

        assert notifier.send([note("n1", 1)]) == {}
    assert time.monotonic() - begun < 2
    assert sent < 20_000_000  # no more than sockets buffer


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"\xff\xfe\x00" * 50,
    ],
)
def test_what_is_not_http_is_no_delivery(answer):
    def talk(sock, stopping):
        sock.recv(65536)
        sock.sendall(answer)

    with raw_server(talk) as url:
        error = failure(open_webhook(url, secret=SECRET, allow_private=True, timeout=2))

    assert type(error) is Unavailable


def test_when_nobody_listens_the_batch_is_given_back_at_once():
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.close()
    notifier = open_webhook(
        f"http://127.0.0.1:{port}/{TOKEN}", secret=SECRET, allow_private=True, timeout=2
    )

    failures = notifier.send([note(f"n{i}", i) for i in range(100)])

    assert len(failures) == 100
    assert {type(error) for error in failures.values()} == {Unavailable}
    assert f"http://127.0.0.1:{port} cannot be reached" in str(failures["n0"])
    with pytest.raises(Unavailable):
        notifier.ping()


def test_a_note_whose_connection_breaks_does_not_hold_up_those_behind_it():
    def talk(sock, stopping):
        request = sock.recv(65536)
        if b"webhook-id: poison" not in request:
            sock.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    with raw_server(talk) as url:
        notifier = open_webhook(url, secret=SECRET, allow_private=True, timeout=2)

        assert set(notifier.send([note("poison", 1), note("n2", 2)])) == {"poison"}


# Where it may go


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "LOCALHOST.",
        "[::1]",
        "0.0.0.0",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[64:ff9b:1::7f00:1]",
        "[2002:7f00:1::]",
        "127.1",
        "127.000.000.001",
        "0177.0.0.1",
        "0x7f.1",
        "0x7f000001",
        "2130706433",
        "017700000001",
        "①②⑦.⓪.⓪.①",
        "169.254.169.254",
        "2852039166",
        "[fd00:ec2::254]",
        "[fe80::1]",
        "[fec0::1]",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.2.1",
        "224.0.0.1",
        "[ff02::1]",
        "240.0.0.1",
        "255.255.255.255",
    ],
)
def test_a_private_address_is_refused_before_any_connection(hook, host):
    notifier = open_webhook(f"https://{host}:{hook.port}/{TOKEN}", secret=SECRET, timeout=3)

    error = failure(notifier)

    if error.__cause__ is None:  # one that the resolver does not know is refused by that
        assert type(error) is Denied
        assert error.reason == "private-address"
    else:
        assert "cannot be resolved" in str(error)
    with pytest.raises((Denied, Unavailable)):
        notifier.ping()
    assert hook.connections == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "127.1", "0177.0.0.1"])
def test_the_refusal_is_about_the_address_since_with_leave_it_is_reached(hook, host):
    url = f"http://{host}:{hook.port}/"

    assert open_webhook(url, secret=SECRET, allow_private=True).send([note("n1", 1)]) == {}
    assert hook.connections == 1


def test_a_name_with_one_private_address_among_public_ones_is_refused(hook):
    notifier = WebhookNotifier(
        f"https://hooks.example:{hook.port}/{TOKEN}",
        secret=SECRET,
        resolve=lambda host, port: ["93.184.215.14", "127.0.0.1"],
    )

    assert failure(notifier).reason == "private-address"
    assert hook.connections == 0


def test_the_name_is_asked_for_once_so_a_second_answer_cannot_lead_elsewhere(hook):
    answers = iter([["127.0.0.1"], ["127.0.0.2"], ["169.254.169.254"]])
    asked = []

    def rebinding(host, port):
        asked.append(host)
        return next(answers)

    notifier = WebhookNotifier(
        f"http://rebind.example:{hook.port}/", secret=SECRET, allow_private=True, resolve=rebinding
    )

    assert notifier.send([note("n1", 1)]) == {}
    assert asked == ["rebind.example"]
    assert hook.requests[0][1]["Host"] == f"rebind.example:{hook.port}"


def test_a_resolver_that_answers_names_or_nothing_is_refused():
    for answer in (["localhost"], ["127.0.0.1.nip.example"], []):
        notifier = WebhookNotifier(
            "https://hooks.example/", secret=SECRET, resolve=lambda host, port, a=answer: a
        )
        assert type(failure(notifier)) in (Denied, Unavailable)


def test_a_resolver_that_hangs_is_left_at_the_deadline():
    release = threading.Event()
    notifier = WebhookNotifier(
        "https://hooks.example/",
        secret=SECRET,
        timeout=0.3,
        resolve=lambda host, port: release.wait(10) and [],
    )
    begun = time.monotonic()

    error = failure(notifier)

    release.set()
    assert type(error) is Unavailable
    assert time.monotonic() - begun < 1.5


def test_an_unknown_name_is_tried_again_later():
    assert (
        type(failure(open_webhook("https://no-such-host.invalid/", secret=SECRET))) is Unavailable
    )


def test_only_plainly_public_addresses_are_public():
    for public in ("8.8.8.8", "93.184.215.14", "2606:4700::1111", "64:ff9b::808:808"):
        assert is_public(public), public
    for nobodys in (
        "2001:db8::1",
        "2001::1",
        "3fff::1",
        "4000::1",
        "5f00::1",
        "100::1",
        "198.18.0.1",
        "203.0.113.1",
        "192.88.99.1",
        "192.0.0.192",
        "ff0e::1",
        "fe80::1%eth0",
        "2606:4700::1111%eth0",
        "64:ff9b::a00:1",
        "::ffff:10.0.0.1",
        "::",
        "",
        "localhost",
        "1.2.3",
        "08.8.8.8",
    ):
        assert not is_public(nobodys), nobodys
    for network in ("10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "fc00::/7", "fe80::/10"):
        net = ipaddress.ip_network(network)
        assert not is_public(str(net[0]))
        assert not is_public(str(net[-1]))


# TLS


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """Certificates for hooks.example: by an authority of ours, and self-signed."""
    folder = tmp_path_factory.mktemp("pki")
    authority, ca = make_authority(folder)
    return {
        "ca": ca,
        "good": make_certificate(folder, "hooks.example", authority),
        "self-signed": make_certificate(folder, "hooks.example"),
        "another": make_certificate(folder, "another.example", authority),
    }


@contextmanager
def tls_hook(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    names = []
    context.sni_callback = lambda _sock, name, _context: names.append(name)
    hook = Hook(context)
    hook.names = names
    try:
        yield hook
    finally:
        hook.close()


def open_tls(hook, ca):
    return WebhookNotifier(
        f"https://hooks.example:{hook.port}/{TOKEN}",
        secret=SECRET,
        allow_private=True,
        ca_file=str(ca),
        resolve=lambda host, port: ["127.0.0.1"],
    )


def test_over_tls_the_name_is_kept_though_the_address_was_chosen_before(pki):
    with tls_hook(pki["good"]) as hook:
        notifier = open_tls(hook, pki["ca"])
        notifier.ping()

        assert notifier.send([note("n1", 1)]) == {}
        assert set(hook.names) == {"hooks.example"}
        assert hook.requests[0][1]["Host"] == f"hooks.example:{hook.port}"


@pytest.mark.parametrize("certificate", ["self-signed", "another"])
def test_a_certificate_that_does_not_prove_the_name_gets_nothing(pki, certificate):
    with tls_hook(pki[certificate]) as hook:
        error = failure(open_tls(hook, pki["ca"]))

        assert type(error) is Unavailable
        assert "certificate" in str(error)
        assert not hook.requests


def test_our_own_authority_is_trusted_only_where_it_is_named(pki):
    with tls_hook(pki["good"]) as hook:
        url = f"https://hooks.example:{hook.port}/"
        notifier = WebhookNotifier(
            url, secret=SECRET, allow_private=True, resolve=lambda host, port: ["127.0.0.1"]
        )

        assert "not trusted" in str(failure(notifier))
        assert not hook.requests


def test_plain_http_where_tls_is_expected_gets_nothing(pki, hook):
    assert type(failure(open_tls(hook, pki["ca"]))) is Unavailable
    assert not hook.requests


# How it is configured


@pytest.mark.parametrize(
    "secret",
    [
        "",
        " ",
        "hunter2",
        "whsec_",
        "whsec_c2hvcnQ=",
        "whsec_!!!!",
        "whsec_" + base64.b64encode(bytes(65)).decode(),
    ],
)
def test_a_missing_or_weak_secret_is_refused_with_advice(secret):
    with pytest.raises(ConfigError, match="openssl rand") as caught:
        open_webhook("https://hooks.example/", secret=secret)

    assert not secret.strip() or secret[6:] == "" or secret not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_the_advice_on_secrets_works():
    made = subprocess.run(
        ["sh", "-c", 'echo "whsec_$(openssl rand -base64 32)"'], capture_output=True, check=True
    )

    open_webhook("https://hooks.example/", secret=made.stdout.decode())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example",
        "ftp://hooks.example/",
        "file:///etc/passwd",
        "https://",
        "https:///path",
        f"https://user:{TOKEN}@hooks.example/",
        "https://hooks.example/#fragment",
        "https://hooks.example:99999/",
        "https://hooks.example:x/",
        "https://hooks.example/a b",
        "https://hooks.example/a\r\nX-Evil: 1",
        "https://hooks.example\\@evil.example/",
        "https://[::1/",
        "https://" + "a" * 64 + ".example/",
        "http://hooks.example/",
    ],
)
def test_a_url_that_could_mislead_is_refused_when_opened(url):
    with pytest.raises(ConfigError) as caught:
        open_webhook(url, secret=SECRET)

    assert TOKEN not in str(caught.value)


def test_a_file_of_certificates_that_is_missing_is_told_when_opened():
    with pytest.raises(ConfigError, match="no-such-file"):
        open_webhook("https://hooks.example/", secret=SECRET, ca_file="/no-such-file")
