"""Asks a model that was only ever shown captions, under five conditions.

    image      the image and the question
    named      the image's caption in words and the question: what the language model knows, the ceiling
    blind      a black image and the question
    shuffled   another drawing of the same kind of question
    constant   no model: one answer of each kind, always

An answer is the likeliest of the question's choices by their first token. A small model prefers some words whatever it
is asked, so ``calibrated`` compares the log probabilities after their mean over all questions of a kind was
subtracted, which needs no true answer (batch calibration, Zhou et al. 2023).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from magma_jax.evaluation.knowledge.questions import KnowledgeError, Question, questions
from magma_jax.evaluation.metrics.bootstrap import Interval, compare, intervals
from magma_jax.evaluation.tables import text_table
from magma_jax.evaluation.tasks.answering import Answerer, Parts
from magma_jax.evaluation.tasks.examples import BlackImages, JoinedImages, spaced
from magma_jax.inference.generator import TokenGenerator
from magma_jax.typing import Float

CONDITIONS = ("image", "named", "blind", "shuffled")


def measure_knowledge(
    model: TokenGenerator,
    dataset: Any,
    *,
    shots: int = 0,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Accuracies in percent of every condition, with 95 % intervals, and image minus blind.

    Args:
        model: the model.
        dataset: the run's data, of OpenMoji.
        shots: questions of the same kind that are answered before each, under the same condition.
        limit: maximum number of questions of a kind, evenly spaced.
        seed: seed of the shots and of the other drawings.
        batch_size: prompts per batch; affects speed, not results.

    Raises:
        KnowledgeError: other data, or choices that begin with the same token.
    """
    if shots < 0:
        raise KnowledgeError(f"shots must not be negative, got {shots}")
    if dataset.images is None:
        raise KnowledgeError("the run's data has no images; questions are about OpenMoji's drawings")
    every = questions(dataset.records)
    asked = [every[i] for kind in dict.fromkeys(q.kind for q in every) for i in _of_kind(every, kind, limit)]
    black = len(dataset.images)
    images = JoinedImages(dataset.images, BlackImages(1, model.images.size))
    answerer = Answerer(model, images, batch_size=batch_size)
    tokens = [_first_tokens(model, question) for question in asked]
    rng = np.random.default_rng(seed)
    others = _other_drawings(asked, rng)
    shown = [_shots(question, every, shots, rng) for question in asked]

    def prompt(condition: str, question: Question, row: int) -> list[int | str]:
        if condition == "named":
            return [f"A picture of {question.name}.{question.prompt}"]
        return [{"image": question.image, "blind": black, "shuffled": row}[condition], question.prompt]

    scores = {}
    for condition in CONDITIONS:
        prompts: list[Parts] = []
        for question, row, before in zip(asked, others, shown, strict=True):
            parts = [part for shot in before for part in _answered(prompt(condition, shot, shot.image), shot)]
            prompts.append([*parts, *prompt(condition, question, row)])
        scores[condition] = answerer.next_tokens(prompts, tokens)
    return _figures(asked, scores) | {"shots": shots, "seed": seed, "questions": len(asked)}


def right(asked: Sequence[Question], scores: Sequence[Float[np.ndarray, " K"]], *, calibrate: bool) -> np.ndarray:
    """100 for every question whose right choice has the highest score, else 0."""
    found = np.zeros(len(asked))
    for kind in {question.kind for question in asked}:
        rows = [i for i, question in enumerate(asked) if question.kind == kind]
        values = np.stack([scores[i] for i in rows])
        values = values - values.mean(0) if calibrate else values
        found[rows] = 100 * (values.argmax(1) == [asked[i].answer for i in rows])
    return found


def table(found: Mapping[str, Any]) -> str:
    """The figures as text."""
    kinds = list(found["conditions"]["image"]["by_kind"])
    rows = [["%", "calibrated", "95 % interval", "uncalibrated", *kinds]]
    for name, values in found["conditions"].items():
        low, high = values["interval"]
        by_kind = [f"{values['by_kind'][kind]:.0f}" for kind in kinds]
        rows.append(
            [name, f"{values['calibrated']:.1f}", f"{low:.1f} to {high:.1f}", f"{values['uncalibrated']:.1f}", *by_kind]
        )
    rows.append(["constant", f"{found['constant']:.1f}", "", f"{found['constant']:.1f}", *[""] * len(kinds)])
    low, high = found["above_blind"]["interval"]
    return (
        f"{found['questions']} questions, {found['shots']} shots; image above blind: "
        f"{found['above_blind']['difference']:.1f} ({low:.1f} to {high:.1f})\n\n{text_table(rows)}"
    )


def _figures(asked: Sequence[Question], scores: Mapping[str, Sequence[np.ndarray]]) -> dict[str, Any]:
    kinds = np.array([question.kind for question in asked])
    conditions, samples = {}, {}
    for name, values in scores.items():
        found = samples[name] = right(asked, values, calibrate=True)
        conditions[name] = {
            "calibrated": float(found.mean()),
            "interval": list(_interval(found)),
            "uncalibrated": float(right(asked, values, calibrate=False).mean()),
            "by_kind": {str(kind): float(found[kinds == kind].mean()) for kind in dict.fromkeys(kinds)},
        }
    difference = compare(_mean_of(samples["blind"]), _mean_of(samples["image"]), len(asked))["accuracy"]
    constant = 100 * sum(_commonest(asked, kind) for kind in set(kinds)) / len(asked)
    return {
        "conditions": conditions,
        "constant": constant,
        "above_blind": {"difference": difference.difference, "interval": list(difference.interval), "p": difference.p},
    }


def _mean_of(samples: np.ndarray) -> Any:
    return lambda rows: {"accuracy": float(samples[rows].mean())}


def _interval(samples: np.ndarray) -> Interval:
    return intervals(_mean_of(samples), len(samples))["accuracy"]


def _commonest(asked: Sequence[Question], kind: str) -> int:
    answers = [question.answer for question in asked if question.kind == kind]
    return max(map(answers.count, answers))


def _of_kind(every: Sequence[Question], kind: str, limit: int | None) -> list[int]:
    rows = [i for i, question in enumerate(every) if question.kind == kind]
    return [rows[i] for i in spaced(len(rows), limit)]


def _first_tokens(model: TokenGenerator, question: Question) -> list[int]:
    found = [model.tokenizer.encode(f" {choice}")[0] for choice in question.choices]
    if len(set(found)) < len(found):
        raise KnowledgeError(f"two choices of {question.kind} begin with the same token in this model's vocabulary")
    return found


def _other_drawings(asked: Sequence[Question], rng: np.random.Generator) -> list[int]:
    """For every question the drawing of another one of its kind, whatever its answer."""
    rows = []
    for number, question in enumerate(asked):
        of_kind = [i for i, other in enumerate(asked) if other.kind == question.kind and i != number]
        rows.append(asked[int(rng.choice(of_kind))].image if of_kind else question.image)
    return rows


def _shots(question: Question, every: Sequence[Question], count: int, rng: np.random.Generator) -> list[Question]:
    """Other questions of the kind, about other drawings, with as many different answers as there are."""
    others = [other for other in every if other.kind == question.kind and other.image != question.image]
    chosen: list[Question] = []
    answers: list[int] = []
    while len(chosen) < count:
        answers = answers or list(rng.permutation(len(question.choices)))
        answer = answers.pop()
        pool = [other for other in others if other.answer == answer and other not in chosen]
        if pool:  # an answer may be that of the question alone
            chosen.append(pool[int(rng.integers(len(pool)))])
    return chosen


def _answered(parts: Sequence[int | str], shot: Question) -> list[int | str]:
    return [*parts, f" {shot.choices[shot.answer]}.\n"]
