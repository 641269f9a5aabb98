"""The moto server: AWS services over real connections, in a process of its own."""

import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import boto3

from servers import need


@dataclass(frozen=True)
class Moto:
    """A running moto server."""

    url: str

    def client(self, service: str, region: str = "us-east-1", **more):
        """Return a boto3 client of `service`, with made-up credentials."""
        return boto3.client(
            service,
            endpoint_url=self.url,
            region_name=region,
            aws_access_key_id="AKIAIOSFODNN7EXAMPLE",
            aws_secret_access_key="test-secret",
            **more,
        )

    def reset(self) -> None:
        """Forget everything."""
        urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/moto-api/reset", method="POST"), timeout=10
        ).close()


@contextmanager
def run_moto(*options: str) -> Iterator[Moto]:
    """Start moto on a free loopback port, with options of its own; end it by its process id."""
    need("moto")
    server = subprocess.Popen(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "moto.server",
            "-H",
            "127.0.0.1",
            "-p",
            "0",
            *options,
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        url = ""
        for line in server.stderr:
            if found := re.search(r"Running on (https?://127\.0\.0\.1:\d+)", line):
                url = found[1]
                break
        if not url:
            pytest_fail = f"moto did not start: exit code {server.wait(5)}"
            raise RuntimeError(pytest_fail)
        drain = threading.Thread(target=server.stderr.read, daemon=True)
        drain.start()
        yield Moto(url)
    finally:
        server.kill()
        server.wait()
        drain.join(5)
        server.stderr.close()
