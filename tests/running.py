"""Bucketward as its users run it: processes of their own, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from bucketward.ledger import TABLES, Ledger
from bucketward.states.sqlite import SqliteState

TESTFILES = Path("/usr/share/clamav-testfiles")


class Process:
    """A running `bucketward` command; `log` has its output so far."""

    def __init__(self, command, *, cwd, environ, log):
        self.log_path = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bucketward", *command],
                cwd=cwd,
                # A port that is free: others may run here too.
                env={"BUCKETWARD_METRICS__PORT": "0", **environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self):
        return self._process.pid

    @property
    def log(self):
        return self.log_path.read_text("utf-8", "replace")

    def wait_for(self, text, seconds=30.0):
        """Wait until the output has `text`."""
        end = time.monotonic() + seconds
        while text not in self.log:
            assert self._process.poll() is None, f"it ended:\n{self.log}"
            assert time.monotonic() < end, f"no {text!r} in:\n{self.log}"
            time.sleep(0.05)

    def stop(self, number=signal.SIGTERM, seconds=30.0):
        """End it and return its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(number)
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"it did not stop:\n{self.log}") from None


class Home:
    """A folder with a configuration, in which bucketward commands are run."""

    def __init__(self, folder, config="", environ=None):
        self.folder = Path(folder)
        self.data = self.folder / "data"
        (self.folder / "bucketward.toml").write_text(f'data = "data"\n{config}')
        self._environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "AWS_EC2_METADATA_DISABLED": "true",
            **(environ or {}),
        }

    @contextmanager
    def running(self, *command):
        """Run a command for the length of a block; it must stop in good order."""
        process = Process(
            command,
            cwd=self.folder,
            environ=self._environ,
            log=self.folder / f"{command[0]}.log",
        )
        try:
            yield process
        except BaseException:
            print(process.log[-4000:])
            raise
        finally:
            code = process.stop()
        assert code == 0, process.log

    def run(self, *command, seconds=120):
        """Run a command to its end and return what `subprocess.run` does."""
        return subprocess.run(
            [sys.executable, "-m", "bucketward", *command],
            cwd=self.folder,
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    @contextmanager
    def ledger(self):
        """Open the ledger; other processes may have it open too."""
        state = SqliteState(self.data / "state.db", TABLES)
        try:
            yield Ledger(state)
        finally:
            state.close()


@contextmanager
def webhook():
    """Yield the URL of a local server and the list of bodies it was sent."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(json.loads(body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", received
    finally:
        server.shutdown()
        server.server_close()


def free_port():
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def ordinary_files(count):
    """Return so many ordinary system files, by name: text, programs, libraries, archives."""
    found = {}
    for folder in ("/usr/share/doc", "/usr/bin", "/etc", "/usr/share/perl5", "/usr/share/zoneinfo"):
        taken = 0
        for path in sorted(Path(folder).rglob("*")):
            if taken >= count // 4 or len(found) >= count:
                break
            try:
                if path.is_symlink() or not path.is_file() or not 0 < path.stat().st_size < 150_000:
                    continue
                found[str(path)[1:]] = path.read_bytes()
                taken += 1
            except OSError:
                continue
    return found


def sample_signature(folder):
    """Write the one hash signature that finds all 44 sample files, made from `clam.exe`."""
    folder.mkdir(parents=True, exist_ok=True)
    line = subprocess.run(
        ["sigtool", "--md5", str(TESTFILES / "clam.exe")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    digest, size, _ = line.strip().split(":")
    (folder / "sample.hdb").write_text(f"{digest}:{size}:Test.Sample\n")
