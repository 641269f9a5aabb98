"""A reverse proxy before an S3 server: enforces conditions it ignores, and fails on demand.

Ceph 16 ignores `x-amz-copy-source-if-match` and `If-Match` on DELETE.  The proxy looks at the
object first, under a lock on its key that every write through the proxy takes, so through the
proxy the conditions hold atomically.  Requests and answers pass byte for byte otherwise.

Runs as a process of its own, ``python -m servers.proxy HOST PORT ACCESS_KEY SECRET_KEY``, so that
it costs the test process nothing; it prints its port.
"""

import http.client
import json
import re
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

CONTROL = b"/__proxy__"


@dataclass(frozen=True)
class Proxy:
    """A running proxy; use its `url` as the endpoint."""

    url: str

    def fail(self, pattern: str, kind: str, times: int = 1, **more) -> None:
        """Fail the next `times` requests whose ``METHOD /target`` matches `pattern`.

        `kind` is ``answer`` (with status, code, message, headers, body), ``reset`` (no answer),
        ``truncate`` (half the body, then a reset), ``drip`` (a byte now and then) or ``delay``
        (seconds, then as usual).
        """
        self._control("POST", {"pattern": pattern, "kind": kind, "times": times, **more})

    def answer(self, pattern: str, status: int, code: str = "", message: str = "", **more) -> None:
        """Fail with an S3 error answer."""
        self.fail(pattern, "answer", status=status, code=code, message=message, **more)

    def clear(self) -> None:
        """Forget all rules and the log."""
        self._control("DELETE")

    def log(self) -> list[str]:
        """Return what was asked since `clear`: ``METHOD /target``."""
        return self._control("GET")

    def _control(self, method: str, rule: object = None):
        body = json.dumps(rule).encode()
        request = urllib.request.Request(f"{self.url}{CONTROL.decode()}", body, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)


@contextmanager
def run_proxy(
    upstream: str, access_key: str, secret_key: str, certificate: str = ""
) -> Iterator[Proxy]:
    """Start a proxy before `upstream`; its own looks are signed with the given keys.

    `certificate` is a PEM file with a key for "localhost" and makes it speak TLS, without control.
    """
    host, _, port = upstream.removeprefix("http://").partition(":")
    # pdeathsig: a test run that is killed outright leaves no proxy behind.
    program = ["setpriv", "--pdeathsig", "KILL", sys.executable, __file__]
    server = subprocess.Popen(
        [*program, host, port, access_key, secret_key, certificate],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = server.stdout.readline()
        if not line:
            raise RuntimeError(f"the proxy did not start: exit code {server.wait(5)}")
        origin = "https://localhost" if certificate else "http://127.0.0.1"
        yield Proxy(f"{origin}:{int(line)}")
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


class Server(socketserver.ThreadingTCPServer):
    """The listening side, with the rules and the locks."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(
        self, upstream: tuple[str, int], access_key: str, secret_key: str, certificate: str
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = upstream
        self.keys = (access_key, secret_key)
        self.lock = threading.Lock()
        self.rules: list[dict] = []
        self.log: deque[str] = deque(maxlen=10_000)
        self.locks: dict[bytes, threading.RLock] = {}
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )

    def rule_for(self, what: str) -> dict | None:
        with self.lock:
            self.log.append(what)
            for rule in self.rules:
                if rule["times"] > 0 and re.search(rule["pattern"], what):
                    rule["times"] -= 1
                    return rule
        return None

    def lock_of(self, target: bytes) -> threading.RLock:
        with self.lock:
            return self.locks.setdefault(target.partition(b"?")[0], threading.RLock())

    def etag(self, target: bytes, host: str) -> str | None:
        """Return the etag of what `target` names now, quoted; `None` if there is nothing."""
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        path = target.decode("latin-1")
        request = AWSRequest("HEAD", f"http://{host}{path}")
        S3SigV4Auth(Credentials(*self.keys), "s3", "us-east-1").add_auth(request)
        connection = http.client.HTTPConnection(*self.upstream, timeout=30)
        try:
            connection.request("HEAD", path, headers={**dict(request.headers), "Host": host})
            answer = connection.getresponse()
            return answer.headers["ETag"] if answer.status == 200 else None
        finally:
            connection.close()


class Handler(socketserver.StreamRequestHandler):
    """One client connection, and the one connection behind it."""

    disable_nagle_algorithm = True
    server: Server

    def handle(self) -> None:
        self.behind: socket.socket | None = None
        try:
            while self.exchange():
                pass
        except OSError:
            pass
        finally:
            if self.behind is not None:
                self.behind.close()

    def exchange(self) -> bool:
        """Pass one request and its answer; return whether the connection stays."""
        head = read_head(self.rfile)
        if not head:
            return False
        method, target, _ = head.split(b"\r\n")[0].split(b" ", 2)
        fields = parse(head)
        if target == CONTROL:
            return self.control(method.decode(), self.rfile.read(length_of(fields) or 0))
        what = f"{method.decode()} {target.decode('latin-1')}"
        rule = self.server.rule_for(what)
        kind = rule["kind"] if rule else ""
        if fields.get(b"expect", b"").lower() == b"100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"(?i)\r\nexpect:[^\r]*", b"", head)
        if kind == "reset":
            return self.reset()
        if kind == "answer":
            self.drain(fields)
            return self.reply(method, rule)
        if kind == "delay":
            time.sleep(rule["seconds"])
        with ExitStack() as locks:
            source = fields.get(b"x-amz-copy-source", b"")
            source = b"/" + source.lstrip(b"/") if source else b""
            if method in {b"PUT", b"POST", b"DELETE"}:
                for each in sorted({target, source} - {b""}):
                    locks.enter_context(self.server.lock_of(each))
            if not self.is_met(method, target, source, fields):
                self.drain(fields)
                code = {"status": 412, "code": "PreconditionFailed", "message": "By the proxy"}
                return self.reply(method, code)
            return self.forward(head, method, fields, kind=kind)

    def is_met(self, method: bytes, target: bytes, source: bytes, fields: dict) -> bool:
        host = fields[b"host"].decode()
        if source and b"x-amz-copy-source-if-match" in fields:
            found = self.server.etag(source, host)
            wanted = fields[b"x-amz-copy-source-if-match"].decode()
            return found is None or found == wanted
        if method == b"DELETE" and b"if-match" in fields and b"versionId=" not in target:
            found = self.server.etag(target, host)
            return found is None or found == fields[b"if-match"].decode()
        return True

    def forward(self, head: bytes, method: bytes, fields: dict, *, kind: str) -> bool:
        if self.behind is None:
            self.behind = socket.create_connection(self.server.upstream)
            self.behind.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.answers = self.behind.makefile("rb", 1 << 18)
        self.behind.sendall(head)
        relay(self.rfile, self.behind.sendall, fields, has_rest=False)
        while True:
            answer = read_head(self.answers)
            if not answer:
                return self.reset()
            status = int(answer.split(b" ", 2)[1])
            if status != 100:
                break
        found = parse(answer)
        self.wfile.write(answer)
        if method == b"HEAD" or status in {204, 304}:
            return keeps(found)
        if kind == "drip":
            while data := self.answers.read(1):
                self.wfile.write(data)
                time.sleep(0.05)
        if kind == "truncate":
            size = length_of(found) or 0
            self.wfile.write(self.answers.read(size // 2))
            self.wfile.flush()
            return self.reset()
        relay(self.answers, self.wfile.write, found, has_rest=True)
        return keeps(found)

    def drain(self, fields: dict) -> None:
        relay(self.rfile, lambda _: None, fields, has_rest=False)

    def reply(self, method: bytes, rule: dict) -> bool:
        code, message = rule.get("code", ""), rule.get("message", "")
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>" if code else ""
        body = rule.get("body", body)
        lines = [f"HTTP/1.1 {rule['status']} By The Proxy", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in rule.get("headers", {}).items()]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode())
        if method != b"HEAD":
            self.wfile.write(body.encode())
        return True

    def reset(self) -> bool:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def control(self, method: str, body: bytes) -> bool:
        with self.server.lock:
            if method == "POST":
                self.server.rules.append(json.loads(body))
            if method == "DELETE":
                self.server.rules.clear()
                self.server.log.clear()
            answer = json.dumps(list(self.server.log)).encode()
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
        return True


def read_head(stream) -> bytes:
    """Return the start line and the headers as they came, b"" at the end."""
    lines = []
    while line := stream.readline(1 << 16):
        lines.append(line)
        if line in {b"\r\n", b"\n"}:
            return b"".join(lines)
    return b""


def parse(head: bytes) -> dict[bytes, bytes]:
    pairs = (line.partition(b":") for line in head.split(b"\r\n")[1:] if line)
    return {name.lower(): value.strip() for name, _, value in pairs}


def length_of(fields: dict[bytes, bytes]) -> int | None:
    value = fields.get(b"content-length")
    return None if value is None else int(value)


def keeps(fields: dict[bytes, bytes]) -> bool:
    return fields.get(b"connection", b"").lower() != b"close"


def relay(stream, write, fields: dict[bytes, bytes], *, has_rest: bool) -> None:
    """Pass a body on as it comes: counted, chunked, or (an answer's) to the end."""
    if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
        while True:
            line = stream.readline(1 << 16)
            size = int(line.split(b";")[0], 16)
            write(line)
            copy(stream, write, size + 2)
            if size == 0:
                return
    left = length_of(fields)
    if left is None:
        if has_rest:
            while data := stream.read1(1 << 18):
                write(data)
            raise OSError("the end of the connection was the end of the body")
        return
    copy(stream, write, left)


def copy(stream, write, left: int) -> None:
    while left:
        data = stream.read1(min(left, 1 << 18))
        if not data:
            raise OSError("the body ended early")
        write(data)
        left -= len(data)


if __name__ == "__main__":
    with Server((sys.argv[1], int(sys.argv[2])), *sys.argv[3:6]) as listening:
        sys.stdout.write(f"{listening.server_address[1]}\n")
        sys.stdout.flush()
        listening.serve_forever(0.1)
