"""An HTTP forwarder that stands before a server and makes it refuse what a test says."""

import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote_plus


@dataclass
class Meddler:
    """A running forwarder.

    A request whose body has `refused` in it is answered with `refusal`; any other answer goes
    through `rewrite`, which is given the request's body and the answer's.
    """

    url: str = ""
    refused: str = ""
    refusal: tuple[int, str] = (400, "")
    rewrite: Callable[[str, bytes], bytes] = lambda _, answer: answer
    requests: list[str] = field(default_factory=list)


@contextmanager
def run_meddler(target: str) -> Iterator[Meddler]:
    """Forward a free loopback port to `target`."""
    meddler = Meddler()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            said = unquote_plus(body.decode())
            meddler.requests.append(said)
            if meddler.refused and meddler.refused in said:
                status, text = meddler.refusal
                self._answer(status, "application/json", text.encode())
                return
            headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
            request = urllib.request.Request(
                target + self.path, data=body or None, headers=headers, method=self.command
            )
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    status, kind, text = answer.status, answer.headers, answer.read()
            except urllib.error.HTTPError as error:
                status, kind, text = error.code, error.headers, error.read()
                error.close()
            text = meddler.rewrite(said, text)
            self._answer(status, kind.get("Content-Type", "text/xml"), text)

        do_GET = do_POST = _forward  # noqa: N815 - http.server's names

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    meddler.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield meddler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
