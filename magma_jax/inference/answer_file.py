"""Answers for many images, one JSON line each, written atomically and resumed after an interruption."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from magma_jax.output import OutputError, locked, partial_name, replace_file


class AnswerFile:
    """A file of answers in progress.

    Attributes:
        done: names of the images that it already contains.
    """

    def __init__(self, file: BinaryIO, done: frozenset[str]):
        self._file, self.done = file, done

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends an answer and flushes it to disk; ``record["picture"]`` is the image's name."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()


@contextlib.contextmanager
def answer_file(path: str | os.PathLike, settings: Mapping[str, Any]) -> Iterator[AnswerFile]:
    """A file that appears at ``path`` when the block ends.

    Until then its lines are in a hidden file beside it. They remain there if the block fails, and the next run with the
    same ``settings`` continues them.

    Raises:
        OutputError: the file already exists, another process writes it, or an interrupted run had other settings.
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
    """Names in a file whose last line may be incomplete; removes such a line."""
    names, end = [], 0
    with partial.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            names.append(json.loads(line)["picture"])
            end += len(line)
        file.truncate(end)
    return frozenset(names)
