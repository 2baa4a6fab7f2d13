"""Batches of tokens and images from samples, with Grain: shuffled, mixed, and resumable to the exact sample.

A sample is a ``data.format.records.Sample`` or a similar object whose ``image`` may be None. Batches are those of
``data.batches.batching``, with ``images`` beside ``tokens`` and ``labels``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import grain
import numpy as np

from magma_jax.data.batches.batching import packed_batches, padded_batches
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.typing import IGNORED, Int

Overlong = Literal["error", "truncate"]


def encode_sample(
    sample: Any,
    tokenizer: Tokenizer,
    length: int,
    *,
    overlong: Overlong = "error",
    classes: Sequence[str] = (),
) -> dict[str, Any]:
    """Tokens of prompt, answer and one eos, and their labels, which ignore the prompt unless it is learned.

    With ``classes`` the answer is a class: the tokens are the prompt and one eos, whose label, the class index, is the
    only one.

    ``overlong="truncate"`` cuts off tokens beyond ``length`` at the end, including the eos (for a class, at the end of
    the prompt), and sets ``truncated`` to 1 for such a sample and to 0 for others.

    Raises:
        ValueError: the sample is longer than ``length`` (samples are never cut silently), or its answer is not a class.
    """
    prompt = tokenizer.encode(sample.prompt, first=True)
    answer = [] if classes else tokenizer.encode(sample.answer, first=not prompt)
    excess = len(prompt) + len(answer) + 1 - length
    if excess > 0 and overlong == "error":
        text = sample.prompt + sample.answer
        raise ValueError(
            f"{text!r:.80} has {length + excess} tokens, but data.length is {length}; raise it, or cut such samples "
            "with data.overlong=truncate"
        )
    if classes:
        tokens = [*prompt[: length - 1], tokenizer.eos_id]
        labels = [*[IGNORED] * (len(tokens) - 1), _class_number(sample, classes)]
    else:
        tokens = [*prompt, *answer, tokenizer.eos_id][:length]
        labels = (prompt if sample.learn_prompt else [IGNORED] * len(prompt)) + [*answer, tokenizer.eos_id]
        labels = labels[:length]
    encoded: dict[str, Any] = {"tokens": np.array(tokens, np.int32), "labels": np.array(labels, np.int32)}
    if sample.image is not None:
        encoded["image_rows"] = np.int32(sample.image)
    if overlong == "truncate":
        encoded["truncated"] = np.int32(excess > 0)
    return encoded


def text_padding(tokenizer: Tokenizer) -> dict[str, int]:
    """Padding values of the arrays of ``encode_sample``."""
    return {"tokens": tokenizer.pad_id, "labels": IGNORED}


def _class_number(sample: Any, classes: Sequence[str]) -> int:
    name = sample.answer.strip()
    if name not in classes:
        raise ValueError(f"answer {name!r} to {sample.prompt!r:.60} is none of data.classes: {', '.join(classes)}")
    return list(classes).index(name)


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
) -> grain.IterDataset:
    """Endless batches that mix ``sources`` by ``weights``; every source is reshuffled each epoch.

    Args:
        rows: rows to return of every batch; default: all.
        buckets: padded lengths below ``length`` for batches of shorter samples.
        pack: maximum number of samples per row of ``length`` tokens; 1 for padding instead of packing.
        overlong: handling of samples of more than ``length`` tokens, see ``encode_sample``.
    """
    datasets = [
        grain.MapDataset.source(source)
        .seed(seed + i)
        .shuffle()
        .repeat()
        .map(lambda s: encode_sample(s, tokenizer, length, overlong=overlong))
        for i, source in enumerate(sources)
    ]
    samples = grain.MapDataset.mix(datasets, list(weights))
    return form_batches(
        samples,
        batch_size=batch_size,
        length=length,
        seed=seed,
        rows=rows,
        buckets=buckets,
        pack=pack,
        padding=text_padding(tokenizer),
    )


def form_batches(
    samples: grain.MapDataset,
    *,
    batch_size: int,
    length: int,
    seed: int,
    padding: Mapping[str, int],
    rows: Sequence[int] | None = None,
    buckets: Sequence[int] = (),
    pack: int = 1,
) -> grain.IterDataset:
    """Batches of encoded samples: packed, or padded to a bucket; arguments as of ``sample_batches``."""
    options = {"batch_size": batch_size, "rows": rows or range(batch_size), "padding": padding}
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
    """Endless batches of ``length`` consecutive tokens of one long text, with their labels; returns only ``rows``."""
    end = len(tokens) // length * length
    blocks = np.stack([array[:end].reshape(-1, length) for array in (tokens, labels)], axis=1)
    # Grain accepts an array, though its annotation asks for a sequence.
    dataset = grain.MapDataset.source(blocks)  # pyright: ignore[reportArgumentType]
    dataset = dataset.seed(seed).shuffle().repeat()
    dataset = dataset.map(lambda block: {"tokens": block[0], "labels": block[1]})
    # Blocks fill their rows, so nothing is padded.
    padding = {"tokens": 0, "labels": IGNORED}
    return padded_batches(
        dataset, batch_size=batch_size, rows=rows or range(batch_size), buckets=(length,), padding=padding, seed=seed
    )
