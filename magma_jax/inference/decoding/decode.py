"""Generation on the device: a prefill, then steps that stay there until every row has ended.

The unit is ``DecodeState``: a batch in which every row is at its own place. Each row writes its new keys and values
at its own next position and sees only slots up to it, has its own sampling numbers, key and limit, and so gives what
it gives alone, whoever its neighbours are. ``generate`` makes rows of a batch of prompts and runs them to their ends;
the engine (``inference.batching.engine``) keeps rows alive and lets requests join and leave.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from magma_jax.inference.decoding.config import Compat
from magma_jax.inference.decoding.sampling import MASKED, SamplingRows, sample
from magma_jax.models.language.decoder import Decoder
from magma_jax.nn.transformer.cache import KVCache
from magma_jax.typing import Array, Bool, Float, Int, Key, UInt32


class DecodeState(NamedTuple):
    """A batch in the middle of decoding.

    Attributes:
        cache: keys and values of everything before ``token``.
        token: (B,) the newest token of each row, not yet run through the model.
        position: (B,) position of ``token``.
        count: (B,) tokens sampled so far, ``token`` included.
        limit: (B,) tokens wanted at most.
        done: (B,) rows that have sampled the end of text or their limit, and idle ones.
        keys: (B,) random key of each row; token i is sampled with ``fold_in(key, i)``.
        sampling: numbers of each row.
        seen: (B, V) tokens that prompt and answer have, for the repetition penalty; None where no row has one.
        minimum: (B,) tokens before which the end of text is not sampled; None where no row has such a number.
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
    """What one step drew.

    Attributes:
        token: (B,).
        logprob: (B,) under the model, whatever the sampling made of it.
        logits: (B, V), None where nobody wants them.
        top: what could have been sampled, None where nobody asks.
    """

    token: Array
    logprob: Array
    logits: Array | None
    top: TopTokens | None = None


class Generation(NamedTuple):
    """New tokens of every row.

    Attributes:
        tokens: (B, N); behind the end of a row every entry is the eos.
        lengths: (B,) number of tokens before the eos, at most N.
        logprobs: (B, N) log-probability of each token under the model, whatever the sampling made of it.
        logits: (B, N, V) that each token was chosen from, zeros behind the end; None unless asked for.
        top: (B, N, K) the likeliest tokens in place of each; None unless asked for.
        cache: keys and values of prompts and all but the last of the new tokens.
    """

    tokens: Array
    lengths: Array
    logprobs: Array
    logits: Array | None
    top: TopTokens | None
    cache: KVCache

    def shortened(self, steps: int) -> "Generation":
        """With the first ``steps`` of the N new tokens."""
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
    eos_id: int | Int[Array, ""] | None,
    seen: Bool[Array, "B V"] | None = None,
    prefix: KVCache | None = None,
    compat: Compat = None,
    top: int = 0,
) -> tuple[DecodeState, SampledTokens]:
    """Runs prompts of any lengths, padded on the right, and draws the first token of each.

    ``slots`` is the size of the cache: what the rows may grow to, prompt included. ``prefix`` holds, as a batch of
    one without free slots, what stands before every prompt and has been run already.
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
    return sample_tokens(lm, rows, logits, eos_id, compat, top)


def run_prompts(
    lm: Decoder,
    embeddings: Float[Array, "B S D"],
    lengths: Int[Array, " B"],
    *,
    slots: int,
    prefix: KVCache | None = None,
) -> tuple[KVCache, Float[Array, "B V"]]:
    """The cache of prompts, with ``slots`` slots, and the logits of what follows them; ``prefix`` as in ``prefill``."""
    batch, length, _ = embeddings.shape
    cache, start = lm.init_cache(batch, slots, embeddings.dtype), 0
    if prefix is not None:
        start = prefix.slots
        cache = jax.tree.map(lambda all_, common: all_.at[..., :start, :].set(common), cache, prefix)
    positions = jnp.broadcast_to(start + jnp.arange(length), (batch, length))
    output = lm(embeddings, positions=positions, cache=cache)
    last = jnp.take_along_axis(output.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    assert output.cache is not None  # one was given
    return output.cache, lm.logits(last)


def advance(
    lm: Decoder,
    rows: DecodeState,
    *,
    eos_id: int | Int[Array, ""] | None,
    compat: Compat = None,
    top: int = 0,
    allowed: UInt32[Array, "B W"] | None = None,
) -> tuple[DecodeState, SampledTokens]:
    """Runs the newest token of every row and draws the next. Rows that are done compute, and stay what they are."""
    embedded = lm.embed(rows.token[:, None], rows.cache.dtype)
    output = lm(embedded, positions=rows.position[:, None], cache=rows.cache)
    return sample_tokens(
        lm, rows._replace(cache=output.cache), lm.logits(output.hidden[:, 0]), eos_id, compat, top, allowed
    )


def run(
    lm: Decoder,
    rows: DecodeState,
    steps: int,
    *,
    eos_id: int | Int[Array, ""] | None,
    compat: Compat = None,
    keep_logits: bool = False,
    top: int = 0,
    enough: Int[Array, ""] | None = None,
    allowed: UInt32[Array, "B W"] | None = None,
) -> tuple[DecodeState, SampledTokens]:
    """Up to ``steps`` steps, fewer if all rows end, or ``enough`` of those that had not ended before.

    ``allowed`` as in ``draw``: for one step, as what may come next depends on what came.

    Returns the rows, and what was sampled with a column a step, (B, N), (B, N, V) and (B, N, K); logits are None unless
    kept, ``top`` is the number K of likeliest tokens. The
    first ``count`` (after) - ``count`` (before) columns of a row are its new tokens; behind them stands the eos.
    """
    batch = rows.token.shape[0]
    sampled = SampledTokens(
        jnp.full((batch, steps), 0 if eos_id is None else eos_id, jnp.int32),
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
        rows, new = advance(lm, rows, eos_id=eos_id, compat=compat, top=top, allowed=allowed)
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
    eos_id: int | Int[Array, ""] | None,
    limit: Int[Array, " B"] | None = None,
    return_logits: bool = False,
    seen: Bool[Array, "B V"] | None = None,
    prefix: KVCache | None = None,
    compat: Compat = None,
    top: int = 0,
) -> Generation:
    """Continues every prompt by up to ``max_new_tokens`` tokens.

    Args:
        lm: a language model, with adapters or without.
        embeddings: prompts, padded on the right to S.
        lengths: true length of each prompt, at least 1.
        keys: one random key a row; token i of a row is sampled with ``fold_in(key, i)``.
        max_new_tokens: N; the caller has checked that it fits the context (``inference.batched``).
        sampling: how each row's tokens are sampled.
        eos_id: id that ends a row, may be traced; None to never end early.
        limit: tokens wanted of each row, where that is fewer than N.
        return_logits: also return all logits (B, N, V).
        seen: tokens that the prompts have, where a row has a repetition penalty.
        prefix: keys and values of what all prompts begin with, see ``prefill``; its positions come before theirs.
        compat: static, see ``SamplingConfig``.
        top: static, how many of the likeliest tokens to return beside each token.
    """
    batch, length, _ = embeddings.shape
    limit = jnp.full(batch, max_new_tokens) if limit is None else limit
    options = {"eos_id": eos_id, "compat": compat, "top": top}
    slots = length + max_new_tokens + (0 if prefix is None else prefix.slots)
    rows, first = prefill(
        lm, embeddings, lengths, keys, sampling, limit, slots=slots, seen=seen, prefix=prefix, **options
    )
    rows, rest = run(lm, rows, max_new_tokens - 1, keep_logits=return_logits, **options)
    first = first if return_logits else first._replace(logits=None)
    sampled = jax.tree.map(lambda one, others: jnp.concatenate([one[:, None], others], axis=1), first, rest)
    counts = rows.count
    if eos_id is not None:
        # The eos itself is no part of the answer.
        counts = jnp.minimum(counts, jnp.sum(jnp.cumsum(sampled.token == eos_id, axis=1) == 0, axis=1))
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
    eos_id: int | Int[Array, ""] | None,
    compat: Compat = None,
    top: int = 0,
    allowed: UInt32[Array, "B W"] | None = None,
) -> tuple[DecodeState, SampledTokens]:
    """Draws the next token of every row from its logits, and moves on the rows that are not done.

    ``allowed`` has a bit a token, lowest first: only such tokens are sampled. Log-probabilities are the model's,
    whatever is allowed.
    """
    keys = jax.vmap(jax.random.fold_in)(rows.keys, rows.count)
    table = lm.config.vocab_rows
    drawable = logits
    if allowed is not None:
        drawable = jnp.where(_bits(allowed, logits.shape[-1]), logits, MASKED)
    if rows.minimum is not None and eos_id is not None:
        too_early = (rows.count < rows.minimum)[:, None] & (jnp.arange(logits.shape[-1]) == eos_id)
        drawable = jnp.where(too_early, MASKED, drawable)
    token = sample(drawable, keys, rows.sampling, table_rows=table, seen=rows.seen, compat=compat).astype(jnp.int32)
    logprobs = jax.nn.log_softmax(logits[:, :table])
    logprob = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
    likeliest = TopTokens(*reversed(jax.lax.top_k(logprobs, top))) if top else None
    alive = ~rows.done
    count = rows.count + alive
    done = rows.done | (count >= rows.limit)
    if eos_id is not None:
        token = jnp.where(alive, token, eos_id)
        done = done | (token == eos_id)
    seen = rows.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].max(alive)
    # A row that is done keeps its position: what it goes on to compute is written where nothing is read.
    rows = rows._replace(token=token, position=rows.position + alive, count=count, done=done, seen=seen)
    return rows, SampledTokens(token, logprob, logits, likeliest)


def _bits(words: UInt32[Array, "B W"], count: int) -> Bool[Array, "B {count}"]:
    """The first ``count`` bits of every row."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(words.shape[0], -1)[:, :count].astype(bool)
