"""Gemma 2 and the text part of Gemma 3 (Gemma team, 2024 and 2025).

Norms before and after attention and MLP, with weights stored as differences from one; layers that see a window between
layers that see everything; word embeddings times the square root of the width. Gemma 2 limits scores and logits softly.
Gemma 3 has norms of queries and keys instead, and its layers with a window rotate faster than the others.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

from magma_jax.models.language.gated import GatedConfig
from magma_jax.nn.rotary import RotaryConfig, RotaryScaling
from magma_jax.nn.transformer.config import BlockConfig, NormConfig, TrunkConfig

Reach = Literal["local", "global"]


@dataclasses.dataclass(frozen=True)
class GemmaConfig(GatedConfig):
    """What both have, see ``GatedConfig``.

    Attributes:
        attention: kinds of layers, repeated: ``global`` sees all positions, ``local`` the last ``window``.
        window: positions that a query of a local layer sees, itself included.
        score_scale: scores are divided by its square root.
    """

    tied: bool = True
    attention: tuple[Reach, ...] = ("local", "global")
    window: int = 4096
    score_scale: int = 256

    def __post_init__(self):
        if not self.attention:
            raise ValueError("language model: attention names no kind of layer; give ('local', 'global')")
        if self.window < 1:
            raise ValueError(f"language model: window must be at least 1, got {self.window}")
        if not self.score_scale > 0:
            raise ValueError(f"language model: score_scale must be positive, got {self.score_scale}")
        super().__post_init__()

    @property
    def embedding_scale(self) -> float:
        """Square root of the width."""
        return math.sqrt(self.width)

    def block(self, **changes: Any) -> BlockConfig:
        """Norms before and after, weights from one, GELU."""
        settings = {
            "residual": "sandwich",
            "norm": NormConfig(kind="rms", eps=self.layernorm_eps, offset=1.0),
            "activation": "geglu_tanh",
            "score_divisor": math.sqrt(self.score_scale),
        }
        return super().block(**(settings | changes))

    def reaches(self) -> tuple[Reach, ...]:
        """Kind of every layer."""
        return tuple(self.attention[i % len(self.attention)] for i in range(self.layers))

    def windows(self) -> tuple[int | None, ...]:
        """Window of every layer."""
        return tuple(self.window if reach == "local" else None for reach in self.reaches())


@dataclasses.dataclass(frozen=True)
class Gemma2Config(GemmaConfig):
    """Sizes of a Gemma 2, see ``GemmaConfig``; the defaults are ``google/gemma-2-2b``.

    Attributes:
        score_cap: soft limit of the scores; None for no limit.
        logit_cap: soft limit of the logits; None for no limit.
    """

    layers: int = 26
    width: int = 2304
    heads: int = 8
    kv_heads: int = 4
    head_size: int = 256
    feed_forward: int = 9216
    vocab_rows: int = 256_000
    context_length: int = 8192
    score_cap: float | None = 50.0
    logit_cap: float | None = 30.0
    kind: Literal["gemma2"] = "gemma2"

    def __post_init__(self):
        if self.logit_cap is not None and not 0 < self.logit_cap < math.inf:
            raise ValueError(f"language model: logit_cap must be positive and finite, got {self.logit_cap}")
        super().__post_init__()

    def trunk(self) -> TrunkConfig:
        """Capped scores, alternating windows."""
        return TrunkConfig(block=self.block(score_cap=self.score_cap), layers=self.layers, windows=self.windows())


@dataclasses.dataclass(frozen=True)
class Gemma3Config(GemmaConfig):
    """Sizes of a Gemma 3's text part, see ``GemmaConfig``; the defaults are ``google/gemma-3-270m``.

    Attributes:
        rotary_base: base of the global layers.
        rotary_scaling: frequency scaling of the global layers; None for none.
        local_rotary_base: base of the local layers, whose frequencies are not scaled.
    """

    layers: int = 18
    width: int = 640
    heads: int = 4
    kv_heads: int = 1
    head_size: int = 256
    feed_forward: int = 2048
    vocab_rows: int = 262_144
    context_length: int = 32768
    rotary_base: float = 1_000_000.0
    attention: tuple[Reach, ...] = ("local",) * 5 + ("global",)
    window: int = 512
    local_rotary_base: float = 10_000.0
    kind: Literal["gemma3_text"] = "gemma3_text"

    def trunk(self) -> TrunkConfig:
        """Norms of queries and keys, windows in five layers of six, which have a rotary embedding of their own."""
        local = RotaryConfig(features=self.head_size, base=self.local_rotary_base)
        return TrunkConfig(
            block=self.block(qk_norm="head"),
            layers=self.layers,
            windows=self.windows(),
            rotary=tuple(local if reach == "local" else self.rotary() for reach in self.reaches()),
        )


GEMMA2_SIZES = {
    "google/gemma-2-2b": Gemma2Config(),
    "google/gemma-2-9b": Gemma2Config(42, 3584, 16, 8, 256, 14336),
    "google/gemma-2-27b": Gemma2Config(46, 4608, 32, 16, 128, 36864, score_scale=144),
}
# From 4B on: longer contexts, whose positions the global layers stretch.
_long = functools.partial(
    Gemma3Config,
    vocab_rows=262_208,
    context_length=131_072,
    rotary_scaling=RotaryScaling(factor=8.0, method="linear"),
    window=1024,
)
GEMMA3_SIZES = {
    "google/gemma-3-270m": Gemma3Config(),
    "google/gemma-3-1b-pt": Gemma3Config(26, 1152, 4, 1, 256, 6912),
    "google/gemma-3-4b-pt": _long(34, 2560, 8, 4, 256, 10240),
    "google/gemma-3-12b-pt": _long(48, 3840, 16, 8, 256, 15360),
    "google/gemma-3-27b-pt": _long(62, 5376, 32, 16, 128, 21504, score_scale=168),
}
