"""Columns of a results table: task, number of shots, metric, and for NoCaps a domain."""

from collections.abc import Mapping
from typing import Any, NamedTuple

# Factors to the paper's scale; the protocols' scores range from 0 to 1 (BLEU) and from 0 to 10 (CIDEr).
PERCENT = {"accuracy": 1, "CIDEr": 100, "BLEU-4": 100}


class Column(NamedTuple):
    """One column of a results table."""

    task: str
    shots: int
    metric: str
    group: str = ""

    @property
    def heading(self) -> str:
        """Heading of the column; the number of shots has its own line."""
        metric = {"accuracy": "", "BLEU-4": " B@4"}.get(self.metric, f" {self.metric}")
        return f"{self.task}{metric}{f' {self.group}' if self.group else ''}"


def columns_of(result: Mapping[str, Any]) -> list[Column]:
    """The columns that a stored result fills."""
    task, score = result["task"], first_score(result, "scores")
    if score is None:
        return []
    metrics = [metric for metric in PERCENT if metric in score["scores"]]
    # Domains are included if they are scored as separate sets; means over images have no BLEU.
    needed = {*metrics, *({"BLEU-1"} & score["scores"].keys())}
    domains = [name for name, values in score["groups"].get("domain", {}).items() if needed <= values.keys()]
    groups = [*domains, "all"] if domains else [""]
    return [Column(task["name"], task["shots"], metric, group) for metric in metrics for group in groups]


def figure(score: Mapping[str, Any], column: Column) -> float:
    """A stored score on the paper's scale."""
    values = score["scores"] if column.group in ("", "all") else score["groups"]["domain"][column.group]
    return PERCENT[column.metric] * values[column.metric]


def first_score(result: Mapping[str, Any], which: str) -> Mapping[str, Any] | None:
    """The score under the task's first protocol; None if there is none."""
    return result[which].get(result["task"]["protocols"][0])
