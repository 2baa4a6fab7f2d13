"""``verify --checksums`` and ``add-checksums``: checks a folder's files against their checksums."""

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
from magma_jax.storage.exported_weights import EXPORTED_FILE
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
    """Damaged files of a folder, of its checkpoint steps and of its base, by folder."""

    folders: dict[str, list[str]]

    @property
    def ok(self) -> bool:
        """Whether no file has changed."""
        return not any(self.folders.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON output."""
        return {"ok": self.ok, "folders": self.folders}

    def as_table(self) -> str:
        """One line per intact folder and per damaged file."""
        lines = []
        for folder, problems in self.folders.items():
            lines += [f"{folder}: DAMAGED: {problem}" for problem in problems]
            lines += [] if problems else [f"{folder}: all files as they were written"]
        return "\n".join(lines)


def check_folder(path: str | Path) -> FolderCheck:
    """Checks all files of a model or run folder, of the run's checkpoints and of the folder's base.

    Raises:
        CheckpointError: not a model or run folder, or one without checksums.
    """
    found = {str(path): list(_damages(path))}
    steps = [step for step in Path(path).glob(f"{CHECKPOINTS}/*") if step.name.isdecimal()]
    for step in sorted(steps, key=lambda step: int(step.name)):
        problem = find_damage(step)
        found[str(step)] = [] if problem is None else [problem]
    if not found[str(path)]:  # otherwise the base reference may be damaged
        try:
            base = base_folder(path)
        except CheckpointError as error:
            found[str(path)] = [str(error).removeprefix(f"{path}: ")]
        else:
            found |= check_folder(base).folders if base else {}
    return FolderCheck(found)


def add_checksums(path: str | Path) -> None:
    """Writes the checksums of a model folder that was written without them, from its current files.

    Raises:
        CheckpointError: not a model folder, or it already has checksums.
    """
    read_model_json(path)
    folder = Path(path).absolute()
    if (folder / SUMS_FILE).exists():
        raise CheckpointError(f"{folder / SUMS_FILE}: already exists; to accept the current files, remove it first")
    write_checksums(folder, below=[name for name in LISTED if (folder / name).exists()])


def _damages(path: str | Path) -> Iterator[str]:
    """Yields one line per damaged file of a folder without its base; all files are read.

    Raises:
        CheckpointError: not a model folder, or it has no checksums.
    """
    folder = Path(path).absolute()
    if not (folder / MODEL_FILE).exists():
        read_model_json(path)
    if (listed := read_checksums(folder)) is None:
        raise CheckpointError(unchecked(path))
    weights = folder / PARAMS if (folder / PARAMS).is_dir() else folder / EXPORTED_FILE
    for name in regular_files(folder, weights):
        if name not in listed:
            yield f"{name} is not listed in {SUMS_FILE}"
    with comparing(folder, listed) as damages:
        yield from damages
