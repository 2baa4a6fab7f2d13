"""From samples to batches of tokens and pictures, with Grain: shuffled, mixed, and resumable to the exact sample.

A sample is any object with ``prompt`` (given), ``answer`` (to be learned) and ``picture`` (a row of the picture
array, or None). Batches are those of ``data.batching``, with ``pictures`` beside ``tokens`` and ``labels``.
"""

from collections.abc import Sequence
from typing import Any, Literal

import grain
import numpy as np

from magma_jax.data.batching import packed_batches, padded_batches
from magma_jax.data.tokenizer import Tokenizer
from magma_jax.training.losses import IGNORED
from magma_jax.typing import Int

Overlong = Literal["error", "truncate"]


def encode_sample(
    sample: Any, tokenizer: Tokenizer, length: int, *, learn_prompt: bool = False, overlong: Overlong = "error"
) -> dict[str, Any]:
    """Tokens of prompt, answer and one eos, and their labels, which ignore the prompt.

    With ``overlong="truncate"`` what exceeds ``length`` is cut off at the end, where the eos is, and ``truncated``
    says 1 for such a sample and 0 for others.

    Raises:
        ValueError: the sample does not fit; it is never cut silently.
    """
    prompt = tokenizer.encode(sample.prompt)
    tokens = [*prompt, *tokenizer.encode(sample.answer), tokenizer.eos_id]
    if len(tokens) > length and overlong == "error":
        text = sample.prompt + sample.answer
        raise ValueError(
            f"{text!r:.80} has {len(tokens)} tokens, but data.length is {length}; raise it, or cut such samples "
            "with data.overlong=truncate"
        )
    labels = [*([] if learn_prompt else [IGNORED] * len(prompt)), *tokens[0 if learn_prompt else len(prompt) :]]
    encoded = {"tokens": np.array(tokens[:length], np.int32), "labels": np.array(labels[:length], np.int32)}
    if sample.picture is not None:
        encoded["pictures"] = np.int32(sample.picture)
    if overlong == "truncate":
        encoded["truncated"] = np.int32(len(tokens) > length)
    return encoded


def sample_batches(
    sources: Sequence[Sequence[Any]],
    weights: Sequence[float],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int,
    rows: Sequence[int] | None = None,
    buckets: Sequence[int] = (),
    pack: int = 1,
    overlong: Overlong = "error",
    learn_prompt: bool = False,
) -> grain.IterDataset:
    """Endless batches that mix ``sources`` by ``weights``; every source is reshuffled each time it is used up.

    Args:
        rows: those of every batch that are wanted, all by default.
        buckets: lengths below ``length`` that batches of shorter samples may have.
        pack: how many samples may share a row of ``length`` tokens; with 1, batches are padded and not packed.
        overlong: what happens to samples of more than ``length`` tokens, see ``encode_sample``.
    """
    datasets = [
        grain.MapDataset.source(source)
        .seed(seed + i)
        .shuffle()
        .repeat()
        .map(lambda s: encode_sample(s, tokenizer, length, learn_prompt=learn_prompt, overlong=overlong))
        for i, source in enumerate(sources)
    ]
    samples = grain.MapDataset.mix(datasets, list(weights))
    options = {"batch_size": batch_size, "rows": rows or range(batch_size), "pad_id": tokenizer.pad_id}
    if pack > 1:
        return packed_batches(samples, length=length, pack=pack, **options)
    return padded_batches(samples, buckets=(*buckets, length), seed=seed, **options)


def text_batches(
    tokens: Int[np.ndarray, " N"],
    labels: Int[np.ndarray, " N"],
    *,
    batch_size: int,
    length: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> grain.IterDataset:
    """Endless batches of ``length`` consecutive tokens of one long text, with their labels; of them only ``rows``."""
    end = len(tokens) // length * length
    blocks = np.stack([array[:end].reshape(-1, length) for array in (tokens, labels)], axis=1)
    dataset = grain.MapDataset.source(blocks).seed(seed).shuffle().repeat()
    dataset = dataset.map(lambda block: {"tokens": block[0], "labels": block[1]})
    # Every block fills its row: there is nothing to pad.
    return padded_batches(
        dataset, batch_size=batch_size, rows=rows or range(batch_size), buckets=(length,), pad_id=0, seed=seed
    )
