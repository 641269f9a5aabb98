"""A clamd that is not ours: started as a distribution would, for the engine to connect to."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bucketward.engines.clamav import demo_signatures


@dataclass(frozen=True)
class External:
    """One running clamd."""

    socket: Path
    port: int
    stream_limit: int
    pid: int


@contextmanager
def run_clamd(
    folder: Path, *, alerts: bool = True, signatures: Path | None = None
) -> Iterator[External]:
    """Run clamd in `folder`, on a socket there and on a port of the loopback interface."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "clamd.sock"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    yes = "yes" if alerts else "no"
    config = folder / "clamd.conf"
    config.write_text(
        f"DatabaseDirectory {signatures or demo_signatures()}\n"
        f"LocalSocket {path}\nTCPSocket {port}\nTCPAddr 127.0.0.1\nForeground yes\n"
        f"TemporaryDirectory {folder}\nAlertExceedsMax {yes}\nAlertEncrypted {yes}\n"
        "StreamMaxLength 10M\n"
    )
    with (folder / "clamd.out").open("wb") as output:
        process = subprocess.Popen(
            ["/usr/sbin/clamd", "-c", str(config)],
            stdout=output,
            stderr=output,
            env={"PATH": os.environ["PATH"]},
        )
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "clamd.out").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield External(path, port, 10 << 20, process.pid)
    finally:
        process.kill()
        process.wait()
