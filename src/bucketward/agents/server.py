"""The HTTP server of the agents: uvicorn in a thread, with the time-outs that it lacks.

uvicorn 0.54 waits for ever for the header of a request, bounds neither the number of connections
nor, with httptools, the size of a header; here all three are bounded.  Nothing but the application
can bound a body: it knows how much it is ready to wait for.  The others that were tried:
hypercorn 0.18 has a time-out for the header but no bound on connections, and cannot be kept from
speaking HTTP/2 in clear text; granian 2.8 has a time-out for the header too, but its embedded
server is called experimental and takes headers of 400 KB.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bucketward.errors import ConfigError

log = logging.getLogger(__name__)

Application = Callable[[Any, Any, Any], Awaitable[None]]

MAX_HEADER = 16 << 10
"""Bytes of one request's line and headers."""


class Server:
    """Serves `app` (ASGI) on one port, in a thread of its own.

    `port` 0 takes any free one; `url` says which.  A request's header must be complete
    `header_seconds` after the connection was made or the last answer given.  Beyond `connections`
    new ones are closed at once.  `option` names the configuration table of host and port, for
    the message when the port is taken.
    """

    def __init__(
        self,
        app: Application,
        host: str,
        port: int,
        *,
        option: str,
        header_seconds: float = 10.0,
        connections: int = 256,
    ) -> None:
        self._address = (host, port)
        self._option = option
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=_guarded(header_seconds, connections),
                ws="none",
                loop="asyncio",
                lifespan="off",
                interface="asgi3",
                h11_max_incomplete_event_size=MAX_HEADER,
                backlog=connections,
                log_config=None,
                server_header=False,
                proxy_headers=False,
            )
        )

    @property
    def url(self) -> str:
        """Return ``http://host:port`` as it is served; only after `start`."""
        host, port = self._address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Bind the port and serve; `ConfigError` if that cannot be."""
        self._socket = _bound(*self._address, self._option)
        self._address = self._socket.getsockname()[:2]
        self._thread = threading.Thread(target=self._run, name=f"{self._option} server")
        self._thread.start()

    def stop(self, seconds: float = 5.0) -> None:
        """Take no more requests, end those that run within `seconds`.  Stopping twice is fine."""
        self._server.config.timeout_graceful_shutdown = max(1, round(seconds))
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()
        if self._socket is not None:
            self._socket.close()

    def _run(self) -> None:
        assert self._socket is not None
        try:
            # Not run(): that looks for signals and exits the program.
            asyncio.run(self._server.serve([self._socket]))
        except Exception:
            log.exception("the %s server ended", self._option)


def _guarded(header_seconds: float, connections: int) -> type[H11Protocol]:
    class Guarded(H11Protocol):
        """uvicorn's protocol, which hangs up on those who keep us waiting for a header."""

        _waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
            super().connection_made(transport)
            # A path may hold a secret; access_log=False fails where the logger has a handler.
            self.access_log = False
            if len(self.connections) > connections:
                transport.abort()
            else:
                self._await_header()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()

        def on_response_complete(self) -> None:
            self._await_header()
            super().on_response_complete()

        def _await_header(self) -> None:
            self._stop_waiting()
            self._waiting = self.loop.call_later(header_seconds, self.transport.abort)

        def _stop_waiting(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()

    return Guarded


def _bound(host: str, port: int, option: str) -> socket.socket:
    with _translating(host, port, option):
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            # Listening now makes a second server on the port fail here and not in its thread.
            bound.listen(128)
        except BaseException:
            bound.close()
            raise
        return bound


@contextlib.contextmanager
def _translating(host: str, port: int, option: str) -> Any:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; stop what uses it, or set "
            f"{option}.host and {option}.port",
            backend=option,
        ) from error
