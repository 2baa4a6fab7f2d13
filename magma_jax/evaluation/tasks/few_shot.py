"""Runs a task: few-shot prompts, answers, scores, and their provenance."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from magma_jax.config import to_dict
from magma_jax.data.datasets import Dataset
from magma_jax.data.format.records import DataError
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.evaluation.metrics.by_protocol import Scores
from magma_jax.evaluation.scoring.protocols import PROTOCOLS
from magma_jax.evaluation.scoring.score import Score, judge, score
from magma_jax.evaluation.tasks.answering import Answerer, Parts
from magma_jax.evaluation.tasks.examples import (
    BlackImages,
    Example,
    Examples,
    JoinedImages,
    OwnExamples,
    StoredExamples,
    close,
    spaced,
)
from magma_jax.evaluation.tasks.shots import Shot, choose_shots
from magma_jax.evaluation.tasks.task import TaskConfig
from magma_jax.evaluation.tasks.truncation import Truncation, truncate
from magma_jax.inference.generator import TokenGenerator


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Result of a task.

    Attributes:
        task: config of the task.
        examples: queries, in the order of the data.
        shots: the shots of each query, with their rows; a single list if they are shared.
        outputs: complete outputs of the model.
        answers: truncated outputs, which are scored.
        scores: protocol to score; empty if the true answers are secret.
        first_line: scores of the first line of every output, a truncation independent of the truth; empty if the
            answers are the first lines already.
        images: images of the examples, by ``Example.image``.
        stamp: everything else that the result depends on: data, sizes, checkpoint.
    """

    task: TaskConfig
    examples: Sequence[Example]
    shots: Sequence[Sequence[Shot]]
    outputs: Sequence[str]
    answers: Sequence[str]
    scores: Mapping[str, Score]
    first_line: Mapping[str, Score]
    images: Any
    stamp: Mapping[str, Any]

    def per_sample(self) -> Scores | None:
        """Scores of every answer under the first protocol; None if the true answers are secret."""
        if not self.scores:
            return None
        name = self.task.protocols[0]
        return judge(PROTOCOLS[name], self.answers, [example.reference(name) for example in self.examples])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without predictions, which have a separate file."""
        return {
            "task": to_dict(self.task),
            "settings": self.task.settings,
            "scores": {name: found.to_dict() for name, found in self.scores.items()},
            "first_line": {name: found.to_dict() for name, found in self.first_line.items()},
            **self.stamp,
        }


@dataclasses.dataclass(frozen=True)
class Asked:
    """The prompts of a task.

    Attributes:
        prompts: prompt of every example, without the common prefix.
        common: common prefix of all prompts.
        dropped: number of shots that did not fit.
    """

    prompts: list[Parts]
    common: Parts
    dropped: int


def evaluate_task(
    model: TokenGenerator,
    task: TaskConfig,
    dataset: Dataset | None = None,
    *,
    batch_size: int = 32,
    mesh: Mesh | None = None,
    workers: int = 0,
    stamp: Mapping[str, Any] | None = None,
) -> TaskResult:
    """Answers every query of a task and scores the answers.

    Args:
        model: model whose weights are on ``mesh``.
        task: config of the task.
        dataset: the run's own data, for tasks that use it.
        batch_size: prompts per batch; affects speed, not results.
        mesh: devices to shard the work over, of one process or several; affects speed, not results.
        workers: processes that decode images of dataset folders; 0 to decode in this process.
        stamp: added to the result's stamp, such as the checkpoint.

    Raises:
        DataError: data that is missing or does not fit the task. PromptError: prompts that exceed the context.
    """
    queries, pool = open_examples(task, model.images.size, dataset, workers)
    numbers = spaced(len(queries), task.limit)
    examples = [queries[number] for number in numbers]
    check_ids(examples, queries.name)
    shots = choose_shots(task, queries, pool, examples)
    same = pool.images is queries.images
    images = queries.images if same else JoinedImages(queries.images, pool.images)
    shown = BlackImages(len(images), model.images.size) if task.blind else images
    answerer = Answerer(model, shown, batch_size=batch_size, mesh=mesh)
    offset = 0 if same else len(queries.images)
    room = model.lm_config.context_length - task.max_new_tokens
    asked = ask(task, examples, shots, offset, answerer, room)
    if task.kind == "class":
        outputs = _classify(task, answerer, asked.prompts)
    else:
        outputs = answerer(
            asked.prompts,
            max_new_tokens=task.max_new_tokens,
            sampling=task.sampling,
            seed=task.seed,
            common=asked.common,
            extrapolate=task.overlong == "extrapolate",
        )
    close(images)
    longest = max(map(answerer.length, asked.prompts)) + answerer.length(asked.common)
    found = {
        "samples": len(examples),
        "of": len(queries),
        "data": queries.name,
        "shots": {"data": pool.name, "of": len(pool), "dropped": asked.dropped} if task.shots else None,
        "longest_prompt": longest,
        "context": model.lm_config.context_length,
        "decoding": _decoding(task),
        **(stamp or {}),
    }
    return finish(task, model.tokenizer, examples, shots, outputs, images, found)


def finish(
    task: TaskConfig,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    shots: Sequence[Sequence[Shot]],
    outputs: Sequence[str],
    images: Any,
    stamp: Mapping[str, Any],
) -> TaskResult:
    """Truncates and scores the outputs of a task.

    Raises:
        DataError: only some examples have true answers, or the dataset lacks data that a protocol needs.
    """

    def kept(how: Truncation) -> list[str]:
        texts = zip(outputs, examples, strict=True)
        return [truncate(output, example.answers, how, tokenizer) for output, example in texts]

    answers, lines = kept(task.truncation), kept("newline")
    scores, first_line = {}, {}
    secret = [example.id for example in examples if not example.answers]
    if secret and len(secret) < len(examples):
        raise DataError(f"{len(secret)} of {len(examples)} examples have no true answers, such as {secret[0]}")
    if not secret:
        for name in task.protocols:
            references = [example.reference(name) for example in examples]
            scores[name] = score(name, answers, references)
            if lines != answers:
                first_line[name] = score(name, lines, references)
    return TaskResult(task, examples, shots, outputs, answers, scores, first_line, images, stamp)


def open_examples(
    task: TaskConfig, image_size: int, dataset: Dataset | None, workers: int = 0
) -> tuple[Examples, Examples]:
    """Examples for queries and for shots, images of ``image_size``; the same object if both use the same data.

    Raises:
        DataError: no data.
    """
    open_folder = functools.partial(StoredExamples, kind=task.kind, image_size=image_size, workers=workers)
    if task.data is not None:
        queries = open_folder(task.data)
        if task.shot_data is None or Path(task.shot_data).resolve() == Path(task.data).resolve():
            return queries, queries
        return queries, open_folder(task.shot_data)
    if dataset is None:
        raise DataError(f"task {task.name}: no data; give the dataset folder with --data")
    own = OwnExamples(dataset, task.split, task.kind)
    if task.shot_data is not None:
        return own, open_folder(task.shot_data)
    if task.shot_split == task.split or not task.shots:
        return own, own
    return own, OwnExamples(dataset, task.shot_split, task.kind)


def ask(
    task: TaskConfig,
    examples: Sequence[Example],
    shots: Sequence[Sequence[Shot]],
    offset: int,
    answerer: Answerer,
    room: int,
) -> Asked:
    """Prompts of a task; ``offset`` is the row of the shots' first image, ``room`` the maximum length of a prompt."""
    completed = [[(offset + shot.image, task.complete(shot.text, shot.shown)) for _, shot in row] for row in shots]
    prompts: list[Parts] = [(example.image, task.ask(example.text)) for example in examples]
    lengths = [answerer.length(prompt) for prompt in prompts]
    dropped = 0

    def fitting(shown: list[tuple[int, str]], length: int) -> list[int | str]:
        nonlocal dropped
        sizes = [answerer.length(shot) for shot in shown]
        first = 0
        while task.overlong == "drop_shots" and first < len(shown) and sum(sizes[first:]) + length > room:
            first += 1
        dropped += first
        return [part for shot in shown[first:] for part in shot]

    if task.shot_policy == "run":
        return Asked(prompts, fitting(completed[0], max(lengths)), dropped)
    rows = zip(completed, prompts, lengths, strict=True)
    return Asked([(*fitting(shown, length), *prompt) for shown, prompt, length in rows], (), dropped)


def _classify(task: TaskConfig, answerer: Answerer, prompts: Sequence[Parts]) -> list[str]:
    heads = answerer.model.classes
    if heads and heads != len(task.classes):
        raise DataError(f"{task.name}: the head has {heads} classes, but {len(task.classes)} names are given")
    return [task.classes[number] for number in answerer.classify(prompts)]


def _decoding(task: TaskConfig) -> str:
    if task.kind == "class":
        return "likeliest class"
    return "greedy" if task.sampling.temperature == 0 else f"sampled, seed {task.seed}"


def check_ids(examples: Sequence[Example], name: str) -> None:
    """Raises DataError if an id is there twice."""
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise DataError(f"{name}: {example.id} is there twice; convert the dataset again")
        seen.add(example.id)
