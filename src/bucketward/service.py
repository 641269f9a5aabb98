"""Run agents until a signal, and say on the terminal or in the log what they find."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Collection
from contextlib import ExitStack
from typing import Any, TextIO

from bucketward import __version__
from bucketward.config import Config
from bucketward.errors import ConfigError
from bucketward.model import ScanResult, Verdict
from bucketward.wiring import UP_LOCK, House

log = logging.getLogger(__name__)
result_log = logging.getLogger("bucketward.results")

_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and what the call gave as extra."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields: dict[str, Any] = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields.update({k: v for k, v in vars(record).items() if k not in _STANDARD})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class TextFormatter(logging.Formatter):
    """One line for people; what comes from outside cannot make a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        line = f"{when}  {level}{printable(record.getMessage())}"
        if record.exc_info:
            trace = self.formatException(record.exc_info).splitlines()
            line += "".join(f"\n    {printable(each)}" for each in trace)
        return line


def printable(text: str) -> str:
    """Return `text` without anything that could move a cursor or forge a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def set_up_logging(config: Config, stream: TextIO | None = None) -> None:
    """Log to standard error, as text for people on a terminal and as JSON lines otherwise."""
    stream = stream or sys.stderr
    style = config.log.format
    if style == "auto":
        style = "text" if stream.isatty() else "json"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if style == "text" else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.log.level.upper())
    for noisy in ("botocore", "boto3", "urllib3", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def announce(result: ScanResult) -> None:
    """Log one scan result: one line, its keys from the glossary, never object content."""
    finding = result.findings[0] if result.findings else None
    name = result.object.key
    text = f"{result.verdict:<15} {name}"
    if finding:
        text += f"  {finding.signature}"
        if len(result.findings) > 1:
            text += f" and {len(result.findings) - 1} more"
    if result.reasons:
        text += f"  ({', '.join(result.reasons)})"
    if result.moved_to:
        text += f"  -> {result.moved_to[0]}/{result.moved_to[1]}"
    elif result.action != "keep":
        text += f"  {result.action}: {result.action_state}"
    if result.verdict is Verdict.ERROR and result.message:
        text += f"  {result.message}"
    bad = result.verdict not in {Verdict.CLEAN, Verdict.INFECTED_ALLOWED}
    result_log.log(
        logging.WARNING if bad else logging.INFO,
        "%s",
        text,
        extra={
            "bucket": result.object.bucket,
            "key": result.object.key,
            "version_id": result.object.version_id,
            "size": result.object.size,
            "verdict": result.verdict,
            "reasons": result.reasons,
            "engine": finding.engine if finding else None,
            "signature": finding.signature if finding else None,
            "sha256": result.sha256,
            "action": result.action,
            "seconds": round(result.seconds, 4),
            "scan_id": result.id,
        },
    )


def run(house: House, parts: Collection[str], *, seed: bool) -> None:
    """Start the parts, wait for SIGTERM or SIGINT, and stop them in good order."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with ExitStack() as running:
        if seed:
            running.enter_context(_only_one(house.config))
            house.seed()
        log.info("bucketward %s: starting %s", __version__, ", ".join(sorted(parts)))
        for part in house.parts(parts, on_result=announce):
            part.start()
            running.callback(part.stop)
        for line in house.welcome(parts):
            log.info("%s", line)
        stopping.wait()
        log.info("stopping")


class _only_one:  # noqa: N801 - used as a function
    """Holds the lock of the data folder: one `up` per folder."""

    def __init__(self, config: Config) -> None:
        self._path = config.data / UP_LOCK

    def __enter__(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            pid = self._file.read().strip() or "unknown"
            self._file.close()
            raise ConfigError(
                f"bucketward up runs on {self._path.parent} already (process {pid}); "
                "stop it, or set BUCKETWARD_DATA to another folder"
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def __exit__(self, *error: object) -> None:
        self._file.close()
