"""Generation on the device: a prefill, then a decoding loop on the device until every row has ended.

``DecodeState`` is a batch in which every row has its own position. Each row writes its new keys and values at its own
next position, sees only slots up to it, and has its own sampling parameters, key and limit, so its result does not
depend on the other rows. ``generate`` runs a batch of prompts to their ends; the engine
(``inference.batching.engine``) keeps rows alive and lets requests join and leave.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from magma_jax.inference.decoding.config import Compat
from magma_jax.inference.decoding.sampling import MASKED, SamplingRows, sample
from magma_jax.models.language.decoder import Decoder
from magma_jax.nn.transformer.cache import KVCache
from magma_jax.typing import Array, Bool, Float, Int, Key, UInt32

# Ids that end a text, possibly traced; the first one also fills the places after an end.
Ends: TypeAlias = tuple[int | Int[Array, ""], ...]


class DecodeState(NamedTuple):
    """State of a batch during decoding.

    Attributes:
        cache: keys and values of all positions before ``token``.
        token: (B,) the newest token of each row, not yet run through the model.
        position: (B,) position of ``token``.
        count: (B,) tokens sampled so far, ``token`` included.
        limit: (B,) maximum number of tokens.
        done: (B,) whether a row has reached an end of text or its limit, or is idle.
        keys: (B,) random key of each row; token i is sampled with ``fold_in(key, i)``.
        sampling: sampling parameters of each row.
        seen: (B, V) tokens that occur in prompt or answer, for the repetition penalty; None if no row has one.
        minimum: (B,) number of tokens before which no end of text is sampled; None if no row has a minimum.
    """

    cache: KVCache
    token: Array
    position: Array
    count: Array
    limit: Array
    done: Array
    keys: Array
    sampling: SamplingRows
    seen: Array | None
    minimum: Array | None = None


class TopTokens(NamedTuple):
    """The K likeliest tokens under the model, likeliest first: ids and log-probabilities, (B, K) each."""

    token: Array
    logprob: Array


class SampledTokens(NamedTuple):
    """Tokens sampled in one step.

    Attributes:
        token: (B,) token ids.
        logprob: (B,) log-probabilities under the model, before sampling filters.
        logits: (B, V); None unless requested.
        top: the likeliest alternatives; None unless requested.
    """

    token: Array
    logprob: Array
    logits: Array | None
    top: TopTokens | None = None


class Generation(NamedTuple):
    """New tokens of every row.

    Attributes:
        tokens: (B, N) token ids; all entries after the end of a row are the first of ``Ends``.
        lengths: (B,) number of tokens before the end of text, at most N.
        logprobs: (B, N) log-probability of each token under the model, before sampling filters.
        logits: (B, N, V) logits that each token was sampled from, zeros after the end; None unless requested.
        top: (B, N, K) the likeliest alternatives to each token; None unless requested.
        cache: keys and values of prompts and all but the last of the new tokens.
    """

    tokens: Array
    lengths: Array
    logprobs: Array
    logits: Array | None
    top: TopTokens | None
    cache: KVCache

    def shortened(self, steps: int) -> "Generation":
        """The generation cut to the first ``steps`` of the N new tokens."""
        if steps == self.tokens.shape[1]:
            return self
        per_token = self._replace(lengths=None, cache=None)
        shorter = jax.tree.map(lambda leaf: leaf[:, :steps], per_token)
        return shorter._replace(lengths=self.lengths, cache=self.cache)


def prefill(
    lm: Decoder,
    embeddings: Float[Array, "B S D"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    sampling: SamplingRows,
    limit: Int[Array, " B"],
    *,
    slots: int,
    ends: Ends,
    seen: Bool[Array, "B V"] | None = None,
    prefix: KVCache | None = None,
    compat: Compat = None,
    top: int = 0,
) -> tuple[DecodeState, SampledTokens]:
    """Runs right-padded prompts of any lengths and samples the first token of each.

    ``slots`` is the size of the cache: the maximum length of a row, prompt included. ``prefix`` is the cache of a
    prefix common to all prompts, as a batch of one without free slots.
    """
    cache, logits = run_prompts(lm, embeddings, lengths, slots=slots, prefix=prefix)
    start = 0 if prefix is None else prefix.slots
    zeros = jnp.zeros(embeddings.shape[0], jnp.int32)
    rows = DecodeState(
        cache=cache,
        token=zeros,
        position=start + lengths - 1,
        count=zeros,
        limit=limit,
        done=limit < 1,
        keys=keys,
        sampling=sampling,
        seen=seen,
    )
    return sample_tokens(lm, rows, logits, ends, compat, top)


def run_prompts(
    lm: Decoder,
    embeddings: Float[Array, "B S D"],
    lengths: Int[Array, " B"],
    *,
    slots: int,
    prefix: KVCache | None = None,
    head: Callable[[Float[Array, "B D"]], Float[Array, "B V"]] | None = None,
) -> tuple[KVCache, Float[Array, "B V"]]:
    """The cache of prompts, with ``slots`` slots, and their next-token logits.

    ``prefix`` is that of ``prefill``; ``head`` makes logits of final hidden states, by default ``lm.logits``.
    """
    batch, length, _ = embeddings.shape
    cache, start = lm.init_cache(batch, slots, embeddings.dtype), 0
    if prefix is not None:
        start = prefix.slots
        cache = jax.tree.map(lambda all_, common: all_.at[..., :start, :].set(common), cache, prefix)
    positions = jnp.broadcast_to(start + jnp.arange(length), (batch, length))
    output = lm(embeddings, positions=positions, cache=cache)
    last = jnp.take_along_axis(output.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    assert output.cache is not None  # one was given
    return output.cache, (head or lm.logits)(last)


def advance(
    lm: Decoder,
    rows: DecodeState,
    *,
    ends: Ends,
    compat: Compat = None,
    top: int = 0,
    allowed: UInt32[Array, "B W"] | None = None,
) -> tuple[DecodeState, SampledTokens]:
    """Runs the newest token of every row and samples the next; finished rows are computed but stay unchanged."""
    embedded = lm.embed(rows.token[:, None], rows.cache.dtype)
    output = lm(embedded, positions=rows.position[:, None], cache=rows.cache)
    return sample_tokens(
        lm, rows._replace(cache=output.cache), lm.logits(output.hidden[:, 0]), ends, compat, top, allowed
    )


def run(
    lm: Decoder,
    rows: DecodeState,
    steps: int,
    *,
    ends: Ends,
    compat: Compat = None,
    keep_logits: bool = False,
    top: int = 0,
    enough: Int[Array, ""] | None = None,
    allowed: UInt32[Array, "B W"] | None = None,
) -> tuple[DecodeState, SampledTokens]:
    """Runs up to ``steps`` steps; stops early once all rows, or ``enough`` of the unfinished ones, have ended.

    ``allowed`` as in ``sample_tokens``; it requires a single step, since the next mask depends on the sampled token.

    Returns the rows and the sampled tokens, one column per step: (B, N), (B, N, V) and (B, N, K). Logits are None
    unless ``keep_logits``; K is ``top``. The first ``count`` (after) - ``count`` (before) columns of a row are its new
    tokens; the first of ``ends`` fills the rest.
    """
    batch = rows.token.shape[0]
    sampled = SampledTokens(
        jnp.full((batch, steps), ends[0] if ends else 0, jnp.int32),
        jnp.zeros((batch, steps)),
        jnp.zeros((batch, steps, lm.config.head_rows)) if keep_logits else None,
        TopTokens(jnp.zeros((batch, steps, top), jnp.int32), jnp.zeros((batch, steps, top))) if top else None,
    )

    if not steps:
        return rows, sampled

    before = rows.done.sum()

    def unfinished(carry):
        step, rows, _ = carry
        going = (step < steps) & ~rows.done.all()
        return going if enough is None else going & (rows.done.sum() - before < enough)

    def body(carry):
        step, rows, sampled = carry
        rows, new = advance(lm, rows, ends=ends, compat=compat, top=top, allowed=allowed)
        new = new if keep_logits else new._replace(logits=None)
        return step + 1, rows, jax.tree.map(lambda all_, one: all_.at[:, step].set(one), sampled, new)

    _, rows, sampled = jax.lax.while_loop(unfinished, body, (jnp.int32(0), rows, sampled))
    return rows, sampled


def generate(
    lm: Decoder,
    embeddings: Float[Array, "B S D"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    *,
    max_new_tokens: int,
    sampling: SamplingRows,
    ends: Ends,
    limit: Int[Array, " B"] | None = None,
    return_logits: bool = False,
    seen: Bool[Array, "B V"] | None = None,
    prefix: KVCache | None = None,
    compat: Compat = None,
    top: int = 0,
) -> Generation:
    """Continues every prompt by up to ``max_new_tokens`` tokens.

    Args:
        lm: a language model, with or without adapters.
        embeddings: prompts, right-padded to S.
        lengths: unpadded length of each prompt, at least 1.
        keys: one random key per row; token i of a row is sampled with ``fold_in(key, i)``.
        max_new_tokens: N; the caller has checked that it fits the context (``inference.batched``).
        sampling: sampling parameters of each row.
        ends: ids that end a row, empty to never end early.
        limit: per-row maximum number of tokens, if below N.
        return_logits: also return all logits (B, N, V).
        seen: tokens of the prompts, required if a row has a repetition penalty.
        prefix: cache of a common prefix of all prompts, see ``prefill``; its positions precede theirs.
        compat: static, see ``SamplingConfig``.
        top: static, number of likeliest alternatives to return for each token.
    """
    batch, length, _ = embeddings.shape
    limit = jnp.full(batch, max_new_tokens) if limit is None else limit
    options = {"ends": ends, "compat": compat, "top": top}
    slots = length + max_new_tokens + (0 if prefix is None else prefix.slots)
    rows, first = prefill(
        lm, embeddings, lengths, keys, sampling, limit, slots=slots, seen=seen, prefix=prefix, **options
    )
    rows, rest = run(lm, rows, max_new_tokens - 1, keep_logits=return_logits, **options)
    first = first if return_logits else first._replace(logits=None)
    sampled = jax.tree.map(lambda one, others: jnp.concatenate([one[:, None], others], axis=1), first, rest)
    counts = rows.count
    if ends:
        # The end of text is not part of the answer.
        counts = jnp.minimum(counts, jnp.sum(jnp.cumsum(is_end(sampled.token, ends), axis=1) == 0, axis=1))
    return Generation(
        tokens=sampled.token,
        lengths=counts,
        logprobs=sampled.logprob,
        logits=sampled.logits,
        top=sampled.top,
        cache=rows.cache,
    )


def sample_tokens(
    lm: Decoder,
    rows: DecodeState,
    logits: Float[Array, "B V"],
    ends: Ends,
    compat: Compat = None,
    top: int = 0,
    allowed: UInt32[Array, "B W"] | None = None,
) -> tuple[DecodeState, SampledTokens]:
    """Samples the next token of every row from its logits and advances the unfinished rows.

    ``allowed`` has one bit per token, lowest first; only allowed tokens are sampled. Log-probabilities are the model's,
    before masking.
    """
    keys = jax.vmap(jax.random.fold_in)(rows.keys, rows.count)
    table = lm.config.vocab_rows
    drawable = logits
    if allowed is not None:
        drawable = jnp.where(_bits(allowed, logits.shape[-1]), logits, MASKED)
    if rows.minimum is not None and ends:
        too_early = (rows.count < rows.minimum)[:, None] & is_end(jnp.arange(logits.shape[-1]), ends)
        drawable = jnp.where(too_early, MASKED, drawable)
    token = sample(drawable, keys, rows.sampling, table_rows=table, seen=rows.seen, compat=compat).astype(jnp.int32)
    logprobs = jax.nn.log_softmax(logits[:, :table])
    logprob = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
    likeliest = TopTokens(*reversed(jax.lax.top_k(logprobs, top))) if top else None
    alive = ~rows.done
    count = rows.count + alive
    done = rows.done | (count >= rows.limit)
    if ends:
        token = jnp.where(alive, token, ends[0])
        done = done | is_end(token, ends)
    seen = rows.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].max(alive)
    # A finished row keeps its position, so its further writes go to a slot that is never read.
    rows = rows._replace(token=token, position=rows.position + alive, count=count, done=done, seen=seen)
    return rows, SampledTokens(token, logprob, logits, likeliest)


def is_end(tokens: Int[Array, "*shape"], ends: Ends) -> Bool[Array, "*shape"]:
    """Which tokens are ends of text."""
    return functools.reduce(jnp.logical_or, [tokens == end for end in ends], jnp.zeros(tokens.shape, bool))


def _bits(words: UInt32[Array, "B W"], count: int) -> Bool[Array, "B {count}"]:
    """The first ``count`` bits of every row."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(words.shape[0], -1)[:, :count].astype(bool)
