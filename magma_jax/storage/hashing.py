"""SHA-256 of files, computed beside the work that reads them."""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_BLOCK_NBYTES = 8 * 2**20


@contextlib.contextmanager
def hashing(files: Sequence[Path]) -> Iterator[Callable[[], dict[Path, str]]]:
    """Hashes files in a thread while the block runs; the function it gives waits and returns path -> hex digest.

    Whoever reads the same files from front to back in the block shares the disk's reads through the system's cache.
    Leaving the block early ends the thread. An error in reading is raised by the function.
    """
    digests: dict[Path, str] = {}
    errors: list[OSError] = []
    stop = threading.Event()

    def work() -> None:
        try:
            for path in files:
                if (digest := _sha256(path, stop)) is not None:
                    digests[path] = digest
        except OSError as error:
            errors.append(error)

    def result() -> dict[Path, str]:
        thread.join()
        if errors:
            raise errors[0]
        return digests

    thread = threading.Thread(target=work, name="sha256", daemon=True)
    thread.start()
    try:
        yield result
    finally:
        stop.set()
        thread.join()


def _sha256(path: Path, stop: threading.Event) -> str | None:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_NBYTES):
            if stop.is_set():
                return None
            digest.update(block)  # leaves the interpreter to others meanwhile
    return digest.hexdigest()
