"""What was judged is not judged again, and nothing is ever taken for what it is not."""

import hashlib
import json
import os
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketward.agents.event import EventAgent
from bucketward.cache import Cache, Cached
from bucketward.config import load
from bucketward.engines.memory import MemoryEngine
from bucketward.errors import Unavailable
from bucketward.ledger import TABLES, Ledger
from bucketward.model import (
    EngineReport,
    Finding,
    ObjectRef,
    Put,
    Reason,
    Record,
    ScanResult,
    Spooled,
    Verdict,
)
from bucketward.policy import EngineRule, Policy
from bucketward.scan import Scanner
from bucketward.spool import MIB, Spool
from bucketward.states.memory import MemoryState
from bucketward.stores.memory import MemoryStore
from bucketward.wiring import House
from house_kit import MARK, Failing, Kit, away, put, wait_for

ZIP = b"PK\x03\x04" + bytes(60)
ONE = Policy(engines=(EngineRule("clamav"),))
TWO = Policy(engines=(EngineRule("clamav"), EngineRule("yara", required=False)))


class Bench:
    """A bucket, two engines, and scanners that share one ledger."""

    def __init__(self):
        self.store = MemoryStore("memory://in", versioned=True)
        self.state = Failing(MemoryState(TABLES))
        self.ledger = Ledger(self.state)
        self.clamav = MemoryEngine("clamav", patterns={"Test.Mark": MARK}, opens_containers=True)
        self.yara = MemoryEngine("yara", patterns={"Odd": b"odd"}, suspicious=frozenset({"Odd"}))
        self.engines = {"clamav": self.clamav, "yara": self.yara}
        self.spool = Spool(memory=64 * MIB, disk=64 * MIB)
        self.count = 0

    def scanner(self, cache):
        return Scanner(self.engines, self.spool, cache=cache)

    def scan(self, scanner, data, policy=ONE, *, key="k", **more):
        put(self.store, key, data)
        self.count += 1
        cause = f"cause {self.count}"
        with scanner.scan(
            self.store, ObjectRef("memory://in", key), policy, cause=cause, **more
        ) as scan:
            return scan.result


@pytest.fixture
def bench():
    return Bench()


def essence(result):
    """Return what the verdict is, without where and when and how long."""
    reports = tuple(replace(report, seconds=0.0) for report in result.reports)
    return (result.verdict, result.reasons, reports, result.sha256, result.engines, result.message)


@pytest.mark.parametrize("data", [b"", b"good", MARK, b"very odd", MARK + b" and odd", ZIP])
def test_the_same_bytes_under_another_name_are_not_scanned_again(bench, data):
    scanner = bench.scanner(Cache(None))
    first = bench.scan(scanner, data, TWO, key="a")
    second = bench.scan(scanner, data, TWO, key="b/c.txt")

    assert (bench.clamav.scanned, bench.yara.scanned) == (1, 1)
    assert first.cached_from == ""
    assert second.cached_from == first.id != second.id
    assert second.object.key == "b/c.txt"
    assert essence(second) == essence(first)


def test_another_agent_finds_it_in_the_ledger(bench):
    mine, theirs = Cache(bench.ledger), Cache(bench.ledger)
    first = bench.scan(bench.scanner(mine), MARK, TWO)
    mine.close()
    second = bench.scan(bench.scanner(theirs), MARK, TWO)

    assert bench.clamav.scanned == 1
    assert second.cached_from == first.id
    assert essence(second) == essence(first)


def test_a_reload_of_the_signatures_makes_everything_unknown(bench):
    scanner = bench.scanner(Cache(bench.ledger))
    bench.scan(scanner, b"a new worm")
    bench.clamav.patterns["Test.Worm"] = b"worm"
    result = bench.scan(scanner, b"a new worm")

    assert result.verdict is Verdict.INFECTED
    assert result.cached_from == ""
    assert bench.clamav.scanned == 2


def test_a_reload_during_the_scan_is_not_kept(bench):
    scanner = bench.scanner(Cache(None))

    def reload(file, body):
        bench.clamav.version = "2"
        return EngineReport(
            "clamav", Verdict.CLEAN, signatures=replace(bench.clamav.signatures(), version="2")
        )

    bench.clamav.judge = reload
    bench.scan(scanner, b"good")
    bench.clamav.judge = None
    bench.clamav.version = "1"
    assert bench.scan(scanner, b"good").cached_from == ""
    bench.clamav.version = "2"
    assert bench.scan(scanner, b"good").cached_from == ""


def test_other_engines_and_other_rules_judge_for_themselves(bench):
    scanner = bench.scanner(Cache(None))
    assert bench.scan(scanner, b"odd", ONE).verdict is Verdict.CLEAN
    assert bench.scan(scanner, b"odd", TWO).verdict is Verdict.SUSPICIOUS
    both = Policy(engines=(EngineRule("clamav"), EngineRule("yara")))
    assert bench.scan(scanner, b"odd", both).cached_from == ""
    assert bench.scan(scanner, b"odd", both).cached_from != ""


def test_each_bucket_classifies_what_is_known_by_its_own_policy(bench):
    scanner = bench.scanner(Cache(None))
    mild = replace(ONE, classify={"Test.*": "Suspicious"})
    assert bench.scan(scanner, MARK, mild).verdict is Verdict.SUSPICIOUS
    assert bench.scan(scanner, MARK, ONE).verdict is Verdict.INFECTED
    assert bench.scan(scanner, MARK, mild).verdict is Verdict.SUSPICIOUS
    assert bench.clamav.scanned == 1


def test_a_stop_at_the_first_hit_is_not_kept_and_is_obeyed(bench):
    scanner = bench.scanner(Cache(None))
    hasty = replace(TWO, stop_at_first_hit=True)
    bench.scan(scanner, MARK + b"odd", hasty)
    whole = bench.scan(scanner, MARK + b"odd", TWO)
    assert (whole.cached_from, len(whole.findings)) == ("", 2)
    again = bench.scan(scanner, MARK + b"odd", hasty)
    assert again.cached_from == whole.id
    assert [finding.engine for finding in again.findings] == ["clamav"]


def test_what_was_not_judged_as_a_whole_is_judged_again(bench):
    scanner = bench.scanner(Cache(None))
    for verdict, coverage, findings in [
        (Verdict.ERROR, (Reason.ENGINE_FAILED,), ()),
        (Verdict.UNSCANNABLE, (Reason.ENCRYPTED,), ()),
        (Verdict.UNSCANNABLE, (Reason.TIMED_OUT,), ()),
        (Verdict.CLEAN, (Reason.TIMED_OUT,), ()),
        (Verdict.INFECTED, (Reason.TIMED_OUT,), (Finding("clamav", "X"),)),
    ]:
        bench.clamav.judge = lambda file, body, said=(verdict, coverage, findings): EngineReport(
            "clamav", *said, signatures=bench.clamav.signatures()
        )
        data = f"{verdict} {coverage}".encode()
        for _ in range(2):
            result = bench.scan(scanner, data)
            assert result.cached_from == ""


def test_an_engine_that_was_away_is_asked_when_it_is_back(bench):
    scanner = bench.scanner(Cache(None))
    bench.yara.failure = Unavailable("away", backend="yara")
    assert bench.scan(scanner, b"odd", TWO).verdict is Verdict.CLEAN
    bench.yara.failure = None
    assert bench.scan(scanner, b"odd", TWO).verdict is Verdict.SUSPICIOUS


def test_what_only_looked_from_outside_is_not_kept(bench):
    scanner = bench.scanner(Cache(None))
    outside = Policy(engines=(EngineRule("yara"),))
    assert bench.scan(scanner, ZIP, outside).verdict is Verdict.UNSCANNABLE
    assert bench.scan(scanner, ZIP, outside).cached_from == ""


def test_runs_alone_and_windows_pass_the_cache_by(bench):
    cache = Cache(None)
    scanner = bench.scanner(cache)
    bench.scan(scanner, b"good", alone=True)
    assert bench.scan(scanner, b"good").cached_from == ""
    assert bench.scan(scanner, b"good", alone=True).cached_from == ""
    with bench.spool.reserve(4) as slot:
        os.write(slot.writable(), b"good")
        whole = slot.seal("x")
        part = Spooled(whole.fd, 4, whole.path, "x", window=(0, 8))
        assert scanner.judge(part, "x", ONE).cached_from == ""
        assert scanner.judge(whole, "x", ONE).cached_from != ""


def test_without_a_cache_everything_is_scanned(bench):
    scanner = bench.scanner(None)
    for _ in range(3):
        assert bench.scan(scanner, b"good").cached_from == ""
    assert bench.clamav.scanned == 3


def test_a_record_about_something_else_is_not_believed(bench):
    mine = Cache(bench.ledger)
    first = bench.scan(bench.scanner(mine), b"good")
    mine.close()
    key = f"{first.sha256}|4|{first.engines}"
    good = bench.ledger.cached(key)
    evil = hashlib.sha256(MARK).hexdigest()
    target = f"{evil}|{len(MARK)}|{first.engines}"
    forged = json.loads(good)
    for body in [
        good,
        good[:-5],
        "{}",
        "[]",
        "[" * 5000,
        json.dumps({**forged, "sha256": evil}),
        json.dumps({**forged, "sha256": evil, "size": len(MARK), "reports": []}),
        json.dumps({**forged, "sha256": evil, "size": len(MARK), "reports": [{}]}),
        json.dumps(
            {
                **forged,
                "sha256": evil,
                "size": len(MARK),
                "reports": [{**forged["reports"][0], "signatures": None}],
            }
        ),
    ]:
        bench.state.commit([Put("cache", Record(target, body))])
        result = bench.scan(bench.scanner(Cache(bench.ledger)), MARK)
        assert (result.verdict, result.cached_from) == (Verdict.INFECTED, "")


def test_an_entry_ends_with_its_days(bench):
    clock = [datetime.now(UTC)]
    cache = Cache(bench.ledger, days=30, now=lambda: clock[0])
    scanner = bench.scanner(cache)
    bench.scan(scanner, b"good")
    clock[0] += timedelta(days=29)
    assert bench.scan(scanner, b"good").cached_from
    clock[0] += timedelta(days=2)
    assert bench.scan(scanner, b"good").cached_from == ""


def test_memory_holds_no_more_than_it_may(bench):
    cache = Cache(None, entries=3)
    scanner = bench.scanner(cache)
    for data in (b"1", b"2", b"3", b"1", b"4"):
        bench.scan(scanner, data)
    assert bench.scan(scanner, b"1").cached_from
    assert bench.scan(scanner, b"2").cached_from == ""


def test_a_report_that_would_be_cut_is_not_kept():
    cache = Cache(None)
    report = EngineReport(
        "clamav", Verdict.INFECTED, (), tuple(Finding("clamav", f"S{i}") for i in range(101))
    )
    cache.keep("a" * 64, 1, "e", Cached("s", (report,)))
    assert cache.find("a" * 64, 1, "e") is None


def test_a_miss_costs_one_read_and_a_hit_in_memory_none(bench):
    cache = Cache(bench.ledger)
    scanner = bench.scanner(cache)
    for i in range(20):
        bench.scan(scanner, b"%d" % i)
    for i in range(20):
        assert bench.scan(scanner, b"%d" % i).cached_from
    cache.close()
    assert bench.state.calls.count("get") == 20
    assert bench.state.calls.count("commit") == 1  # by a thread of its own, all together


def test_a_ledger_that_is_away_costs_a_scan_and_nothing_else(bench):
    bench.state.fail["get"] = [away()]
    bench.state.fail["commit"] = [away()]
    cache = Cache(bench.ledger)
    scanner = bench.scanner(cache)
    assert bench.scan(scanner, b"good").verdict is Verdict.CLEAN
    assert bench.scan(scanner, b"better").verdict is Verdict.CLEAN
    assert bench.state.calls.count("get") == 1  # it is left alone for a while
    cache.close()


def test_many_threads_share_it_and_all_get_the_truth(bench):
    cache = Cache(bench.ledger, entries=8)
    scanner = bench.scanner(cache)
    wrong = []
    bodies = [b"%d %b" % (i, MARK if i % 3 == 0 else b"ok") for i in range(16)]

    def work(number):
        for step in range(60):
            i = (step * 7 + number) % 16
            result = bench.scan(scanner, bodies[i], TWO, key=f"{number}/{i}")
            if (result.verdict is Verdict.INFECTED) != (i % 3 == 0):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.close()
    assert wrong == []
    assert bench.clamav.scanned < 6 * 60


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from([b"", b"ok", MARK, b"odd", b"odd" + MARK, ZIP]),
            st.sampled_from(
                [
                    ONE,
                    TWO,
                    replace(TWO, stop_at_first_hit=True),
                    replace(TWO, classify={"Odd": "Infected"}),
                    replace(TWO, engines=tuple(reversed(TWO.engines))),
                ]
            ),
            st.sampled_from(["", "", "", "reload", "yara away", "yara back"]),
        ),
        max_size=20,
    )
)
def test_with_and_without_a_cache_the_verdict_is_the_same(steps):
    bench = Bench()
    cache = Cache(bench.ledger)
    cached, fresh = bench.scanner(cache), bench.scanner(None)
    for data, policy, event in steps:
        if event == "reload":
            bench.clamav.version += "1"
        elif event:
            gone = Unavailable("away", backend="yara") if event == "yara away" else None
            bench.yara.failure = gone
        expected = essence(bench.scan(fresh, data, policy))
        result = bench.scan(cached, data, policy)
        if bench.yara.failure is None or not result.cached_from:
            assert essence(result) == expected
    cache.close()


def test_an_infected_copy_is_moved_and_recorded_with_where_it_is_known_from():
    kit = Kit()
    cache = Cache(kit.ledger)
    for key in ("a", "b"):
        put(kit.store, key, MARK)
    agent = EventAgent(
        kit.queue,
        Scanner(kit.engines, kit.spool, cache=cache),
        kit.ledger,
        kit.settings.current,
        lambda protected: kit.store,
        lambda protected, name: kit.quarantine,
        threads=1,
        poll=0.05,
        on_result=kit.seen.append,
    )
    agent.start()
    for key in ("a", "b"):
        kit.announce(key)
    wait_for(lambda: len(kit.seen) == 2)
    agent.stop()
    cache.close()

    first, second = kit.seen
    assert isinstance(second, ScanResult)
    assert (second.action, second.action_state) == ("move", "done")
    assert kit.ledger.result(second.id).cached_from == first.id
    assert kit.ledger.result(first.id).cached_from == ""
    assert kit.engine.inner.scanned == 1


@pytest.mark.parametrize("enabled", ["true", "false"])
def test_the_switch_turns_it_off(tmp_path, enabled):
    config = load(
        None,
        {
            "BUCKETWARD_DATA": str(tmp_path),
            "BUCKETWARD_STATE__URL": "memory:",
            "BUCKETWARD_CACHE__ENABLED": enabled,
            "BUCKETWARD_ENGINES__CLAMAV__ENABLED": "false",
        },
    )
    with House(config) as house:
        assert (house.agents_scanner is house.scanner) == (enabled == "false")
