"""The settings by command line: what is wrong is said at once, and nothing is lost to a race."""

import json

import pytest

from running import Home


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path, 'protect = []\n[policy]\ninfected = "keep"\n')


def change(home, settings, *options):
    (home.folder / "new.json").write_text(
        settings if isinstance(settings, str) else json.dumps(settings)
    )
    return home.run("setting", "change", "new.json", *options)


def test_settings_are_shown_changed_and_kept(home):
    assert json.loads(home.run("setting", "show").stdout) == {"version": 0, "settings": {}}
    new = {"global": {"unscannable": {"encrypted": "move"}}, "buckets": {"s3://b": {"deadline": 5}}}
    done = change(home, new)

    assert (done.returncode, done.stdout) == (0, "the settings are version 1 now\n")
    shown = json.loads(home.run("setting", "show").stdout)
    assert shown["version"] == 1
    assert shown["settings"]["global"] == new["global"]
    assert shown["settings"]["buckets"] == new["buckets"]


def test_everything_wrong_is_said_at_once_and_nothing_changes(home):
    done = change(home, {"global": {"infectd": "x", "suspicious": "mvoe", "deadline": -1}})

    assert done.returncode == 64
    for wrong in ("infectd", "mvoe", "deadline"):
        assert wrong in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(home.run("setting", "show").stdout)["version"] == 0


@pytest.mark.parametrize("text", ["", "not json", "[]", "[" * 100_000, '{"global": null}', "\x00"])
def test_rubbish_is_refused(home, text):
    done = change(home, text)

    assert done.returncode == 64
    assert done.stderr.startswith("configuration: ")
    assert "Traceback" not in done.stderr


def test_of_two_who_change_one_is_told(home):
    assert change(home, {}, "--expected", "0").returncode == 0
    done = change(home, {"global": {}}, "--expected", "0")

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert json.loads(home.run("setting", "show").stdout)["version"] == 1


def test_a_quarantine_that_is_protected_is_refused(home, tmp_path):
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    assert home.run("bucket", "protect", inbox.as_uri()).returncode == 0
    done = change(home, {"global": {"quarantine": f"file://{inbox}"}})

    assert done.returncode == 64
    assert "is itself protected" in done.stderr
    assert json.loads(home.run("setting", "show").stdout)["version"] == 0


def test_a_file_that_is_not_there_is_named(home):
    done = home.run("setting", "change", "nowhere.json")

    assert done.returncode == 64
    assert "nowhere.json" in done.stderr
