"""SHA-256 sums of a folder's files, in the format of ``sha256sum --check``."""

import contextlib
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from magma_jax.foreign import ForeignError, read_text, shown
from magma_jax.storage.hashing import THREADS, hashing

SUMS_FILE = "SHA256SUMS"


class CheckpointError(ValueError):
    """Folder that is missing, incomplete or of the wrong kind; one line with the remedy."""


def write_checksums(folder: Path, leave_out: Collection[str] = (), below: Sequence[str] | None = None) -> None:
    """Writes the sums of all files below ``folder`` except those named in ``leave_out``.

    Args:
        below: files and folders to list; None for all.
    """
    roots = [folder] if below is None else [folder / name for name in below]
    names = [name for root in roots for name in regular_files(folder, root) if name not in (SUMS_FILE, *leave_out)]
    with hashing([folder / name for name in names], THREADS) as digest_of:
        text = checksums_text({name: digest_of(folder / name) for name in sorted(names)})
    (folder / SUMS_FILE).write_text(text)


def checksums_text(digests: Mapping[str, str]) -> str:
    """Content of the list for hex digests by relative path."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def read_checksums(folder: Path) -> dict[str, str] | None:
    """Sums by relative path, from the folder's list; None if it has no list.

    Raises:
        CheckpointError: the list cannot be read, or names a path outside the folder.
    """
    file = folder / SUMS_FILE
    try:
        lines = read_text(file).split("\n")
    except FileNotFoundError:
        return None
    except (OSError, ForeignError) as error:
        raise CheckpointError(f"{file}: cannot be read ({_reason(error)})") from None
    sums = {}
    for digest, _, name in (line.partition("  ") for line in lines if line):
        if not name or PurePosixPath(name).is_absolute() or ".." in name.split("/") or "\0" in name:
            raise CheckpointError(f"{file}: lists {shown(name)}, which is not a file of this folder; do not trust it")
        sums[name] = digest
    return sums


def find_damage(folder: Path, below: Collection[str] | None = None) -> str | None:
    """Short description of the first file that differs from its sum; None if all are intact.

    Args:
        below: first path components to check; None for all.
    """
    try:
        sums = read_checksums(folder)
    except CheckpointError as error:
        return str(error).removeprefix(f"{folder}/")
    if sums is None:
        return f"no {SUMS_FILE}"
    if below is not None:
        absent = set(below) - {name.partition("/")[0] for name in sums}
        if absent:
            return f"{SUMS_FILE} does not list {', '.join(sorted(absent))}"
        sums = {name: digest for name, digest in sums.items() if name.partition("/")[0] in below}
    if not sums:
        return f"{SUMS_FILE} is empty"
    with comparing(folder, sums) as damages:
        return next(damages, None)


@contextlib.contextmanager
def comparing(folder: Path, sums: Mapping[str, str]) -> Iterator[Iterator[str]]:
    """Hashes the files of ``sums`` while the block runs; yields an iterator over the damaged files' descriptions."""
    with hashing([folder / name for name in sums], THREADS) as digest_of:

        def damage(name: str, digest: str) -> str | None:
            try:
                same = digest_of(folder / name) == digest
            except FileNotFoundError:
                return f"{name} is missing"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror or error}"
            except ForeignError as error:
                return f"{name} {error}"
            return None if same else f"{name} has changed since it was written"

        yield (problem for name, digest in sums.items() if (problem := damage(name, digest)) is not None)


def regular_files(folder: Path, root: Path | None = None) -> list[str]:
    """Files in ``root`` (default: ``folder``), or ``root`` itself if it is a file, as paths relative to ``folder``.

    Raises:
        CheckpointError: a link, pipe or device is among them; none is written there, and reading one may block.
    """
    names = []
    waiting = [root or folder]
    while waiting:
        path = waiting.pop()
        mode = path.lstat().st_mode
        # The folder itself may be a link, for example to a larger disk.
        if stat.S_ISDIR(mode) or (path in (root, folder) and path.is_dir()):
            waiting += [path / name for name in os.listdir(path)]
        elif stat.S_ISREG(mode):
            names.append(path.relative_to(folder).as_posix())
        else:
            raise CheckpointError(f"{path}: is a link, pipe or device where a file belongs; copy the file itself here")
    return names


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
