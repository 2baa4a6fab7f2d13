"""Metrics writers: ``metrics.jsonl``, TensorBoard, and optionally Weights & Biases.

A writer records scalars and images of a step. Opening one for a run that resumes after step N removes what a crashed
process wrote for later steps, so that every step is recorded once; Weights & Biases cannot remove them and shows such
steps twice.
"""

import dataclasses
import json
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magma_jax.config import ConfigError
from magma_jax.output import replace_file
from magma_jax.typing import UInt8

METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
WANDB = "wandb"

# Metrics shown under "speed" instead of "train".
SPEED = {
    "seconds",
    "compile_seconds",
    "samples_per_second",
    "tokens_per_second",
    "step_seconds",
    "input_wait",
    "model_flops_per_second",
    "mfu",
    "device_memory_bytes",
}


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """What is recorded while a run trains, in addition to ``metrics.jsonl``.

    Attributes:
        tensorboard: whether to write metrics and images to TensorBoard (``tensorboard/`` in the run folder).
        wandb: Weights & Biases project to log to; None for none.
        samples_every: steps between samples of the model's answers; the last step is always sampled. 0: never.
        samples: number of sampled images, evenly spaced in the split; the same ones every time.
        samples_split: split of the dataset they come from.
        samples_tokens: maximum number of new tokens per answer.
    """

    tensorboard: bool = True
    wandb: str | None = None
    samples_every: int = 0
    samples: int = 12
    samples_split: str = "validation"
    samples_tokens: int = 32

    def __post_init__(self):
        for name, least in (("samples_every", 0), ("samples", 1), ("samples_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"watch.{name} must be at least {least}, got {getattr(self, name)}")


class Writer:
    """Base of writers, which ignores scalars and images; ``step`` counts finished optimizer steps."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars by name."""

    def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
        """Records one image."""

    def close(self) -> None:
        """Writes buffered values and closes the writer."""


class JsonLines(Writer):
    """One JSON object per step, ``{"step": 20, "loss": 1.5}``."""

    def __init__(self, path: str | Path, after_step: int):
        self._path = Path(path)
        self.last = cut_after(path, after_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        # Nine digits distinguish all fp32 numbers.
        rounded = {name: v if isinstance(v, int) else float(f"{v:.9g}") for name, v in values.items()}
        append_line(self._path, {"step": step, **rounded})


class TensorBoard(Writer):
    """An event file in ``folder``; a background thread writes it, at least every ten seconds."""

    def __init__(self, folder: str | Path, after_step: int):
        folder = Path(folder)
        # TensorBoard drops events of older files from this step on.
        purge = after_step + 1 if folder.is_dir() and any(folder.glob("events.*")) else None
        # Files are named by the second; the suffix keeps two of the same second apart, in reading order.
        suffix = f".{time.time_ns()}"
        # Imported here: it imports PyTorch if installed, which takes seconds.
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10, filename_suffix=suffix)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(tag(name), value, step)

    def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Wandb(Writer):
    """A Weights & Biases run; its id is stored in the run folder, so that a resumed run continues it.

    Raises:
        ConfigError: the package is missing.
    """

    def __init__(self, workdir: str | Path, project: str, config: Mapping[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports]  # an extra
        except ModuleNotFoundError:
            raise ConfigError("watch.wandb needs another package: pip install wandb") from None
        self._wandb = wandb
        folder = Path(workdir) / WANDB
        folder.mkdir(exist_ok=True)
        id_file = folder / "run_id.txt"
        if not id_file.is_file():
            replace_file(id_file, secrets.token_hex(4).encode())
        self._run = wandb.init(
            project=project,
            name=Path(workdir).name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(workdir),  # W&B creates wandb/ in it
            config=dict(config),
        )
        # W&B's own step must increase, but a run that lost steps in a crash counts them again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{tag(name): value for name, value in values.items()}})

    def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
        self._run.log({"step": step, name: self._wandb.Image(pixels)})

    def close(self) -> None:
        self._run.finish()


class Writers(Writer):
    """Zero or more writers as one; drops scalars that are not finite, which JSON cannot hold."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = list(writers)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for writer in self._writers:
            writer.scalars(step, finite)

    def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
        for writer in self._writers:
            writer.image(step, name, pixels)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def tag(name: str) -> str:
    """The TensorBoard tag of a metric; TensorBoard groups tags by the word before the slash."""
    if name.startswith("validation_"):
        return name.replace("_", "/", 1)
    return f"speed/{name}" if name in SPEED else f"train/{name}"


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Appends one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, ensure_ascii=False) + "\n")


def cut_after(path: str | Path, step: int) -> dict[str, Any]:
    """Removes lines of later steps, and malformed ones, from a JSON-lines file; returns the last remaining line.

    A killed process leaves lines of steps that have no checkpoint, and sometimes half a line. The file is replaced
    atomically, and left untouched if no line is removed. Without a file, or without a line, the result is empty.
    """
    path = Path(path)
    if not path.is_file():
        return {}
    kept, last = [], {}
    for line in _lines(path):
        try:
            values = json.loads(line)
            keep = values["step"] <= step
        except (ValueError, KeyError, TypeError):
            continue
        if keep:
            kept.append(line)
            last = values
    content = "".join(line + "\n" for line in kept)
    if content.encode() != path.read_bytes():
        replace_file(path, content.encode())
    return last


def read_lines(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """Metrics by step, in order, and the number of unreadable lines; lines of the same step are merged."""
    by_step: dict[int, dict[str, Any]] = {}
    unreadable = 0
    if Path(path).is_file():
        for line in _lines(Path(path)):
            try:
                values = json.loads(line)
                by_step.setdefault(values["step"], {}).update(values)
            except (ValueError, KeyError, TypeError):
                unreadable += 1
    return [by_step[step] for step in sorted(by_step)], unreadable


def _lines(path: Path) -> list[str]:
    # str.splitlines would also split at U+2028 and the like, which answers may contain.
    return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line]
