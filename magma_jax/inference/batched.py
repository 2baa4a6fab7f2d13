"""Several prompts as one batch of embeddings, and its continuation by a model that writes token by token."""

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
    """Prompts with their lengths; without them all are as long as the array."""
    if isinstance(embeddings, PromptBatch):
        return embeddings
    return PromptBatch(embeddings, jnp.full(embeddings.shape[0], embeddings.shape[1]))


def pad_to_bucket(embeddings: Float[Array, "B S D"]) -> Float[Array, "B S2 D"]:
    """Embeddings padded on the right to a declared length."""
    length = embeddings.shape[1]
    return jnp.pad(embeddings, ((0, 0), (0, SEQUENCES.fit(length) - length), (0, 0)))


def check_room(model: TokenGenerator, batch: PromptBatch, max_steps: int) -> None:
    """Raises ValueError where prompts and ``max_steps`` new tokens do not fit the context."""
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
    """Continues prompts, as token ids with lengths and log-probabilities.

    Args:
        model: any that writes token by token.
        embeddings: of the prompts, from ``model.preprocess_batch``; ``PromptBatch.repeat`` gives several samples.
        max_steps: new tokens at most.
        sampling: how they are sampled.
        seed: one seed a row, each giving its row what it gives alone; or one number, from which row i draws its own.
        return_logits: also return all logits.
        top_logprobs: also return so many of the likeliest tokens in place of each token.

    Raises:
        ValueError: no room in the context, or a repetition penalty for prompts whose words are not known.
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
        # One program for all numbers up to the next declared length; where to stop is data.
        max_new_tokens=SEQUENCES.fit(max_steps),
        limit=np.full(rows, max_steps, np.int32),
        sampling=sampling_rows([sampling] * rows),
        compat=sampling.compat,
        eos_id=model.tokenizer.eos_id,
        return_logits=return_logits,
        seen=batch.seen if penalizes else None,
        top=top_logprobs,
    )
    return result.shortened(max_steps)


@platform_jit(static_argnames=("graphdef", "max_new_tokens", "compat", "eos_id", "return_logits", "top"))
def generate_program(graphdef, params, embeddings, lengths, keys, **options) -> Generation:
    """The program of ``generate_tokens``, see ``decoding.decode.generate``."""
    return generate(merge(graphdef, params).lm, embeddings, lengths, keys, **options)


def _row_keys(seed: int | Sequence[int], rows: int) -> Array:
    if isinstance(seed, int | np.integer):
        return row_keys(seed_key(int(seed)), rows)
    if len(seed) != rows:
        raise ValueError(f"{len(seed)} seeds for {rows} rows; give one a row, or a single number")
    # As a batch of one draws with a single number.
    return jnp.concatenate([row_keys(seed_key(one), 1) for one in seed])
