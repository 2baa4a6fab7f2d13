"""``verify --checksums`` and ``add-checksums``: whether the files of a folder are as they were written."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from magma_jax.storage.checksums import (
    SUMS_FILE,
    comparing,
    find_damage,
    read_checksums,
    regular_files,
    write_checksums,
)
from magma_jax.storage.model_folder import (
    LISTED,
    MODEL_FILE,
    PARAMS,
    CheckpointError,
    base_folder,
    read_model_json,
    unchecked,
)
from magma_jax.training.checkpoints.checkpoint import CHECKPOINTS


@dataclasses.dataclass(frozen=True)
class FolderCheck:
    """By folder, the folder itself, its steps and its base, what is wrong with its files; nothing if all are whole."""

    folders: dict[str, list[str]]

    @property
    def ok(self) -> bool:
        """Whether no file has changed."""
        return not any(self.folders.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return {"ok": self.ok, "folders": self.folders}

    def as_table(self) -> str:
        """A line for each folder that is whole, and for each file that is not."""
        lines = []
        for folder, problems in self.folders.items():
            lines += [f"{folder}: DAMAGED: {problem}" for problem in problems]
            lines += [] if problems else [f"{folder}: all files as they were written"]
        return "\n".join(lines)


def check_folder(path: str | Path) -> FolderCheck:
    """Reads every file of a model folder or run folder, of the run's checkpoints and of the folder's base.

    Raises:
        CheckpointError: not such a folder, or one without sums.
    """
    found = {str(path): list(_damages(path))}
    steps = [step for step in Path(path).glob(f"{CHECKPOINTS}/*") if step.name.isdecimal()]
    for step in sorted(steps, key=lambda step: int(step.name)):
        problem = find_damage(step)
        found[str(step)] = [] if problem is None else [problem]
    if not found[str(path)]:  # else the reference itself may be wrong
        try:
            base = base_folder(path)
        except CheckpointError as error:
            found[str(path)] = [str(error).removeprefix(f"{path}: ")]
        else:
            found |= check_folder(base).folders if base else {}
    return FolderCheck(found)


def add_checksums(path: str | Path) -> None:
    """Lists the sums of a model folder that was written before there were any, as its files are now.

    Raises:
        CheckpointError: not a model folder, or it has sums already.
    """
    read_model_json(path)
    folder = Path(path).absolute()
    if (folder / SUMS_FILE).exists():
        raise CheckpointError(
            f"{folder / SUMS_FILE}: already exists; to take the files as they are now for right, remove it first"
        )
    write_checksums(folder, below=[name for name in LISTED if (folder / name).exists()])


def _damages(path: str | Path) -> Iterator[str]:
    """What is wrong with a folder's own files, one line each; all of them are read.

    Raises:
        CheckpointError: not a model folder, or it has no sums.
    """
    folder = Path(path).absolute()
    if not (folder / MODEL_FILE).exists():
        read_model_json(path)
    if (listed := read_checksums(folder)) is None:
        raise CheckpointError(unchecked(path))
    for name in regular_files(folder, folder / PARAMS):
        if name not in listed:
            yield f"{name} is not listed in {SUMS_FILE}"
    with comparing(folder, listed) as damages:
        yield from damages
