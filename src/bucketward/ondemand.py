"""`bucketward scan`: judge files and buckets now, without configuration, daemon or ledger."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bucketward.config import ClamavEngine, Config, YaraEngine
from bucketward.errors import ConfigError, Denied, Error, Unavailable, Unsupported
from bucketward.interfaces import Store
from bucketward.model import ObjectInfo, ObjectRef, Reason, ScanResult, Verdict, scan_id
from bucketward.policy import Policy, Settings
from bucketward.scan import Scanner, give_up
from bucketward.service import printable, set_up_logging
from bucketward.wiring import DEMO_WARNING, House, folder_of

log = logging.getLogger(__name__)

_LOAD_PATIENCE = 300.0  # seconds an engine may take to load its database
_TRIES = 3
_CAUSE = "scan"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class _Job:
    """One object to scan, or what kept us from finding any."""

    run: Callable[[], ScanResult]


class _Tally:
    """What was found, for the summary and the exit code."""

    def __init__(self) -> None:
        self.verdicts: Counter[Verdict] = Counter()
        self.bytes = 0
        self.problems: list[str] = []

    @property
    def code(self) -> int:
        """Return 0 if all is Clean, 1 if anything was found, 2 otherwise."""
        if self.verdicts[Verdict.INFECTED] or self.verdicts[Verdict.SUSPICIOUS]:
            return 1
        good = self.verdicts[Verdict.CLEAN] + self.verdicts[Verdict.INFECTED_ALLOWED]
        return 0 if good == self.verdicts.total() > 0 and not self.problems else 2


def scan_targets(
    config: Config,
    targets: Sequence[str],
    *,
    signatures: Path | None = None,
    rules: Path | None = None,
) -> int:
    """Scan the targets, print one JSON line per object, and return the exit code.

    A private engine is started unless the configured one answers; one is started in any case if
    `signatures` names the database to use.
    """
    _quieten(config)
    if targets.count("-") > 1:
        raise ConfigError("- is given twice, and there is one standard input")
    for folder, option in ((signatures, "--signatures"), (rules, "--rules")):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{option}: there is no directory {folder}")
    signal.signal(signal.SIGTERM, _terminate)
    with ExitStack() as stack:
        house = stack.enter_context(_house(config, stack, signatures, rules))
        _wait(house)
        policy = _policy(house, config)
        tally = _Tally()
        started = time.monotonic()
        _run(_jobs(house, targets, policy, tally), tally, threads=config.event.threads)
        _summarise(tally, time.monotonic() - started)
        return tally.code


def _quieten(config: Config) -> None:
    """Log what went wrong only: what there is to say is in the results and the summary."""
    level = "debug" if config.log.level == "debug" else "error"
    style = "json" if config.log.format == "json" else "text"
    quiet = config.log.model_copy(update={"level": level, "format": style})
    set_up_logging(config.model_copy(update={"log": quiet}))


def _terminate(*_: object) -> None:
    """Unwind, so that the private engine and its folder go with us."""
    raise SystemExit(128 + signal.SIGTERM)


def _house(config: Config, stack: ExitStack, signatures: Path | None, rules: Path | None) -> House:
    """Return a house with a private engine, or with the configured one where that answers."""
    engines = dict(config.engines)
    folder = config.data
    for name, engine in config.engines.items():
        if not isinstance(engine, ClamavEngine) or not engine.enabled:
            continue
        if signatures is not None:
            engines[name] = engine.model_copy(update={"url": "clamav:managed"})
        if signatures is not None or (
            engine.url == "clamav:managed" and not _is_served(config.data)
        ):
            folder = _private_folder(stack)
    spool = config.spool.directory
    if not os.access(spool, os.W_OK | os.X_OK):
        spool = (folder if folder != config.data else _private_folder(stack)) / "spool"
    if rules is not None:
        engines["yara"] = YaraEngine.model_validate(
            {"rules": rules.absolute()}, context={"folder": Path.cwd(), "data": folder}
        )
    changes: dict[str, object] = {
        "engines": engines,
        "data": folder,
        "signatures": config.signatures.model_copy(
            update={"directory": _signatures(config, signatures)}
        ),
        "spool": config.spool.model_copy(update={"directory": spool}),
    }
    return House(config.model_copy(update=changes), has_ledger=_has_ledger(config))


def _has_ledger(config: Config) -> bool:
    """Return whether there is a ledger already, with what is allowed in it; none is made."""
    parts = urlsplit(config.state.url)
    return parts.scheme == "sqlite" and Path(unquote(parts.path)).is_file()


def _private_folder(stack: ExitStack) -> Path:
    made = tempfile.TemporaryDirectory(prefix="bucketward-", ignore_cleanup_errors=True)
    return Path(stack.enter_context(made))


def _is_served(data: Path) -> bool:
    """Return whether another process of ours keeps the managed clamd of a data folder."""
    try:
        with (data / "clamd" / "lock").open("rb") as lock:
            if os.fstat(lock.fileno()).st_uid != os.geteuid():
                return False  # its socket is not for us
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _signatures(config: Config, given: Path | None) -> Path:
    """Return the database to judge by: the one given, ours, the system's, or the demonstration."""
    from bucketward.engines.clamd import SIGNATURE_SUFFIXES, demo_signatures

    def has_any(folder: Path) -> bool:
        return any(path.suffix[1:] in SIGNATURE_SUFFIXES for path in folder.iterdir())

    if given is not None:
        try:
            if not has_any(given):
                raise ConfigError(
                    f"--signatures: {given} holds no ClamAV database (*.cvd, *.cld, *.hdb, *.ndb)"
                )
        except OSError as error:
            raise ConfigError(f"--signatures: {given}: {error.strerror}") from error
        return given.absolute()
    for folder in (config.signatures.directory, Path("/var/lib/clamav")):
        with suppress(OSError):
            if has_any(folder):
                return folder
    return demo_signatures()


def _wait(house: House) -> None:
    """Wait until every engine has loaded its database."""
    for name, engine in house.engines.items():
        try:
            house.wait_for_engine(name, _LOAD_PATIENCE)
        except Unavailable as error:
            raise ConfigError(str(error)) from error
        if engine.signatures().is_demo:
            print(DEMO_WARNING.format("a directory and name it with --signatures"), file=sys.stderr)


def _policy(house: House, config: Config) -> Policy:
    """Return the configured global policy; engines that rules were given for are asked too."""
    policy = Settings(global_=config.policy).resolve("", "", "")
    known = {rule.engine for rule in policy.engines}
    if missing := known - set(house.engines):
        kept = tuple(r for r in policy.engines if r.engine not in missing or r.required)
        policy = replace(policy, engines=kept)
    return policy


# -- what there is to scan -----------------------------------------------------------------------


def _jobs(house: House, targets: Sequence[str], policy: Policy, tally: _Tally) -> Iterator[_Job]:
    for target in targets:
        found = False
        try:
            for job in _target(house, target, policy):
                found = True
                yield job
        except Error as error:
            found = True
            tally.problems.append(f"{target}: {error}")
        if not found:
            tally.problems.append(f"{target}: there is nothing to scan in it")


def _target(house: House, target: str, policy: Policy) -> Iterator[_Job]:
    from bucketward.stores.file import PRIVATE, key_of

    if target == "-":
        yield _Job(lambda: _scan_stdin(house.scanner, policy))
        return
    if "://" in target and not target.startswith("file://"):
        parts = urlsplit(target)
        prefix = parts.path.removeprefix("/")
        bucket = f"{parts.scheme}://{parts.netloc}"
        store = house.store(f"{bucket}?{parts.query}" if parts.query else bucket)
        yield from _listed(house, store, prefix, policy)
        return
    path = folder_of(target) if target.startswith("file://") else Path(target)
    path = Path(os.path.normpath(path.absolute()))  # not resolve(): links are not followed
    if path.is_symlink():
        raise Unsupported("is a symbolic link, which is not followed; name what it points to")
    if path.is_dir():
        yield from _listed(house, house.store(path.as_uri()), "", policy)
        # Where this directory is a bucket, that is the store's own; elsewhere it is anybody's.
        if os.path.lexists(private := path / PRIVATE):
            yield from _target(house, str(private), policy)
        return
    if not path.exists():
        raise Denied("there is no such file or directory")
    if not path.is_file():
        raise Unsupported("is neither a file nor a directory")
    store = house.store(path.parent.as_uri())
    key = key_of([os.fsencode(path.name)])
    yield _Job(lambda: _scan(house.scanner, store, ObjectRef(store.bucket, key), policy))


def _listed(house: House, store: Store, prefix: str, policy: Policy) -> Iterator[_Job]:
    cursor = ""
    while True:
        page = store.list(prefix, cursor=cursor)
        for info in page.items:
            ref = ObjectRef(info.bucket, info.key, info.version_id, size=info.size)
            yield _Job(lambda ref=ref: _scan(house.scanner, store, ref, policy))  # type: ignore[misc]  # bound now
        cursor = page.cursor
        if not cursor:
            return


def _scan(scanner: Scanner, store: Store, ref: ObjectRef, policy: Policy) -> ScanResult:
    for attempt in range(1, _TRIES + 1):
        try:
            with scanner.scan(store, ref, policy, cause=_CAUSE, alone=attempt == _TRIES) as scan:
                return scan.result
        except Unavailable as error:
            if attempt == _TRIES:
                return give_up(ref, _CAUSE, str(error), datetime.now(UTC))
            time.sleep(0.5 * attempt)
        except Error as error:  # gone or changed under us
            return give_up(ref, _CAUSE, str(error), datetime.now(UTC), reason="unreadable")
    raise AssertionError


def _scan_stdin(scanner: Scanner, policy: Policy) -> ScanResult:
    started = time.monotonic()
    now = datetime.now(UTC)
    info = ObjectInfo("", "-", 0, "", now)
    nothing = replace(give_up(info.ref, _CAUSE, "", now), object=info)
    with tempfile.TemporaryFile(dir=_folder(scanner)) as held:
        room = min(scanner.spool.largest, max(e.max_size for e in scanner.engines.values()))
        while chunk := sys.stdin.buffer.read(_CHUNK):
            info = replace(info, size=info.size + len(chunk))
            if info.size > room:
                return replace(
                    nothing,
                    object=info,
                    verdict=Verdict.UNSCANNABLE,
                    reasons=(Reason.TOO_LARGE,),
                    message=f"more than {room} bytes",
                )
            held.write(chunk)
        held.flush()
        with scanner.spool.reserve(info.size) as slot:
            target = slot.writable()
            offset = 0
            while offset < info.size:
                offset += os.sendfile(target, held.fileno(), offset, info.size - offset)
            file = slot.seal("-")
            for attempt in range(1, _TRIES + 1):
                try:
                    judgement = scanner.judge(file, "-", policy, alone=attempt == _TRIES)
                    break
                except Unavailable as error:
                    if attempt == _TRIES:
                        return replace(nothing, object=info, message=str(error))
                    time.sleep(0.5 * attempt)
    return ScanResult(
        id=scan_id(info, _CAUSE),
        object=info,
        verdict=judgement.verdict,
        scanned_at=now,
        reasons=judgement.reasons,
        reports=judgement.reports,
        sha256=judgement.sha256,
        seconds=time.monotonic() - started,
        engines=judgement.engines,
        message="; ".join(r.message for r in judgement.reports if r.message),
    )


def _folder(scanner: Scanner) -> Path:
    scanner.spool.directory.mkdir(parents=True, exist_ok=True)
    return scanner.spool.directory


# -- running and telling -------------------------------------------------------------------------


def _run(jobs: Iterator[_Job], tally: _Tally, *, threads: int) -> None:
    """Scan with some threads, print results in the order of the jobs, hold few at a time."""
    waiting: deque[Future[ScanResult]] = deque()
    pool = ThreadPoolExecutor(threads, "scan")
    with _progress() as advance:
        try:
            for job in jobs:
                waiting.append(pool.submit(job.run))
                if len(waiting) >= 4 * threads:
                    _tell(waiting.popleft().result(), tally, advance)
            while waiting:
                _tell(waiting.popleft().result(), tally, advance)
        except BaseException:
            # Interrupted, or nobody reads on: what is being scanned is not waited for.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()


def _tell(result: ScanResult, tally: _Tally, advance: Callable[[ScanResult], None]) -> None:
    tally.verdicts[result.verdict] += 1
    tally.bytes += result.object.size
    print(
        json.dumps(
            {
                "bucket": result.object.bucket,
                "key": result.object.key,
                "version_id": result.object.version_id,
                "size": result.object.size,
                "sha256": result.sha256,
                "verdict": result.verdict,
                "reasons": result.reasons,
                "findings": [
                    {"engine": f.engine, "signature": f.signature, "member": f.member}
                    for f in result.findings
                ],
                "seconds": round(result.seconds, 4),
                **({"message": result.message} if result.message else {}),
            }
        ),
        flush=True,
    )
    advance(result)


class _progress:  # noqa: N801 - used as a function
    """A progress line on the terminal, nothing anywhere else."""

    def __enter__(self) -> Callable[[ScanResult], None]:
        self._stack = ExitStack()
        if not sys.stderr.isatty() or sys.stdout.isatty():
            # On one terminal the results themselves show the progress.
            return lambda _: None
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        bar = self._stack.enter_context(
            Progress(
                SpinnerColumn(),
                TextColumn("{task.completed} scanned"),
                TextColumn("{task.fields[found]} found", style="red"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[name]}", markup=False),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=False,  # it is a file or a pipe
            )
        )
        task = bar.add_task("scan", total=None, found=0, name="")
        found = 0

        def advance(result: ScanResult) -> None:
            nonlocal found
            found += bool(result.findings)
            name = printable(result.object.key)[-60:]
            bar.update(task, advance=1, found=found, name=name)

        return advance

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _summarise(tally: _Tally, seconds: float) -> None:
    for problem in tally.problems:
        print(printable(problem), file=sys.stderr)
    counts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(tally.verdicts.items()))
    print(
        f"{tally.verdicts.total()} scanned in {seconds:.1f} s, {tally.bytes:,} bytes: "
        f"{counts or 'nothing'}",
        file=sys.stderr,
    )
