"""The files that a task leaves: its result, every prediction, a page of pictures."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magma_jax.data.readers.common import read_json_lines
from magma_jax.data.records import DataError
from magma_jax.evaluation.examples import Example
from magma_jax.evaluation.few_shot import TaskResult
from magma_jax.evaluation.gallery import write_gallery
from magma_jax.evaluation.submissions import SUBMISSIONS, write_submission
from magma_jax.output import replace_file


def write_result(folder: str | Path, result: TaskResult, attribution: str = "") -> Path:
    """Writes ``NAME.json``, ``NAME.predictions.jsonl`` and ``NAME.html``; returns the path of the first.

    Where the benchmark has a format of its own for predictions, ``NAME.submission.json`` follows it. ``attribution``
    stands at the end of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = result.task.file_name
    path = folder / f"{name}.json"
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in _predictions(result))
    replace_file(predictions_file(path), lines.encode())
    if result.task.name in SUBMISSIONS:
        write_submission(folder / f"{name}.submission.json", result.task.name, result.examples, result.answers)
    write_gallery(folder / f"{name}.html", result, attribution=attribution)
    # Last: where it stands the others do, too.
    replace_file(path, (json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n").encode())
    return path


def predictions_file(result: Path) -> Path:
    """The file of predictions beside a result."""
    return result.with_suffix(".predictions.jsonl")


def read_predictions(result: Path) -> tuple[list[Example], list[str]]:
    """Examples and answers that a task left.

    Raises:
        DataError: the file is missing or of another kind.
    """
    examples, answers = [], []
    path = predictions_file(result)
    for number, line in read_json_lines(path):
        try:
            fields = {field.name: line[field.name] for field in dataclasses.fields(Example)}
            fields |= {"answers": tuple(line["answers"]), "raw_answers": tuple(line["raw_answers"])}
            examples.append(Example(**fields))
            answers.append(line["answer"])
        except KeyError as error:
            raise DataError(f"{path}: line {number} has no {error}; was it written by eval.py --task?") from None
    return examples, answers


def _predictions(result: TaskResult) -> list[dict[str, Any]]:
    shared = result.task.shot_policy == "run"
    scores = result.per_sample()
    lines = []
    for i, (example, output, answer) in enumerate(zip(result.examples, result.outputs, result.answers, strict=True)):
        values = {} if scores is None else {name: float(v[i]) for name, v in scores.per_sample.items()}
        shots = [{"row": shot.row, "id": shot.example.id} for shot in result.shots[0 if shared else i]]
        lines.append({**_example(example), "shots": shots, "output": output, "answer": answer, "scores": values})
    return lines


def _example(example: Example) -> Mapping[str, Any]:
    return dataclasses.asdict(example)
