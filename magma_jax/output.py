"""Output: files that appear under their final name only when they are whole, and text that a terminal may be given."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# A disk or a quota that is full, a file that is as large as it may get.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutputError(ValueError):
    """A place where nothing can be written; one line with the remedy."""


class FailedError(RuntimeError):
    """Something that failed for another reason than its input; one line."""


# What moves a terminal's cursor, changes its colours, its title or the direction of its text, or ends a line where none
# does; and halves of characters, which cannot be written at all.
_NOT_PRINTABLE = re.compile("[^\n\t -~\u00a0-\U0010ffff]|[\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text of data, files or models as a terminal may be given it: control characters become JSON's escapes of them."""
    return _NOT_PRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def error_line(error: BaseException) -> str:
    """What an error says, in one printable line; of an error of the system, the file comes first."""
    said = str(error)
    if isinstance(error, OSError) and isinstance(error.filename, str | bytes) and error.strerror:
        said = f"{os.fsdecode(error.filename)}: {error.strerror}"
    return printable(" ".join(filter(None, map(str.strip, re.split("[\r\n]+", said)))) or type(error).__name__)


@contextlib.contextmanager
def whole_output(path: str | os.PathLike, *, nbytes: int = 0) -> Iterator[Path]:
    """Gives a name beside ``path`` to write a file or a folder under, and renames it when the block ends.

    On an error what was written is removed. What a killed process left is removed by the next one that writes the
    same ``path``; a lock keeps two living ones apart. A file at ``path`` is replaced, an empty folder filled.

    Args:
        path: where the output shall appear; its folder is made if needed.
        nbytes: size of the output. If the disk has less room, nothing is begun.

    Raises:
        OutputError: no room at the start or later, another process is writing there, or a folder with something in it
            stands there.
    """
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
            with contextlib.suppress(OSError):  # the first error is the one to tell
                _remove(partial)
            raise_if_full(path, error)
            raise
        # Without this a power cut may forget the new name. Not every system can open a directory.
        with contextlib.suppress(OSError):
            _sync(path.parent)


def replace_file(path: str | Path, content: bytes) -> None:
    """Writes a file under a temporary name beside ``path``, then renames it: it is whole or it is not there.

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
    """The system's number for a full disk, if an error came of one; libraries in C++ say so in the text of theirs."""
    code = error.errno if isinstance(error, OSError) else None
    said = str(error) if isinstance(error, Exception) else ""
    return next((known for known in _FULL if known == code or os.strerror(known) in said), None)


def raise_if_full(path: str | os.PathLike, error: BaseException) -> None:
    """Raises OutputError if ``error`` came of a full disk."""
    full = full_disk(error)
    if full is not None:
        raise OutputError(
            f"{path}: the disk is full ({os.strerror(full)}); free some space or choose another disk"
        ) from error


def partial_name(path: Path) -> Path:
    """Where ``whole_output`` builds what shall appear at ``path``."""
    return path.with_name(f".{path.name}.partial")


def check_room(folder: str | os.PathLike, nbytes: int) -> None:
    """Raises OutputError if the disk of ``folder`` has less than ``nbytes`` free."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise OutputError(
            f"{folder}: {nbytes / 1e9:.2f} GB are needed, but only {free / 1e9:.2f} GB are free; "
            "free some space or choose another disk"
        )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from writing what shall appear at ``path``; the lock of a process that dies is free.

    Raises:
        OutputError: another process holds it, or nothing can be written there.
    """
    name = path.with_name(f".{path.name}.lock")
    while True:
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror}); repair that and try again") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who held it may have removed this very file in between: then the lock locks nothing.
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
