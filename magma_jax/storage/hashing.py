"""SHA-256 of files, computed concurrently with other reads of the same files."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from magma_jax.foreign import open_regular

_BLOCK_NBYTES = 8 * 2**20
# Threads for files in any order; hashing releases the GIL, so each thread uses one core.
THREADS = max(1, min(8, os.cpu_count() or 1))


@contextlib.contextmanager
def hashing(files: Sequence[Path], threads: int = 1) -> Iterator[Callable[[Path], str]]:
    """Hashes files while the block runs; yields a function that waits for a file's hex digest.

    Reading the same files in the same order within the block hits the page cache. Leaving the block early ends the
    threads. The function raises OSError, or ForeignError if a file is not regular.
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
