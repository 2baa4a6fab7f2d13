"""Tar archives in WebDataset's format: the members of a sample are consecutive and share a key.

The key is the path up to the first dot of the file name, the rest is the suffix: ``cat/0001.seg.png`` is ``.seg.png``
of the sample ``cat/0001``.
"""

import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from magma_jax.data.format.records import HIDDEN, DataError, FileSlice, Skipped
from magma_jax.data.readers.common import IMAGE_SUFFIXES, check_file, files_in, hidden

# A member: its location, or its bytes if the archive is compressed.
Content: TypeAlias = FileSlice | bytes

SUFFIXES = (".tar", ".tar.gz", ".tgz")
# Largest member of a compressed archive, in bytes; it is read into memory.
LARGEST_MEMBER = 1 << 28
# Names of members that describe the archive.
_ABOUT_THE_ARCHIVE = re.compile("__[^/]*__($|/)")


def tars_in(folder: Path) -> list[Path]:
    """Archives of a folder in name order; a file is returned as is."""
    tars = files_in(folder, *(f"*{suffix}" for suffix in SUFFIXES)) if folder.is_dir() else [folder]
    if not tars:
        raise DataError(f"{folder}: holds no {', '.join(SUFFIXES)} files; give the folder that img2dataset wrote")
    return tars


def content_of(member: Content) -> bytes:
    """Bytes of a member."""
    return member if isinstance(member, bytes) else member.read()


def tar_samples(path: Path) -> Iterator[tuple[str, dict[str, Content]] | Skipped]:
    """Yields key and members by suffix (lower case, with the dot) of every sample; unusable members as ``Skipped``.

    Raises:
        DataError: the archive is damaged, a member occurs twice, or the members of a sample are not consecutive.
    """
    check_file(path)
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with tarfile.open(path, "r:gz" if packed else "r:") as tar:
            yield from _samples(tar, path, packed)
            # tarfile treats an invalid header as the end; a complete archive ends with zero blocks.
            assert tar.fileobj is not None  # open
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"no end of the archive at byte {tar.offset}")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: not a whole tar archive ({error}); fetch it again") from None


def _samples(tar: tarfile.TarFile, path: Path, packed: bool) -> Iterator[tuple[str, dict[str, Content]] | Skipped]:
    key, members = None, {}
    seen: set[str] = set()
    for member in tar:
        # Frees the members that tarfile would accumulate.
        tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # missing in the type stubs
        named = _key_and_suffix(member.name)
        if _ABOUT_THE_ARCHIVE.match(member.name) or member.isdir():
            continue
        if named is None or hidden(member.name) or not member.isfile():
            if member.name.lower().endswith(IMAGE_SUFFIXES):
                yield Skipped(member.name, HIDDEN if hidden(member.name) else "no file of its own in the tar archive")
            continue
        if member.issparse():
            raise DataError(f"{path}: the member {member.name} is sparse; pack the archive without --sparse")
        stem, suffix = named
        if stem != key:
            if key is not None:
                yield key, members
            if stem in seen:
                raise DataError(
                    f"{path}: the member {member.name} comes twice, or stands apart from the rest of its sample; "
                    "pack the archive again in the order of the names"
                )
            key, members = stem, {}
            seen.add(key)
        if suffix in members:
            raise DataError(f"{path}: the member {member.name} comes twice; pack the archive again with one of them")
        if not packed:
            members[suffix] = FileSlice(str(path), member.offset_data, member.size)
        elif member.size <= LARGEST_MEMBER:
            content = tar.extractfile(member)
            assert content is not None  # a regular file, as checked above
            members[suffix] = content.read()
        else:
            raise DataError(
                f"{path}: the member {member.name} has {member.size} bytes; unpack the archive first: gunzip"
            )
    if key is not None:
        yield key, members


def _key_and_suffix(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member name; None if the file name has no suffix or nothing else."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return (folder + slash + stem, f".{suffix.lower()}") if stem and dot else None
