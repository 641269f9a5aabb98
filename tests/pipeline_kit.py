"""The whole pipeline on this machine's real parts: directories, SQLite, clamd, agent and keeper."""

import json
import os
import threading
from contextlib import contextmanager
from pathlib import Path

from bucketward.agents.event import EventAgent
from bucketward.agents.keeper import Keeper, sweep
from bucketward.events import encode
from bucketward.ledger import TABLES, Ledger, Protected, SettingsReader
from bucketward.model import ObjectRef
from bucketward.queues.sqlite import SqliteQueue
from bucketward.scan import Scanner
from bucketward.spool import MIB, Spool
from bucketward.states.sqlite import SqliteState
from bucketward.stores.file import FileStore
from house_kit import get, listing, wait_for


class WatchedSpool(Spool):
    """A spool that remembers how much was ever reserved at a time, and how often."""

    peak = 0
    taken = 0

    def reserve(self, size, *, deadline=None):
        """Reserve and look."""
        slot = super().reserve(size, deadline=deadline)
        self._look()
        return slot

    def try_reserve(self, size):
        """Reserve and look."""
        slot = super().try_reserve(size)
        self._look(slot is not None)
        return slot

    def _look(self, is_taken=True):
        self.taken += is_taken
        self.peak = max(self.peak, self.used)


class Meddler:
    """An engine, and somebody who does something before or after it looks at a file."""

    def __init__(self, engine, before=None, after=None):
        self.engine = engine
        self.before = before
        self.after = after

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def scan(self, file, deadline, *, alone=False):
        """Judge the file between two interventions."""
        if self.before:
            self.before(file)
        report = self.engine.scan(file, deadline, alone=alone)
        if self.after:
            self.after(file)
        return report


class Pipeline:
    """Directories `drop` and `quarantine` below `folder`, and everything that looks after them."""

    def __init__(
        self, folder, engines, *, policy=None, buckets=(), max_deliveries=3, spool=None, threads=8
    ):
        self.folder = folder
        self.drop = folder / "drop"
        self.jail = folder / "quarantine"
        for path in (self.drop, self.jail):
            path.mkdir(parents=True)
        self.store = FileStore(self.drop)
        self.quarantine = FileStore(self.jail)
        self.stores = {self.store.bucket: self.store}
        self.state = SqliteState(folder / "state.db", TABLES, lock_timeout=0.5)
        self.queue = SqliteQueue(folder / "queue.db", max_deliveries=max_deliveries)
        self.ledger = Ledger(self.state)
        self.spool = spool or WatchedSpool(
            memory=256 * MIB, disk=256 * MIB, directory=folder / "spool"
        )
        self.scanner = Scanner(engines, self.spool)
        self.threads = threads
        self.seen = []
        layers = {}
        for name, layer in dict(buckets).items():
            (folder / name).mkdir()
            store = FileStore(folder / name)
            self.stores[store.bucket] = store
            layers[store.bucket] = layer
        settings = {"global": policy or {}, "buckets": layers}
        self.ledger.change_settings(json.dumps(settings), 0, "test")
        for bucket in self.stores:
            self.ledger.protect(Protected(bucket, bucket))
        self.settings = SettingsReader(self.ledger)

    def close(self):
        """Close what is open."""
        for thing in (*self.stores.values(), self.quarantine, self.queue, self.state):
            thing.close()

    # -- what an uploader does -------------------------------------------------------------------

    def upload(self, name, body, folder="drop"):
        """Write a file as any program would, by a path below the bucket; return the path."""
        path = os.fsencode(self.folder / folder) + b"/" + os.fsencode(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(body)
        return Path(os.fsdecode(path))

    def announce(self, *keys, folder="drop", **more):
        """Send one message per key."""
        bucket = FileStore(self.folder / folder).bucket
        self.queue.send([encode([ObjectRef(bucket, key, **more)]) for key in keys])

    def sweep(self):
        """Announce everything that has no verdict; return how much that was."""
        protected = self.settings.refresh().protected
        return sum(
            sweep(self.ledger, self.queue, store, protected[bucket])
            for bucket, store in self.stores.items()
        )

    # -- what we do ------------------------------------------------------------------------------

    @contextmanager
    def agent(self, **more):
        """Run an event agent for the length of a block."""
        agent = EventAgent(
            self.queue,
            self.scanner,
            more.pop("results", self.ledger),
            self.settings.current,
            lambda protected: self.stores[protected.bucket],
            lambda protected, name: self.quarantine,
            threads=self.threads,
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
        """Return a keeper that is not started."""
        return Keeper(
            self.ledger,
            self.queue,
            self.settings.refresh,
            lambda protected: self.stores[protected.bucket],
            {},
            holder="test",
            **more,
        )

    def is_done(self, agent):
        """Return whether nothing is in hand and nothing is waiting."""
        depth = self.queue.depth()
        return agent.is_idle and depth.waiting == depth.in_flight == 0

    def run(self, results=0, seconds=60.0):
        """Run an agent until nothing is left to do; return what it found out, by key."""
        with self.agent() as agent:
            wait_for(
                lambda: len(self.seen) >= results and self.is_done(agent),
                seconds,
                f"only {len(self.seen)} results, {self.queue.depth()}",
            )
        return {result.object.key: result for result in self.seen}

    def scan(self, **bodies):
        """Upload, announce and judge; return the results by key."""
        for key, body in bodies.items():
            self.upload(key, body)
        self.announce(*bodies)
        return self.run(len(bodies))

    # -- what is there then ----------------------------------------------------------------------

    def kept(self):
        """Return the bytes of every object that is still in the bucket, by key."""
        return {info.key: get(self.store, info) for info in listing(self.store)}

    def jailed(self):
        """Return the bytes of everything in quarantine."""
        return [get(self.quarantine, info) for info in listing(self.quarantine)]

    def tags(self, key):
        """Return the tags of an object."""
        return dict(self.store.tags(self.store.stat(ObjectRef(self.store.bucket, key))))

    def verdict(self, key):
        """Return the current verdict on what is under `key` now, `None` if there is none."""
        info = self.store.stat(ObjectRef(self.store.bucket, key))
        current = self.ledger.verdicts([info])[0]
        return current and current.verdict

    def dead(self):
        """Let the keeper take the dead letters and return them."""
        self.keeper().consume_dead_letters()
        page = self.state.export("dead")
        return [json.loads(record.body) for record in page.items]


class Peak:
    """Samples `value()` in a thread; `most` is the largest it saw."""

    def __init__(self, value, every=0.005):
        self.most = 0
        self._value = value
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _watch(self):
        while not self._stop.wait(self._every):
            self.most = max(self.most, self._value())
