"""One line of JSON per note, to a logger or a stream, for whatever collects the logs."""

# ruff: noqa: D102 - the docstrings are the Protocol's

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, TextIO
from urllib.parse import urlsplit

from bucketward.errors import ConfigError, Error, Unavailable, Unsupported
from bucketward.model import NOTHING, Note

PERMISSIONS: Mapping[str, str] = NOTHING

LOGGER = "bucketward.notes"


def open_log(url: str = "log://") -> LogNotifier:
    """Open ``log://`` or ``log://<logger name>``."""
    parts = urlsplit(url)
    if parts.scheme != "log" or parts.path.strip("/") or parts.query or parts.fragment:
        raise ConfigError("a log notifier is named log:// or log://<logger name>", backend="log")
    return LogNotifier(parts.netloc or LOGGER)


class LogNotifier:
    """Writes each note as ``{"id", "type", "subject", "attributes", "body"}`` on a line of its own.

    `target` is the name of a logger, which gets the line as the message of an INFO record, or a
    text stream.  A line is pure ASCII and everything else is escaped, so no note can start
    another line.  What a logger's handlers do with a record, `logging` does not tell: only a
    stream can report that the disk is full.
    """

    def __init__(self, target: str | TextIO = LOGGER) -> None:
        self._logger = logging.getLogger(target) if isinstance(target, str) else None
        self._stream = None if isinstance(target, str) else target
        self._lock = threading.Lock()

    def send(self, notes: Sequence[Note]) -> Mapping[str, Error]:
        failures: dict[str, Error] = {}
        for note in notes:
            try:
                self._write(_line(note))
            except Error as error:
                failures[note.id] = error
        return failures

    def ping(self) -> None:
        if self._logger is not None and not (
            self._logger.isEnabledFor(logging.INFO) and self._logger.hasHandlers()
        ):
            raise Unsupported(
                f"the logger {self._logger.name} drops INFO records; set its level and a handler",
                backend="log",
            )
        if self._stream is not None and self._stream.closed:
            raise Unsupported("the stream is closed", backend="log")

    def close(self) -> None:
        pass  # the stream is not ours

    def _write(self, line: str) -> None:
        if self._stream is None:
            assert self._logger is not None
            self.ping()
            self._logger.info("%s", line)
            return
        with self._lock:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except OSError as error:
                raise Unavailable(f"cannot write: {error.strerror}", backend="log") from error
            except ValueError as error:
                raise Unsupported("the stream is closed", backend="log") from error


def _line(note: Note) -> str:
    try:
        body: Any = json.loads(note.body)
    except (ValueError, RecursionError) as error:
        raise Unsupported(f"the body of note {note.id!a} is not JSON", backend="log") from error
    return json.dumps(
        {
            "id": note.id,
            "type": note.type,
            "subject": note.subject,
            "attributes": dict(note.attributes),
            "body": body,
        }
    )
