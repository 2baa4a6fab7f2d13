"""Predictions in the benchmarks' own submission formats."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from magma_jax.data.format.records import DataError
from magma_jax.evaluation.tasks.examples import Example
from magma_jax.output import replace_file

Entry = Callable[[str, str], dict[str, Any]]


def _numbered(key: str, value: str) -> Entry:
    return lambda name, answer: {key: int(name), value: answer}


# Ids are numbers in COCO-style formats and text in GQA's; VizWiz has only the image's name.
SUBMISSIONS: MappingProxyType[str, Entry] = MappingProxyType(
    {
        "vqav2": _numbered("question_id", "answer"),
        "okvqa": _numbered("question_id", "answer"),
        "gqa": lambda name, answer: {"questionId": name, "prediction": answer},
        "vizwiz": lambda name, answer: {"image": f"{name}.jpg", "answer": answer},
        "coco": _numbered("image_id", "caption"),
        "nocaps": _numbered("image_id", "caption"),
    }
)


def write_submission(path: str | Path, task: str, examples: Sequence[Example], answers: Sequence[str]) -> None:
    """Writes one JSON list with an entry per example.

    Raises:
        DataError: ids that the format does not allow.
    """
    try:
        entries = [SUBMISSIONS[task](example.id, answer) for example, answer in zip(examples, answers, strict=True)]
    except ValueError as error:
        raise DataError(f"{path}: {task} wants whole numbers as ids ({error}); is this {task}'s data?") from None
    replace_file(path, (json.dumps(entries, ensure_ascii=False) + "\n").encode())
