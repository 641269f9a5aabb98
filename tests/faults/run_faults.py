"""A fault run: real agents over a directory bucket, killed and disturbed as a seed says.

The plan (what happens, in which order, how long after an agent is ready) is made from the seed
before anything starts.  What an agent is doing at that moment is up to the machine.

    PYTHONPATH=tests python -m faults.run_faults --kills 1000 --objects 5000 --seed 7
"""

import argparse
import io
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path

from bucketward.agents.keeper import sweep
from bucketward.engines.clamd import demo_signatures
from bucketward.errors import Changed, NotFound, Unavailable
from bucketward.events import encode
from bucketward.ledger import TABLES, Ledger
from bucketward.model import ObjectRef
from bucketward.queues.sqlite import SqliteQueue
from bucketward.states.sqlite import SqliteState
from bucketward.stores.file import FileStore
from conftest import eicar
from faults.checker import Report, Truth, Written, check
from running import Home, Process

AGENTS = 2
LEASE = 5
DELIVERIES = 200  # kills must not make dead letters: those planted are counted

CONFIG = """
quarantine = "file://{folder}/quarantine"
protect = []
[signatures]
directory = "signatures"
[queue]
lease = {lease}
max_deliveries = {deliveries}
[event]
threads = 4
[keeper]
sweep_minutes = 1
"""


# -- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Do:
    """One thing that happens, `at` seconds after the step's agent is ready."""

    at: float
    what: str
    key: str = ""
    infected: bool = False
    copies: int = 1  # messages that announce it; 0: only the sweep will find it
    pinned: bool = False  # the message names the etag
    number: int = 0  # makes contents, tags and poison of their own
    seconds: float = 0.0


@dataclass(frozen=True)
class Step:
    agent: int
    is_early: bool  # the kill does not wait until the agent is ready
    kill_at: float
    events: tuple[Do, ...]


def make_plan(seed, kills, objects):
    """Return the steps, each of which ends with the death of one agent."""
    chance = random.Random(seed)
    keys = []
    numbers = iter(range(10**9))
    steps = []
    for n in range(kills):
        kill_at = chance.uniform(0.0, 0.6) if chance.random() < 0.8 else chance.uniform(0.6, 2.0)
        events = []

        def add(what, kill_at=kill_at, events=events, **more):
            at = chance.uniform(0.0, kill_at)
            events.append(Do(at, what, number=next(numbers), **more))

        def write(key):
            copies = chance.choices((0, 1, 2, 5), (5, 75, 15, 5))[0]
            pinned, infected = chance.random() < 0.3, chance.random() < 0.4
            add("write", key=key, infected=infected, copies=copies, pinned=pinned)

        for _ in range(objects * (n + 1) // kills - objects * n // kills):
            keys.append(f"d{len(keys) % 7}/object-{len(keys)} ä+%")
            write(keys[-1])
            if chance.random() < 0.2:
                write(chance.choice(keys[-20:]))
            if chance.random() < 0.1:
                add("remove", key=chance.choice(keys[-20:]))
            if chance.random() < 0.15:
                add("retag", key=chance.choice(keys[-20:]))
            if chance.random() < 0.1:
                add("announce", key=chance.choice(keys), copies=chance.randint(1, 3))
        if chance.random() < 0.1:
            add("poison")
        if chance.random() < 0.10:
            add("kill clamd")
        if chance.random() < 0.08:
            add("stop clamd", seconds=chance.uniform(0.1, 3.0))
        for name in ("state.db", "queue.db"):
            if chance.random() < 0.1:
                add(f"lock {name}", seconds=chance.uniform(0.1, 2.0))
        events.sort(key=lambda event: event.at)
        steps.append(Step(n % AGENTS, chance.random() < 0.1, kill_at, tuple(events)))
    return steps


def content(number, infected):
    """Return bytes that no other number has."""
    if not infected:
        return random.Random(number).randbytes(200 + number % 5000)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("number", str(number))
        archive.writestr("eicar.com", eicar())
    return packed.getvalue()


# -- the run -------------------------------------------------------------------------------------


class Run:
    """The processes of one run, and what was done to them."""

    def __init__(self, folder, seed, out):
        self.folder = Path(folder)
        self.source_folder = self.folder / "source"
        for name in ("source", "quarantine", "signatures"):
            (self.folder / name).mkdir()
        for path in demo_signatures().iterdir():
            shutil.copyfile(path, self.folder / "signatures" / path.name)
        config = CONFIG.format(folder=self.folder, lease=LEASE, deliveries=DELIVERIES)
        self.home = Home(self.folder, config)
        made = self.home.run("bucket", "protect", f"file://{self.source_folder}")
        assert made.returncode == 0, made.stderr
        self.truth = Truth()
        self.faults = Counter()
        self._last = {}
        self._out = out
        self._agents = {}
        self._born = Counter()
        self._timers = []

    def __enter__(self):
        with ExitStack() as stack:
            self.source = stack.enter_context(closing(FileStore(self.source_folder)))
            self.quarantine = stack.enter_context(closing(FileStore(self.folder / "quarantine")))
            data = self.home.data
            self.queue = stack.enter_context(closing(SqliteQueue(data / "queue.db")))
            self.state = stack.enter_context(closing(SqliteState(data / "state.db", TABLES)))
            self.ledger = Ledger(self.state)
            assert self.source.has_tags, f"{self.folder} holds no extended attributes"
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        for timer in self._timers:
            timer.join()
        self.end(signal.SIGKILL if error[0] else signal.SIGTERM)
        self._stack.close()

    def end(self, number=signal.SIGTERM):
        """End every process."""
        for name in list(self._agents):
            self._end(name, number)

    def _start(self, name, command):
        self._born[name] += 1
        log = self.folder / f"{name}-{self._born[name]}.log"
        self._agents[name] = Process(
            [command], cwd=self.folder, environ=self.home._environ, log=log
        )

    def _end(self, name, number=signal.SIGKILL):
        process = self._agents.pop(name)
        process.stop(number)
        if "bug " in process.log or "Traceback" in process.log:
            self.say(f"a bug in the log of {process.log_path.name}:\n{process.log[-4000:]}")
            self.faults["bugs in logs"] += 1
        elif number == signal.SIGKILL:
            process.log_path.unlink()

    def say(self, text):
        print(text, file=self._out, flush=True)

    def play(self, steps):
        """Do what the plan says."""
        self._start("keeper", "keeper")
        for n in range(AGENTS):
            self._start(n, "event")
        for n, step in enumerate(steps):
            if not step.is_early:
                self._agents[step.agent].wait_for('"ready"', 60)
            begun = time.monotonic()
            for event in step.events:
                time.sleep(max(0.0, begun + event.at - time.monotonic()))
                self._do(event)
            time.sleep(max(0.0, begun + step.kill_at - time.monotonic()))
            self._end(step.agent)
            self.faults["agents killed"] += 1
            self._start(step.agent, "event")
            if n % 50 == 49:
                depth = self.queue.depth()
                self.say(f"{n + 1} kills, {len(self.truth.written)} written, {depth}")

    def _do(self, event):
        what, _, name = event.what.partition(" ")
        getattr(self, f"_{what}")(event, name)

    # -- what other writers do

    def _write(self, event, _):
        body = content(event.number, event.infected)
        tags = {"team": f"t{event.number}"} if event.number % 2 else {}
        before = self._last.get(event.key)
        if before is not None:
            # Before the write: from the moment it begins, nobody is owed the old one.
            before.is_over = True
            self.faults["overwrites"] += 1
        with tempfile.TemporaryFile() as file:
            file.write(body)
            file.flush()
            info = self.source.put(event.key, file.fileno(), len(body), tags=tags)
        written = self._last[event.key] = Written(info, body, event.infected, tags)
        self.truth.written.append(written)
        etag = info.etag if event.pinned else None
        self._send([ObjectRef(info.bucket, info.key, etag=etag)] * event.copies)
        self.faults["duplicate messages"] += max(0, event.copies - 1)
        self.faults["unannounced objects"] += event.copies == 0

    def _remove(self, event, _):
        before = self._last.get(event.key)
        if before is not None:
            before.is_over = True
            with suppress(FileNotFoundError):
                (self.source_folder / event.key).unlink()
                self.faults["deletions"] += 1

    def _retag(self, event, _):
        for _ in range(20):
            try:
                info = self.source.stat(ObjectRef(self.source.bucket, event.key))
                tags = {**self.source.tags(info), "retag": f"r{event.number}"}
                self.source.replace_tags(info, tags)
            except Changed:
                continue
            except NotFound:
                return
            self._last[event.key].retag = tags["retag"]
            self.faults["re-tags"] += 1
            return

    def _announce(self, event, _):
        self._send([ObjectRef(self.source.bucket, event.key)] * event.copies)
        self.faults["late messages"] += event.copies

    def _poison(self, event, _):
        body = f"poison {event.number}"
        self.truth.poison.add(body)
        self._patiently(lambda: self.queue.send([body]))
        self.faults["poison"] += 1

    def _send(self, refs):
        self._patiently(lambda: self.queue.send([encode([ref]) for ref in refs]))

    def _patiently(self, act):
        while True:
            try:
                return act()
            except Unavailable:
                time.sleep(0.1)  # we locked it ourselves

    # -- what happens to the house

    def _kill(self, event, _):
        if pid := self._clamd():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.faults["clamd killed"] += 1

    def _stop(self, event, _):
        if pid := self._clamd():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                self.faults["clamd stopped"] += 1
                self._later(event.seconds, lambda: os.kill(pid, signal.SIGCONT))

    def _lock(self, event, name):
        db = sqlite3.connect(
            self.home.data / name, timeout=10, isolation_level=None, check_same_thread=False
        )
        try:
            db.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            db.close()
            return
        self.faults[f"{name} locked"] += 1
        self._later(event.seconds, db.close)

    def _later(self, seconds, act):
        def do():
            with suppress(ProcessLookupError):
                act()

        timer = threading.Timer(seconds, do)
        timer.start()
        self._timers = [each for each in self._timers if each.is_alive()] + [timer]

    def _clamd(self):
        """Return the oldest clamd below one of our agents: that which all share."""
        ours = [self._agents[n].pid for n in range(AGENTS)]
        found = [pid for parent in ours for pid in children(parent) if name_of(pid) == "clamd"]
        return min(found, key=born_at, default=None)

    # -- the end

    def settle(self, seconds):
        """Wait until nothing is left to do and a sweep finds nothing; return how long it took."""
        begun = time.monotonic()
        while time.monotonic() < begun + seconds:
            depth = self.queue.depth()
            if depth.waiting or depth.in_flight or self._is_letter_left():
                time.sleep(0.1)
                continue
            (protected,) = self.ledger.protected().values()
            try:
                found = sweep(self.ledger, self.queue, self.source, protected)
            except Unavailable:
                continue
            self.faults["found by the sweep"] += found
            if not found:
                return time.monotonic() - begun
        self.say(f"not settled after {seconds} s: {self.queue.depth()}")
        return time.monotonic() - begun

    def _is_letter_left(self):
        return len(self.state.export("dead").items) < min(100, len(self.truth.poison))

    def check(self) -> Report:
        """Ask the checker, with stores that are opened for it."""
        with (
            closing(FileStore(self.source_folder)) as source,
            closing(FileStore(self.folder / "quarantine")) as quarantine,
        ):
            return check(self.truth, source, quarantine, self.ledger, self.queue)


def children(pid):
    found = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                found += [int(each) for each in (task / "children").read_text().split()]
    return found


def name_of(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def born_at(pid):
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return 0


def run(folder, seed, kills, objects, *, settle, out=sys.stdout, after=lambda run: None):
    """Make a run and return its `Report`; `after` may look at the settled run."""
    print(f"seed {seed}, {kills} kills, {objects} objects, in {folder}", file=out, flush=True)
    begun = time.monotonic()
    with Run(folder, seed, out) as running:
        running.play(make_plan(seed, kills, objects))
        played = time.monotonic() - begun
        settled = running.settle(settle)
        running.end()
        report = running.check()
        for name, count in running.faults.items():
            running.say(f"{count:>8}  {name}")
        running.say(str(report))
        running.say(f"seed {seed}: {played:.0f} s of faults, settled in {settled:.0f} s")
        after(running)
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--objects", type=int, default=5000)
    parser.add_argument("--settle", type=float, default=1200, help="seconds to wait at the end")
    parser.add_argument("--folder", type=Path, help="an empty folder, kept afterwards")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(exist_ok=True)
    try:
        report = run(folder, options.seed, options.kills, options.objects, settle=options.settle)
    except subprocess.SubprocessError as error:
        sys.exit(str(error))
    if report.problems:
        sys.exit(f"{len(report.problems)} things are wrong; left as they are in {folder}")
    if not options.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
