"""The heartbeat: every running agent says in the ledger that it lives, and what it judges by."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

from bucketward import __version__
from bucketward.errors import Error
from bucketward.interfaces import Engine
from bucketward.ledger import Ledger

log = logging.getLogger(__name__)


class Heartbeat:
    """Writes a heartbeat at the start and every `every` seconds, until it is stopped."""

    def __init__(
        self,
        ledger: Ledger,
        name: str,
        engines: Mapping[str, Engine],
        *,
        kind: str = "event",
        every: float = 30.0,
    ) -> None:
        self._ledger = ledger
        self._name = name
        self._kind = kind
        self._engines = engines
        self._every = every
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start and return."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; the last heartbeat stays, and grows old."""
        self._stopping.set()
        self._thread.join()

    def beat(self) -> None:
        """Write one heartbeat."""
        engines: dict[str, dict[str, Any]] = {}
        for name, engine in self._engines.items():
            try:
                signatures = engine.signatures()
            except Error as error:
                engines[name] = {"problem": str(error)}
                continue
            engines[name] = {
                "version": signatures.version,
                "digest": signatures.digest,
                "updated_at": signatures.updated_at and signatures.updated_at.isoformat(),
                "count": signatures.count,
                "is_demo": signatures.is_demo,
            }
        facts = {"kind": self._kind, "version": __version__, "engines": engines}
        self._ledger.heartbeat(self._name, facts)

    def _run(self) -> None:
        while True:
            try:
                self.beat()
            except Error as error:
                log.debug("no heartbeat: %s", error)
            if self._stopping.wait(self._every):
                return
