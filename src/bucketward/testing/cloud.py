"""The conformance suite of `Cloud`: subclass it with three fixtures and a few hooks."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from bucketward.errors import Changed, Denied, Error, NotFound, Unsupported
from bucketward.interfaces import Cloud
from bucketward.model import QuarantineSpec

HOSTILE_NAMES = ("", ".", "..", "../x", "a/b", "/x", "a b", "a\nb", "a\0b", "ü", "x" * 300, "-")


class CloudSuite:
    """What every cloud does.  Each test gets a cloud, one bucket of its owner's and a queue."""

    @pytest.fixture
    def cloud(self) -> Cloud:
        """Return a cloud that may do everything."""
        raise NotImplementedError

    @pytest.fixture
    def bucket(self, cloud: Cloud) -> str:
        """Return the identity of a bucket that is there and not enrolled."""
        raise NotImplementedError

    @pytest.fixture
    def queue(self, cloud: Cloud) -> str:
        """Return what names a queue to `enrol`."""
        raise NotImplementedError

    def missing(self, bucket: str) -> str:
        """Return the identity of a bucket that is nowhere."""
        return f"{bucket}-{uuid.uuid4().hex[:8]}"

    def configuration(self, cloud: Cloud, bucket: str) -> object:
        """Return all that `enrol` and `withdraw` may change of a bucket, to be compared."""
        return cloud.describe(bucket), cloud.bucket_policy(bucket)

    def configure_as_owner(self, cloud: Cloud, bucket: str) -> Callable[[], object]:
        """Have new objects announced elsewhere, as an owner may; return what reads it back."""
        raise NotImplementedError

    def foreign_name(self, cloud: Cloud) -> str:
        """Return the name of a bucket that belongs to somebody else."""
        raise NotImplementedError

    def policy(self, bucket: str) -> str:  # noqa: ARG002 - a hook
        """Return a policy document that the provider takes, "" if it has none."""
        return ""

    def quarantine_name(self) -> str:
        """Return a name for a quarantine that is not there yet."""
        return f"quarantine-{uuid.uuid4().hex[:12]}"

    def test_it_is_a_cloud_of_one_account_in_one_region(self, cloud: Cloud) -> None:
        assert isinstance(cloud, Cloud)
        assert cloud.account
        assert cloud.region in cloud.regions()
        cloud.ping()

    def test_regions_are_named_once(self, cloud: Cloud) -> None:
        regions = list(cloud.regions())

        assert sorted(set(regions)) == sorted(regions)

    def test_buckets_are_identities_named_once_and_described(
        self, cloud: Cloud, bucket: str
    ) -> None:
        buckets = list(cloud.buckets())

        assert buckets.count(bucket) == 1
        assert len(set(buckets)) == len(buckets)
        assert cloud.describe(bucket).bucket == bucket

    def test_a_description_names_account_and_region(self, cloud: Cloud, bucket: str) -> None:
        info = cloud.describe(bucket)

        assert (info.account, info.region) == (cloud.account, cloud.region)

    def test_what_is_not_there_is_not_found(self, cloud: Cloud, bucket: str, queue: str) -> None:
        missing = self.missing(bucket)

        assert missing not in cloud.buckets()
        for call in (
            lambda: cloud.describe(missing),
            lambda: cloud.enrol(missing, queue),
            lambda: cloud.bucket_policy(missing),
            lambda: cloud.replace_bucket_policy(missing, "{}", ""),
            lambda: cloud.missing_permissions(missing),
        ):
            with pytest.raises(NotFound) as caught:
                call()
            assert caught.value.backend

    @pytest.mark.parametrize("name", ["", "x", "nonsense://x", "://", "s3://../x", "file://", "\n"])
    def test_what_is_no_identity_is_not_found(self, cloud: Cloud, name: str) -> None:
        with pytest.raises(NotFound):
            cloud.describe(name)

    def test_enrolling_again_changes_nothing(self, cloud: Cloud, bucket: str, queue: str) -> None:
        route = cloud.enrol(bucket, queue)
        once = self.configuration(cloud, bucket)

        assert route.isalnum()
        assert cloud.enrol(bucket, queue) == route
        assert self.configuration(cloud, bucket) == once

    def test_withdrawing_undoes_it(self, cloud: Cloud, bucket: str, queue: str) -> None:
        before = self.configuration(cloud, bucket)
        cloud.enrol(bucket, queue)

        cloud.withdraw(bucket)

        assert self.configuration(cloud, bucket) == before
        cloud.withdraw(bucket)
        assert self.configuration(cloud, bucket) == before

    def test_withdrawing_what_was_never_enrolled_changes_nothing(
        self, cloud: Cloud, bucket: str
    ) -> None:
        before = self.configuration(cloud, bucket)

        cloud.withdraw(bucket)

        assert self.configuration(cloud, bucket) == before

    def test_withdrawing_a_bucket_that_is_gone_is_fine(self, cloud: Cloud, bucket: str) -> None:
        cloud.withdraw(self.missing(bucket))

    def test_enrolling_after_withdrawing_works(self, cloud: Cloud, bucket: str, queue: str) -> None:
        route = cloud.enrol(bucket, queue)
        once = self.configuration(cloud, bucket)
        cloud.withdraw(bucket)

        assert cloud.enrol(bucket, queue) == route
        assert self.configuration(cloud, bucket) == once

    def test_what_the_owner_configured_stays(self, cloud: Cloud, bucket: str, queue: str) -> None:
        read = self.configure_as_owner(cloud, bucket)
        before = read()
        assert before

        cloud.enrol(bucket, queue)
        assert read() == before
        cloud.enrol(bucket, queue)
        assert read() == before
        cloud.withdraw(bucket)
        assert read() == before

    def test_eight_threads_enrol_as_one(self, cloud: Cloud, bucket: str, queue: str) -> None:
        with ThreadPoolExecutor(8) as pool:
            routes = set(pool.map(lambda _: cloud.enrol(bucket, queue), range(8)))
        together = self.configuration(cloud, bucket)
        cloud.withdraw(bucket)
        cloud.enrol(bucket, queue)

        assert len(routes) == 1
        assert self.configuration(cloud, bucket) == together

    def test_a_quarantine_is_made_once(self, cloud: Cloud) -> None:
        spec = QuarantineSpec(self.quarantine_name())

        made = cloud.make_quarantine(spec)

        assert spec.name in made
        assert cloud.describe(made).bucket == made
        assert cloud.make_quarantine(spec) == made

    def test_a_quarantine_is_not_public(self, cloud: Cloud) -> None:
        made = cloud.make_quarantine(QuarantineSpec(self.quarantine_name()))

        assert cloud.describe(made).is_public is False

    def test_a_quarantine_may_name_the_region_but_no_other(self, cloud: Cloud) -> None:
        cloud.make_quarantine(QuarantineSpec(self.quarantine_name(), region=cloud.region))

        with pytest.raises(Unsupported):
            cloud.make_quarantine(QuarantineSpec(self.quarantine_name(), region="elsewhere-1"))

    @pytest.mark.parametrize("name", HOSTILE_NAMES)
    def test_a_quarantine_of_a_hostile_name_is_not_made(self, cloud: Cloud, name: str) -> None:
        before = set(cloud.buckets())

        with pytest.raises((Unsupported, Denied)):
            cloud.make_quarantine(QuarantineSpec(name))

        assert set(cloud.buckets()) == before

    def test_a_quarantine_is_never_somebody_elses_bucket(self, cloud: Cloud) -> None:
        with pytest.raises(Denied):
            cloud.make_quarantine(QuarantineSpec(self.foreign_name(cloud)))

    def test_a_bucket_has_no_policy_at_first(self, cloud: Cloud, bucket: str) -> None:
        assert cloud.bucket_policy(bucket) == ""

    def test_a_policy_is_replaced_and_removed(self, cloud: Cloud, bucket: str) -> None:
        document = self.policy(bucket)
        if not document:
            with pytest.raises(Unsupported):
                cloud.replace_bucket_policy(bucket, '{"Version": "2012-10-17"}', "")
            return

        cloud.replace_bucket_policy(bucket, document, "")
        stored = cloud.bucket_policy(bucket)
        assert json.loads(stored) == json.loads(document)

        cloud.replace_bucket_policy(bucket, document, stored)
        assert json.loads(cloud.bucket_policy(bucket)) == json.loads(document)

        cloud.replace_bucket_policy(bucket, "", stored)
        assert cloud.bucket_policy(bucket) == ""
        cloud.replace_bucket_policy(bucket, "", "")

    def test_a_policy_that_is_not_what_was_expected_is_left_alone(
        self, cloud: Cloud, bucket: str
    ) -> None:
        document = self.policy(bucket)
        if not document:
            with pytest.raises(Error):
                cloud.replace_bucket_policy(bucket, "", '{"Version": "2012-10-17"}')
            return

        with pytest.raises(Changed):
            cloud.replace_bucket_policy(bucket, document, document)
        assert cloud.bucket_policy(bucket) == ""

        cloud.replace_bucket_policy(bucket, document, "")
        for expected in ("", "{}", "not JSON"):
            for wanted in ("", document):
                with pytest.raises(Changed):
                    cloud.replace_bucket_policy(bucket, wanted, expected)
        assert json.loads(cloud.bucket_policy(bucket)) == json.loads(document)

    def test_a_policy_is_compared_by_its_meaning(self, cloud: Cloud, bucket: str) -> None:
        document = self.policy(bucket)
        if not document:
            assert cloud.bucket_policy(bucket) == ""
            return
        cloud.replace_bucket_policy(bucket, document, "")

        turned = dict(reversed(json.loads(document).items()))
        cloud.replace_bucket_policy(bucket, "", json.dumps(turned, indent=4))

        assert cloud.bucket_policy(bucket) == ""

    def test_a_policy_that_is_not_json_is_refused(self, cloud: Cloud, bucket: str) -> None:
        with pytest.raises(Unsupported):
            cloud.replace_bucket_policy(bucket, '{"Version": ', "")

        assert cloud.bucket_policy(bucket) == ""

    def test_trying_permissions_changes_nothing_and_misses_none(
        self, cloud: Cloud, bucket: str
    ) -> None:
        before = self.configuration(cloud, bucket)

        assert cloud.missing_permissions(bucket) == {}
        assert self.configuration(cloud, bucket) == before

    def test_closing_twice_is_fine(self, cloud: Cloud) -> None:
        cloud.close()
        cloud.close()
