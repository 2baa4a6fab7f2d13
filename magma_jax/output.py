"""Output: atomic writes of files and folders, and text that is safe to print on a terminal."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Full disk, full quota, maximum file size.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutputError(ValueError):
    """Output that cannot be written, in one line with the remedy."""


class FailedError(RuntimeError):
    """Failure that the input did not cause, in one line."""


# Terminal control characters, text direction marks, unusual line separators, and lone surrogates, which cannot be
# encoded.
_NOT_PRINTABLE = re.compile("[^\n\t -~\u00a0-\U0010ffff]|[\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Escapes control characters, as JSON does, so that foreign text is safe to print."""
    return _NOT_PRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def error_line(error: BaseException) -> str:
    """Message of an error in one printable line; for an OSError the file comes first."""
    said = str(error)
    if isinstance(error, OSError) and isinstance(error.filename, str | bytes) and error.strerror:
        said = f"{os.fsdecode(error.filename)}: {error.strerror}"
    return printable(" ".join(filter(None, map(str.strip, re.split("[\r\n]+", said)))) or type(error).__name__)


# A Path has lost one slash of an address.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
# Schemes of object storage that run and model folders may be in, see ``storage.objects``.
OBJECT_SCHEMES = ("gs", "s3")


def object_address(path: str | os.PathLike) -> str | None:
    """The address of a path in object storage, as ``gs://bucket/run``; None for every other path."""
    match = _ADDRESS.match(os.fspath(path))
    if match is None or match[1] not in OBJECT_SCHEMES or os.path.exists(path):
        return None
    return f"{match[1]}://{match[2].strip('/')}"


def check_local(path: str | os.PathLike) -> None:
    """Refuses addresses such as ``gs://bucket/run``, which would become a local folder ``gs:``.

    Raises:
        OutputError: an address.
    """
    match = _ADDRESS.match(os.fspath(path))
    if match and not os.path.exists(path):
        raise OutputError(
            f"{match[1]}://{match[2].lstrip('/')}: not a local path; mount it (docs/storage.md) and give the path there"
        )


@contextlib.contextmanager
def whole_output(path: str | os.PathLike, *, nbytes: int = 0) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` for a file or folder, and renames it when the block ends.

    An error removes the partial output. Leftovers of a killed process are removed by the next writer of the same
    ``path``; a lock excludes concurrent writers. A file or an empty folder at ``path`` is replaced.

    Args:
        path: final path of the output; parent folders are created.
        nbytes: size of the output; checked against the free disk space before the block starts.

    Raises:
        OutputError: the disk is or becomes full, another process is writing to ``path``, or ``path`` is a folder that
            is not empty.
    """
    check_local(path)
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and any(path.iterdir()):
        raise OutputError(f"{path}: already exists and is not an empty folder; choose another name or remove it first")
    partial = partial_name(path)
    with locked(path):
        _remove(partial)
        check_room(path.parent, nbytes)
        try:
            yield partial
            os.rename(partial, path)
        except BaseException as error:
            with contextlib.suppress(OSError):  # the first error is the one to report
                _remove(partial)
            raise_if_full(path, error)
            raise
        # Makes the rename survive a power cut. Not every system can open a directory.
        with contextlib.suppress(OSError):
            _sync(path.parent)


def replace_file(path: str | Path, content: bytes) -> None:
    """Writes a file atomically: under a temporary name beside ``path``, then renamed.

    Raises:
        OutputError: the disk is full. OSError: the file cannot be written for another reason.
    """
    path = Path(path)
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    except OSError as error:
        raise_if_full(path, error)
        raise
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        raise_if_full(path, error)
        raise


def full_disk(error: BaseException) -> int | None:
    """errno of a full disk if one caused the error, else None; C++ libraries report it only in the message text."""
    code = error.errno if isinstance(error, OSError) else None
    said = str(error) if isinstance(error, Exception) else ""
    return next((known for known in _FULL if known == code or os.strerror(known) in said), None)


def raise_if_full(path: str | os.PathLike, error: BaseException) -> None:
    """Raises OutputError if a full disk caused ``error``."""
    full = full_disk(error)
    if full is not None:
        raise OutputError(
            f"{path}: the disk is full ({os.strerror(full)}); free some space or choose another disk"
        ) from error


def partial_name(path: Path) -> Path:
    """Temporary path that ``whole_output`` uses for ``path``."""
    return path.with_name(f".{path.name}.partial")


def size_text(nbytes: int) -> str:
    """A size in the unit that fits: ``812 B``, ``4.1 MB``, ``12.60 GB``."""
    if nbytes < 1000:
        return f"{nbytes} B"
    if nbytes < 1e6:
        return f"{nbytes / 1e3:.1f} kB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.2f} GB"


def check_room(folder: str | os.PathLike, nbytes: int) -> None:
    """Raises OutputError if the disk of ``folder`` has less than ``nbytes`` free."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise OutputError(
            f"{folder}: {size_text(nbytes)} are needed, but only {size_text(free)} are free; "
            "free some space or choose another disk"
        )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the write lock of ``path``; the system releases it if the process dies.

    Raises:
        OutputError: another process holds the lock, or the lock file cannot be written.
    """
    name = path.with_name(f".{path.name}.lock")
    while True:
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror}); repair that and try again") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed this file meanwhile; a lock on an unlinked file excludes nobody.
            if os.path.exists(name) and os.path.samestat(os.fstat(descriptor), os.stat(name)):
                break
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(f"{path}: another process is writing it; wait for it or choose another name") from None
        except FileNotFoundError:
            pass
        os.close(descriptor)
    try:
        yield
    finally:
        os.unlink(name)
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
