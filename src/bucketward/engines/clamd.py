"""A clamd of our own: made, fed with signatures, watched, replaced, and shared by all processes.

Every daemon that is started has a number.  Its socket and scratch space are in ``run/N``, which
it owns; ``current`` names the daemon that serves.  New signatures mean a new daemon beside the
old one, so a set that does not load never takes the engine down, and what a daemon judges by
never changes under a scan.  The process that holds ``lock`` starts and watches the daemons, the
others connect; when it goes, another takes over.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bucketward.engines import sandbox
from bucketward.errors import ConfigError, Unavailable
from bucketward.model import Signatures

log = logging.getLogger(__name__)

SIGNATURE_SUFFIXES = frozenset(
    {
        *("cvd", "cld", "cud", "hdb", "hsb", "hdu", "hsu", "mdb", "msb", "mdu", "msu", "ndb"),
        *("ndu", "ldb", "ldu", "db", "idb", "cdb", "cbc", "fp", "sfp", "ign", "ign2", "pdb"),
        *("gdb", "wdb", "ftm", "crb", "cat", "imp", "info", "cfg", "pwdb", "ioc", "yar"),
        *("yara", "sign"),
    }
)
"""What libclamav loads from a directory (CLI_DBEXT in others.h and readdb.c of 1.4)."""

_FORBIDDEN_OPTIONS = frozenset(
    {
        *("databasedirectory", "localsocket", "tcpsocket", "tcpaddr", "foreground"),
        *("alertencrypted", "alertencryptedarchive", "alertencrypteddoc", "alertexceedsmax"),
        *("heuristicscanprecedence", "virusevent", "user", "temporarydirectory", "selfcheck"),
        *("maxfilesize", "maxscansize", "maxfiles", "maxrecursion", "maxscantime"),
        *("exitonoom", "scanarchive", "excludepath", "maxembeddedpe", "maxhtmlnormalize"),
        *("maxhtmlnotags", "maxscriptnormalize", "pcremaxfilesize", "maxpartitions"),
        *("logfilemaxsize", "heuristicalerts", "readtimeout", "commandreadtimeout"),
        *("leavetemporaryfiles", "bytecodeunsigned", "scanpe", "scanelf", "scanole2"),
        *("scanpdf", "scanhtml", "scanmail", "scanimage", "scanswf", "scanxmldocs"),
        *("scanhwp3", "scanonenote", "logfile", "pidfile", "detectpua", "disablecache"),
        *("maxthreads", "maxqueue", "idletimeout", "streammaxlength", "localsocketmode"),
    }
)

_FATAL = re.compile(r"(ERROR|LibClamAV Error): (.*)")
_LOADING = 900.0
"""Seconds that clamd may take to load its database."""
_LOADED = re.compile(r"Loaded (\d+) signatures")


def demo_signatures() -> Path:
    """Return the directory of Bucketward's own demonstration signatures: EICAR, nothing else."""
    return Path(__file__).with_name("demo")


@dataclass(frozen=True)
class Limits:
    """How far a managed clamd looks into a file.  What lies behind is Unscannable.

    Sizes in bytes, at most 4,000 MiB; time in seconds for one file.  `threads` is how many files
    one daemon looks at at a time.  `cache` lets clamd answer for bytes that it has seen before; it
    knows them by MD5, which an attacker can forge, and then it counts no limit, so it is off.
    """

    file_size: int = 2_147_483_645
    scan_size: int = 4_000 << 20
    files: int = 100_000
    recursion: int = 20
    scan_time: float = 120
    threads: int = 16
    pua: bool = False
    cache: bool = False


@dataclass(frozen=True)
class Daemon:
    """One running clamd: its number, its process and what it judges by."""

    number: str
    pid: int
    born: int
    """Start of the process in clock ticks since boot: a process id alone may be used again."""
    signatures: Signatures


_REMEMBERED = 600.0  # seconds for which it is known that a daemon was ended on purpose


class _Home:
    """What the parts of this module share: where everything is, and what was asked for."""

    def __init__(self, directory: Path, source: Path, poll: float, salt: str) -> None:
        self.source = source
        self.poll = poll
        self.salt = salt
        self.limits = Limits()
        self.options: Mapping[str, str] = {}
        self.program = ""
        self.uid = self.gid = -1
        self.hashes: dict[tuple[str, int, int, int], str] = {}
        self.in_use: Callable[[str], int] = lambda _: 0
        self.ended: set[str] = set()
        """The daemons that this process ended on purpose."""
        self.closing = threading.Event()
        self.wake = threading.Event()
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)
        for name in ("run", "sets"):
            (directory / name).mkdir(exist_ok=True)
            (directory / name).chmod(0o755)
        self.fd = os.open(directory, os.O_PATH | os.O_CLOEXEC)
        # Short enough for a socket address (107 bytes), wherever the directory may be.
        self.base = Path(f"/proc/self/fd/{self.fd}")

    def pause(self, seconds: float) -> None:
        """Sleep, unless there is something to do."""
        if self.wake.wait(seconds):
            self.wake.clear()

    def problem(self) -> Unavailable:
        """Return why no daemon serves."""
        try:
            return Unavailable((self.base / "problem").read_text("utf-8"), backend="clamav")
        except OSError:
            return Unavailable(
                "clamd is starting: it loads its signature database",
                backend="clamav",
                reason="loading",
            )

    def say_problem(self, text: str) -> None:
        """Let every process know why no daemon serves, or with "" that one does."""
        path = self.base / "problem"
        if not text:
            path.unlink(missing_ok=True)
            return
        with contextlib.suppress(OSError):
            if path.read_text("utf-8") == text:
                return
        log.error("clamav: %s", text)
        path.with_suffix(".new").write_text(text, "utf-8")
        path.with_suffix(".new").replace(path)


class Clamd:
    """The managed clamd under `directory`, in whichever process it may be.

    `signatures` is the directory whose files are loaded; it is looked at every `poll` seconds.
    `options` are further lines for clamd.conf; those on which verdicts rest are refused.
    """

    def __init__(
        self,
        directory: Path,
        signatures: Path,
        *,
        limits: Limits | None = None,
        options: Mapping[str, str] | None = None,
        user: str = "",
        program: str = "clamd",
        poll: float = 5.0,
        salt: str = "",
    ) -> None:
        self._cached: Daemon | None = None
        for name, value in (options or {}).items():
            if name.lower() in _FORBIDDEN_OPTIONS or not name.isalnum() or not value.isprintable():
                raise ConfigError(
                    f"clamd option {name!r} cannot be set so: verdicts rest on Bucketward's value",
                    backend="clamav",
                )
        # Debian has clamd in /usr/sbin, which is not on everybody's path.
        found = shutil.which(
            program, path=os.pathsep.join((*os.get_exec_path(), "/usr/sbin", "/usr/local/sbin"))
        )
        if found is None:
            raise ConfigError(
                f"there is no program {program}: install the package clamav-daemon, or name an "
                "external clamd",
                backend="clamav",
            )
        try:
            self._home = _Home(directory, signatures, poll, salt)
            self._home.uid, self._home.gid = sandbox.unprivileged_user(user)
        except (OSError, LookupError) as error:
            raise ConfigError(f"cannot use {directory}: {error}", backend="clamav") from error
        self._home.limits = limits or Limits()
        self._home.options = dict(options or {})
        self._home.program = found
        self._base = str(self._home.base)
        self._thread = threading.Thread(target=self._supervise, name="clamd", daemon=True)
        self._thread.start()

    def on_replace(self, in_use: Callable[[str], int]) -> None:
        """Let `in_use` tell how many scans a daemon still works for, before it is ended."""
        self._home.in_use = in_use

    def current(self) -> Daemon:
        """Return the daemon that serves now; `Unavailable` says why there is none."""
        try:
            # Asked for every file: a Path would take longer than the answer.
            number = os.readlink(f"{self._base}/current")  # noqa: PTH115
            if self._cached is not None and self._cached.number == number:
                return self._cached
            daemon = _read_daemon(self._home.base / f"{number}.json", number)
        except (OSError, ValueError, KeyError, TypeError):
            raise self._home.problem() from None
        self._cached = daemon
        return daemon

    def wait(self, deadline: float) -> Daemon:
        """Return the daemon that serves as soon as there is one.

        `Unavailable` at once if there will be none without an operator, or at the deadline.
        """
        pause = 0.005
        while True:
            try:
                return self.current()
            except Unavailable:
                if time.monotonic() + pause > deadline or self._home.closing.is_set():
                    raise
                if (self._home.base / "problem").exists():
                    raise
            time.sleep(pause)
            pause = min(0.1, pause * 1.5)

    def connect(self, daemon: Daemon, timeout: float) -> socket.socket:
        """Return a connection to `daemon`.  Raises `OSError`."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.settimeout(timeout)
            connection.connect(f"{self._base}/{daemon.number}/clamd.sock")
        except BaseException:
            connection.close()
            raise
        return connection

    def has_ended(self, daemon: Daemon) -> bool:
        """Tell whether `daemon` ended, after its connection did, which it takes a moment to."""
        for _ in range(20):
            if _birth(daemon.pid) != daemon.born:
                return True
            time.sleep(0.005)
        return False

    @contextlib.contextmanager
    def alone(self, deadline: float) -> Iterator[None]:
        """Keep other processes from ending daemons for a file that they judge alone meanwhile.

        `TimeoutError` if another still does at the deadline.
        """
        with (self._home.base / "alone").open("a+b") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError from None
                    time.sleep(0.02)
            yield

    def was_meant_to_end(self, daemon: Daemon) -> bool:
        """Return whether some process ended `daemon` on purpose, in the last while."""
        marked = self._home.base / f"{daemon.number}.ended"
        return daemon.number in self._home.ended or marked.exists()

    def recycle(self, daemon: Daemon) -> None:
        """End `daemon` now, whatever it does, and do not come back before it is out of service."""
        self._home.ended.add(daemon.number)
        with contextlib.suppress(OSError):  # for the other processes that share it
            marks = self._home.base / "run"
            (self._home.base / f"{daemon.number}.ended").touch()
            for mark in marks.glob("*.ended"):
                if time.time() - mark.stat().st_mtime > _REMEMBERED:
                    mark.unlink(missing_ok=True)
        if _birth(daemon.pid) == daemon.born:
            with contextlib.suppress(ProcessLookupError):
                os.kill(daemon.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            if (self._home.base / "current").readlink() == Path(daemon.number):
                (self._home.base / "current").unlink()
        self._home.wake.set()

    def close(self) -> None:
        """End the daemon if it is ours, and the watching."""
        if self._home.fd < 0:
            return
        self._home.closing.set()
        self._home.wake.set()
        self._thread.join()
        os.close(self._home.fd)
        self._home.fd = -1

    def _supervise(self) -> None:
        while not self._home.closing.is_set():
            try:
                with (self._home.base / "lock").open("a+b") as lock:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        self._home.pause(min(0.5, self._home.poll))
                        continue
                    _Owner(self._home).run()
            except OSError as error:
                # A full disk, most likely: what runs keeps running, or starts again later.
                log.warning("clamav: cannot manage clamd: %s", error)
                self._home.pause(1)


class _Owner:
    """The half of `Clamd` that only the holder of the lock runs, on one thread.

    One thread, because a daemon dies with the thread that started it.
    """

    def __init__(self, home: _Home) -> None:
        self._home = home
        self._base = home.base
        self._running: _Process | None = None
        self._tried: object = None
        """The listing that was last loaded, or refused."""
        self._seen: object = None
        self._set: tuple[Path, str] | None = None
        """The last signature set that loaded, and its digest."""
        self._failures = 0

    def run(self) -> None:
        home = self._home
        try:
            self._sweep()
            home.say_problem("")
            while not home.closing.is_set():
                self._step()
                if self._running is None:
                    home.pause(min(0.05 * 2**self._failures, 10) if self._failures else 0.01)
                    continue
                looked = time.monotonic()
                # Its end is noticed soon; the signatures are looked at now and then.
                while not self._running.exited and time.monotonic() < looked + home.poll:
                    home.pause(0.05)
                    if home.closing.is_set():
                        break
        finally:
            self._stop(self._running)
            with contextlib.suppress(OSError):
                (self._base / "current").unlink()
            shutil.rmtree(self._base / "sets", ignore_errors=True)
            home.say_problem("")

    def _step(self) -> None:
        listing = _listing(self._home.source)
        settled = listing == self._seen
        self._seen = listing
        if self._running is not None and self._running.exited:
            self._bury(self._running)
            self._running = None
            return
        if not listing:
            if self._running is None:
                self._home.say_problem(
                    f"no signature database in {self._home.source}: run freshclam or put *.cvd "
                    "or *.hdb files there"
                )
            return
        if listing != self._tried and (settled or self._running is None):
            self._tried = listing
            self._load()
        elif self._running is None and self._set is not None:
            self._start(*self._set)
        elif self._running is None:
            self._load()

    def _load(self) -> None:
        """Take a copy of the signatures and start a daemon on it; keep the old one if it fails."""
        try:
            copied = self._copy()
        except OSError as error:
            self._refuse(f"cannot copy the signatures of {self._home.source}: {error}")
            self._tried = None
            return
        if self._set is not None and copied[1] == self._set[1] and self._running is not None:
            shutil.rmtree(copied[0], ignore_errors=True)
            return
        self._make_room()
        previous = self._set
        if self._start(*copied):
            if previous is not None and previous[0] != copied[0]:
                shutil.rmtree(previous[0], ignore_errors=True)
            self._set = copied
        else:
            shutil.rmtree(copied[0], ignore_errors=True)

    def _make_room(self) -> None:
        """End the old daemon first where memory does not hold two."""
        if self._running is None:
            return
        need = self._running.rss()
        available = _memory_available()
        if available is not None and available < need * 1.2:
            log.warning(
                "clamav: new signatures are loaded while no scan runs: a second set needs about "
                "%d MiB and %d MiB are available",
                need >> 20,
                available >> 20,
            )
            self._stop(self._running)
            self._running = None
            return
        log.info(
            "clamav: new signatures are loaded beside those in use, which takes about %d MiB more "
            "until they take over; %s MiB are available",
            need >> 20,
            "unknown" if available is None else available >> 20,
        )

    def _start(self, folder: Path, digest: str) -> bool:
        process = _Process(self._home, folder)
        version, count = process.wait_ready()
        if not version:
            problem = process.problem()
            process.stop()
            self._failures = min(self._failures + 1, 8)
            if not self._home.closing.is_set():
                self._refuse(f"clamd does not start with the signatures it was given: {problem}")
            return False
        engine, _, dated = version.partition("/")
        signatures = Signatures(
            digest=_digest(engine, digest, self._home.salt, _settings(self._home)),
            version=version if dated else f"{engine}, {_names(folder)}",
            updated_at=_updated_at(folder),
            count=count,
            is_demo=_is_demo(folder),
        )
        process.publish(signatures)
        self._home.say_problem("")
        old, self._running = self._running, process
        if old is not None:
            log.info("clamav: judging by %s, %d signatures", signatures.version, count)
            self._retire(old)
        return True

    def _refuse(self, text: str) -> None:
        if self._running is not None and not self._running.exited:
            log.error("clamav: %s; the signatures loaded before stay in use", text)
        else:
            self._home.say_problem(text)

    def _retire(self, old: _Process) -> None:
        """Let `old` finish what it works on for us; others send theirs again."""
        patience = time.monotonic() + 30
        while (
            self._home.in_use(old.number)
            and not old.exited
            and not (self._running is None or self._running.exited)
            and time.monotonic() < patience
            and not self._home.closing.is_set()
        ):
            time.sleep(0.02)
        self._stop(old)

    def _stop(self, process: _Process | None) -> None:
        if process is not None:
            process.stop()

    def _bury(self, process: _Process) -> None:
        is_meant = (self._base / f"{process.number}.ended").exists()
        if not is_meant and process.number not in self._home.ended:
            log.warning("clamav: clamd ended (%s) and is started again", process.problem())
            # One that lived for a while may start at once; one that did not has to wait.
            self._failures = 0 if process.age() > 5 else min(self._failures + 1, 6)
        with contextlib.suppress(OSError):
            if (self._base / "current").readlink() == Path(process.number):
                (self._base / "current").unlink()
        process.stop()

    def _sweep(self) -> None:
        """Remove what an owner before us left behind."""
        for path in (self._base / "run").iterdir():
            if path.suffix == ".json":
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    stale = _read_daemon(path, path.stem)
                    if _birth(stale.pid) == stale.born:
                        os.kill(stale.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            (self._base / "current").unlink()
        for name in ("run", "sets"):
            (self._base / name).mkdir(mode=0o755, exist_ok=True)
            for path in (self._base / name).iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _copy(self) -> tuple[Path, str]:
        """Return a copy of the signatures that the engine's user can read, and its digest."""
        home = self._home
        folder = self._base / "sets" / _fresh_number()
        folder.mkdir(mode=0o755)
        whole = hashlib.sha256()
        for name, size, mtime, inode in _listing(home.source):
            source = home.source / name
            target = folder / name
            shutil.copyfile(source, target)
            target.chmod(0o644)
            key = (name, size, mtime, inode)
            digest = home.hashes.get(key)
            if digest is None:
                with target.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                home.hashes[key] = digest
            whole.update(f"{digest} {name}\n".encode("utf-8", "surrogateescape"))
        return folder, whole.hexdigest()


class _Process:
    """One clamd process, started by the calling thread."""

    def __init__(self, home: _Home, folder: Path) -> None:
        self._home = home
        self._base = home.base
        self._born = time.monotonic()
        self._lines: deque[str] = deque(maxlen=50)
        number = _fresh_number()
        self.number = f"run/{number}"
        self._scratch = self._base / self.number
        (self._scratch / "tmp").mkdir(parents=True, mode=0o700)
        self._scratch.chmod(0o700)
        if os.geteuid() == 0:
            for path in (self._scratch, self._scratch / "tmp"):
                os.chown(path, home.uid, home.gid)
        lines = [f"{name} {value}" for name, value in _settings(home)]
        lines += [f"DatabaseDirectory ../../sets/{folder.name}", "LocalSocket clamd.sock"]
        (self._base / f"{self.number}.conf").write_text("\n".join(lines) + "\n", "utf-8")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", sandbox.__file__),
                *(str(os.getpid()), str(home.uid), str(home.gid)),
                *(home.program, "-c", f"../{number}.conf"),
            ],
            # Paths relative to here need no right to pass the folders above, which may be ours.
            cwd=self._scratch,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="clamd-log", daemon=True)
        self._reader.start()

    @property
    def exited(self) -> bool:
        return self._process.poll() is not None

    def age(self) -> float:
        return time.monotonic() - self._born

    def rss(self) -> int:
        with contextlib.suppress(OSError, ValueError, IndexError):
            statm = Path(f"/proc/{self._process.pid}/statm").read_text("ascii").split()
            return int(statm[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0

    def problem(self) -> str:
        """Return what clamd said last, as one line."""
        fatal = [match[2] for line in self._lines if (match := _FATAL.search(line))]
        code = self._process.poll()
        return "; ".join(fatal[:3]) or f"exit status {code}"

    def wait_ready(self) -> tuple[str, int]:
        """Return what clamd calls itself once it answers, and its count; "" if it ends instead."""
        pause = 0.01
        patience = time.monotonic() + _LOADING
        while not self.exited and not self._home.closing.is_set() and time.monotonic() < patience:
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                    connection.settimeout(10)
                    connection.connect(f"{self._base}/{self.number}/clamd.sock")
                    connection.sendall(b"zVERSION\0")
                    answer = connection.recv(200)
                if answer.startswith(b"ClamAV ") and answer.endswith(b"\0"):
                    return answer[:-1].decode("ascii", "replace"), self._counted()
            except OSError:
                pass
            self._home.closing.wait(pause)
            pause = min(0.2, pause * 1.3)
        return "", 0

    def _counted(self) -> int:
        """Return the number of signatures, which clamd tells its log file alone."""
        with contextlib.suppress(OSError), (self._scratch / "clamd.log").open("rb") as file:
            if match := _LOADED.search(file.read(65_536).decode("utf-8", "replace")):
                return int(match[1])
        return 0

    def publish(self, signatures: Signatures) -> None:
        """Make this the daemon that serves."""
        dated = signatures.updated_at
        record = {
            "pid": self._process.pid,
            "born": _birth(self._process.pid),
            "digest": signatures.digest,
            "version": signatures.version,
            "updated_at": dated and dated.isoformat(),
            "count": signatures.count,
            "is_demo": signatures.is_demo,
        }
        (self._base / f"{self.number}.json").write_text(json.dumps(record), "utf-8")
        fresh = self._base / "current.new"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(self.number)
        fresh.replace(self._base / "current")

    def stop(self) -> None:
        self._home.ended.discard(self.number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
        for ending in ("conf", "json"):
            (self._base / f"{self.number}.{ending}").unlink(missing_ok=True)

    def _read(self) -> None:
        output = self._process.stdout
        assert output is not None
        for raw in iter(lambda: output.readline(4096), b""):
            line = raw.decode("utf-8", "replace").strip()
            if line.endswith(" FOUND"):
                continue
            self._lines.append(line)
            log.debug("clamd: %s", line)


def _settings(home: _Home) -> Sequence[tuple[str, str]]:
    limits = home.limits
    threads = max(2, limits.threads)
    return [
        ("Foreground", "yes"),
        ("LocalSocketMode", "600"),
        ("TemporaryDirectory", "tmp"),
        ("LogFile", "/proc/self/cwd/clamd.log"),
        ("LogFileMaxSize", "1M"),
        ("SelfCheck", "0"),
        ("MaxThreads", str(threads)),
        ("MaxQueue", str(2 * threads + 100)),
        ("ReadTimeout", "3600"),
        ("CommandReadTimeout", "3600"),
        ("IdleTimeout", "60"),
        # Memory that cannot be had must end in no answer, not in a scan that skipped something.
        ("ExitOnOOM", "yes"),
        ("AlertExceedsMax", "yes"),
        ("AlertEncrypted", "yes"),
        ("HeuristicScanPrecedence", "no"),
        ("DetectPUA", "yes" if limits.pua else "no"),
        ("DisableCache", "no" if limits.cache else "yes"),
        ("StreamMaxLength", str(limits.file_size)),
        ("MaxFileSize", str(limits.file_size)),
        ("MaxScanSize", str(limits.scan_size)),
        ("MaxFiles", str(limits.files)),
        ("MaxRecursion", str(limits.recursion)),
        ("MaxScanTime", str(int(limits.scan_time * 1000))),
        # Beyond these clamd leaves something out and says nothing (docs/clamav-limits.md).
        ("MaxEmbeddedPE", str(limits.file_size)),
        ("MaxHTMLNormalize", str(limits.file_size)),
        ("MaxHTMLNoTags", str(limits.file_size)),
        ("MaxScriptNormalize", str(limits.file_size)),
        ("PCREMaxFileSize", "0"),
        ("MaxPartitions", "1000"),
        *sorted(home.options.items()),
    ]


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _is_demo(folder: Path) -> bool:
    """Return whether a set holds nothing but our demonstration signatures, wherever they lay."""
    demo = {path.read_bytes() for path in demo_signatures().iterdir()}
    most = max(map(len, demo))
    paths = [path for path in folder.iterdir() if path.suffix[1:] in SIGNATURE_SUFFIXES]
    return all(path.stat().st_size <= most and path.read_bytes() in demo for path in paths)


def _listing(folder: Path) -> list[tuple[str, int, int, int]]:
    """Return name, size, change time and inode of every signature file, in order."""
    found = []
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return []
    for entry in entries:
        if entry.name.startswith(".") or Path(entry.name).suffix[1:] not in SIGNATURE_SUFFIXES:
            continue
        with contextlib.suppress(OSError):
            if entry.is_file():
                stat = entry.stat()
                found.append((entry.name, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return sorted(found)


def _names(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _updated_at(folder: Path) -> datetime | None:
    """Return the newest date that a database bears in its own header; plain files bear none.

    The header of .cvd, .cld and .cud is ``ClamAV-VDB:07 Nov 2026 08-32 +0000:...`` (sigtool).
    """
    dates = []
    for path in folder.iterdir():
        if path.suffix not in (".cvd", ".cld", ".cud"):
            continue
        with path.open("rb") as file:
            head = file.read(512).decode("ascii", "replace").split(":")
        with contextlib.suppress(ValueError, IndexError):
            dates.append(datetime.strptime(head[1], "%d %b %Y %H-%M %z").astimezone(UTC))
    return max(dates, default=None)


def _fresh_number() -> str:
    return f"{time.time_ns():x}-{os.getpid()}"


def _read_daemon(path: Path, number: str) -> Daemon:
    record = json.loads(path.read_bytes())
    dated = record["updated_at"]
    signatures = Signatures(
        digest=record["digest"],
        version=record["version"],
        updated_at=datetime.fromisoformat(dated) if dated else None,
        count=record["count"],
        is_demo=record["is_demo"],
    )
    return Daemon(number, record["pid"], record["born"], signatures)


def _birth(pid: int) -> int:
    """Return when a process started, in ticks; 0 if it ended (proc(5), stat, fields 3 and 22)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return 0


def _memory_available() -> int | None:
    """Return how many bytes of memory are left here, in our control group too; `None` unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text("ascii"))
        found.append(limit - int((group / "memory.current").read_text("ascii")))
    return min(found, default=None)
