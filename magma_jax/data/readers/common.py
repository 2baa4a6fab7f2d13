"""What all readers need: annotation files with errors for people, and pictures found by name."""

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from magma_jax.data.records import DataError, FileSlice

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: missing, cut short, not UTF-8, or no JSON.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """``json.loads`` whose error says where."""
    try:
        return json.loads(text)
    except ValueError as error:
        at_end = "the file ends too early; fetch it again" if _cut_short(text) else "it is no valid JSON"
        raise DataError(f"{where}: {at_end} ({error})") from None


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file; with the errors of ``read_json``."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; give the annotation file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of every line that is not empty; reads ``.gz`` too, and one line at a time."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line := line.rstrip(b"\r\n"):
                    yield number, line
        except (EOFError, OSError) as error:
            raise DataError(f"{path}: cannot be read to its end ({error}); fetch it again") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and object of every line of a JSON-lines file."""
    for number, line in read_lines(path):
        try:
            value = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError is one
            raise DataError(f"{path}: line {number} is no valid JSON ({error}); fetch the file again") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}: line {number} is no JSON object")
        yield number, value


def field(entry: Any, name: str, where: str) -> Any:
    """``entry[name]``, or an error that names the field and what the entry has instead."""
    if not isinstance(entry, Mapping) or name not in entry:
        has = ", ".join(list(entry)[:8]) if isinstance(entry, Mapping) else type(entry).__name__
        raise DataError(f"{where}: no {name!r} (there is: {has}); is this the right file for the format?")
    return entry[name]


def metadata(entry: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those of ``names`` that the entry has."""
    return {name: entry[name] for name in names if name in entry}


class PictureFolder:
    """Pictures anywhere below a folder, found by file name.

    Data sets come unpacked in many ways (``val2014/`` beside or below ``images/``, ``VG_100K`` and ``VG_100K_2``), so
    names are looked up, not paths built.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{root}: no such folder; give the folder of the pictures with --images")
        self._by_name: dict[str, str | None] | None = None

    def find(self, name: str, *alternatives: str) -> FileSlice | None:
        """The picture of one of these names, the first that exists; a name may lead with folders.

        Raises:
            DataError: several pictures have that name.
        """
        for candidate in (name, *alternatives):
            direct = self.root / candidate
            if ".." not in Path(candidate).parts and direct.is_file():
                return FileSlice(str(direct))
        if self._by_name is None:
            self._by_name = self._scan()
        for candidate in (name, *alternatives):
            base = Path(candidate).name
            if base in self._by_name:
                if self._by_name[base] is None:
                    raise DataError(f"{self.root}: several pictures are called {base}; give a narrower --images")
                return FileSlice(self._by_name[base])
        return None

    def _scan(self) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for folder, _, names in os.walk(self.root):
            for name in names:
                if name.lower().endswith(PICTURE_SUFFIXES):
                    found[name] = None if name in found else os.path.join(folder, name)
        return found


def _cut_short(text: str) -> bool:
    return not text.rstrip().endswith(("}", "]"))
