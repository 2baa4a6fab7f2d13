"""Decoding pictures of strangers: in processes of their own, each picture with a limit on processor time and memory.

    with Decoders(2) as decoders:
        pixels = decoders.square(content, 384, deadline=time.monotonic() + 5)

Pillow decodes some formats in Python, byte by byte, and some files make its C libraries work for minutes. What goes
past its limits is killed with its process, and the next picture gets another one.

Processes that only read pictures, where nobody waits for one, have ``data.time_limit`` instead.
"""

import collections
import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from magma_jax.data.decoder_process import LENGTHS
from magma_jax.data.pillow_steps import MAX_PIXELS, ImageError, name_of, too_long
from magma_jax.typing import UInt8

# Processor time after which a picture makes room for others that wait: several times that of a large photograph, and
# short enough for nobody to notice.
SLICE = 0.15
# Between two looks at whether somebody waits.
LOOK = 0.03
# Memory of a picture in bytes a pixel: 17 are the most that a decoder was seen to take (WebP with alpha), beside the
# encoded bytes.
BYTES_A_PIXEL = 24
SPARE_MEMORY = 128 * 2**20
# A process starts in 0.2 s; so long only on a machine that has stopped.
START_SECONDS = 60.0


class DecoderBusy(RuntimeError):
    """Too many pictures are waiting; try again later."""


class Decoders:
    """Some processes that decode; safe to use from many threads. Use it in a ``with`` block, or close it.

    Pictures have their turn in the order they come. One that has taken ``SLICE`` of processor time while others wait
    goes on beside them, where only half as many are decoded at a time; where that is full, it is begun anew when it is
    not. So a few pictures that take as long as they may delay others by no more than a slice.

    Args:
        processes: pictures that are decoded at the same time.
        seconds: of processor time that a picture may take.
        max_pixels: width times height, checked before anything is decoded; memory is limited accordingly.
        waiting: pictures that may wait at most, those included that are decoded.
    """

    def __init__(self, processes: int = 2, *, seconds: float = 1.5, max_pixels: int = MAX_PIXELS, waiting: int = 256):
        if processes < 1 or waiting < 1 or seconds <= 0:
            raise ValueError(f"processes, waiting and seconds are above 0, got {processes}, {waiting}, {seconds}")
        self.seconds, self.max_pixels = seconds, max_pixels
        self._settings = {"path": sys.path, "memory": BYTES_A_PIXEL * max_pixels + SPARE_MEMORY, "seconds": seconds}
        self._turns, self._beside = _Turns(processes), _Turns(max(processes // 2, 1))
        self._places = threading.BoundedSemaphore(waiting)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._closed = False

    def start(self) -> None:
        """Starts processes ahead of the first pictures."""
        with self._lock:
            missing = self._turns.count - len(self._all)
        for _ in range(missing):
            self._keep(self._new_worker())

    def square(self, content: bytes, size: int, deadline: float | None = None) -> UInt8[np.ndarray, "{size} {size} 3"]:
        """``images.to_uint8`` of ``images.load_image``, bit for bit.

        Args:
            content: encoded bytes.
            size: pixels per side.
            deadline: of ``time.monotonic()``; then the process is killed.

        Raises:
            ImageError: as of both; or the picture takes too much time or memory, or the decoder breaks down on it.
            TimeoutError: past the deadline. DecoderBusy: too many wait.
        """
        _, pixels = self._run({"name": name_of(content), "size": size}, content, deadline)
        return np.frombuffer(pixels, np.uint8).reshape(size, size, 3)

    def picture(self, source: str | os.PathLike | bytes, deadline: float | None = None) -> Image.Image:
        """``images.load_image`` of a path or encoded bytes, without what the file says beside the pixels.

        Arguments and errors as of ``square``; OSError for a file that cannot be read.
        """
        request = {"name": name_of(source)}
        content = source if isinstance(source, bytes) else b""
        if not isinstance(source, bytes):
            request["file"] = os.path.abspath(source)
        head, pixels = self._run(request, content, deadline)
        if "errno" in head:
            raise OSError(head["errno"], head["error"], os.fspath(source))
        image = Image.frombytes(head["mode"], tuple(head["size"]), bytes(pixels))
        if "palette" in head:
            image.putpalette(head["palette"])
        return image

    def worker_ids(self) -> list[int]:
        """Process ids."""
        with self._lock:
            return [worker.pid for worker in self._all]

    def close(self) -> None:
        """Kills the processes; who waits gets a RuntimeError."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for worker in self._all:
                worker.kill()
        for worker in idle:
            self._end(worker)

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, request: dict[str, Any], content: bytes, deadline: float | None) -> tuple[dict[str, Any], bytearray]:
        if not self._places.acquire(blocking=False):
            raise DecoderBusy("too many pictures are waiting")
        try:
            head, body = self._in_turn(request | {"max_pixels": self.max_pixels}, content, deadline)
        except _Died as death:
            if self._closed:
                raise RuntimeError("the decoders were closed") from None
            raise self._too_much(request["name"], death.status) from None
        finally:
            self._places.release()
        if "kind" in head:
            raise ImageError(head["error"], head["kind"])
        return head, body

    def _in_turn(self, *work: Any) -> tuple[dict[str, Any], bytearray]:
        try:
            return self._decode(self._turns, *work)
        except _InTheWay:
            return self._decode(self._beside, *work)

    def _decode(
        self, turns: "_Turns", request: dict[str, Any], content: bytes, deadline: float | None
    ) -> tuple[dict[str, Any], bytearray]:
        """The answer to a request; its process is killed if there is none in time."""
        turns.take(deadline)
        try:
            with self._worker() as worker:
                worker.ask(request, content, deadline)
                while not worker.has_answer(min(LOOK, _left(deadline))):
                    if turns is self._turns and turns.is_wanted and worker.seconds() >= SLICE:
                        if not self._beside.take_now():
                            raise _InTheWay
                        turns.give_back()
                        turns = self._beside
                return worker.answer(deadline)
        finally:
            turns.give_back()

    @contextlib.contextmanager
    def _worker(self) -> Iterator["_Worker"]:
        """A process that has nothing else to do; it ends with whatever goes wrong, and another one starts."""
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        while worker is not None and not worker.is_alive():
            self._end(worker)
            with self._lock:
                worker = self._idle.pop() if self._idle else None
        worker = worker or self._new_worker()
        try:
            yield worker
        except BaseException:
            self._end(worker)
            if not self._closed:
                self._keep(self._new_worker())
            raise
        self._keep(worker)

    def _new_worker(self) -> "_Worker":
        worker = _Worker(self._settings)
        with self._lock:
            self._all.add(worker)
            if not self._closed:
                return worker
        self._end(worker)
        raise RuntimeError("the decoders were closed")

    def _keep(self, worker: "_Worker") -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
                return
        self._end(worker)

    def _end(self, worker: "_Worker") -> None:
        worker.end()
        with self._lock:
            self._all.discard(worker)

    def _too_much(self, name: str, status: int) -> ImageError:
        """The error of a picture on which a process ended."""
        if status == -signal.SIGPROF:
            return too_long(name, self.seconds)
        return ImageError(f"{name}: the decoder breaks down on it (status {status}); save it anew")


class _InTheWay(Exception):
    """A picture makes room for others."""


class _Died(Exception):
    """A process ended in place of an answer."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


class _Turns:
    """So many at a time, in the order in which they ask."""

    def __init__(self, count: int):
        self.count = self._free = count
        self._lock = threading.Lock()
        self._waiting: collections.deque[threading.Event] = collections.deque()

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    def take(self, deadline: float | None) -> None:
        """Waits for a turn; TimeoutError past the deadline."""
        turn = threading.Event()
        with self._lock:
            if self._free:
                self._free -= 1
                return
            self._waiting.append(turn)
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        if turn.wait(left):
            return
        with self._lock:
            if not turn.is_set():
                self._waiting.remove(turn)
                raise TimeoutError("no turn in time")
        # It came at the last moment.

    def take_now(self) -> bool:
        """Takes a turn if there is one."""
        with self._lock:
            free = self._free > 0
            self._free -= free
            return free

    def give_back(self) -> None:
        """Lets the next one have its turn."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1


class _Worker:
    """A process that decodes."""

    def __init__(self, settings: dict[str, Any]):
        self._socket, theirs = socket.socketpair()
        with theirs:
            # NumPy's threads would only take memory.
            environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-P", _SCRIPT, json.dumps(settings)],
                stdin=theirs,
                stdout=theirs,
                env=environment,
                start_new_session=True,  # Ctrl-C is the parent's
            )
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._is_ready = False
        self._asked = 0.0

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], content: bytes, deadline: float | None) -> None:
        """Sends a request, when the process has started."""
        if not self._is_ready:
            try:
                self.answer(min(time.monotonic() + START_SECONDS, deadline or math.inf))
            except _Died as death:
                raise RuntimeError(f"a process that decodes pictures ended at its start ({death.status})") from None
            self._is_ready = True
        head = json.dumps(request).encode()
        self._asked = _processor_time(self.pid)
        self._socket.settimeout(_wait(deadline))
        try:
            self._socket.sendall(LENGTHS.pack(len(head), len(content)) + head)
            self._socket.sendall(content)
        except ConnectionError:
            raise _Died(self._status()) from None

    def seconds(self) -> float:
        """Processor time of the request."""
        return _processor_time(self.pid) - self._asked

    def has_answer(self, seconds: float) -> bool:
        """Waits at most so long for an answer, or for the end of the process."""
        return bool(self._poll.poll(1000 * seconds))

    def answer(self, deadline: float | None) -> tuple[dict[str, Any], bytearray]:
        """The answer to what was asked."""
        head, body = LENGTHS.unpack(self._received(LENGTHS.size, deadline))
        return json.loads(self._received(head, deadline)), self._received(body, deadline)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        """Kills the process, if it is not dead yet, and buries it."""
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def _received(self, size: int, deadline: float | None) -> bytearray:
        content = bytearray(size)
        view, done = memoryview(content), 0
        while done < size:
            self._socket.settimeout(_wait(deadline))
            try:
                count = self._socket.recv_into(view[done:])
            except ConnectionError:
                count = 0
            if not count:
                raise _Died(self._status())
            done += count
        return content

    def _status(self) -> int:
        return self._process.wait()


def _processor_time(pid: int) -> float:
    """Seconds of a process; where the system does not tell, those that have passed."""
    if sys.platform == "linux":
        # As clock_getcpuclockid(3) names the clock of a process.
        with contextlib.suppress(OSError):
            return time.clock_gettime((~pid << 3) | 2)
    return time.monotonic()


def _left(deadline: float | None) -> float:
    """Seconds until a deadline; TimeoutError past it."""
    left = math.inf if deadline is None else deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("not decoded in time")
    return left


def _wait(deadline: float | None) -> float | None:
    """``_left`` as sockets want it."""
    return None if deadline is None else _left(deadline)


_SCRIPT = str(Path(__file__).with_name("decoder_process.py"))
