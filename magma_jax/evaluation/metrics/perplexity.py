"""Perplexity of a language model on a text file, with and without its adapters, to check that it is intact."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from magma_jax.data.format.records import DataError
from magma_jax.data.readers.common import read_text
from magma_jax.inference.generator import TokenGenerator
from magma_jax.nn.adapters import is_adapter
from magma_jax.nn.modules import Definition, merge
from magma_jax.runtime.compile import platform_jit
from magma_jax.training.step.cross_entropy import cross_entropy
from magma_jax.typing import IGNORED, Array, Float, Int, Params


class Perplexity(NamedTuple):
    """Perplexity of a text.

    Attributes:
        perplexity: perplexity per token.
        bits_per_byte: bits per UTF-8 byte; comparable between vocabularies.
        tokens: number of predicted tokens, all but the first.
    """

    perplexity: float
    bits_per_byte: float
    tokens: int


def perplexity(model: TokenGenerator, text: str, *, batch_size: int = 4) -> Perplexity:
    """Perplexity of ``text``.

    The text is run in windows of the context length with a stride of half a window, and every token is predicted once,
    by the window in which it has at least half a context before it.

    Raises:
        DataError: fewer than two tokens.
    """
    tokenizer = model.tokenizer
    begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    ids = np.array([*begin, *tokenizer.encode(text, first=True)], np.int32)
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens; perplexity needs at least two")
    window = model.lm_config.context_length
    starts = range(0, max(1, len(ids) - window // 2), window // 2)
    tokens = np.full((len(starts), window + 1), model.tokenizer.pad_id, np.int32)
    labels = np.full((len(starts), window), IGNORED, np.int32)
    done = 1
    for row, start in enumerate(starts):
        piece = ids[start : start + window + 1]
        tokens[row, : len(piece)] = piece
        # Label i is token i + 1 of the window; tokens predicted by an earlier window are masked.
        labels[row, done - start - 1 : len(piece) - 1] = piece[done - start :]
        done = start + len(piece)
    total = 0.0
    for first in tqdm(range(0, len(starts), batch_size), desc="reading", unit="batch", disable=None):
        rows = slice(first, first + batch_size)
        fill = ((0, batch_size - len(tokens[rows])), (0, 0))
        batch = np.pad(tokens[rows, :-1], fill), np.pad(labels[rows], fill, constant_values=IGNORED)
        total += float(_loss(model.graphdef, model.params, *batch))
    count = int((labels != IGNORED).sum())
    nbytes = len(model.tokenizer.decode(ids[1:].tolist(), skip_special=False).encode())
    return Perplexity(math.exp(total / count), total / math.log(2) / nbytes, count)


def measure(model: TokenGenerator, path: str | Path) -> dict[str, Any]:
    """Perplexity on a file with the model's adapters, and without them if it has any."""
    text = read_text(Path(path))
    found = {"file": Path(path).name, "model": perplexity(model, text)._asdict()}
    if any(map(is_adapter, model.params)):
        found["without_adapters"] = perplexity(model.remove_adapters(), text)._asdict()
    return found


@platform_jit(static_argnames=("graphdef",))
def _loss(
    graphdef: Definition,
    params: Params,
    tokens: Int[np.ndarray | Array, "B S"],
    labels: Int[np.ndarray | Array, "B S"],
) -> Float[Array, ""]:
    model = merge(graphdef, params)
    hidden = model(model.embed_tokens(jax.numpy.asarray(tokens))).hidden
    return cross_entropy(model.logits, hidden, jax.numpy.asarray(labels))[0]
