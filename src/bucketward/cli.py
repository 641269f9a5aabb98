"""The command line.  Nothing heavy is imported before a command needs it: help stays quick."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from bucketward import __version__
from bucketward.errors import ConfigError, Error

if TYPE_CHECKING:
    from bucketward.config import Config
    from bucketward.wiring import House

CLEAN, FOUND, PROBLEM, USAGE = 0, 1, 2, 64
_SIGNALLED = 128  # and the number of the signal, as shells have it

app = typer.Typer(
    name="bucketward",
    help="Antivirus for cloud object storage.",
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bucket_app = typer.Typer(help="Protect buckets.", rich_markup_mode=None, no_args_is_help=True)
app.add_typer(bucket_app, name="bucket")
setting_app = typer.Typer(
    help="Read and change the settings: how each bucket is treated.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.add_typer(setting_app, name="setting")

finding_app = typer.Typer(
    help="What was found, and what is done about it.", rich_markup_mode=None, no_args_is_help=True
)
app.add_typer(finding_app, name="finding")

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="Configuration file; see docs/configuration.md."),
]


@app.command()
def scan(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="Files, directories, bucket URLs (s3://bucket/prefix), or - for standard input.",
            show_default=False,
        ),
    ],
    signatures: Annotated[
        Path | None,
        typer.Option(help="Directory of ClamAV database files to judge by, in a private engine."),
    ] = None,
    rules: Annotated[
        Path | None, typer.Option(help="Directory of YARA rules to judge by as well.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Scan files now: one JSON line per object on standard output, a summary on standard error.

    Exits 0 if all are Clean or InfectedAllowed, 1 if any is Infected or Suspicious, 2 otherwise.
    """
    from bucketward.ondemand import scan_targets

    with _config(config) as loaded:
        raise typer.Exit(scan_targets(loaded, targets, signatures=signatures, rules=rules))


@app.command()
def up(config: ConfigOption = None) -> None:
    """Run everything here: event agent, keeper, receiver, directory watch and a managed engine."""
    with _house(config) as house:
        from bucketward.service import run

        parts = ("event", "keeper", "receiver", "watch")
        enabled = {part for part in parts if getattr(house.config, part).enabled}
        run(house, enabled, seed=True)


@app.command()
def event(config: ConfigOption = None) -> None:
    """Run the event agent: scan what the queue announces."""
    with _house(config) as house:
        from bucketward.service import run

        run(house, {"event"}, seed=False)


@app.command()
def keeper(config: ConfigOption = None) -> None:
    """Run the background chores: sweep, outbox, retries, dead letters."""
    with _house(config) as house:
        from bucketward.service import run

        run(house, {"keeper"}, seed=False)


@app.command()
def receiver(config: ConfigOption = None) -> None:
    """Run the HTTP receiver for stores that push their events (Ceph, MinIO)."""
    with _house(config) as house:
        from bucketward.service import run

        run(house, {"receiver"}, seed=False)


@app.command()
def check(config: ConfigOption = None) -> None:
    """Open every configured backend, try it, and say what is wrong and how to mend it."""
    with _house(config) as house:
        problems = 0
        for name, problem in house.check():
            problems += bool(problem)
            print(f"{'PROBLEM' if problem else 'ok':8}{name}{': ' + problem if problem else ''}")
        raise typer.Exit(PROBLEM if problems else CLEAN)


@app.command()
def version() -> None:
    """Print the version."""
    print(f"bucketward {__version__}")


@app.command()
def guard(
    url: Annotated[str, typer.Argument(help="s3://bucket, as it was protected.")],
    *,
    role: Annotated[
        list[str] | None,
        typer.Option(help="ARN of a role or user that may read everything; give all of ours."),
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Merge the guard into the bucket's policy.")
    ] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="Take the guard, and nothing else, out of it.")
    ] = False,
    mend: Annotated[
        bool, typer.Option("--mend", help="Write tags that somebody dropped, from the ledger.")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Let nobody read what is not tagged Clean: print the policy for that, or put it in place.

    `--apply` refuses, with exit code 2, where objects are unscanned or cannot be tagged.
    """
    if apply + remove + mend > 1:
        raise ConfigError("--apply, --remove and --mend exclude each other")
    with _house(config) as house:
        if mend:
            print(f"the tags of {house.mend_tags(url)} object versions of {url} mended")
            return
        if remove:
            was_in = house.remove_guard(url)
            print(f"{url} {'is not guarded any more' if was_in else 'was not guarded'}")
            return
        document = house.guard(url, role or ())
        if not apply:
            print(document)
            return
        is_refused = False
        for forbids, problem in house.guard_problems(url):
            is_refused |= forbids
            print(f"{'refused: ' if forbids else ''}{problem}", file=sys.stderr)
        if is_refused:
            raise typer.Exit(PROBLEM)
        is_new = house.apply_guard(url, role or ())
        print(f"{url} {'is guarded now' if is_new else 'was guarded already'}")


@app.command()
def retro(
    url: Annotated[str, typer.Argument(help="s3://bucket, as it was protected.")],
    config: ConfigOption = None,
) -> None:
    """Enqueue every object of a protected bucket that has no verdict, however old."""
    with _house(config) as house:
        print(f"{house.retro(url)} object versions of {url} enqueued")


@bucket_app.command("protect")
def bucket_protect(
    url: Annotated[
        str,
        typer.Argument(help="s3://bucket?region=..., file:///directory, or a directory's path."),
    ],
    account: Annotated[str, typer.Option(help="Name of the account, from the configuration.")] = "",
    config: ConfigOption = None,
) -> None:
    """Protect a bucket: its new objects announce themselves, and are scanned."""
    with _house(config) as house:
        protected, is_new = house.protect(_bucket_url(url), account=account)
        state = "is protected now" if is_new else "was protected already"
        print(f"{protected.bucket} {state}, route {protected.route or 'by hand'}")


@bucket_app.command("unprotect")
def bucket_unprotect(
    url: Annotated[str, typer.Argument(help="As it was protected.")], config: ConfigOption = None
) -> None:
    """Stop protecting a bucket; its results stay."""
    with _house(config) as house:
        house.unprotect(_bucket_url(url))
        print(f"{url} is not protected any more")


@bucket_app.command("list")
def bucket_list(config: ConfigOption = None) -> None:
    """List the protected buckets, one JSON line each."""
    with _house(config) as house:
        for protected in house.ledger.protected().values():
            print(
                json.dumps(
                    {
                        "bucket": protected.bucket,
                        "account": protected.account,
                        "region": protected.region,
                        "route": protected.route,
                    }
                )
            )


ScanIdArgument = Annotated[str, typer.Argument(help="The scan id, as finding list shows it.")]


@finding_app.command("list")
def finding_list(
    day: Annotated[str, typer.Option(help="The UTC day, YYYY-MM-DD; today if not given.")] = "",
    verdict: Annotated[
        str, typer.Option(help="Infected, Suspicious, InfectedAllowed, Unscannable or Error.")
    ] = "Infected",
    config: ConfigOption = None,
) -> None:
    """List the results with one verdict of one day, newest first, one JSON line each."""
    from datetime import UTC, datetime

    from bucketward.ledger import dump_result

    with _house(config) as house:
        value = f"{verdict}|{day or datetime.now(UTC).strftime('%Y-%m-%d')}"
        cursor = ""
        while True:
            page = house.ledger.results("verdict", value, cursor=cursor)
            for result in page.items:
                print(dump_result(result))
            cursor = page.cursor
            if not cursor:
                return


@finding_app.command("restore")
def finding_restore(
    scan_id: ScanIdArgument,
    reason: Annotated[str, typer.Option(help="Why it is a false positive; kept.")],
    only_here: Annotated[
        bool, typer.Option("--only-here", help="Allow it under this key of this bucket alone.")
    ] = False,
    days: Annotated[float, typer.Option(help="Allow it for so many days; 0 for ever.")] = 0,
    config: ConfigOption = None,
) -> None:
    """Bring an object back from quarantine as a false positive, and allow what was found in it."""
    with _house(config) as house:
        back = house.restore(scan_id, who=_user(), reason=reason, only_here=only_here, days=days)
        print(f"{back.bucket} {back.key} is back, and allowed")


@finding_app.command("delete")
def finding_delete(scan_id: ScanIdArgument, config: ConfigOption = None) -> None:
    """Delete a quarantined object for good."""
    with _house(config) as house:
        house.delete(scan_id, who=_user())
        print("deleted for good")


@finding_app.command("rescan")
def finding_rescan(scan_id: ScanIdArgument, config: ConfigOption = None) -> None:
    """Enqueue an object again; a running event agent scans it."""
    with _house(config) as house:
        ref = house.rescan(scan_id)
        print(f"{ref.bucket} {ref.key} is enqueued")


@finding_app.command("allowed")
def finding_allowed(config: ConfigOption = None) -> None:
    """List what is allowed, newest first, one JSON line each."""
    with _house(config) as house:
        cursor = ""
        while True:
            page = house.ledger.allow_list(cursor=cursor)
            for entry in page.items:
                fields = {name: getattr(entry, name) for name in type(entry).__slots__}
                print(json.dumps({"id": entry.id, **fields}, default=str))
            cursor = page.cursor
            if not cursor:
                return


@finding_app.command("disallow")
def finding_disallow(
    entry_id: Annotated[str, typer.Argument(help="The id, as finding allowed shows it.")],
    config: ConfigOption = None,
) -> None:
    """End an entry of the allow list; objects scanned from now on are judged without it."""
    with _house(config) as house:
        house.disallow(entry_id, who=_user())
        print("not allowed any more")


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return f"uid {os.getuid()}"


@setting_app.command("show")
def setting_show(config: ConfigOption = None) -> None:
    """Print the settings as JSON: layers global, accounts, regions and buckets."""
    with _house(config) as house:
        text, version = house.ledger.settings()
        print(json.dumps({"version": version, "settings": json.loads(text)}, indent=2))


@setting_app.command("change")
def setting_change(
    file: Annotated[
        Path, typer.Argument(help="The new settings as JSON, all of them; - for standard input.")
    ],
    expected: Annotated[
        int | None, typer.Option(help="Refuse unless the settings still are this version.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Replace the settings; agents that run go by them within 30 seconds."""
    with _house(config) as house:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read: {error}") from error
        version = house.change_settings(text, expected, _user())
        print(f"the settings are version {version} now")


def _bucket_url(given: str) -> str:
    """Return the URL of a bucket; a directory that is there may be given as a path."""
    if "://" not in given and Path(given).is_dir():
        return Path(os.path.normpath(Path(given).absolute())).as_uri()
    return given


@contextmanager
def _config(path: Path | None) -> Iterator[Config]:
    from bucketward.config import load

    yield load(path, os.environ)


@contextmanager
def _house(path: Path | None) -> Iterator[House]:
    with _config(path) as loaded:
        from bucketward.service import set_up_logging
        from bucketward.wiring import House

        set_up_logging(loaded)
        with House(loaded) as house:
            yield house


def main() -> None:
    """Run the command line; every expected failure is one clear message and an exit code."""
    code = _main()
    if code < _SIGNALLED:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            code = _SIGNALLED + signal.SIGPIPE
    if code > _SIGNALLED:
        # At once: a thread may hang in a read, and whoever reads what is left may not read on.
        os._exit(code)
    sys.exit(code)


def _main() -> int:
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]  # its public face; typer has none
    if sys.argv[1:] == ["version"]:
        version()  # typer would load pydantic, to see that it has no options
        return CLEAN
    try:
        result = app(standalone_mode=False)
        return result if isinstance(result, int) else CLEAN
    except usage_error as error:
        show = getattr(error, "show", None)
        if show is not None:
            show()
        return USAGE
    except typer.Exit as end:
        return end.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _SIGNALLED + signal.SIGINT
    except BrokenPipeError:
        return _SIGNALLED + signal.SIGPIPE
    except SystemExit as end:
        # typer ends with 1 for a broken pipe, which is a finding with us.
        is_pipe = isinstance(end.__context__, BrokenPipeError)
        return _SIGNALLED + signal.SIGPIPE if is_pipe else cast("int", end.code)
    except ConfigError as error:
        print(f"configuration: {error}", file=sys.stderr)
        return USAGE
    except Error as error:
        print(str(error), file=sys.stderr)
        return PROBLEM
    except Exception as error:
        # Ours to mend, not the user's to read; the log has the rest for a report.
        logging.getLogger(__name__).debug("internal error", exc_info=True)
        print(
            f"internal error: {type(error).__name__}: {error}\n"
            "Please report it; BUCKETWARD_LOG__LEVEL=debug shows where it happened.",
            file=sys.stderr,
        )
        return PROBLEM


if __name__ == "__main__":
    main()
