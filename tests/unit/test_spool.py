import os
import threading
import time

import pytest

from bucketward.errors import Unavailable, Unsupported
from bucketward.spool import Spool, sha256


def read(file):
    with file.open() as opened:
        return opened.read()


@pytest.fixture
def spool(tmp_path):
    return Spool(memory=1000, disk=10_000, in_memory_below=500, directory=tmp_path / "spool")


@pytest.mark.parametrize("size", [0, 1, 499, 500, 9_999])
def test_bytes_come_back_and_cannot_be_altered(spool, size):
    data = os.urandom(size)
    with spool.reserve(size) as slot:
        os.write(slot.writable(), data)
        file = slot.seal("name")

        assert read(file) == data
        assert file.size == size
        with pytest.raises(OSError):
            os.write(file.fd, b"x")
        if size < 500:
            again = os.open(file.path, os.O_RDWR)
            with pytest.raises(PermissionError):
                os.write(again, b"x")
            os.close(again)
    assert spool.used == 0


def test_the_digest_is_the_contents(spool):
    import hashlib

    with spool.reserve(600) as slot:
        os.write(slot.writable(), b"a" * 600)
        assert sha256(slot.seal()) == hashlib.sha256(b"a" * 600).hexdigest()


def test_what_can_never_fit_is_unsupported_and_says_so(spool):
    with pytest.raises(Unsupported) as caught:
        spool.reserve(10_001)

    assert caught.value.reason == "too-large"
    assert "spool.disk" in str(caught.value)


def test_a_full_spool_makes_others_wait_and_never_overflows(spool):
    first = spool.reserve(8_000)
    assert spool.try_reserve(3_000) is None
    with pytest.raises(Unavailable):
        spool.reserve(3_000, deadline=time.monotonic() + 0.05)
    got = []
    waiter = threading.Thread(target=lambda: got.append(spool.reserve(3_000)))
    waiter.start()
    first.close()
    waiter.join(5)

    assert len(got) == 1
    assert spool.used == 3_000


def test_small_ones_do_not_starve_a_large_one(spool):
    held = spool.reserve(6_000)
    order = []

    def take(size):
        with spool.reserve(size):
            order.append(size)

    large = threading.Thread(target=take, args=(9_000,))
    large.start()
    while not spool._waiting["disk"]:
        time.sleep(0.001)
    small = threading.Thread(target=take, args=(600,))
    small.start()
    held.close()
    large.join(5)
    small.join(5)

    assert order == [9_000, 600]


def test_a_hundred_large_objects_stay_within_the_budget(spool):
    peak = 0

    def work():
        nonlocal peak
        with spool.reserve(2_000) as slot:
            os.write(slot.writable(), b"x" * 2_000)
            peak = max(peak, spool.used)

    threads = [threading.Thread(target=work) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert peak <= 11_000
    assert spool.used == 0


def test_filling_again_starts_empty(spool):
    with spool.reserve(600) as slot:
        os.write(slot.writable(), b"longer than the next")
        fd = slot.writable()
        os.pwrite(fd, b"short", 0)
        assert read(slot.seal()) == b"short"


def test_a_closed_slot_gives_its_descriptor_back(spool):
    before = len(os.listdir("/proc/self/fd"))
    for size in (10, 700):
        slot = spool.reserve(size)
        os.write(slot.writable(), b"x")
        slot.seal()
        slot.close()
        slot.close()

    assert len(os.listdir("/proc/self/fd")) == before
