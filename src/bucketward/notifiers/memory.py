"""Notes kept in a list: for tests, and for trying Bucketward out."""

# ruff: noqa: D102 - the docstrings are the Protocol's

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from bucketward.errors import Error
from bucketward.model import NOTHING, Note

PERMISSIONS: Mapping[str, str] = NOTHING


def open_memory(url: str = "memory://") -> MemoryNotifier:  # noqa: ARG001 - openers take a URL
    """Return a new, empty notifier."""
    return MemoryNotifier()


class MemoryNotifier:
    """Keeps what it is sent in `notes`, in order of arrival."""

    def __init__(self) -> None:
        self.notes: list[Note] = []
        self._failing: dict[str, Error] = {}
        self._lock = threading.Lock()

    def fail(self, error: Error, *ids: str) -> None:
        """From now on refuse the notes of these ids, or every note if none is given."""
        with self._lock:
            self._failing.update(dict.fromkeys(ids or ("",), error))

    def mend(self) -> None:
        """Accept everything again."""
        with self._lock:
            self._failing.clear()

    def send(self, notes: Sequence[Note]) -> Mapping[str, Error]:
        failures: dict[str, Error] = {}
        with self._lock:
            for note in notes:
                error = self._failing.get(note.id) or self._failing.get("")
                if error is not None:
                    failures[note.id] = error
                else:
                    self.notes.append(note)
        return failures

    def ping(self) -> None:
        with self._lock:
            error = self._failing.get("")
        if error is not None:
            raise error

    def close(self) -> None:
        pass
