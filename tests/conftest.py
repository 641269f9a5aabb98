"""Fixtures that every kind of test shares: the servers of `tests/servers`, once per run."""

import os
from collections.abc import Iterator

import pytest

from servers.ceph import Ceph, run_ceph
from servers.moto import Moto, run_moto
from servers.proxy import Proxy, run_proxy

for kind in ("cloud", "engine", "notifier", "queue", "state", "store"):
    pytest.register_assert_rewrite(f"bucketward.testing.{kind}")


@pytest.fixture(scope="session")
def moto() -> Iterator[Moto]:
    """Yield a moto server."""
    with run_moto() as server:
        yield server


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """Yield a Ceph gateway."""
    with run_ceph() as server:
        yield server


@pytest.fixture(scope="session")
def ceph_proxy(ceph: Ceph) -> Iterator[Proxy]:
    """Yield a proxy before Ceph that enforces what Ceph ignores; clear its rules after use."""
    with run_proxy(ceph.url, ceph.access_key, ceph.secret_key) as proxy:
        yield proxy


@pytest.fixture(autouse=True, scope="session")
def no_ambient_credentials() -> None:
    """Never let a test find the developer's own cloud credentials or configuration."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "BUCKETWARD_")) and name != "BUCKETWARD_TEST_REQUIRE":
            del os.environ[name]
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = "/dev/null"


def eicar() -> bytes:
    """Return the EICAR test file, assembled here so that a checkout never trips an antivirus."""
    return b"X5O!P%@AP[4\\PZX54(P^)7CC)7}$EICAR-STAND" + b"ARD-ANTIVIRUS-TEST-FILE!$H+H*"
