"""Answers of any family, and their options."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
from PIL.Image import Image

from magma_jax.inference.decoding.config import SamplingConfig, check_seed
from magma_jax.inference.decoding.guidance import MAX_K
from magma_jax.inference.decoding.schedules import Schedule, Strategy
from magma_jax.typing import Float

# How choices are compared. sum: log-probability of the answer; mean: per token, which does not favour short answers.
Measure: TypeAlias = Literal["sum", "mean"]

# Images drawn of one prompt, all of which are in memory at the end.
MAX_IMAGES = 1024

# How well images fit the text of each, the higher the better, such as ``inference.clip_scores.ClipScorer``.
Score: TypeAlias = Callable[[Sequence[Image], Sequence[str]], Float[np.ndarray, " N"]]


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
class ImageOptions:
    """Options of a drawn image.

    Attributes:
        n: images per prompt.
        seed: seed of the first image; the next ones have ``seed`` + 1, ...
        candidates: images drawn for each returned one; the best by ``score`` is returned.
        score: score of the candidates, given the prompt's text; None for the model's own likelihood.
        guidance: factor s of ``u + s (c - u)``, from logits with (c) and without the prompt (u); 1 for none.
        temperature: divides the logits; first and last value of a line over the steps, and None for the family's own.
        top_p: draws from the likeliest tokens of this mass; 1 for all.
        steps: steps of a masked model; None for the family's own.
        schedule: share of tokens that are masked after each step of a masked model.
        places: which places a step of a masked model reveals.
        cd_k: k of contrastive decoding (CD-K, see ``decoding.guidance``) in place of guidance, of a model that draws
            code by code; 0 for guidance.
        contrasted: how many of the candidates are drawn by CD-K, the last ones; the others are guided and drawn by
            top-p, so that both are in one pool. None for all with ``cd_k``.
        mask: (height, width) of the prompt's image, True for the pixels to draw anew; None for a whole image.
    """

    n: int = 1
    seed: int = 0
    candidates: int = 1
    score: Score | None = dataclasses.field(default=None, compare=False)
    guidance: float = 1.0
    temperature: tuple[float, float] | None = None
    top_p: float = 1.0
    steps: int | None = None
    schedule: Schedule = "cosine"
    places: Strategy = "multinomial-maskgit"
    cd_k: int = 0
    contrasted: int | None = None
    mask: np.ndarray | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        for name in ("n", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n * self.candidates > MAX_IMAGES:
            raise ValueError(
                f"n = {self.n} with candidates = {self.candidates} are more than {MAX_IMAGES} images of one prompt; "
                "ask several times, each with another seed"
            )
        if not 0 <= self.cd_k <= MAX_K:
            raise ValueError(f"cd_k must be 0 to {MAX_K}, got {self.cd_k}")
        if self.contrasted is not None and not (self.cd_k and 0 <= self.contrasted <= self.candidates):
            raise ValueError(
                f"contrasted {self.contrasted}: give cd_k, and a number up to that of the candidates, {self.candidates}"
            )
        if self.steps is not None and not 1 <= self.steps < 2**31:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        check_seed(self.seed)
        check_seed(self.seed + self.n * self.candidates - 1)
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be a number of at least 0, got {self.guidance}")
        heat = (0.0, 0.0) if self.temperature is None else self.temperature
        if not isinstance(heat, tuple) or len(heat) != 2 or not all(0 <= value < math.inf for value in heat):
            raise ValueError(f"temperature must be two numbers of at least 0, (first, last), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        for name, values in (("schedule", Schedule), ("places", Strategy)):
            if getattr(self, name) not in get_args(values):
                known = ", ".join(get_args(values))
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {known}")


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


@dataclasses.dataclass(frozen=True)
class Written:
    """Answers to a prompt, which hold texts, or texts and images."""

    answers: Sequence[Answer]
    finish: Literal["stop"] = "stop"


@dataclasses.dataclass(frozen=True)
class Canvas:
    """The images of a prompt at one time: unfinished ones, or with ``finish`` the drawn ones."""

    images: Sequence[Image]
    finish: Literal["stop"] | None = None
