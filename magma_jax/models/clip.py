"""CLIP: an image encoder and a text encoder whose embeddings are compared (Radford et al., 2021)."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.config import check_sizes
from magma_jax.models.vision.catalog import build_encoder
from magma_jax.models.vision.clip_resnet import CLIPResNet, CLIPResNetConfig
from magma_jax.models.vision.clip_vit import CLIPViTConfig, ResidualBlock
from magma_jax.nn.layers import Embedding, LayerNorm, normal
from magma_jax.nn.masks import Mask
from magma_jax.nn.modules import EncoderParam
from magma_jax.nn.stack import scan, stack
from magma_jax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of CLIP's text encoder; the defaults are those of ViT-B/32.

    Attributes:
        rows: token ids; the last is the end of a text, at which its embedding is read.
        positions: tokens of a text, padding included.
        activation: see ``CLIPViTConfig``.
    """

    layers: int = 12
    width: int = 512
    heads: int = 8
    rows: int = 49408
    positions: int = 77
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"

    def __post_init__(self):
        check_sizes(self, "layers", "width", "heads", "rows", "positions")
        if self.width % self.heads:
            raise ValueError(f"text: {self.heads} heads do not divide the width {self.width}")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both encoders; that of images pools to CLIP's embedding, as that of texts does to the same width."""

    image: CLIPViTConfig | CLIPResNetConfig = CLIPViTConfig()
    text: CLIPTextConfig = CLIPTextConfig()

    def __post_init__(self):
        image = self.image
        if not (image.attention_pool if isinstance(image, CLIPResNetConfig) else image.output == "pooled"):
            raise ValueError("clip: its image encoder must pool; set attention_pool=True, or output=pooled")


class CLIPText(nnx.Module):
    """Texts to CLIP's embedding: a causal transformer, read at the end of the text."""

    def __init__(self, config: CLIPTextConfig, embedding_width: int, *, rngs: nnx.Rngs):
        width = config.width
        self.token_embedding = Embedding(config.rows, width, param=EncoderParam, weight_init=normal(0.02), rngs=rngs)
        self.positional_embedding = EncoderParam(0.01 * jax.random.normal(rngs.params(), (config.positions, width)))
        self.blocks = stack(
            lambda rngs: ResidualBlock(width, config.heads, config.activation, rngs=rngs), config.layers, rngs
        )
        self.ln_final = LayerNorm(width, param=EncoderParam)
        self.proj = EncoderParam(jax.random.normal(rngs.params(), (width, embedding_width)) / math.sqrt(width))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B E"]:
        """Embeddings of texts, padded behind their end, which is the highest id."""
        x = self.token_embedding(tokens, jnp.float32) + self.positional_embedding[...]
        x, _ = scan(self.blocks, lambda block, x, _: (block(x, Mask("causal")), None), x, remat="none")
        ends = jnp.argmax(tokens, axis=1)
        return self.ln_final(x[jnp.arange(len(x)), ends]) @ self.proj[...]


class CLIP(nnx.Module):
    """Both encoders."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.image = build_encoder(config.image, rngs=rngs)
        self.text = CLIPText(config.text, config.image.embedding_width, rngs=rngs)

    def embed_images(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B E"]:
        """Embeddings of normalised images, of length 1."""
        found = self.image(images)
        return _unit(self.image.pool(found) if isinstance(self.image, CLIPResNet) else found)

    def embed_texts(self, tokens: Int[Array, "B T"]) -> Float[Array, "B E"]:
        """Embeddings of texts, of length 1."""
        return _unit(self.text(tokens))


def _unit(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
