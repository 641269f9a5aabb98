"""Help and version are there at once: the command line imports nothing heavy before it is needed."""

import subprocess
import sys

import pytest

HEAVY = {
    "awscrt",
    "boto3",
    "botocore",
    "fastapi",
    "pydantic",
    "pydantic_core",
    "prometheus_client",
    "puremagic",
    "rich",
    "sqlalchemy",
    "sqlite3",
    "starlette",
    "uvicorn",
    "yara_x",
}


@pytest.mark.parametrize(
    ("args", "but"),
    [
        (["--help"], set()),
        (["version"], set()),
        # Below the first level typer itself loads pydantic.
        (["scan", "--help"], {"pydantic", "pydantic_core"}),
        (["bucket", "--help"], {"pydantic", "pydantic_core"}),
    ],
)
def test_help_and_version_import_nothing_heavy(args, but):
    program = (
        "import sys\n"
        "from bucketward.cli import main\n"
        f"sys.argv = ['bucketward', *{args}]\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "print('\\nimported', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    *said, modules = done.stdout.splitlines()
    assert any(said) or "Usage" in done.stderr
    imported = set(modules.split())
    assert "typer" in imported
    assert not imported & HEAVY - but
