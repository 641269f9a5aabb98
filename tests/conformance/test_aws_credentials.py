from concurrent.futures import ThreadPoolExecutor

import pytest

from bucketward.clouds.aws_credentials import assume_role
from bucketward.errors import ConfigError, Denied, Unavailable

ROLE = "arn:aws:iam::222222222222:role/bucketward"


@pytest.fixture
def ambient(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")


def test_a_role_of_another_account_is_assumed_once_and_kept(moto, ambient):
    provide = assume_role(ROLE, external_id="ours", region="us-east-1", endpoint=moto.url)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: provide(), range(16)))

    assert len({one.access_key for one in found}) == 1
    assert found[0].session_token
    assert found[0].expires_at is not None
    who = moto.client("sts")
    assert who.get_caller_identity()["Account"] == "123456789012"


def test_its_buckets_are_its_own(moto, ambient):
    import boto3

    got = assume_role(ROLE, region="us-east-1", endpoint=moto.url)()
    theirs = boto3.client(
        "sts",
        endpoint_url=moto.url,
        region_name="us-east-1",
        aws_access_key_id=got.access_key,
        aws_secret_access_key=got.secret_key,
        aws_session_token=got.session_token,
    )

    assert theirs.get_caller_identity()["Account"] == "222222222222"


def test_secrets_do_not_show(moto, ambient):
    got = assume_role(ROLE, region="us-east-1", endpoint=moto.url)()

    assert got.secret_key not in repr(got)
    assert got.session_token not in repr(got)


def test_no_credentials_and_no_server_are_told_apart(moto, monkeypatch):
    with pytest.raises((Denied, Unavailable)) as caught:
        assume_role(ROLE, region="us-east-1", endpoint=moto.url)()
    assert ROLE in str(caught.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    with pytest.raises(Unavailable):
        assume_role(ROLE, region="us-east-1", endpoint="http://127.0.0.1:1")()


def test_a_role_that_is_no_role_is_denied_and_named(moto, ambient):
    with pytest.raises(Denied) as caught:
        assume_role("not-a-role", region="us-east-1", endpoint=moto.url)()

    assert caught.value.reason == "sts:AssumeRole"
    assert "not-a-role" in str(caught.value)


def test_a_profile_that_is_not_there_stops_the_start():
    with pytest.raises(ConfigError) as caught:
        assume_role(ROLE, profile="no-such-profile")

    assert "no-such-profile" in str(caught.value)
