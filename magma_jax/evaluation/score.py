"""Scores of prediction files that any system made, in the official formats and under a protocol's name."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magma_jax.data.readers.common import read_json
from magma_jax.data.records import DataError
from magma_jax.evaluation import gqa
from magma_jax.evaluation.bootstrap import DRAWS, Interval, intervals
from magma_jax.evaluation.metrics import Scores
from magma_jax.evaluation.protocols import (
    PROTOCOLS,
    Protocol,
    Reference,
    constant_prediction,
    join,
    read_predictions,
)


@dataclasses.dataclass(frozen=True)
class Score:
    """The scores of one set of predictions.

    Attributes:
        protocol: its name.
        samples: how many were scored.
        scores: score by name.
        intervals: 95 % bootstrap interval by name.
        groups: kind of group to group to its number of samples and scores.
        constant: what always giving the same answer scores, and that answer.
        measures: of GQA, see ``gqa.gqa_measures``.
    """

    protocol: str
    samples: int
    scores: dict[str, float]
    intervals: dict[str, Interval]
    groups: dict[str, dict[str, dict[str, float | int]]]
    constant: dict[str, Any]
    measures: dict[str, float] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """For a terminal: scores with intervals and the constant baseline, then every group."""
        lines = [f"{self.protocol}, {self.samples} samples, 95 % bootstrap intervals", ""]
        lines += [f"{'':<14}{'score':>9}   {'interval':^19}   {'constant':>9}"]
        for name, value in self.scores.items():
            low, high = self.intervals[name]
            baseline = self.constant["scores"][name]
            lines.append(f"{name:<14}{value:>9.4g}   {low:>9.4g} {high:>9.4g}   {baseline:>9.4g}")
        lines += ["", f"constant: always {self.constant['answer']!r}"]
        lines += [f"{name}: {value:.4g}" for name, value in self.measures.items()]
        for kind, groups in self.groups.items():
            lines += ["", f"by {kind}"]
            width = max(map(len, groups), default=0)
            for group, values in groups.items():
                shown = "   ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "samples")
                lines.append(f"  {group:<{width}}  {int(values['samples']):>7}   {shown}")
        return "\n".join(lines)


def score_files(
    protocol: str,
    references: str | Path,
    predictions: str | Path,
    *,
    choices: str | Path | None = None,
    draws: int = DRAWS,
) -> Score:
    """Scores a file of predictions against the official file of annotations.

    Args:
        choices: of GQA, for its validity and plausibility.

    Raises:
        DataError: a file is damaged or in another format, or the ids differ.
    """
    chosen, references, predictions = PROTOCOLS[protocol], Path(references), Path(predictions)
    if choices is not None and not protocol.startswith("gqa"):
        raise DataError(f"--choices is for GQA, not for {protocol}")
    said = read_predictions(predictions, chosen)
    truths = chosen.references(references)
    measures: dict[str, float] = {}
    if protocol.startswith("gqa"):
        questions = gqa.read_questions(references)
        # Only balanced questions are scored; consistency looks at predictions for the others, too.
        kept = {key: text for key, text in said.items() if key in truths or key not in questions}
        texts, judged = join(truths, kept, str(predictions))
        measures = gqa.gqa_measures(questions, said, None if choices is None else read_json(Path(choices)))
    else:
        texts, judged = join(truths, said, str(predictions))
    return dataclasses.replace(score(protocol, texts, judged, draws=draws), measures=measures)


def score(protocol: str, predictions: Sequence[str], references: Sequence[Reference], *, draws: int = DRAWS) -> Score:
    """Scores predictions against references in the same order; needs at least one."""
    chosen = PROTOCOLS[protocol]
    scores = judge(chosen, predictions, references)
    answer = constant_prediction(references)
    constant = judge(chosen, [answer] * len(references), references)
    return Score(
        protocol,
        len(references),
        scores.total,
        intervals(scores.resampled, len(references), draws=draws),
        _groups(chosen, predictions, references, scores),
        {"answer": answer, "scores": constant.total},
    )


def judge(protocol: Protocol, predictions: Sequence[str], references: Sequence[Reference]) -> Scores:
    """The scores alone."""
    return protocol.judge(
        [protocol.transform(text) for text in predictions], [list(reference.answers) for reference in references]
    )


def _groups(
    protocol: Protocol, predictions: Sequence[str], references: Sequence[Reference], scores: Scores
) -> dict[str, dict[str, dict[str, float | int]]]:
    members: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, reference in enumerate(references):
        for kind, group in reference.groups.items():
            members[kind][group].append(row)
    found: dict[str, dict[str, dict[str, float | int]]] = {}
    for kind, groups in members.items():
        found[kind] = {}
        for group, rows in sorted(groups.items()):
            if protocol.per_group:
                values = judge(protocol, [predictions[row] for row in rows], [references[row] for row in rows]).total
            else:
                values = {name: float(per_sample[rows].mean()) for name, per_sample in scores.per_sample.items()}
            found[kind][group] = {"samples": len(rows), **values}
    return found
