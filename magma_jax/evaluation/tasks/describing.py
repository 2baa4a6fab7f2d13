"""Runs a task on a model that describes an image without a prompt, or answers by a classifier, such as a masked one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from magma_jax.data.datasets import Dataset
from magma_jax.data.format.records import DataError
from magma_jax.data.images import ImageInput
from magma_jax.evaluation.tasks.examples import BlackImages, close, spaced
from magma_jax.evaluation.tasks.few_shot import TaskResult, check_ids, finish, open_examples
from magma_jax.evaluation.tasks.task import TaskConfig
from magma_jax.inference.answers import AnswerOptions
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.generator import ImageGenerator
from magma_jax.runtime.distributed import is_main


def describe_task(
    model: ImageGenerator,
    task: TaskConfig,
    dataset: Dataset | None = None,
    *,
    workers: int = 0,
    stamp: Mapping[str, Any] | None = None,
) -> TaskResult:
    """Describes every image of a task, or answers its question, one after another, and scores the texts.

    Arguments as for ``evaluate_task``. The prompt of the task is left out: a classifier sees the question alone.
    Default sampling parameters mean the family's own.

    Raises:
        DataError: a task that the model cannot do, with shots, or whose data is missing or does not fit; or a model
            that writes no texts.
    """
    wanted = "question" if model.classes else "caption"
    if task.kind != wanted or task.shots:
        can = "answers questions by a classifier" if model.classes else "describes images"
        raise DataError(f"task {task.name}: this model {can}, without shots; take a {wanted} task")
    if "text" not in model.makes:
        raise DataError(f"task {task.name}: this model writes no texts")
    task = dataclasses.replace(task, prompt="{}" if model.classes else "")
    queries, _ = open_examples(task, model.image_size, dataset, workers)
    examples = [queries[number] for number in spaced(len(queries), task.limit)]
    check_ids(examples, queries.name)
    shown = BlackImages(len(queries.images), model.image_size) if task.blind else queries.images
    options = AnswerOptions(max_new_tokens=task.max_new_tokens, sampling=task.sampling, seed=task.seed)
    prompts = (
        [ImageInput(Image.fromarray(shown[np.array([example.image])][0])), *([example.text] if model.classes else [])]
        for example in tqdm(examples, desc=wanted, unit="image", disable=None if is_main() else True)
    )
    outputs = [answers[0].text for answers in model.answers(prompts, options, count=len(examples))]
    close(queries.images)
    own = "the family's own sampler" if task.sampling == SamplingConfig() else "sampled"
    decoding = f"likeliest of {model.classes} answers" if model.classes else f"{own}, seed {task.seed}"
    found = {
        "samples": len(examples),
        "of": len(queries),
        "data": queries.name,
        "shots": None,
        "longest_prompt": None,
        "context": None,
        "decoding": decoding,
        **(stamp or {}),
    }
    return finish(task, model.tokenizer, examples, [[] for _ in examples], outputs, queries.images, found)
