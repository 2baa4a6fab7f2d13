"""Sweeps: one task under many settings, to measure how much a score depends on unpublished details."""

import dataclasses
import itertools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from magma_jax.config import ConfigError, apply_overrides, from_dict, to_dict
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.evaluation.results.columns import first_score
from magma_jax.evaluation.results.names import file_stem
from magma_jax.evaluation.tables import text_table
from magma_jax.evaluation.tasks.few_shot import TaskResult, finish
from magma_jax.evaluation.tasks.task import TaskConfig
from magma_jax.output import replace_file

# Settings that affect only scoring, so that outputs can be reused.
_JUDGING = ("truncation", "protocols")


def combinations(task: TaskConfig, choices: Mapping[str, Sequence[str]]) -> list[TaskConfig]:
    """The task with every combination of settings, the last setting varying fastest; values as for ``--set``.

    Raises:
        ConfigError: an unknown setting, or an invalid value.
    """
    for name, texts in choices.items():
        if not texts:
            raise ConfigError(f"--sweep {name}: give its values too, as in --sweep shots 0 1")
        if name == "name":
            raise ConfigError(f"--sweep name: the task's name stays {task.name}")
    config = ConfigDict(to_dict(task))
    overrides = (
        [f"{name}={text}" for name, text in zip(choices, texts, strict=True)]
        for texts in itertools.product(*choices.values())
    )
    return [from_dict(TaskConfig, apply_overrides(config, changes), f"--sweep {task.name}") for changes in overrides]


def run_sweep(
    tasks: Sequence[TaskConfig], evaluate: Callable[[TaskConfig], TaskResult], tokenizer: Tokenizer
) -> list[TaskResult]:
    """Results in the order of ``tasks``; tasks that differ only in scoring share one run of the model."""
    asked: dict[TaskConfig, TaskResult] = {}
    results = []
    for task in tasks:
        key = dataclasses.replace(task, **{name: getattr(tasks[0], name) for name in _JUDGING})
        if key not in asked:
            asked[key] = evaluate(task)
        found = asked[key]
        kept = (found.examples, found.shots, found.outputs, found.images, found.stamp)
        results.append(found if found.task == task else finish(task, tokenizer, *kept))
    return results


def sweep_table(results: Sequence[TaskResult], swept: Sequence[str]) -> str:
    """Text table: one row per combination, with the score under the task's first protocol."""
    rows = [[*swept, "metric", "score", "95 % interval", "first line", "commonest"]]
    for result in results:
        values = result.to_dict()
        score, line = first_score(values, "scores"), first_score(values, "first_line")
        settings = [_shown(operator.attrgetter(name)(result.task)) for name in swept]
        if score is None:
            continue
        for metric, value in score["scores"].items():
            low, high = score["intervals"][metric]
            first = "same" if line is None else f"{line['scores'][metric]:.4g}"
            commonest = score["commonest"]["scores"][metric]
            rows.append([*settings, metric, f"{value:.4g}", f"{low:.4g} to {high:.4g}", first, f"{commonest:.4g}"])
    return text_table(rows, left=len(swept) + 1)


def write_sweep(folder: str | Path, results: Sequence[TaskResult], swept: Sequence[str]) -> Path:
    """Writes ``sweep-TASK-KEYS-HASH.txt`` and ``.json``; returns the path of the first."""
    everything = [[to_dict(result.task), result.stamp.get("checkpoint")] for result in results]
    path = Path(folder) / f"{file_stem('-'.join(['sweep', results[0].task.name, *swept]), {}, everything)}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps([result.to_dict() for result in results], indent=2, ensure_ascii=False) + "\n"
    replace_file(path.with_suffix(".json"), content.encode())
    replace_file(path, (sweep_table(results, swept) + "\n").encode())
    return path


def _shown(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return json.dumps(dataclasses.asdict(value))
    return value if isinstance(value, str) and value.isidentifier() else repr(value)
