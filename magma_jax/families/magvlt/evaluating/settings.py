"""Settings of the evaluation, and batches of drawings and texts of many prompts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from magma_jax.families.magvlt.decoding.image import ImageRun, blank, inpaint
from magma_jax.families.magvlt.decoding.likelihood import likelihood
from magma_jax.families.magvlt.decoding.text import TextRun, image_to_text, length_logits
from magma_jax.families.magvlt.generator import Magvlt
from magma_jax.families.magvlt.prompts import encode_texts
from magma_jax.families.magvlt.rows import best, in_parts
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.masked import ImageRule, ImageSteps
from magma_jax.inference.decoding.sampling import sampling_rows
from magma_jax.inference.decoding.schedules import Schedule, Strategy
from magma_jax.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of the evaluation of a run; the defaults draw the quick start's likeliest codes.

    Attributes:
        steps: steps of a drawing.
        temperature: of its codes; first and last value of a line over the steps.
        noise: factor of the noise in the choice of places, likewise.
        guidance: s of ``u + s (c - u)``.
        places: which codes a step reveals.
        schedule: share of codes that are masked after each step.
        candidates: drawings of which the one given which the text is likeliest is kept.
        text_steps: steps of a text.
        text_temperature: of its tokens; at 0 the likeliest.
        seed: the i-th drawing has seed ``seed`` + i.
    """

    steps: int = 10
    temperature: tuple[float, float] = (0.0, 0.0)
    noise: tuple[float, float] = (0.0, 0.0)
    guidance: float = 1.5
    places: Strategy = "multinomial-maskgit"
    schedule: Schedule = "cosine"
    candidates: int = 1
    text_steps: int = 12
    text_temperature: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "candidates", "text_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("temperature", "noise", "guidance", "text_temperature"):
            if np.min(getattr(self, name)) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def run(self) -> ImageRun:
        """The sampler's settings."""
        steps = ImageSteps(steps=self.steps, temperature=self.temperature, noise=self.noise)
        return ImageRun(settings=steps, guidance=self.guidance, rule=ImageRule(self.places, self.schedule))


def draw(
    model: Magvlt,
    texts: Sequence[str],
    settings: EvaluationSettings,
    *,
    codes: np.ndarray | None = None,
    places: np.ndarray | None = None,
) -> np.ndarray:
    """Codes (N, I) of drawings of the texts; with ``codes`` (N, I) only those at ``places`` (N, I) are drawn."""
    tokens, lengths = encode_texts(texts, model.tokenizer, model.config.text_positions, "error")
    if codes is None or places is None:
        codes, places = blank(model.config, len(texts))
    run = settings.run()

    def part(rows: slice, keys: Array) -> tuple[Any, ...]:
        # Rows beyond the last are dropped again.
        chosen = np.minimum(np.arange(rows.start, rows.start + len(keys)) // settings.candidates, len(texts) - 1)
        filled = inpaint(model.model, codes[chosen], places[chosen], tokens[chosen], lengths[chosen], keys, run)
        if settings.candidates == 1:
            return filled.tokens, np.zeros(len(keys)), None
        return filled.tokens, likelihood(model.model, filled.tokens, tokens[chosen], lengths[chosen], of="text"), None

    found, scores, _ = in_parts(part, settings.seed, len(texts) * settings.candidates)
    return found[best(scores, settings.candidates)]


def likelihoods(model: Magvlt, texts: Sequence[str], codes: np.ndarray) -> np.ndarray:
    """Log-probabilities (N,) of codes (N, I) given the texts, all masked at once."""
    tokens, lengths = encode_texts(texts, model.tokenizer, model.config.text_positions, "error")

    def part(rows: slice, keys: Array) -> tuple[Any, ...]:
        chosen = np.minimum(np.arange(rows.start, rows.start + len(keys)), len(texts) - 1)
        return (
            likelihood(model.model, codes[chosen], tokens[chosen], lengths[chosen], of="image"),
            np.zeros(len(keys)),
            None,
        )

    return in_parts(part, 0, len(texts))[0]


def describe(
    model: Magvlt, codes: np.ndarray, settings: EvaluationSettings, lengths: np.ndarray | None = None
) -> tuple[list[str], np.ndarray]:
    """Texts of codes (N, I), and their lengths (N,), predicted unless they are given."""
    sampling = SamplingConfig(temperature=settings.text_temperature)
    run = TextRun(steps=settings.text_steps, remask="topk" if settings.text_temperature == 0 else "sample")

    def part(rows: slice, keys: Array) -> tuple[Any, ...]:
        chosen = np.minimum(np.arange(rows.start, rows.start + len(keys)), len(codes) - 1)
        image = codes[chosen]
        wanted = np.argmax(length_logits(model.model, image), -1) + 1 if lengths is None else lengths[chosen]
        filled, _ = image_to_text(model.model, image, keys, sampling_rows([sampling] * len(keys)), run, lengths=wanted)
        return filled.tokens, wanted, None

    tokens, found, _ = in_parts(part, settings.seed, len(codes))
    return [model.text(row) for row in tokens], found
