"""Parent side of the decoding processes of ``data.decoders``: starts, requests and kills."""

import contextlib
import json
import math
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from magma_jax.data.decoder_process import LENGTHS
from magma_jax.output import FailedError

# Niceness of a process that yields to the others.
NICENESS = 10
# The first process normally starts in 0.2 s; the timeout is for a stalled machine.
START_SECONDS = 60.0

_SCRIPT = str(Path(__file__).with_name("decoder_process.py"))


class DecoderError(FailedError):
    """Failure that no image caused: the decoders are closed or busy, or their processes cannot be started."""


class WorkerDied(Exception):
    """The process ended without an answer."""


class Starter:
    """Fork server of the decoding processes, which forks one within milliseconds; thread-safe.

    Args:
        settings: limits per image: ``seconds`` of CPU time, and ``max_pixels``.
    """

    def __init__(self, settings: dict[str, Any]):
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_SECONDS)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", _SCRIPT, json.dumps(settings | {"path": sys.path})],
                stdin=theirs.fileno(),
                # NumPy's threads would only take memory and do not survive a fork.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # keeps Ctrl-C from the process
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def new_worker(self) -> "Worker":
        """Starts another process.

        Raises:
            DecoderError: it cannot be started.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            pid = self._tell(b"new", theirs.fileno())
        if pid is None:
            ours.close()
            raise DecoderError("a process that decodes images cannot be started")
        return Worker(self, ours, pid)

    def kill(self, pid: int) -> int | None:
        """Kills a process and returns its exit status, negative for a signal, None if unknown."""
        return self._tell(b"%d" % pid)

    def close(self) -> None:
        """Ends the fork server."""
        with self._lock:
            self._control.close()
            self._process.kill()
            self._process.wait()

    def _tell(self, message: bytes, *sockets: int) -> int | None:
        """Sends a message and returns the answer, None if the process has ended."""
        with self._lock:
            try:
                socket.send_fds(self._control, [message], sockets)
                return int(self._control.recv(32))
            except (OSError, ValueError):  # ValueError: no answer
                self._process.kill()
                return None


class Worker:
    """Process that decodes one image at a time."""

    def __init__(self, starter: Starter, connection: socket.socket, pid: int):
        self.pid, self._starter, self._socket = pid, starter, connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._before = 0.0
        self.is_last = False  # whether it yields to all other processes

    def is_ready(self) -> bool:
        """Whether the process is alive, idle and can be killed."""
        # Data without a request is the end of the stream.
        return self._starter.is_alive() and not self.has_answer(0.0)

    def ask(self, request: dict[str, Any], content: bytes, deadline: float | None) -> None:
        """Sends a request; errors as of ``answer``."""
        head = json.dumps(request).encode()
        self._before = _processor_time(self.pid)
        self._socket.settimeout(seconds_left(deadline))
        try:
            self._socket.sendall(LENGTHS.pack(len(head), len(content)) + head)
            self._socket.sendall(content)
        except ConnectionError:
            raise WorkerDied from None

    def step_back(self) -> None:
        """Lowers the process's priority below all others."""
        self.is_last = True  # an unprivileged process cannot raise its priority again
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.pid, NICENESS)

    def seconds(self) -> float:
        """CPU time since the request."""
        return _processor_time(self.pid) - self._before

    def has_answer(self, seconds: float) -> bool:
        """Waits up to ``seconds`` for an answer or the end of the process."""
        return bool(self._poll.poll(1000 * seconds))

    def answer(self, deadline: float | None) -> tuple[dict[str, Any], bytearray]:
        """Receives the answer to the request.

        Raises:
            WorkerDied: the process ended. TimeoutError: past the deadline (``time.monotonic()``).
        """
        head, body = LENGTHS.unpack(self._received(LENGTHS.size, deadline))
        return json.loads(self._received(head, deadline)), self._received(body, deadline)

    def kill(self) -> int | None:
        """Kills the process, see ``Starter.kill``."""
        return self._starter.kill(self.pid)

    def close(self) -> None:
        """Closes the connection, which ends an idle process."""
        self._socket.close()

    def _received(self, size: int, deadline: float | None) -> bytearray:
        content = bytearray(size)
        view, done = memoryview(content), 0
        while done < size:
            self._socket.settimeout(seconds_left(deadline))
            try:
                count = self._socket.recv_into(view[done:])
            except ConnectionError:
                count = 0
            if not count:
                raise WorkerDied
            done += count
        return content


def seconds_left(deadline: float | None) -> float | None:
    """Seconds until a deadline of ``time.monotonic()``; None without a deadline.

    Raises:
        TimeoutError: past the deadline.
    """
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("not decoded in time")
    return left


def _processor_time(pid: int) -> float:
    """CPU time of a process; wall-clock time on systems that do not provide it."""
    if sys.platform == "linux":
        # The clock id of a process, as in clock_getcpuclockid(3). OSError: the process has ended.
        with contextlib.suppress(OSError):
            return time.clock_gettime((~pid << 3) | 2)
        return -math.inf
    return time.monotonic()
