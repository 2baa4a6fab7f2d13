"""From samples to batches of tokens and pictures, with Grain: shuffled, mixed, and resumable to the exact sample.

A sample is any object with ``prompt`` (given), ``answer`` (to be learned) and ``picture`` (a row of the picture
array, or None). A batch is a dict of arrays: ``tokens`` and ``labels`` (B, S), and ``pictures`` (B,) rows.
"""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from magma_jax.data.tokenizer import Tokenizer
from magma_jax.training.losses import IGNORED
from magma_jax.typing import Int


def encode_sample(sample: Any, tokenizer: Tokenizer, length: int, *, learn_prompt: bool = False) -> dict[str, Any]:
    """Tokens of prompt, answer and one eos, padded with eos to ``length``; labels ignore prompt and padding.

    Raises:
        ValueError: the sample does not fit; it is never cut silently.
    """
    prompt = tokenizer.encode(sample.prompt)
    tokens = [*prompt, *tokenizer.encode(sample.answer), tokenizer.eos_id]
    if len(tokens) > length:
        text = sample.prompt + sample.answer
        raise ValueError(f"{text!r:.80} has {len(tokens)} tokens, but data.length is {length}; raise it")
    labels = np.full(length, IGNORED, np.int32)
    first = 0 if learn_prompt else len(prompt)
    labels[first : len(tokens)] = tokens[first:]
    encoded = {"tokens": np.array(tokenizer.pad_to(tokens, length), np.int32), "labels": labels}
    return encoded if sample.picture is None else encoded | {"pictures": np.int32(sample.picture)}


def sample_batches(
    sources: Sequence[Sequence[Any]],
    weights: Sequence[float],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int,
    learn_prompt: bool = False,
) -> grain.IterDataset:
    """Endless batches that mix ``sources`` by ``weights``; every source is reshuffled each time it is used up."""
    datasets = [
        grain.MapDataset.source(source)
        .seed(seed + i)
        .shuffle()
        .repeat()
        .map(lambda sample: encode_sample(sample, tokenizer, length, learn_prompt=learn_prompt))
        for i, source in enumerate(sources)
    ]
    mixed = grain.MapDataset.mix(datasets, list(weights)).batch(batch_size)
    return mixed.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))


def text_batches(
    tokens: Int[np.ndarray, " N"], labels: Int[np.ndarray, " N"], *, batch_size: int, length: int, seed: int
) -> grain.IterDataset:
    """Endless batches of ``length`` consecutive tokens of one long text, with their labels."""
    end = len(tokens) // length * length
    blocks = np.stack([array[:end].reshape(-1, length) for array in (tokens, labels)], axis=1)
    dataset = grain.MapDataset.source(blocks).seed(seed).shuffle().repeat()
    dataset = dataset.map(lambda block: {"tokens": block[0], "labels": block[1]}).batch(batch_size)
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
