"""A real Ceph cluster of one monitor, one OSD and one S3 gateway, on loopback, once per run."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import boto3
from botocore.config import Config

from servers import need

PREFIX = "bw-ceph-"

CONF = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon2},v1:127.0.0.1:{mon1}]
mon initial members = a
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {dir}/keyring
auth allow insecure global id reclaim = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
run dir = {dir}/run
admin socket = {dir}/run/$name.asok
log file = {dir}/log/$name.log
log to stderr = false
err to stderr = false
pid file =
crash dir = {dir}/crash
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon warn on pool no redundancy = false
mon pg warn min per osd = 0
mon max pg per osd = 1000
mon data avail warn = 1
mon data avail crit = 1
[mon.a]
host = localhost
mon data = {dir}/mon
[osd.0]
osd data = {dir}/osd
osd objectstore = bluestore
bluestore block size = 8589934592
bluestore block db create = false
osd memory target = 939524096
[client.rgw]
keyring = {dir}/keyring
rgw data = {dir}/rgw
# Without tcp_nodelay each small answer waits 40 ms for the client's delayed acknowledgement.
rgw frontends = beast endpoint=127.0.0.1:{rgw} tcp_nodelay=1
rgw enable usage log = false
rgw num async rados threads = 8
rgw thread pool size = 64
rgw sts key = abcdefghijklmnop
rgw s3 auth use sts = true
# So that objects can be encrypted with the customer's own key (SSE-C) without TLS.
rgw crypt require ssl = false
"""


@dataclass(frozen=True)
class User:
    """One user of the gateway."""

    name: str
    access_key: str
    secret_key: str = field(repr=False)


@dataclass(frozen=True)
class Ceph:
    """A running gateway, with two users who do not see each other's buckets."""

    url: str
    user: User
    other: User
    dir: Path

    @property
    def access_key(self) -> str:
        return self.user.access_key

    @property
    def secret_key(self) -> str:
        return self.user.secret_key

    def client(self, service: str = "s3", user: User | None = None, url: str = "", **more):
        """Return a boto3 client of `service`: s3, sns (for notification topics), sts, iam."""
        user = user or self.user
        # The gateway's zone group is called "default", and its topics live in that region.
        return boto3.client(
            service,
            endpoint_url=url or self.url,
            region_name="default" if service == "sns" else "us-east-1",
            aws_access_key_id=user.access_key,
            aws_secret_access_key=user.secret_key,
            config=Config(s3={"addressing_style": "path"}),
            **more,
        )


@contextmanager
def run_ceph() -> Iterator[Ceph]:
    """Start the cluster in a temporary folder, wait until the gateway answers, end it by pid."""
    need("ceph")
    _remove_leftovers()
    base = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        yield _start(base, daemons)
    finally:
        for daemon in reversed(daemons):
            daemon.kill()  # nothing here is kept, so nothing has to be flushed
        for daemon in daemons:
            daemon.wait()
        shutil.rmtree(base, ignore_errors=True)


def _start(base: Path, daemons: list[subprocess.Popen[bytes]]) -> Ceph:
    for name in ("mon", "osd", "rgw", "run", "log", "crash"):
        (base / name).mkdir()
    ports = dict(zip(("mon1", "mon2", "rgw"), _free_ports(3), strict=True))
    fsid = str(uuid.uuid4())
    conf, keyring, monmap = base / "ceph.conf", base / "keyring", base / "monmap"
    conf.write_text(CONF.format(dir=base, fsid=fsid, **ports))

    def run(program: str, *args: object) -> str:
        done = subprocess.run(
            [program, *map(str, args)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"},
        )
        if done.returncode:
            raise RuntimeError(f"{program} {args}: {done.returncode} {done.stdout}{done.stderr}")
        return done.stdout

    def start(program: str, *args: object) -> subprocess.Popen[bytes]:
        # pdeathsig: a test run that is killed outright leaves no daemon behind.
        argv = ["setpriv", "--pdeathsig", "KILL", program, "-f", "-c", conf, *args]
        with (base / "log" / f"{program}.out").open("wb") as out:
            daemon = subprocess.Popen(
                list(map(str, argv)),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"},
            )
        daemons.append(daemon)
        return daemon

    run(
        "ceph-authtool",
        "--create-keyring",
        keyring,
        "--gen-key",
        "-n",
        "mon.",
        "--cap",
        "mon",
        "allow *",
    )
    for name in ("client.admin", "client.rgw", "osd.0"):
        caps = [word for kind in ("mon", "osd", "mgr") for word in ("--cap", kind, "allow *")]
        run("ceph-authtool", keyring, "--gen-key", "-n", name, *caps)
    addresses = f"[v2:127.0.0.1:{ports['mon2']},v1:127.0.0.1:{ports['mon1']}]"
    run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", addresses, monmap)
    run("ceph-mon", "-c", conf, "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
    start("ceph-mon", "-i", "a")
    run("ceph", "-c", conf, "--connect-timeout", 60, "osd", "new", osd_uuid := uuid.uuid4())
    run("ceph", "-c", conf, "auth", "add", "osd.0", "-i", keyring)
    run("ceph-osd", "-c", conf, "-i", 0, "--mkfs", "--osd-uuid", osd_uuid)
    start("ceph-osd", "-i", 0)
    run("ceph", "-c", conf, "osd", "crush", "add", "osd.0", "1.0", "host=localhost", "root=default")
    gateway = start("radosgw", "-n", "client.rgw")
    _wait_for(ports["rgw"], gateway, base)
    users = [
        json.loads(
            run(
                "radosgw-admin", "-c", conf, "user", "create", f"--uid={name}",
                f"--display-name={name}", f"--access-key={name}", f"--secret-key={name}secret",
            )
        )["user_id"]
        for name in ("test", "other")
    ]  # fmt: skip
    first, second = (User(name, name, f"{name}secret") for name in users)
    return Ceph(f"http://127.0.0.1:{ports['rgw']}", first, second, base)


def _wait_for(port: int, gateway: subprocess.Popen[bytes], base: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if gateway.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    tail = (base / "log" / "client.rgw.log").read_text(errors="replace")[-2000:]
    raise RuntimeError(f"radosgw did not start (exit code {gateway.poll()}): {tail}")


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _remove_leftovers() -> None:
    """Remove the folders of runs that were killed: their names carry the pid."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        pid = folder.name.removeprefix(PREFIX).split("-")[0]
        if not os.path.exists(f"/proc/{pid}"):
            shutil.rmtree(folder, ignore_errors=True)
