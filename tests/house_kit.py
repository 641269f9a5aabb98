"""A whole small Bucketward over memory backends, for tests of what happens between them."""

import json
import os
import time
from contextlib import contextmanager
from datetime import UTC, datetime

from bucketward.agents.event import EventAgent
from bucketward.agents.keeper import Keeper
from bucketward.engines.memory import MemoryEngine
from bucketward.errors import Unavailable
from bucketward.events import encode
from bucketward.ledger import TABLES, Due, Ledger, Protected, SettingsReader
from bucketward.model import ObjectRef
from bucketward.notes import scan_result
from bucketward.notifiers.memory import MemoryNotifier
from bucketward.queues.memory import MemoryQueue
from bucketward.scan import Scanner
from bucketward.spool import MIB, Spool
from bucketward.states.memory import MemoryState
from bucketward.stores.memory import MemoryStore

MARK = b"the infected bytes"


def put(store, key, data, **more):
    """Store bytes under a key."""
    fd = os.memfd_create("test")
    try:
        os.write(fd, data)
        return store.put(key, fd, len(data), **more)
    finally:
        os.close(fd)


def get(store, ref):
    """Return the bytes of an object."""
    fd = os.memfd_create("test")
    try:
        info = store.read(ref, lambda _: fd)
        return os.pread(fd, info.size, 0)
    finally:
        os.close(fd)


def listing(store, *, versions=False):
    """Return everything a bucket lists."""
    found, cursor = [], ""
    while True:
        page = store.list(cursor=cursor, versions=versions)
        found += page.items
        cursor = page.cursor
        if not cursor:
            return found


def wait_for(condition, seconds=10.0, what="it never became true"):
    """Wait until `condition()` is true and return what it returned."""
    end = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        assert time.monotonic() < end, what
        time.sleep(0.01)


class Failing:
    """A backend whose methods fail by plan: `fail["stat"] = [error, error]` fails twice."""

    def __init__(self, inner):
        self.inner = inner
        self.fail = {}
        self.calls = []

    def __getattr__(self, name):
        value = getattr(self.inner, name)
        if not callable(value):
            return value

        def call(*args, **kwargs):
            self.calls.append(name)
            plan = self.fail.get(name)
            if callable(plan):
                plan(*args, **kwargs)
            elif plan:
                raise plan.pop(0)
            return value(*args, **kwargs)

        return call


class Kit:
    """Everything together; `agent()` runs an event agent for the length of a block."""

    def __init__(self, *, versioned=True, settings=None, max_deliveries=3, lease=30.0):
        self.store = Failing(MemoryStore("memory://in", versioned=versioned))
        self.quarantine = Failing(MemoryStore("memory://quarantine"))
        self.queue = Failing(MemoryQueue(lease=lease, max_deliveries=max_deliveries))
        self.state = Failing(MemoryState(TABLES))
        self.notifier = MemoryNotifier()
        self.ledger = Ledger(self.state, notes=lambda result: [Due("memory", scan_result(result))])
        self.engine = Failing(MemoryEngine("clamav", patterns={"Test.Mark": MARK}))
        self.engines = {"clamav": self.engine}
        self.spool = Spool(memory=64 * MIB, disk=64 * MIB)
        self.ledger.change_settings(
            json.dumps({"global": {"quarantine": "memory://quarantine", **(settings or {})}}),
            0,
            "test",
        )
        self.ledger.protect(Protected("memory://in", "memory://in", "acc", "reg"))
        self.settings = SettingsReader(self.ledger, every=0)
        self.seen = []

    def announce(self, key, **more):
        self.queue.send([encode([ObjectRef("memory://in", key, **more)])])

    @contextmanager
    def agent(self, **more):
        agent = EventAgent(
            self.queue,
            Scanner(self.engines, self.spool, allowed=self.ledger.allowed),
            more.pop("results", self.ledger),
            more.pop("snapshot", self.settings.current),
            lambda protected: self.store,
            lambda protected, name: self.quarantine,
            threads=more.pop("threads", 4),
            drain=5,
            poll=0.05,
            on_result=self.seen.append,
            **more,
        )
        agent.start()
        try:
            yield agent
        finally:
            agent.stop()

    def keeper(self, **more):
        return Keeper(
            self.ledger,
            self.queue,
            self.settings.refresh,
            lambda protected: self.store,
            {"memory": self.notifier},
            holder="test",
            **more,
        )

    def run_until_idle(self, results=0, seconds=10.0):
        """Run an agent until the queue is empty and at least so many results are there."""
        with self.agent() as agent:
            wait_for(
                lambda: (
                    len(self.seen) >= results
                    and agent.is_idle
                    and self.queue.inner.depth().waiting == 0
                    and self.queue.inner.depth().in_flight == 0
                ),
                seconds,
                f"only {len(self.seen)} results",
            )
        return self.seen


def away():
    return Unavailable("away for a moment", backend="test")


def today():
    return datetime.now(UTC).strftime("%Y-%m-%d")
