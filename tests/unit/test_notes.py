import json
from datetime import UTC, datetime

import pytest

from bucketward.config import load
from bucketward.model import EngineReport, Finding, ObjectInfo, ScanResult, Verdict
from bucketward.notes import scan_result
from bucketward.wiring import House


def moved():
    found = (Finding("clamav", "Win.Test"),)
    return ScanResult(
        "id",
        ObjectInfo("s3://in", "a.exe", 7, '"e"', datetime.now(UTC)),
        Verdict.INFECTED,
        datetime.now(UTC),
        reports=(EngineReport("clamav", Verdict.INFECTED, (), found),),
        action="move",
        moved_to=("s3://jail", "in/a.exe"),
    )


def test_bucket_and_key_say_where_it_was_scanned_and_quarantine_where_it_is():
    body = json.loads(scan_result(moved()).body)

    assert (body["bucket"], body["bucketName"], body["key"]) == ("s3://in", "in", "a.exe")
    assert body["quarantine"] == {"bucket": "s3://jail", "key": "in/a.exe"}
    assert "scanned" not in body


def test_only_the_notifier_that_asks_for_it_is_told_as_the_commercial_product_tells(tmp_path):
    file = tmp_path / "b.toml"
    file.write_text(
        f"""
        data = "{tmp_path}"
        [notifiers.ours]
        url = "log://"
        [notifiers.theirs]
        url = "log://"
        vendor_compatible = true
        only = {{ bucket = ["s3://in"] }}
        """
    )

    with House(load(file, {})) as house:
        told = {due.target: due.note for due in house._notes(moved())}

    assert set(told) == {"ours", "theirs"}
    assert json.loads(told["ours"].body)["bucket"] == "s3://in"
    body = json.loads(told["theirs"].body)
    assert (body["bucket"], body["bucketName"], body["key"]) == ("s3://jail", "jail", "in/a.exe")
    assert body["scanned"] == {"bucket": "s3://in", "key": "a.exe"}
    assert told["theirs"].attributes["bucket"] == "s3://in"
    assert told["ours"].id == told["theirs"].id


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")
def test_every_notifier_of_a_configuration_is_opened(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("json://127.0.0.1:9/\n")
    file = tmp_path / "b.toml"
    file.write_text(
        f"""
        data = "{tmp_path}"
        [notifiers.topic]
        url = "sns://us-east-1/123456789012/topic"
        [notifiers.bus]
        url = "eventbridge://us-east-1/bus"
        [notifiers.hub]
        url = "securityhub://us-east-1/123456789012"
        [notifiers.chat]
        url = "apprise:"
        secret_file = "{secret}"
        """
    )

    with House(load(file, {})) as house:
        assert set(house.notifiers) == {"topic", "bus", "hub", "chat"}
