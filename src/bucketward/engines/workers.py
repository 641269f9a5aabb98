"""Processes without rights that look at hostile bytes for us, one file at a time each.

A worker gets the file as a descriptor over its socket and answers with a JSON object.  It is
killed when it is late, and whatever it may have become, the next file gets another one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from bucketward.engines import sandbox

REPLY_LIMIT = 65_536


class Late(Exception):  # noqa: N818 - control flow between the modules of this package
    """The deadline passed, and the worker has been killed."""


class Busy(Late):
    """The deadline passed before a worker was free; nobody has looked at the file."""


class Died(Exception):  # noqa: N818
    """The worker ended, or answered nonsense, and has been killed."""


class Workers:
    """At most `count` processes of one kind, started when they are first needed.

    `kind` is ``containers`` or ``yara``.  `load` is called for every new worker and returns the
    request and descriptor that prepare it, if it needs any.  `memory` bounds its address space.
    """

    def __init__(
        self,
        kind: str,
        count: int,
        *,
        user: str = "",
        memory: int = 8 << 30,
        load: Callable[[], tuple[Mapping[str, Any], int]] | None = None,
    ) -> None:
        self._kind = kind
        self._memory = memory
        self._load = load
        self._owner = sandbox.unprivileged_user(user)
        self._free = threading.BoundedSemaphore(count)
        self._idle: list[_Worker] = []
        self._generation = 0
        self._closed = False

    def call(
        self, request: Mapping[str, Any], fd: int, deadline: float, *, fresh: bool = False
    ) -> dict[str, Any]:
        """Have a worker answer `request` about `fd`.

        With `fresh` in a new one, which is thrown away.  Raises `Late` or `Died`.
        """
        if not self._free.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise Busy
        try:
            generation = self._generation
            worker = None if fresh else self._take(generation)
            if worker is None:
                worker = self._start(deadline, generation)
            try:
                answer = worker.call(request, fd, deadline)
            except BaseException:
                worker.kill()
                raise
            if fresh or worker.generation != self._generation or self._closed:
                worker.kill()
            else:
                self._idle.append(worker)
            return answer
        finally:
            self._free.release()

    def renew(self) -> None:
        """Let every call from now on be answered by a worker that starts later than this."""
        self._generation += 1
        self._empty()

    def close(self) -> None:
        """Kill the workers; those that work now end with their file."""
        self._closed = True
        self._empty()

    def _empty(self) -> None:
        while True:
            try:
                self._idle.pop().kill()
            except IndexError:
                return

    def _take(self, generation: int) -> _Worker | None:
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return None
            if worker.generation == generation and worker.is_alive:
                return worker
            worker.kill()

    def _start(self, deadline: float, generation: int) -> _Worker:
        worker = _Worker(self._kind, self._owner, self._memory, generation)
        if self._load is None:
            return worker
        try:
            request, fd = self._load()
            try:
                answer = worker.call(request, fd, deadline)
            finally:
                os.close(fd)
            if "error" in answer:
                raise Died(answer["error"])
        except BaseException:
            worker.kill()
            raise
        return worker


class _Worker:
    def __init__(self, kind: str, owner: tuple[int, int], memory: int, generation: int) -> None:
        self.generation = generation
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(
                        sys.executable,
                        "-I",
                        "-c",
                        _BOOT,
                        json.dumps([path for path in sys.path if path]),
                        kind,
                    ),
                    *(str(theirs.fileno()), *map(str, owner), str(memory)),
                ],
                pass_fds=[theirs.fileno()],
                env={},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def call(self, request: Mapping[str, Any], fd: int, deadline: float) -> dict[str, Any]:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Late
        body = json.dumps({**request, "seconds": left}).encode()
        try:
            self._socket.settimeout(left)
            socket.send_fds(self._socket, [body], [fd])
            answer = json.loads(self._socket.recv(REPLY_LIMIT))
        except TimeoutError:
            raise Late from None
        except (OSError, ValueError) as error:
            raise Died(f"a worker process ended: {self._end()}") from error
        if not isinstance(answer, dict):
            raise Died("a worker process answered nonsense")
        return answer

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()

    def _end(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"exit status {self._process.wait(1)}"
        return "it closed its connection"


# -I hides our own folder from a worker, so it is told where modules are.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from bucketward.engines.workers import main; main(*sys.argv[2:])"
)


def main(kind: str, connection: str, uid: str, gid: str, memory: str) -> None:
    """Be a worker: answer requests until the other side goes away."""
    handle = _handler(kind)
    sandbox.confine(int(uid), int(gid), oom_score=500, memory=int(memory))
    with socket.socket(fileno=int(connection)) as channel:
        while True:
            body, fds, _, _ = socket.recv_fds(channel, REPLY_LIMIT, 1)
            if not body:
                return
            request = json.loads(body)
            # If nobody is left to kill us at the deadline, the kernel does.
            signal.alarm(int(request["seconds"]) + 5)
            try:
                answer = handle(request, fds[0])
            finally:
                os.close(fds[0])
            signal.alarm(0)
            channel.send(json.dumps(answer).encode())


Handler = Callable[[Mapping[str, Any], int], dict[str, Any]]
"""Answers one request about one descriptor."""


def _handler(kind: str) -> Handler:
    if kind == "yara":
        from bucketward.engines import yara_worker

        return yara_worker.Scanner().handle
    from bucketward.engines import containers

    return containers.handle
