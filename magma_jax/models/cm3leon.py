"""CM3Leon: a decoder over text and image tokens (Yu et al. 2023).

It is OPT's decoder without biases and without the weights of its norms. Where the paper is silent (ReLU, tied
embeddings, number of heads), the values are those of OPT, whose code it was trained with.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx

from magma_jax.config import check_sizes
from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.models.language.decoder import Activation, Decoder, DecoderConfig, Head, check_heads
from magma_jax.models.references import (
    Places,
    ReferenceLayers,
    References,
    ReferencesConfig,
    Seen,
    seen_so_far,
)
from magma_jax.models.vision.vqgan import VQGAN, VQGANConfig
from magma_jax.nn.layers import Embedding, Initializer, truncated_normal
from magma_jax.nn.modules import LanguageParam
from magma_jax.nn.transformer.config import BlockConfig, InitConfig, NormConfig, PositionTable, TrunkConfig
from magma_jax.typing import Array, Float, Int, PRNGKey

# Fresh weights beyond this many standard deviations are redrawn (section 2.3).
TRUNCATE = 3.0


@dataclasses.dataclass(frozen=True)
class CM3LeonConfig(DecoderConfig):
    """Sizes of a CM3Leon model; the defaults are the 350M model.

    Attributes:
        vocab_rows: rows of the embedding table, which is also the head; unused ones may follow those of ``vocabulary``.
        vocabulary: which ids are special, text and image.
        context_length: rows of the position table, without the two unused ones before them.
        activation: activation of the MLP.
        embedding_std: standard deviation of all fresh weights except the positions and the output layers, which start
            at zero.
        position_std: standard deviation of fresh positions.
        image_tokens: codes of an image, 32 x 32 in the paper.
        references: additions that are not the paper's, see ``models.references``; None for none.
        grid_positions: whether an image code also has a vector of its place in the grid, the same in all images of a
            sequence, so that attention finds the same place of a retrieved image; not the paper's.
        dropout: dropout rate of the attention and MLP branches; the paper has none.
        tokenizer: the image tokenizer, which is part of the model and frozen; None for a model that reads and writes
            codes alone.
        dtype: dtype the decoder's weights are stored in.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    layers: int = 24
    width: int = 1024
    heads: int = 16
    feed_forward: int = 4096
    vocab_rows: int = 65_536
    vocabulary: VocabLayout = VocabLayout()
    context_length: int = 4096
    activation: Activation = "relu"
    layernorm_eps: float = 1e-5
    embedding_std: float = 0.006
    position_std: float = 0.0002
    image_tokens: int = 1024
    references: ReferencesConfig | None = None
    grid_positions: bool = False
    dropout: float = 0.0
    tokenizer: VQGANConfig | None = None
    dtype: str = "float32"
    kind: Literal["cm3leon"] = "cm3leon"
    head: ClassVar[Head] = "tied"

    def __post_init__(self):
        check_heads(self)
        if self.vocabulary.image_ids.stop > self.vocab_rows:
            raise ValueError(
                f"the vocabulary has {self.vocabulary.image_ids.stop} ids, more than the {self.vocab_rows} vocab_rows; "
                f"set vocab_rows to {self.vocabulary.rows}"
            )
        check_sizes(self, "image_tokens")
        for name, needs in (("grid_positions", self.grid_positions), ("references.strips", self._strips)):
            if needs and math.isqrt(self.image_tokens) ** 2 != self.image_tokens:
                raise ValueError(f"{name} needs a square grid; image_tokens is {self.image_tokens}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.tokenizer is None:
            return
        if self.tokenizer.tokens != self.image_tokens:
            raise ValueError(
                f"image_tokens is {self.image_tokens}, but the tokenizer's grid has {self.tokenizer.tokens} codes of "
                f"an image of {self.tokenizer.image_size} pixels; set image_tokens to {self.tokenizer.tokens}"
            )
        if self.tokenizer.codes != self.vocabulary.image:
            raise ValueError(
                f"vocabulary.image is {self.vocabulary.image}, but the tokenizer has {self.tokenizer.codes} codes; "
                "make them equal"
            )

    @property
    def _strips(self) -> int:
        return 0 if self.references is None else self.references.strips

    @property
    def head_rows(self) -> int:
        """Rows of the head, which is the embedding table."""
        return self.vocab_rows

    def embedding_init(self) -> Initializer:
        """Truncated, as all weights are."""
        return truncated_normal(self.embedding_std, TRUNCATE)

    def trunk(self) -> TrunkConfig:
        """No biases, norms without parameters, positions from row 2 on, fresh blocks that return their input."""
        block = BlockConfig(
            width=self.width,
            heads=self.heads,
            feed_forward=self.feed_forward,
            norm=NormConfig(kind="plain", eps=self.layernorm_eps),
            biases=(),
            activation=self.activation,
            residual_dropout=self.dropout,
            init=InitConfig(std=self.embedding_std, truncate=TRUNCATE, zero_outputs=True),
            dtype=self.dtype,
        )
        positions = PositionTable(length=self.context_length, offset=2, std=self.position_std)
        return TrunkConfig(block=block, layers=self.layers, positions=positions)


class CM3LeonModel(Decoder):
    """The decoder, and the image tokenizer if the config has one.

    Its inputs and outputs are ids of ``VocabLayout``; the forward pass does not run ``image_tokenizer``.
    """

    image_tokenizer: VQGAN | None = None
    references: ReferenceLayers | None = None
    grid: Embedding | None = None

    def __init__(self, config: CM3LeonConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.image_tokens = config.image_tokens
        if config.tokenizer is not None:
            self.image_tokenizer = VQGAN(config.tokenizer, rngs=rngs)
        if config.references is not None:
            self.references = ReferenceLayers(config.references, config.width, config.embedding_std, rngs=rngs)
        if config.grid_positions:
            self.grid = Embedding(
                config.image_tokens,
                config.width,
                param=LanguageParam,
                weight_init=_waves(config.embedding_std),
                rngs=rngs,
            )

    def embed_with(
        self, ids: Int[Array, "B S"], given: References | None, places: Places, dtype: Any = jnp.float32
    ) -> Float[Array, "B S D"]:
        """Embeddings of tokens, with those of their places and of retrieved images beside them."""
        embedded = self.embed(ids, dtype)
        if self.references is not None and given is not None:
            embedded += self.references.embeddings(self.wte.weight[...].astype(dtype), given, places)
        if self.grid is not None:
            vectors = self.grid(jnp.maximum(places.read, 0), dtype)
            embedded += jnp.where((places.read >= 0)[..., None], vectors, 0)
        return embedded

    def seen(
        self, ids: Int[Array, "B S"], read: Int[Array, "B S"], before: Seen | None = None, dtype: Any = jnp.float32
    ) -> Seen | None:
        """The codes among tokens so far, see ``seen_so_far``; None for a model that does not need them."""
        if self.references is None or self.references.strips is None:
            return None
        side, strips = math.isqrt(self.image_tokens), self.references.config.strips
        strip = jnp.where(read >= 0, read % side * strips // side, -1)
        return seen_so_far(self.embed(ids, dtype), strip, strips, before)

    def head_input(
        self,
        hidden: Float[Array, "B S D"],
        given: References | None,
        drawn: Int[Array, "B S"],
        seen: Seen | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "B S D"]:
        """The final hidden states that ``logits`` takes, with codes that are copied from retrieved images.

        ``seen`` of the same tokens is needed where texts are predicted.
        """
        if self.references is None or given is None:
            return hidden
        table = self.wte.weight[...].astype(hidden.dtype)
        hidden = self.references.copied(hidden, table, given, drawn, dropout_key)
        return hidden if seen is None else self.references.described(hidden, seen, drawn)


def _waves(std: float) -> Initializer:
    """Sines and cosines of row and column of a square grid's places, so that a linear map moves by a place."""

    def init(key: PRNGKey, shape: tuple[int, ...], dtype: Any) -> Array:
        del key
        side, width = math.isqrt(shape[0]), shape[1]
        waves = -(-width // 4)
        angles = jnp.arange(side)[:, None] * (math.pi * float(side) ** (-jnp.arange(waves) / waves))
        features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
        rows, columns = jnp.repeat(features, side, axis=0), jnp.tile(features, (side, 1))
        return (std * 2**0.5 * jnp.concatenate([rows, columns], axis=1)[:, :width]).astype(dtype)

    return init


# Table 3; the numbers of heads are those of OPT models of these widths.
CM3LEON_SIZES = {
    name: CM3LeonConfig(layers, width, heads, 4 * width)
    for name, layers, width, heads in [
        ("cm3leon-350m", 24, 1024, 16),
        ("cm3leon-760m", 24, 1536, 16),
        ("cm3leon-7b", 32, 4096, 32),
    ]
}
