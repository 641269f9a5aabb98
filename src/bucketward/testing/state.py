"""What every state has to keep: subclass `StateSuite` with the fixture `state`."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Any, TypeVar

import pytest

from bucketward.errors import Changed, Unavailable, Unsupported
from bucketward.interfaces import State
from bucketward.model import Add, Delete, Page, Put, Record

T = TypeVar("T")

LIMIT = 256 * 1024

TEXTS = (
    "plain",
    "Plain",
    " plain",
    "plain ",
    "with/slashes//and/../dots",
    "line\nend and\r\n more\t\x1b",
    'it\'s "quoted" `so` [and] so',
    "%",
    "_",
    "pl_in",
    "pla%",
    "back\\slash",
    "a#b|c:d,e;f?g&h=i+j%20k",
    "'; DROP TABLE results; --",
    "{}",
    "null",
    "0",
    "00",
    "1e3",
    "\xe9 in one",
    "e\u0301 in two",
    "stra\xdfe",
    "strasse",
    "\u65e5\u672c\u8a9e \u202eright to left\u202c",
    "\ufeff\u2028\u2029\x85",
    "not a character \uffff",
    "\U0001f9a0",
    "nul \x00 inside",
    "nul \x00",
    "nul ",
    "\x00",
    "lone \ud800 surrogate",
    "lone \udcff surrogate",
    "surrogates in a pair \ud83e\udda0",
)
"""No two of these are the same: object keys, and so ours, are any text, file names included."""

IN_ORDER = (
    "\x00",
    "\x00\x00",
    "\x01",
    " ",
    "!",
    "%",
    "0",
    "10",
    "2",
    "A",
    "Z",
    "_",
    "a",
    "a\x00",
    "a\x00b",
    "a ",
    "aa",
    "b",
    "~",
    "\x7f",
    "\x80",
    "\xe9",
    "\u0130",
    "\u4e00",
    "\ud7ff",
    "\ud800",
    "\udfff",
    "\ue000",
    "\uffff",
    "\U00010000",
    "\U0001f9a0",
    "\U0010ffff",
)
"""In the order of code points; in that of UTF-16 the last three come before two others."""


def put(
    key: str,
    *,
    version: int | None = None,
    body: str = "{}",
    day: str | None = None,
    sort: str = "",
) -> Put:
    """Return a put into the table ``results``."""
    indexes = {} if day is None else {"day": (day, sort)}
    return Put("results", Record(key, body, indexes=indexes), version)


class StateSuite:
    """Fixture `state`: open with `TABLES`, empty, and closed by the subclass afterwards.

    The attributes describe it.  Keys of up to 1,300 bytes, sorts of up to 1,024 and index values
    of up to 300 are tried: an object's key has to fit into each.
    """

    TABLES: Mapping[str, Sequence[str]] = {
        "results": ("day", "bucket"),
        "counters": (),
        "other": ("day",),
    }

    lag = 0.0
    """How many seconds `query` and `export` may be behind a commit (DynamoDB: some)."""

    expiry = 2.0
    """Within how many seconds of `expires_at` an expired record is no longer returned."""

    many = 1000
    """How many records "many" are."""

    @pytest.fixture
    def state(self) -> Iterable[State]:
        raise NotImplementedError("a subclass says which state")

    def reopen(self, state: State) -> State:
        """Close and open again; a state that is gone when it is closed returns it as it is."""
        return state

    # Reading by key

    def test_what_was_put_comes_back_whole(self, state: State) -> None:
        record = Record(
            "key",
            '{"a": [1, 2.50, null, true], "b": "\\u00e9\\u0000"}',
            indexes={"day": ("2024-02-29", "12:00"), "bucket": ("s3://b", "key")},
            expires_at=datetime(2999, 12, 31, 23, 59, 58, 999_999, tzinfo=UTC),
        )
        state.commit([Put("results", record)])
        found = self.reopen(state).get("results", ["key"])

        assert found == {
            "key": Record("key", record.body, 1, dict(record.indexes), record.expires_at)
        }
        assert dict(found["key"].indexes) == dict(record.indexes)

    def test_a_time_of_another_zone_comes_back_as_the_same_moment(self, state: State) -> None:
        far = datetime(2999, 1, 1, 5, 30, tzinfo=timezone(timedelta(hours=5, minutes=30)))
        state.commit([Put("results", Record("key", "{}", expires_at=far))])
        found = state.get("results", ["key"])["key"].expires_at

        assert found == far
        assert found is not None
        assert found.utcoffset() == timedelta(0)

    def test_absent_keys_are_absent(self, state: State) -> None:
        state.commit([put("there")])

        assert set(state.get("results", ["absent", "there", "ther", "there "])) == {"there"}
        assert state.get("results", ["absent"]) == {}
        assert state.get("results", []) == {}
        assert set(state.get("results", ["there", "there"])) == {"there"}

    def test_a_hundred_keys_are_read_at_once_and_no_more(self, state: State) -> None:
        keys = [f"key{i}" for i in range(100)]
        state.commit([put(key, body=f'"{key}"') for key in keys])
        found = state.get("results", keys)

        assert {key: json.loads(record.body) for key, record in found.items()} == {
            key: key for key in keys
        }
        with pytest.raises(Unsupported):
            state.get("results", [*keys, "one more"])

    def test_a_read_sees_every_commit_before_it(self, state: State) -> None:
        with ThreadPoolExecutor(1) as other:
            for number in range(1, 31):
                state.commit([put("key", body=str(number))])
                record = other.submit(state.get, "results", ["key"]).result()["key"]
                assert (record.version, record.body) == (number, str(number))

    def test_tables_do_not_mix(self, state: State) -> None:
        state.commit(
            [
                Put("results", Record("key", "1", indexes={"day": ("d", "s")}), 0),
                Put("other", Record("key", "2", indexes={"day": ("d", "s")}), 0),
                Add("counters", "key", {"n": 3}),
            ]
        )
        state.commit([Delete("results", "key", 1)])

        assert state.get("results", ["key"]) == {}
        assert state.get("other", ["key"])["key"].body == "2"
        assert fields(state, "counters", "key") == {"n": 3}
        assert self.keys(state, "results", "day", "d") == []
        assert self.keys(state, "other", "day", "d") == ["key"]

    @pytest.mark.parametrize("text", TEXTS, ids=ascii)
    def test_any_text_is_a_key(self, state: State, text: str) -> None:
        bodies = {other: str(number) for number, other in enumerate(TEXTS)}
        state.commit([put(other, body=body) for other, body in bodies.items()])
        bodies[text] = '"found"'
        state.commit([put(text, version=1, body=bodies[text])])
        state = self.reopen(state)

        found = state.get("results", TEXTS)
        assert {key: (record.key, record.body) for key, record in found.items()} == {
            key: (key, body) for key, body in bodies.items()
        }
        state.commit([Delete("results", text, 2)])
        assert set(state.get("results", TEXTS)) == set(TEXTS) - {text}

    @pytest.mark.parametrize("key", ["x" * 1300, "\U0001f9a0" * 325, "/" * 1300], ids=len)
    def test_a_long_key_is_a_key(self, state: State, key: str) -> None:
        near = [key, key[:-1], key[:-1] + "y"]
        state.commit([put(one, body=json.dumps(one[-2:])) for one in near])

        assert {k: json.loads(r.body) for k, r in state.get("results", near).items()} == {
            one: one[-2:] for one in near
        }

    @pytest.mark.parametrize(
        "body",
        [
            "{}",
            "[]",
            '""',
            "null",
            ' { "b" : 1 ,\n\t"a" : 1.0 , "A" : 1e2 } ',
            '{"": "", " ": "\\u0000\\ud800\\\\\\"", "\u2028": "\U0001f9a0"}',
            '{"n": 123456789012345678901234567890, "m": -0.1}',
            '{"deep": ' + "[" * 200 + "]" * 200 + "}",
            '{"_id": 1, "$set": {"a.b": 2}, "S": "x", "#k": ":v"}',
        ],
        ids=lambda body: body[:12],
    )
    def test_a_body_comes_back_to_the_letter(self, state: State, body: str) -> None:
        state.commit([put("key", body=body)])

        assert self.reopen(state).get("results", ["key"])["key"].body == body

    def test_a_lone_surrogate_in_a_body_comes_back_as_the_same_json(self, state: State) -> None:
        value = {"lone \ud800": "\udcff surrogates \U0001f9a0"}
        state.commit([put("key", body=json.dumps(value, ensure_ascii=False))])

        assert fields(state, "results", "key") == value

    def test_a_body_may_have_256_kib_and_no_more(self, state: State) -> None:
        ascii_body = json.dumps("x" * (LIMIT - 2))
        wide_body = json.dumps("\U0001f9a0" * (LIMIT // 4 - 1) + "xx", ensure_ascii=False)
        for body in (ascii_body, wide_body):
            assert len(body.encode()) == LIMIT
            state.commit([put("key", body=body)])
            assert state.get("results", ["key"])["key"].body == body
            with pytest.raises(Unsupported) as refused:
                state.commit([put("key", body=body + " ")])
            assert refused.value.reason == "too-large"
        assert state.get("results", ["key"])["key"].version == 2

    # Conditions

    def test_version_zero_means_must_not_exist(self, state: State) -> None:
        state.commit([put("key", version=0, body="1")])
        with pytest.raises(Changed):
            state.commit([put("key", version=0, body="2")])

        assert versions(state, "key") == [("1", 1)]

    def test_a_version_means_must_be_that_one(self, state: State) -> None:
        state.commit([put("key", version=0, body="1")])
        state.commit([put("key", version=1, body="2")])
        for stale in (0, 1, 3, 1000, -1):
            with pytest.raises(Changed):
                state.commit([put("key", version=stale, body="stale")])
        state.commit([put("key", version=2, body="3")])

        assert versions(state, "key") == [("3", 3)]

    def test_a_version_of_an_absent_record_is_changed(self, state: State) -> None:
        for version in (1, 2):
            with pytest.raises(Changed):
                state.commit([put("key", version=version)])

        assert state.get("results", ["key"]) == {}

    def test_no_version_means_any(self, state: State) -> None:
        for number in range(1, 4):
            state.commit([put("key", version=None, body=str(number))])

            assert versions(state, "key") == [(str(number), number)]

    def test_the_version_in_the_record_is_ignored(self, state: State) -> None:
        state.commit([Put("results", Record("key", "1", version=7), 0)])
        state.commit([Put("results", Record("key", "2", version=7), 1)])

        assert versions(state, "key") == [("2", 2)]

    def test_a_put_replaces_the_whole_record(self, state: State) -> None:
        far = datetime(2999, 1, 1, tzinfo=UTC)
        state.commit(
            [Put("results", Record("key", '{"a": 1}', 0, {"day": ("d", "s")}, expires_at=far))]
        )
        state.commit([put("key", version=1, body='{"b": 2}')])

        assert state.get("results", ["key"])["key"] == Record("key", '{"b": 2}', 2)

    def test_deleting_is_conditional_only_if_asked(self, state: State) -> None:
        state.commit([put("a"), put("b"), put("c"), put("c2")])
        state.commit([put("a", version=1)])
        for stale in (0, 1, 3):
            with pytest.raises(Changed):
                state.commit([Delete("results", "a", stale)])
        state.commit([Delete("results", "a", 2), Delete("results", "b")])

        assert set(state.get("results", ["a", "b", "c", "c2"])) == {"c", "c2"}

    def test_deleting_what_is_absent_is_fine_unless_a_version_is_given(self, state: State) -> None:
        state.commit([Delete("results", "absent")])
        for version in (0, 1):
            with pytest.raises(Changed):
                state.commit([Delete("results", "absent", version)])

    def test_versions_begin_anew_after_a_delete(self, state: State) -> None:
        state.commit([put("key")])
        state.commit([put("key")])
        state.commit([Delete("results", "key", 2)])
        state.commit([put("key", version=0, body='"new"')])

        assert versions(state, "key") == [('"new"', 1)]

    def test_what_is_committed_is_a_copy(self, state: State) -> None:
        indexes = {"day": ("d", "s")}
        state.commit([Put("results", Record("key", "1", indexes=indexes))])
        indexes["day"] = ("e", "t")
        indexes["bucket"] = ("b", "s")

        assert dict(state.get("results", ["key"])["key"].indexes) == {"day": ("d", "s")}
        state.commit([put("key", body="2")])
        assert self.keys(state, "results", "day", "d") == []

    # Counters

    def test_adding_makes_the_record_and_adds(self, state: State) -> None:
        state.commit([Add("counters", "key", {"Clean": 1, "bytes": 0})])
        assert fields(state, "counters", "key") == {"Clean": 1, "bytes": 0}
        state.commit([Add("counters", "key", {"Clean": 2, "Infected": 5, "bytes": -7})])
        state.commit([Add("counters", "key", {"Infected": -6})])
        record = self.reopen(state).get("counters", ["key"])["key"]

        assert json.loads(record.body) == {"Clean": 3, "Infected": -1, "bytes": -7}
        assert record.version == 3

    def test_sums_are_exact_beyond_what_a_float_can_hold(self, state: State) -> None:
        large = 2**53
        for amount in (large, 1, large * 1000, 1):
            state.commit([Add("counters", "key", {"bytes": amount})])

        assert fields(state, "counters", "key") == {"bytes": large * 1001 + 2}

    def test_counters_may_have_any_name(self, state: State) -> None:
        names = [text for text in TEXTS if text.isascii()]
        names += [
            "",
            "a.b",
            "a[0]",
            '"',
            "$.a",
            "#a",
            ":a",
            "\xe9",
            "size",
            "version",
            "\U0001f9a0",
        ]
        state.commit([Add("counters", "key", dict.fromkeys(names, 1))])
        for name in names:
            state.commit([Add("counters", "key", {name: 2})])

        assert fields(state, "counters", "key") == dict.fromkeys(names, 3)

    def test_adding_keeps_the_rest_of_the_record(self, state: State) -> None:
        far = datetime(2999, 1, 1, tzinfo=UTC)
        body = {"name": "\xe9\U0001f9a0\x00\ud800", "list": [1.5, {"n": 1}], "n": 1, "big": 10**25}
        indexes = {"day": ("d", "s")}
        state.commit([Put("results", Record("key", json.dumps(body), 0, indexes, far))])
        state.commit([Add("results", "key", {"n": 41, "m": 1})])
        record = state.get("results", ["key"])["key"]

        assert json.loads(record.body) == {**body, "n": 42, "m": 1}
        assert (record.version, dict(record.indexes), record.expires_at) == (2, indexes, far)
        assert self.keys(state, "results", "day", "d") == ["key"]

    def test_an_add_counts_as_a_write(self, state: State) -> None:
        state.commit([put("key", version=0, body='{"n": 1}')])
        state.commit([Add("results", "key", {"n": 1})])
        with pytest.raises(Changed):
            state.commit([put("key", version=1, body='{"n": 0}')])

        assert fields(state, "results", "key") == {"n": 2}

    @pytest.mark.parametrize("body", ['{"n": "1"}', '{"n": 1.5}', '{"n": true}', "[1]", "1"])
    def test_adding_to_what_is_no_integer_is_refused(self, state: State, body: str) -> None:
        state.commit([put("key", body=body)])
        with pytest.raises(Unsupported):
            state.commit([put("company"), Add("results", "key", {"n": 1})])

        assert versions(state, "key") == [(body, 1)]
        assert state.get("results", ["company"]) == {}

    def test_adding_cannot_make_a_body_too_large(self, state: State) -> None:
        body = json.dumps({"x": "x" * (LIMIT - 100)})
        state.commit([put("key", body=body)])
        with pytest.raises(Unsupported) as refused:
            state.commit([put("company"), Add("results", "key", {"n" * 100: 1})])

        assert refused.value.reason == "too-large"
        assert versions(state, "key") == [(body, 1)]
        assert state.get("results", ["company"]) == {}

    def test_a_result_that_is_delivered_twice_counts_once(self, state: State) -> None:
        changes: list[Put | Delete | Add] = [
            put("scan", version=0),
            Add("counters", "day", {"Clean": 1, "bytes": 100}),
            Put("other", Record("note", "{}"), 0),
        ]
        state.commit(changes)
        for again in (changes, changes[::-1]):
            with pytest.raises(Changed):
                state.commit(again)

        assert fields(state, "counters", "day") == {"Clean": 1, "bytes": 100}

    # All or nothing

    @pytest.mark.parametrize(
        "failing",
        [
            put("there", version=0),
            put("there", version=2),
            put("absent", version=1),
            Delete("results", "there", 2),
            Delete("results", "absent", 1),
            Add("results", "text", {"n": 1}),
            put("large", body=json.dumps("x" * LIMIT)),
            Put("nowhere", Record("key", "{}")),
            Delete("nowhere", "key"),
            Add("nowhere", "key", {"n": 1}),
            Put("results", Record("key", "{}", indexes={"nothing": ("v", "s")})),
            Put("counters", Record("key", "{}", indexes={"day": ("v", "s")})),
            put("new"),
        ],
        ids=lambda change: f"{type(change).__name__}-{change.table}",
    )
    @pytest.mark.parametrize("place", [0, 2, 4])
    def test_one_change_that_fails_undoes_them_all(
        self, state: State, failing: Put | Delete | Add, place: int
    ) -> None:
        state.commit(
            [
                put("there", body='{"n": 1}', day="d"),
                put("text", body='"text"', day="d"),
                put("doomed", day="d"),
                Add("counters", "sum", {"n": 1}),
            ]
        )
        before = self.everything(state)
        changes: list[Put | Delete | Add] = [
            put("new", version=0, day="d"),
            Add("counters", "sum", {"n": 10}),
            Delete("results", "doomed", 1),
            Add("counters", "other sum", {"n": 10}),
        ]
        changes.insert(place, failing)
        with pytest.raises((Changed, Unsupported)):
            state.commit(changes)

        assert self.everything(self.reopen(state)) == before
        changes.remove(failing)
        state.commit(changes)
        assert set(state.get("results", ["new", "doomed"])) == {"new"}
        assert fields(state, "counters", "sum") == {"n": 11}

    def test_the_error_names_the_first_record_that_has_changed(self, state: State) -> None:
        state.commit([put("second"), put("fourth")])
        with pytest.raises(Changed, match="second") as refused:
            state.commit(
                [put("first"), put("second", version=0), put("third"), put("fourth", version=0)]
            )

        assert "fourth" not in str(refused.value)
        assert refused.value.backend

    def test_the_error_keeps_bodies_to_itself(self, state: State) -> None:
        state.commit([put("key", body='"secret"')])
        for changes in (
            [put("key", version=0, body='"secret"')],
            [Add("results", "key", {"n": 1})],
            [put("key", body=json.dumps("secret" * LIMIT))],
        ):
            with pytest.raises((Changed, Unsupported)) as refused:
                state.commit(changes)
            assert "secret" not in str(refused.value)
            assert len(str(refused.value)) < 1000

    def test_a_hostile_key_does_not_break_the_message(self, state: State) -> None:
        for key in ("\x1b[31m\n\r\x00\ud800\u202e", "x" * 1300):
            state.commit([put(key)])
            with pytest.raises(Changed) as refused:
                state.commit([put(key, version=0)])
            assert str(refused.value).isprintable()
            assert len(str(refused.value)) < 1000

    def test_a_hundred_changes_are_one_commit_and_no_more(self, state: State) -> None:
        state.commit([put(f"old{i}") for i in range(30)])
        changes: list[Put | Delete | Add] = [
            *(put(f"new{i}", version=0, day="d") for i in range(40)),
            *(Delete("results", f"old{i}", 1) for i in range(30)),
            *(Add("counters", f"sum{i}", {"n": i}) for i in range(30)),
        ]
        before = self.everything(state)
        with pytest.raises(Unsupported):
            state.commit([*changes, put("one more")])
        assert self.everything(state) == before
        with pytest.raises(Changed):
            state.commit([*changes[:-1], Delete("results", "absent", 1)])
        assert self.everything(state) == before
        state.commit(changes)

        assert len(self.everything(state)) == 70

    def test_a_commit_of_nothing_is_fine(self, state: State) -> None:
        state.commit([])

        assert self.everything(state) == {}

    @pytest.mark.parametrize(
        "second",
        [put("key", version=None), Delete("results", "key"), Add("results", "key", {"n": 1})],
        ids=lambda change: type(change).__name__,
    )
    def test_a_record_cannot_be_changed_twice_in_one_commit(
        self, state: State, second: Put | Delete | Add
    ) -> None:
        for changes in ([put("key"), put("company"), second], [second, put("company"), put("key")]):
            with pytest.raises(Unsupported):
                state.commit(changes)
        state.commit([put("key"), Put("other", Record("key", "{}"))])

        assert set(state.get("results", ["key", "company"])) == {"key"}

    def test_what_is_not_in_the_list_is_unsupported(self, state: State) -> None:
        for refused in (
            lambda: state.get("nowhere", ["key"]),
            lambda: state.get("nowhere", []),
            lambda: state.query("nowhere", "day", "d"),
            lambda: state.query("results", "nothing", "d"),
            lambda: state.query("counters", "day", "d"),
            lambda: state.query("results", "", "d"),
            lambda: state.export("nowhere"),
            lambda: state.export(""),
            lambda: state.get('results"; --', ["key"]),
        ):
            with pytest.raises(Unsupported):
                refused()

    # Querying

    def test_only_the_exact_value_is_found(self, state: State) -> None:
        state.commit([put(f"key{i}", day=text) for i, text in enumerate(TEXTS)])
        state.commit([put(f"more{i}", day=text) for i, text in enumerate(TEXTS)])

        for i, text in enumerate(TEXTS):
            assert self.keys(state, "results", "day", text) == [f"key{i}", f"more{i}"]
        assert self.keys(state, "results", "day", "plai") == []
        assert self.keys(state, "results", "day", "") == []
        assert self.keys(state, "results", "bucket", "plain") == []

    def test_records_come_by_sort_in_the_order_of_code_points(self, state: State) -> None:
        sorts = ["", *IN_ORDER]
        state.commit(
            [put(f"key{i}", day="d", sort=sort) for i, sort in reversed([*enumerate(sorts)])]
        )
        expected = [f"key{i}" for i in range(len(sorts))]

        assert self.keys(state, "results", "day", "d") == expected
        assert self.keys(state, "results", "day", "d", newest_first=True) == expected[::-1]
        assert self.keys(state, "results", "day", "d", limit=1) == expected
        for low, high in ((3, 20), (0, 31), (27, 32), (5, 5), (30, 4)):
            found = self.keys(state, "results", "day", "d", low=sorts[low], high=sorts[high])
            assert found == expected[low:high]

    def test_records_of_one_sort_come_by_key_in_the_order_of_code_points(
        self, state: State
    ) -> None:
        state.commit([put(key, day="d", sort="same") for key in reversed(IN_ORDER)])
        state.commit([put("a", day="d", sort="sam"), put("b", day="d", sort="samf")])
        expected = ["a", *(key for key in IN_ORDER if key not in {"a", "b"}), "b"]

        for limit in (1, 3, 100):
            found = self.keys(state, "results", "day", "d", limit=limit)
            assert found == expected
            found = self.keys(state, "results", "day", "d", limit=limit, newest_first=True)
            assert found == expected[::-1]

    def test_low_is_inclusive_and_high_exclusive(self, state: State) -> None:
        state.commit([put(c, day="d", sort=c) for c in "abcde"] + [put("c2", day="d", sort="c")])

        def found(low: str, high: str) -> str:
            forward = self.keys(state, "results", "day", "d", low=low, high=high, limit=2)
            turned = self.keys(
                state, "results", "day", "d", low=low, high=high, limit=2, newest_first=True
            )
            assert turned == forward[::-1]
            return " ".join(forward)

        assert found("", "") == "a b c c2 d e"
        assert found("c", "") == "c c2 d e"
        assert found("", "c") == "a b"
        assert found("b", "d") == "b c c2"
        assert found("b2", "c2") == "c c2"
        assert found("c", "c") == ""
        assert found("d", "b") == ""
        assert found("f", "") == ""
        assert found("", "A") == ""

    def test_a_page_is_no_longer_than_its_limit_and_the_last_has_no_cursor(
        self, state: State
    ) -> None:
        state.commit([put(f"{i:02}", day="d", sort="s") for i in range(20)])
        self.settle(lambda: len(state.query("results", "day", "d").items) == 20)

        for limit in (1, 7, 10, 19, 20, 21):
            pages = self.found(state, "results", "day", "d", limit=limit)
            assert max(len(page.items) for page in pages) <= limit
            assert [r.key for page in pages for r in page.items] == [f"{i:02}" for i in range(20)]
            assert len(pages) <= 20 // limit + 2
        assert state.query("results", "day", "absent").cursor == ""

    def test_records_made_between_two_pages_move_none_of_the_others(self, state: State) -> None:
        for newest_first in (False, True):
            day = f"day {newest_first}"
            keys = [f"{day}{i:02}" for i in range(10, 40)]
            state.commit([put(key, day=day, sort=key[-2]) for key in keys])
            assert self.keys(state, "results", "day", day) == keys
            seen: list[str] = []
            cursor = ""
            for number in range(100):
                page = state.query(
                    "results", "day", day, after=cursor, limit=4, newest_first=newest_first
                )
                seen += [record.key for record in page.items]
                if not (cursor := page.cursor):
                    break
                here = seen[-1]
                state.commit(
                    [
                        put(f"{day}00 {number}", day=day, sort="0"),
                        put(f"{day}99 {number}", day=day, sort="9"),
                        put(f"{here}+{number}", day=day, sort=here[len(day)]),
                        put(f"{here[:-1]} {number}", day=day, sort=here[len(day)]),
                    ]
                )

            assert len(seen) == len(set(seen))
            old = [key for key in seen if key in keys]
            assert old == (keys[::-1] if newest_first else keys)

    def test_paging_goes_on_where_the_last_record_was_removed(self, state: State) -> None:
        keys = [f"{i:02}" for i in range(20)]
        state.commit([put(key, day="d", sort="s") for key in keys])
        self.settle(lambda: len(state.query("results", "day", "d").items) == 20)
        seen: list[str] = []
        cursor = ""
        while True:
            page = state.query("results", "day", "d", after=cursor, limit=3)
            seen += [record.key for record in page.items]
            if not (cursor := page.cursor):
                break
            state.commit([Delete("results", record.key, 1) for record in page.items])

        assert seen == keys

    def test_a_cursor_is_text_that_outlives_the_state(self, state: State) -> None:
        state.commit([put(key, day="d", sort=key) for key in IN_ORDER])
        self.settle(lambda: len(state.query("results", "day", "d").items) == len(IN_ORDER))
        first = state.query("results", "day", "d", limit=10, low=" ")
        exported = state.export("results")
        state = self.reopen(state)
        second = state.query("results", "day", "d", limit=100, low=" ", after=first.cursor)

        assert isinstance(first.cursor, str)
        assert first.cursor.isascii()
        found = [record.key for page in (first, second) for record in page.items]
        assert found == list(IN_ORDER[3:])
        assert exported.cursor == "" or state.export("results", exported.cursor) is not None

    @pytest.mark.parametrize(
        "cursor",
        [
            "x",
            "\x00",
            "\ud800",
            "' OR 1=1 --",
            "bnVsbA==",
            "W10=",
            "WzEsMl0=",
            "W1tdLHt9XQ==",
            "===",
        ],
        ids=ascii,
    )
    def test_a_cursor_from_elsewhere_is_unsupported(self, state: State, cursor: str) -> None:
        state.commit([put("key", day="d")])
        with pytest.raises(Unsupported):
            state.query("results", "day", "d", after=cursor)
        with pytest.raises(Unsupported):
            state.export("results", cursor)

    @pytest.mark.parametrize("newest_first", [False, True])
    def test_no_cursor_leads_out_of_the_bounds(self, state: State, newest_first: bool) -> None:
        state.commit([put(c, day="d", sort=c) for c in "abcdefgh"])
        state.commit([put("secret", day="e", sort="d")])
        self.settle(lambda: len(state.query("results", "day", "d").items) == 8)

        for limit in range(1, 8):
            for turned in (False, True):
                other = state.query("results", "day", "d", limit=limit, newest_first=turned)
                try:
                    page = state.query(
                        "results",
                        "day",
                        "d",
                        low="c",
                        high="f",
                        after=other.cursor,
                        newest_first=newest_first,
                    )
                except Unsupported:
                    continue
                assert {record.key for record in page.items} <= set("cde")

    def test_changing_its_indexes_moves_a_record(self, state: State) -> None:
        def write(**indexes: tuple[str, str]) -> None:
            state.commit([Put("results", Record("key", "{}", indexes=indexes))])

        def found() -> list[list[str]]:
            return [
                self.keys(state, "results", "day", "monday"),
                self.keys(state, "results", "day", "tuesday"),
                self.keys(state, "results", "bucket", "b", low="m"),
            ]

        write(day=("monday", "s"))
        assert found() == [["key"], [], []]
        write(day=("tuesday", "s"), bucket=("b", "z"))
        assert found() == [[], ["key"], ["key"]]
        write(day=("tuesday", "t"), bucket=("b", "a"))
        assert found() == [[], ["key"], []]
        write(bucket=("b", "m"))
        assert found() == [[], [], ["key"]]
        write()
        assert found() == [[], [], []]
        assert state.get("results", ["key"])["key"].version == 5

    def test_a_record_that_is_gone_is_not_found(self, state: State) -> None:
        state.commit([put("a", day="d"), put("b", day="d"), put("none")])
        assert self.keys(state, "results", "day", "d") == ["a", "b"]
        state.commit([Delete("results", "a", 1)])

        assert self.keys(state, "results", "day", "d") == ["b"]

    def test_a_query_returns_whole_records(self, state: State) -> None:
        record = Record(
            "key \x00\ud800",
            '{"a": 1}',
            1,
            {"day": ("d \ud800", "s \x00"), "bucket": ("b", "")},
            datetime(2999, 1, 1, tzinfo=UTC),
        )
        state.commit([Put("results", record)])
        self.settle(lambda: bool(state.query("results", "day", "d \ud800").items))

        for page in (
            state.query("results", "day", "d \ud800"),
            state.query("results", "bucket", "b"),
            state.export("results"),
        ):
            (found,) = page.items
            assert found == record
            assert dict(found.indexes) == dict(record.indexes)

    def test_the_longest_texts_are_found_in_order(self, state: State) -> None:
        value = "v" * 300
        sorts = ["x" * 1023 + end for end in "abc"]
        keys = ["k" * 1299 + end for end in "abc"]
        state.commit([put(key, day=value, sort=sorts[1]) for key in reversed(keys)])
        state.commit([put("low", day=value, sort=sorts[0]), put("high", day=value, sort=sorts[2])])
        state.commit([put("other", day=value[:-1] + "w", sort=sorts[1])])

        for limit in (1, 100):
            found = self.keys(state, "results", "day", value, limit=limit)
            assert found == ["low", *keys, "high"]
        found = self.keys(state, "results", "day", value, low=sorts[1], high=sorts[2])
        assert found == keys

    def test_many_large_records_come_in_pages(self, state: State) -> None:
        body = json.dumps("x" * (LIMIT - 2))
        keys = [f"{i:02}" for i in range(20)]
        for key in keys:
            state.commit([put(key, body=body, day="d", sort=key)])

        assert self.keys(state, "results", "day", "d") == keys
        assert self.keys(state, "results", "day", "d", newest_first=True) == keys[::-1]
        assert [record.key for record in self.exported(state, "results")] == keys
        assert len(state.get("results", keys)) == 20

    # Expiry

    def test_expired_records_vanish(self, state: State) -> None:
        now = datetime.now(UTC)
        for i, seconds in enumerate((-86400.0, -1.0, 0.3)):
            when = now + timedelta(seconds=seconds)
            record = Record(f"key{i}", "{}", 0, {"day": ("d", "")}, when)
            state.commit([Put("results", record)])
        far = now + timedelta(hours=1)
        state.commit([Put("results", Record("kept", "{}", 0, {"day": ("d", "")}, far))])
        time.sleep(0.4)
        keys = ["key0", "key1", "key2", "kept"]
        found = wait_for(lambda: set(state.get("results", keys)) <= {"kept"}, self.expiry)

        assert found
        assert set(state.get("results", keys)) == {"kept"}
        assert self.keys(state, "results", "day", "d") == ["kept"]
        assert [record.key for record in self.exported(state, "results")] == ["kept"]

    def test_what_expired_counts_as_absent(self, state: State) -> None:
        past = datetime.now(UTC) - timedelta(seconds=60)

        def expired(key: str) -> Put:
            indexes = {"day": ("d", "old")}
            return Put("results", Record(key, '{"n": 1}', indexes=indexes, expires_at=past))

        state.commit([expired(key) for key in ("put", "stale", "add", "delete")])
        wait_for(lambda: not state.get("results", ["put", "stale", "add", "delete"]), self.expiry)
        with pytest.raises(Changed):
            state.commit([put("stale", version=1)])
        with pytest.raises(Changed):
            state.commit([Delete("results", "delete", 1)])
        state.commit(
            [
                put("put", version=0, body='"new"'),
                Add("results", "add", {"n": 1}),
                Delete("results", "delete"),
            ]
        )

        assert versions(state, "put") == [('"new"', 1)]
        assert versions(state, "add") == [('{"n":1}', 1)]
        assert set(state.get("results", ["stale", "delete"])) == set()
        assert self.keys(state, "results", "day", "d") == []

    def test_many_expired_records_do_not_hide_the_others(self, state: State) -> None:
        past = datetime.now(UTC) - timedelta(seconds=60)
        far = datetime.now(UTC) + timedelta(days=1)
        for start in range(0, 400, 100):
            state.commit(
                [
                    Put("results", Record(f"{i:03}", "{}", 0, {"day": ("d", f"{i:03}")}, past))
                    for i in range(start, start + 100)
                ]
            )
            record = Record(f"{start:03}+", "{}", 0, {"day": ("d", f"{start:03}")}, far)
            state.commit([Put("results", record)])
        wait_for(lambda: not state.get("results", ["399"]), self.expiry)

        expected = [f"{start:03}+" for start in range(0, 400, 100)]
        assert self.keys(state, "results", "day", "d", limit=2) == expected
        assert [record.key for record in self.exported(state, "results")] == expected

    # Exporting

    def test_an_export_returns_every_record_once(self, state: State) -> None:
        expected: dict[str, str] = {}
        for start in range(0, self.many, 100):
            changes = [put(f"key{i}", body=str(i), day="d") for i in range(start, start + 100)]
            state.commit(changes)
            expected |= {change.record.key: change.record.body for change in changes}
        state.commit([put(text, body="-1") for text in TEXTS])
        expected |= dict.fromkeys(TEXTS, "-1")
        state.commit([Put("other", Record("elsewhere", "{}")), Delete("results", "key7")])
        del expected["key7"]
        state = self.reopen(state)
        found = self.exported(state, "results")

        assert Counter(record.key for record in found) == Counter(list(expected))
        assert {record.key: record.body for record in found} == expected
        assert [record.key for record in self.exported(state, "other")] == ["elsewhere"]
        assert self.exported(state, "counters") == []

    def test_an_export_copes_with_changes_between_its_pages(self, state: State) -> None:
        for start in range(0, self.many, 100):
            state.commit([put(f"{i:05}") for i in range(start, start + 100)])
        self.settle(lambda: len(self.exported(state, "results")) == self.many)
        seen: list[str] = []
        for number, page in enumerate(self.pages(lambda c: state.export("results", c))):
            seen += [record.key for record in page.items]
            if number < 20:
                state.commit(
                    [put(f"{i:05} {number}") for i in range(0, self.many, self.many // 50)]
                )
                state.commit([put(key) for key in seen[:5]])

        assert len(seen) == len(set(seen))
        assert {f"{i:05}" for i in range(self.many)} <= set(seen)

    # Many at once

    def test_of_two_writers_one_has_changed(self, state: State) -> None:
        state.commit([put("key", version=0)])
        for version in range(1, 21):
            outcomes = at_once(
                [
                    partial(attempt, state, [put("key", version=version, body=str(n))])
                    for n in range(2)
                ]
            )

            assert sorted(outcomes) == [False, True]
            assert versions(state, "key") == [(str(outcomes.index(True)), version + 1)]

    def test_of_eight_that_make_a_record_one_does(self, state: State) -> None:
        for number in range(5):
            outcomes = at_once(
                [
                    partial(
                        attempt,
                        state,
                        [
                            put(f"lease{number}", version=0, body=str(i)),
                            Add("counters", "n", {"n": 1}),
                        ],
                    )
                    for i in range(8)
                ]
            )

            assert sum(outcomes) == 1
            assert versions(state, f"lease{number}") == [(str(outcomes.index(True)), 1)]
        assert fields(state, "counters", "n") == {"n": 5}

    def test_eight_threads_add_up(self, state: State) -> None:
        def work(thread: int) -> None:
            for i in range(15):
                commit(
                    state,
                    [
                        Add("counters", "shared", {"n": 1, f"thread {thread}": i}),
                        Add("counters", "bytes", {"sum": 10**12 + thread}),
                    ],
                )

        at_once([partial(work, n) for n in range(8)])

        assert fields(state, "counters", "shared") == {
            "n": 120,
            **{f"thread {n}": sum(range(15)) for n in range(8)},
        }
        assert fields(state, "counters", "bytes") == {"sum": 120 * 10**12 + 15 * sum(range(8))}
        assert state.get("counters", ["shared"])["shared"].version == 120

    def test_eight_threads_increment_by_reading_and_trying_again(self, state: State) -> None:
        state.commit([put("key", version=0, body="0")])

        def work() -> None:
            for _ in range(4):
                while True:
                    record = state.get("results", ["key"])["key"]
                    body = str(int(record.body) + 1)
                    if attempt(state, [put("key", version=record.version, body=body)]):
                        break

        at_once([work] * 8)

        assert versions(state, "key") == [("32", 33)]

    def test_eight_threads_do_everything_at_once(self, state: State) -> None:
        def work(thread: int) -> None:
            mine = f"thread {thread}"
            for i in range(12):
                keys = [f"{mine} {i} {j}" for j in range(5)]
                commit(
                    state,
                    [
                        *(put(key, version=0, day=mine, sort=key) for key in keys),
                        Add("counters", "sum", {"made": 5, "removed": 1}),
                    ],
                )
                assert set(state.get("results", keys)) == set(keys)
                commit(state, [Delete("results", keys[0], 1), put(keys[1], version=1, day="moved")])
                found = state.get("results", keys)
                assert [found[key].version for key in sorted(found)] == [2, 1, 1, 1]
                state.query("results", "day", mine, limit=10, newest_first=True)
                state.query("results", "day", "moved", limit=10)
                state.export("results")
                state.ping()

        at_once([partial(work, n) for n in range(8)])

        assert fields(state, "counters", "sum") == {"made": 480, "removed": 96}
        for thread in range(8):
            assert len(self.keys(state, "results", "day", f"thread {thread}")) == 36
        assert len(self.keys(state, "results", "day", "moved")) == 96
        assert len(self.exported(state, "results")) == 384

    # Opening and closing

    def test_everything_is_there_after_reopening(self, state: State) -> None:
        state.commit([put("a", day="d", sort="2"), put("b", day="d", sort="1"), put("c", day="d")])
        state.commit([put("a", version=1, day="d", sort="3"), Delete("results", "c")])
        state.commit([Add("counters", "n", {"n": 2})])
        state = self.reopen(state)

        assert self.keys(state, "results", "day", "d") == ["b", "a"]
        assert state.get("results", ["a"])["a"].version == 2
        with pytest.raises(Changed):
            state.commit([put("a", version=1)])
        state.commit([put("a", version=2), Add("counters", "n", {"n": 1})])
        assert fields(state, "counters", "n") == {"n": 3}

    def test_it_is_a_state_that_answers(self, state: State) -> None:
        assert isinstance(state, State)
        state.ping()
        state.ping()

    def test_closing_twice_is_fine(self, state: State) -> None:
        state.commit([put("key")])
        state.close()
        state.close()

    # What the tests above share

    def keys(
        self,
        state: State,
        table: str,
        index: str,
        value: str,
        *,
        low: str = "",
        high: str = "",
        limit: int = 100,
        newest_first: bool = False,
    ) -> list[str]:
        """Return the keys that a query finds, page after page."""
        pages = self.found(
            state, table, index, value, low=low, high=high, limit=limit, newest_first=newest_first
        )
        return [record.key for page in pages for record in page.items]

    def found(
        self, state: State, table: str, index: str, value: str, **more: Any
    ) -> list[Page[Record]]:
        """Return all pages of a query, asked after it had the time to see every commit."""
        if self.lag:
            time.sleep(self.lag)
        return list(self.pages(lambda after: state.query(table, index, value, after=after, **more)))

    def exported(self, state: State, table: str) -> list[Record]:
        """Return every record of a table."""
        if self.lag:
            time.sleep(self.lag)
        pages = self.pages(lambda cursor: state.export(table, cursor))
        return [record for page in pages for record in page.items]

    def everything(self, state: State) -> dict[tuple[str, str], Record]:
        """Return every record of every table."""
        return {
            (table, record.key): record
            for table in self.TABLES
            for record in self.exported(state, table)
        }

    def pages(self, page: Callable[[str], Page[Record]]) -> Iterable[Page[Record]]:
        """Yield page after page; a cursor that leads in a circle is an error."""
        cursors = {""}
        cursor = ""
        while True:
            found = page(cursor)
            yield found
            cursor = found.cursor
            if not cursor:
                return
            assert cursor not in cursors
            cursors.add(cursor)

    def settle(self, condition: Callable[[], bool]) -> None:
        """Wait until what was committed shows in queries."""
        assert wait_for(condition, self.lag)


def fields(state: State, table: str, key: str) -> object:
    """Return what the body of a record says."""
    return json.loads(state.get(table, [key])[key].body)


def versions(state: State, key: str) -> list[tuple[str, int]]:
    """Return body and version of a record of ``results``."""
    return [(record.body, record.version) for record in state.get("results", [key]).values()]


def commit(state: State, changes: Sequence[Put | Delete | Add]) -> None:
    """Commit, in spite of others who write the same records now."""
    # Where conflicting transactions fail instead of waiting, `Unavailable` says so.
    deadline = time.monotonic() + 60
    while True:
        try:
            state.commit(changes)
            return
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def attempt(state: State, changes: Sequence[Put | Delete | Add]) -> bool:
    """Commit, and return whether the conditions held."""
    try:
        commit(state, changes)
    except Changed:
        return False
    return True


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run all calls in threads that start together, and return what they return."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], T]) -> T:
        barrier.wait(30)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until `condition()` holds, and return whether it does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
