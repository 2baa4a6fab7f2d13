"""Answers about many images, one JSON line each: whole at the end, and not begun anew after an interruption."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from magma_jax.output import OutputError, locked, partial_name, replace_file


class AnswerFile:
    """A file of answers in the making.

    Attributes:
        done: names of the images that it has.
    """

    def __init__(self, file: BinaryIO, done: frozenset[str]):
        self._file, self.done = file, done

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds an answer; it survives whatever comes after. ``record["picture"]`` is its name."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()


@contextlib.contextmanager
def answer_file(path: str | os.PathLike, settings: Mapping[str, Any]) -> Iterator[AnswerFile]:
    """A file that stands at ``path`` when the block ends.

    Until then its lines are in a hidden file beside it, and stay there if the block fails: the next run with the same
    ``settings`` continues them.

    Raises:
        OutputError: the file is there already, another process writes it, or an interrupted run had other settings.
    """
    path = Path(path).absolute()
    if path.exists():
        raise OutputError(f"{path}: already exists; choose another name or remove it first")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder; make it first")
    with locked(path):
        partial, beside = partial_name(path), path.with_name(f".{path.name}.settings")
        content = json.dumps(settings, sort_keys=True).encode()
        done = _finished_lines(partial) if partial.exists() else frozenset()
        if done and not (beside.exists() and beside.read_bytes() == content):
            raise OutputError(
                f"{partial}: left by a run with another prompt or other options; repeat that one to finish it, or "
                "remove the file"
            )
        replace_file(beside, content)
        with partial.open("ab") as file:
            yield AnswerFile(file, done)
            os.fsync(file.fileno())
        os.rename(partial, path)
        beside.unlink()


def _finished_lines(partial: Path) -> frozenset[str]:
    """Names in a file of which the last line may be half there; that half is removed."""
    names, end = [], 0
    with partial.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            names.append(json.loads(line)["picture"])
            end += len(line)
        file.truncate(end)
    return frozenset(names)
