"""GQA's measures other than accuracy, as its official program computes them (Hudson and Manning 2019, section 4.4).

Grounding is not implemented: it compares a model's attention with boxes of scene graphs.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magma_jax.data.format.records import DataError
from magma_jax.data.readers.common import checked, field, read_json
from magma_jax.data.readers.questions import gqa_questions


def read_questions(path: Path) -> dict[str, Mapping[str, Any]]:
    """Every question of a file, or of a folder of chunks, balanced or not, by id.

    Raises:
        DataError: another format.
    """
    questions = {}
    for key, question, where in gqa_questions(path):
        field(question, "answer", where, str)
        for name, kind in (("types", dict), ("groups", dict), ("entailed", list)):
            if question.get(name) is not None:
                checked(question[name], kind, f"{where}: {name!r}")
        questions[key] = question
    return questions


def read_choices(path: Path) -> dict[str, Mapping[str, list[str]]]:
    """The official ``*_choices.json``: question to ``valid`` and ``plausible`` answers.

    Raises:
        DataError: another format.
    """
    choices = read_json(path, dict)
    for key, entry in choices.items():
        for kind in ("valid", "plausible"):
            field(entry, kind, f"{path}: question {key}", list)
    return choices


def gqa_measures(
    questions: Mapping[str, Mapping[str, Any]],
    predictions: Mapping[str, str],
    choices: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, float]:
    """The measures of the balanced questions that can be computed from the inputs.

    Args:
        questions: all questions, from ``read_questions``.
        predictions: predictions for at least the balanced questions.
        choices: from ``read_choices``; needed for validity and plausibility.

    Returns:
        ``consistency``, percent: share of correct answers among questions entailed by a correctly answered one; only if
        all of these are predicted. ``validity`` and ``plausibility``, percent: answers of the right kind, and answers
        that ever occur with the subject of the question. ``distribution``: chi-square between true and predicted
        answers within groups of questions, divided by 100; lower is better.

    Raises:
        DataError: a balanced question without its choices.
    """
    consistent: list[float] | None = []
    valid: dict[str, list[bool]] = {"validity": [], "plausibility": []}
    gold, said = defaultdict(Counter), defaultdict(Counter)
    for key, question in questions.items():
        if not question.get("isBalanced", True):
            continue
        answer, prediction = question["answer"], predictions[key]
        entailed = [str(other) for other in question.get("entailed") or () if other != key]
        if answer == prediction and entailed and consistent is not None:
            if all(other in predictions and other in questions for other in entailed):
                right = [predictions[other] == questions[other]["answer"] for other in entailed]
                consistent.append(sum(right) / len(right))
            else:
                consistent = None
        if choices is not None:
            if key not in choices:
                raise DataError(f"question {key} has no choices; give the file of choices of the same split")
            for name, kind in (("validity", "valid"), ("plausibility", "plausible")):
                # For questions about what two objects have in common, the official program uses these three.
                common = "Common" in str((question.get("types") or {}).get("detailed"))
                valid[name].append(prediction in (("color", "material", "shape") if common else choices[key][kind]))
        group = (question.get("groups") or {}).get("global")
        if group is not None:
            gold[str(group)][answer] += 1
            said[str(group)][prediction] += 1
    measures = {name: 100 * sum(values) / len(values) for name, values in valid.items() if values}
    if consistent:
        measures["consistency"] = 100 * sum(consistent) / len(consistent)
    if gold:
        measures["distribution"] = _chi_square(gold, said) / 100
    return measures


def _chi_square(gold: Mapping[str, Counter], said: Mapping[str, Counter]) -> float:
    """Mean over groups, weighted by their number of questions; answers that are never true are ignored."""
    total = sum(
        sum((said[group][answer] - count) ** 2 / count for answer, count in counts.items()) * counts.total()
        for group, counts in gold.items()
    )
    return total / sum(counts.total() for counts in gold.values())
