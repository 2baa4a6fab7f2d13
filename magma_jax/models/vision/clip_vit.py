"""CLIP's vision transformer.

Two uses, by name: ``pooled`` gives the projected class token, which is what the original MAGMA code feeds its prefix;
``grid`` gives the patch tokens (7 x 7 for ViT-B/32 at 224 px), which is what the paper describes. They are different
models.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.config import check_sizes
from magma_jax.nn.activations import ACTIVATIONS
from magma_jax.nn.attention import dot_product_attention
from magma_jax.nn.convolution import BatchNormMode, Conv2d
from magma_jax.nn.layers import LayerNorm, Linear, normal
from magma_jax.nn.masks import Mask
from magma_jax.nn.modules import EncoderParam
from magma_jax.nn.stack import Remat, scan, stack
from magma_jax.runtime.sharding import split_rows
from magma_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class CLIPViTConfig:
    """Sizes of a CLIP vision transformer.

    Attributes:
        layers: number of blocks.
        width: features of a patch token.
        heads: number of attention heads.
        patch: pixels per side of a patch.
        image_size: pixels per side of an image; pixels beyond the last whole patch are not seen.
        embedding_width: width of CLIP's image embedding, which ``pooled`` returns.
        activation: ``quick_gelu`` is the sigmoid approximation of GELU that OpenAI's models use; most that open_clip
            trained use ``gelu``. It cannot be inferred from the weights.
        output: ``pooled`` (projected class token) or ``grid`` (patch tokens after the last LayerNorm, width D).
        layer_scale: whether a learned factor per channel follows attention and MLP, as in some of open_clip's.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    patch: int = 32
    image_size: int = 224
    embedding_width: int = 512
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    output: Literal["pooled", "grid"] = "pooled"
    layer_scale: bool = False
    kind: Literal["clip_vit"] = "clip_vit"

    def __post_init__(self):
        check_sizes(self, "layers", "width", "heads", "patch", "image_size", "embedding_width")
        if self.width % self.heads:
            raise ValueError(f"encoder: {self.heads} heads do not divide the width {self.width}")
        if self.image_size < self.patch:
            raise ValueError(f"encoder: image_size {self.image_size} is smaller than a patch of {self.patch}")

    @property
    def channels(self) -> int:
        """Channels of the output."""
        return self.embedding_width if self.output == "pooled" else self.width

    @property
    def positions(self) -> int | None:
        """Positions of the grid; None for the pooled output."""
        return None if self.output == "pooled" else (self.image_size // self.patch) ** 2


# Radford et al. (2021), table 19.
CLIP_VITS = {
    "ViT-B/32": CLIPViTConfig(),
    "ViT-B/16": CLIPViTConfig(patch=16),
    "ViT-L/14": CLIPViTConfig(24, 1024, 16, 14, 224, 768),
}


class SelfAttention(nnx.Module):
    """Attention with queries, keys and values in one matrix, as PyTorch's MultiheadAttention stores them."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        options = {"param": EncoderParam, "weight_init": normal(width**-0.5), "rngs": rngs}
        self.in_proj = Linear(width, 3 * width, **options)
        self.out_proj = Linear(width, width, **options)

    def __call__(self, x: Float[Array, "B S D"], mask: Mask = Mask("full")) -> Float[Array, "B S D"]:
        q, k, v = (part.reshape(*x.shape[:2], self.heads, -1) for part in jnp.split(self.in_proj(x), 3, axis=-1))
        out, _ = dot_product_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
        return self.out_proj(out.reshape(x.shape))


class ResidualBlock(nnx.Module):
    """Pre-LayerNorm transformer block."""

    def __init__(self, width: int, heads: int, activation: str, *, layer_scale: bool = False, rngs: nnx.Rngs):
        self.activation = activation
        self.ln_1 = LayerNorm(width, param=EncoderParam)
        self.attn = SelfAttention(width, heads, rngs=rngs)
        self.ln_2 = LayerNorm(width, param=EncoderParam)
        self.c_fc = Linear(width, 4 * width, param=EncoderParam, rngs=rngs)
        self.c_proj = Linear(4 * width, width, param=EncoderParam, rngs=rngs)
        scales = [EncoderParam(jnp.ones((width,)), decay=False) if layer_scale else None for _ in range(2)]
        self.scale_1, self.scale_2 = scales

    def __call__(self, x: Float[Array, "B S D"], mask: Mask = Mask("full")) -> Float[Array, "B S D"]:
        x = x + scaled(self.attn(self.ln_1(x), mask), self.scale_1)
        inner = ACTIVATIONS[self.activation].function(self.c_fc(self.ln_2(x)))
        return x + scaled(self.c_proj(inner), self.scale_2)


def scaled(x: Float[Array, "B S D"], scale: EncoderParam | None) -> Float[Array, "B S D"]:
    """``x`` times a factor per channel; unchanged without one."""
    return x if scale is None else x * scale[...].astype(x.dtype)


class CLIPViT(nnx.Module):
    """Images to a pooled embedding (B, E) or a grid of patch tokens (B, P, D)."""

    def __init__(self, config: CLIPViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, scale = config.width, 1 / math.sqrt(config.width)
        patches = (config.image_size // config.patch) ** 2
        self.conv1 = Conv2d(3, width, config.patch, param=EncoderParam, stride=config.patch, rngs=rngs)
        self.class_embedding = EncoderParam(scale * jax.random.normal(rngs.params(), (width,)))
        self.positional_embedding = EncoderParam(scale * jax.random.normal(rngs.params(), (patches + 1, width)))
        self.ln_pre = LayerNorm(width, param=EncoderParam)
        self.blocks = stack(
            lambda rngs: ResidualBlock(
                width, config.heads, config.activation, layer_scale=config.layer_scale, rngs=rngs
            ),
            config.layers,
            rngs,
        )
        self.ln_post = LayerNorm(width, param=EncoderParam)
        self.proj = (
            EncoderParam(scale * jax.random.normal(rngs.params(), (width, config.embedding_width)))
            if config.output == "pooled"
            else None
        )

    def embed(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B S D"]:
        """Patches and class token with their positions, after the first LayerNorm."""
        patches = self.conv1(images)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        cls = jnp.broadcast_to(
            self.class_embedding[...].astype(patches.dtype), (patches.shape[0], 1, patches.shape[-1])
        )
        x = jnp.concatenate([cls, patches], axis=1)
        return self.ln_pre(x + self.positional_embedding[...].astype(x.dtype))

    def __call__(
        self, images: Float[Array, "B h w 3"], *, batch_norm: BatchNormMode = "frozen", remat: Remat = "none"
    ) -> Float[Array, "B ..."]:
        """Normalised images to features; ``batch_norm`` is part of the encoder interface and is ignored."""
        x, _ = scan(self.blocks, lambda block, x, _: (block(split_rows(x)), None), self.embed(images), remat=remat)
        if self.proj is not None:
            return self.ln_post(x[:, 0]) @ self.proj[...].astype(x.dtype)
        return self.ln_post(x[:, 1:])
