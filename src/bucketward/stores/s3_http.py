"""HTTP for the S3 store: signed requests over pooled CRT connections, bodies streamed both ways.

The CRT receives under a flow-control window and the calling thread does everything else, so at
most the window is in memory and no callback ever waits for a disk or a lock.  One plain GET per
object, not the parallel ranges of `awscrt.s3.S3Client`: those cannot be stopped before the first
part has come, need a second request for an empty object, could mix two objects, and `S3Client`
takes two servers that differ only in their port for one.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import threading
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any

import awscrt.auth
import awscrt.http
import awscrt.io
from awscrt.exceptions import AwsCrtError

from bucketward.errors import ConfigError, Unavailable
from bucketward.interfaces import CredentialsProvider
from bucketward.model import Credentials

WINDOW = 1 << 20
"""How many bytes of one body the CRT may receive ahead of us."""

SMALL = 256 << 10
"""A body up to this size is waited for as a whole: one wake-up of the calling thread."""

SLOWEST = 16 << 10
"""Bytes per second below which a body is given up, after ten times `stall` for a start."""

ATTEMPTS = 3
RETRIED = frozenset({429, 500, 502, 503, 504})

_UNREACHABLE = "unreachable"

Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where requests go: scheme, host and port."""

    host: str
    port: int
    is_secure: bool

    @property
    def authority(self) -> str:
        """Return the Host header, with the port unless it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_secure else 80) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """Return it as a URL."""
        return f"{'https' if self.is_secure else 'http'}://{self.authority}"


class FileBody(io.RawIOBase):
    """A request body: `size` bytes of `fd` from `start`, read with a position of its own."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        super().__init__()
        self.size = size
        self._fd = fd
        self._start = start
        self.position = 0

    def md5(self) -> bytes:
        """Return the digest of the bytes: the server refuses what does not arrive as it is."""
        digest, start = hashlib.md5(usedforsecurity=False), 0
        while start < self.size:
            data = os.pread(self._fd, min(WINDOW, self.size - start), self._start + start)
            if not data:
                break
            digest.update(data)
            start += len(data)
        return digest.digest()

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the file."""
        view = memoryview(buffer)[: self.size - self.position]
        count = os.preadv(self._fd, [view], self._start + self.position) if view else 0
        self.position += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position; the CRT rewinds before it sends."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        """Return the position."""
        return self.position

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True


class Signer:
    """Signs requests for one region with whatever the provider yields at that moment."""

    def __init__(self, region: str, credentials: CredentialsProvider) -> None:
        self.region = region
        self._credentials = credentials
        self._known: tuple[Credentials, Any] | None = None

    def sign(self, request: Any, payload: str, thing: str) -> None:
        """Add the signature (version 4) to `request`; `payload` is the hash of its body."""
        # Encoded once and not normalised: `//` and `..` are ordinary in keys.
        config = awscrt.auth.AwsSigningConfig(
            credentials_provider=self._provider(),
            region=self.region,
            service="s3",
            use_double_uri_encode=False,
            should_normalize_uri_path=False,
            signed_body_value=payload,
            signed_body_header_type=awscrt.auth.AwsSignedBodyHeaderType.X_AMZ_CONTENT_SHA_256,
        )
        try:
            awscrt.auth.aws_sign_request(request, config).result(30)
        except (AwsCrtError, FutureTimeoutError) as error:
            message = f"{thing}: the request cannot be signed ({_crt_name(error)})"
            raise Unavailable(message, backend="s3") from error

    def _provider(self) -> Any:
        credentials = self._credentials()
        known = self._known
        if known is None or (known[0] is not credentials and known[0] != credentials):
            native = awscrt.auth.AwsCredentialsProvider.new_static(
                credentials.access_key, credentials.secret_key, credentials.session_token or None
            )
            known = self._known = (credentials, native)
        return known[1]


class Response:
    """An answer whose headers are in; the body follows as it is asked for.

    The callbacks run on the connection's event-loop thread, everything else on the caller's.
    """

    def __init__(self, method: str, thing: str, stall: float, sent: FileBody | None) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._is_head = method == "HEAD"
        self._thing = thing
        self._stall = stall
        self._sent = sent
        self._received = 0
        self._waited = 0.0
        self._chunks: deque[bytes] = deque()
        self._wake = threading.Event()
        self._is_eager = False
        self._is_done = False
        self._is_windowed = True
        self._error: BaseException | None = None
        self._stream: Any = None
        self._connection: Any = None
        self._give_back: Callable[[Any], None] | None = None

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def length(self) -> int | None:
        """Return how long the body is, `None` if the server did not say."""
        try:
            return int(self.headers["content-length"])
        except (KeyError, ValueError):
            return None

    def chunks(self) -> Iterator[bytes]:
        """Yield the body; `Unavailable` if it ends early."""
        while True:
            granted = 0
            while self._chunks:
                chunk = self._chunks.popleft()
                granted += len(chunk)
                yield chunk
            if self._is_done and not self._chunks:
                break
            if granted and self._is_windowed and not self._is_done:
                self._stream.update_window(granted)
            elif not granted:
                self._wait(lambda: bool(self._chunks) or self._is_done)
        if self._error is not None:
            raise self._broken("the answer ended early")

    def read(self, limit: int) -> bytes:
        """Return the whole body; `Unavailable` above `limit` bytes."""
        parts, size = [], 0
        for chunk in self.chunks():
            parts.append(chunk)
            size += len(chunk)
            if size > limit:
                raise Unavailable(f"{self._thing}: the answer is over {limit} bytes", backend="s3")
        return b"".join(parts)

    def close(self) -> None:
        """Give the connection back, or end it if a body is still under way."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._is_done and self._error is None and self._give_back is not None:
            self._give_back(connection)
        else:
            connection.close()

    def _begin(self, connection: Any, request: Any, give_back: Callable[[Any], None]) -> None:
        """Send `request` and wait for the headers, and for the body as well if it is small."""
        self._connection = connection
        self._give_back = give_back
        self._stream = connection.request(request, self._on_response, self._on_body)
        self._stream.completion_future.add_done_callback(self._on_done)
        self._stream.activate()
        self._wait(lambda: self._is_eager or self._is_done)
        if not self.status:
            raise self._broken("no answer")

    def _wait(self, is_ready: Callable[[], bool]) -> None:
        progress = -1
        while not is_ready():
            began = time.monotonic()
            is_woken = self._wake.wait(self._stall)
            self._wake.clear()
            self._waited += time.monotonic() - began
            moved = self._received + (self._sent.position if self._sent else 0)
            is_slow = self._waited > 10 * self._stall + moved / SLOWEST
            if is_slow or (not is_woken and moved == progress):
                self._connection.close()
                what = "it comes too slowly" if is_slow else f"nothing came for {self._stall:g} s"
                raise Unavailable(f"{self._thing}: {what}", backend="s3")
            if not is_woken:
                progress = moved

    def _on_response(self, status_code: int, headers: Headers, **_: object) -> None:
        known = self.headers
        for name, value in headers:
            lower = name.lower()
            known[lower] = f"{known[lower]}, {value}" if lower in known else value
        length = self.length
        self._is_windowed = length is None or length > WINDOW
        self.status = status_code
        if not self._is_head and (length is None or length > SMALL):
            self._is_eager = True
            self._wake.set()

    def _on_body(self, chunk: bytes, **_: object) -> None:
        self._chunks.append(chunk)
        self._received += len(chunk)
        if self._is_eager and not self._wake.is_set():
            self._wake.set()

    def _on_done(self, future: Future[int]) -> None:
        self._error = future.exception()
        self._is_done = True
        self._wake.set()

    def _broken(self, what: str) -> Unavailable:
        error = Unavailable(f"{self._thing}: {what} ({_crt_name(self._error)})", backend="s3")
        error.__cause__ = self._error
        return error


class Connections:
    """The connections, threads and TLS of any number of S3 stores; close it after them.

    `stall` is after how many seconds without a byte a request is given up; `ca_file` names the
    certificates to trust instead of the system's.
    """

    def __init__(
        self,
        *,
        threads: int = 0,
        connect_timeout: float = 5.0,
        stall: float = 30.0,
        idle: float = 20.0,
        ca_file: str | None = None,
    ) -> None:
        group = awscrt.io.EventLoopGroup(threads or min(4, os.cpu_count() or 1))
        self._bootstrap = awscrt.io.ClientBootstrap(group, awscrt.io.DefaultHostResolver(group))
        self._socket = awscrt.io.SocketOptions()
        self._socket.connect_timeout_ms = int(connect_timeout * 1000)
        self._socket.keep_alive = True
        self._connect_timeout = connect_timeout
        self._stall = stall
        self._idle_time = idle
        self._ca_file = ca_file
        self._tls: Any = None
        self._idle: dict[Origin, deque[tuple[Any, float]]] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        self._platform: CredentialsProvider | None = None

    def close(self) -> None:
        """Close every idle connection; those in use close when they are done."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection, _ in connections:
                connection.close()

    def platform_credentials(self) -> CredentialsProvider:
        """Return the platform's own chain as botocore finds it: one for all stores, refreshed."""
        with self._lock:
            if self._platform is None:
                self._platform = _platform_credentials()
            return self._platform

    def open(
        self,
        origin: Origin,
        method: str,
        target: str,
        headers: Headers,
        signer: Signer,
        *,
        thing: str,
        body: bytes | FileBody | None = None,
        is_retried: bool = True,
        patience: float = 1.0,
    ) -> Response:
        """Send one request and return its answer, of whatever status, once the headers are in.

        `thing` is what error messages name; `patience` multiplies `stall`.  Unless `is_retried`
        is off, overload, server errors and broken connections are tried again twice, within a
        second or so.  `Unavailable` if there is no answer.
        """
        digest, payload = "", "UNSIGNED-PAYLOAD"
        if isinstance(body, bytes):
            payload = hashlib.sha256(body).hexdigest()
        if body:  # S3 wants it with a tag set, and with an object under Object Lock
            md5 = body.md5() if isinstance(body, FileBody) else _md5(body)
            digest = b64encode(md5).decode("ascii")
        waited = 0
        while True:
            waited += 1
            is_last = not is_retried or waited >= ATTEMPTS
            try:
                response = self._send(
                    origin,
                    method,
                    target,
                    headers,
                    signer,
                    thing=thing,
                    body=body,
                    digest=digest,
                    payload=payload,
                    stall=self._stall * patience,
                    is_fresh=not is_retried,
                )
            except Unavailable as error:
                if is_last or error.reason == _UNREACHABLE:
                    raise
            else:
                if is_last or response.status not in RETRIED:
                    return response
                response.close()
            time.sleep(random.uniform(0.05, 0.1) * 2**waited)  # noqa: S311 - no secret

    def _send(
        self,
        origin: Origin,
        method: str,
        target: str,
        headers: Headers,
        signer: Signer,
        *,
        thing: str,
        body: bytes | FileBody | None,
        digest: str,
        payload: str,
        stall: float,
        is_fresh: bool,
    ) -> Response:
        while True:
            sent: FileBody | None = None
            fields = awscrt.http.HttpHeaders([("Host", origin.authority), *headers])
            stream: Any = None
            if isinstance(body, bytes):
                stream = io.BytesIO(body)
                fields.add("Content-Length", str(len(body)))
            elif body is not None:
                stream = sent = body
                body.seek(0)
                fields.add("Content-Length", str(body.size))
            if digest:
                fields.add("Content-MD5", digest)
            request = awscrt.http.HttpRequest(method, target, fields, stream)
            signer.sign(request, payload, thing)
            connection, is_reused = self._connection(origin, is_fresh=is_fresh)
            response = Response(method, thing, stall, sent)
            try:
                response._begin(  # noqa: SLF001 - one thing in two classes
                    connection, request, lambda it: self._give_back(origin, it)
                )
            except AwsCrtError as error:  # closed between our look and our use
                is_stale = is_reused and not connection.is_open()
                response.close()
                if is_stale:
                    continue
                raise Unavailable(
                    f"{thing}: no answer ({_crt_name(error)})", backend="s3"
                ) from error
            except Unavailable as error:
                response.close()
                # A server may close a connection that was idle just as we use it again.
                if is_reused and isinstance(error.__cause__, AwsCrtError):
                    continue
                raise
            return response

    def _connection(self, origin: Origin, *, is_fresh: bool) -> tuple[Any, bool]:
        if not is_fresh:
            oldest = time.monotonic() - self._idle_time
            while True:
                with self._lock:
                    idle = self._idle.get(origin)
                    if not idle:
                        break
                    connection, since = idle.pop()
                if since > oldest and connection.is_open():
                    return connection, True
                connection.close()
        tls = None
        if origin.is_secure:
            tls = self._tls_context().new_connection_options()
            tls.set_server_name(origin.host)
        future = awscrt.http.HttpClientConnection.new(
            host_name=origin.host,
            port=origin.port,
            bootstrap=self._bootstrap,
            socket_options=self._socket,
            tls_connection_options=tls,
            manual_window_management=True,
            initial_window_size=WINDOW,
        )
        try:
            return future.result(4 * self._connect_timeout), False
        except (AwsCrtError, FutureTimeoutError) as error:
            future.add_done_callback(_close_late)
            name = _crt_name(error)
            # The CRT holds back the news of a failed TLS handshake for 10 to 30 s.
            is_final = "TLS" in name or "DNS" in name or isinstance(error, FutureTimeoutError)
            raise Unavailable(
                f"cannot connect to {origin.url} ({name}): check the endpoint",
                backend="s3",
                reason=_UNREACHABLE if is_final else "",
            ) from error

    def _give_back(self, origin: Origin, connection: Any) -> None:
        if connection.is_open():
            stale = []
            now = time.monotonic()
            with self._lock:
                if not self._is_closed:
                    idle = self._idle.setdefault(origin, deque())
                    while idle and idle[0][1] < now - self._idle_time:
                        stale.append(idle.popleft()[0])
                    idle.append((connection, now))
                    connection = None
            for old in stale:
                old.close()
        if connection is not None:
            connection.close()

    def _tls_context(self) -> Any:
        with self._lock:
            if self._tls is None:
                options = awscrt.io.TlsContextOptions()
                if self._ca_file is not None:
                    options.override_default_trust_store_from_path(None, self._ca_file)
                self._tls = awscrt.io.ClientTlsContext(options)
            return self._tls


def _platform_credentials() -> CredentialsProvider:
    import botocore.session
    from botocore.exceptions import BotoCoreError

    chain = botocore.session.get_session()
    frozen: list[tuple[Any, Credentials]] = []

    def provide() -> Credentials:
        try:
            found = chain.get_credentials()
            now = found.get_frozen_credentials() if found is not None else None
        except BotoCoreError as error:
            message = f"cannot refresh the platform's AWS credentials ({type(error).__name__})"
            raise Unavailable(message, backend="s3") from error
        if now is None:
            raise ConfigError(
                "no AWS credentials found in environment, profile, instance or task role",
                backend="s3",
            )
        if not frozen or frozen[-1][0] != now:
            credentials = Credentials(now.access_key or "", now.secret_key or "", now.token or "")
            frozen[:] = [(now, credentials)]
        return frozen[-1][1]

    return provide


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def _close_late(future: Future[Any]) -> None:
    if future.exception() is None:
        future.result().close()


def _crt_name(error: BaseException | None) -> str:
    return error.name if isinstance(error, AwsCrtError) else type(error).__name__
