import uuid

import pytest

from bucketward.clouds.memory import MemoryCloud, open_memory
from bucketward.errors import ConfigError, Denied
from bucketward.model import BucketInfo, QuarantineSpec
from bucketward.testing.cloud import CloudSuite


class TestMemoryCloud(CloudSuite):
    @pytest.fixture
    def cloud(self):
        return MemoryCloud()

    @pytest.fixture
    def bucket(self, cloud):
        return cloud.add_bucket("uploads")

    @pytest.fixture
    def queue(self):
        return "memory://queue"

    def configuration(self, cloud, bucket):
        return super().configuration(cloud, bucket), cloud.notifications(bucket)

    def configure_as_owner(self, cloud, bucket):
        cloud.add_notification(bucket, "the owner's")
        return lambda: cloud.notifications(bucket)[:1]

    def foreign_name(self, cloud):
        name = f"foreign-{uuid.uuid4().hex[:8]}"
        cloud.add_foreign_bucket(name)
        return name

    def policy(self, bucket):
        return '{"Version": "2012-10-17", "Statement": []}'


def test_it_is_described_as_it_was_made():
    cloud = open_memory("memory://123456789012/eu-north-1")
    bucket = cloud.add_bucket("uploads", BucketInfo("", is_public=True, tags={"team": "a"}))

    info = cloud.describe(bucket)

    assert info == BucketInfo(
        bucket, "123456789012", "eu-north-1", is_public=True, tags={"team": "a"}
    )


def test_a_bucket_enrolled_with_another_queue_moves_to_it():
    cloud = MemoryCloud()
    bucket = cloud.add_bucket("uploads")

    cloud.enrol(bucket, "one")
    cloud.enrol(bucket, "two")

    assert cloud.notifications(bucket) == ["two"]


def test_the_owners_own_bucket_is_no_quarantine():
    cloud = MemoryCloud()
    cloud.add_bucket("uploads")

    with pytest.raises(Denied):
        cloud.make_quarantine(QuarantineSpec("uploads"))


def test_a_permission_that_was_taken_away_is_missed():
    cloud = MemoryCloud()
    bucket = cloud.add_bucket("uploads")
    cloud.deny(bucket, "read", "read objects")

    assert cloud.missing_permissions(bucket) == {"read": "read objects"}


def test_a_url_of_something_else_is_refused():
    with pytest.raises(ConfigError):
        open_memory("s3://x")
