"""Sampling parameters; this module does not import JAX, so that commands can check them before they load it."""

import dataclasses
import math
import numbers
from typing import Literal, TypeAlias

# Seeds are signed or unsigned integers of this many bits: -1 is 2**64 - 1.
SEED_BITS = 64

Compat: TypeAlias = Literal["upstream"] | None


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to choose the next token.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token (the lowest id among equals) and ignores
            the filters.
        top_k: keeps this many of the likeliest tokens; 0 keeps all.
        top_p: keeps the smallest set of likeliest tokens with at least this mass; 1 (or 0, as in the original) keeps
            all.
        min_p: drops tokens with less than this share of the likeliest token's probability; 0 keeps all.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that already occur in
            prompt or answer (Keskar et al. 2019); 1 for none.
        compat: None, or "upstream" for the original's rules and order.

    Raises:
        ValueError: a value outside its range, NaN included.
    """

    temperature: float | int = 0.0
    top_k: int = 0
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0
    compat: Compat = None

    def __post_init__(self):
        # NaN fails every comparison, so each condition states the valid range.
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or positive and finite, got {self.temperature}")
        if not (isinstance(self.top_k, int) and 0 <= self.top_k < 2**31):
            raise ValueError(f"top_k must be a whole number, 0 or positive, got {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must lie between 0 and 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie between 0 and 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be positive and finite, got {self.repetition_penalty}")
        if self.compat not in (None, "upstream"):
            raise ValueError(f"compat must be None or 'upstream', got {self.compat!r}")


def check_seed(seed: int) -> int:
    """Returns the seed; raises ValueError unless it is an integer from -2**63 to 2**64 - 1."""
    if not (isinstance(seed, numbers.Integral) and -(2 ** (SEED_BITS - 1)) <= seed < 2**SEED_BITS):
        raise ValueError(f"seed must be a whole number from -2**63 to 2**64 - 1, got {seed!s:.40}")
    return int(seed)


def seed_words(seed: int) -> tuple[int, int]:
    """The lower and the upper 32 bits of a seed; errors as ``check_seed``."""
    bits = check_seed(seed) % 2**SEED_BITS
    return bits % 2**32, bits >> 32
