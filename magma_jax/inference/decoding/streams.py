"""Decoding of texts and images in one vocabulary, by one or several coupled streams.

An example has one to three streams: rows with different prompts, such as with and without the text, which receive the
same new tokens. All rows share one batch and one cache; each step combines the logits of an example's streams
(``guidance``), restricts the vocabulary, and draws one token for all of them. Examples do not affect each other.

Which ids may follow depends on where an example stands (``Place``): an image is always complete, and whether a text may
be followed by images is up to the request.
"""

import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.inference.decoding.decode import run_prompts
from magma_jax.inference.decoding.guidance import contrast, guide, guide_edit
from magma_jax.inference.decoding.sampling import MASKED, SamplingRows, apply_temperature, sample
from magma_jax.models.language.decoder import Decoder
from magma_jax.models.references import Places, References, Seen
from magma_jax.nn.transformer.cache import KVCache
from magma_jax.typing import Array, Bool, Float, Int, Key

# How the logits of an example's streams are combined. conditional: there is one. guide: with and without the prompt.
# edit: with image and instruction, with the image alone, with neither.
Combine = Literal["conditional", "guide", "edit"]

STREAMS: dict[Combine, int] = {"conditional": 1, "guide": 2, "edit": 3}


class Place(enum.IntEnum):
    """Where the next token of an example stands."""

    TEXT = 0  # in a text
    BEGIN = 1  # after a <break>
    IMAGE = 2  # in an image
    AFTER = 3  # after a complete image


@dataclasses.dataclass(frozen=True)
class StreamRules:
    """Static rules of a batch.

    Attributes:
        layout: vocabulary.
        image_tokens: codes of an image.
        combine: how logits are combined.
    """

    layout: VocabLayout
    image_tokens: int
    combine: Combine = "conditional"


class StreamRows(NamedTuple):
    """What is asked for, (B,) each.

    Attributes:
        place: ``Place`` of the first new token.
        left: codes until the image is complete, if that is in an image.
        images: whether images may begin.
        texts: whether texts may begin or go on.
        end: id that ends the answer.
        limit: maximum number of new tokens, the end included.
        weight: weight of guidance by the prompt; 1 for none.
        image_weight: weight of guidance by the image, for edits.
        first: share of an image from which on it is guided.
        last: share of an image from which on it is no longer guided.
        cd_k: k of ``guidance.contrast`` in place of guidance by the prompt; 0 for guidance.
        cd_alpha: alpha of ``guidance.contrast``.
        amateur_temperature: temperature of the stream that ``guidance.contrast`` subtracts.
    """

    place: Array
    left: Array
    images: Array
    texts: Array
    end: Array
    limit: Array
    weight: Array
    image_weight: Array
    first: Array
    last: Array
    cd_k: Array
    cd_alpha: Array
    amateur_temperature: Array


class StreamTokens(NamedTuple):
    """New tokens.

    Attributes:
        tokens: (B, N) ids, padding after the last one.
        counts: (B,) number of tokens, the end included.
        ended: (B,) whether the end was drawn.
        logprobs: (B, N) log-probability of every token under the first stream, before guidance and restrictions.
    """

    tokens: Array
    counts: Array
    ended: Array
    logprobs: Array


class Walk(NamedTuple):
    """How far examples are, (B,) each.

    Attributes:
        place: ``Place`` of the next token.
        left: codes until the image is complete, in an image.
        count: new tokens.
        ended: whether the end was drawn.
        done: whether nothing follows.
    """

    place: Array
    left: Array
    count: Array
    ended: Array
    done: Array


class _State(NamedTuple):
    """Loop state; ``position`` and ``seen`` have a value per stream and example, the others per example."""

    cache: KVCache
    token: Array
    position: Array
    walk: Walk
    seen: Seen | None


class Given(NamedTuple):
    """What is known of the prompts beside their tokens, a row for each; see ``models.references``."""

    references: References | None
    places: Places


@dataclasses.dataclass(frozen=True)
class ModelBeside:
    """A decoder and what stands beside its prompts."""

    lm: Any
    given: Given | None
    image_tokens: int
    dtype: Any

    def embed(self, ids: Int[Array, "R S"], places: Places | None) -> Float[Array, "R S D"]:
        if self.given is None:
            return self.lm.embed(ids, self.dtype)
        return self.lm.embed_with(ids, self.given.references, places, self.dtype)

    def after(self, place: Int[Array, " R"], left: Int[Array, " R"]) -> Int[Array, " R"]:
        """Place in the grid of the token that is drawn next; -1 outside an image."""
        return jnp.where(place == Place.IMAGE, self.image_tokens - left, -1)

    def seen(self, ids: Int[Array, "R S"], places: Places | None, before: Seen | None = None) -> Seen | None:
        """The codes among tokens so far, for a model that needs them."""
        return None if places is None else self.lm.seen(ids, places.read, before, self.dtype)

    def logits(
        self, drawn: Int[Array, " R"], hidden: Float[Array, "R D"], seen: Seen | None = None
    ) -> Float[Array, "R V"]:
        """Those of the next token; ``seen`` (S = 1) is needed where it is no code."""
        if self.given is not None:
            hidden = self.lm.head_input(hidden[:, None], self.given.references, drawn[:, None], seen)[:, 0]
        return self.lm.logits(hidden)


def read_place(ids: Int[Array, " R"], left: Int[Array, " R"], rules: StreamRules) -> Int[Array, " R"]:
    """Place in the grid of the newest tokens; -1 for those that are no codes."""
    is_image = (ids >= rules.layout.image_ids.start) & (ids < rules.layout.image_ids.stop)
    return jnp.where(is_image, rules.image_tokens - 1 - left, -1)


def decode_streams(
    lm: Decoder,
    tokens: Int[Array, "R S"],
    lengths: Int[Array, " R"],
    keys: Key[Array, " B"],
    sampling: SamplingRows,
    rows: StreamRows,
    rules: StreamRules,
    *,
    steps: int,
    given: Given | None = None,
) -> StreamTokens:
    """Continues every example by up to ``steps`` tokens.

    Args:
        lm: language model.
        tokens: prompts, right-padded to S; all first streams, then all second ones, and so on.
        lengths: unpadded lengths.
        keys: one key per example; token i is drawn with ``fold_in(key, i)``.
        sampling: sampling parameters per example; they apply to the combined logits.
        rows: what is asked for.
        rules: static.
        steps: N, static.
        given: places, and retrieved images beside the prompts, of a ``CM3LeonModel`` that takes them.

    Raises:
        ValueError: the rows are not those of as many streams as ``rules.combine`` takes.
    """
    streams, batch = STREAMS[rules.combine], keys.shape[0]
    if tokens.shape[0] != streams * batch:
        raise ValueError(
            f"{tokens.shape[0]} prompts are not {streams} streams of {batch} examples, which {rules.combine} takes"
        )
    model = ModelBeside(lm, given, rules.image_tokens, activations_of(lm))
    places = None if given is None else given.places
    embedded = model.embed(tokens, places)
    seen = jax.tree.map(lambda leaf: _last(leaf, lengths), model.seen(tokens, places))
    after = model.after(jnp.tile(rows.place, streams), jnp.tile(rows.left, streams))
    head = functools.partial(model.logits, after, seen=seen)
    cache, logits = run_prompts(lm, embedded, lengths, slots=tokens.shape[1] + steps, head=head)
    zeros = jnp.zeros(batch, jnp.int32)
    no = jnp.zeros(batch, bool)
    state = _State(cache, zeros, lengths - 1, Walk(rows.place, rows.left, zeros, no, rows.limit < 1), seen)
    drawn = jnp.full((batch, steps), rules.layout.pad, jnp.int32), jnp.zeros((batch, steps))

    def going(carry):
        step, state, *_ = carry
        return (step < steps) & ~state.walk.done.all()

    def body(carry):
        step, state, logits, (ids, logprobs) = carry
        before = state.walk.done
        state, logprob = _draw(logits, state, keys, sampling, rows, rules)
        ids = ids.at[:, step].set(jnp.where(before, rules.layout.pad, state.token))
        logprobs = logprobs.at[:, step].set(jnp.where(before, 0.0, logprob))
        where, left = jnp.tile(state.walk.place, streams), jnp.tile(state.walk.left, streams)
        read = read_place(jnp.tile(state.token, streams), left, rules)
        drawn = model.after(where, left)
        token, places = jnp.tile(state.token, streams)[:, None], Places(read[:, None], drawn[:, None])
        output = lm(model.embed(token, places), positions=state.position[:, None], cache=state.cache)
        seen = None if state.seen is None else model.seen(token, places, state.seen)
        logits = model.logits(drawn, output.hidden[:, 0], seen)
        return step + 1, state._replace(cache=output.cache, seen=seen), logits, (ids, logprobs)

    _, state, _, (ids, logprobs) = jax.lax.while_loop(going, body, (jnp.int32(0), state, logits, drawn))
    return StreamTokens(ids, state.walk.count, state.walk.ended, logprobs)


def combined(
    parts: Sequence[Float[Array, "B V"]], allowed: Bool[Array, "B V"], walk: Walk, rows: StreamRows, rules: StreamRules
) -> Float[Array, "B V"]:
    """The logits to draw from: those of all streams, combined and then restricted to ``allowed``.

    Args:
        parts: logits of every stream.
        allowed: ids that may follow.
        walk: how far the examples are: images are guided within their interval alone.
        rows: what is asked for.
        rules: static.
    """
    share = (rules.image_tokens - walk.left) / rules.image_tokens
    guided = (walk.place != Place.IMAGE) | ((share >= rows.first) & (share < rows.last))
    text_weight, image_weight = jnp.where(guided, rows.weight, 1.0), jnp.where(guided, rows.image_weight, 1.0)
    if rules.combine == "conditional":
        return jnp.where(allowed, parts[0], MASKED)
    if rules.combine == "guide":
        result = guide(parts[0], parts[1], text_weight)
    else:
        both, image, nothing = parts
        result = guide_edit(nothing, image, both, image_weight=image_weight, text_weight=text_weight)

    def contrasted() -> Float[Array, "B V"]:
        expert, amateur = (jnp.where(allowed, part, MASKED) for part in parts[:2])
        scores = contrast(
            expert, apply_temperature(amateur, rows.amateur_temperature), k=rows.cd_k, alpha=rows.cd_alpha
        )
        scores = jnp.where(guided[:, None], scores, expert)
        return jnp.where((rows.cd_k > 0)[:, None], scores, result)

    # Finding the k-th likeliest token takes a sort, which most batches do without.
    return jnp.where(allowed, jax.lax.cond((rows.cd_k > 0).any(), contrasted, lambda: result), MASKED)


def allowed_ids(
    rules: StreamRules, rows: StreamRows, place: Int[Array, " B"], count: Int[Array, " B"], vocabulary: int
) -> Bool[Array, "B V"]:
    """The ids that may follow at a place, after ``count`` new tokens.

    A text goes on or ends; an image begins only where all its codes fit below the limit.
    """
    layout, ids = rules.layout, jnp.arange(vocabulary)
    is_text = (ids >= layout.text_ids.start) & (ids < layout.text_ids.stop)
    is_image = (ids >= layout.image_ids.start) & (ids < layout.image_ids.stop)
    room = rows.limit - count
    is_end, is_break = ids == rows.end[:, None], ids == layout.brk
    more = rows.images & (room > rules.image_tokens)
    by_place = jnp.stack(
        [
            (rows.texts[:, None] & is_text) | is_end | (more[:, None] & is_break),
            (rows.texts[:, None] & is_text) | ((rows.images & (room >= rules.image_tokens))[:, None] & is_image),
            jnp.broadcast_to(is_image, is_end.shape),
            is_end | ((more | (rows.texts & (room > 1)))[:, None] & is_break),
        ]
    )
    return jnp.take_along_axis(by_place, place[None, :, None], axis=0)[0]


def _draw(
    logits: Float[Array, "R V"],
    state: _State,
    keys: Key[Array, " B"],
    sampling: SamplingRows,
    rows: StreamRows,
    rules: StreamRules,
) -> tuple[_State, Float[Array, " B"]]:
    """Draws the next token of every example; finished ones stay unchanged."""
    batch, walk = keys.shape[0], state.walk
    logits = logits.astype(jnp.float32)
    allowed = allowed_ids(rules, rows, walk.place, walk.count, logits.shape[-1])
    parts = list(logits.reshape(STREAMS[rules.combine], batch, -1))
    drawable = combined(parts, allowed, walk, rows, rules)
    numbered = jax.vmap(jax.random.fold_in)(keys, walk.count)
    token = sample(drawable, numbered, sampling).astype(jnp.int32)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits[:batch]), token[:, None], axis=1)[:, 0]
    moved = jnp.tile(walk.done, STREAMS[rules.combine])
    return _State(
        cache=state.cache,
        token=jnp.where(walk.done, state.token, token),
        position=jnp.where(moved, state.position, state.position + 1),
        walk=walked(walk, token, rows, rules),
        seen=state.seen,
    ), logprob


def _last(leaf: Float[Array, "R S ..."] | Int[Array, "R S"], lengths: Int[Array, " R"]) -> Array:
    """Values at the last tokens of prompts, (R, 1, ...)."""
    where = (lengths - 1).reshape(-1, *[1] * (leaf.ndim - 1))
    return jnp.take_along_axis(leaf, where, axis=1)


def walked(walk: Walk, token: Int[Array, " B"], rows: StreamRows, rules: StreamRules) -> Walk:
    """Where examples are after one more token; finished ones stay unchanged."""
    layout, was = rules.layout, walk.done
    is_image = (token >= layout.image_ids.start) & (token < layout.image_ids.stop)
    begins = is_image & (walk.place == Place.BEGIN)
    left = jnp.where(begins, rules.image_tokens - 1, jnp.where(is_image, walk.left - 1, 0))
    place = jnp.where(is_image, jnp.where(left > 0, Place.IMAGE, Place.AFTER), Place.TEXT)
    place = jnp.where(token == layout.brk, Place.BEGIN, place)
    count, ended = walk.count + 1, token == rows.end
    return Walk(
        place=jnp.where(was, walk.place, place),
        left=jnp.where(was, walk.left, left),
        count=jnp.where(was, walk.count, count),
        ended=jnp.where(was, walk.ended, ended),
        done=was | ended | (count >= rows.limit),
    )


def activations_of(lm: Decoder) -> Any:
    """Dtype of activations: that of the embeddings."""
    dtype = lm.wte.weight[...].dtype
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32
