"""Attention maps: attention from each word of an answer to the positions of the prompt's images.

    seen = attention_maps(model, [ImageInput("cat.png"), "A picture of"])
    print(seen.text, [word.text for word in seen.words])
    seen.map(0)                            # rollout of the first word, (rows, columns)
    seen.map(0, layer=3, head=5)           # one head
    seen.sheet().save("attention.png")     # one overlay per word

Decoding stores no attention weights. The finished sequence is run once more, and only the weights from the answer to
the images are kept in every layer: L x H x N x P numbers instead of L x H x S x S.

The attention of a token is that of the position it was sampled from, the one before it. Rollout (Abnar and Zuidema
2020) composes attention over all layers: with A the average over heads, and the residual connection weighted equally,
the matrices (A + I) / 2 of the layers are multiplied. Both show where information could come from, not why a word was
chosen.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from PIL import Image

from magma_jax.data.images import ImageInput
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.inference import overlay
from magma_jax.inference.batched import generate_tokens
from magma_jax.inference.batching import slots
from magma_jax.inference.buckets import SEQUENCES
from magma_jax.inference.generator import TokenGenerator
from magma_jax.inference.prompts import WORD, ImageGrid, Prompt, PromptLayout
from magma_jax.nn.modules import Definition, merge
from magma_jax.nn.transformer.block import BlockOutput
from magma_jax.nn.transformer.trunk import LayerReduction
from magma_jax.runtime.compile import platform_jit
from magma_jax.typing import Array, Float, Int, Params

# Head index that stands for the average over heads.
ALL_HEADS = -1


class Word(NamedTuple):
    """A word of an answer, including its leading space: ``tokens[start:stop]``."""

    text: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class ImageAttention:
    """Attention of an answer to the images of its prompt.

    Attributes:
        tokens: the answer's N tokens.
        words: words of the answer.
        weights: (L, H, N, I, P) attention weights from each token to the P positions of the I images. All weights of
            a head, including those to words, sum to 1.
        rollout: (N, I, P) rollout through all layers.
        images: images of the prompt, as given.
        grid: grid of the positions; None if they are not spatial, as with a pooled encoder.
    """

    tokens: tuple[int, ...]
    words: tuple[Word, ...]
    weights: Float[np.ndarray, "L H N I P"]
    rollout: Float[np.ndarray, "N I P"]
    images: tuple[Image.Image, ...]
    grid: ImageGrid | None

    @property
    def text(self) -> str:
        """The answer's text."""
        return "".join(word.text for word in self.words)

    def map(
        self, word: int, *, image: int = 0, layer: int | None = None, head: int | None = None, relative: bool = False
    ) -> Float[np.ndarray, "rows columns"]:
        """Attention of a word (mean over its tokens) to the cells of an image.

        Args:
            word: index into ``words``.
            image: index into ``images``.
            layer: one layer; None for rollout.
            head: one head of that layer; None for the mean over its heads.
            relative: divide by the mean over all words, so that 1 is the average. Language models put much weight on
                the first positions of a sequence regardless of the word; this removes it.

        Raises:
            ValueError: no such layer or head, a head without a layer, or positions that are not spatial. IndexError: no
                such word or image.
        """
        if self.grid is None:
            raise ValueError("this model's image positions are not spatial (pooled encoder); see weights and rollout")
        weights = self._of(layer, head)[:, image]
        chosen = self.words[word]
        found = weights[chosen.start : chosen.stop].mean(0)
        if relative:
            found = found / np.maximum(np.mean([weights[w.start : w.stop].mean(0) for w in self.words], axis=0), 1e-12)
        return found.reshape(self.grid.rows, self.grid.columns)

    def share(self, word: int, *, layer: int | None = None, head: int | None = None) -> float:
        """Share of a word's attention that goes to images, 0 to 1."""
        chosen = self.words[word]
        return float(self._of(layer, head)[chosen.start : chosen.stop].mean(0).sum())

    def overlay(self, word: int, *, image: int = 0, **which) -> Image.Image:
        """An image overlaid with the map of a word; ``which`` as for ``map``."""
        return overlay.overlay(self.images[image], self.map(word, image=image, **which))

    def sheet(self, *, image: int = 0, **which) -> Image.Image:
        """One overlay per word, each captioned with the word and its share of attention to images."""
        share = {name: which.get(name) for name in ("layer", "head")}
        tiles = [
            (self.overlay(i, image=image, **which), f"{word.text.strip()}  {100 * self.share(i, **share):.0f} %")
            for i, word in enumerate(self.words)
        ]
        return overlay.sheet(tiles)

    def _of(self, layer: int | None, head: int | None) -> Float[np.ndarray, "N I P"]:
        if layer is None and head is None:
            return self.rollout
        layers, heads = self.weights.shape[:2]
        check_head(layers, heads, layer, head)
        return self.weights[layer].mean(0) if head is None else self.weights[layer, head]


def check_head(layers: int, heads: int, layer: int | None, head: int | None) -> None:
    """Raises ValueError for a layer or head out of range, or a head without a layer."""
    for name, value, count in (("layer", layer, layers), ("head", head, heads)):
        if value is not None and not 0 <= value < count:
            raise ValueError(f"{name} {value}: the model has {count}, counted from 0")
    if head is not None and layer is None:
        raise ValueError(f"head {head} of which layer? give layer too")


def attention_maps(
    model: TokenGenerator, prompt: Prompt, answer: str | Sequence[int] | None = None, *, max_steps: int = 32
) -> ImageAttention:
    """Attention from an answer to the images of its prompt.

    Args:
        model: any autoregressive text model.
        prompt: images and text, with at least one image.
        answer: text, or sampled tokens; default: the model's greedy answer.
        max_steps: maximum number of new tokens.

    Raises:
        ValueError: no image, an empty answer, or the context is too small. ImageError: a bad image.
    """
    images = tuple(item.load() for item in prompt if isinstance(item, ImageInput))
    layout = model.layout(prompt)
    if answer is None:
        result = generate_tokens(model, model.preprocess_batch([prompt]).embeddings, max_steps)
        answer = list(np.asarray(result.tokens[0, : int(result.lengths[0])]).tolist())
    tokens = model.tokenizer.encode(answer) if isinstance(answer, str) else [int(token) for token in answer]
    layers, heads = model.lm_config.layers, model.lm_config.heads
    every = np.stack(np.meshgrid(np.arange(layers), np.arange(heads), indexing="ij"), -1).reshape(-1, 2)
    rollout, weights = attend(model, layout, tokens, every)
    return ImageAttention(
        tokens=tuple(tokens),
        words=tuple(split_words(model.tokenizer, tokens)),
        weights=weights.reshape(layers, heads, *weights.shape[1:]),
        rollout=rollout,
        images=images,
        grid=model.images.grid,
    )


def attend(
    model: TokenGenerator,
    prompt: PromptLayout,
    answer: Sequence[int],
    heads: Int[np.ndarray, "K 2"],
    *,
    length: int | None = None,
    images: int | None = None,
) -> tuple[Float[np.ndarray, "N I P"], Float[np.ndarray, "K N I P"]]:
    """Rollout, and weights of selected heads, from N tokens of an answer to the P positions of I images.

    Args:
        model: any autoregressive text model.
        prompt: a layout with at least one image.
        answer: tokens, at least one.
        heads: pairs of layer and head, or layer and ``ALL_HEADS``; a layer of -1 gives zeros.
        length: number of positions that everything is padded to, so that one program serves all prompts that fit (used
            by the server); default: the next declared length, separately for sequence, answer and images.
        images: maximum number of different images; default: the number in the prompt.

    Raises:
        ValueError: no image, an empty answer, or more positions than the context or ``length``.
    """
    starts, size = prompt.image_starts, prompt.positions
    if not starts:
        raise ValueError("the prompt has no image to look at")
    if not answer:
        raise ValueError("the answer is empty: give at least one token")
    # The last token is not run, since nothing was sampled from its position.
    before, total = len(prompt), len(prompt) + len(answer) - 1
    limit = length or model.lm_config.context_length
    if total > limit:
        raise ValueError(f"prompt and answer have {total} positions, but at most {limit} fit")
    padded = length or SEQUENCES.fit(total)
    table, rows = _image_table(model, prompt, images)
    tokens, places = np.zeros(padded, np.int32), np.full(padded, WORD, np.int32)
    tokens[:total] = [*prompt.tokens.tolist(), *answer[:-1]]
    places[:before] = prompt.table_places(rows.__getitem__)
    queries = np.arange(before - 1, total)
    columns = np.concatenate([np.arange(start, start + size) for start in starts])
    rollout, weights = _attend(
        model.graphdef,
        model.params,
        table,
        tokens,
        places,
        _padded(queries, length or SEQUENCES.fit(len(queries))),
        _padded(columns, length or SEQUENCES.fit(len(columns))),
        heads.astype(np.int32),
    )
    shape = (len(answer), len(starts), size)
    rollout = np.asarray(rollout)[: len(queries), : len(columns)].reshape(shape)
    weights = np.asarray(weights)[:, : len(queries), : len(columns)].reshape(-1, *shape)
    return rollout, weights


def split_words(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[Word]:
    """Tokens grouped into words: a word begins at a token whose text begins with white space."""
    words: list[Word] = []
    shown = ""
    for i in range(len(tokens)):
        text = tokenizer.decode(tokens[: i + 1])
        if i + 1 < len(tokens):
            text = text.rstrip("\ufffd")  # an incomplete character
        piece, shown = text[len(shown) :], text
        if words and not (piece[:1].isspace() and words[-1].text.strip()):
            words[-1] = Word(words[-1].text + piece, words[-1].start, i + 1)
        else:
            words.append(Word(piece, i, i + 1))
    return words


def _image_table(
    model: TokenGenerator, prompt: PromptLayout, room: int | None
) -> tuple[Float[Array, "C P D"], dict[bytes, int]]:
    """Table of the prompt's encoded images, and the row of each."""
    shape = (room or len(prompt.pixels), model.images.positions, model.lm_config.width)
    table = slots.commit_like(model.params, np.zeros(shape, jnp.dtype(model.dtype)))
    rows = {}
    for row, (key, pixels) in enumerate(prompt.pixels.items()):
        table = slots.add_image(model.graphdef, model.params, table, pixels[None], jnp.int32(row))
        rows[key] = row
    return table, rows


def _padded(indices: Int[np.ndarray, " N"], length: int) -> Int[np.ndarray, " M"]:
    return np.pad(indices, (0, length - len(indices))).astype(np.int32)


@platform_jit(static_argnames=("graphdef",))
def _attend(
    graphdef: Definition,
    params: Params,
    table: Float[Array, "C P D"],
    tokens: Int[Array, " S"],
    places: Int[Array, " S"],
    queries: Int[Array, " N"],
    columns: Int[Array, " M"],
    heads: Int[Array, "K 2"],
) -> tuple[Float[Array, "N M"], Float[Array, "K N M"]]:
    model = merge(graphdef, params)
    rollout = (jnp.arange(tokens.shape[0])[:, None] == columns).astype(jnp.float32)
    kept = jnp.zeros((heads.shape[0], queries.shape[0], columns.shape[0]))
    step = functools.partial(_follow, queries=queries, columns=columns, heads=heads)
    reduction = LayerReduction(step, (jnp.int32(0), rollout, kept))
    _, rollout, kept = model.lm(slots.embed(model, table, tokens[None], places[None]), reduction=reduction).reduced
    return rollout[queries], kept


def _follow(state: tuple[Array, Array, Array], block: BlockOutput, *, queries, columns, heads):
    layer, rollout, kept = state
    assert block.attentions is not None  # always set for a reduction
    attention = block.attentions[0]
    mean = attention.mean(0)
    # One gather of the selected weights: a copy of whole heads would be as large as their attention.
    chosen = attention[heads[:, 1, None, None], queries[:, None], columns]
    chosen = jnp.where(heads[:, 1, None, None] == ALL_HEADS, mean[queries[:, None], columns], chosen)
    here = (heads[:, 0] == layer)[:, None, None]
    return layer + 1, (mean @ rollout + rollout) / 2, jnp.where(here, chosen, kept)
