"""YARA rules by YARA-X, in worker processes: its library holds the interpreter lock as it scans."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bucketward.engines.containers import EXAMINER_VERSION
from bucketward.engines.workers import Busy, Died, Late, Workers
from bucketward.errors import ConfigError, Unavailable
from bucketward.model import EngineReport, Finding, Reason, Signatures, Spooled, Verdict

log = logging.getLogger(__name__)

PERMISSIONS: Mapping[str, str] = {}

MAX_SIZE = (2 << 30) - 4096
"""What one read(2) returns at most, which is what a worker makes."""

_RULES_LIMIT = 256 << 20
_COMPILE_SECONDS = 120

Listing = list[tuple[str, int, int, int]]


class YaraEngine:
    """The rules in a directory (``*.yar``, ``*.yara``), which are followed as they change.

    A match is Infected, or Suspicious where the rule says ``severity = "suspicious"`` in its
    meta section.  Rules that do not compile are a `ConfigError` at the start; later they are
    logged and those before stay in use.
    """

    opens_containers = False

    def __init__(
        self,
        rules_dir: Path,
        *,
        name: str = "yara",
        workers: int = 2,
        max_size: int = MAX_SIZE,
        memory: int = 8 << 30,
        user: str = "",
        poll: float = 5.0,
    ) -> None:
        self.name = name
        self.max_size = max_size
        self._folder = rules_dir
        self._poll = poll
        try:
            self._version = version("yara-x")
        except PackageNotFoundError as error:
            raise ConfigError(
                "YARA-X is not installed: pip install bucketward[yara]", backend="yara"
            ) from error
        self._compiled = -1
        self._signatures: Signatures | None = None
        self._closing = threading.Event()
        try:
            self._workers = Workers(
                "yara", workers, user=user, memory=memory, load=self._load_request
            )
            self._compiler = Workers("yara", 1, user=user, memory=memory)
        except LookupError as error:
            raise ConfigError(str(error), backend="yara") from error
        self._tried = _listing(rules_dir)
        if self._tried:
            self._compile(self._tried)
        self._thread = threading.Thread(target=self._follow, name="yara-rules", daemon=True)
        self._thread.start()

    def ping(self) -> None:
        """Raise `Unavailable` while there are no rules."""
        self.signatures()

    def close(self) -> None:
        """End the worker processes."""
        self._closing.set()
        self._thread.join()
        self._workers.close()
        if self._compiled >= 0:
            os.close(self._compiled)
            self._compiled = -1

    def scan(self, file: Spooled, deadline: float, *, alone: bool = False) -> EngineReport:
        """Match all rules; a container that none matches is Clean with `container-unopened`."""
        started = time.monotonic()
        # Taken first: whatever worker comes next judges by these rules or by newer ones.
        signatures = self.signatures()

        def report(
            verdict: Verdict,
            *coverage: str,
            findings: tuple[Finding, ...] = (),
            message: str = "",
        ) -> EngineReport:
            seconds = time.monotonic() - started
            return EngineReport(
                self.name, verdict, coverage, findings, signatures, seconds, message
            )

        if file.size > self.max_size:
            message = f"{file.size} bytes; YARA looks at no more than {self.max_size}"
            return report(Verdict.UNSCANNABLE, Reason.TOO_LARGE, message=message)
        if started >= deadline:
            return report(Verdict.UNSCANNABLE, Reason.TIMED_OUT, message="no time was left")
        try:
            answer = self._workers.call(
                {"do": "scan", "size": file.size}, file.fd, deadline, fresh=alone
            )
            if "late" in answer:
                raise Late
            matches = [(str(rule), bool(mild)) for rule, mild in answer["matches"]]
            kind = str(answer["kind"])
        except Busy:
            raise Unavailable("every YARA worker is busy", backend="yara") from None
        except Late:
            return report(Verdict.UNSCANNABLE, Reason.TIMED_OUT, message="YARA took too long")
        except (Died, KeyError, TypeError, ValueError) as error:
            if alone:
                return report(Verdict.ERROR, Reason.ENGINE_FAILED, message=str(error))
            raise Unavailable(str(error), backend="yara") from error
        coverage = (Reason.CONTAINER_UNOPENED,) if kind else ()
        if not matches:
            return report(Verdict.CLEAN, *coverage)
        verdict = Verdict.SUSPICIOUS if all(mild for _, mild in matches) else Verdict.INFECTED
        findings = tuple(Finding(self.name, rule) for rule, _ in matches)
        return report(verdict, *coverage, findings=findings)

    def signatures(self) -> Signatures:
        """Return what describes the rules in use."""
        if self._signatures is None:
            raise Unavailable(
                f"no rules in {self._folder}: put *.yar or *.yara files there", backend="yara"
            )
        return self._signatures

    def _load_request(self) -> tuple[Mapping[str, str], int]:
        return {"do": "load"}, os.dup(self._compiled)

    def _follow(self) -> None:
        seen = self._tried
        while not self._closing.wait(self._poll):
            listing = _listing(self._folder)
            # Twice the same: whoever writes there has finished.
            if listing == seen and listing != self._tried and listing:
                self._tried = listing
                try:
                    self._compile(listing)
                    log.info("yara: judging by %s", self.signatures().version)
                except ConfigError as error:
                    log.error("%s; the rules loaded before stay in use", error)
            seen = listing

    def _compile(self, listing: Listing) -> None:
        """Compile what is in the directory and go over to it."""
        whole = hashlib.sha256()
        sources = {}
        try:
            for name, *_ in listing:
                body = (self._folder / name).read_bytes()
                whole.update(f"{name}\0{len(body)}\0".encode("utf-8", "surrogateescape") + body)
                sources[name] = body.decode("utf-8", "replace")
        except OSError as error:
            raise ConfigError(f"cannot read the rules: {error}", backend="yara") from error
        if sum(map(len, sources.values())) > _RULES_LIMIT:
            raise ConfigError(f"the rules in {self._folder} are too many", backend="yara")
        fd = os.memfd_create("yara-rules", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(json.dumps(sources).encode("utf-8"))
            answer = self._compiler.call(
                {"do": "compile"}, fd, time.monotonic() + _COMPILE_SECONDS, fresh=True
            )
            if "error" in answer:
                raise ConfigError(f"{self._folder}: {answer['error']}", backend="yara")
            count = int(answer["count"])
        except (Late, Died, KeyError, TypeError, ValueError) as error:
            os.close(fd)
            raise ConfigError(
                f"the rules in {self._folder} cannot be compiled: {error}", backend="yara"
            ) from error
        except BaseException:
            os.close(fd)
            raise
        parts = (self._version, whole.hexdigest(), self.max_size, EXAMINER_VERSION)
        old, self._compiled = self._compiled, fd
        # In this order a report never claims newer rules than it was made by.
        self._workers.renew()
        self._signatures = Signatures(
            digest=hashlib.sha256(repr(parts).encode()).hexdigest(),
            version=f"YARA-X {self._version}, {len(sources)} files with {count} rules",
            count=count,
        )
        if old >= 0:
            os.close(old)


def _listing(folder: Path) -> Listing:
    """Return relative name, size, change time and inode of every rule file, in order."""
    found = []
    for path in folder.rglob("*.yar*"):
        if path.suffix not in (".yar", ".yara"):
            continue
        try:
            stat = path.stat()
        except OSError:
            continue
        name = str(path.relative_to(folder))
        found.append((name, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return sorted(found)


def open_yara(
    url: str,
    *,
    name: str = "yara",
    workers: int = 2,
    max_size: int = MAX_SIZE,
    user: str = "",
    poll: float = 5.0,
) -> YaraEngine:
    """Open ``yara:///directory/of/rules``."""
    parts = urlsplit(url)
    folder = Path(unquote(parts.path))
    if parts.scheme != "yara" or parts.netloc or not folder.is_absolute():
        raise ConfigError(f"{url!r}: use yara:///directory/of/rules", backend="yara")
    if not folder.is_dir():
        raise ConfigError(f"there is no directory {folder} with YARA rules", backend="yara")
    return YaraEngine(folder, name=name, workers=workers, max_size=max_size, user=user, poll=poll)
