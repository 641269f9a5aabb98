"""What Prometheus and a platform's probes see of a running Bucketward, over real sockets."""

import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bucketward.engines.memory import MemoryEngine
from bucketward.errors import ConfigError, Unavailable
from bucketward.metrics import Meters, Monitor, Sources
from bucketward.model import ObjectRef
from bucketward.scan import give_up
from conftest import eicar
from house_kit import Kit, away, put, wait_for
from running import Home, free_port
from servers import need


def fetch(url):
    """Return the status and the body of a page."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def samples(url):
    """Return every sample of the metrics, by name and labels."""
    status, text = fetch(url + "/metrics")
    assert status == 200
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Served:
    """A monitor on a free port for the length of a block."""

    def __init__(self, meters=None, parts=(), checks=None, *, started=True):
        self.meters = meters or Meters(Sources())
        self.monitor = Monitor(self.meters, parts, checks or {}, port=0)
        if started:
            self.monitor.all_started()

    def __enter__(self):
        self.monitor.start()
        return self.monitor.url

    def __exit__(self, *error):
        self.monitor.stop()


def test_up_counts_what_it_scans_and_says_when_it_is_ready(tmp_path):
    need("clamd")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    home = Home(
        tmp_path,
        "[watch]\nsettle_seconds = 0.2\n",
        {"BUCKETWARD_METRICS__PORT": str(port), "BUCKETWARD_METRICS__ENABLED": "true"},
    )
    with home.running("up") as process:
        process.wait_for("metrics at")
        assert fetch(url + "/health")[0] == 200
        early = fetch(url + "/ready")
        assert early[0] == 200 or json.loads(early[1])["missing"]
        wait_for(lambda: fetch(url + "/ready")[0] == 200, 60)
        bucket = f"file://{home.data}/drop"
        (home.data / "drop" / "evil.txt").write_bytes(eicar())
        for name in ("a", "b"):
            (home.data / "drop" / name).write_bytes(b"the same")
        wait_for(lambda: process.log.count('"scan_id"') == 3, 30)
        seen = samples(url)
        assert seen["bucketward_objects_total", "Infected", bucket] == 1
        assert seen["bucketward_objects_total", "Clean", bucket] == 2
        assert seen["bucketward_object_bytes_total", "Clean", bucket] == 16
        assert seen["bucketward_object_bytes_total", "Infected", bucket] == 68
        assert seen["bucketward_receipt_to_verdict_seconds_count",] == 3
        assert seen["bucketward_engine_up", "clamav"] == 1
        assert seen["bucketward_signatures_demo", "clamav"] == 1
        assert seen["bucketward_spool_used_bytes",] == 0
        assert seen["bucketward_outbox_due",] == 0
        assert {"bucketward_queue_messages", "process_resident_memory_bytes"} <= {
            n for n, *_ in seen
        }
        assert not any(b"evil" in str(name).encode() for name in seen)


def test_a_port_that_is_taken_stops_the_start_and_names_the_option(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        home = Home(tmp_path, f"[metrics]\nenabled = true\nport = {port}\n")
        done = home.run("keeper")
        assert done.returncode == 64
        assert "metrics.port" in done.stderr
        monitor = Monitor(Meters(Sources()), (), {}, port=port)
        with pytest.raises(ConfigError, match=r"metrics\.port"):
            monitor.start()


def test_the_keeper_has_metrics_and_the_switch_turns_them_off(tmp_path):
    port = free_port()
    home = Home(
        tmp_path, "", {"BUCKETWARD_METRICS__PORT": str(port), "BUCKETWARD_METRICS__ENABLED": "true"}
    )
    with home.running("keeper") as process:
        process.wait_for("metrics at")
        wait_for(lambda: fetch(f"http://127.0.0.1:{port}/ready")[0] == 200)
        names = {name for name, *_ in samples(f"http://127.0.0.1:{port}")}
        assert "bucketward_outbox_due" in names
        assert "bucketward_engine_up" not in names
    home = Home(tmp_path, "[metrics]\nenabled = false\n", {"BUCKETWARD_METRICS__PORT": str(port)})
    with home.running("keeper") as process:
        wait_for(lambda: process.log.count("starting keeper") == 2)
        time.sleep(0.5)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), 1)


def test_ready_follows_what_is_needed():
    engine = MemoryEngine("e", patterns={"S": b"s"})
    engine.failure = Unavailable("loading", backend="e")
    checks = {"engines": engine.ping, "queue": lambda: None}
    with Served(checks=checks) as url:
        status, body = fetch(url + "/ready")
        assert (status, json.loads(body)) == (503, {"ready": False, "missing": ["engines"]})
        assert fetch(url + "/health")[0] == 200
        engine.failure = None
        wait_for(lambda: fetch(url + "/ready")[0] == 200)


def test_nothing_is_ready_before_every_part_has_started():
    with Served(started=False) as url:
        assert fetch(url + "/ready")[0] == 503


def test_an_agent_is_ready_when_it_takes_messages_and_dead_when_a_thread_is():
    kit = Kit()
    kit.engine.inner.failure = away()
    with kit.agent() as agent, Served(parts=[agent]) as url:
        assert fetch(url + "/ready")[0] == 503
        assert fetch(url + "/health")[0] == 200
        kit.engine.inner.failure = None
        wait_for(lambda: fetch(url + "/ready")[0] == 200)
        agent._inbox.put(None)  # ends one worker, as a bug would
        wait_for(lambda: fetch(url + "/health")[0] == 503)


def test_a_queue_that_hangs_hides_only_itself_and_holds_up_no_probe():
    release = threading.Event()
    kit = Kit()
    kit.queue.fail["depth"] = lambda: release.wait(30)
    kit.queue.fail["ping"] = lambda: release.wait(30)
    meters = Meters(Sources(kit.queue, kit.ledger, kit.engines, kit.spool))
    try:
        with Served(meters, checks={"queue": kit.queue.ping}) as url:
            started = time.monotonic()
            names = {name for name, *_ in samples(url)}
            assert time.monotonic() - started < 5
            assert "bucketward_queue_messages" not in names
            assert "bucketward_engine_up" in names
            assert fetch(url + "/ready")[0] == 503
            started = time.monotonic()
            assert fetch(url + "/health")[0] == 200
            assert time.monotonic() - started < 1
            samples(url)
            assert kit.queue.calls.count("depth") == 1
    finally:
        release.set()


def test_latency_retries_and_the_cache_are_counted():
    kit = Kit(max_deliveries=2)
    meters = Meters(Sources())
    put(kit.store, "k", b"good")
    more = {"on_latency": meters.latency, "on_retry": meters.retry}
    with kit.agent(**more), Served(meters) as url:
        kit.announce("k", event_at=datetime.now(UTC) - timedelta(seconds=20))
        wait_for(lambda: kit.seen)
        wait_for(lambda: samples(url)["bucketward_event_to_verdict_seconds_count",] == 1)
        seen = samples(url)
        assert 20 <= seen["bucketward_event_to_verdict_seconds_sum",] < 30
        assert seen["bucketward_receipt_to_verdict_seconds_sum",] < 10
        assert seen["bucketward_event_to_verdict_seconds_bucket", "30.0"] == 1
        assert seen["bucketward_event_to_verdict_seconds_bucket", "10.0"] == 0
        kit.store.fail["read"] = [away()]
        kit.announce("k")
        wait_for(lambda: samples(url)["bucketward_retries_total",] == 1)


def test_a_sweep_says_what_it_found_and_dead_letters_are_counted():
    kit = Kit(max_deliveries=1, lease=0.1)
    meters = Meters(Sources())
    keeper = kit.keeper(sweep_older=0.1, on_dead=meters.dead, on_sweep=meters.swept)
    with Served(meters) as url:
        assert ("bucketward_unscanned_objects",) not in samples(url)
        put(kit.store, "forgotten", b"x")
        time.sleep(0.3)
        keeper.sweep_all()
        wait_for(lambda: samples(url).get(("bucketward_unscanned_objects",)) == 1)
        assert 0.2 < samples(url)["bucketward_unscanned_oldest_age_seconds",] < 30
        kit.queue.receive(10, 0)
        time.sleep(0.2)
        keeper.consume_dead_letters()
        assert samples(url)["bucketward_dead_letters_total",] == 1


def test_hostile_names_make_no_labels_without_bound():
    meters = Meters(Sources())
    now = datetime.now(UTC)
    for i in range(1100):
        ref = ObjectRef(f'memory://b{i}"\n', "key")
        meters.result(give_up(ref, "c", "m", now, reason=f"reason {i}"))
    with Served(meters) as url:
        seen = samples(url)
    assert len([name for name, *_ in seen if name == "bucketward_objects_total"]) == 1001
    assert seen["bucketward_objects_total", "Error", "other"] == 100
    assert seen["bucketward_object_reasons_total", "Error", "other"] == 1100


def test_other_methods_and_pages_are_refused():
    with Served() as url:
        host = url.removeprefix("http://")
        for method, path, status in [
            ("POST", "/metrics", 405),
            ("GET", "/", 404),
            ("GET", "/metrics/../../etc/passwd", 404),
            ("HEAD", "/health", 200),
        ]:
            connection = http.client.HTTPConnection(host, timeout=5)
            connection.request(method, path)
            assert connection.getresponse().status == status, (method, path)
            connection.close()
