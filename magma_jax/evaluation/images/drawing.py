"""Runs a task of images: draws every caption, and compares the drawings with the real images as sets."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from magma_jax.config import to_dict
from magma_jax.data.datasets import Dataset
from magma_jax.data.format.records import DataError
from magma_jax.evaluation.images.nets import BATCH, ImageNet, Seen, efficientnet, inception
from magma_jax.evaluation.images.task import ImageTaskConfig
from magma_jax.evaluation.metrics.image import feature_statistics, frechet_distance, inception_score, precision_recall
from magma_jax.evaluation.results.names import file_stem
from magma_jax.evaluation.tables import text_table
from magma_jax.evaluation.tasks.examples import Example, Examples, OwnExamples, StoredExamples, close, spaced
from magma_jax.inference.answers import ImageOptions, Score
from magma_jax.inference.clip_scores import ClipScorer
from magma_jax.inference.generator import ImageGenerator
from magma_jax.output import replace_file
from magma_jax.typing import UInt8

# Neighbours of precision and recall.
NEIGHBOURS = 3
SUFFIX = ".images.json"


@dataclasses.dataclass(frozen=True)
class ImageResult:
    """Result of a task.

    Attributes:
        task: config of the task.
        scores: score by name; every name says which network's features it is of.
        stamp: what else it depends on: data, network, sampler, checkpoint.
    """

    task: ImageTaskConfig
    scores: Mapping[str, float]
    stamp: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "task": to_dict(self.task),
            "settings": self.task.settings,
            "scores": dict(self.scores),
            **self.stamp,
        }

    def table(self) -> str:
        """Text table of scores and what they depend on."""
        rows = [["score", ""], *([name, f"{value:.4f}"] for name, value in self.scores.items())]
        facts = [f"  {name:<12}{_shown(value)}" for name, value in self.stamp.items()]
        return "\n".join([self.task.name, "", text_table(rows), "", *facts])


def draw_task(
    model: ImageGenerator,
    task: ImageTaskConfig,
    dataset: Dataset | None = None,
    *,
    workers: int = 0,
    stamp: Mapping[str, Any] | None = None,
) -> ImageResult:
    """Draws the first caption of every example and scores the drawings.

    Args:
        model: a model that draws.
        task: config of the task.
        dataset: the run's own data, for tasks that use it.
        workers: processes that decode images of dataset folders; 0 to decode in this process.
        stamp: added to the result's stamp, such as the checkpoint.

    Raises:
        DataError: a model that draws nothing, or data that is missing or too small.
    """
    if "image" not in model.makes:
        raise DataError(f"task {task.name}: this model draws no images; give a checkpoint of one that does")
    net = _net(task)  # first, so that a missing file is reported at once
    examples, of = _examples(task, dataset, workers)
    rows = [examples[number] for number in spaced(len(examples), task.limit)]
    least = max(task.splits, NEIGHBOURS + 1)
    if len(rows) < least:
        raise DataError(f"task {task.name}: {len(rows)} captions are too few to compare sets; it takes {least}")
    clip = None if task.clip is None else ClipScorer(task.clip)
    real = _look(net, _real(examples, rows, task.image_size), len(rows), "real images")
    close(examples.images)
    seen = _SeenByClip(clip, [example.answers[0] for example in rows])
    ranked = options_of(task) if task.rerank == "model" else dataclasses.replace(options_of(task), score=clip)
    drawn = _look(net, seen.watch(_drawn(model, rows, task, ranked)), len(rows), "drawing")
    scores = compare(real, drawn, net.name, splits=task.splits) | seen.scores()
    found = {
        "data": examples.name,
        "n": len(rows),
        "of": of,
        "net": net.name,
        "resize": f"real images: shorter side to {task.image_size}, centre crop; drawings of {model.image_size}: "
        + ("as they are" if model.image_size == task.image_size else f"bicubic to {task.image_size}"),
        "sampler": model.sampler(options_of(task)),
        "re-ranking": "none"
        if task.candidates == 1
        else f"best of {task.candidates} by "
        + ("the model's own likelihood of the caption" if task.rerank == "model" else "the CLIP score"),
        **({} if clip is None else {"clip": clip.name}),
        **(stamp or {}),
    }
    return ImageResult(task, scores, found)


def options_of(task: ImageTaskConfig) -> ImageOptions:
    """Options of a task's drawings.

    Raises:
        ValueError: a value out of range.
    """
    names = ("seed", "candidates", "guidance", "temperature", "top_p", "steps")
    return ImageOptions(**{name: getattr(task, name) for name in names})


def compare(real: Seen, drawn: Seen, net: str, *, splits: int) -> dict[str, float]:
    """Scores of drawings beside real images; names say whose features they are of.

    Raises:
        ValueError: too few images.
    """
    distance = frechet_distance(feature_statistics(real.features), feature_statistics(drawn.features))
    near = precision_recall(real.features, drawn.features, NEIGHBOURS)
    scores = {_named("frechet_distance", net): distance}
    for name, seen in (("", drawn), ("_of_real_images", real)):
        score = inception_score(seen.probabilities, splits)
        scores |= {f"{_named('score', net)}{name}": score.mean, f"{_named('score', net)}{name}_std": score.std}
    return scores | {f"{net}_precision": near.precision, f"{net}_recall": near.recall}


def write_image_result(folder: str | Path, result: ImageResult) -> Path:
    """Writes ``NAME.images.json``, a name for every combination of task, settings and checkpoint."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    everything = [to_dict(result.task), result.stamp.get("checkpoint")]
    path = folder / f"{file_stem(result.task.name, result.task.settings, everything)}{SUFFIX}"
    replace_file(path, (json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n").encode())
    return path


def _named(what: str, net: str) -> str:
    # Only features of the official Inception network give scores that the field calls FID and Inception score.
    if net.startswith("inception"):
        return {"frechet_distance": "fid", "score": "inception_score"}[what]
    return f"{net}_{what}"


def _net(task: ImageTaskConfig) -> ImageNet:
    return efficientnet(task.image_size) if task.weights is None else inception(task.weights)


def _examples(task: ImageTaskConfig, dataset: Dataset | None, workers: int) -> tuple[Examples, int]:
    if task.data is not None:
        examples: Examples = StoredExamples(task.data, "caption", task.image_size, workers)
    elif dataset is None:
        raise DataError(f"task {task.name}: no data; give the dataset folder with --data")
    else:
        examples = OwnExamples(dataset, task.split, "caption")
    return examples, len(examples)


def _real(examples: Examples, rows: Sequence[Example], size: int) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    for start in range(0, len(rows), BATCH):
        pixels = examples.images[np.array([example.image for example in rows[start : start + BATCH]])]
        yield from (_sized(image, size) for image in pixels)


class _SeenByClip:
    """Cosines of the drawings that pass by with their captions; none without a CLIP."""

    def __init__(self, clip: Score | None, captions: Sequence[str]):
        self._clip, self._captions = clip, captions
        self._waiting: list[tuple[Image.Image, str]] = []
        self._cosines: list[np.ndarray] = []

    def watch(self, drawings: Iterator[UInt8[np.ndarray, "H W 3"]]) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """The drawings, in the order of the captions."""
        for caption, pixels in zip(self._captions, drawings, strict=True):
            self._waiting.append((Image.fromarray(pixels), caption))
            if len(self._waiting) == BATCH:
                self._score()
            yield pixels
        self._score()

    def scores(self) -> dict[str, float]:
        """100 times the mean of the cosines that are above 0, as torchmetrics has it (Hessel et al., 2021)."""
        if self._clip is None:
            return {}
        return {"clip_score": 100 * float(np.maximum(np.concatenate(self._cosines), 0).mean())}

    def _score(self) -> None:
        if self._clip is not None and self._waiting:
            images, captions = zip(*self._waiting, strict=True)
            self._cosines.append(self._clip(images, captions))
        self._waiting.clear()


def _drawn(
    model: ImageGenerator, rows: Sequence[Example], task: ImageTaskConfig, options: ImageOptions
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    prompts = ([example.answers[0]] for example in rows)
    for answers in model.answers(prompts, options, count=len(rows)):
        (image,) = (part for part in answers[0].parts if isinstance(part, Image.Image))
        yield _sized(np.asarray(image), task.image_size)


def _sized(pixels: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    if pixels.shape[0] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def _look(net: ImageNet, images: Iterator[np.ndarray], count: int, what: str) -> Seen:
    """What the network makes of images, a batch in memory at a time."""
    parts, batch = [], []
    for image in tqdm(images, desc=what, unit="image", total=count, disable=None):
        batch.append(image)
        if len(batch) == BATCH:
            parts.append(net.look(np.stack(batch)))
            batch = []
    if batch:
        parts.append(net.look(np.stack(batch)))
    return Seen(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    return str(value)
