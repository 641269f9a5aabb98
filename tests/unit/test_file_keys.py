"""Every key has its own path and every path its own key."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bucketward.errors import Unsupported
from bucketward.stores.file import PRIVATE, key_of, names_of

QUOTE, MORE = "\U0010fe00", "\U0010fe01"


def escaped(data: bytes) -> str:
    return "".join(chr(0x10FF00 + byte) for byte in data)


TEXTS = [
    "/",
    "/",
    ".",
    "..",
    "a",
    " ",
    "é",
    "e\u0301",
    PRIVATE,
    "\n",
    "\\",
    "🧪",
    "x" * 120,
    "é" * 124,
]
MARKS = [
    QUOTE,
    MORE,
    escaped(b"\xff"),
    escaped(b"A"),
    escaped(b"/"),
    escaped(b"."),
    escaped(b"\0"),
    escaped(QUOTE.encode()),
    escaped(MORE.encode()),
    escaped("é".encode()),
    escaped(PRIVATE.encode()),
    escaped(b"\xff" * 200),
]
plain_keys = st.one_of(
    st.lists(st.sampled_from(TEXTS), min_size=1, max_size=12).map("".join),
    st.text(
        st.characters(exclude_categories=["Cs"], max_codepoint=0x10FDFF), min_size=1, max_size=300
    ),
).filter(lambda key: "\0" not in key and len(key.encode()) <= 1024)
any_keys = st.one_of(
    st.lists(st.sampled_from(TEXTS + MARKS), min_size=1, max_size=12).map("".join),
    st.text(min_size=1),
).filter(lambda key: len(key.encode()) <= 1024)
NAMES = [text.encode() for text in TEXTS + MARKS if "/" not in text]
NAMES += [b"\xff", b"\xf4\x8f", b"\xf4\x8f\xb8", b"\xed\xa0\x80", b"\xc0\xaf", b"x" * 251]
some_names = st.one_of(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=8).map(b"".join),
    st.binary(min_size=1, max_size=255),
    # What continues in the next name, or looks so.
    st.integers(240, 251).map(lambda n: b"x" * n + MORE.encode()),
    st.integers(120, 125).map(lambda n: "é".encode() * n + MORE.encode()),
).filter(lambda name: len(name) <= 255 and not {0, 0x2F} & set(name) and name not in {b".", b".."})
some_paths = st.lists(some_names, min_size=1, max_size=8).filter(lambda p: p[0] != PRIVATE.encode())


def check_names(names: list[bytes]) -> None:
    assert names
    assert names[0] != PRIVATE.encode()
    for name in names:
        assert 1 <= len(name) <= 255
        assert name not in {b".", b".."}
        assert b"/" not in name
        assert b"\0" not in name


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("a/b c.txt", [b"a", b"b c.txt"]),
        ("ünï/🧪", ["ünï".encode(), "🧪".encode()]),
        ("a%20b+c", [b"a%20b+c"]),
        ("sub/.bucketward/x", [b"sub", b".bucketward", b"x"]),
        (".bucketward/x", [f"{QUOTE}.bucketward".encode(), b"x"]),
        ("/a", [QUOTE.encode(), b"a"]),
        ("a//b/", [b"a", QUOTE.encode(), b"b", QUOTE.encode()]),
        ("../.", [f"{QUOTE}..".encode(), f"{QUOTE}.".encode()]),
        ("k" * 300, [b"k" * 251 + MORE.encode(), b"k" * 49]),
        ("x" + "é" * 140, [b"x" + "é".encode() * 125 + MORE.encode(), "é".encode() * 15]),
        (escaped(b"\xff") + "a", [b"\xffa"]),
        (escaped(QUOTE.encode()), [QUOTE.encode()]),
        (escaped(QUOTE.encode()) + "real", [f"{QUOTE}real".encode()]),
        (f"{QUOTE}a", [f"{QUOTE}{QUOTE}a".encode()]),
        (escaped(b"A"), [f"{QUOTE}{escaped(b'A')}".encode()]),
    ],
)
def test_a_key_has_this_path_and_the_path_this_key(key: str, names: list[bytes]):
    assert names_of(key) == names
    assert key_of(names) == key


@given(plain_keys)
@settings(max_examples=150, deadline=None)
def test_every_key_without_our_own_characters_has_a_path_of_its_own(key: str):
    names = names_of(key)

    check_names(names)
    assert key_of(names) == key


@given(any_keys)
@settings(max_examples=300, deadline=None)
@example(QUOTE * 256)
@example(escaped(f"{QUOTE}".encode()) * 64)
@example("x" * 251 + escaped(MORE.encode()) + "/" + "y" * 20)
def test_any_key_has_a_path_of_its_own_or_none(key: str):
    try:
        names = names_of(key)
    except Unsupported:
        assert any(reason in key for reason in ("\0", MORE, escaped(MORE.encode())))
        return

    check_names(names)
    assert key_of(names) == key


@given(some_paths)
@settings(max_examples=300, deadline=None)
@example([b"x" * 251 + MORE.encode(), b"short"])
@example([b"x" * 251 + MORE.encode(), b"shrt"])
@example([b"x" * 251 + MORE.encode()] * 9)
@example([MORE.encode(), MORE.encode()])
@example([QUOTE.encode()])
@example([QUOTE.encode() + escaped(QUOTE.encode()).encode()])
def test_every_path_has_a_key_of_its_own(names: list[bytes]):
    key = key_of(names)

    key.encode()
    assert names_of(key) == names


@pytest.mark.parametrize("key", ["", "a\0b", "lone \udc80"])
def test_what_is_no_key_has_no_path(key: str):
    with pytest.raises(Unsupported):
        names_of(key)


def test_names_that_all_continue_are_decoded_in_no_time():
    names = [b"x" * 251 + MORE.encode()] * 2000

    assert key_of(names).count("/") == 1999
