import errno
import io
import json
import logging
import uuid

import pytest

from bucketward.errors import ConfigError, Unavailable, Unsupported
from bucketward.notifiers.log import LogNotifier, open_log
from bucketward.testing.notifier import HOSTILE, NotifierSuite, note


class FullDisk(io.StringIO):
    """A stream on which lines that contain a given word find no room."""

    refused = "\0"

    def write(self, text):
        if f'"{self.refused}"' in text:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def lines(text):
    assert text.isascii()
    # split on "\n" only, then see that no other kind of line break is in there
    found = text.split("\n")[:-1]
    assert found == text.splitlines()
    return [json.loads(line) for line in found]


class TestLogNotifierOnAStream(NotifierSuite):
    @pytest.fixture
    def notifier(self):
        self.stream = FullDisk()
        return LogNotifier(self.stream)

    def received(self, notifier):
        return [(line["id"], json.dumps(line["body"])) for line in lines(self.stream.getvalue())]

    def refuse(self, notifier, note_id):
        self.stream.refused = note_id


class TestLogNotifierOnALogger(NotifierSuite):
    # logging hides what becomes of one record; see the stream for notes that fail
    test_one_failing_note_stops_no_other = None

    @pytest.fixture
    def notifier(self):
        self.stream = io.StringIO()
        logger = logging.getLogger(f"test.{uuid.uuid4().hex}")
        logger.setLevel(logging.INFO)
        logger.addHandler(logging.StreamHandler(self.stream))
        logger.propagate = False
        return LogNotifier(logger.name)

    def received(self, notifier):
        return [(line["id"], json.dumps(line["body"])) for line in lines(self.stream.getvalue())]


def test_a_line_holds_all_there_is_to_a_note():
    stream = io.StringIO()

    LogNotifier(stream).send([note("n1", {"key": "a\nb"})])

    assert lines(stream.getvalue()) == [
        {
            "id": "n1",
            "type": "scanResult",
            "subject": "a subject",
            "attributes": {"scanResult": "Infected"},
            "body": {"key": "a\nb"},
        }
    ]


def test_no_hostile_text_starts_a_line_of_its_own():
    stream = io.StringIO()

    LogNotifier(stream).send([note(f"n{i}", text) for i, text in enumerate(HOSTILE)])

    assert [line["body"] for line in lines(stream.getvalue())] == list(HOSTILE)


def test_a_full_disk_is_told_and_not_swallowed():
    stream = FullDisk()
    stream.refused = "n1"

    failures = LogNotifier(stream).send([note("n1", 1)])

    assert isinstance(failures["n1"], Unavailable)
    assert "No space left" in str(failures["n1"])


def test_a_logger_that_would_drop_notes_is_a_failure_not_silence():
    name = f"test.{uuid.uuid4().hex}"
    logging.getLogger(name).setLevel(logging.ERROR)
    notifier = open_log(f"log://{name}")

    with pytest.raises(Unsupported, match="drops INFO"):
        notifier.ping()
    assert set(notifier.send([note("n1", 1)])) == {"n1"}


def test_a_closed_stream_is_a_failure():
    stream = io.StringIO()
    stream.close()

    assert isinstance(LogNotifier(stream).send([note("n1", 1)])["n1"], Unsupported)


def test_the_url_names_a_logger_and_nothing_else():
    for url in ("log://a/b", "log://a?x=1", "file:///x", "log://a#b"):
        with pytest.raises(ConfigError):
            open_log(url)
