"""Is it still our house?  What holds for every file, whoever writes it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bucketward import config

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))

# Where the server needs coroutines; see docs/design.md, concurrency.
MAY_BE_ASYNC = ("agents/api.py", "agents/icap.py", "agents/receiver.py", "console/")
MAY_READ_ENVIRONMENT = ("config.py", "cli.py")


def ours():
    """Return all files that are tracked or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout
    files = [ROOT / name.decode() for name in listed.split(b"\0") if name]
    files = [file for file in files if file.is_file()]
    assert Path(__file__) in files
    return files


def nodes(file):
    return ast.walk(ast.parse(file.read_text()))


def place(file):
    return file.relative_to(ROOT / "src" / "bucketward").as_posix()


def mentions(needles):
    """Return which of our files hold any of the needles."""
    pattern = re.compile(b"|".join(map(re.escape, needles)), re.IGNORECASE)
    return [file.relative_to(ROOT) for file in ours() if pattern.search(file.read_bytes())]


def test_dependencies_point_down():
    # Not in this process: it disables the loggers that other tests listen to.
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_threads_and_no_coroutines():
    guilty = [
        place(file)
        for file in SOURCES
        if not place(file).startswith(MAY_BE_ASYNC)
        and any(isinstance(node, ast.AsyncFunctionDef) for node in nodes(file))
    ]

    assert guilty == []


def test_only_the_configuration_reads_the_environment():
    def reads(node):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            return any(alias.name in {"environ", "environb", "getenv"} for alias in node.names)
        return (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
            and node.attr in {"environ", "environb", "getenv"}
        )

    guilty = [
        place(file)
        for file in SOURCES
        if place(file) not in MAY_READ_ENVIRONMENT and any(map(reads, nodes(file)))
    ]

    assert guilty == []


def test_every_module_says_what_it_is_for():
    assert [
        place(file) for file in SOURCES if not ast.get_docstring(ast.parse(file.read_text()))
    ] == []


def test_every_option_says_what_it_is_for():
    tables = config.Table.__subclasses__()
    assert len(tables) > 10

    for table in tables:
        assert table.__doc__, table
        for name, field in table.model_fields.items():
            if table is config.Config and f"`[{name}" in config.reference():
                continue
            assert field.description, f"{table.__name__}.{name}"
            assert field.description.endswith("."), f"{table.__name__}.{name}"
            assert f"| `{name}`" in config.reference()


def test_the_page_of_options_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text()

    assert page == config.reference(), "run: python -m bucketward.config > docs/configuration.md"


def test_nobody_s_antivirus_trips_over_a_checkout():
    assert mentions([b"EICAR-STANDARD-" + b"ANTIVIRUS-TEST"]) == []


def test_where_packages_come_from_is_nobody_s_business_but_the_installer_s():
    hosts = ["py%s.org", "python%s.org", "registry.%sjs.org", "registry.%spkg.com", "%sjs.com"]
    names = ["pi", "hosted", "npm", "yarn", "npm"]

    assert mentions([(host % name).encode() for host, name in zip(hosts, names, strict=True)]) == []


@pytest.mark.parametrize("file", sorted(ROOT.glob("requirements*.txt")), ids=lambda file: file.name)
def test_locks_pin_everything_by_hash_and_name_no_address(file):
    lines = [line for line in file.read_text().splitlines() if line.strip()]
    requirements = [line for line in lines if not line.startswith((" ", "#"))]

    assert requirements
    assert [
        line for line in requirements if not re.match(r"[\w.\[\]-]+==\S+( ;.*)? \\$", line)
    ] == []
    assert len([line for line in lines if "--hash=sha256:" in line]) >= len(requirements)
    assert "://" not in file.read_text()
