import os
import stat
import subprocess
import sys
import textwrap
from urllib.parse import quote, unquote_to_bytes, urlsplit

import pytest

from bucketward.clouds.local import LocalCloud, open_local
from bucketward.errors import ConfigError, Denied, NotFound, Unsupported
from bucketward.model import QuarantineSpec
from bucketward.testing.cloud import CloudSuite


class TestLocalCloud(CloudSuite):
    test_what_the_owner_configured_stays = None  # a directory announces nothing to anybody

    @pytest.fixture
    def cloud(self, tmp_path):
        self.data = tmp_path / "data"
        self.data.mkdir()
        uploads = tmp_path / "uploads"
        uploads.mkdir()
        return LocalCloud(self.data, [f"file://{uploads}", f"file://{tmp_path}/gone"])

    @pytest.fixture
    def bucket(self, tmp_path):
        return f"file://{tmp_path}/uploads"

    @pytest.fixture
    def queue(self):
        return "sqlite:///queue.db"

    def configuration(self, cloud, bucket):
        path = bucket.removeprefix("file://")
        return super().configuration(cloud, bucket), os.listdir(path), os.stat(path)

    def foreign_name(self, cloud):
        (self.data / "elsewhere").symlink_to("/")
        return "elsewhere"


def test_a_directory_is_known_once_enrolled_and_no_longer_when_withdrawn(tmp_path):
    cloud = open_local(f"local://{tmp_path}")
    bucket = f"file://{tmp_path}"
    assert cloud.buckets() == []

    assert cloud.enrol(bucket, "q") == "watch"
    assert cloud.buckets() == [bucket]

    cloud.withdraw(bucket)
    assert cloud.buckets() == []


def test_a_file_is_no_bucket(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(NotFound):
        LocalCloud(tmp_path).enrol(f"file://{tmp_path}/file", "q")


def test_a_quarantine_is_for_us_alone_and_mended_if_somebody_opened_it(tmp_path):
    cloud = LocalCloud(tmp_path)
    spec = QuarantineSpec("quarantine")
    old = os.umask(0)
    try:
        made = cloud.make_quarantine(spec)
    finally:
        os.umask(old)
    path = tmp_path / "quarantine"
    assert made == f"file://{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700

    path.chmod(0o777)
    (path / "kept").touch()
    assert cloud.make_quarantine(spec) == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert (path / "kept").exists()


def test_a_protected_directory_is_not_locked_away_as_a_quarantine(tmp_path):
    (tmp_path / "drop").mkdir(mode=0o755)
    cloud = LocalCloud(tmp_path, [f"file://{tmp_path}/drop"])

    with pytest.raises(Denied):
        cloud.make_quarantine(QuarantineSpec("drop"))
    assert stat.S_IMODE((tmp_path / "drop").stat().st_mode) == 0o755


def test_a_link_that_stands_where_the_quarantine_should_be_is_not_followed(tmp_path):
    target = tmp_path / "victim"
    target.mkdir(mode=0o755)
    data = tmp_path / "data"
    data.mkdir()
    (data / "quarantine").symlink_to(target)

    with pytest.raises(Denied):
        LocalCloud(data).make_quarantine(QuarantineSpec("quarantine"))
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


def test_what_a_directory_cannot_do_is_not_promised(tmp_path):
    for spec in (QuarantineSpec("q", expire_days=30), QuarantineSpec("q", kms_key="k")):
        with pytest.raises(Unsupported):
            LocalCloud(tmp_path).make_quarantine(spec)
    assert not (tmp_path / "q").exists()


def test_ping_wants_a_directory_of_its_own(tmp_path):
    with pytest.raises(NotFound):
        LocalCloud(tmp_path / "gone").ping()


def as_nobody(tmp_path, code):
    """Run code with `cloud` and `bucket` as a user who owns nothing; print says what to return."""
    script = textwrap.dedent(f"""
        import os
        from bucketward.clouds.local import LocalCloud
        from bucketward.errors import *
        from bucketward.model import QuarantineSpec
        cloud, bucket = LocalCloud({str(tmp_path)!r}), "file://{tmp_path}/uploads"
        if os.geteuid() == 0:
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
    """) + textwrap.dedent(code)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("mode", "missing"),
    [(0o777, []), (0o555, ["write"]), (0o000, ["read", "write"]), (0o333, ["read"])],
)
def test_missing_permissions_are_found_by_trying(tmp_path, mode, missing):
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    uploads.chmod(mode)
    for parent in (tmp_path, *tmp_path.parents[:-2]):
        parent.chmod(0o755)

    found = as_nobody(tmp_path, "print(sorted(cloud.missing_permissions(bucket)))")

    uploads.chmod(0o700)
    assert found == str(missing)
    assert list(uploads.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's directory")
def test_another_users_directory_is_not_taken_for_a_quarantine(tmp_path):
    (tmp_path / "quarantine").mkdir(mode=0o777)
    for parent in (tmp_path, *tmp_path.parents[:-2]):
        parent.chmod(0o755)

    said = as_nobody(
        tmp_path,
        """
        try: cloud.make_quarantine(QuarantineSpec("quarantine"))
        except Denied as error: print(error)
        """,
    )

    assert "another user" in said


def test_a_file_system_without_attributes_is_told():
    # /proc has neither nameless files nor user attributes
    missing = LocalCloud("/").missing_permissions("file:///proc")

    assert "xattr" in missing or "write" in missing


def test_a_url_of_something_else_is_refused():
    for url in ("local://host/x", "file:///x", "local:x", "local:///x?y=1"):
        with pytest.raises(ConfigError):
            open_local(url)


@pytest.mark.parametrize("name", ["a b", "50%", "q?x=1", "#1", "ünï", "line\nbreak", "bad\udcff"])
def test_a_directory_has_one_identity_however_its_url_is_written(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    cloud = LocalCloud(tmp_path, [folder.as_uri()])

    (bucket,) = cloud.buckets()

    assert cloud.describe(bucket).bucket == bucket
    assert cloud.describe(folder.as_uri()).bucket == bucket
    assert cloud.enrol(folder.as_uri(), "q") == "watch"
    assert cloud.buckets() == [bucket]
    assert urlsplit(bucket)[2:] == (bucket.removeprefix("file://"), "", "")
    assert unquote_to_bytes(bucket.removeprefix("file://")) == os.fsencode(folder)


def test_a_data_directory_of_an_unusual_name_is_opened(tmp_path):
    data = tmp_path / "my data 100%"
    data.mkdir()

    made = open_local("local://" + quote(str(data))).make_quarantine(QuarantineSpec("quarantine"))

    assert (data / "quarantine").is_dir()
    assert made == f"file://{tmp_path}/my data 100%25/quarantine"
