"""Scoring of any system's prediction files, in the official formats and by protocol name."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magma_jax.data.format.records import DataError
from magma_jax.evaluation.metrics import gqa
from magma_jax.evaluation.metrics.bootstrap import DRAWS, Interval, intervals, notes_on
from magma_jax.evaluation.metrics.by_protocol import Scores
from magma_jax.evaluation.scoring.protocols import (
    PROTOCOLS,
    Protocol,
    Reference,
    commonest_answer,
    join,
    read_predictions,
)
from magma_jax.evaluation.tables import text_table


@dataclasses.dataclass(frozen=True)
class Score:
    """The scores of one set of predictions.

    Attributes:
        protocol: name of the protocol.
        samples: number of scored samples.
        scores: score by name.
        intervals: 95 % bootstrap interval by name.
        groups: kind of group to group to its number of samples and scores.
        commonest: the most frequent true answer, and its scores as a constant prediction.
        measures: GQA's measures, see ``gqa.gqa_measures``.
        left_out: number of references that are not scored: no label, or (GQA) not balanced.
    """

    protocol: str
    samples: int
    scores: dict[str, float]
    intervals: dict[str, Interval]
    groups: dict[str, dict[str, dict[str, float | int]]]
    commonest: dict[str, Any]
    measures: dict[str, float] = dataclasses.field(default_factory=dict)
    left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """Text table: scores with intervals and the baseline of the commonest answer, then every group."""
        without = f", {self.left_out} left out (no label, or not balanced)" if self.left_out else ""
        rows = [["", "score", "95 % interval", "commonest"]]
        for name, value in self.scores.items():
            low, high = self.intervals[name]
            rows.append([name, f"{value:.4g}", f"{low:.4g} to {high:.4g}", f"{self.commonest['scores'][name]:.4g}"])
        lines = [f"{self.protocol}, {self.samples} samples{without}", "", text_table(rows), ""]
        lines += [f"commonest: always {self.commonest['answer']!r}, the most frequent true answer"]
        lines += notes_on(self.scores)
        lines += [f"{name}: {value:.4g}" for name, value in self.measures.items()]
        for kind, groups in self.groups.items():
            # A group of short captions has no BLEU-4.
            names = list(dict.fromkeys(name for values in groups.values() for name in values))
            rows = [[f"by {kind}", *names]]
            for group, values in groups.items():
                cells = (f"{values[name]:.4g}" if name in values else "-" for name in names[1:])
                rows.append([group, str(values["samples"]), *cells])
            lines += ["", text_table(rows)]
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
        protocol: name of the protocol.
        references: the official annotation file; for GQA also a folder of chunks.
        predictions: the prediction file.
        choices: GQA's file of choices, for validity and plausibility.
        draws: bootstrap sets.

    Raises:
        DataError: a file is damaged or in another format, or the ids differ.
    """
    chosen, references, predictions = PROTOCOLS[protocol], Path(references), Path(predictions)
    is_gqa = protocol.startswith("gqa")
    if choices is not None and not is_gqa:
        raise DataError(f"--choices is for GQA, not for {protocol}")
    said = read_predictions(predictions, chosen)
    truths = chosen.references(references)
    texts, judged = join(truths, said, str(predictions))
    if not judged:
        raise DataError(f"{references}: nothing to score: none of its {len(truths)} entries has an answer that counts")
    measures: dict[str, float] = {}
    if is_gqa:
        # Includes unbalanced questions, which are entailed by others.
        questions = gqa.read_questions(references)
        measures = gqa.gqa_measures(questions, said, None if choices is None else gqa.read_choices(Path(choices)))
    found = score(protocol, texts, judged, draws=draws)
    return dataclasses.replace(found, measures=measures, left_out=len(truths) - len(judged))


def score(protocol: str, predictions: Sequence[str], references: Sequence[Reference], *, draws: int = DRAWS) -> Score:
    """Scores predictions against references in the same order; needs at least one."""
    chosen = PROTOCOLS[protocol]
    scores = judge(chosen, predictions, references)
    answer = commonest_answer(references)
    commonest = judge(chosen, [answer] * len(references), references)
    return Score(
        protocol,
        len(references),
        scores.total,
        intervals(scores.resampled, len(references), draws=draws),
        _groups(chosen, predictions, references, scores),
        {"answer": answer, "scores": commonest.total},
    )


def judge(protocol: Protocol, predictions: Sequence[str], references: Sequence[Reference]) -> Scores:
    """The scores without intervals and baselines."""
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
