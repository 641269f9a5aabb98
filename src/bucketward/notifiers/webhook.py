"""Signed HTTP callbacks after the Standard Webhooks specification, to public addresses only."""

# ruff: noqa: D102 - the docstrings are the Protocol's

from __future__ import annotations

import base64
import binascii
import email.utils
import hashlib
import hmac
import http.client
import io
import ipaddress
import json
import queue
import re
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import quote, urlsplit

from bucketward.errors import (
    ConfigError,
    Denied,
    Error,
    NotFound,
    Unavailable,
    Unsupported,
)
from bucketward.model import NOTHING, Note

PERMISSIONS: Mapping[str, str] = NOTHING

TOLERANCE = 300.0
"""How far a timestamp may be from the receiver's clock, in seconds."""

Resolver = Callable[[str, int], Sequence[str]]
"""Yields the numeric addresses of a host name."""

_MAX_RETRY_AFTER = 86_400.0
_MESSAGE_ID = re.compile(r"[!-\-/-~]{1,255}")  # visible ASCII without the full stop, the separator


def open_webhook(
    url: str,
    *,
    secret: str,
    allow_private: bool = False,
    timeout: float = 10.0,
    ca_file: str = "",
) -> WebhookNotifier:
    """Open the webhook at `url`; nothing is connected yet."""
    return WebhookNotifier(
        url, secret=secret, allow_private=allow_private, timeout=timeout, ca_file=ca_file
    )


class WebhookNotifier:
    """Posts each note as ``{"type", "subject", "attributes", "data"}``, `data` being its body.

    Signed as Standard Webhooks 1.0.0 asks (``spec/standard-webhooks.md`` of the project
    standard-webhooks): headers ``webhook-id``, ``webhook-timestamp`` and ``webhook-signature``,
    HMAC-SHA256 over ``id.timestamp.body``; a full stop in a note's id becomes a hyphen.  `secret`
    is ``whsec_`` and base64 of 24 to 64 random bytes, as `new_secret` makes it; several,
    separated by blanks, all sign, so that a secret can be exchanged without a gap.

    Only https and only public addresses, unless `allow_private`.  The name is resolved once per
    note, every address is checked, and what was checked is what is connected to; no proxy is
    used and no redirect followed.  `timeout` bounds a delivery as a whole, from the name to the
    last header of the answer; the body of the answer is not read.  `ca_file` holds the
    certificates to trust instead of the system's.

    The URL may itself hold a token, so messages name its scheme and host only.  If the host
    cannot be reached, the rest of the batch fails with the same error, untried.
    """

    def __init__(
        self,
        url: str,
        *,
        secret: str,
        allow_private: bool = False,
        timeout: float = 10.0,
        ca_file: str = "",
        resolve: Resolver | None = None,
    ) -> None:
        self._keys = _keys(secret)
        self._allow_private = allow_private
        self._timeout = timeout
        self._resolve = resolve or _addresses
        scheme, self._host, self._port, self._authority, self._target = _split(url, allow_private)
        self._origin = f"{scheme}://{self._authority}"
        self._tls: ssl.SSLContext | None = None
        if scheme == "https":
            try:
                self._tls = ssl.create_default_context(cafile=ca_file or None)
            except OSError as error:
                raise ConfigError(
                    f"cannot load the certificates of {ca_file}", backend="webhook"
                ) from error

    def send(self, notes: Sequence[Note]) -> Mapping[str, Error]:
        failures: dict[str, Error] = {}
        unreachable: Error | None = None
        for note in notes:
            if unreachable is not None:
                failures[note.id] = unreachable
                continue
            deadline = time.monotonic() + self._timeout
            try:
                message_id, body = _message(note)
                try:
                    connection = self._connect(deadline)
                except Error as error:
                    unreachable = error
                    raise
                with connection:
                    self._post(connection, message_id, body)
            except Error as error:
                failures[note.id] = error
        return failures

    def ping(self) -> None:
        """Connect and, with https, check the certificate; a request would be a delivery."""
        self._connect(time.monotonic() + self._timeout).close()

    def close(self) -> None:
        pass

    def _connect(self, deadline: float) -> _Timed:
        with _translating(self._origin):
            addresses = self._lookup(deadline)
            if not addresses:
                raise Unavailable(f"{self._origin} has no address", backend="webhook")
            if not self._allow_private:
                for address in addresses:
                    if not is_public(address):
                        raise Denied(
                            f"{self._origin} has the address {address}, which is not public; "
                            "name another host, or allow private addresses for this webhook",
                            backend="webhook",
                            reason="private-address",
                        )
            for address in addresses[:-1]:
                try:
                    return self._dial(address, deadline)
                except OSError:
                    continue
            return self._dial(addresses[-1], deadline)

    def _lookup(self, deadline: float) -> Sequence[str]:
        # getaddrinfo knows no deadline, so it gets a thread, which is left behind if it is late.
        answer: queue.SimpleQueue[Sequence[str] | Exception] = queue.SimpleQueue()

        def look() -> None:
            try:
                answer.put(self._resolve(self._host, self._port))
            except Exception as error:
                answer.put(error)

        threading.Thread(target=look, name="webhook-resolve", daemon=True).start()
        try:
            found = answer.get(timeout=_left(deadline))
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(found, Exception):
            raise found
        return found

    def _dial(self, address: str, deadline: float) -> _Timed:
        plain = socket.create_connection((address, self._port), timeout=_left(deadline))
        if self._tls is None:
            return _Timed(plain, deadline)
        try:
            plain.settimeout(_left(deadline))
            return _Timed(self._tls.wrap_socket(plain, server_hostname=self._host), deadline)
        except BaseException:
            plain.close()
            raise

    def _post(self, connection: _Timed, message_id: str, body: bytes) -> None:
        with _translating(self._origin):
            client = http.client.HTTPConnection(self._host)
            client.auto_open = 0  # never connect to anything but what was checked
            client.sock = cast("socket.socket", connection)
            client.putrequest("POST", self._target, skip_host=True, skip_accept_encoding=True)
            headers = {
                "Host": self._authority,
                "User-Agent": "bucketward",
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                "Connection": "close",
                **sign(message_id, body, self._keys, int(time.time())),
            }
            for name, value in headers.items():
                client.putheader(name, value)
            client.endheaders(body)
            response = client.getresponse()
            _judge(self._origin, response.status, response.getheader("retry-after", ""))


def new_secret() -> str:
    """Return a fresh random secret to share with a receiver."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def sign(message_id: str, body: bytes, keys: Sequence[bytes], timestamp: int) -> Mapping[str, str]:
    """Return the three headers that Standard Webhooks asks for."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    signatures = (hmac.digest(key, signed, hashlib.sha256) for key in keys)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(s).decode()}" for s in signatures),
    }


def verify(
    headers: Mapping[str, str], body: bytes, secret: str, tolerance: float = TOLERANCE
) -> None:
    """Raise `Denied` unless `secret` signed exactly this `body` within `tolerance` seconds.

    For receivers.  Header names may be in any case; `body` is what arrived, before any decoding.
    Keep the ``webhook-id`` for as long as the tolerance, to discard what is played again.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    message_id = lower.get("webhook-id", "")
    stamp = lower.get("webhook-timestamp", "")
    if not _MESSAGE_ID.fullmatch(message_id) or not re.fullmatch(r"[0-9]{1,12}", stamp):
        raise Denied("webhook-id or webhook-timestamp is missing or malformed", backend="webhook")
    if abs(time.time() - int(stamp)) > tolerance:
        raise Denied(
            f"webhook-timestamp is more than {tolerance:g} s from this clock", backend="webhook"
        )
    expected = sign(message_id, body, _keys(secret), int(stamp))["webhook-signature"].split()
    given = lower.get("webhook-signature", "").encode("utf-8", "surrogateescape").split()[:16]
    matches = [hmac.compare_digest(g, e.encode()) for g in given for e in expected]
    if not any(matches):
        raise Denied("no signature of this webhook is by our secret", backend="webhook")


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_UNICAST6 = ipaddress.IPv6Network("2000::/3")
_REFUSED = (
    ipaddress.ip_network("192.0.0.0/24"),  # Oracle's metadata service; not refused by Python 3.11.7
    ipaddress.ip_network("192.88.99.0/24"),  # 6to4 relays, withdrawn by RFC 7526
    ipaddress.ip_network("168.63.129.16/32"),  # Azure's host agent, seen from inside its machines
    ipaddress.ip_network("2001::/23"),  # protocol assignments, Teredo among them
    ipaddress.ip_network("2001:db8::/32"),
    ipaddress.ip_network("2002::/16"),  # 6to4 carries an IPv4 address of anybody's choice
    ipaddress.ip_network("3fff::/20"),  # documentation, RFC 9637; not known to Python 3.11
)


def is_public(address: str) -> bool:
    """Return whether a numeric address belongs to the public internet.

    What is not plainly so, is not: unknown and translated forms are judged by what they lead to
    (IPv4-mapped, NAT64) or refused (6to4, Teredo, everything outside 2000::/3).
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            return False
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        elif ip not in _UNICAST6:
            return False
    return (
        ip.is_global
        and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)
        and not any(ip.version == net.version and ip in net for net in _REFUSED)
    )


class _Timed:
    """A connected socket on which everything together ends at `deadline`.

    A socket's own time-out starts anew with every packet, so a peer that drips never meets it.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            self._sock.settimeout(_left(self._deadline))
            rest = rest[self._sock.send(rest) :]

    def recv_into(self, buffer: Any) -> int:
        self._sock.settimeout(_left(self._deadline))
        return self._sock.recv_into(buffer)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self))

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> _Timed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Reader(io.RawIOBase):
    def __init__(self, sock: _Timed) -> None:
        self._sock = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._sock.recv_into(buffer)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _addresses(host: str, port: int) -> Sequence[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


def _split(url: str, allow_private: bool) -> tuple[str, str, int, str, str]:
    """Return scheme, host, port, authority and request target; messages never show the URL."""
    try:
        if re.search(r"[\x00-\x20\x7f\\]", url):
            raise ValueError
        parts = urlsplit(url)
        scheme, host = parts.scheme, parts.hostname or ""
        port = parts.port or {"http": 80, "https": 443}[scheme]
        host = host if ":" in host else host.encode("idna").decode("ascii")
        if not host or parts.username is not None or parts.fragment:
            raise ValueError
    except (ValueError, KeyError) as error:
        raise ConfigError(
            "a webhook's URL is https://host[:port]/path, without user, password or fragment",
            backend="webhook",
        ) from error
    if scheme == "http" and not allow_private:
        raise ConfigError(
            f"the webhook at {host} is not https, so anybody on the way could read the notes; "
            "use https, or allow private addresses for this webhook",
            backend="webhook",
        )
    authority = f"[{host}]" if ":" in host else host
    if port != {"http": 80, "https": 443}[scheme]:
        authority += f":{port}"
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if parts.query:
        target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    return scheme, host, port, authority, target


def _keys(secret: str) -> Sequence[bytes]:
    keys = []
    for one in secret.split():
        try:
            if not one.startswith("whsec_"):
                raise ValueError
            key = base64.b64decode(one.removeprefix("whsec_"), validate=True)
            if not 24 <= len(key) <= 64:
                raise ValueError
        except (ValueError, binascii.Error):
            # Without the cause: a traceback would show the secret.
            raise ConfigError(
                'a webhook\'s secret is "whsec_" followed by base64 of 24 to 64 random bytes; '
                'make one with: echo "whsec_$(openssl rand -base64 32)"',
                backend="webhook",
            ) from None
        keys.append(key)
    if not keys:
        raise ConfigError(
            "a webhook needs a secret, or its receiver cannot tell our notes from anybody's; "
            'make one with: echo "whsec_$(openssl rand -base64 32)"',
            backend="webhook",
        )
    return keys


def _message(note: Note) -> tuple[str, bytes]:
    # The specification wants no full stop in the id, as it also ends the id in what is signed.
    message_id = note.id.replace(".", "-")
    if not _MESSAGE_ID.fullmatch(message_id):
        raise Unsupported(
            f"the note id {note.id[:64]!a} cannot stand in a header", backend="webhook"
        )
    try:
        json.loads(note.body)
        head = json.dumps(
            {"type": note.type, "subject": note.subject, "attributes": dict(note.attributes)}
        )
        return message_id, f'{head[:-1]}, "data": {note.body}}}'.encode()
    except (ValueError, RecursionError) as error:
        raise Unsupported(f"the body of note {note.id} is not JSON", backend="webhook") from error


def _judge(origin: str, status: int, retry_after: str) -> None:
    said = f"{origin} answered {status}"
    if 200 <= status < 300:
        return
    if status in (408, 425, 429) or 500 <= status < 600:
        raise Unavailable(
            f"{said}; it will be tried again",
            backend="webhook",
            retry_after=_seconds(retry_after),
        )
    if 300 <= status < 400:
        raise Unsupported(
            f"{said}, a redirect, which is never followed: give the final URL", backend="webhook"
        )
    if status in (401, 403, 407):
        raise Denied(f"{said}; check the URL and the secret with its owner", backend="webhook")
    if status in (404, 410):
        raise NotFound(f"{said}: correct the URL or remove the webhook", backend="webhook")
    reason = "too-large" if status == 413 else ""
    raise Unsupported(f"{said}, so it does not take such notes", backend="webhook", reason=reason)


def _seconds(retry_after: str) -> float | None:
    """Return what ``Retry-After`` asks for (RFC 9110: seconds or a date), at most a day."""
    text = retry_after.strip()
    if re.fullmatch(r"[0-9]{1,18}", text):
        return min(float(text), _MAX_RETRY_AFTER)
    try:
        at = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return min(max(at - time.time(), 0.0), _MAX_RETRY_AFTER)


@contextmanager
def _translating(origin: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise Unavailable(f"{origin} did not answer in time", backend="webhook") from error
    except ssl.SSLCertVerificationError as error:
        raise Unavailable(
            f"the certificate of {origin} is not trusted: {error.verify_message}; "
            "mend it, or name the file of its authority",
            backend="webhook",
        ) from error
    except socket.gaierror as error:
        raise Unavailable(
            f"{origin} cannot be resolved: {error.strerror}", backend="webhook"
        ) from error
    except OSError as error:
        raise Unavailable(
            f"{origin} cannot be reached: {error.strerror or type(error).__name__}",
            backend="webhook",
        ) from error
    except http.client.HTTPException as error:
        raise Unavailable(f"{origin} did not answer in HTTP", backend="webhook") from error
