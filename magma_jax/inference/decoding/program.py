"""One decoding step for ahead-of-time plans: built from shapes, without allocating arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from magma_jax.inference.decoding.decode import DecodeState, advance
from magma_jax.inference.decoding.sampling import SamplingRows
from magma_jax.nn.modules import merge
from magma_jax.nn.transformer.cache import KVCache
from magma_jax.runtime.sharding import BATCH_AXES, batch_sharding
from magma_jax.storage.model_folder import in_dtype
from magma_jax.training.run.program import Program


def decode_program(
    language_model: Callable[[Any], Any], program: Program, rows: int, slots: int | None
) -> tuple[Any, tuple[Any, ...]]:
    """A decoding step of ``rows`` rows with ``slots`` cache slots each, and the shapes of its arguments.

    Rows are sharded over ``slice``, ``data`` and ``fsdp``, the cache's heads over ``model``.

    Args:
        language_model: maps a model to its language model, and a model's config to the config of that part.
        program: program of a run.
        rows: number of rows over all devices.
        slots: cache slots per row; None for the context.
    """
    config, mesh = program.config.model, program.mesh
    lm, dtype = language_model(config), jnp.dtype(config.dtype)
    by_rows = batch_sharding(mesh)
    by_heads = jax.NamedSharding(mesh, jax.P(None, BATCH_AXES, "model"))

    def row(dtype: Any) -> Any:  # shapes in place of arrays
        return jax.ShapeDtypeStruct((rows,), dtype, sharding=by_rows)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    block = lm.trunk().block
    cache = (lm.layers, rows, block.key_heads, slots or lm.context_length, block.size)
    kept: Any = jax.ShapeDtypeStruct(cache, dtype, sharding=by_heads)
    key_rows: Any = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=by_rows)
    state = DecodeState(
        cache=KVCache(kept, kept),
        token=row(jnp.int32),
        position=row(jnp.int32),
        count=row(jnp.int32),
        limit=row(jnp.int32),
        done=row(jnp.bool_),
        keys=key_rows,
        sampling=SamplingRows(
            **{name: row(jnp.int32 if name == "top_k" else jnp.float32) for name in SamplingRows._fields}
        ),
        seen=None,
    )

    def decode(params, rows):
        model = merge(program.graphdef, params)
        return advance(language_model(model), rows, ends=(lm.vocab_rows - 1,))[0]

    out_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    params = in_dtype(program.params, dtype)  # as models are loaded for inference
    return jax.jit(decode, donate_argnums=1, out_shardings=out_shardings), (params, state)
