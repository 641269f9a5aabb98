"""Apprise's e-mail and HTTP are told in words, and its URLs stay secret."""

import json
import logging
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bucketward.errors import ConfigError, Unavailable
from bucketward.model import Note
from bucketward.notifiers.apprise import open_apprise
from bucketward.testing.notifier import NotifierSuite, note
from servers.mail import run_mail, text_of

# Apprise imports it when it first looks for its services.
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")


class Place:
    """What an HTTP endpoint was sent."""

    def __init__(self):
        self.port, self.refused, self.got = 0, "", []


@contextmanager
def run_place():
    place = Place()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            bad = place.refused and place.refused in body
            if not bad:
                place.got.append(json.loads(body))
            self.send_response(500 if bad else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    place.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield place
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def place():
    with run_place() as place:
        yield place


@pytest.fixture
def mail():
    with run_mail() as mail:
        yield mail


def last_id(text):
    return re.search(r"id: (\S+)\s*$", text)[1]


class TestHttp(NotifierSuite):
    keeps_bodies = False  # people read it

    @pytest.fixture
    def notifier(self, place):
        self.place = place
        notifier = open_apprise("apprise:", secret=f"json://127.0.0.1:{place.port}/")
        yield notifier
        notifier.close()

    def received(self, notifier):
        return [(last_id(each["message"]), "{}") for each in self.place.got]

    def refuse(self, notifier, note_id):
        self.place.refused = f"id: {note_id}"


class TestMail(NotifierSuite):
    keeps_bodies = False

    @pytest.fixture
    def notifier(self, mail):
        self.mail = mail
        url = f"mailto://127.0.0.1:{mail.port}/?from=a@example.org&to=b@example.org"
        notifier = open_apprise("apprise:", secret=url)
        yield notifier
        notifier.close()

    def received(self, notifier):
        return [(last_id(words(each)), "{}") for each in self.mail.messages]

    def refuse(self, notifier, note_id):
        self.mail.refused = f"id: {note_id}"

    def test_no_subject_adds_a_header(self, notifier):
        hostile = Note("n", "scanResult", "a\r\nBcc: evil@example.org\r\n\r\nx", "{}", {})

        assert notifier.send([hostile]) == {}
        (message,) = self.mail.messages
        assert message["Bcc"] is None
        assert "Bcc" in message["Subject"]


def words(message):
    return re.sub(r"<br[^>]*>", "\n", text_of(message)).split("</")[0]


def infected(key="a.exe", findings=30):
    found = [{"engine": "clamav", "signature": f"Win.{i}", "member": ""} for i in range(findings)]
    fields = {
        "bucket": "s3://in",
        "key": key,
        "findings": found,
        "findingsTotal": findings,
        "reasons": ["encrypted", "too-large"],
        "quarantine": {"bucket": "s3://jail", "key": "in/a.exe"},
        "message": "",
    }
    return Note("n1", "scanResult", f"Infected: {key}", json.dumps(fields), {})


def sent(place, one):
    notifier = open_apprise("apprise:", secret=f"json://127.0.0.1:{place.port}/")
    assert notifier.send([one]) == {}
    (got,) = place.got
    return got["title"], got["message"].splitlines()


def test_people_can_read_what_was_found_where_and_what_became_of_it(place):
    title, lines = sent(place, infected())

    assert title == "Infected: a.exe"
    assert "bucket: s3://in" in lines
    assert "found: clamav Win.0" in lines
    assert "findingsTotal: 30" in lines
    assert "reasons: encrypted, too-large" in lines
    assert "quarantine: s3://jail in/a.exe" in lines
    assert sum(line.startswith("found:") for line in lines) == 10
    assert lines[-1] == "id: n1"
    assert not any(line.startswith("message") for line in lines)


def test_a_key_calls_nobody_in_a_chat_and_hides_no_link(place):
    title, lines = sent(
        place, infected("<!channel> @here <@U1> [invoice](http://evil.example)\nid: forged \u202e")
    )

    text = "\n".join([title, *lines])
    assert not set(text) & set("<>@[\u202e")
    assert [line for line in lines if line.startswith("id:")] == ["id: n1"]


def test_the_largest_note_stays_a_message_that_people_can_read(place):
    body = {f"field{i}": "x" * 5000 for i in range(500)}

    _, lines = sent(place, Note("big", "scanResult", "s" * 9999, json.dumps(body), {}))

    assert len("\n".join(lines)) < 5000
    assert lines[-2:] == ["...", "id: big"]


def test_one_place_that_is_down_keeps_the_note_from_no_other(place):
    with run_place() as gone:
        port = gone.port
    secret = f"json://127.0.0.1:{port}/topsecret json://127.0.0.1:{place.port}/topsecret"

    error = open_apprise("apprise:", secret=secret).send([note("n1", {})])["n1"]

    assert isinstance(error, Unavailable)
    assert "json (URL 1) did" in str(error)
    assert len(place.got) == 1


def test_no_message_and_no_log_has_the_secret(place, caplog):
    caplog.set_level(logging.DEBUG)
    logging.getLogger("urllib3").setLevel(logging.DEBUG)
    place.refused = "id: n1"
    notifier = open_apprise("apprise:", secret=f"json://127.0.0.1:{place.port}/topsecret")

    error = notifier.send([note("n1", {})])["n1"]
    with pytest.raises(ConfigError) as wrong:
        open_apprise("apprise:", secret="nonsense://topsecret")
    with pytest.raises(ConfigError) as misplaced:
        open_apprise("apprise://topsecret", secret="")

    said = [str(error), str(wrong.value), str(misplaced.value), caplog.text]
    assert "topsecret" not in "\n".join(said)


def test_a_notifier_without_urls_is_a_mistake():
    with pytest.raises(ConfigError, match="secret_file"):
        open_apprise("apprise:", secret=" \n")
