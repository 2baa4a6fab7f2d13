"""The output files of a task: its result, all predictions, a gallery page."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from magma_jax.config import to_dict
from magma_jax.data.format.records import DataError
from magma_jax.data.readers.common import read_json, read_json_lines
from magma_jax.evaluation.report.gallery import write_gallery
from magma_jax.evaluation.report.submissions import SUBMISSIONS, write_submission
from magma_jax.evaluation.results.names import file_stem
from magma_jax.evaluation.tasks.examples import Example
from magma_jax.evaluation.tasks.few_shot import TaskResult
from magma_jax.output import replace_file
from magma_jax.runtime.distributed import log_main

# Suffixes, different from a run folder's own results.json, predictions.jsonl and report.html.
RESULTS, PREDICTIONS, REPORT, SUBMISSION = ".results.json", ".predictions.jsonl", ".report.html", ".submission.json"


def write_result(folder: str | Path, result: TaskResult, attribution: str = "") -> Path:
    """Writes ``NAME.results.json``, ``NAME.predictions.jsonl`` and ``NAME.report.html``; returns the first.

    ``NAME`` is task, shots and settings, and a hash of these, the data and the checkpoint, so only a repetition of the
    same evaluation replaces files. If the benchmark has its own prediction format and the ids are the benchmark's,
    ``NAME.submission.json`` is written too. ``attribution`` is the footer of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    task = result.task
    name = file_stem(f"{task.name}-{task.shots}shot", task.settings, [to_dict(task), result.stamp.get("checkpoint")])
    path = folder / f"{name}{RESULTS}"
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in _predictions(result))
    replace_file(predictions_file(path), lines.encode())
    if task.name in SUBMISSIONS:
        try:
            write_submission(folder / f"{name}{SUBMISSION}", task.name, result.examples, result.answers)
        except DataError as error:
            log_main(f"no submission: {error}")
    write_gallery(folder / f"{name}{REPORT}", result, attribution=attribution)
    # Written last, so that its presence implies the others.
    replace_file(path, (json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n").encode())
    return path


def read_result(path: Path) -> dict[str, Any]:
    """A stored result.

    Raises:
        DataError: the file is damaged or of another kind.
    """
    result = read_json(path)
    task = result.get("task") if isinstance(result, dict) else None
    if not isinstance(task, dict) or not {"name", "shots", "protocols"} <= task.keys():
        raise DataError(f"{path}: no result of eval.py --task; give one, or remove it")
    if any("commonest" not in score for score in result.get("scores", {}).values()):
        raise DataError(f"{path}: was written by another version; evaluate again, or remove it")
    return result


def predictions_file(result: Path) -> Path:
    """The predictions file that belongs to a result."""
    return result.with_name(result.name.removesuffix(RESULTS) + PREDICTIONS)


def read_answers(result: Path) -> tuple[list[Example], list[str]]:
    """Examples and answers from a task's files.

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
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: line {number} was not written by eval.py --task ({error!r})") from None
    return examples, answers


def _predictions(result: TaskResult) -> list[dict[str, Any]]:
    shared = result.task.shot_policy == "run"
    scores = result.per_sample()
    lines = []
    for i, (example, output, answer) in enumerate(zip(result.examples, result.outputs, result.answers, strict=True)):
        values = {} if scores is None else {name: float(v[i]) for name, v in scores.per_sample.items()}
        shots = [{"row": shot.row, "id": shot.example.id} for shot in result.shots[0 if shared else i]]
        lines.append(
            {**dataclasses.asdict(example), "shots": shots, "output": output, "answer": answer, "scores": values}
        )
    return lines
