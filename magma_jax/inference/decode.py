"""Generation in one compiled program: prefill, then a loop that stays on the device until every row has ended.

Prompts of a batch may differ in length. They are padded on the right; each row writes its new keys and values at its
own next position and sees only slots up to it, so it computes what it computes alone. The cache is allocated once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from magma_jax.inference.sampling import SamplingConfig, sample, step_keys
from magma_jax.models.decoder import Decoder, KVCache
from magma_jax.typing import Array, Float, Int, Key


class Generation(NamedTuple):
    """New tokens of every row.

    Attributes:
        tokens: (B, N); from the eos that ends a row on, every entry is that eos.
        lengths: (B,) number of tokens before the eos, at most N.
        logits: (B, N, V) that each token was chosen from, zeros where a finished batch stopped early; None unless
            asked for.
        cache: keys and values of prompts and all but the last of the new tokens.
    """

    tokens: Array
    lengths: Array
    logits: Array | None
    cache: KVCache


def generate(
    lm: Decoder,
    embeddings: Float[Array, "B S D"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    eos_id: int | Int[Array, ""] | None,
    return_logits: bool = False,
) -> Generation:
    """Continues every prompt by up to ``max_new_tokens`` tokens.

    Args:
        lm: a language model, with adapters or without.
        embeddings: prompts, padded on the right to S.
        lengths: true length of each prompt, at least 1.
        keys: one random key a row; step i of a row draws with ``fold_in(key, i)``.
        max_new_tokens: N; the caller has checked that it fits the context (``inference.api``).
        sampling: how a token is drawn.
        eos_id: id that ends a row, may be traced; None to never end early.
        return_logits: also return all logits (B, N, V).
    """
    batch, length, _ = embeddings.shape
    vocab_rows = lm.config.vocab_rows
    cache = lm.init_cache(batch, length + max_new_tokens, embeddings.dtype)
    output = lm(embeddings, cache=cache)
    last = jnp.take_along_axis(output.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    rows = jnp.arange(batch)

    def choose(step, logits, state):
        tokens, done, kept = state
        drawn = sample(logits, step_keys(keys, step), sampling, vocab_rows).astype(jnp.int32)
        if eos_id is not None:
            drawn = jnp.where(done, eos_id, drawn)
            done = done | (drawn == eos_id)
        if kept is not None:
            kept = kept.at[:, step].set(logits)
        return tokens.at[rows, step].set(drawn), done, kept

    def unfinished(carry):
        step, (_, done, _), _ = carry
        return (step < max_new_tokens) & ~done.all()

    def body(carry):
        step, state, cache = carry
        embedded = lm.embed(state[0][:, step - 1, None], embeddings.dtype)
        output = lm(embedded, positions=(lengths + step - 1)[:, None], cache=cache)
        return step + 1, choose(step, lm.logits(output.hidden[:, 0]), state), output.cache

    logits = lm.logits(last)
    state = (
        jnp.full((batch, max_new_tokens), 0 if eos_id is None else eos_id, jnp.int32),
        jnp.zeros(batch, bool),
        jnp.zeros((batch, max_new_tokens, logits.shape[-1])) if return_logits else None,
    )
    carry = (jnp.int32(1), choose(0, logits, state), output.cache)
    _, (tokens, _, kept), cache = jax.lax.while_loop(unfinished, body, carry)
    if eos_id is None:
        ended = jnp.full(batch, max_new_tokens)
    else:
        ended = jnp.sum(jnp.cumsum(tokens == eos_id, axis=1) == 0, axis=1)
    return Generation(tokens, ended, kept, cache)
