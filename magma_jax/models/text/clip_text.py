"""CLIP's text tower: a causal transformer whose last token is the text (Radford et al., 2021, section 2.4)."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from magma_jax.config import check_sizes
from magma_jax.nn.layers import Embedding, normal
from magma_jax.nn.modules import EncoderParam
from magma_jax.nn.transformer.config import BlockConfig, InitConfig, PositionTable, TrunkConfig
from magma_jax.nn.transformer.trunk import Trunk
from magma_jax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """Sizes of a CLIP text tower; the defaults are ViT-B/32's.

    Attributes:
        embedding_width: width of CLIP's embedding, which the image tower shares.
        length: tokens of a text, the start and the end included.
        activation: that of the image tower.
    """

    layers: int = 12
    width: int = 512
    heads: int = 8
    vocab_rows: int = 49_408
    length: int = 77
    embedding_width: int = 512
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"

    def __post_init__(self):
        check_sizes(self, "layers", "width", "heads", "vocab_rows", "length", "embedding_width")

    def trunk(self) -> TrunkConfig:
        """Pre-LayerNorm layers with learned positions."""
        block = BlockConfig(
            width=self.width,
            heads=self.heads,
            feed_forward=4 * self.width,
            projections="joint",
            activation=self.activation,
            init=InitConfig(std=self.width**-0.5),
            param=EncoderParam,
        )
        return TrunkConfig(block=block, layers=self.layers, positions=PositionTable(length=self.length, std=0.01))


class CLIPText(Trunk):
    """Token ids to CLIP's text embedding."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        super().__init__(config.trunk(), rngs=rngs)
        self.wte = Embedding(config.vocab_rows, config.width, param=EncoderParam, weight_init=normal(0.02), rngs=rngs)
        shape = (config.width, config.embedding_width)
        self.proj = EncoderParam(normal(config.width**-0.5)(rngs.params(), shape, jnp.float32))

    def encode(self, ids: Int[Array, "B S"], ends: Int[Array, " B"]) -> Float[Array, "B E"]:
        """Embeddings, not normalised, of texts whose end tokens are at the places ``ends``; padding follows them."""
        hidden = self(self.wte(ids, jnp.float32)).hidden
        last = jnp.take_along_axis(hidden, ends[:, None, None], axis=1)[:, 0]
        return last @ self.proj[...].astype(last.dtype)
