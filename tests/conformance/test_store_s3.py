"""The S3 store keeps the Store promises on Ceph and on moto, and says truly what went wrong."""

import os
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from bucketward.errors import (
    Changed,
    ConfigError,
    Denied,
    NotFound,
    Unavailable,
    Unsupported,
)
from bucketward.model import Credentials, ObjectRef
from bucketward.stores.s3 import PERMISSIONS, S3Store, open_s3
from bucketward.stores.s3_http import Connections
from bucketward.testing.store import Acceptor, StoreSuite, at_once, fetch, file_of, listing, put
from servers.proxy import run_proxy

MEBIBYTE = 1 << 20


@dataclass
class Site:
    """A server, how to open a bucket on it, and boto3 for what a stranger does there."""

    url: str
    client: Any
    keys: tuple[str, str]
    connections: Connections

    def open(self, name: str, **options: Any) -> S3Store:
        """Open a bucket that exists."""
        credentials = Credentials(*options.pop("keys", self.keys))
        options = {"endpoint": self.url, "connections": self.connections, **options}
        return S3Store(name, credentials=lambda: credentials, **options)

    def make(self, *, versioned: bool = False, lock: bool = False, **options: Any) -> S3Store:
        """Make a bucket and open it."""
        name = f"b-{uuid.uuid4().hex[:16]}"
        more = {"ObjectLockEnabledForBucket": True} if lock else {}
        self.client.create_bucket(Bucket=name, **more)
        if versioned:
            status = {"Status": "Enabled"}
            self.client.put_bucket_versioning(Bucket=name, VersioningConfiguration=status)
        return self.open(name, **options)


@pytest.fixture(scope="module")
def connections() -> Iterator[Connections]:
    shared = Connections(stall=5)
    yield shared
    shared.close()


@pytest.fixture(scope="module")
def ceph_direct(ceph, connections) -> Site:
    keys = (ceph.access_key, ceph.secret_key)
    return Site(ceph.url, ceph.client("s3"), keys, connections)


@pytest.fixture(scope="module")
def ceph_site(ceph, ceph_proxy, connections) -> Site:
    keys = (ceph.access_key, ceph.secret_key)
    return Site(ceph_proxy.url, ceph.client("s3"), keys, connections)


@pytest.fixture(scope="module")
def moto_site(moto, connections) -> Site:
    keys = ("AKIAIOSFODNN7EXAMPLE", "test-secret")
    return Site(moto.url, moto.client("s3"), keys, connections)


@pytest.fixture(scope="module")
def buckets() -> Callable[[str, Callable[[], S3Store]], S3Store]:
    """Return what makes each bucket of a class once."""
    made: dict[str, S3Store] = {}

    def once(name: str, make: Callable[[], S3Store]) -> S3Store:
        if name not in made:
            made[name] = make()
        return made[name]

    return once


class S3Suite(StoreSuite):
    """The suite on one kind of bucket of one server, in small pages."""

    objects_past_one_page = 60
    site: ClassVar[str]
    versioned: ClassVar[bool]
    defects: ClassVar[dict[str, str]] = {}
    """Tests that the server itself fails, with what it does wrong."""

    @pytest.fixture(autouse=True)
    def known_defects(self, request) -> None:
        for name, defect in self.defects.items():
            if request.node.name.startswith(name):
                pytest.skip(defect)

    @pytest.fixture
    def store(self, request, buckets) -> S3Store:
        return self.bucket(request, buckets, "store")

    @pytest.fixture
    def other_store(self, request, buckets) -> S3Store:
        return self.bucket(request, buckets, "other")

    def bucket(self, request, buckets, which: str) -> S3Store:
        site = request.getfixturevalue(self.site)
        self.client = site.client
        self.again = lambda store: site.open(store._name, page_size=50)
        name = f"{type(self).__name__} {which}"
        return buckets(name, lambda: site.make(versioned=self.versioned, page_size=50))

    def make_delete_marker(self, store, key) -> str:
        return self.client.delete_object(Bucket=store._name, Key=key)["VersionId"]

    def overwrite_behind(self, store, key, data) -> None:
        self.client.put_object(Bucket=store._name, Key=key, Body=data)

    def reopen(self, store) -> S3Store:
        return self.again(store)


class TestCephVersioned(S3Suite):
    site = "ceph_site"
    versioned = True

    def test_it_declares_what_the_proxy_and_ceph_enforce(self, store):
        # Ceph 16 ignores If-None-Match of a PUT where there are versions.
        assert store.conditions == {"read", "tag", "copy-source", "delete"}
        assert listing(store, ".bucketward-probe", versions=True) == []


class TestCephUnversioned(S3Suite):
    site = "ceph_site"
    versioned = False

    def test_it_declares_what_the_proxy_and_ceph_enforce(self, store):
        assert store.conditions == {"read", "put-absent", "copy-source", "delete"}
        assert listing(store, ".bucketward-probe") == []


class TestCephDirect(S3Suite):
    """Without the proxy: conditions that are not enforced are not declared."""

    site = "ceph_direct"
    versioned = False

    def test_it_declares_what_ceph_enforces(self, store):
        assert store.conditions == {"read", "put-absent"}


MOTO_DEFECTS = {
    "test_a_key_survives_everything[control]": "moto has no route for a key with a line feed",
    "test_a_key_survives_everything[newlines-last]": "moto has no route for a line feed",
    "test_keys_are_never_taken_for_their_neighbours[newlines]": "moto has no route for them",
    "test_eight_threads_do_everything_at_once": "moto's listing fails while somebody writes",
}


class TestMotoVersioned(S3Suite):
    site = "moto_site"
    versioned = True
    defects: ClassVar = {
        **MOTO_DEFECTS,
        "test_a_listing_past_one_page": "moto skips an object behind a marker that is gone",
    }


class TestMotoUnversioned(S3Suite):
    site = "moto_site"
    versioned = False
    defects: ClassVar = {
        **MOTO_DEFECTS,
        "test_a_copy_replaces_what_was_there": "moto keeps the tags of the overwritten object",
    }


@pytest.fixture
def proxy(ceph_proxy):
    ceph_proxy.clear()
    yield ceph_proxy
    ceph_proxy.clear()


@pytest.fixture(scope="module")
def versioned(ceph_site) -> S3Store:
    return ceph_site.make(versioned=True)


@pytest.fixture(scope="module")
def unversioned(ceph_site) -> S3Store:
    return ceph_site.make()


@pytest.fixture
def key() -> str:
    return uuid.uuid4().hex


# Requests


def test_a_read_is_one_request_and_so_is_tagging_a_version(versioned, key, proxy):
    pin = put(versioned, key, b"x" * 10_000)
    proxy.clear()

    fetch(versioned, ObjectRef(versioned.bucket, key))
    versioned.replace_tags(pin, {"verdict": "Clean"})

    path = f"/{versioned._name}/{key}"
    assert proxy.log() == [f"GET {path}", f"PUT {path}?tagging&versionId={pin.version_id}"]


def test_tagging_without_a_version_looks_before_and_after(unversioned, key, proxy):
    pin = put(unversioned, key, b"x")
    proxy.clear()

    unversioned.replace_tags(pin, {"verdict": "Clean"})

    path = f"/{unversioned._name}/{key}"
    assert proxy.log() == [f"HEAD {path}", f"PUT {path}?tagging", f"HEAD {path}"]


def test_an_overwrite_while_tagging_is_noticed(unversioned, key, proxy, ceph):
    pin = put(unversioned, key, b"old")
    proxy.fail(r"PUT .*\?tagging", "delay", seconds=0.5)

    def tag(n: int) -> str:
        if n:
            time.sleep(0.2)
            ceph.client().put_object(Bucket=unversioned._name, Key=key, Body=b"new")
            return "written"
        with pytest.raises(Changed):
            unversioned.replace_tags(pin, {"verdict": "Clean"})
        return "noticed"

    assert at_once(2, tag) == ["noticed", "written"]


def test_sixty_four_read_at_once(versioned, key):
    pins = [put(versioned, f"{key}/{n}", os.urandom(n * 9_999)) for n in range(8)]
    expected = [fetch(versioned, pin) for pin in pins]

    found = at_once(64, lambda n: fetch(versioned, pins[n % 8]))

    assert found == [expected[n % 8] for n in range(64)]


def test_memory_stays_flat_however_large_the_objects(ceph_direct, key, tmp_path):
    store = ceph_direct.make()
    size = 300 * MEBIBYTE
    with (tmp_path / "large").open("w+b") as file:
        file.truncate(size)
        pin = store.put(key, file.fileno(), size, tags={"a": "1"})
    assert "-" in pin.etag  # it went in parts
    assert store.tags(pin) == {"a": "1"}
    before, highest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.01):
            highest = max(highest, resident())

    def read(n: int) -> int:
        fd = os.open("/dev/null", os.O_WRONLY)

        def accept(_):
            time.sleep(0.3 * n)  # who takes their time is not buried in data
            return fd

        try:
            return store.read(pin, accept).size
        finally:
            os.close(fd)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert at_once(3, read) == [size] * 3
    done.set()
    watcher.join()

    assert highest - before < 40 * MEBIBYTE


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_two_servers_that_differ_only_in_their_port_are_two(ceph_direct, moto_site):
    one, other = ceph_direct.make(), moto_site.make()
    put(one, "k", b"one")
    put(other, "k", b"other")

    for _ in range(3):
        assert fetch(one, ObjectRef(one.bucket, "k"))[1] == b"one"
        assert fetch(other, ObjectRef(other.bucket, "k"))[1] == b"other"
    with pytest.raises(Unsupported):
        one.copy_from(other, other.stat(ObjectRef(other.bucket, "k")), "copy")


def test_nothing_of_the_body_is_fetched_once_accept_refused(ceph_direct, key):
    store = ceph_direct.make()
    pin = put(store, key, b"x" * (30 * MEBIBYTE))

    def refuse(info):
        raise KeyError("too large")

    started = time.process_time()
    for _ in range(20):
        with pytest.raises(KeyError):
            store.read(pin, refuse)

    assert time.process_time() - started < 1  # 600 MiB would take longer


def test_over_tls_too(ceph, ceph_direct, tmp_path):
    certificate = tmp_path / "both.pem"
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    names = ["-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", tmp_path / "key", "-out", tmp_path / "cert"]
    subprocess.run([*make, *names, *files], check=True, capture_output=True)
    certificate.write_bytes((tmp_path / "cert").read_bytes() + (tmp_path / "key").read_bytes())
    name = ceph_direct.make()._name
    trusting = Connections(ca_file=str(tmp_path / "cert"))
    keys = (ceph.access_key, ceph.secret_key)
    with run_proxy(ceph.url, *keys, certificate=str(certificate)) as proxy:
        store = ceph_direct.open(name, endpoint=proxy.url, connections=trusting)
        data = os.urandom(3 * MEBIBYTE)
        pin = put(store, "k", data, tags={"a": "1"})
        assert fetch(store, pin)[1] == data
        assert store.tags(pin) == {"a": "1"}

        distrusting = Connections(connect_timeout=0.3)
        with pytest.raises(Unavailable, match="cannot connect to https://localhost"):
            ceph_direct.open(name, endpoint=proxy.url, connections=distrusting).ping()
    trusting.close()
    distrusting.close()


# Faults


@pytest.mark.parametrize("kind", ["reset", "500", "503"])
def test_one_failure_is_tried_again_and_many_are_unavailable(versioned, key, proxy, kind):
    pin = put(versioned, key, b"x")
    proxy.clear()

    def fail(times: int) -> None:
        if kind == "reset":
            proxy.fail("GET", "reset", times)
        else:
            code = {"500": "InternalError", "503": "SlowDown"}[kind]
            proxy.answer("GET", int(kind), code, "no", times=times, headers={"Retry-After": "7"})

    fail(1)
    assert fetch(versioned, pin)[1] == b"x"
    fail(99)
    accept = Acceptor()
    started = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        versioned.read(pin, accept)

    assert time.monotonic() - started < 5
    assert accept.infos == []
    accept.close()
    assert key in caught.value.message
    assert caught.value.retry_after == (None if kind == "reset" else 7)


def test_a_body_that_ends_early_is_unavailable(versioned, key, proxy):
    pin = put(versioned, key, b"x" * 300_000)
    proxy.fail("GET", "truncate", 9)
    accept = Acceptor()

    with pytest.raises(Unavailable, match="ended early"):
        versioned.read(pin, accept)

    assert len(accept.infos) == 1
    accept.close()
    proxy.clear()
    assert fetch(versioned, pin)[1] == b"x" * 300_000


def test_a_server_that_falls_silent_is_given_up(versioned, ceph_site, key, proxy):
    pin = put(versioned, key, b"x")
    impatient = Connections(stall=0.3)
    store = ceph_site.open(versioned._name, connections=impatient)
    store.ping()
    proxy.fail("GET", "delay", 9, seconds=3)
    started = time.monotonic()

    with pytest.raises(Unavailable, match="nothing came for"):
        fetch(store, pin)

    assert time.monotonic() - started < 4
    impatient.close()


def test_a_server_that_drips_is_given_up(versioned, ceph_site, key, proxy):
    pin = put(versioned, key, b"x" * 300_000)
    impatient = Connections(stall=0.1)
    store = ceph_site.open(versioned._name, connections=impatient)
    proxy.fail("GET", "drip", 9)

    with pytest.raises(Unavailable, match="too slowly"):
        fetch(store, pin)

    impatient.close()


def test_a_server_that_is_not_there_is_unavailable(ceph_site):
    store = ceph_site.open("some-bucket", endpoint="http://127.0.0.1:1")

    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 .*check the endpoint"):
        store.ping()


def test_a_write_under_a_condition_is_not_repeated(unversioned, key, proxy):
    assert "put-absent" in unversioned.conditions
    proxy.clear()
    proxy.answer("PUT", 503, "SlowDown", times=9)

    with pytest.raises(Unavailable, match="SlowDown"):
        put(unversioned, key, b"x", if_absent=True)

    assert len(proxy.log()) == 1


KMS = (
    "User: arn:aws:sts::111122223333:assumed-role/scanner/x is not authorized to perform: "
    "kms:Decrypt on resource: arn:aws:kms:eu-west-1:111122223333:key/abc because no identity-based "
    "policy allows the kms:Decrypt action"
)


SSE_C = (
    "The object was stored using a form of Server Side Encryption. The correct parameters must be "
    "provided to retrieve the object."
)


@pytest.mark.parametrize(
    "case",
    [
        (403, "InvalidObjectState", "Archived", Unsupported, "archived-storage-class", "restore"),
        (400, "InvalidRequest", SSE_C, Unsupported, "customer-key",
         "key that only its owner"),
        (403, "AccessDenied", KMS, Denied, "kms:Decrypt", "key/abc"),
        (400, "KMS.DisabledException", "is disabled", Denied, "kms:Decrypt", "KMS key"),
        (403, "AccessDenied", "Access Denied", Denied, "s3:GetObjectVersion", "s3:GetObjectVersion"),
        (403, "AccessDenied", 'not authorized to perform: s3:GetObject on resource: "x"', Denied,
         "s3:GetObject", "allow s3:GetObject "),
        (403, "SignatureDoesNotMatch", "", Denied, "credentials", "credentials"),
        (400, "ExpiredToken", "The provided token has expired.", Unavailable, "", "expired"),
        (403, "RequestTimeTooSkewed", "", Unavailable, "", "clock"),
        (301, "PermanentRedirect", "", ConfigError, "", "region=eu-north-1"),
        (400, "AuthorizationHeaderMalformed", "", ConfigError, "", "region=eu-north-1"),
        (404, "NoSuchBucket", "", NotFound, "", "no bucket"),
        (404, "NoSuchVersion", "", NotFound, "", "gone"),
        (405, "MethodNotAllowed", "", NotFound, "", "gone"),
        (400, "InvalidArgument", "Invalid version id specified", NotFound, "", "gone"),
        (409, "OperationAborted", "", Unavailable, "", "now"),
        (501, "NotImplemented", "", Unsupported, "unsupported", "will not"),
    ],
)  # fmt: skip
def test_the_servers_word_becomes_the_right_error(versioned, key, proxy, case):
    status, code, message, error, reason, says = case
    pin = put(versioned, key, b"x")
    accept = Acceptor()
    headers = {"x-amz-bucket-region": "eu-north-1"}

    proxy.answer("GET", status, code, message, times=9, headers=headers)
    with pytest.raises(error) as caught:
        versioned.read(pin, accept)
    assert (caught.value.backend, caught.value.reason) == ("s3", reason)
    assert says in caught.value.message
    assert accept.infos == []
    accept.close()

    # A HEAD has no body: what it means is found out by a GET.
    proxy.answer("HEAD", status, code, message, times=9)
    with pytest.raises(error) as caught:
        versioned.stat(pin.ref)
    assert caught.value.reason in {reason, ""}


@pytest.mark.parametrize(
    "body",
    [
        "no XML",
        "",
        "<a><b></a>",
        '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;">]><ListBucketResult>&c;</ListBucketResult>',
        '<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>',
    ],
)
def test_a_reply_that_is_none_is_unavailable(versioned, proxy, body):
    proxy.fail("GET", "answer", 9, status=200, body=body)

    with pytest.raises(Unavailable, match=r"the reply (is no XML|has a document type)"):
        versioned.list()


def test_an_error_that_comes_with_200_is_an_error(versioned, ceph_site, key, proxy):
    pin = put(versioned, key, b"x")
    body = "<?xml version='1.0'?>\n  <Error><Code>InternalError</Code><Message>x</Message></Error>"
    proxy.fail("PUT", "answer", 9, status=200, body=body)

    with pytest.raises(Unavailable, match="InternalError"):
        versioned.copy_from(versioned, pin, f"{key}-copy")


# Denials


def test_another_users_bucket_is_denied_with_the_permission(ceph, ceph_site, versioned, key):
    pin = put(versioned, key, b"x")
    keys = (ceph.other.access_key, ceph.other.secret_key)
    stranger = ceph_site.open(versioned._name, keys=keys)
    accept = Acceptor()
    attempts = {
        "s3:ListBucket": stranger.ping,
        "s3:GetObjectVersion": lambda: stranger.read(pin, accept),
        "s3:GetObject": lambda: stranger.stat(ObjectRef(pin.bucket, key)),
        "s3:GetObjectVersionTagging": lambda: stranger.tags(pin),
        "s3:PutObjectVersionTagging": lambda: stranger.replace_tags(pin, {"a": "1"}),
        "s3:PutObject": lambda: put(stranger, f"{key}-new", b""),
    }

    for permission, attempt in attempts.items():
        with pytest.raises(Denied) as caught:
            attempt()
        assert caught.value.reason == permission
        assert permission in PERMISSIONS
        assert permission in caught.value.message
    with pytest.raises(Denied):
        stranger.delete(pin)
    assert accept.infos == []
    accept.close()
    assert fetch(versioned, pin)[1] == b"x"


@pytest.mark.parametrize("keys", [("test", "wrong"), ("nobody", "x")])
def test_wrong_credentials_are_denied(ceph_site, versioned, keys):
    with pytest.raises(Denied) as caught:
        ceph_site.open(versioned._name, keys=keys).ping()

    assert keys[1] not in caught.value.message.split()


def test_a_bucket_that_is_not_there_is_not_found(ceph_site):
    with pytest.raises(NotFound, match="no bucket s3://nowhere-at-all"):
        ceph_site.open("nowhere-at-all").ping()


def test_an_object_under_the_customers_key_is_unscannable(versioned, ceph, key):
    ceph.client().put_object(
        Bucket=versioned._name, Key=key, Body=b"x",
        SSECustomerAlgorithm="AES256", SSECustomerKey="k" * 32,
    )  # fmt: skip
    accept = Acceptor()
    ref = ObjectRef(versioned.bucket, key)

    for attempt in (lambda: versioned.read(ref, accept), lambda: versioned.stat(ref)):
        with pytest.raises(Unsupported) as caught:
            attempt()
        assert caught.value.reason == "customer-key"
    assert accept.infos == []
    accept.close()


def test_a_legal_hold_keeps_the_version(ceph_site, key):
    store = ceph_site.make(lock=True)
    pin = put(store, key, b"x")
    named = {"Bucket": store._name, "Key": key, "VersionId": pin.version_id}
    ceph_site.client.put_object_legal_hold(**named, LegalHold={"Status": "ON"})

    with pytest.raises(Denied) as caught:
        store.delete(pin)

    assert caught.value.reason == "object-lock"
    assert fetch(store, pin)[1] == b"x"
    ceph_site.client.put_object_legal_hold(**named, LegalHold={"Status": "OFF"})
    store.delete(pin)


# Parts


@pytest.fixture(params=["versioned", "unversioned"])
def parted(request, ceph_site) -> S3Store:
    """Yield a bucket where everything above 5 MiB goes in parts."""
    return ceph_site.make(
        versioned=request.param == "versioned",
        put_limit=5 * MEBIBYTE,
        part_size=5 * MEBIBYTE,
        copy_limit=5 * MEBIBYTE,
        copy_part_size=5 * MEBIBYTE,
    )


def test_an_object_in_parts_is_as_any_other(parted, ceph_site, key):
    data = os.urandom(12 * MEBIBYTE)
    headers = {"content-type": "text/x-test", "cache-control": "no-store"}

    pin = put(parted, key, data, tags={"a": "1 +"}, metadata={"m": "é"}, headers=headers)
    copied = parted.copy_from(parted, pin, f"{key}-kept")
    changed = parted.copy_from(parted, pin, f"{key}-new", tags={"b": "2"}, metadata={"n": "3"})

    assert pin.etag.endswith("-3")
    for info, tags, metadata in (
        (pin, {"a": "1 +"}, {"m": "é"}),
        (copied, {"a": "1 +"}, {"m": "é"}),
        (changed, {"b": "2"}, {"n": "3"}),
    ):
        found, body = fetch(parted, info)
        assert body == data
        assert found.metadata == metadata
        assert found.headers.items() >= headers.items()
        assert parted.tags(info) == tags
        assert found.identity == info.identity
    for attempt in (
        lambda: put(parted, key, data, if_absent=True),
        lambda: parted.copy_from(parted, pin, f"{key}-kept", if_absent=True),
    ):
        with pytest.raises(Changed):
            attempt()
    with pytest.raises(Changed if pin.version_id is None else NotFound):
        parted.delete(replace(pin, etag="0", version_id=pin.version_id and "x" * 32))
    parted.delete(pin)
    assert no_parts(ceph_site, parted)


def test_a_source_that_changes_between_parts_is_changed(ceph_site, proxy, key):
    source = ceph_site.make(put_limit=5 * MEBIBYTE, part_size=5 * MEBIBYTE)
    target = ceph_site.make(copy_limit=5 * MEBIBYTE, copy_part_size=5 * MEBIBYTE)
    pin = put(source, key, b"o" * (12 * MEBIBYTE))
    proxy.fail("PUT .*partNumber=3", "delay", seconds=1)

    def overwrite() -> None:
        while not any("partNumber=3" in line for line in proxy.log()):
            time.sleep(0.02)
        ceph_site.client.put_object(Bucket=source._name, Key=key, Body=b"n" * (12 * MEBIBYTE))

    writer = threading.Thread(target=overwrite)
    writer.start()
    with pytest.raises(Changed):
        target.copy_from(source, pin, key)
    writer.join()

    assert listing(target, key) == []
    assert no_parts(ceph_site, target)


@pytest.mark.parametrize("what", ["put", "copy"])
def test_nothing_is_left_of_parts_that_failed(parted, ceph_site, proxy, key, what):
    data = b"x" * (12 * MEBIBYTE)
    pin = put(parted, f"{key}-source", data)
    proxy.answer("partNumber=2", 503, "SlowDown", times=9)

    with pytest.raises(Unavailable, match="SlowDown"):
        if what == "put":
            put(parted, key, data)
        else:
            parted.copy_from(parted, pin, key)

    assert listing(parted, f"{key}") == listing(parted, f"{key}-source")
    assert no_parts(ceph_site, parted)


def no_parts(site: Site, store: S3Store) -> bool:
    """Return whether no upload is under way."""
    return "Uploads" not in site.client.list_multipart_uploads(Bucket=store._name)


# Versions


def test_what_is_older_than_versioning_is_pinned_by_its_etag(ceph_site, key):
    store = ceph_site.make()
    put(store, key, b"first")
    name = store._name
    status = {"Status": "Enabled"}
    ceph_site.client.put_bucket_versioning(Bucket=name, VersioningConfiguration=status)
    store = ceph_site.open(name)

    null = store.stat(ObjectRef(store.bucket, key))
    listed = listing(store, key, versions=True)
    assert (null.version_id, null.token) == (None, "null")
    assert [(i.version_id, i.token) for i in listed] == [(None, "null")]
    store.replace_tags(null, {"a": "1"})
    new = put(store, key, b"second")
    assert new.version_id

    assert fetch(store, null)[1] == b"first"
    assert store.tags(null) == {"a": "1"}
    with pytest.raises(Changed):
        store.stat(null.ref)
    copied = store.copy_from(store, null, f"{key}-copy")
    assert fetch(store, copied)[1] == b"first"
    store.delete(null)
    with pytest.raises(NotFound):
        fetch(store, null)
    assert [i.version_id for i in listing(store, key + "", versions=True)][:1] == [new.version_id]


def test_in_a_bucket_whose_versioning_is_suspended_nothing_is_overlooked(ceph_site, key):
    store = ceph_site.make(versioned=True)
    old = put(store, key, b"old")
    status = {"Status": "Suspended"}
    ceph_site.client.put_bucket_versioning(Bucket=store._name, VersioningConfiguration=status)
    store = ceph_site.open(store._name)
    assert not store.has_versions

    null = put(store, key, b"null")
    assert (null.version_id, null.token) == (None, "null")
    ceph_site.client.put_object(Bucket=store._name, Key=key, Body=b"later")
    for attempt in (
        lambda: fetch(store, null),
        lambda: store.replace_tags(null, {}),
        lambda: store.delete(null),
        lambda: store.copy_from(store, null, f"{key}-copy"),
    ):
        with pytest.raises(Changed):
            attempt()

    assert fetch(store, old)[1] == b"old"
    assert {i.version_id for i in listing(store, key, versions=True)} == {None, old.version_id}


# Opening


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///key",
        "s3://bucket/key",
        "s3://AKIA:secret@bucket",
        "s3://bucket?endpoint=http://AKIA:secret@127.0.0.1",
        "s3://bucket?endpoint=ftp://127.0.0.1",
        "s3://bucket?endpoint=http://127.0.0.1/path",
        "s3://bucket?endpoint=http://127.0.0.1:port",
        "s3://bucket?endpoint=http://[::1",
        "s3://[bucket",
        "s3://bucket?style=other",
        "s3://bucket?requester_pays=yes",
        "s3://bucket?secret_key=secret",
        "s3://bucket?region=x/y",
        "http://bucket",
        "s3://..",
    ],
)
def test_a_url_that_is_none_is_refused_without_repeating_secrets(url, connections):
    with pytest.raises(ConfigError) as caught:
        open_s3(url, connections=connections)

    assert "secret@" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("s3://bucket", "https://bucket.s3.us-east-1.amazonaws.com/"),
        ("s3://bucket?region=eu-west-1", "https://bucket.s3.eu-west-1.amazonaws.com/"),
        ("s3://my.bucket?region=eu-west-1", "https://s3.eu-west-1.amazonaws.com/my.bucket/"),
        ("s3://bucket?region=cn-north-1", "https://bucket.s3.cn-north-1.amazonaws.com.cn/"),
        ("s3://bucket?style=path", "https://s3.us-east-1.amazonaws.com/bucket/"),
        ("s3://bucket?endpoint=http://127.0.0.1:9000", "http://127.0.0.1:9000/bucket/"),
        ("s3://bucket?endpoint=https://s3.example.com", "https://s3.example.com/bucket/"),
        ("s3://bucket?endpoint=http://h:80&style=virtual", "http://bucket.h/"),
        ("s3://bucket?endpoint=http://[::1]:9000", "http://[::1]:9000/bucket/"),
    ],
)
def test_a_url_says_where_to_ask(url, asked, connections):
    store = open_s3(url, connections=connections)

    assert store._origin.url + store._path == asked
    assert store.bucket == url.partition("?")[0]


def test_a_url_opens_a_bucket_with_the_platforms_credentials(ceph, versioned, key, monkeypatch):
    url = f"s3://{versioned._name}?endpoint={ceph.url}&probe=0&requester_pays=1"
    store = open_s3(url)
    with pytest.raises(ConfigError, match="no AWS credentials"):
        store.ping()
    store.close()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ceph.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ceph.secret_key)
    store = open_s3(url)

    store.ping()

    assert store.has_versions
    assert store.conditions == {"read", "tag", "copy-source", "delete"}
    pin = put(store, key, b"x")
    assert fetch(store, pin)[1] == b"x"
    store.close()


def test_credentials_that_are_renewed_are_used(ceph_site, versioned, key):
    current = [Credentials("test", "outdated")]
    store = S3Store(
        versioned._name,
        endpoint=ceph_site.url,
        credentials=lambda: current[0],
        connections=ceph_site.connections,
    )
    with pytest.raises(Denied):
        store.ping()

    current[0] = Credentials(*ceph_site.keys)

    store.ping()


def test_metadata_survives_in_any_language(versioned, key):
    metadata = {
        "a": "naïve 日本",
        "b": " spaces ",
        "c": "=?no?",
        "d": "line\r\nX-Injected: 1",
        "e": "",
    }

    pin = put(versioned, key, b"x", metadata=metadata)

    assert versioned.stat(pin.ref).metadata == metadata
    with pytest.raises(Unsupported):
        put(versioned, key, b"x", metadata={"a: b\r\nc": "1"})


def test_nobody_smuggles_a_header(versioned, key):
    pin = put(versioned, key, b"x")

    with pytest.raises(Unsupported):
        put(versioned, key, b"x", headers={"content-type": "a\r\nx-amz-acl: public-read"})
    with pytest.raises(Changed):
        fetch(versioned, ObjectRef(pin.bucket, key, etag='x"\r\nRange: bytes=0-0'))
    with pytest.raises(NotFound):
        fetch(versioned, ObjectRef(pin.bucket, key, version_id="x&acl\r\n"))
    with pytest.raises(Unsupported):
        versioned.replace_tags(pin, {"a": "lone \ud800"})
    with pytest.raises(Unsupported):
        versioned.list("lone \ud800")


@pytest.mark.parametrize("cursor", ["x", "[]", "1", '["a", 1]', "null"])
def test_what_is_no_cursor_is_refused(versioned, unversioned, cursor):
    for store in (versioned, unversioned):
        with pytest.raises(Unsupported):
            store.list(cursor=cursor)


def test_a_bucket_that_may_only_be_written_takes_objects(versioned, key, proxy):
    proxy.answer("(HEAD|GET) ", 403, "AccessDenied", times=9)

    pin = put(versioned, key, b"x")

    proxy.clear()
    assert versioned.stat(pin.ref).identity == pin.identity


def test_a_range_other_than_the_one_asked_for_is_not_taken(versioned, key, proxy):
    pin = put(versioned, key, b"0123456789")
    headers = {
        "Content-Range": "bytes 0-1/10",
        "ETag": f'"{pin.etag}"',
        "Last-Modified": "Sat, 21 Nov 2026 02:05:44 GMT",
        "x-amz-version-id": pin.version_id,
    }
    proxy.fail("GET", "answer", status=206, body="01", headers=headers)
    accept = Acceptor()

    with pytest.raises(Unavailable, match="another range"):
        versioned.read(pin, accept, start=4, length=2)

    assert accept.infos == []
    accept.close()


def test_put_of_a_file_range_leaves_the_rest(versioned, key):
    with file_of(b"x" * 100_000) as fd:
        pin = versioned.put(key, fd, 70_000)

    assert fetch(versioned, pin)[1] == b"x" * 70_000
