"""Shared helpers of the readers: annotation files with clear errors, and image lookup by name."""

import codecs
import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from magma_jax.data.format.records import HIDDEN, DataError, FileSlice, Record, Skipped

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

# JSON's names of value types, for error messages.
KINDS = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
# Ids of images and questions are numbers or strings.
ID = (int, str)


def read_json(path: Path, kind: type = object) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        kind: required type of its value, ``dict`` or ``list``.

    Raises:
        DataError: missing, truncated, not UTF-8, not JSON, a duplicate key in an object, or a value of another type.
    """
    text = read_text(path)
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        at_end = "the file ends too early; fetch it again" if _cut_short(text) else "it is not valid JSON"
        raise DataError(f"{path}: {at_end} ({error})") from None
    return checked(content, kind, str(path))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # Python would silently keep the last one
        keys = [key for key, _ in pairs]
        raise DataError(f"an object has the key {next(k for k in found if keys.count(k) > 1)!r} twice; repair the file")
    return found


def read_text(path: Path) -> str:
    """Reads a UTF-8 text file; errors as of ``read_json``."""
    check_file(path, "give the annotation file")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None


def check_file(path: Path, instead: str = "give a file") -> None:
    """Raises DataError unless a path is a regular file: reading a pipe or a device might never end."""
    if not path.is_file():
        other = "is not a regular file" if path.exists() else "no such file"
        raise DataError(f"{path}: {f'is a folder; {instead}' if path.is_dir() else other}")


def lines_of(text: str) -> list[str]:
    """Splits text at LF, CR LF and CR; ``str.splitlines`` would also split at U+2028 and others."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields number (from 1) and bytes of every line that is not empty, also from ``.gz`` files.

    Lines end with LF, CR LF or CR.
    """
    check_file(path)
    opener = gzip.open if path.suffix == ".gz" else open
    # Latin-1 decodes every byte, and text mode handles the three line endings.
    with opener(path, "rt", encoding="latin-1", newline=None) as file:
        try:
            for number, text in enumerate(file, start=1):
                line = text.removesuffix("\n").encode("latin-1")
                if line := line.removeprefix(codecs.BOM_UTF8 if number == 1 else b""):
                    yield number, line
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}: cannot be read to its end ({error}); fetch it again") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields number and object of every line of a JSON-lines file."""
    for number, line in read_lines(path):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError includes UnicodeDecodeError
            raise DataError(f"{path}: line {number} is not valid JSON ({error}); fetch the file again") from None
        yield number, checked(value, dict, f"{path}: line {number}")


def checked(value: Any, kind: type | tuple[type, ...], where: str) -> Any:
    """Returns ``value`` if it has the JSON type ``kind``; else raises DataError with the type it has."""
    if not isinstance(value, kind):
        wanted = " or ".join(KINDS[one] for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{where} is {_kind_of(value)}, not {wanted}; repair it, or give the right file for the format")
    return value


def field(entry: Any, name: str, where: str, kind: type | tuple[type, ...] = object) -> Any:
    """Returns ``entry[name]`` if it has the JSON type ``kind``.

    Raises:
        DataError: names ``where``, the field, and the fields or type found instead.
    """
    if not isinstance(entry, Mapping) or name not in entry:
        has = ", ".join(list(entry)[:8]) if isinstance(entry, Mapping) else _kind_of(entry)
        raise DataError(f"{where}: no {name!r} (there is: {has}); is this the right file for the format?")
    return checked(entry[name], kind, f"{where}: {name!r}")


def text(entry: Any, name: str, where: str) -> str:
    """Text ``field`` without surrounding whitespace."""
    return field(entry, name, where, str).strip()


def claim(key: int | str, seen: set[str], where: str) -> str:
    """Adds an id to ``seen`` and returns it as text; 1 and "1" are the same id.

    Raises:
        DataError: a duplicate id.
    """
    if str(key) in seen:
        raise DataError(f"{where}: two entries have the id {key!r}; ids must be unique, repair the file")
    seen.add(str(key))
    return str(key)


@dataclasses.dataclass(frozen=True)
class Missing:
    """Missing image: the folder and the names that were searched."""

    names: tuple[str, ...] = ()
    root: str = ""

    def skipped(self, key: str, samples: int = 1) -> Skipped:
        """The entry of a record without its image."""
        looked = f"looked for {', '.join(self.names)} below {self.root}" if self.names else ""
        return Skipped(key, "image missing", samples, looked)


def captioned(
    key: str, image: FileSlice | bytes | Missing, captions: Sequence[str], known: Mapping[str, Any] | None = None
) -> Record | Skipped:
    """Record of an image and its captions without empty ones, or ``Skipped`` if there is none."""
    said = tuple(caption for caption in captions if caption)
    if isinstance(image, Missing):
        return image.skipped(key)
    if not said:
        return Skipped(key, "empty caption" if captions else "image without an annotation")
    return Record(key, image, said, metadata=known or {})


def metadata(entry: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The fields ``names`` that the entry has."""
    return {name: entry[name] for name in names if name in entry}


class ImageFolder:
    """Images below a folder, indexed by file name.

    Unpacked datasets have many layouts (``val2014/`` beside or below ``images/``, ``VG_100K`` and ``VG_100K_2``), so
    names are looked up instead of building paths.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{root}: no such folder; give the folder of the images with --images")
        self._by_name: dict[str, str | None] | None = None

    def find(self, name: str, *alternatives: str) -> FileSlice | Missing:
        """The first image that exists under one of these names, which may contain folders.

        Raises:
            DataError: several images have that name, or it leads out of the folder.
        """
        for candidate in (name, *alternatives):
            direct = within(self.root, candidate, "an annotation")
            if direct.is_file():
                return FileSlice(str(direct))
        if self._by_name is None:
            self._by_name = self._scan()
        for candidate in (name, *alternatives):
            base = Path(candidate).name
            if base in self._by_name:
                path = self._by_name[base]
                if path is None:
                    raise DataError(f"{self.root}: several images are called {base}; give a narrower --images")
                return FileSlice(path)
        return Missing((name, *alternatives), str(self.root))

    def _scan(self) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for path in files_below(self.root, IMAGE_SUFFIXES):
            name = os.path.basename(path)
            found[name] = None if name in found else path
        return found


def within(root: Path, name: str, where: str) -> Path:
    """Path of a file named by an annotation; DataError if it is outside the folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{where} names the image {name!r}, which leads out of {root}; repair the annotation")
    return root / path


def hidden(name: str) -> bool:
    """Whether a path relative to its dataset is hidden: dot files and folders, and files that macOS adds.

    AppleDouble files (``._cat.jpg``) and ``.ipynb_checkpoints`` begin with a dot too.
    """
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in name.split("/"))


def files_below(root: Path, suffixes: tuple[str, ...], ignored: list[Skipped] | None = None) -> Iterator[str]:
    """Yields the files below a folder; follows links to folders and visits each folder once.

    Hidden files are skipped; ``ignored`` gets one entry for each.
    """

    def fail(error: OSError) -> None:
        if not hidden(os.path.relpath(error.filename or root, root)):
            raise error  # os.walk would skip unreadable folders

    visited = set()
    for folder, below, names in os.walk(root, onerror=fail, followlinks=True):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in visited:
            below.clear()
            continue
        visited.add((state.st_dev, state.st_ino))
        below.sort()
        place = os.path.relpath(folder, root)
        for name in names:
            if not name.lower().endswith(suffixes):
                continue
            if not hidden(f"{place}/{name}"):
                yield os.path.join(folder, name)
            elif ignored is not None:
                ignored.append(Skipped(os.path.normpath(f"{place}/{name}"), HIDDEN))


def files_in(folder: Path, *patterns: str) -> list[Path]:
    """Files of a folder that match the patterns, sorted, without hidden ones."""
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if not hidden(path.name))


def _kind_of(value: Any) -> str:
    return "null" if value is None else KINDS.get(type(value), type(value).__name__)


def _cut_short(text: str) -> bool:
    return not text.rstrip().endswith(("}", "]"))
