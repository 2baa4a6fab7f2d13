"""Additions to CM3Leon that are not the paper's: retrieved images beside the sequence instead of in it.

Where an image is read or drawn, the codes of retrieved images at the same place of the grid are added to the
embeddings, and so is a vector of each caption. A document is then as long as its texts and one image. Texts behind an
image are predicted with the mean of its codes at hand.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.config import check_sizes
from magma_jax.nn.layers import Embedding, Linear, normal
from magma_jax.nn.modules import LanguageParam
from magma_jax.typing import Array, Float, Int, PRNGKey

# Separates the dropout of the copy gate from that of the layers.
_COPY = 0xC0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferencesConfig:
    """What is added.

    Attributes:
        images: number of retrieved images (K).
        codes: where their codes are added: ``next``, that of the place whose code is predicted; ``both``, also that of
            the place that is read; ``none``.
        captions: whether a vector of each caption, the document's own and those of the retrieved images, is added
            at every place of an image, and one of the words in which the own one agrees with each, from the end.
        copy: whether a learned gate adds the codes that it copies to the final hidden states.
        copy_dropout: share of rows of a training batch whose gate is closed. Where it is always open, the layers need
            not learn what the codes show, from which a text about the image is read.
        strips: vertical strips of the grid, left to right, of which a projection of the mean embedding of the codes so
            far is added to the final hidden states from which texts are predicted: attention over hundreds of codes
            learns late what there is most of. 0 for none.
        caption_words: words of a caption, at most; of longer ones the last are taken.
        word_rows: rows of their table; words are hashed.
    """

    images: int = 2
    codes: Literal["none", "next", "both"] = "both"
    captions: bool = True
    copy: bool = True
    copy_dropout: float = 0.0
    strips: int = 0
    caption_words: int = 16
    word_rows: int = 4096

    def __post_init__(self):
        check_sizes(self, "images", "caption_words", "word_rows")
        if not 0 <= self.copy_dropout < 1:
            raise ValueError(f"references.copy_dropout must be at least 0 and below 1, got {self.copy_dropout}")
        if self.copy_dropout and not self.copy:
            raise ValueError("references.copy_dropout closes the gate of references.copy; set one of them only")
        if self.strips < 0:
            raise ValueError(f"references.strips must be at least 0, got {self.strips}")


class References(NamedTuple):
    """Retrieved images of every row; padding stands for a missing code or token.

    Attributes:
        codes: (B, K, T) ids of the retrieved images' codes.
        captions: (B, K + 1, L) hashed words of the document's own caption and of theirs, right-aligned.
    """

    codes: Array
    captions: Array


class Seen(NamedTuple):
    """The codes of a row so far, up to and with each token, by strip of the grid.

    Attributes:
        total: (B, S, K, D) sum of their embeddings, fp32.
        count: (B, S, K) how many they are.
    """

    total: Array
    count: Array


def seen_so_far(
    embedded: Float[Array, "B S D"], strip: Int[Array, "B S"], strips: int, before: Seen | None = None
) -> Seen:
    """Counts the codes among tokens with these embeddings; ``before`` (S = 1) are those of earlier tokens.

    ``strip`` is where a token stands, -1 for one that is no code.
    """
    inside = (strip[..., None] == jnp.arange(strips)).astype(jnp.float32)
    total = jnp.cumsum(inside[..., None] * embedded[:, :, None].astype(jnp.float32), axis=1)
    count = jnp.cumsum(inside, axis=1)
    return Seen(total, count) if before is None else Seen(before.total + total, before.count + count)


class Places(NamedTuple):
    """Where tokens stand.

    Attributes:
        read: (B, S) place of every token in the grid of its image; -1 for other tokens.
        drawn: (B, S) that of the token after it.
    """

    read: Array
    drawn: Array


class ReferenceLayers(nnx.Module):
    """The parameters of the additions."""

    words: Embedding | None = None
    token: Linear | None = None
    order: Embedding | None = None
    gate: Linear | None = None
    strips: Linear | None = None

    def __init__(self, config: ReferencesConfig, width: int, std: float, *, rngs: nnx.Rngs):
        self.config = config
        start = _share(1 / config.images)

        def linear(init) -> Linear:
            return Linear(width, width, param=LanguageParam, use_bias=False, weight_init=init, rngs=rngs)

        self.drawn = nnx.List([linear(start) for _ in range(config.images)] if config.codes != "none" else [])
        self.read = nnx.List([linear(normal(std)) for _ in range(config.images)] if config.codes == "both" else [])
        self.caption, self.agreement = nnx.List([]), nnx.List([])
        if config.captions:
            self.words = Embedding(config.word_rows, width, param=LanguageParam, weight_init=normal(std), rngs=rngs)
            self.token = linear(normal(width**-0.5))
            self.order = Embedding(config.caption_words, width, param=LanguageParam, weight_init=normal(std), rngs=rngs)
            self.caption = nnx.List([linear(normal(std)) for _ in range(config.images + 1)])
            self.agreement = nnx.List(
                [
                    Linear(
                        config.caption_words,
                        width,
                        param=LanguageParam,
                        use_bias=False,
                        weight_init=normal(std),
                        rngs=rngs,
                    )
                    for _ in range(config.images)
                ]
            )
        if config.copy:
            self.gate = Linear(width, config.images, param=LanguageParam, weight_init=normal(std), rngs=rngs)
        if config.strips:
            # The mean of embeddings is short.
            self.strips = Linear(
                config.strips * width, width, param=LanguageParam, use_bias=False, weight_init=normal(1.0), rngs=rngs
            )

    def embeddings(self, table: Float[Array, "V D"], given: References, places: Places) -> Float[Array, "B S D"]:
        """What is added to the embeddings of tokens; ``table`` is the embedding table, with padding in row 0."""
        total = jnp.zeros((*places.read.shape, table.shape[1]), table.dtype)
        for layers, where in ((self.drawn, places.drawn), (self.read, places.read)):
            for number, layer in enumerate(layers):
                total += layer(_codes(table, given, number, where))
        if self.words is not None and self.token is not None and self.order is not None:
            known = (given.captions > 0)[..., None]
            words = jax.nn.relu(
                self.token(self.words(given.captions, table.dtype) + self.order.weight[...].astype(table.dtype))
            )
            pooled = jnp.where(known, words, 0).sum(2)
            vector = jnp.zeros(pooled[:, 0].shape, table.dtype)
            for number, layer in enumerate(self.caption):
                vector += layer(pooled[:, number])
            own = given.captions[:, 0]
            for number, layer in enumerate(self.agreement, 1):
                vector += layer(((own == given.captions[:, number]) & (own > 0)).astype(table.dtype))
            seen = (places.read >= 0) | (places.drawn >= 0)
            total += jnp.where(seen[..., None], vector[:, None], 0)
        return total

    def copied(
        self,
        hidden: Float[Array, "B S D"],
        table: Float[Array, "V D"],
        given: References,
        drawn: Int[Array, "B S"],
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "B S D"]:
        """The final hidden states with the codes that the gate copies."""
        if self.gate is None:
            return hidden
        gates = self.gate(hidden)
        if dropout_key is not None and self.config.copy_dropout:
            key = jax.random.fold_in(dropout_key, _COPY)
            is_open = jax.random.bernoulli(key, 1 - self.config.copy_dropout, (len(hidden), 1, 1))
            gates = jnp.where(is_open, gates, 0)
        for number in range(self.config.images):
            hidden = hidden + gates[..., number, None] * _codes(table, given, number, drawn)
        return hidden

    def described(self, hidden: Float[Array, "B S D"], seen: Seen, drawn: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """The final hidden states with the means of the codes so far, where no code is predicted."""
        if self.strips is None:
            return hidden
        means = (seen.total / jnp.maximum(seen.count, 1)[..., None]).astype(hidden.dtype)
        return hidden + jnp.where((drawn < 0)[..., None], self.strips(means.reshape(*means.shape[:2], -1)), 0)


def _codes(table: Array, given: References, number: int, where: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """Embeddings of a retrieved image's codes at places of the grid; zeros where there is none."""
    ids = jnp.take_along_axis(given.codes[:, number], jnp.maximum(where, 0), axis=1)
    return jnp.where(((where >= 0) & (ids > 0))[..., None], table[ids], 0)


def _share(scale: float):
    """The identity times a number."""
    return lambda key, shape, dtype: scale * jnp.eye(*shape, dtype=dtype)
