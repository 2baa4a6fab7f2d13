"""The results card of a checkpoint: its scores in the layout of the paper's tables, with their provenance.

Every evaluation writes a JSON file to a folder; the card combines those of one checkpoint.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from magma_jax.evaluation.report.paper import FIGURES
from magma_jax.evaluation.report.task_files import RESULTS, read_result
from magma_jax.evaluation.results.columns import Column, columns_of, figure, first_score
from magma_jax.evaluation.results.names import file_stem
from magma_jax.evaluation.results.provenance import stamp
from magma_jax.evaluation.tables import text_table
from magma_jax.evaluation.tasks.task import TASKS
from magma_jax.output import replace_file


def write_card(folder: str | Path, checkpoint: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Path:
    """Writes ``card-HASH.json`` and ``card-HASH.txt`` for a checkpoint's results in ``folder``.

    A card has only results with the same ``settings``; non-default settings are part of its name. If a task has results
    on different data, the newest is used.

    Returns:
        The path of ``card-HASH.txt``.
    """
    which = {"checkpoint": dict(checkpoint), "settings": dict(settings or {})}
    found = [r for r in read_results(folder) if which == {name: r.get(name) for name in which}]
    results = list({(r["task"]["name"], r["task"]["shots"]): r for r in found}.values())
    card = {
        **which,
        "rows": {
            name: [{**column._asdict(), "value": value} for column, value in row.items()]
            for name, row in rows_of(results).items()
        },
        "results": results,
    }
    text = table(results) + "\n\n" + "\n\n".join(stamp(result) for result in results) + "\n"
    path = Path(folder) / f"{file_stem('card', which['settings'], which)}.txt"
    replace_file(path.with_suffix(".json"), (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())
    replace_file(path, text.encode())
    return path


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """Results of tasks, in the order of the paper's tables, then by age.

    Raises:
        DataError: a result that cannot be read.
    """
    order = {name: number for number, name in enumerate(TASKS)}
    found = {path: read_result(path) for path in Path(folder).glob(f"*{RESULTS}")}

    def place(path: Path) -> tuple[Any, ...]:
        task = found[path]["task"]
        return order.get(task["name"], len(order)), task["name"], task["shots"], path.stat().st_mtime_ns

    return [found[path] for path in sorted(found, key=place)]


def rows_of(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[Column, float]]:
    """Row to column to figure: the model's own rows, then those of the paper that have one of its columns."""
    rows: dict[str, dict[Column, float]] = {"this model": {}, "first line": {}, "commonest": {}}
    for result in results:
        score, line = first_score(result, "scores"), first_score(result, "first_line")
        if score is None:
            continue
        for column in columns_of(result):
            rows["this model"][column] = figure(score, column)
            if line is not None:
                rows["first line"][column] = figure(line, column)
            if column.group in ("", "all"):
                rows["commonest"][column] = figure(score["commonest"], column)
    columns = rows["this model"]
    paper = {name: {c: v for c, v in row.items() if c in columns} for name, row in FIGURES.items()}
    return {name: row for name, row in (rows | paper).items() if row}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The card's table as text."""
    rows = rows_of(results)
    columns = list(rows.get("this model", {}))
    intervals = {c: _interval(result, c) for result in results for c in columns_of(result)}
    # One table for all question tasks, and one per caption task, which has several columns.
    tables: dict[str, list[Column]] = {}
    for column in columns:
        tables.setdefault("" if column.metric == "accuracy" else column.task, []).append(column)
    parts = [_table(rows, chosen, intervals) for chosen in tables.values()]
    if not parts:
        return "no scores: the true answers are secret"
    if any(column.metric != "accuracy" for column in columns):
        parts.append("CIDEr and BLEU-4 times 100, as in the paper.")
    return "\n\n".join(parts)


def _table(rows: Mapping[str, Mapping[Column, float]], columns: Sequence[Column], intervals: Mapping) -> str:
    headings = [column.heading for column in columns]
    headings = ["" if i and headings[i - 1] == heading else heading for i, heading in enumerate(headings)]
    lines = [["", *headings], ["shots", *(str(column.shots) for column in columns)]]
    shown = {name: row for name, row in rows.items() if any(column in row for column in columns)}
    cells = {
        name: [f"{row[column]:.1f}" if column in row else "-" for column in columns] for name, row in shown.items()
    }
    lines += [[name, *values] for name, values in cells.items() if name not in FIGURES]
    lines.insert(3, ["  95 % interval", *(intervals[column] for column in columns)])
    paper = [[f"  {name}", *values] for name, values in cells.items() if name in FIGURES]
    lines += [["the paper", *("" for _ in columns)], *paper] if paper else []
    return text_table(lines)


def _interval(result: Mapping[str, Any], column: Column) -> str:
    if column.group not in ("", "all"):
        return "-"
    score = first_score(result, "scores")
    assert score is not None  # it has columns
    low, high = score["intervals"][column.metric]
    scale = figure({"scores": {column.metric: 1.0}}, column)
    return f"{scale * low:.1f}-{scale * high:.1f}"
