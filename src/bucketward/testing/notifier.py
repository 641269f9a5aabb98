"""The conformance suite of `Notifier`: subclass it with a fixture and two hooks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from bucketward.errors import Error
from bucketward.interfaces import Notifier
from bucketward.model import Note

HOSTILE = (
    "ordinary",
    "",
    "line\nbreak\r\nand another\x0b\x0c\x1c\x85\u2028\u2029",
    "quotes \" ' ` and \\ backslashes \\n",
    "\x00\x01\x1b[31mred\x1b[0m\x7f\x9b",
    "ünïcödé 漢字 \U0001f9a0 e\u0301 \u202etxt.exe\u202c \ufeff",
    "<script>alert(1)</script> %s {0} ${x} %0d%0aSet-Cookie: a=b",
    "webhook-id: forged\r\n\r\n{}",
    "long " * 2000,
)


class NotifierSuite:
    """What every notifier does.  Yield an empty one from `notifier` and define `received`.

    A place that has no room for bodies (a chat, a format of its own) sets `keeps_bodies` to
    False; then only the ids of what arrived are compared, and the bodies are a test of its own.
    """

    keeps_bodies = True

    @pytest.fixture
    def notifier(self) -> Notifier:
        """Return a notifier that has been sent nothing yet."""
        raise NotImplementedError

    def received(self, notifier: Notifier) -> Sequence[tuple[str, str]]:
        """Return the id and the body of every note that arrived, waiting for those on the way."""
        raise NotImplementedError

    def refuse(self, notifier: Notifier, note_id: str) -> None:  # noqa: ARG002 - a hook
        """Make the place that is told fail this note from now on, and only this one."""
        pytest.skip("this notifier cannot be made to fail one note")

    def test_it_is_a_notifier(self, notifier: Notifier) -> None:
        assert isinstance(notifier, Notifier)

    def test_ping_of_a_working_one_says_nothing_and_tells_nobody(self, notifier: Notifier) -> None:
        notifier.ping()

        assert not self.received(notifier)

    def test_no_notes_are_no_work(self, notifier: Notifier) -> None:
        assert notifier.send([]) == {}
        assert not self.received(notifier)

    def test_every_note_of_a_batch_arrives(self, notifier: Notifier) -> None:
        notes = [note(f"n{i}", {"i": i}) for i in range(25)]

        assert notifier.send(notes) == {}
        self._check(notifier, {f"n{i}": {"i": i} for i in range(25)})

    def test_hostile_text_arrives_exactly_as_it_was(self, notifier: Notifier) -> None:
        plain = [note(f"p{i}", {text: [text]}) for i, text in enumerate(HOSTILE)]
        escaped = [
            note(f"e{i}", {text: [text]}, ensure_ascii=True) for i, text in enumerate(HOSTILE)
        ]

        assert notifier.send([*plain, *escaped]) == {}
        expected: dict[str, object] = {}
        for i, text in enumerate(HOSTILE):
            expected |= {f"p{i}": {text: [text]}, f"e{i}": {text: [text]}}
        self._check(notifier, expected)

    def test_hostile_subjects_types_and_attributes_disturb_nothing(
        self, notifier: Notifier
    ) -> None:
        notes = [
            Note(
                f"h{i}",
                "scanResult",
                text,
                json.dumps({"i": i}),
                {"key": text, "verdict": text, "scanResult": "Infected"},
            )
            for i, text in enumerate(HOSTILE)
        ]

        failures = notifier.send(notes)

        # A place may have no room for such an attribute; then it says so, of that note only.
        missing = set(failures)
        assert "h0" not in missing
        expected = {f"h{i}": {"i": i} for i in range(len(HOSTILE)) if f"h{i}" not in missing}
        self._check(notifier, expected)

    def test_a_note_sent_again_keeps_its_id(self, notifier: Notifier) -> None:
        again = note("the-same", {"n": 1})

        notifier.send([again])
        notifier.send([again])

        got = self.received(notifier)
        assert {name for name, _ in got} == {"the-same"}
        assert 1 <= len(got) <= 2  # a place may discard duplicates itself

    def test_one_failing_note_stops_no_other(self, notifier: Notifier) -> None:
        self.refuse(notifier, "bad")

        failures = notifier.send([note("a", 1), note("bad", 2), note("c", 3)])

        assert set(failures) == {"bad"}
        assert isinstance(failures["bad"], Error)
        assert type(failures["bad"]) is not Error
        assert failures["bad"].backend
        assert {name for name, _ in self.received(notifier)} == {"a", "c"}

    def test_a_note_with_a_body_that_is_not_json_harms_no_other(self, notifier: Notifier) -> None:
        text = '{"a": 1}\n{"type": "forged"'
        broken = Note("broken", "scanResult", "s", text, {"scanResult": "Infected"})

        failures = notifier.send([note("a", 1), broken, note("c", 3)])

        assert set(failures) <= {"broken"}
        assert {"a", "c"} <= set(dict(self.received(notifier)))
        assert len(self.received(notifier)) == 3 - len(failures)

    def test_eight_threads_lose_and_mix_nothing(self, notifier: Notifier) -> None:
        def work(thread: int) -> int:
            notes = [note(f"t{thread}-{i}", {"t": thread, "i": i}) for i in range(10)]
            return len(notifier.send(notes[:5])) + len(notifier.send(notes[5:]))

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(work, range(8))) == 0

        expected = {f"t{t}-{i}": {"t": t, "i": i} for t in range(8) for i in range(10)}
        self._check(notifier, expected)

    def test_closing_twice_is_fine(self, notifier: Notifier) -> None:
        notifier.close()
        notifier.close()

    def _check(self, notifier: Notifier, expected: Mapping[str, object]) -> None:
        received = self.received(notifier)
        if self.keeps_bodies:
            assert {note_id: json.loads(body) for note_id, body in received} == expected
        else:
            assert {note_id for note_id, _ in received} == set(expected)


def note(note_id: str, body: object, *, ensure_ascii: bool = False) -> Note:
    """Return a note about `body`."""
    text = json.dumps(body, ensure_ascii=ensure_ascii)
    return Note(note_id, "scanResult", "a subject", text, {"scanResult": "Infected"})
