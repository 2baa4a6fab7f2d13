"""``verify --checksums``: whether all files of a folder are as they were written."""

import dataclasses
from pathlib import Path
from typing import Any

from magma_jax.training.checkpoint import CHECKPOINTS
from magma_jax.training.checksums import find_damage
from magma_jax.training.model_folder import CheckpointError, base_folder, check_files


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
    found = {str(path): list(check_files(path))}
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
