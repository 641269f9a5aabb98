"""A mail server on loopback that keeps what it is sent, and refuses what a test says."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage


@dataclass
class Mail:
    """A running mail server; a message that has `refused` in it is rejected."""

    port: int = 0
    refused: str = ""
    messages: list[EmailMessage] = field(default_factory=list)


@contextmanager
def run_mail() -> Iterator[Mail]:
    """Serve SMTP (RFC 5321, what a client without extensions needs) on a free port."""
    mail = Mail()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self._say("220 here")
            while line := self.rfile.readline():
                match line[:4].upper().strip():
                    case b"DATA":
                        self._say("354 go on")
                        self._take()
                    case b"QUIT":
                        self._say("221 bye")
                        return
                    case b"EHLO" | b"HELO" | b"MAIL" | b"RCPT" | b"RSET":
                        self._say("250 fine")
                    case _:
                        self._say("500 what?")

        def _take(self) -> None:
            lines = []
            while (line := self.rfile.readline()) != b".\r\n":
                if not line:
                    return
                lines.append(line.removeprefix(b"."))
            message = message_from_bytes(b"".join(lines), policy=policy.default)
            if mail.refused and mail.refused in text_of(message):
                self._say("554 no")
                return
            mail.messages.append(message)
            self._say("250 taken")

        def _say(self, text: str) -> None:
            self.wfile.write(text.encode() + b"\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        mail.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield mail
        finally:
            server.shutdown()
            thread.join()


def text_of(message: EmailMessage) -> str:
    """Return the text that people read."""
    part = message.get_body(("plain", "html"))
    return part.get_content() if part else ""
