"""The jitted programs of ``answering``: prompts of images and words, embedded, continued or classified."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.decode import generate
from magma_jax.inference.decoding.sampling import sampling_rows
from magma_jax.inference.prompts import WORD
from magma_jax.nn.modules import Definition, merge
from magma_jax.nn.transformer.cache import KVCache
from magma_jax.runtime.compile import platform_jit
from magma_jax.runtime.sharding import on_mesh, replicated, split_rows
from magma_jax.typing import Array, Float, Int, Params


@platform_jit(static_argnames=("graphdef", "sampling", "max_new_tokens", "ends", "mesh"))
def answer_batch(
    graphdef: Definition,
    params: Params,
    batch: dict[str, Any],
    seed: Any,
    prefix: KVCache | None,
    *,
    sampling: SamplingConfig,
    max_new_tokens: int,
    ends: tuple[int, ...],
    mesh: Mesh | None,
) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:
    """Tokens and lengths of the answers, replicated; ``batch`` comes from ``Answerer``."""

    def run() -> tuple[Array, Array]:
        model = merge(graphdef, params)
        rows = batch["tokens"].shape[0]
        result = generate(
            model.lm,
            _embed(model, batch["features"], batch["tokens"], batch["places"]),
            batch["lengths"],
            jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(batch["numbers"]),
            max_new_tokens=max_new_tokens,
            sampling=sampling_rows([sampling] * rows),
            ends=ends,
            prefix=prefix,
        )
        return result.tokens, result.lengths

    if mesh is None:
        return run()
    return jax.lax.with_sharding_constraint(on_mesh(run, mesh)(), replicated(mesh))


@platform_jit(static_argnames=("graphdef", "mesh"))
def classify_batch(
    graphdef: Definition, params: Params, batch: dict[str, Any], *, mesh: Mesh | None
) -> Int[Array, " B"]:
    """Likeliest classes, replicated."""

    def run() -> Array:
        model = merge(graphdef, params)
        embeddings = _embed(model, batch["features"], batch["tokens"], batch["places"])
        return jnp.argmax(model.class_logits(embeddings, batch["lengths"]), axis=-1)

    if mesh is None:
        return run()
    return jax.lax.with_sharding_constraint(on_mesh(run, mesh)(), replicated(mesh))


@platform_jit(static_argnames=("graphdef", "mesh"))
def score_batch(
    graphdef: Definition,
    params: Params,
    batch: dict[str, Any],
    candidates: Int[Array | np.ndarray, "B K"],
    *,
    mesh: Mesh | None,
) -> Float[Array, "B K"]:
    """Log probabilities of candidates for the token after each prompt, replicated."""

    def run() -> Array:
        model = merge(graphdef, params)
        hidden = model.lm(_embed(model, batch["features"], batch["tokens"], batch["places"])).hidden
        last = jnp.take_along_axis(hidden, (batch["lengths"] - 1)[:, None, None], axis=1)[:, 0]
        return jnp.take_along_axis(jax.nn.log_softmax(model.logits(last)), jnp.asarray(candidates), axis=-1)

    if mesh is None:
        return run()
    return jax.lax.with_sharding_constraint(on_mesh(run, mesh)(), replicated(mesh))


@platform_jit(static_argnames=("graphdef", "mesh"))
def run_common(
    graphdef: Definition,
    params: Params,
    features: Float[Array | np.ndarray, "1 N ..."],
    tokens: Int[Array | np.ndarray, "1 S"],
    places: Int[Array | np.ndarray, "1 S"],
    *,
    mesh: Mesh | None,
) -> KVCache:
    """Keys and values of the prompts' common prefix, replicated."""
    model = merge(graphdef, params)
    embeddings = _embed(model, features, tokens, places)
    cache = model.lm(embeddings, cache=model.lm.init_cache(1, tokens.shape[1], model.dtype)).cache
    return cache if mesh is None else jax.lax.with_sharding_constraint(cache, replicated(mesh))


def _embed(
    model: Any,
    features: Float[Array | np.ndarray, "B N ..."],
    tokens: Int[Array | np.ndarray, "B S"],
    places: Int[Array | np.ndarray, "B S"],
) -> Float[Array, "B S D"]:
    rows, images = features.shape[:2]
    seen = model.embed_features(jnp.asarray(features).reshape(rows * images, *features.shape[2:]))
    seen = split_rows(seen.reshape(rows, -1, seen.shape[-1]))
    at_places = jnp.take_along_axis(seen, jnp.maximum(places, 0)[:, :, None], axis=1)
    return jnp.where((places == WORD)[:, :, None], model.embed_tokens(jnp.asarray(tokens)), at_places)
