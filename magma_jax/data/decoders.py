"""Decodes untrusted images in separate processes, each image with a CPU time and memory limit.

    with Decoders(2) as decoders:
        pixels = decoders.square(content, 384, deadline=time.monotonic() + 5)

Pillow decodes some formats in Python, byte by byte, and some files keep its C libraries busy for minutes. A process
that exceeds its limits is killed, and the next image gets a new one.

Offline processes, where no request waits for an image, use ``data.time_limit`` instead.
"""

import collections
import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from magma_jax.data.decoder_workers import DecoderError, Starter, Worker, WorkerDied, seconds_left
from magma_jax.data.pillow_steps import MAX_PIXELS, ImageError, name_of, too_long
from magma_jax.typing import UInt8

# CPU time in seconds after which an image yields to waiting ones; a photograph of 5 megapixels takes as long.
SLICE = 0.05
# Seconds between checks for waiting images.
LOOK = 0.02


class DecoderBusy(DecoderError):
    """Too many images are waiting; try again later."""


class Decoders:
    """Pool of decoding processes; thread-safe. A context manager, or call ``close``.

    Images are decoded in order of arrival. An image that has used ``SLICE`` seconds of CPU time while others wait
    yields: it continues concurrently at low priority, or, if the low-priority processes are all in use, it is restarted
    when one of them ends. So a few slow images delay others by at most one slice.

    Args:
        processes: number of images decoded concurrently, and of additional low-priority ones.
        seconds: CPU time limit per image.
        max_pixels: limit on width times height, checked before decoding; also sets the memory limit.
        waiting: maximum number of images waiting or being decoded.
    """

    def __init__(self, processes: int = 2, *, seconds: float = 1.5, max_pixels: int = MAX_PIXELS, waiting: int = 256):
        if processes < 1 or waiting < 1 or not 0 < seconds < math.inf:
            raise ValueError(f"processes, waiting and seconds are above 0, got {processes}, {waiting}, {seconds}")
        self.seconds = seconds
        self._settings = {"seconds": seconds, "max_pixels": max_pixels}
        self._turns, self._beside = _Turns(processes), _Turns(processes)
        self._places = threading.BoundedSemaphore(waiting)
        self._lock = threading.Lock()
        self._starter: Starter | None = None
        self._idle: list[Worker] = []
        self._all: set[Worker] = set()
        self._closed = False

    def start(self) -> None:
        """Starts the first process, which takes 0.2 s, before the first image; does not wait for it."""
        self._living_starter()

    def square(self, content: bytes, size: int, deadline: float | None = None) -> UInt8[np.ndarray, "{size} {size} 3"]:
        """``images.to_uint8`` of ``images.load_image``, bit for bit.

        Args:
            content: encoded bytes.
            size: pixels per side.
            deadline: in ``time.monotonic()``; the process is killed then.

        Raises:
            ImageError: as of both functions; or the image takes too much time or memory, or crashes the decoder.
            TimeoutError: past the deadline. DecoderBusy: too many images wait.
            DecoderError: closed, or processes cannot be started.
        """
        _, pixels = self._ask({"name": name_of(content), "size": size}, content, deadline)
        return np.frombuffer(pixels, np.uint8).reshape(size, size, 3)

    def image(self, source: str | os.PathLike | bytes, deadline: float | None = None) -> Image.Image:
        """``images.load_image`` of a path or encoded bytes, without the file's metadata.

        Arguments and errors as of ``square``; OSError for a file that cannot be read.
        """
        request, content = {"name": name_of(source)}, source if isinstance(source, bytes) else b""
        if not isinstance(source, bytes):
            request["file"] = os.path.abspath(source)
        head, pixels = self._ask(request, content, deadline)
        if "errno" in head:
            raise OSError(head["errno"], head["error"], os.fspath(source))
        image = Image.frombytes(head["mode"], tuple(head["size"]), bytes(pixels))
        if "palette" in head:
            image.putpalette(head["palette"])
        return image

    def process_ids(self) -> list[int]:
        """Process ids of all processes."""
        with self._lock:
            starter = [self._starter.pid] if self._starter else []
            return starter + [worker.pid for worker in self._all]

    def close(self) -> None:
        """Kills the processes; waiting callers get a DecoderError."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            workers = list(self._all)
        for worker in workers:
            worker.kill()
        for worker in idle:
            self._end(worker)
        if self._starter is not None:
            self._starter.close()

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: dict[str, Any], content: bytes, deadline: float | None) -> tuple[dict[str, Any], bytearray]:
        if not self._places.acquire(blocking=False):
            raise DecoderBusy("too many images are waiting")
        work = request, content, deadline
        try:
            try:
                head, body = self._decode(self._turns, *work)
            except _InTheWay:
                head, body = self._decode(self._beside, *work)
        finally:
            self._places.release()
        if "kind" in head:
            raise ImageError(head["error"], head["kind"])
        return head, body

    def _decode(
        self, turns: "_Turns", request: dict[str, Any], content: bytes, deadline: float | None
    ) -> tuple[dict[str, Any], bytearray]:
        """Answer to a request; its process is killed past the deadline."""
        turns.take(deadline)
        try:
            with self._worker(request["name"]) as worker:
                worker.ask(request, content, deadline)
                if turns is self._beside:
                    worker.step_back()
                while not worker.has_answer(LOOK):
                    seconds_left(deadline)
                    if turns is self._turns and turns.is_wanted and worker.seconds() >= SLICE:
                        if not self._beside.take_now():
                            raise _InTheWay
                        turns.give_back()
                        turns = self._beside
                        worker.step_back()
                return worker.answer(deadline)
        finally:
            turns.give_back()

    @contextlib.contextmanager
    def _worker(self, name: str) -> Iterator[Worker]:
        """Yields an idle process; it is killed on any error."""
        worker = self._idle_worker() or self._new_worker()
        try:
            yield worker
        except WorkerDied:
            status = self._end(worker)
            if self._closed:
                raise DecoderError("the decoders were closed") from None
            if status == -signal.SIGPROF:
                raise too_long(name, self.seconds) from None
            raise ImageError(f"{name}: the decoder crashed on it (status {status}); save it anew") from None
        except BaseException:
            self._end(worker)
            raise
        with self._lock:
            if not (self._closed or worker.is_last):
                self._idle.append(worker)
                return
        self._end(worker)

    def _idle_worker(self) -> Worker | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                worker = self._idle.pop()
            if worker.is_ready():
                return worker
            self._end(worker)

    def _new_worker(self) -> Worker:
        worker = self._living_starter().new_worker()
        with self._lock:
            self._all.add(worker)
            if not self._closed:
                return worker
        self._end(worker)
        raise DecoderError("the decoders were closed")

    def _living_starter(self) -> Starter:
        with self._lock:
            if self._closed:
                raise DecoderError("the decoders were closed")
            if self._starter is not None and not self._starter.is_alive():
                self._starter.close()
                self._starter = None
            if self._starter is None:
                self._starter = Starter(self._settings)
            return self._starter

    def _end(self, worker: Worker) -> int | None:
        status = worker.kill()
        worker.close()
        with self._lock:
            self._all.discard(worker)
        return status


class _InTheWay(Exception):
    """The image yields to waiting ones."""


class _Turns:
    """Semaphore in first-come order."""

    def __init__(self, count: int):
        self._free = count
        self._lock = threading.Lock()
        self._waiting: collections.deque[threading.Event] = collections.deque()

    @property
    def is_wanted(self) -> bool:
        """Whether a caller waits."""
        return bool(self._waiting)

    def take(self, deadline: float | None) -> None:
        """Waits for a turn; TimeoutError past the deadline."""
        turn = threading.Event()
        with self._lock:
            if self._free:
                self._free -= 1
                return
            self._waiting.append(turn)
        if turn.wait(None if deadline is None else max(deadline - time.monotonic(), 0)):
            return
        with self._lock:
            if not turn.is_set():  # it may have arrived at the last moment
                self._waiting.remove(turn)
                raise TimeoutError("not decoded in time")

    def take_now(self) -> bool:
        """Takes a turn if one is free."""
        with self._lock:
            if not self._free:
                return False
            self._free -= 1
            return True

    def give_back(self) -> None:
        """Passes the turn to the next caller."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1
