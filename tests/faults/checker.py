"""What must hold when a fault run has settled, asked of buckets, queue and ledger alone."""

import hashlib
import json
import os
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from bucketward.ledger import load_result
from bucketward.model import ObjectInfo, ObjectRef, Verdict
from bucketward.policy import quarantine_key

_SHOWN = 20


@dataclass
class Written:
    """One object (version) that another writer put into the source."""

    info: ObjectInfo
    body: bytes
    infected: bool
    tags: dict[str, str]
    is_over: bool = False  # overwritten or deleted by another writer since
    retag: str = ""  # the value of the tag that another writer added later

    @property
    def verdict(self):
        return Verdict.INFECTED if self.infected else Verdict.CLEAN

    @property
    def sha256(self):
        return hashlib.sha256(self.body).hexdigest()

    @property
    def quarantine_key(self):
        info = self.info
        return quarantine_key(info.bucket, info.key, info.version_id, info.etag, self.sha256)


@dataclass
class Truth:
    """What the other writers did, in order; the checker's only knowledge besides the stores."""

    written: list[Written] = field(default_factory=list)
    poison: set[str] = field(default_factory=set)

    def last(self):
        """Return the last object of each key that no other writer took away."""
        found = {}
        for each in self.written:
            found[each.info.key] = each
        return {key: each for key, each in found.items() if not each.is_over}


@dataclass
class Report:
    counts: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def need(self, condition, problem):
        if not condition:
            self.problems.append(problem)

    def __str__(self):
        lines = [f"{count:>8}  {name}" for name, count in self.counts.items()]
        lines += [f"WRONG: {problem}" for problem in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"WRONG: and {len(self.problems) - _SHOWN} more")
        return "\n".join(lines)


def check(truth, source, quarantine, ledger, queue):
    """Compare what there is with what was written and return a `Report`."""
    report = Report()
    results = [load_result(record.body) for record in _export(ledger.state, "results")]
    live = _listing(source)
    _check_queue(report, truth, ledger, queue)
    _check_source(report, truth, source, ledger, live)
    _check_quarantine(report, truth, quarantine, results)
    _check_results(report, truth, results)
    _check_counters(report, ledger, results)
    _check_verdicts(report, truth, ledger, live)
    return report


def _check_queue(report, truth, ledger, queue):
    depth = queue.depth()
    report.need((depth.waiting, depth.in_flight) == (0, 0), f"the queue is not empty: {depth}")
    left = queue.dead(10, 0)
    report.need(not left, f"dead letters that no keeper took: {[m.body for m in left]}")
    queue.nack(left)
    bodies = Counter(letter["body"] for letter in map(_json, _export(ledger.state, "dead")))
    report.counts["dead letters, all planted"] = bodies.total()
    for body in bodies.keys() - truth.poison:
        report.need(False, f"a dead letter that nobody planted: {body}")
    for body in truth.poison - bodies.keys():
        report.need(False, f"a planted dead letter that is nowhere: {body}")
    for body, count in bodies.items():
        report.need(count == 1, f"{count} dead letters from one: {body}")


def _check_source(report, truth, source, ledger, live):
    last = truth.last()
    clean = {key: each for key, each in last.items() if not each.infected}
    report.counts["written"] = len(truth.written)
    report.counts["overwritten or deleted by others"] = sum(e.is_over for e in truth.written)
    report.counts["live and clean"] = len(live)
    for key in live.keys() - clean.keys():
        why = "infected" if key in last else "nobody's"
        report.need(False, f"{key!r} is in the source, but {why}")
    for key in clean.keys() - live.keys():
        report.need(False, f"clean {key!r} is lost")
    found = ledger.verdicts(list(live.values()))
    for (key, info), verdict in zip(live.items(), found, strict=True):
        each = clean.get(key)
        if each is None:
            continue
        report.need(info.etag == each.info.etag, f"{key!r} is another object than was written")
        report.need(_body(source, info) == each.body, f"{key!r} has other bytes than written")
        report.need(verdict is not None, f"{key!r} has no current verdict")
        if verdict is not None:
            right = verdict.verdict is each.verdict
            report.need(right, f"{key!r} is {each.verdict}, the ledger says {verdict.verdict}")
        _check_tags(report, each, source.tags(source.stat(info.ref)))


def _check_tags(report, each, tags):
    key = each.info.key
    for name, value in each.tags.items():
        report.need(tags.get(name) == value, f"{key!r} lost its owner's tag {name}: {tags}")
    if each.retag:
        report.counts["re-tagged by others"] += 1
        report.need(tags.get("retag") == each.retag, f"{key!r} lost a later tag: {tags}")
    ours = tags.get("scan-result")
    if ours is None and each.retag:
        report.counts["our tags overwritten by others"] += 1
    else:
        report.need(ours == str(each.verdict), f"{key!r} is {each.verdict}, its tag says {ours}")


def _check_quarantine(report, truth, quarantine, results):
    there = _listing(quarantine)
    infected = [each for each in truth.written if each.infected]
    expected = {each.quarantine_key: each for each in infected}
    report.need(len(expected) == len(infected), "the run wrote one infected object twice")
    report.counts["in quarantine"] = len(there)
    for key, info in there.items():
        each = expected.get(key)
        report.need(each is not None, f"{key!r} is in quarantine and does not belong there")
        if each is None:
            continue
        report.need(_body(quarantine, info) == each.body, f"{key!r} has other bytes in quarantine")
        tags = quarantine.tags(quarantine.stat(info.ref))
        for name, value in each.tags.items():
            report.need(tags.get(name) == value, f"{key!r} lost tag {name} on its way")
        report.need(tags.get("scan-result") == "Infected", f"{key!r} is not tagged: {tags}")
    done = {r.moved_to for r in results if r.action == "move" and r.action_state == "done"}
    for each in infected:
        if each.is_over:
            continue
        key = each.quarantine_key
        report.need(key in there, f"infected {each.info.key!r} is not in quarantine")
        recorded = (quarantine.bucket, key) in done
        report.need(recorded, f"no result says that {each.info.key!r} was moved")


def _check_results(report, truth, results):
    known = {(each.info.key, each.info.etag): each for each in truth.written}
    report.counts["results"] = len(results)
    scanned = Counter()
    for result in results:
        info = result.object
        report.need(result.action_state != "pending", f"{result.id} on {info.key!r} is pending")
        each = known.get((info.key, info.etag))
        if result.verdict is Verdict.ERROR:
            # Harmless if a right one came later, which the current verdict tells.
            report.counts["results Error"] += 1
            continue
        report.need(each is not None, f"a result on {info.key!r} is on bytes nobody wrote")
        if each is not None:
            scanned[info.key, info.etag] += 1
            right = result.verdict is each.verdict and result.sha256 == each.sha256
            report.need(right, f"{info.key!r} is {each.verdict}, a result says {result.verdict}")
            report.need(result.action_state == "done", f"{info.key!r}: {result.message}")
    report.counts["scanned more than once"] = sum(count > 1 for count in scanned.values())


def _check_counters(report, ledger, results):
    right = defaultdict(Counter)
    for result in results:
        info = result.object
        amounts = right[info.bucket, f"{result.scanned_at:%Y-%m-%d}"]
        amounts[str(result.verdict)] += 1
        amounts[f"{result.verdict}.bytes"] += info.size
        amounts.update(f"reason.{reason}" for reason in result.reasons)
    for (bucket, day), amounts in right.items():
        counters = Counter(ledger.counters(bucket, day))
        report.need(counters == amounts, f"counters say {dict(counters)}, results {dict(amounts)}")


def _check_verdicts(report, truth, ledger, live):
    taken = {each.info.key for each in truth.written if each.is_over}
    seen = set()
    for body in map(_json, _export(ledger.state, "verdicts")):
        key = body["key"]
        report.need(key not in seen, f"{key!r} has two current verdicts")
        seen.add(key)
        if key in live:
            continue
        # Nobody told us when others took it away.
        report.need(key in taken, f"{key!r} has a current verdict and is gone")
        report.counts["verdicts on what others took away"] += 1


def _listing(store):
    found = {}
    cursor = ""
    while True:
        page = store.list(cursor=cursor)
        found.update({info.key: info for info in page.items})
        cursor = page.cursor
        if not cursor:
            return found


def _body(store, info):
    with tempfile.TemporaryFile() as file:
        store.read(ObjectRef(info.bucket, info.key), lambda _: file.fileno())
        return os.pread(file.fileno(), info.size + 1, 0)


def _export(state, table):
    cursor = ""
    while True:
        page = state.export(table, cursor)
        yield from page.items
        cursor = page.cursor
        if not cursor:
            return


def _json(record):
    return json.loads(record.body)
