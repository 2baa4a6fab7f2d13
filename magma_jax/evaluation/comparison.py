"""Two results on the same examples: is one better, or was it chance?"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magma_jax.data.records import DataError
from magma_jax.evaluation.bootstrap import DRAWS, Comparison, compare
from magma_jax.evaluation.protocols import PROTOCOLS
from magma_jax.evaluation.score import judge
from magma_jax.evaluation.task_files import predictions_file, read_predictions


def compare_results(
    first: str | Path, second: str | Path, *, draws: int = DRAWS
) -> dict[str, dict[str, dict[str, Comparison]]]:
    """Paired bootstrap of two results, or of all results that two folders have under the same name.

    Returns:
        Result to protocol to metric to comparison, the second less the first.

    Raises:
        DataError: nothing to compare, other examples, or other true answers.
    """
    return {name: _compare(*pair, draws) for name, pair in _pairs(Path(first), Path(second)).items()}


def table(first: str | Path, second: str | Path, found: dict[str, dict[str, dict[str, Comparison]]]) -> str:
    """For a terminal."""
    lines = [f"A {first}", f"B {second}", "", "B less A, 95 % paired bootstrap interval, two-sided p", ""]
    rows = [
        (f"{name}  {protocol}  {metric}", comparison)
        for name, protocols in found.items()
        for protocol, metrics in protocols.items()
        for metric, comparison in metrics.items()
    ]
    width = max(len(label) for label, _ in rows)
    for label, (difference, (low, high), p) in rows:
        lines.append(f"{label:<{width}}  {difference:>+9.4g}   {low:>+9.4g} {high:>+9.4g}   p {p:.3g}")
    return "\n".join(lines)


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
        return {first.stem if first.stem == second.stem else f"{first.stem} / {second.stem}": (first, second)}
    results = [{path.stem: path for path in _results(folder)} for folder in (first, second)]
    common = sorted(results[0].keys() & results[1].keys())
    if not common:
        raise DataError(
            f"{first} and {second} have no result of the same name; give two result files of eval.py --task"
        )
    return {name: (results[0][name], results[1][name]) for name in common}


def _results(folder: Path) -> list[Path]:
    # A run folder keeps its results one folder deeper.
    inner = folder / "evaluation"
    return [
        path for path in (inner if inner.is_dir() else folder).glob("*shot*.json") if predictions_file(path).is_file()
    ]


def _compare(first: Path, second: Path, draws: int) -> dict[str, dict[str, Comparison]]:
    examples, said = read_predictions(first)
    others, said_by_other = read_predictions(second)
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
    for protocol in _protocols(first, second):
        references = [example.reference(protocol) for example in examples]
        one = judge(PROTOCOLS[protocol], said, references)
        two = judge(PROTOCOLS[protocol], [by_id[example.id][1] for example in examples], references)
        found[protocol] = compare(one.resampled, two.resampled, len(examples), draws=draws)
    return found


def _protocols(first: Path, second: Path) -> Sequence[str]:
    try:
        one, two = (json.loads(path.read_text())["task"]["protocols"] for path in (first, second))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{first}, {second}: no results of eval.py --task ({error})") from None
    common = [name for name in one if name in two]
    if not common:
        raise DataError(f"{first} and {second} have no protocol in common: {', '.join(one)} and {', '.join(two)}")
    return common
