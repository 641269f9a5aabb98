"""The one list of daemons and emulators that tests use, and what to do if one is missing."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    _refuse(f"{name}: {', '.join(missing)} not found; install {packages}")


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Path]:
    """Mount a file system of `size` bytes on `folder`; needs root, and is skipped or fails as `need`."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
    )
    if done.returncode:
        _refuse(f"cannot mount a file system: {done.stderr.decode().strip()}; run as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _refuse(message: str) -> None:
    if os.environ.get("CI") or os.environ.get("BUCKETWARD_TEST_REQUIRE"):
        pytest.fail(message)
    pytest.skip(message)
