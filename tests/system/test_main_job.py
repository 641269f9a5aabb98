"""The main job on real input: 44 containers around one program, and a few hundred ordinary files."""

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from bucketward.model import Verdict
from running import TESTFILES, Home, free_port, ordinary_files, sample_signature, webhook
from servers import need

ORDINARY = 300
SECRET = "a-shared-secret-of-enough-length"
WEBHOOK_SECRET = "whsec_" + "QnVja2V0d2FyZCB0ZXN0IHNlY3JldCwgMzIgYnl0ZXM="


@pytest.fixture(scope="module")
def samples():
    need("clamd")
    need("testfiles")
    found = {f"samples/{p.name}": p.read_bytes() for p in sorted(TESTFILES.iterdir())}
    assert len(found) == 44
    return found


@pytest.fixture(scope="module")
def ordinary():
    found = ordinary_files(ORDINARY)
    assert len(found) >= 200
    return found


def config(*, state="", queue="", quarantine="", hook="", more=""):
    return f"""
quarantine = "{quarantine}"
protect = []
{queue and f'[queue]{chr(10)}url = "{queue}"'}
[signatures]
directory = "signatures"
[notifiers.hook]
url = "{hook}"
secret = "{WEBHOOK_SECRET}"
allow_private = true
{more}
"""


def upload_all(s3, bucket, samples, ordinary):
    """Put everything, some of it with tags of the owner's; return those tags by key."""
    foreign = {}
    for number, key in enumerate([*samples, *ordinary]):
        foreign[key] = {"team": f"t{number}", "cost centre": "a+b=c"} if number % 3 == 0 else {}

    def put(key):
        tagging = "&".join(
            f"{k.replace(' ', '%20')}={v.replace('+', '%2B').replace('=', '%3D')}"
            for k, v in foreign[key].items()
        )
        body = samples.get(key) or ordinary[key]
        s3.put_object(
            Bucket=bucket, Key=key, Body=body, **({"Tagging": tagging} if tagging else {})
        )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, foreign))
    return foreign


def wait_for_counts(home, bucket, wanted, seconds):
    """Wait until the counters of today say so many objects."""
    end = time.monotonic() + seconds
    while True:
        with home.ledger() as ledger:
            counts = ledger.counters(bucket, f"{datetime.now(UTC):%Y-%m-%d}")
        done = sum(counts.get(str(verdict), 0) for verdict in Verdict)
        if done >= wanted:
            return counts
        assert time.monotonic() < end, f"{counts} of {wanted}"
        time.sleep(0.5)


def all_results(home):
    """Return every result by key; fails if one object has two."""
    found = {}
    with home.ledger() as ledger:
        from bucketward.ledger import load_result

        cursor = ""
        while True:
            page = ledger.state.export("results", cursor)
            for record in page.items:
                result = load_result(record.body)
                found.setdefault(result.object.key, []).append(result)
            cursor = page.cursor
            if not cursor:
                return found


def check_bucket(s3, bucket, quarantine, samples, ordinary, foreign, results, notes):
    """Bucket, quarantine, ledger and notifications must agree, object by object."""
    listed = {
        o["Key"]
        for page in s3.get_paginator("list_object_versions").paginate(Bucket=bucket)
        for o in page.get("Versions", [])
    }
    assert listed == set(ordinary)
    moved = {
        o["Key"]
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=quarantine)
        for o in page.get("Contents", [])
    }
    assert len(moved) == len(samples)

    def tags(name, key):
        found = s3.get_object_tagging(Bucket=name, Key=key)["TagSet"]
        return {t["Key"]: t["Value"] for t in found}

    def check(key):
        result = results[key][-1]
        assert key in notes, key
        assert notes[key]["scanResult"] == result.verdict
        if key in samples:
            assert result.verdict is Verdict.INFECTED, (key, result)
            assert (result.action, result.action_state) == ("move", "done")
            assert result.moved_to[1] in moved
            there = tags(quarantine, result.moved_to[1])
            body = s3.get_object(Bucket=quarantine, Key=result.moved_to[1])["Body"].read()
            assert body == samples[key]
            assert there["virus-name"].startswith("Test.Sample")
        else:
            assert result.verdict is Verdict.CLEAN, (key, result)
            there = tags(bucket, key)
        assert there["scan-result"] == result.verdict
        assert {k: there.get(k) for k in foreign[key]} == foreign[key], key

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, foreign))


def make_queue(moto, name):
    sqs = moto.client("sqs")
    dead = sqs.create_queue(QueueName=f"{name}-dead")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]
    redrive = {"deadLetterTargetArn": arn["QueueArn"], "maxReceiveCount": "5"}
    url = sqs.create_queue(
        QueueName=name,
        Attributes={"RedrivePolicy": json.dumps(redrive), "VisibilityTimeout": "60"},
    )["QueueUrl"]
    return sqs, url, dead


def wait_until_announced(s3, bucket, sqs, url):
    """Wait until events flow: Ceph takes a moment to heed a new notification."""
    end = time.monotonic() + 60
    while is_empty(sqs, url):
        assert time.monotonic() < end, "no event ever came"
        s3.put_object(Bucket=bucket, Key="probe", Body=b"probe")
        time.sleep(0.2)
    for version in s3.list_object_versions(Bucket=bucket)["Versions"]:
        s3.delete_object(Bucket=bucket, Key=version["Key"], VersionId=version["VersionId"])
    sqs.purge_queue(QueueUrl=url)


def is_empty(sqs, url):
    found = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
    return (
        found["ApproximateNumberOfMessages"]
        == found["ApproximateNumberOfMessagesNotVisible"]
        == "0"
    )


def test_ceph_pushes_to_the_receiver_and_everything_ends_as_it_must(
    tmp_path, ceph, ceph_proxy, moto, samples, ordinary
):
    name = uuid4().hex[:8]
    inbox, quarantine = f"inbox-{name}", f"quarantine-{name}"
    s3 = ceph.client()
    for bucket in (inbox, quarantine):
        s3.create_bucket(Bucket=bucket)
        s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    sqs, url, dead = make_queue(moto, f"ceph-{name}")
    port = free_port()
    sample_signature(tmp_path / "signatures")
    with webhook() as (hook, received):
        home = Home(
            tmp_path,
            config(
                queue=f"sqs://us-east-1/ceph-{name}?endpoint={moto.url}",
                quarantine=f"s3://{quarantine}",
                hook=hook,
                more=f'[receiver]\nenabled = true\nport = {port}\nsecret = "{SECRET}"\n',
            ),
            {"AWS_ACCESS_KEY_ID": ceph.access_key, "AWS_SECRET_ACCESS_KEY": ceph.secret_key},
        )
        made = home.run("bucket", "protect", f"s3://{inbox}?endpoint={ceph_proxy.url}")
        assert made.returncode == 0, made.stderr
        sns = ceph.client("sns")
        topic = sns.create_topic(
            Name=f"t-{name}",
            Attributes={"push-endpoint": f"http://127.0.0.1:{port}/events/{SECRET}"},
        )["TopicArn"]
        s3.put_bucket_notification_configuration(
            Bucket=inbox,
            NotificationConfiguration={
                "TopicConfigurations": [
                    {"Id": "bucketward", "TopicArn": topic, "Events": ["s3:ObjectCreated:*"]}
                ]
            },
        )
        with home.running("receiver") as receiver:
            receiver.wait_for("starting")
            wait_until_announced(s3, inbox, sqs, url)
            foreign = upload_all(s3, inbox, samples, ordinary)
            with home.running("event"), home.running("keeper"):
                wait_for_counts(home, f"s3://{inbox}", len(foreign), 120)
                end = time.monotonic() + 60
                while len({n["data"]["key"] for n in received}) < len(foreign) or not is_empty(
                    sqs, url
                ):
                    assert time.monotonic() < end, f"{len(received)} notes"
                    time.sleep(0.5)

        results = all_results(home)
        assert set(results) == set(foreign)
        notes = {n["data"]["key"]: n["data"] for n in received}
        check_bucket(s3, inbox, quarantine, samples, ordinary, foreign, results, notes)
        assert is_empty(sqs, dead)
        assert all(r.object.version_id for found in results.values() for r in found)


def test_s3_to_sns_to_sqs_and_everything_ends_as_it_must(tmp_path, moto, samples, ordinary):
    name = uuid4().hex[:8]
    inbox, quarantine = f"inbox-{name}", f"quarantine-{name}"
    s3 = moto.client("s3")
    for bucket in (inbox, quarantine):
        s3.create_bucket(Bucket=bucket)
        s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    sqs, url, dead = make_queue(moto, f"aws-{name}")
    sample_signature(tmp_path / "signatures")
    few = dict(list(ordinary.items())[:100])
    with webhook() as (hook, received):
        home = Home(
            tmp_path,
            config(
                queue=f"sqs://us-east-1/123456789012/aws-{name}?endpoint={moto.url}",
                quarantine=f"s3://{quarantine}",
                hook=hook,
            ),
            {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": "x"},
        )
        made = home.run("bucket", "protect", f"s3://{inbox}?endpoint={moto.url}")
        assert made.returncode == 0, made.stderr
        assert "route sns" in made.stdout
        foreign = upload_all(s3, inbox, samples, few)
        with home.running("event"), home.running("keeper"):
            wait_for_counts(home, f"s3://{inbox}", len(foreign), 120)
            end = time.monotonic() + 90
            while len({n["data"]["key"] for n in received}) < len(foreign) or not is_empty(
                sqs, url
            ):
                assert time.monotonic() < end, f"{len(received)} notes"
                time.sleep(0.5)

        results = all_results(home)
        notes = {n["data"]["key"]: n["data"] for n in received}
        check_bucket(s3, inbox, quarantine, samples, few, foreign, results, notes)
        assert is_empty(sqs, dead)


def test_a_directory_bucket_and_everything_ends_as_it_must(tmp_path, samples, ordinary):
    sample_signature(tmp_path / "signatures")
    with webhook() as (hook, received):
        home = Home(
            tmp_path,
            config(quarantine="file://$DATA/quarantine", hook=hook).replace(
                "protect = []", 'protect = ["file://$DATA/drop"]'
            ),
        )
        wanted = {**samples, **ordinary}
        with home.running("up") as up:
            up.wait_for("ready")
            drop = home.data / "drop"
            for key, body in wanted.items():
                path = drop / key
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(body)
            wait_for_counts(home, f"file://{drop}", len(wanted), 60)
            end = time.monotonic() + 30
            while len({n["data"]["key"] for n in received}) < len(wanted):
                assert time.monotonic() < end, f"{len(received)} notes"
                time.sleep(0.2)

        results = all_results(home)
        assert set(results) == set(wanted)
        left = {
            str(p.relative_to(drop))
            for p in drop.rglob("*")
            if p.is_file() and not p.relative_to(drop).parts[0].startswith(".bucketward")
        }
        assert left == set(ordinary)
        for key in samples:
            (result,) = results[key]
            assert result.verdict is Verdict.INFECTED
            assert (home.data / "quarantine" / result.moved_to[1]).read_bytes() == samples[key]
        for key in ordinary:
            assert results[key][-1].verdict is Verdict.CLEAN, (key, results[key][-1])
            tags = json.loads(os.getxattr(drop / key, "user.bucketward.tags"))
            assert tags["scan-result"] == "Clean"


def test_scan_on_demand_says_the_same(tmp_path, samples, ordinary):
    sample_signature(tmp_path / "signatures")
    target = tmp_path / "target"
    for key, body in {**samples, **ordinary}.items():
        path = target / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    home = Home(tmp_path)
    done = home.run("scan", "--signatures", "signatures", "target")

    assert done.returncode == 1, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["key"] for line in lines} == {*samples, *ordinary}
    for line in lines:
        assert line["bucket"] == f"file://{target}"
        assert line["verdict"] == ("Infected" if line["key"] in samples else "Clean"), line
    assert subprocess.run(["ls", str(target)], capture_output=True).returncode == 0
    assert sum(1 for p in target.rglob("*") if p.is_file()) == len(lines)
