"""Columns of a results table: a task, its number of shots, a metric, and for NoCaps a domain."""

from collections.abc import Mapping
from typing import Any, NamedTuple

# As the paper prints them; scores of the protocols run from 0 to 1 (BLEU) and from 0 to 10 (CIDEr).
PERCENT = {"accuracy": 1, "CIDEr": 100, "BLEU-4": 100}


class Column(NamedTuple):
    """What a figure is."""

    task: str
    shots: int
    metric: str
    group: str = ""

    @property
    def heading(self) -> str:
        """For a table; the shots stand in a line of their own."""
        metric = {"accuracy": "", "BLEU-4": " B@4"}.get(self.metric, f" {self.metric}")
        return f"{self.task}{metric}{f' {self.group}' if self.group else ''}"


def columns_of(result: Mapping[str, Any]) -> list[Column]:
    """The columns that a stored result fills."""
    task, score = result["task"], first_score(result, "scores")
    if score is None:
        return []
    metrics = [metric for metric in PERCENT if metric in score["scores"]]
    # Domains count where they are scored as sets of their own.
    domains = [name for name, values in score["groups"].get("domain", {}).items() if set(metrics) <= values.keys()]
    groups = [*domains, "all"] if domains else [""]
    return [Column(task["name"], task["shots"], metric, group) for metric in metrics for group in groups]


def figure(score: Mapping[str, Any], column: Column) -> float:
    """A stored score as the paper prints it."""
    values = score["scores"] if column.group in ("", "all") else score["groups"]["domain"][column.group]
    return PERCENT[column.metric] * values[column.metric]


def first_score(result: Mapping[str, Any], which: str) -> Mapping[str, Any] | None:
    """The score under the protocol that the task is known by; None where there is none."""
    return result[which].get(result["task"]["protocols"][0])
