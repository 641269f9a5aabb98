"""The configuration as an operator meets it: what is read, what wins, and what stops the start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from bucketward import config
from bucketward.config import load, reference
from bucketward.errors import ConfigError

SECRET = "open-sesame-open-sesame"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Work in an empty folder, where no configuration is found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "SEARCHED", ("./bucketward.toml", os.fspath(tmp_path / "etc.toml")))
    return tmp_path


def written(text, name="bucketward.toml"):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def problems(text="", environ=None):
    """Return what is wrong with a configuration, by line."""
    with pytest.raises(ConfigError) as caught:
        load(written(text), environ or {})
    return str(caught.value).split("\n")[1:]


def test_without_any_configuration_everything_is_in_one_folder(here):
    found = load(None, {})

    assert found.data == here / "bucketward-data"
    assert found.state.url == f"sqlite://{here}/bucketward-data/state.db"
    assert found.queue.url == f"sqlite://{here}/bucketward-data/queue.db"
    assert found.protect == (f"file://{here}/bucketward-data/drop",)
    assert found.quarantine == f"file://{here}/bucketward-data/quarantine"
    assert found.signatures.directory == here / "bucketward-data" / "signatures"
    assert found.spool.directory == here / "bucketward-data" / "spool"
    assert list(found.engines) == ["clamav"]
    assert found.engines["clamav"].url == "clamav:managed"
    assert (found.accounts, found.notifiers, found.policy) == ({}, {}, {})
    assert not found.receiver.enabled
    assert not (here / "bucketward-data").exists()


def test_the_data_folder_moves_everything(here):
    found = load(None, {"BUCKETWARD_DATA": "/srv/b"})

    assert found.state.url == "sqlite:///srv/b/state.db"
    assert found.protect == ("file:///srv/b/drop",)
    assert found.signatures.directory == Path("/srv/b/signatures")


def test_rules_that_are_there_bring_their_engine(here):
    rules = here / "bucketward-data" / "rules" / "mine"
    rules.mkdir(parents=True)
    assert list(load(None, {}).engines) == ["clamav"]
    (rules / "x.yar").write_text("rule x { condition: false }")
    found = load(None, {})

    assert list(found.engines) == ["clamav", "yara"]
    assert found.engines["yara"].rules == here / "bucketward-data" / "rules"
    assert not load(None, {"BUCKETWARD_ENGINES__YARA__ENABLED": "0"}).engines["yara"].enabled


def test_the_first_file_found_is_read(here):
    written("[event]\nthreads = 1", "etc.toml")
    assert load(None, {}).event.threads == 1
    written("[event]\nthreads = 2")
    assert load(None, {}).event.threads == 2
    written("[event]\nthreads = 3", "env.toml")
    named = {"BUCKETWARD_CONFIG": "env.toml"}
    assert load(None, named).event.threads == 3
    assert load(written("[event]\nthreads = 4", "arg.toml"), named).event.threads == 4
    assert load(None, {"BUCKETWARD_CONFIG": ""}).event.threads == 2


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_file_that_was_named_must_be_there(here, name):
    with pytest.raises(ConfigError, match=name):
        load(Path(name), {})
    with pytest.raises(ConfigError, match=name):
        load(None, {"BUCKETWARD_CONFIG": name})


def test_every_table_can_be_written_in_the_file():
    found = load(
        written(
            """
            data = "/srv/data"
            protect = ["s3://in", "file:///srv/drop/"]
            quarantine = "s3://quarantine"
            [policy]
            infected = "delete"
            tags = { result = "av" }
            [state]
            url = "postgresql://db.example/bucketward"
            [queue]
            url = "sqs://123456789012/events?region=eu-west-1"
            max_deliveries = 3
            [results]
            keep = "problems"
            [event]
            threads = 32
            [receiver]
            enabled = true
            host = "0.0.0.0"
            secret = "open-sesame-open-sesame"
            [watch]
            settle_seconds = 2.5
            [keeper]
            sweep_minutes = 0
            [engines.clamav]
            url = "clamav:///run/clamd.ctl"
            max_file_size = "512 MiB"
            [engines.mine]
            kind = "yara"
            rules = "rules"
            [signatures]
            directory = "$DATA/sigs"
            [spool]
            memory = 1000
            disk = "2GB"
            [log]
            format = "text"
            [accounts.prod]
            id = "123456789012"
            role_arn = "arn:aws:iam::123456789012:role/bucketward"
            [notifiers.siem]
            url = "https://siem.example/hook"
            secret = "whsec_x"
            """
        ),
        {},
    )

    assert found.protect == ("s3://in", "file:///srv/drop")
    assert found.policy == {"infected": "delete", "tags": {"result": "av"}}
    assert found.queue.max_deliveries == 3
    assert found.receiver.secret.get_secret_value() == SECRET
    assert found.engines["clamav"].max_file_size == 512 << 20
    assert found.engines["mine"].rules == Path.cwd() / "rules"
    assert found.signatures.directory == Path("/srv/data/sigs")
    assert (found.spool.memory, found.spool.disk) == (1000, 2 * 10**9)
    assert found.accounts["prod"].role_arn.endswith("role/bucketward")
    assert found.notifiers["siem"].url == "https://siem.example/hook"


def test_the_environment_has_the_last_word():
    file = written('[event]\nthreads = 2\ndrain_seconds = 3\n[notifiers.a]\nurl = "log://"')
    found = load(
        file,
        {
            "BUCKETWARD_EVENT__THREADS": "16",
            "BUCKETWARD_PROTECT": "s3://a, s3://b",
            "BUCKETWARD_POLICY": '{"infected": "delete"}',
            "BUCKETWARD_ENGINES__CLAMAV__PUA": "TRUE",
            "BUCKETWARD_ENGINES__CLAMAV__OPTIONS": '{"LogVerbose": "yes"}',
            "BUCKETWARD_NOTIFIERS__A__ALLOW_PRIVATE": "1",
            "BUCKETWARD_NOTIFIERS__B__URL": "https://b.example/",
            "BUCKETWARD_SPOOL__MEMORY": "1.5 GiB",
            "BUCKETWARD_QUARANTINE": "",
            "BUCKETWARD_TEST_REQUIRE": "s3",
            "PATH": "/bin",
        },
    )

    assert (found.event.threads, found.event.drain_seconds) == (16, 3)
    assert found.protect == ("s3://a", "s3://b")
    assert found.policy == {"infected": "delete"}
    assert found.engines["clamav"].pua is True
    assert found.engines["clamav"].options == {"LogVerbose": "yes"}
    assert found.notifiers["a"].allow_private
    assert found.notifiers["b"].url == "https://b.example/"
    assert found.spool.memory == 3 << 29
    assert found.quarantine == ""
    assert load(file, {"BUCKETWARD_PROTECT": '["s3://a,b"]'}).protect == ("s3://a,b",)


def test_relative_paths_start_at_the_file_and_not_at_the_shell(here):
    file = written(
        'data = "d"\n[spool]\ndirectory = "../s"\n[engines.yara]\nrules = "~/r"', "etc/b"
    )
    found = load(file, {})

    assert found.data == here / "etc" / "d"
    assert found.state.url == f"sqlite://{here}/etc/d/state.db"
    assert found.spool.directory == here / "s"
    assert found.engines["yara"].rules == Path.home() / "r"
    assert load(file, {"BUCKETWARD_DATA": "d"}).data == here / "d"


def test_a_secret_may_come_from_a_file(here):
    (here / "secret").write_text(SECRET + "\n")
    on = {"BUCKETWARD_RECEIVER__ENABLED": "1"}
    by_file = written('[receiver]\nsecret_file = "secret"')

    assert load(by_file, on).receiver.secret.get_secret_value() == SECRET
    other = {"BUCKETWARD_RECEIVER__SECRET": "another-secret-of-length"}
    assert load(by_file, on | other).receiver.secret.get_secret_value() == other.popitem()[1]
    by_value = written('[receiver]\nsecret = "another-secret-of-length"')
    named = {"BUCKETWARD_RECEIVER__SECRET_FILE": "secret"}
    assert load(by_value, on | named).receiver.secret.get_secret_value() == SECRET
    named = {
        "BUCKETWARD_NOTIFIERS__A__URL": "https://a.example",
        "BUCKETWARD_NOTIFIERS__A__SECRET_FILE": os.fspath(here / "secret"),
    }
    assert load(None, named).notifiers["a"].secret == SecretStr(SECRET)


def test_a_secret_file_that_cannot_be_used_stops_the_start(here):
    (here / "empty").write_text("\n")
    (here / "binary").write_bytes(b"\xff\xfe")
    for name, why in (("gone", "No such file"), ("empty", "is an empty file"), ("binary", "UTF-8")):
        [line] = problems("", {"BUCKETWARD_RECEIVER__SECRET_FILE": name})
        assert line.startswith("receiver.secret_file: ")
        assert why in line
    [line] = problems('[receiver]\nsecret = "x"\nsecret_file = "y"')
    assert line.startswith("receiver.secret_file: is given together with secret")
    both = {"BUCKETWARD_RECEIVER__SECRET": "x", "BUCKETWARD_RECEIVER__SECRET_FILE": "empty"}
    [line] = problems("", both)
    assert "together" in line


def test_secrets_are_not_shown():
    shown = load(None, {"BUCKETWARD_RECEIVER__SECRET": SECRET})

    assert SECRET not in repr(shown)
    assert SECRET not in str(shown)
    [line] = problems(f'[receiver]\nsecret = ["{SECRET}"]')
    assert SECRET not in line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[event]\nthread = 8", "event.thread: unknown option, did you mean event.threads?"),
        ("[evnt]\nthreads = 8", "evnt: unknown option, did you mean event?"),
        ("xyz = 1", "xyz: unknown option"),
        ("[engines.clamav]\nmax_filesize = 1", "did you mean engines.clamav.max_file_size?"),
        ("[event.deeper]\nx = 1", "event.deeper: unknown option"),
        ("[event]\nthreads = true", "event.threads: is true or false, and should be a number"),
        ("[event]\nthreads = 0", "event.threads: input should be greater than or equal to 1"),
        ("[event]\nthreads = 1.5", "event.threads: "),
        ("[event]\nenabled = 'yes'", "event.enabled: is neither true nor false"),
        ("[event]\nenabled = 2", "event.enabled: is neither true nor false"),
        ("[event]\ndrain_seconds = inf", "event.drain_seconds: "),
        ("event = 3", "event: should be a table"),
        ("engines = 3", "engines: should be a table"),
        ("[engines]\nclamav = 3", "engines.clamav: "),
        ("[engines.other]\nenabled = true", "engines.other: needs a kind, one of: clamav, yara"),
        ("[engines.x]\nkind = 'icap'", "engines.x: needs a kind, one of: clamav, yara"),
        ("[results]\nkeep = 'some'", "results.keep: input should be 'all' or 'problems'"),
        ("[receiver]\nport = 70000", "receiver.port: "),
        ("[receiver]\nenabled = true", "receiver: needs a secret of at least 16 characters"),
        ("[spool]\nmemory = 'lots'", "spool.memory: is no size: give bytes, or such as 512 MiB"),
        ("[spool]\nmemory = '-1'", "spool.memory: is no size"),
        ("[spool]\ndirectory = ''", "spool.directory: is no path"),
        ("[notifiers.a]\nallow_private = true", "notifiers.a.url: is missing"),
        ("data = 7", "data: is no path"),
        ("protect = 's3://a'", "protect: "),
        ("protect = ['drop']", "protect.0: is no URL: it has no scheme"),
        ("protect = ['s3://a?region=x']", "protect.0: is no bucket"),
        ("protect = ['file://drop']", "protect.0: needs an absolute path with three slashes"),
        ("[state]\nurl = ''", "state.url: is no URL"),
        ("[state]\nurl = 'sqlite:state.db'", "state.url: needs an absolute path"),
        ("[state]\nurl = 'http://[x'", "state.url: is no URL"),
        ('[state]\nurl = "x://a\\nb"', "state.url: is no URL: it has blanks"),
        ("protect = ['s3://q']\nquarantine = 's3://q'", "quarantine: is in the protected bucket"),
        (
            "protect = ['file:///d']\nquarantine = 'file:///d/q'",
            "quarantine: is in the protected bucket",
        ),
    ],
)
def test_what_is_wrong_stops_the_start_and_is_named(text, line):
    [found] = problems(text)

    assert line in found
    assert found.endswith("(in bucketward.toml)")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:hunter2@db/x",
        "postgresql://hunter2@db/x",
        "postgresql://db/x?password=hunter2",
        "sqs://1/q?aws_secret_access_key=hunter2",
        "https://x/?X-Amz-Signature=hunter2",
    ],
)
def test_a_url_never_authenticates(url):
    [line] = problems(f"[state]\nurl = '{url}'")

    assert line.startswith("state.url: has credentials in it")
    assert "hunter2" not in line


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("EVENT__THREADS", "many", "event.threads: input should be a valid integer"),
        ("EVENT__ENABLED", "on", "event.enabled: is neither true nor false"),
        ("EVENT__ENABLED", "", "event.enabled: is neither true nor false"),
        ("PROTECT", "[1", "protect: is no JSON"),
        ("PROTECT", "s3://a,nonsense", "protect.1: is no URL"),
        ("POLICY", "[]", "policy: should be a JSON object"),
        ("ENGINES__CLAMAV__OPTIONS", "x", "engines.clamav.options: is no JSON"),
        ("DATA", "", "data: is no path"),
    ],
)
def test_a_variable_that_is_wrong_is_named(variable, value, line):
    [found] = problems("", {f"BUCKETWARD_{variable}": value})

    assert found.startswith(line)
    assert found.endswith(f"(from BUCKETWARD_{variable})")


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("EVENT__THREAD", "EVENT__THREADS"),
        ("EVNT__THREADS", "EVENT__THREADS"),
        ("EVENT_THREADS", "EVENT__THREADS"),
        ("EVENT__threads", "EVENT__THREADS"),
        ("STATE", "STATE__URL"),
        ("RECEIVER__SECRETFILE", "RECEIVER__SECRET_FILE"),
        ("ENGINES__CLAMAV__MAX_FILESIZE", "ENGINES__CLAMAV__MAX_FILE_SIZE"),
    ],
)
def test_a_variable_that_is_unknown_is_refused_with_a_guess(variable, meant):
    assert problems("", {f"BUCKETWARD_{variable}": "8"}) == [
        f"BUCKETWARD_{variable}: unknown variable, did you mean BUCKETWARD_{meant}?"
    ]


@pytest.mark.parametrize("variable", ["X", "", "EVENT__THREADS__X", "ENGINES__CLAMAV", "__"])
def test_a_variable_like_nothing_is_refused(variable):
    [line] = problems("", {f"BUCKETWARD_{variable}": "8"})

    assert line.startswith(f"BUCKETWARD_{variable}: unknown variable")


def test_all_problems_are_named_at_once():
    found = problems(
        "[event]\nthreads = 0\nthread = 1\n[log]\nlevel = 'loud'\n[receiver]\nsecret_file = 'gone'",
        {"BUCKETWARD_KEEPER__SWEEP_MINUTES": "-1", "BUCKETWARD_SPOOLS": "1"},
    )

    assert sorted(line.split(":")[0] for line in found) == [
        "BUCKETWARD_SPOOLS",
        "event.thread",
        "event.threads",
        "keeper.sweep_minutes",
        "log.level",
        "receiver.secret_file",
    ]


@pytest.mark.parametrize("content", [b"[event\nthreads = 1", b"a = 1\na = 2\n"])
def test_what_is_no_toml_is_named_with_its_line(here, content):
    (here / "bucketward.toml").write_bytes(content)

    with pytest.raises(ConfigError, match=r"bucketward\.toml is no TOML: .*line [12]"):
        load(None, {})


def test_a_file_that_is_no_text_is_refused(here):
    (here / "bucketward.toml").write_bytes(b"\xff\xfe")

    with pytest.raises(ConfigError, match="UTF-8"):
        load(None, {})


def test_the_configuration_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        load(None, {}).event.threads = 3


def test_sizes_are_bytes_or_have_units():
    for text, size in {
        "0": 0,
        "100": 100,
        "1 kB": 1000,
        "1 KiB": 1024,
        "1k": 1000,
        "2 GB": 2 * 10**9,
        "0.5 TiB": 1 << 39,
        "10B": 10,
    }.items():
        assert load(None, {"BUCKETWARD_SPOOL__DISK": text}).spool.disk == size


def test_the_reference_can_be_printed_without_any_environment():
    page = subprocess.run(
        [sys.executable, "-m", "bucketward.config"], check=True, capture_output=True, text=True
    ).stdout

    assert page == reference()
    assert "| `threads` | `8` |" in page
    assert "`secret` or `secret_file`" in page
    assert SECRET not in page
