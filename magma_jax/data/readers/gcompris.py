"""Named photographs of GCompris, as Debian's package ``gcompris-qt-data`` installs them.

The images are members of Qt resource containers (``.rcc``); names, people who made them and licences are those of the
files, the latter from the package's ``copyright``. The rights to most of them belong to others than GCompris.
"""

import fnmatch
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from magma_jax.data.format.records import DataError, FileSlice, Record, Skipped
from magma_jax.data.readers.common import IMAGE_SUFFIXES, captioned, check_file, read_text

# Containers and the folders in them that hold named images.
FOLDERS = {"lang.rcc": "lang/resource/words_sample/", "categorization.rcc": "categorization/resource/images/"}

# Folders of images that show many things at once, which their names do not say.
LEFT_OUT = ("/alphabets/", "/numbers/")

# qres, version, offsets of tree, data and names, and from version 3 on flags of the whole.
_HEADER = struct.Struct(">4s5I")
_ZLIB, _FOLDER, _ZSTD = 1, 2, 4


def read_gcompris(source: Path, images: Path | None = None) -> Iterator[Record | Skipped]:
    """Photographs and pictures of animals, tools, food and buildings; the caption is the name, as in ``solar panel``.

    Args:
        source: ``/usr/share``, or that folder of the unpacked package.
        images: not used.
    """
    folder, about = source / "gcompris-qt/rcc", source / "doc/gcompris-qt-data/copyright"
    rights = _rights(read_text(about)) if about.is_file() else []
    if not rights:
        raise DataError(
            f"{about}: the package's list of licences is missing; give the share folder of gcompris-qt-data"
        )
    for name, prefix in FOLDERS.items():
        path = folder / name
        for member, content in sorted(resources(path).items()):
            _, found, rest = member.partition(f"activities/{prefix}")
            if not found or not rest.lower().endswith(IMAGE_SUFFIXES) or any(part in f"/{rest}" for part in LEFT_OUT):
                continue
            place = PurePosixPath(rest)
            group = place.parent.name or "words"
            known = {"group": group} | _rights_of(f"src/activities/{prefix}{place.with_suffix('')}", rights)
            yield captioned(f"{group}/{place.stem}", content, [spoken(place.stem)], known)


def spoken(stem: str) -> str:
    """The words of a file name: ``screwDriver3`` is a screw driver."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[-_]+", " ", stem.rstrip("0123456789")).strip().lower()


def resources(path: Path) -> dict[str, FileSlice | bytes]:
    """Members of a Qt resource container by path, as ranges of the file or, if they are compressed, as bytes.

    Versions 2 and 3, which Qt 5 and 6 write.

    Raises:
        DataError: the file is missing, is none, is cut short, or compressed by Zstandard.
    """
    check_file(path, "give the share folder of gcompris-qt-data")
    content = path.read_bytes()
    try:
        magic, version, tree, data, names, _ = _HEADER.unpack_from(content)
        if magic != b"qres" or version not in (2, 3):
            raise DataError(f"{path}: is not a Qt resource file of version 2 or 3; fetch it again")
        return _members(path, content, _Offsets(tree, data, names))
    except (struct.error, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path}: is damaged or cut short ({error}); fetch it again") from None


class _Offsets(NamedTuple):
    tree: int
    data: int
    names: int


def _members(path: Path, content: bytes, at: _Offsets) -> dict[str, FileSlice | bytes]:
    found: dict[str, FileSlice | bytes] = {}
    open_folders, seen = [(0, "")], {0}
    while open_folders:
        folder, prefix = open_folders.pop()
        count, first = struct.unpack_from(">II", content, at.tree + 22 * folder + 6)
        for number in range(first, first + count):
            entry = at.tree + 22 * number
            name_at, flags = struct.unpack_from(">IH", content, entry)
            (length,) = struct.unpack_from(">H", content, at.names + name_at)
            start = at.names + name_at + 6  # behind the length and a hash
            name = prefix + content[start : start + 2 * length].decode("utf-16-be")
            if number in seen:
                raise DataError(f"{path}: its tree has a loop at {name}; fetch it again")
            seen.add(number)
            if flags & _FOLDER:
                open_folders.append((number, f"{name}/"))
                continue
            start = at.data + struct.unpack_from(">I", content, entry + 10)[0]
            (size,) = struct.unpack_from(">I", content, start)
            if flags & _ZSTD:
                raise DataError(f"{path}: {name} is compressed by Zstandard, which is not supported")
            if start + 4 + size > len(content):
                raise DataError(f"{path}: ends before {name} does; fetch it again")
            # Compressed members begin with their size.
            packed = content[start + 8 : start + 4 + size]
            found[name] = zlib.decompress(packed) if flags & _ZLIB else FileSlice(str(path), start + 4, size)
    return found


def _rights(text: str) -> list[tuple[tuple[str, ...], dict[str, str]]]:
    """Patterns and fields of the ``Files`` paragraphs of a machine-readable ``copyright`` (DEP-5)."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        fields = dict(re.findall(r"^(\w[\w-]*):[ \t]*((?:.*)(?:\n[ \t].*)*)", paragraph, re.MULTILINE))
        if "Files" in fields:
            values = {name: " ".join(value.split()) for name, value in fields.items()}
            found.append((tuple(values.pop("Files").split()), values))
    return found


def _rights_of(stem: str, rights: list[tuple[tuple[str, ...], dict[str, str]]]) -> dict[str, str]:
    """Licence, holders and source of a file without its suffix, which the package changed; the last match counts."""
    known: dict[str, str] = {}
    for patterns, fields in rights:
        if any(fnmatch.fnmatchcase(stem, re.sub(r"\.(jpe?g|png|webp)$", "", pattern)) for pattern in patterns):
            known = fields
    names = {"License": "license", "Copyright": "copyright", "Comment": "source"}
    return {names[name]: value for name, value in known.items() if name in names}
