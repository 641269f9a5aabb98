"""The only module that opens backends: from configuration to the objects that agents are given."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bucketward.agents.event import EventAgent
from bucketward.agents.keeper import Keeper, sweep
from bucketward.config import Config
from bucketward.errors import ConfigError, Error, NotFound, Unsupported
from bucketward.events import encode
from bucketward.interfaces import Backend, Cloud, Engine, Notifier, Queue, State, Store
from bucketward.ledger import (
    TABLES,
    Due,
    Ledger,
    Protected,
    Results,
    SettingsReader,
    dump_result,
)
from bucketward.model import ObjectRef, QuarantineSpec, ScanResult, Spooled, Verdict
from bucketward.notes import matches, scan_result
from bucketward.policy import Settings, check_loops
from bucketward.scan import Scanner
from bucketward.spool import Spool

log = logging.getLogger(__name__)

OPENERS: Mapping[str, Mapping[str, str]] = {
    "store": {
        "file": "bucketward.stores.file:open_file",
        "memory": "bucketward.stores.memory:open_memory",
        "s3": "bucketward.stores.s3:open_s3",
    },
    "queue": {
        "memory": "bucketward.queues.memory:open_memory",
        "sqlite": "bucketward.queues.sqlite:open_sqlite",
        "sqs": "bucketward.queues.sqs:open_sqs",
    },
    "state": {
        "memory": "bucketward.states.memory:open_memory",
        "sqlite": "bucketward.states.sqlite:open_sqlite",
    },
    "engine": {
        "clamav": "bucketward.engines.clamav:open_clamav",
        "yara": "bucketward.engines.yara:open_yara",
    },
    "notifier": {
        "http": "bucketward.notifiers.webhook:open_webhook",
        "https": "bucketward.notifiers.webhook:open_webhook",
        "log": "bucketward.notifiers.log:open_log",
        "memory": "bucketward.notifiers.memory:open_memory",
    },
    "cloud": {
        "aws": "bucketward.clouds.aws:open_aws",
        "local": "bucketward.clouds.local:open_local",
        "memory": "bucketward.clouds.memory:open_memory",
    },
}
"""URL scheme -> opener, imported on first use so that an SDK that is not needed is not loaded."""


def opener(kind: str, url: str) -> Callable[..., Any]:
    """Return the function that opens a backend; `ConfigError` if there is none for the URL."""
    scheme = urlsplit(url).scheme
    target = OPENERS[kind].get(scheme)
    if target is None:
        known = ", ".join(sorted(OPENERS[kind]))
        raise ConfigError(f"no {kind} speaks {scheme or url!r}; known are {known}")
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]  # the table above
    except ImportError as error:
        extra = {"s3": "aws", "sqs": "aws", "aws": "aws", "yara": "yara"}.get(scheme, scheme)
        raise ConfigError(
            f"{kind} {scheme} needs {error.name}; install bucketward[{extra}]"
        ) from error


class House:
    """Everything one process has open: each thing opened on first use, closed in reverse order.

    Use it as a context manager.  Opening raises the six errors; `check` reports instead.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self._open = ExitStack()
        self._lock = threading.RLock()
        self._stores: dict[str, Store] = {}
        self._quarantines: dict[str, str] = {}

    def __enter__(self) -> House:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def _keep(self, backend: Any) -> Any:
        self._open.callback(backend.close)
        return backend

    # -- backends --------------------------------------------------------------------------------

    @cached_property
    def state(self) -> State:
        """The state that the ledger lies in."""
        url = self.config.state.url
        return self._keep(opener("state", url)(url, TABLES))  # type: ignore[no-any-return]  # by URL

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger."""
        results = self.config.results
        return Ledger(
            self.state, keep=results.keep, retention_days=results.retention_days, notes=self._notes
        )

    @cached_property
    def queue(self) -> Queue:
        """The queue that events arrive on."""
        return self._queue(self.config.queue.url)

    def _queue(self, url: str) -> Queue:
        options = {"max_deliveries": self.config.queue.max_deliveries}
        if urlsplit(url).scheme == "sqs":
            options = {}  # the queue's own redrive policy says
        return self._keep(opener("queue", url)(url, **options))  # type: ignore[no-any-return]  # by URL

    @cached_property
    def results_queue(self) -> Queue | None:
        """The queue that results travel on, `None` where they go straight to the ledger."""
        url = self.config.results.url
        return self._queue(url) if url else None

    @cached_property
    def results(self) -> Results:
        """Where this process records what it found out."""
        return QueuedResults(self.results_queue) if self.results_queue else self.ledger

    @cached_property
    def engines(self) -> Mapping[str, Engine]:
        """The engines that are configured here, by name."""
        return {name: self._engine(name) for name in self.config.engines}

    def _engine(self, name: str) -> Engine:
        options = self.config.engines[name]
        return self._keep(opener("engine", options.url)(options.url, **self._engine_options(name)))  # type: ignore[no-any-return]  # by URL

    def _engine_options(self, name: str) -> dict[str, Any]:
        raise NotImplementedError(name)

    @cached_property
    def spool(self) -> Spool:
        """The spool that all scans of this process share."""
        spool = self.config.spool
        return Spool(
            memory=spool.memory,
            disk=spool.disk,
            in_memory_below=spool.in_memory_below,
            directory=spool.directory,
        )

    @cached_property
    def scanner(self) -> Scanner:
        """The pipeline."""
        return Scanner(self.engines, self.spool, detect_type=detect_type)

    @cached_property
    def notifiers(self) -> Mapping[str, Notifier]:
        """The configured notifiers, by name."""
        found: dict[str, Notifier] = {}
        for name, options in self.config.notifiers.items():
            given: dict[str, Any] = {}
            if urlsplit(options.url).scheme in {"http", "https"}:
                given = {"secret": options.secret, "allow_private": options.allow_private}
            found[name] = self._keep(opener("notifier", options.url)(options.url, **given))
        return found

    def _notes(self, result: ScanResult) -> Sequence[Due]:
        note = scan_result(result)
        return [
            Due(name, note)
            for name, options in self.config.notifiers.items()
            if matches(options.filter, note)
        ]

    @cached_property
    def settings(self) -> SettingsReader:
        """The settings and protected buckets, read again every 30 s."""
        return SettingsReader(self.ledger)

    def store(self, url: str) -> Store:
        """Open a bucket by URL, once."""
        with self._lock:
            store = self._stores.get(url)
            if store is None:
                store = self._stores[url] = self._keep(opener("store", url)(url))
            return store

    def protected_store(self, protected: Protected) -> Store:
        """Open a protected bucket, once."""
        return self.store(protected.url)

    def quarantine(self, protected: Protected, name: str) -> Store:
        """Open the quarantine of a protected bucket: the one named, or the default, made if absent.

        The default for directories is ``quarantine`` in the data folder; for S3 on AWS a bucket of
        its own per account and region.  `ConfigError` where a name has to be given.
        """
        url = name or self._default_quarantine(protected)
        return self.store(_same_place(protected.url, url))

    def _default_quarantine(self, protected: Protected) -> str:
        if protected.url.startswith("file://"):
            return (self.config.data / "quarantine").as_uri()
        with self._lock:
            place = f"{protected.account}|{protected.region}"
            if place not in self._quarantines:
                cloud = self.cloud(protected)
                if cloud is None:
                    raise Unsupported(
                        f"no quarantine for {protected.bucket}; name one in the policy "
                        '(quarantine = "s3://...")',
                        backend="wiring",
                    )
                name = f"bucketward-quarantine-{cloud.account}-{cloud.region}"
                self._quarantines[place] = cloud.make_quarantine(QuarantineSpec(name, cloud.region))
            return self._quarantines[place]

    def cloud(self, protected: Protected) -> Cloud | None:
        """Open the control plane that a bucket belongs to, `None` if there is none we speak to."""
        raise NotImplementedError

    # -- protecting ------------------------------------------------------------------------------

    def protect(self, url: str, *, account: str = "") -> tuple[Protected, bool]:
        """Protect a bucket; return its entry and whether it is new.

        `ConfigError` if it is the quarantine of another, or cannot be opened.
        """
        raise NotImplementedError

    def unprotect(self, url: str) -> None:
        """Stop protecting a bucket."""
        raise NotImplementedError
