"""SHA-256 of files, computed beside the work that reads them."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from magma_jax.foreign import open_regular

_BLOCK_NBYTES = 8 * 2**20
# Threads for files in any order: hashing leaves the interpreter to others, so each has a core.
THREADS = max(1, min(8, os.cpu_count() or 1))


@contextlib.contextmanager
def hashing(files: Sequence[Path], threads: int = 1) -> Iterator[Callable[[Path], str]]:
    """Hashes files while the block runs; the function it gives waits for a file's hex digest.

    Whoever reads the same files in the same order in the block shares the disk's reads through the system's cache.
    Leaving the block early ends the threads. The function raises OSError, or ForeignError if it is no regular file.
    """
    stop = threading.Event()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="sha256")
    waiting = {path: pool.submit(_sha256, path, stop) for path in files}
    try:
        yield lambda path: waiting[path].result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _sha256(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with open(open_regular(path), "rb", buffering=0) as file:
        while (block := file.read(_BLOCK_NBYTES)) and not stop.is_set():
            digest.update(block)
    return digest.hexdigest()
