"""Slack, Teams, e-mail and what else the Apprise library speaks to: notes as text for people."""

# ruff: noqa: D102 - the docstrings are the Protocol's

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import apprise

from bucketward.errors import ConfigError, Error, Unavailable, Unsupported
from bucketward.model import NOTHING, Note

PERMISSIONS: Mapping[str, str] = NOTHING

_LINES = 40
_FINDINGS = 10
_VALUE = 400
_TEXT = 4000
"""Lines, findings, characters of a value and of the whole: people read it, and chats cut it."""
_BUDGET = 40.0
"""Seconds that one `send` may take to start deliveries: chats allow about one message a second."""
_PACE = 1.2
"""Seconds between two requests to a chat (Slack, rate limits: one message a second)."""

_DEFUSED = str.maketrans({"<": "\u2039", ">": "\u203a", "@": "\uff20", "[": "\uff3b"})
"""Object keys are anybody's: they shall call no channel (``<!channel>``, ``@here``), hide no link
behind a text (``[text](url)``) and be no HTML."""


def open_apprise(url: str, *, secret: str) -> AppriseNotifier:
    """Open ``apprise:``; `secret` is one or more Apprise URLs, separated by blanks."""
    if url not in {"apprise:", "apprise://"}:
        raise ConfigError(
            "an Apprise notifier's url is apprise: and nothing else; its own URLs are secrets "
            "and belong into secret or secret_file",
            backend="apprise",
        )
    return AppriseNotifier(secret.split())


class AppriseNotifier:
    """Sends each note to each of the Apprise URLs, as plain text, its id in the last line.

    The text is made of the note's body: what a line can say, of the findings the first ten.
    Characters that cannot be printed become U+FFFD, and those that call or link somebody in a
    chat their look-alikes, so copy a key from the ledger and not from here.

    Apprise says whether a note was taken but not why, so a failure is `Unavailable`.  A note that
    one of several URLs refused is sent to all of them again: give each place a notifier of its
    own.  `ping` sends nothing and so finds nothing out.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        # Apprise logs whole URLs, even at ERROR, and so do the others at DEBUG: they are secrets.
        logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)
        for name in ("urllib3", "requests_oauthlib"):
            if logging.getLogger(name).getEffectiveLevel() < logging.INFO:
                logging.getLogger(name).setLevel(logging.INFO)
        self._lock = threading.Lock()
        self._places: list[tuple[str, apprise.Apprise]] = []
        for number, url in enumerate(urls, 1):
            place = apprise.Apprise(asset=apprise.AppriseAsset(app_id="Bucketward"))
            # Without the cause, and without the URL: it is the secret.
            if not place.add(url):
                raise ConfigError(
                    f"URL {number} in the secret is none that Apprise knows; "
                    "see its list of services for how to write it",
                    backend="apprise",
                )
            scheme = url.partition("://")[0].lower()
            for service in place:
                # Apprise waits 5.5 s after each request to a service that names no pace.
                pace = 0.0 if scheme in {"mailto", "mailtos"} else _PACE
                service.request_rate_per_sec = min(service.request_rate_per_sec, pace)
            self._places.append((scheme, place))
        if not self._places:
            raise ConfigError(
                "an Apprise notifier needs the URLs of Apprise in secret or secret_file, "
                "as in mailto://... or slack://...",
                backend="apprise",
            )

    def send(self, notes: Sequence[Note]) -> Mapping[str, Error]:
        failures: dict[str, Error] = {}
        deadline = time.monotonic() + _BUDGET
        for note in notes:
            try:
                self._send(note, deadline)
            except Error as error:
                failures[note.id] = error
        return failures

    def ping(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _send(self, note: Note, deadline: float) -> None:
        text = _text(note)
        title = _clean(note.subject) or note.type
        failed = []
        with self._lock:  # Apprise's services keep count of their requests unguarded
            if time.monotonic() > deadline:
                raise Unavailable(
                    "more notes than the chat takes at a time; this one waits",
                    backend="apprise",
                    retry_after=10.0,
                )
            for number, (scheme, place) in enumerate(self._places, 1):
                try:
                    taken = place.notify(body=text, title=title, body_format="text")
                except Exception:  # a service's own; it may have the URL in its text
                    taken = None
                if not taken:
                    failed.append(f"{scheme} (URL {number})")
        if failed:
            raise Unavailable(
                f"{', '.join(failed)} did not take the note: see that the place is there and "
                "the URL in the secret still good",
                backend="apprise",
            ) from None


def _text(note: Note) -> str:
    try:
        body = json.loads(note.body)
    except (ValueError, RecursionError) as error:
        raise Unsupported(
            f"the body of note {note.id[:64]!a} is not JSON", backend="apprise"
        ) from error
    lines: list[str] = []
    length = 0
    for line in _lines(body):
        length += len(line) + 1
        if length > _TEXT or len(lines) == _LINES:
            lines.append("...")
            break
        lines.append(line)
    return "\n".join([*lines, f"id: {_clean(note.id)}"])


def _lines(body: Any) -> Iterator[str]:
    if not isinstance(body, dict):
        return
    for name, value in body.items():
        if name == "findings" and isinstance(value, list):
            for each in value[:_FINDINGS]:
                if isinstance(each, dict):
                    said = [str(each.get(part) or "") for part in ("engine", "signature", "member")]
                    yield _clean("found: " + " ".join(filter(None, said)))
        elif isinstance(value, dict):
            inner = " ".join(str(each) for each in value.values() if each not in (None, ""))
            if inner:
                yield f"{_clean(name)}: {_clean(inner)}"
        elif isinstance(value, list):
            if value:
                yield f"{_clean(name)}: {_clean(', '.join(map(str, value)))}"
        elif value not in (None, ""):
            yield f"{_clean(name)}: {_clean(str(value))}"


def _clean(text: str) -> str:
    cut = text[:_VALUE]
    printable = "".join(c if c.isprintable() else "\ufffd" for c in cut)
    return printable.translate(_DEFUSED)
