"""Where the figures of a run go: ``metrics.jsonl``, TensorBoard, and Weights & Biases if asked.

A writer takes scalars and images of a step. Opening one for a run that goes on after step N forgets what a crashed
process wrote of later steps, so that every step is there once; Weights & Biases cannot forget and shows such steps
twice.
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

# What is shown under "speed" and not under "train".
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
    """What is recorded while a run trains; ``metrics.jsonl`` always is.

    Attributes:
        tensorboard: whether figures and images also go to TensorBoard (``tensorboard/`` in the run folder).
        wandb: project of Weights & Biases that they also go to; None for not at all.
        samples_every: steps between looks at what the model says; the last step is always one. 0: never.
        samples: images it is asked about, evenly spaced in the split; the same ones every time.
        samples_split: split of the dataset they come from.
        samples_tokens: most new tokens of an answer.
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
    """Takes figures and images, and leaves out what it has no place for; ``step`` counts finished optimizer steps."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures by name."""

    def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
        """One image."""

    def close(self) -> None:
        """Writes what is still held back."""


class JsonLines(Writer):
    """One JSON object a step, ``{"step": 20, "loss": 1.5}``."""

    def __init__(self, path: str | Path, after_step: int):
        self._path = Path(path)
        self.last = cut_after(path, after_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        # Nine digits keep every fp32 number apart.
        rounded = {name: v if isinstance(v, int) else float(f"{v:.9g}") for name, v in values.items()}
        append_line(self._path, {"step": step, **rounded})


class TensorBoard(Writer):
    """An event file in ``folder``; a background thread writes it, at least every ten seconds."""

    def __init__(self, folder: str | Path, after_step: int):
        folder = Path(folder)
        # TensorBoard drops events from this step on that older files of the folder hold.
        purge = after_step + 1 if folder.is_dir() and any(folder.glob("events.*")) else None
        # Files are named by the second; two of the same name would overwrite each other, and they are read in order.
        suffix = f".{time.time_ns()}"
        # Here: it imports PyTorch where that is installed, which takes seconds.
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
    """A run of Weights & Biases; its id is kept in the run folder, so that a resumed run goes on in it.

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
            dir=str(workdir),  # it makes a folder wandb/ in there
            config=dict(config),
        )
        # W&B's own step only rises; a run that lost steps in a crash counts them again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{tag(name): value for name, value in values.items()}})

    def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
        self._run.log({"step": step, name: self._wandb.Image(pixels)})

    def close(self) -> None:
        self._run.finish()


class Writers(Writer):
    """Several writers as one, or none; figures that are not finite, which JSON cannot hold, are left out."""

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
    """The name of a figure in TensorBoard, which groups figures by the word before the slash."""
    if name.startswith("validation_"):
        return name.replace("_", "/", 1)
    return f"speed/{name}" if name in SPEED else f"train/{name}"


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Adds one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, ensure_ascii=False) + "\n")


def cut_after(path: str | Path, step: int) -> dict[str, Any]:
    """Removes the lines of later steps, and broken ones, from a file of JSON lines; returns the last line that stays.

    A process that was killed leaves lines of steps that no checkpoint knows, and at times half a line. The file is
    replaced as a whole, and not touched if nothing goes. Without a file, or without a line, the result is empty.
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
    """Figures by step, in order, and how many lines could not be read; lines of one step are joined."""
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
    # An answer may hold U+2028 and the like, at which str.splitlines would cut it in two.
    return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line]
