"""Batched generation: several prompts as one batch of embeddings, continued by an autoregressive text model."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from magma_jax.inference.buckets import SEQUENCES
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.decode import Generation, generate
from magma_jax.inference.decoding.sampling import row_keys, sampling_rows, seed_key
from magma_jax.inference.generator import TokenGenerator
from magma_jax.inference.prompts import PromptBatch
from magma_jax.nn.modules import merge
from magma_jax.runtime.compile import platform_jit
from magma_jax.typing import Array, Float


def as_batch(embeddings: Array | PromptBatch) -> PromptBatch:
    """Prompts with their lengths; for a plain array all lengths are its own."""
    if isinstance(embeddings, PromptBatch):
        return embeddings
    return PromptBatch(embeddings, jnp.full(embeddings.shape[0], embeddings.shape[1]))


def pad_to_bucket(embeddings: Float[Array, "B S D"]) -> Float[Array, "B S2 D"]:
    """Embeddings right-padded to a declared length."""
    length = embeddings.shape[1]
    return jnp.pad(embeddings, ((0, 0), (0, SEQUENCES.fit(length) - length), (0, 0)))


def check_room(model: TokenGenerator, batch: PromptBatch, max_steps: int) -> None:
    """Raises ValueError if prompts and ``max_steps`` new tokens exceed the context."""
    longest, context = int(batch.lengths.max()), model.lm_config.context_length
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if longest + max_steps > context:
        raise ValueError(
            f"the longest prompt has {longest} positions and {max_steps} new tokens were asked for, but the "
            f"context holds {context}; shorten the prompt or lower max_steps"
        )


def generate_tokens(
    model: TokenGenerator,
    embeddings: Float[Array, "B S D"] | PromptBatch,
    max_steps: int,
    sampling: SamplingConfig = SamplingConfig(),
    *,
    seed: int | Sequence[int] = 0,
    return_logits: bool = False,
    top_logprobs: int = 0,
) -> Generation:
    """Continues prompts; returns token ids with lengths and log-probabilities.

    Args:
        model: any autoregressive text model.
        embeddings: from ``model.preprocess_batch``; ``PromptBatch.repeat`` gives several samples of each prompt.
        max_steps: maximum number of new tokens.
        sampling: sampling parameters.
        seed: one seed per row, which gives the row the same result as on its own; or one number, from which row i
            derives its own.
        return_logits: also return all logits.
        top_logprobs: number of likeliest alternatives to return for each token.

    Raises:
        ValueError: no room in the context, or a repetition penalty for prompts whose words are unknown.
    """
    batch = as_batch(embeddings)
    penalizes = sampling.repetition_penalty != 1
    if penalizes and batch.seen is None:
        raise ValueError("a repetition penalty needs the prompts' words: give what preprocess_batch returned")
    check_room(model, batch, max_steps)
    padded = pad_to_bucket(batch.embeddings)
    rows = padded.shape[0]
    result = generate_program(
        model.graphdef,
        model.params,
        padded,
        batch.lengths,
        _row_keys(seed, rows),
        # One program serves all step counts up to the next declared length; the actual limit is data.
        max_new_tokens=SEQUENCES.fit(max_steps),
        limit=np.full(rows, max_steps, np.int32),
        sampling=sampling_rows([sampling] * rows),
        compat=sampling.compat,
        ends=model.tokenizer.end_ids,
        return_logits=return_logits,
        seen=batch.seen if penalizes else None,
        top=top_logprobs,
    )
    return result.shortened(max_steps)


@platform_jit(static_argnames=("graphdef", "max_new_tokens", "compat", "ends", "return_logits", "top"))
def generate_program(graphdef, params, embeddings, lengths, keys, **options) -> Generation:
    """The program of ``generate_tokens``, see ``decoding.decode.generate``."""
    return generate(merge(graphdef, params).lm, embeddings, lengths, keys, **options)


def _row_keys(seed: int | Sequence[int], rows: int) -> Array:
    if isinstance(seed, int | np.integer):
        return row_keys(seed_key(int(seed)), rows)
    if len(seed) != rows:
        raise ValueError(f"{len(seed)} seeds for {rows} rows; give one a row, or a single number")
    # The same key as in a batch of one with a single number.
    return jnp.concatenate([row_keys(seed_key(one), 1) for one in seed])
