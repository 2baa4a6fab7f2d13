"""The processes of ``data.decoders`` as seen from this one: starting them, asking them, killing them."""

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

# Of a process that is out of others' way.
NICENESS = 10
# The first process starts in 0.2 s; so long only on a machine that has stopped.
START_SECONDS = 60.0

_SCRIPT = str(Path(__file__).with_name("decoder_process.py"))


class DecoderError(FailedError):
    """No fault of an image: the decoders are closed or busy, or their processes cannot be started."""


class WorkerDied(Exception):
    """A process ended in place of an answer."""


class Starter:
    """The process that the others are copies of, made within milliseconds; safe to use from many threads.

    Args:
        settings: ``seconds`` of processor time that an image may take, ``max_pixels`` that it may have.
    """

    def __init__(self, settings: dict[str, Any]):
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_SECONDS)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", _SCRIPT, json.dumps(settings | {"path": sys.path})],
                stdin=theirs.fileno(),
                # NumPy's threads would only take memory, and are not copied.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is the parent's
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def new_worker(self) -> "Worker":
        """Another process.

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
        """Ends a process; returns the status it had or has, negative for a signal, None if that is not known."""
        return self._tell(b"%d" % pid)

    def close(self) -> None:
        """Ends this process."""
        with self._lock:
            self._control.close()
            self._process.kill()
            self._process.wait()

    def _tell(self, message: bytes, *sockets: int) -> int | None:
        """The answer to a message, None if the process has ended."""
        with self._lock:
            try:
                socket.send_fds(self._control, [message], sockets)
                return int(self._control.recv(32))
            except (OSError, ValueError):  # the latter of no answer
                self._process.kill()
                return None


class Worker:
    """A process that decodes one image after another."""

    def __init__(self, starter: Starter, connection: socket.socket, pid: int):
        self.pid, self._starter, self._socket = pid, starter, connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._before = 0.0
        self.is_last = False  # image that the process decodes

    def is_ready(self) -> bool:
        """Whether a process without a request is there, and can be killed."""
        # What it has to say without being asked is that it has ended.
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
        """Lets all other processes go first, from now on."""
        self.is_last = True  # what it has given up a process cannot take back
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.pid, NICENESS)

    def seconds(self) -> float:
        """Processor time since the request."""
        return _processor_time(self.pid) - self._before

    def has_answer(self, seconds: float) -> bool:
        """Waits at most so long for an answer, or for the end of the process."""
        return bool(self._poll.poll(1000 * seconds))

    def answer(self, deadline: float | None) -> tuple[dict[str, Any], bytearray]:
        """The answer to the request.

        Raises:
            WorkerDied: instead. TimeoutError: past the deadline, of ``time.monotonic()``.
        """
        head, body = LENGTHS.unpack(self._received(LENGTHS.size, deadline))
        return json.loads(self._received(head, deadline)), self._received(body, deadline)

    def kill(self) -> int | None:
        """Ends the process, see ``Starter.kill``."""
        return self._starter.kill(self.pid)

    def close(self) -> None:
        """Closes the connection, upon which the process ends if it does nothing."""
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
    """Until a deadline of ``time.monotonic()``.

    Raises:
        TimeoutError: past it.
    """
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("not decoded in time")
    return left


def _processor_time(pid: int) -> float:
    """Seconds that a process has used; where the system does not tell, those that have passed."""
    if sys.platform == "linux":
        # The clock of a process, numbered as clock_getcpuclockid(3) does. There is none of a process that has ended.
        with contextlib.suppress(OSError):
            return time.clock_gettime((~pid << 3) | 2)
        return -math.inf
    return time.monotonic()
