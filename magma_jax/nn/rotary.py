"""Rotary position embedding (Su et al., 2021).

The first ``features`` of each head form pairs, and pair i is rotated by the angle ``position / base**(2i / features)``.
Pairs are neighbours, (0,1), (2,3), ... (GPT-J), or a feature of the first half and its counterpart in the second
(GPT-NeoX, Llama). Angles, sines and cosines are fp32: bf16 cannot represent position 257.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp

from magma_jax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """Frequency scaling for contexts longer than the pretraining context.

    ``linear`` divides all frequencies by ``factor``. With ``llama3``, frequencies whose wavelength exceeds
    ``context / low`` are divided by ``factor``, those whose wavelength is below ``context / high`` are unchanged, and
    those between are interpolated.

    Attributes:
        factor: divisor of the frequencies that are scaled.
        low: periods within ``context`` at and below which a frequency is divided by the whole ``factor``.
        high: periods within ``context`` from which on a frequency is unchanged.
        context: pretraining context in positions.
        method: see above.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    context: int = 8192
    method: Literal["llama3", "linear"] = "llama3"

    def __post_init__(self):
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"rotary: scaling.factor must be at least 1 and finite, got {self.factor}")
        if self.method == "llama3" and not (0 < self.low < self.high and self.context > 0):
            raise ValueError(
                f"rotary: scaling needs 0 < low < high and context > 0, got {self.low}, {self.high}, {self.context}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Rotary embedding of queries and keys.

    Attributes:
        features: rotated features per head, an even number; the rest pass unchanged.
        base: the slowest pair has a period of nearly ``2 pi base`` positions.
        interleaved: whether pairs are neighbours, or counterparts in two halves.
        scaling: frequency scaling; None for none.
    """

    features: int
    base: float = 10_000.0
    interleaved: bool = False
    scaling: RotaryScaling | None = None

    def __post_init__(self):
        if self.features < 2 or self.features % 2:
            raise ValueError(f"rotary: features are turned in pairs, got {self.features}")
        if not 0 < self.base < math.inf:
            raise ValueError(f"rotary: base must be positive and finite, got {self.base}")

    def table(self, positions: Int[Array, "B S"]) -> tuple[Float[Array, "B S R"], Float[Array, "B S R"]]:
        """Sines and cosines of every position; R = features / 2."""
        return rotary_table(positions, self.features, self.base, self.scaling)


def rotary_table(
    positions: Int[Array, "B S"], features: int, base: float = 10_000.0, scaling: RotaryScaling | None = None
) -> tuple[Float[Array, "B S R"], Float[Array, "B S R"]]:
    """Sines and cosines of every position; R = features / 2."""
    frequencies = 1.0 / base ** (jnp.arange(0, features, 2, dtype=jnp.float32) / features)
    if scaling is not None and scaling.method == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        waves = scaling.context * frequencies / (2 * math.pi)
        kept = jnp.clip((waves - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.sin(angles), jnp.cos(angles)


def apply_rotary(
    x: Float[Array, "B S H K"], sin: Float[Array, "B S R"], cos: Float[Array, "B S R"], *, interleaved: bool = True
) -> Float[Array, "B S H K"]:
    """Rotates the first 2R features of each head, in neighbouring pairs if ``interleaved``; the rest are unchanged."""
    rotary_dim = 2 * sin.shape[-1]
    turned, rest = x[..., :rotary_dim].astype(jnp.float32), x[..., rotary_dim:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    sin, cos = sin[:, :, None], cos[:, :, None]
    pairs = [first * cos - second * sin, second * cos + first * sin]
    turned = jnp.stack(pairs, axis=-1) if interleaved else jnp.concatenate(pairs, axis=-1)
    turned = turned.reshape(*x.shape[:-1], rotary_dim).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1)


def check_rotary_dim(rotary_dim: int, head_size: int) -> None:
    """Raises ValueError if ``rotary_dim`` is odd or exceeds ``head_size``."""
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_size:
        raise ValueError(f"language model: rotary_dim {rotary_dim} must be even and fit in one head")
