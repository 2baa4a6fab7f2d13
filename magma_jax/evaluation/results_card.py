"""The results card of a checkpoint: its figures in the shape of the paper's tables, and how each was taken.

Every evaluation leaves a JSON file in a folder; the card puts together those that belong to one checkpoint.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from magma_jax.data.records import DataError
from magma_jax.evaluation.columns import Column, columns_of, figure, first_score
from magma_jax.evaluation.paper import FIGURES
from magma_jax.evaluation.tasks import TASKS
from magma_jax.output import replace_file


def write_card(folder: str | Path, checkpoint: Mapping[str, Any], settings: str = "") -> str:
    """Writes ``card.json`` and ``card.txt`` of the results in ``folder`` that belong to a checkpoint.

    Only results with the same ``settings`` stand in one card, and settings other than the tasks' own in its name.

    Returns:
        The text.
    """
    results = [r for r in read_results(folder) if r["checkpoint"] == checkpoint and r["settings"] == settings]
    card = {
        "checkpoint": dict(checkpoint),
        "settings": settings,
        "rows": {
            name: [{**column._asdict(), "value": value} for column, value in row.items()]
            for name, row in rows_of(results).items()
        },
        "results": results,
    }
    text = table(results) + "\n\n" + "\n\n".join(stamp(result) for result in results) + "\n"
    name = "-".join(filter(None, ["card", settings]))
    replace_file(Path(folder) / f"{name}.json", (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())
    replace_file(Path(folder) / f"{name}.txt", text.encode())
    return text


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """Results of tasks, in the order of the paper's tables.

    Raises:
        DataError: a result that cannot be read.
    """
    order = list(TASKS)
    found = []
    for path in Path(folder).glob("*-*shot*.json"):
        if path.name.endswith(".submission.json"):
            continue
        try:
            result = json.loads(path.read_text())
            found.append((order.index(result["task"]["name"]), result["task"]["shots"], path.stem, result))
        except (ValueError, KeyError) as error:
            raise DataError(f"{path}: no result of an evaluation ({error}); remove it or run the task again") from None
    return [result for *_, result in sorted(found, key=lambda entry: entry[:3])]


def rows_of(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[Column, float]]:
    """Row to column to figure: the model's own rows, then those of the paper that have one of its columns."""
    rows: dict[str, dict[Column, float]] = {"this model": {}, "first line": {}, "constant": {}}
    for result in results:
        score, line = first_score(result, "scores"), first_score(result, "first_line")
        for column in columns_of(result):
            rows["this model"][column] = figure(score, column)
            if line is not None:
                rows["first line"][column] = figure(line, column)
            if column.group in ("", "all"):
                rows["constant"][column] = figure(score["constant"], column)
    columns = rows["this model"]
    paper = {name: {c: v for c, v in row.items() if c in columns} for name, row in FIGURES.items()}
    return {name: row for name, row in (rows | paper).items() if row}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """For people."""
    rows = rows_of(results)
    columns = list(rows.get("this model", {}))
    intervals = {c: _interval(result, c) for result in results for c in columns_of(result)}
    # All questions in one table, captions in one a task: they have several columns each.
    tables: dict[str, list[Column]] = {}
    for column in columns:
        tables.setdefault("" if column.metric == "accuracy" else column.task, []).append(column)
    parts = [_table(rows, chosen, intervals) for chosen in tables.values()]
    return "\n\n".join(parts) if parts else "no scores: the true answers are secret"


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
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = (
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
    return "\n".join(line.rstrip() for line in aligned)


def _interval(result: Mapping[str, Any], column: Column) -> str:
    if column.group not in ("", "all"):
        return "-"
    low, high = first_score(result, "scores")["intervals"][column.metric]
    scale = figure({"scores": {column.metric: 1.0}}, column)
    return f"{scale * low:.1f}-{scale * high:.1f}"


def stamp(result: Mapping[str, Any]) -> str:
    """Everything that a figure depends on, in a few lines."""
    task, shots = result["task"], result["shots"]
    drawn = "none"
    if shots:
        each = "one draw for all" if task["shot_policy"] == "run" else "drawn for every query"
        drawn = f"{task['shots']} of {shots['data']}, {each}, seed {task['seed']}, {shots['dropped']} dropped"
    past = result["longest_prompt"] + task["max_new_tokens"] > result["context"]
    score = first_score(result, "scores")
    words = [
        f"{task['name']}, {task['shots']} shots",
        f"  protocol    {', '.join(task['protocols'])}",
        f"  data        {result['data']}: {result['samples']} of {result['of']}",
        f"  prompt      {task['prompt']!r}, then {task['before_answer']!r} answer {task['after_answer']!r}",
        f"  shots       {drawn}",
        f"  decoding    {result['decoding']}, at most {task['max_new_tokens']} new tokens",
        f"  truncation  {task['truncation']}",
        f"  positions   up to {result['longest_prompt']} of {result['context']}"
        + (", beyond what the model was trained on" if past else ""),
        *([f"  constant    always {score['constant']['answer']!r}"] if score else []),
        *([] if not task["blind"] else ["  pictures    black"]),
        f"  checkpoint  {', '.join(f'{key} {value}' for key, value in result['checkpoint'].items())}",
    ]
    return "\n".join(words)
