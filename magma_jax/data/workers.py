"""Worker process pools that ignore signals and end with their parent."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from magma_jax.data.pillow_steps import keep_freed_memory


def worker_pool(
    workers: int, start: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> concurrent.futures.ProcessPoolExecutor:
    """Pool of new processes, each initialised by ``start(*arguments)``.

    Workers ignore Ctrl-C and SIGTERM, which schedulers send to all processes of a job, so that the parent can finish
    its work. They end when the parent ends, for whatever reason.
    """
    # Forked processes would inherit the locks of JAX's threads in an unknown state.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *([start.__module__] if start else [])])
    return concurrent.futures.ProcessPoolExecutor(workers, context, _begin, (start, arguments))


def finished(value: Any) -> concurrent.futures.Future:
    """Completed future, for work done in this process."""
    future: concurrent.futures.Future = concurrent.futures.Future()
    future.set_result(value)
    return future


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin(start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()
    if start is not None:
        start(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
