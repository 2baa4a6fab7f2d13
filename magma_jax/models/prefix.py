"""Image prefix: an encoder's features become word-like vectors of the language model's width (paper, section 3.1).

A grid encoder gives one vector per grid position; a pooled encoder's vector is mapped to ``image_positions`` vectors.
Dropout and LayerNorm follow the mapping. The paper also tried an MLP and a small transformer in place of the linear
map, without gain; all three are implemented.

Two ways to fewer positions, for encoders with fine grids: ``shuffle`` joins the features of neighbouring positions
(pixel shuffle, Shi et al., 2016; with ``mlp`` as in InternVL), and ``resampler`` reads them with learned queries
(Jaegle et al., 2021; Alayrac et al., 2022).
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.config import check_sizes
from magma_jax.nn.attention import dot_product_attention
from magma_jax.nn.layers import LayerNorm, Linear, dropout, normal
from magma_jax.nn.masks import Mask
from magma_jax.nn.modules import PrefixParam, Statistic
from magma_jax.nn.stack import scan, stack
from magma_jax.typing import Array, Float, PRNGKey


@dataclasses.dataclass(frozen=True)
class PrefixConfig:
    """The map from features to word-like vectors.

    Attributes:
        mapping: ``linear`` (MAGMA), ``mlp`` (GELU between two linear layers), ``transformer`` (linear, then
            ``transformer_layers`` encoder layers over the positions) or ``resampler`` (linear, then
            ``transformer_layers`` layers in which ``image_positions`` learned queries attend to the grid).
        image_positions: vectors per image with a pooled encoder (Frozen uses 2) or a resampler; otherwise a grid gives
            one per position.
        shuffle: side of the squares of grid positions that become one position with all of their features.
        layernorm: whether a LayerNorm follows the dropout.
        dropout: dropout rate during training (paper: 0.1).
        standardize: whether features are scaled to zero mean and unit variance per channel, with statistics of
            training images that the run computes once (``families.magma.image_features``); for encoders whose channels
            differ in scale.
        transformer_layers: layers of a ``transformer`` or ``resampler``.
        transformer_heads: attention heads of these layers.
        scale: weights of the LayerNorm at the start: 1 in MAGMA; with the root mean square of the word embeddings (0.13
            in SmolLM2-135M), images start at the scale of words.
        start: how the linear map starts: ``random``, or ``words``, regressed on the embeddings of the captions' tokens
            (``families.magma.word_start``); for runs that start from ``weights``.
    """

    mapping: Literal["linear", "mlp", "transformer", "resampler"] = "linear"
    image_positions: int = 2
    shuffle: int = 1
    layernorm: bool = True
    dropout: float = 0.1
    standardize: bool = False
    transformer_layers: int = 2
    transformer_heads: int = 8
    scale: float = 1.0
    start: Literal["random", "words"] = "random"

    def __post_init__(self):
        check_sizes(self, "image_positions", "shuffle", "transformer_layers", "transformer_heads")

    def joined(self, grid: int | None) -> int | None:
        """Grid positions after ``shuffle``; None for a pooled encoder.

        Raises:
            ValueError: a grid that does not divide into squares, or a pooled encoder where a grid is needed.
        """
        if grid is None:
            if self.shuffle > 1 or self.mapping == "resampler":
                raise ValueError("prefix: shuffle and the resampler need an encoder with a grid of positions")
            return None
        side = math.isqrt(grid)
        if self.shuffle > 1 and (side * side != grid or side % self.shuffle):
            raise ValueError(
                f"prefix: squares of {self.shuffle} x {self.shuffle} do not divide the encoder's {grid} positions; "
                "change shuffle or the image size"
            )
        return grid // self.shuffle**2

    def positions(self, grid: int | None) -> int:
        """Positions of an image in a sequence, for an encoder with ``grid`` positions. Raises as ``joined``."""
        joined = self.joined(grid)
        return self.image_positions if joined is None or self.mapping == "resampler" else joined


class PrefixTransformerLayer(nnx.Module):
    """Pre-LayerNorm encoder layer over the positions of one image, full attention."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        if width % heads:
            raise ValueError(f"prefix: {heads} transformer_heads do not divide the width {width}")
        self.heads = heads
        self.ln_1, self.ln_2 = (LayerNorm(width, param=PrefixParam) for _ in range(2))
        self.qkv = Linear(width, 3 * width, param=PrefixParam, rngs=rngs)
        self.out_proj = Linear(width, width, param=PrefixParam, rngs=rngs)
        self.c_fc = Linear(width, 4 * width, param=PrefixParam, rngs=rngs)
        self.c_proj = Linear(4 * width, width, param=PrefixParam, rngs=rngs)

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        q, k, v = (part.reshape(*x.shape[:2], self.heads, -1) for part in jnp.split(self.qkv(self.ln_1(x)), 3, axis=-1))
        seen, _ = dot_product_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), Mask("full"))
        x = x + self.out_proj(seen.reshape(x.shape))
        return x + self.c_proj(jax.nn.gelu(self.c_fc(self.ln_2(x))))


class ResamplerLayer(nnx.Module):
    """Pre-LayerNorm layer in which queries attend to features and to each other."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        if width % heads:
            raise ValueError(f"prefix: {heads} transformer_heads do not divide the width {width}")
        self.heads = heads
        self.ln_1, self.ln_features, self.ln_2 = (LayerNorm(width, param=PrefixParam) for _ in range(3))
        self.q_proj = Linear(width, width, param=PrefixParam, rngs=rngs)
        self.kv_proj = Linear(width, 2 * width, param=PrefixParam, rngs=rngs)
        self.out_proj = Linear(width, width, param=PrefixParam, rngs=rngs)
        self.c_fc = Linear(width, 4 * width, param=PrefixParam, rngs=rngs)
        self.c_proj = Linear(4 * width, width, param=PrefixParam, rngs=rngs)

    def __call__(self, x: Float[Array, "B P D"], features: Float[Array, "B G D"]) -> Float[Array, "B P D"]:
        queries = self.ln_1(x)
        read = jnp.concatenate([self.ln_features(features), queries], axis=1)
        heads = (x.shape[0], -1, self.heads, x.shape[-1] // self.heads)
        k, v = (part.reshape(heads).swapaxes(1, 2) for part in jnp.split(self.kv_proj(read), 2, axis=-1))
        seen, _ = dot_product_attention(self.q_proj(queries).reshape(heads), k, v, Mask("full"))
        x = x + self.out_proj(seen.reshape(x.shape))
        return x + self.c_proj(jax.nn.gelu(self.c_fc(self.ln_2(x))))


class ImagePrefix(nnx.Module):
    """Encoder and mapping. ``encoder`` may be any module with ``config.channels`` and ``config.positions``."""

    def __init__(self, encoder: Any, width: int, config: PrefixConfig, *, rngs: nnx.Rngs):
        self.config, self.width = config, width
        self.encoder = encoder
        grid = encoder.config.positions
        self.positions = config.positions(grid)
        outputs = width * (self.positions if grid is None else 1)
        inputs, mlp = encoder.config.channels * config.shuffle**2, config.mapping == "mlp"
        self.proj_in = Linear(inputs, width, param=PrefixParam, rngs=rngs) if mlp else None
        self.proj = Linear(width if mlp else inputs, outputs, param=PrefixParam, rngs=rngs)
        channels = (encoder.config.channels,)
        self.feature_mean = Statistic(jnp.zeros(channels)) if config.standardize else None
        self.feature_std = Statistic(jnp.ones(channels)) if config.standardize else None
        resampler = config.mapping == "resampler"
        self.queries = (
            PrefixParam(normal(0.02)(rngs.params(), (self.positions, width), jnp.float32)) if resampler else None
        )
        self.resampler = (
            stack(
                lambda rngs: ResamplerLayer(width, config.transformer_heads, rngs=rngs), config.transformer_layers, rngs
            )
            if resampler
            else None
        )
        self.transformer = (
            stack(
                lambda rngs: PrefixTransformerLayer(width, config.transformer_heads, rngs=rngs),
                config.transformer_layers,
                rngs,
            )
            if config.mapping == "transformer"
            else None
        )
        self.ln = LayerNorm(width, param=PrefixParam, scale=config.scale) if config.layernorm else None

    def project(self, features: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """The mapping to the width: (B, G, C) to (B, G / shuffle^2, D), pooled (B, C) to (B, P * D)."""
        if self.feature_mean is not None and self.feature_std is not None:
            scaled = (features.astype(jnp.float32) - self.feature_mean[...]) / self.feature_std[...]
            features = scaled.astype(features.dtype)
        if self.config.shuffle > 1:
            features = pixel_shuffle(features, self.config.shuffle)
        if self.proj_in is not None:
            features = jax.nn.gelu(self.proj_in(features))
        return self.proj(features)

    def __call__(self, features: Float[Array, "B ..."], *, dropout_key: PRNGKey | None = None) -> Float[Array, "B P D"]:
        """Features of ``encoder`` to word-like vectors; ``dropout_key=None`` means no dropout."""
        x = self.project(features).reshape(features.shape[0], -1, self.width)
        if self.transformer is not None:
            x, _ = scan(self.transformer, lambda layer, x, _: (layer(x), None), x, remat="none")
        if self.resampler is not None and self.queries is not None:
            features, queries = x, self.queries[...].astype(x.dtype)
            x = jnp.broadcast_to(queries, (features.shape[0], *queries.shape))
            x, _ = scan(self.resampler, lambda layer, x, _: (layer(x, features), None), x, remat="none")
        x = dropout(x, self.config.dropout, dropout_key)
        return x if self.ln is None else self.ln(x)


def pixel_shuffle(features: Float[Array, "B G C"], size: int) -> Float[Array, "B H D"]:
    """Joins squares of ``size`` x ``size`` grid positions; their features follow each other row by row."""
    batch, grid, channels = features.shape
    side = math.isqrt(grid) // size
    squares = features.reshape(batch, side, size, side, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(batch, side * side, size * size * channels)
