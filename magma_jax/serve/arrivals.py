"""Admission of requests: bounded numbers and bytes, threads with a deadline, and the model's name."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from magma_jax.serve.config import ServerConfig
from magma_jax.serve.errors import RequestError, busy

T = TypeVar("T")


class Arrivals:
    """Requests on their way to a queue.

    Args:
        config: config of the server.
        queue: maximum of arriving and waiting requests.
        waiting: returns the number of requests in the queue.
    """

    def __init__(self, config: ServerConfig, queue: int, waiting: Callable[[], int]):
        self._config, self._queue, self._waiting = config, queue, waiting
        self._created = int(time.time())
        self._arriving = self._held_bytes = 0

    @contextlib.contextmanager
    def arrival(self) -> Iterator[Callable[[int], None]]:
        """Counts an arriving request towards the queue; yields a callback that takes the bytes it holds.

        Raises:
            RequestError: too many requests are arriving or waiting, or they hold too many bytes.
        """
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            if self._held_bytes and self._held_bytes + size > self._config.max_held_bytes:
                raise busy("arriving requests hold all the memory they may")
            held += size
            self._held_bytes += size

        if self._arriving + self._waiting() >= self._queue:
            raise busy("too many requests are arriving or waiting")
        self._arriving += 1
        try:
            yield hold
        finally:
            self._arriving -= 1
            self._held_bytes -= held

    async def in_thread(self, threads: ThreadPoolExecutor, work: Callable[[], T], started: float) -> T:
        """Result of ``work`` in a thread; past the request's timeout the thread still runs to its end.

        Raises:
            RequestError: timeout.
        """
        left = started + self._config.timeout - time.perf_counter()
        try:
            async with asyncio.timeout(max(left, 0)):
                return await asyncio.get_running_loop().run_in_executor(threads, work)
        except TimeoutError:
            raise too_late(self._config.timeout) from None

    def card(self) -> dict[str, Any]:
        """The model's entry in ``/v1/models``."""
        return {"id": self._config.model, "object": "model", "created": self._created, "owned_by": "magma_jax"}

    def check_model(self, name: str | None) -> None:
        """Raises RequestError if a request names another model."""
        if name not in (None, self._config.model):
            raise RequestError(f"the model here is {self._config.model!r}", 404, "model", "model_not_found")


def too_late(timeout: float) -> RequestError:
    """Error of a request that takes longer than ``timeout`` seconds."""
    return RequestError(f"not done within {timeout:g} s", 504, code="timeout")
