"""The event receiver: stores that push their events by HTTP find our queue here.

It judges nothing but the sender: what the body means, and whether it is an event at all, is the
event agent's business.  MinIO sends the secret as bearer; Ceph has no such header, and takes a user
and password in the URL of a topic only from who makes the topic by TLS (rgw_rest_pubsub.cc), so the
secret may also be the end of the path.

Ceph 16.2 tries again only for topics made with ``persistent=true``; of others the event is lost
and the upload succeeds, whatever `http-ack-level` says.  It tries again at once, 500 times a
second and whatever Retry-After says: hence a pause before each refusal, and the sparse log.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import math
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

# Not FastAPI: it hands paths to OpenTelemetry, and ours may hold the secret.
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from bucketward.agents.server import Server
from bucketward.errors import ConfigError, Error, Unsupported
from bucketward.interfaces import Queue

log = logging.getLogger(__name__)

MAX_BODY = 256 << 10
"""Bytes of one event: what a queue takes.  S3's are below 64 KiB, Ceph's and MinIO's about 1."""

MIN_SECRET = 16

_RETRY_SECONDS = 5
_COMPLAIN_SECONDS = 10.0
_READY_SECONDS = 2.0
"""How long an answer about readiness holds, so that asking costs the queue nothing."""


class Receiver:
    """Takes ``POST /events`` and ``/events/<secret>`` and puts each body into `queue` as it is.

    Answers 200 only when the queue has it; 503 with Retry-After when the queue does not take it,
    so that the store tries again; 401 without the secret, 413 above `MAX_BODY`, 400 for what is
    no text, 408 if the body is not there within `body_seconds`; a refusal comes after a `pause`.
    ``GET /health`` says that we live, ``GET /ready`` whether the queue answers; neither wants the
    secret.
    """

    def __init__(
        self,
        queue: Queue,
        host: str = "127.0.0.1",
        port: int = 8082,
        *,
        secret: str,
        header_seconds: float = 10.0,
        body_seconds: float = 20.0,
        pause: float = 1.0,
        connections: int = 256,
    ) -> None:
        if len(secret) < MIN_SECRET:
            raise ConfigError(
                f"set receiver.secret to at least {MIN_SECRET} characters: whoever reaches the "
                "port can post events",
                backend="receiver",
            )
        self._queue = queue
        self._secret = _digest(secret)
        self._body_seconds = body_seconds
        self._pause = pause
        self._complained_at = -math.inf
        self._readiness = (-math.inf, "")
        self._asking = threading.Lock()
        # Of our own: a queue that hangs must not take the threads of others.
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="receiver")
        app = Starlette(
            routes=[
                Route("/events", self._post, methods=["POST"]),
                Route("/events/{secret:path}", self._post, methods=["POST"]),
                Route("/health", self._health),
                Route("/ready", self._ready),
            ],
            exception_handlers={HTTPException: _explain},
        )
        app.router.redirect_slashes = False
        self._server = Server(
            app,
            host,
            port,
            option="receiver",
            header_seconds=header_seconds,
            connections=connections,
        )

    @property
    def url(self) -> str:
        """Return the address to give to the store, without the secret."""
        return self._server.url + "/events"

    def start(self) -> None:
        """Listen, and serve in a thread; `ConfigError` if the port is taken."""
        self._server.start()

    def stop(self, seconds: float = 5.0) -> None:
        """Take no more, finish what is on its way within `seconds`."""
        self._server.stop(seconds)
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _post(self, request: Request) -> JSONResponse:
        answer = await self._take(request)
        if answer.status_code != 200:
            await asyncio.sleep(self._pause)
        return answer

    async def _take(self, request: Request) -> JSONResponse:
        if not self._knows(request):
            return _refuse(401, "wrong or no secret", {"www-authenticate": "Bearer"})
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > MAX_BODY:
            return _refuse(413, f"more than {MAX_BODY} bytes")
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > MAX_BODY:
                        return _refuse(413, f"more than {MAX_BODY} bytes")
        except TimeoutError:
            return _refuse(408, f"no whole body within {self._body_seconds:g} s")
        except ClientDisconnect:
            return _refuse(400, "the body ends early")
        text = _text(bytes(body))
        if text is None:
            return _refuse(400, "not a text in UTF-8")
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._send, text)

    def _send(self, text: str) -> JSONResponse:
        try:
            self._queue.send([text])
        except Unsupported as error:
            self._complain("the queue refuses events for good", error)
            return _refuse(413 if error.reason == "too-large" else 400, "the queue cannot hold it")
        except Error as error:
            self._complain("events cannot be queued, their store is told to try again", error)
            seconds = math.ceil(error.retry_after or _RETRY_SECONDS)
            return _refuse(503, "the queue is not available", {"retry-after": str(seconds)})
        return JSONResponse({"queued": True})

    def _complain(self, what: str, error: Error) -> None:
        if time.monotonic() - self._complained_at >= _COMPLAIN_SECONDS:
            self._complained_at = time.monotonic()
            log.error("%s: %s", what, error)

    async def _health(self, _request: Request) -> JSONResponse:
        return JSONResponse({"healthy": True})

    async def _ready(self, _request: Request) -> JSONResponse:
        loop = asyncio.get_running_loop()
        if problem := await loop.run_in_executor(self._pool, self._problem):
            return _refuse(503, problem, {"retry-after": str(_RETRY_SECONDS)})
        return JSONResponse({"ready": True})

    def _problem(self) -> str:
        with self._asking:
            asked_at, problem = self._readiness
            if time.monotonic() - asked_at >= _READY_SECONDS:
                problem = ""
                try:
                    self._queue.ping()
                except Error as error:
                    # What is wrong stays in our log: anybody may ask.
                    log.warning("the receiver is not ready: %s", error)
                    problem = "the queue is not available"
                self._readiness = (time.monotonic(), problem)
            return problem

    def _knows(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip()
        candidates = [request.path_params.get("secret", "").rstrip("/")]
        if scheme.lower() == "bearer":
            candidates.append(given)
        elif scheme.lower() == "basic":
            candidates.append(_password(given))
        return any(hmac.compare_digest(_digest(text), self._secret) for text in candidates)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _password(given: str) -> str:
    try:
        pair = base64.b64decode(given, validate=True).decode()
    except (binascii.Error, ValueError):
        return ""
    return pair.partition(":")[2]


def _text(body: bytes) -> str | None:
    """Return the body as text; `None` if it is empty or holds what no JSON and few queues do."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None
    is_text = all(character >= " " or character in "\t\n\r" for character in text)
    return text if is_text and text.strip() else None


def _explain(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _refuse(error.status_code, error.detail, error.headers)


def _refuse(status: int, problem: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    # A refused body may still be on its way: whoever sends it is not waited for.
    fields = {"connection": "close", **(headers or {})}
    return JSONResponse({"error": problem}, status, fields)
