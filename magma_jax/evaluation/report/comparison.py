"""Significance test of two results on the same examples."""

from collections import Counter
from pathlib import Path
from typing import Any

from magma_jax.data.format.records import DataError
from magma_jax.evaluation.metrics.bootstrap import DRAWS, Comparison, compare, rarity_note
from magma_jax.evaluation.report.task_files import RESULTS, read_answers, read_result
from magma_jax.evaluation.results.provenance import title
from magma_jax.evaluation.scoring.protocols import PROTOCOLS
from magma_jax.evaluation.scoring.score import judge
from magma_jax.evaluation.tables import text_table


def compare_results(
    first: str | Path, second: str | Path, *, draws: int = DRAWS
) -> dict[str, dict[str, dict[str, Comparison]]]:
    """Paired bootstrap of two results, or of all results in two folders with the same task, shots and settings.

    Returns:
        Result to protocol to metric to comparison, the second minus the first.

    Raises:
        DataError: nothing to compare, different examples, or different true answers.
    """
    return {name: _compare(*pair, draws) for name, pair in _pairs(Path(first), Path(second)).items()}


def table(first: str | Path, second: str | Path, found: dict[str, dict[str, dict[str, Comparison]]]) -> str:
    """The comparison as a table for a terminal."""
    rows = [["", "protocol", "metric", "B less A", "95 % interval", "p"]]
    rows += [
        [
            name,
            protocol,
            metric,
            f"{c.difference:+.4g}",
            f"{c.interval.low:+.4g} to {c.interval.high:+.4g}",
            f"{c.p:.3g}",
        ]
        for name, protocols in found.items()
        for protocol, metrics in protocols.items()
        for metric, c in metrics.items()
    ]
    notes = ["Paired bootstrap; p is two-sided.", *rarity_note(row[2] for row in rows)]
    return "\n".join([f"A {first}", f"B {second}", "", text_table(rows, left=3), "", *notes])


def to_json(found: dict[str, dict[str, dict[str, Comparison]]]) -> dict[str, Any]:
    """Plain JSON values."""
    return {
        name: {
            protocol: {metric: {**c._asdict(), "interval": list(c.interval)} for metric, c in metrics.items()}
            for protocol, metrics in protocols.items()
        }
        for name, protocols in found.items()
    }


def _pairs(first: Path, second: Path) -> dict[str, tuple[Path, Path]]:
    if first.is_file() and second.is_file():
        titles = list(dict.fromkeys(map(_title, (first, second))))
        return {" / ".join(titles): (first, second)}
    results = [_results(folder) for folder in (first, second)]
    common = sorted(results[0].keys() & results[1].keys())
    if not common:
        raise DataError(
            f"{first} and {second} have no results of the same task, shots and settings; give two files *{RESULTS}"
        )
    return {title: (results[0][title], results[1][title]) for title in common}


def _results(folder: Path) -> dict[str, Path]:
    # A run folder has its results in a subfolder.
    inner = folder / "evaluation"
    paths = sorted((inner if inner.is_dir() else folder).glob(f"*{RESULTS}"))
    titles = list(map(_title, paths))
    twice = [title for title, count in Counter(titles).items() if count > 1]
    if twice:
        raise DataError(f"{folder}: holds several results of {twice[0]}; give two files *{RESULTS}")
    return dict(zip(titles, paths, strict=True))


def _title(path: Path) -> str:
    result = read_result(path)
    settings = "".join(f", {name}={value}" for name, value in (result.get("settings") or {}).items())
    return title(result["task"]) + settings


def _compare(first: Path, second: Path, draws: int) -> dict[str, dict[str, Comparison]]:
    examples, said = read_answers(first)
    others, said_by_other = read_answers(second)
    by_id = {example.id: (example, answer) for example, answer in zip(others, said_by_other, strict=True)}
    missing = [example.id for example in examples if example.id not in by_id]
    if missing or len(by_id) != len(examples):
        example = missing[0] if missing else next(iter(by_id.keys() - {example.id for example in examples}))
        raise DataError(f"{first} and {second} are not about the same examples; only one has {example}, for instance")
    different = next((example.id for example in examples if by_id[example.id][0].answers != example.answers), None)
    if different is not None:
        raise DataError(f"{first} and {second} have other true answers to {different}; evaluate both on the same data")
    if not all(example.answers for example in examples):
        raise DataError(f"{first}: the true answers are secret, so nothing can be compared")
    found = {}
    protocols = [read_result(path)["task"]["protocols"] for path in (first, second)]
    common = [name for name in protocols[0] if name in protocols[1]]
    if not common:
        raise DataError(f"{first} and {second} have no protocol in common: {protocols[0]} and {protocols[1]}")
    for protocol in common:
        references = [example.reference(protocol) for example in examples]
        one = judge(PROTOCOLS[protocol], said, references)
        two = judge(PROTOCOLS[protocol], [by_id[example.id][1] for example in examples], references)
        found[protocol] = compare(one.resampled, two.resampled, len(examples), draws=draws)
    return found
