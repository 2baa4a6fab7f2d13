"""Answers of any family, and their options."""

import dataclasses
from typing import Literal, TypeAlias

from PIL.Image import Image

from magma_jax.inference.decoding.config import SamplingConfig, check_seed

# How choices are compared. sum: log-probability of the answer; mean: per token, which does not favour short answers.
Measure: TypeAlias = Literal["sum", "mean"]


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """Options of an answer.

    Attributes:
        max_new_tokens: maximum number of new tokens.
        sampling: sampling parameters.
        seed: seed of the first answer; the next ones have ``seed`` + 1, ...
        n: answers per prompt.
        stop: texts that end a sampled answer.
        beams: width of a beam search; 0 for sampling.
        length_penalty: length penalty of the beam search.
        choices: answers to choose among instead of generating one.
        measure: how choices are compared.
    """

    max_new_tokens: int = 32
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    beams: int = 0
    length_penalty: float = 1.0
    choices: tuple[str, ...] = ()
    measure: Measure = "sum"

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        check_seed(self.seed)
        check_seed(self.seed + self.n - 1)
        if self.beams and self.choices:
            raise ValueError("beams search for an answer, choices are given ones; leave one of them out")
        if self.beams and (self.sampling != SamplingConfig() or self.stop):
            raise ValueError("a beam search draws nothing: leave out temperature, the other sampling options and stop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer.

    Attributes:
        parts: texts and images in order; texts continue the prompt verbatim.
        tokens: tokens of its texts, without the end of text.
        logprob: log-probability of the whole answer under the model.
        finish: ``stop`` at an end of text or stop text, ``length`` without one, ``choice`` for a choice.
        probability: probability of a choice among all choices.
    """

    parts: tuple[str | Image, ...]
    tokens: tuple[int, ...]
    logprob: float
    finish: str
    probability: float | None = None

    @property
    def text(self) -> str:
        """The texts of the answer, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))
