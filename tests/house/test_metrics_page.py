"""Every metric is on the page, and the page has no others."""

import re
from pathlib import Path

from bucketward.engines.memory import MemoryEngine
from bucketward.ledger import TABLES, Ledger
from bucketward.metrics import Meters, Sources
from bucketward.queues.memory import MemoryQueue
from bucketward.spool import MIB, Spool
from bucketward.states.memory import MemoryState

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_every_metric_is_documented_with_its_kind():
    queue = MemoryQueue()
    queue.send(["x"])
    meters = Meters(
        Sources(
            queue,
            Ledger(MemoryState(TABLES)),
            {"e": MemoryEngine("e", patterns={"S": b"s"})},
            Spool(memory=MIB, disk=MIB),
        )
    )
    meters.swept(0, None)
    known = {
        (family.name + ("_total" if family.type == "counter" else ""), family.type)
        for family in meters.registry.collect()
        if family.name.startswith("bucketward_")
    }
    written = set(re.findall(r"^\| `(bucketward_\w+)` \| (\w+) \|", PAGE.read_text(), re.MULTILINE))

    assert len(known) > 15
    assert written == known
