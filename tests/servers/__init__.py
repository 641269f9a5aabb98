"""The one list of daemons and emulators that tests use, and what to do if one is missing."""

import os
import shutil

import pytest

#: name -> (what must be on PATH, the Debian packages or the pip extra that bring it)
SERVERS = {
    "clamd": (("clamd", "sigtool"), "clamav clamav-daemon"),
    "testfiles": ((), "clamav-testfiles"),
    "freshclam": (("freshclam",), "clamav-freshclam"),
    "ceph": (("radosgw", "ceph-mon", "ceph-osd"), "radosgw ceph-mon ceph-osd"),
    "moto": ((), "pip: moto[server]"),
}


def need(name: str) -> None:
    """Skip the test if `name` is not installed; fail where it must be (CI, or BUCKETWARD_TEST_REQUIRE)."""
    programs, packages = SERVERS[name]
    missing = [p for p in programs if not (shutil.which(p) or os.path.exists(f"/usr/sbin/{p}"))]
    if name == "testfiles" and not os.path.isdir("/usr/share/clamav-testfiles"):
        missing = ["/usr/share/clamav-testfiles"]
    if not missing:
        return
    message = f"{name}: {', '.join(missing)} not found; install {packages}"
    if os.environ.get("CI") or os.environ.get("BUCKETWARD_TEST_REQUIRE"):
        pytest.fail(message)
    pytest.skip(message)
