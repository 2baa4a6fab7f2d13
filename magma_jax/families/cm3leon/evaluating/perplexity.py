"""Losses of the image codes of true drawings among all codes, under any documents."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.families.cm3leon.generator import CM3Leon
from magma_jax.families.cm3leon.prompts import Beside, beside, drawing_streams
from magma_jax.models.references import Places, References
from magma_jax.nn.layers import product
from magma_jax.nn.modules import Definition, merge
from magma_jax.training.step.cross_entropy import cross_entropy_of_each
from magma_jax.typing import IGNORED, Array, Int, Params


def image_perplexity(
    model: CM3Leon,
    texts: Sequence[str],
    codes: Int[np.ndarray, "N T"],
    documents: Sequence[Sequence[Any]],
    *,
    batch: int,
) -> float:
    """The exponential of the mean loss of the codes of drawings behind their texts and retrieved documents."""
    layout, size = model.config.vocabulary, model.config.image_tokens
    by_side = model.config.references is not None
    prompts, given = [], []
    for text, image, found in zip(texts, codes, documents, strict=True):
        pairs = model.media.pairs(found)
        stream = drawing_streams(model.media.encode(text), pairs, layout, size, null="sentinel", beside=by_side)[0]
        ids = np.concatenate([stream, layout.from_codes(image)])
        prompts.append(ids)
        given.append(beside(ids, pairs, model.config, model.tokenizer.decode))
    longest = max(map(len, prompts))
    total = 0.0
    for start in range(0, len(prompts), batch):
        part = np.minimum(np.arange(start, start + batch), len(prompts) - 1)
        tokens = np.full((batch, longest), layout.pad, np.int32)
        labels = np.full((batch, longest), IGNORED, np.int32)
        for row, number in enumerate(part.tolist()):
            ids = prompts[number]
            tokens[row, : len(ids)] = ids
            if start + row < len(prompts):
                labels[row, len(ids) - size : len(ids)] = layout.to_codes(ids[-size:])
        side = [one for number in part.tolist() if (one := given[number]) is not None]
        places = np.full((batch, longest), -1, np.int32)
        for row, one in enumerate(side):
            places[row, : len(one.places)] = one.places
        total += float(_loss(model.graphdef, model.params, tokens, labels, _stacked(side), places))
    return float(np.exp(total / (len(prompts) * size)))


def _stacked(side: Sequence[Beside]) -> References | None:
    return References(*(jnp.asarray(np.stack([one[part] for one in side])) for part in (0, 1))) if side else None


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _loss(
    graphdef: Definition, params: Params, tokens: Array, labels: Array, references: References | None, places: Array
) -> Array:
    model = merge(graphdef, params)
    where = Places(places[:, :-1], places[:, 1:])
    hidden = model(model.embed_with(tokens[:, :-1], references, where)).hidden
    hidden = model.head_input(hidden, references, where.drawn)
    codes = model.config.vocabulary.image_ids
    project = functools.partial(
        product, weight=model.wte.weight[...][codes.start : codes.stop], preferred_element_type=jnp.float32
    )
    return cross_entropy_of_each(project, hidden, labels[:, 1:])[0]
