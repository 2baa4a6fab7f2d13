"""Significance test of two or more results on the same examples."""

import dataclasses
import shlex
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from magma_jax import commands
from magma_jax.data.format.records import DataError
from magma_jax.evaluation.metrics.bootstrap import DRAWS, Comparison, compare, notes_on
from magma_jax.evaluation.report.task_files import RESULTS, read_answers, read_result
from magma_jax.evaluation.results.provenance import title
from magma_jax.evaluation.scoring.protocols import PROTOCOLS
from magma_jax.evaluation.scoring.score import judge
from magma_jax.evaluation.tables import text_table
from magma_jax.evaluation.tasks.examples import Example
from magma_jax.storage.model_folder import MODEL_FILE


class Scored(NamedTuple):
    """A score of one system, and its comparison with that of the first system, None for the first."""

    score: float
    less_first: Comparison | None


@dataclasses.dataclass(frozen=True)
class Compared:
    """Systems scored on the same examples.

    Attributes:
        systems: path of every system's results.
        scores: title of a result to protocol to metric to one score per system.
        answers: title to its examples, each with one answer and one score per system under the first protocol.
        missing: commands that make the results which only some of the systems have.
    """

    systems: tuple[str, ...]
    scores: Mapping[str, Mapping[str, Mapping[str, Sequence[Scored]]]]
    answers: Mapping[str, Sequence[tuple[Example, Sequence[str], Sequence[float]]]]
    missing: tuple[str, ...]

    @property
    def letters(self) -> str:
        """Short names of the systems: A, B, ..."""
        return string.ascii_uppercase[: len(self.systems)]

    def rows(self) -> list[list[str]]:
        """Cells of the table, a heading first."""
        others = self.letters[1:]
        rows = [["", "protocol", "metric", *self.letters]]
        rows[0] += [cell for name in others for cell in (f"{name} less A", "95 % interval", "p")]
        for name, protocols in self.scores.items():
            for protocol, metrics in protocols.items():
                for metric, scored in metrics.items():
                    row = [name, protocol, metric, *(f"{one.score:.4g}" for one in scored)]
                    rows.append(row + [cell for one in scored if one.less_first for cell in _cells(one.less_first)])
        return rows

    def notes(self) -> list[str]:
        """What the table does not say by itself."""
        tests = (len(self.rows()) - 1) * (len(self.systems) - 1)
        notes = ["Paired bootstrap; p is two-sided.", *notes_on(row[2] for row in self.rows()[1:])]
        if len(self.systems) > 2:
            notes.append(f"Of {tests} tests about {max(1, round(tests / 20))} fall below p = 0.05 by chance.")
        if self.missing:
            notes += ["Results that only some have are left out; these commands make them:"]
            notes += [f"  {command}" for command in self.missing]
        return notes

    def table(self) -> str:
        """The comparison as a table for a terminal."""
        names = [f"{letter} {system}" for letter, system in zip(self.letters, self.systems, strict=True)]
        return "\n".join([*names, "", text_table(self.rows(), left=3), "", *self.notes()])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""

        def one(scored: Scored) -> dict[str, Any]:
            less = scored.less_first
            return {"score": scored.score, "less_first": less and {**less._asdict(), "interval": list(less.interval)}}

        scores = {
            name: {
                protocol: {metric: list(map(one, scored)) for metric, scored in metrics.items()}
                for protocol, metrics in protocols.items()
            }
            for name, protocols in self.scores.items()
        }
        return {"systems": list(self.systems), "scores": scores, "missing": list(self.missing)}


def compare_results(systems: Sequence[str | Path], *, draws: int = DRAWS) -> Compared:
    """Paired bootstrap of each system against the first.

    Args:
        systems: result files, or run folders and folders of results, of which those with the same task, shots and
            settings are compared.
        draws: bootstrap sets.

    Raises:
        DataError: fewer than two systems, nothing to compare, different examples, or different true answers.
    """
    if not 2 <= len(systems) <= len(string.ascii_uppercase):
        raise DataError(f"--compare takes 2 to {len(string.ascii_uppercase)} results, got {len(systems)}")
    paths = list(map(Path, systems))
    if all(path.is_file() for path in paths):
        found = {" / ".join(dict.fromkeys(map(_title, paths))): paths}
        missing = []
    else:
        found, missing = _common(paths)
    scores, answers = {}, {}
    for name, files in found.items():
        scores[name], answers[name] = _compare(files, draws)
    return Compared(tuple(map(str, paths)), scores, answers, tuple(missing))


def _cells(less: Comparison) -> list[str]:
    low, high = less.interval
    return [f"{less.difference:+.4g}", f"{low:+.4g} to {high:+.4g}", f"{less.p:.3g}"]


def _common(folders: Sequence[Path]) -> tuple[dict[str, list[Path]], list[str]]:
    """Results that all folders have, by title, and commands for those that some lack.

    Raises:
        DataError: there is none.
    """
    results = [_results(folder) for folder in folders]
    titles = sorted(set().union(*results))
    missing = [
        _command(folder, next(other[name] for other in results if name in other))
        for name in titles
        for folder, found in zip(folders, results, strict=True)
        if name not in found
    ]
    if not titles:
        missing = [f"{_eval(folder)} --task own_questions own_captions" for folder in folders]
    common = {name: [found[name] for found in results] for name in titles if all(name in found for found in results)}
    if not common:
        names, needed = " and ".join(map(str, folders)), "; ".join(dict.fromkeys(missing))
        raise DataError(f"{names} have no results of the same task, shots and settings: {needed}")
    return common, missing


def _eval(folder: Path) -> str:
    is_run = (folder / MODEL_FILE).is_file()
    option = "--workdir" if is_run else "--checkpoint MODEL --output"
    return f"{commands.script('eval')} {option} {shlex.quote(str(folder))}"


def _command(folder: Path, like: Path) -> str:
    """The command that gives a folder the result that another has."""
    result = read_result(like)
    task = result["task"]
    words = [_eval(folder), "--task", task["name"], "--shots", str(task["shots"])]
    for option, field in (("--data", "data"), ("--shot-data", "shot_data")):
        words += [option, shlex.quote(str(task[field]))] if task.get(field) is not None else []
    if settings := result.get("settings"):
        words += ["--set", *(shlex.quote(f"{name}={value}") for name, value in settings.items())]
    return " ".join(words)


def _results(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give run folders, folders of results, or files *{RESULTS} alone")
    # A run folder has its results in a subfolder.
    inner = folder / "evaluation"
    paths = sorted((inner if inner.is_dir() else folder).glob(f"*{RESULTS}"))
    titles = list(map(_title, paths))
    twice = [name for name, count in Counter(titles).items() if count > 1]
    if twice:
        raise DataError(f"{folder}: holds several results of {twice[0]}; give files *{RESULTS}")
    return dict(zip(titles, paths, strict=True))


def _title(path: Path) -> str:
    result = read_result(path)
    settings = "".join(f", {name}={value}" for name, value in (result.get("settings") or {}).items())
    return title(result["task"]) + settings


def _compare(files: Sequence[Path], draws: int) -> tuple[dict[str, dict[str, list[Scored]]], list[tuple]]:
    examples, first_answers = read_answers(files[0])
    answers = [first_answers, *(_same_examples(files[0], examples, other) for other in files[1:])]
    if not all(example.answers for example in examples):
        raise DataError(f"{files[0]}: the true answers are secret, so nothing can be compared")
    protocols = [read_result(path)["task"]["protocols"] for path in files]
    common = [name for name in protocols[0] if all(name in others for others in protocols)]
    if not common:
        raise DataError(f"{' and '.join(map(str, files))} have no protocol in common")
    found: dict[str, dict[str, list[Scored]]] = {}
    shown: list[Sequence[float]] = []
    for protocol in common:
        references = [example.reference(protocol) for example in examples]
        scores = [judge(PROTOCOLS[protocol], said, references) for said in answers]
        tests = [compare(scores[0].resampled, one.resampled, len(examples), draws=draws) for one in scores[1:]]
        found[protocol] = {
            metric: [Scored(one.total[metric], tests[i - 1][metric] if i else None) for i, one in enumerate(scores)]
            for metric in scores[0].total
        }
        shown = shown or [next(iter(one.per_sample.values())).tolist() for one in scores]
    rows = zip(examples, zip(*answers, strict=True), zip(*shown, strict=True), strict=True)
    return found, list(rows)


def _same_examples(first: Path, examples: Sequence[Example], second: Path) -> list[str]:
    """Answers of another result, in the order of the first's examples."""
    others, said = read_answers(second)
    by_id = {example.id: (example, answer) for example, answer in zip(others, said, strict=True)}
    missing = [example.id for example in examples if example.id not in by_id]
    if missing or len(by_id) != len(examples):
        example = missing[0] if missing else next(iter(by_id.keys() - {example.id for example in examples}))
        raise DataError(f"{first} and {second} are not about the same examples; only one has {example}, for instance")
    different = next((example.id for example in examples if by_id[example.id][0].answers != example.answers), None)
    if different is not None:
        raise DataError(f"{first} and {second} have other true answers to {different}; evaluate both on the same data")
    return [by_id[example.id][1] for example in examples]
