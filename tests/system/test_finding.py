"""A finding, from the drop folder to quarantine and back, as its operator does it."""

import json
import os
import time

from conftest import eicar
from running import Home
from servers import need


def wait(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def test_a_false_positive_is_restored_and_a_finding_deleted(tmp_path):
    need("clamd")
    home = Home(tmp_path)
    drop = home.data / "drop"
    with home.running("up") as up:
        up.wait_for("ready")
        (drop / "ours.com").write_bytes(eicar())
        (drop / "theirs.com").write_bytes(eicar() + b"\n")
        wait(lambda: up.log.count('"verdict": "Infected"') == 2)
        found = [json.loads(line) for line in home.run("finding", "list").stdout.splitlines()]
        ours, theirs = sorted(found, key=lambda one: one["object"]["key"])
        back = home.run("finding", "restore", ours["id"], "--reason", "our own test file")
        gone = home.run("finding", "delete", theirs["id"])
        wait(lambda: '"verdict": "InfectedAllowed"' in up.log)
        again = home.run("finding", "rescan", ours["id"])
        wait(lambda: up.log.count('"verdict": "InfectedAllowed"') == 2)
        by_hand = home.run("scan", str(drop))
        allowed = [json.loads(line) for line in home.run("finding", "allowed").stdout.splitlines()]
        ended = home.run("finding", "disallow", allowed[0]["id"])
        home.run("finding", "rescan", ours["id"])
        wait(lambda: up.log.count('"verdict": "Infected"') == 3)

    for done in (back, gone, again, ended):
        assert done.returncode == 0, done.stderr
    assert by_hand.returncode == 0
    assert json.loads(by_hand.stdout)["verdict"] == "InfectedAllowed"
    assert allowed[0]["reason"] == "our own test file"
    assert [p.name for p in drop.iterdir() if p.is_file()] == []
    kept = [p for p in (home.data / "quarantine").rglob("*.com*") if p.is_file()]
    assert len(kept) == 1
    assert "ours.com" in kept[0].name


def test_what_is_not_there_is_said_so(tmp_path):
    home = Home(tmp_path)
    for command in (
        ["restore", "no-such-id", "--reason", "x"],
        ["delete", "x"],
        ["rescan", "x"],
        ["disallow", "x"],
    ):
        done = home.run("finding", *command)
        assert done.returncode == 2
        assert "there is no" in done.stderr
        assert "Traceback" not in done.stderr
    assert home.run("finding", "list").stdout == ""
    assert os.listdir(home.data)
