"""What clamd says is decoded or refused; what a container is said to be is bounded and sure."""

import os
import random
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import hostile
from bucketward.engines import containers
from bucketward.engines.clamav import CLASSIFICATION, Reply, classify, decode_reply
from bucketward.model import Reason, Verdict


@given(st.binary(max_size=200), st.integers(0, 10**6))
@example(b"1: OK", 1)
@example(b"1: stream: OK\n", 1)
@example(b"1: fd[3]: x OK", 1)
@example(b"01: fd[3]: OK ", 1)
def test_no_bytes_but_the_exact_form_are_ok(line: bytes, number: int):
    try:
        reply = decode_reply(line, number)
    except ValueError:
        return

    assert line.startswith(b"%d: " % number) or int(line.split(b":")[0]) == number
    assert reply.kind != "ok" or line.endswith((b"]: OK", b"m: OK", b"): OK"))


@given(
    st.integers(1, 10**9),
    st.sampled_from(["fd[11]", "stream", "instream(127.0.0.1@3310)"]),
    st.from_regex(r"\A[!-~]([ -~]{0,80}[!-~])?\Z"),
)
def test_a_signature_comes_out_as_it_went_in(number: int, source: str, signature: str):
    line = f"{number}: {source}: {signature} FOUND".encode()

    assert decode_reply(line, number) == Reply("found", signature)


@given(st.binary(max_size=60), st.sampled_from([b" ERROR", b" FOUND", b"OK", b": OK"]))
def test_an_answer_to_another_question_is_refused(middle: bytes, end: bytes):
    with pytest.raises(ValueError, match="not an answer"):
        decode_reply(b"7: " + middle + end, 8)


@pytest.mark.parametrize(
    ("signature", "meaning"),
    [
        ("Eicar-Test-Signature", Verdict.INFECTED),
        ("Eicar-Test-Signature.UNOFFICIAL", Verdict.INFECTED),
        ("Win.Trojan.Heuristics.Limits", Verdict.INFECTED),
        ("Heuristics.Limits.Exceeded.MaxFileSize", Reason.TOO_LARGE),
        ("Heuristics.Limits.Exceeded.MaxScanSize", Reason.ARCHIVE_LIMIT),
        ("Heuristics.Limits.Exceeded.MaxFiles", Reason.ARCHIVE_LIMIT),
        ("Heuristics.Limits.Exceeded.MaxRecursion", Reason.ARCHIVE_LIMIT),
        ("Heuristics.Limits.Exceeded.MaxScanTime", Reason.TIMED_OUT),
        ("Heuristics.Limits.Exceeded.EmailHeaders", Reason.ARCHIVE_LIMIT),
        ("Heuristics.Limits.Exceeded", Reason.ARCHIVE_LIMIT),
        ("Heuristics.Encrypted.Zip", Reason.ENCRYPTED),
        ("Heuristics.Encrypted.PDF.UNOFFICIAL", Reason.ENCRYPTED),
        ("Heuristics.Broken.Media.JPEG.CantReadMarker", Reason.CORRUPT),
        ("Heuristics.XZ.DicSizeLimit", Reason.ARCHIVE_LIMIT),
        ("Heuristics.Phishing.Email.SpoofedDomain", Verdict.SUSPICIOUS),
        ("Heuristics.Zip.OverlappingFiles", Verdict.SUSPICIOUS),
        ("PUA.Win.Packer.Upx", Verdict.SUSPICIOUS),
        ("(null)", Reason.ARCHIVE_LIMIT),
        ("", Verdict.INFECTED),
    ],
)
def test_a_signature_means_what_the_table_says(signature: str, meaning: str):
    assert classify(signature, {}) == meaning


@given(st.text(max_size=60))
def test_no_signature_means_clean(signature: str):
    assert classify(signature, {}) in {
        Verdict.INFECTED,
        Verdict.SUSPICIOUS,
        *frozenset(Reason),
    }


def test_every_meaning_in_the_table_is_a_verdict_or_a_reason():
    assert all(value in {*Verdict, *Reason} for value in CLASSIFICATION.values())


WHOLE = {
    "zip": hostile.zipped({"a": b"x" * 500, "b/": b"", "c": os.urandom(100)}),
    "zip-bz2": hostile.zipped({"a": b"x" * 500}, 12),
    "7z": hostile.seven_zip(b"x" * 500),
    "rar4": hostile.rar4(b"x" * 500),
    "rar5": hostile.rar5(b"x" * 500),
    "tar": hostile.tarred(b"x" * 500),
    "tgz": hostile.tarred(b"x" * 500, "w:gz"),
    "tbz": hostile.tarred(b"x" * 500, "w:bz2"),
    "txz": hostile.tarred(b"x" * 500, "w:xz"),
    "pdf": hostile.pdf(b"x" * 500),
    "ole2": hostile.encrypted_ooxml(b"x" * 500),
    "pdf-encrypted": hostile.pdf(b"x" * 500, encrypted=True),
    "cab": b"MSCF\0\0\0\0" + (44).to_bytes(4, "little") + bytes(32),
}


def look(body: bytes) -> containers.Problem | None:
    name = containers.kind(body[: containers.HEAD])
    if name not in containers.EXAMINED:
        return None
    fd = os.memfd_create("container", os.MFD_CLOEXEC)
    try:
        os.write(fd, body)
        started = time.monotonic()
        problem = containers.examine(fd, len(body), name)

        assert time.monotonic() - started < 5
    finally:
        os.close(fd)
    return problem


@pytest.mark.parametrize("name", [n for n in WHOLE if n not in ("ole2", "pdf-encrypted")])
def test_a_whole_container_has_no_problem(name: str):
    assert look(WHOLE[name]) is None


@pytest.mark.parametrize("name", WHOLE)
def test_a_container_cut_anywhere_has_a_problem(name: str):
    """But for what is only padding, and for the few bytes that leave the format unknown."""
    body = WHOLE[name]
    slack = {"tar": 9800, "rar4": 7, "pdf": 2, "pdf-encrypted": 2, "ole2": 0}.get(name, 0)
    start = 600 if name == "tar" else 32
    for end in range(start, len(body) - max(slack, 1), max(1, len(body) // 300)):
        assert look(body[:end]) is not None, end


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 2**32), st.integers(1, 20))
def test_examining_never_raises_and_never_takes_long(name: str, seed: int, changes: int):
    chance = random.Random(seed)
    body = bytearray(WHOLE[name])
    for _ in range(changes):
        at = chance.randrange(len(body))
        body[at : at + chance.choice([1, 1, 1, 4, 8])] = chance.choice(
            [b"\xff" * 4, bytes(8), chance.randbytes(1), b"\xff" * 8, b""]
        )
    look(bytes(body))


@given(st.binary(max_size=1100))
def test_any_beginning_has_a_kind_or_none(head: bytes):
    assert isinstance(containers.kind(head), str)
