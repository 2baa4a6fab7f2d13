"""One step of drawing for ahead-of-time plans: built from shapes, without allocating arrays."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.config import ConfigError
from magma_jax.families.magvlt.decoding.image import ImageRun, draw_step, steps_of
from magma_jax.inference.decoding.masked import Canvas
from magma_jax.models.magvlt.model import MagvltModel
from magma_jax.models.vision.vqgan import TOKENIZER
from magma_jax.nn.modules import abstract
from magma_jax.runtime.sharding import batch_sharding, replicated
from magma_jax.storage.model_folder import in_dtype
from magma_jax.training.run.program import Program


def drawing_step(program: Program, rows: int, slots: int | None) -> tuple[Any, tuple[Any, ...]]:
    """A guided step of ``rows`` images, two passes each, and the shapes of its arguments.

    Raises:
        ConfigError: ``slots`` are given, but the model has no cache; or the model is causal.
    """
    if program.config.model.causal:
        raise ConfigError("model.causal: decoding is planned for the masked model alone; plan a training step")
    if slots is not None:
        raise ConfigError("--slots: this model sees whole images and has no cache")
    config, mesh = program.config.model, program.mesh
    run = ImageRun()

    def row(dtype: Any, *shape: int) -> Any:  # shapes in place of arrays
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch_sharding(mesh))

    def shared(value: Any) -> Any:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=replicated(mesh))

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    params = in_dtype(program.params, jnp.dtype(config.dtype))  # as models are loaded for inference
    definition = abstract(lambda: MagvltModel(dataclasses.replace(config, tokenizer=None), rngs=nnx.Rngs(0)))[0]
    arguments = (
        {path: leaf for path, leaf in params.items() if not path.startswith(f"{TOKENIZER}/")},
        Canvas(*(row(dtype, config.image_positions) for dtype in (jnp.int32, jnp.bool_, jnp.float32))),
        row(jnp.bool_, config.image_positions),
        row(jnp.int32, config.text_positions),
        row(jnp.int32),
        *map(shared, (jnp.int32(0), jnp.float32(0))),
        jax.tree.map(shared, steps_of(run)),
        row(keys.dtype),
        shared(jnp.int32(0)),
    )
    step = functools.partial(draw_step, definition, rule=run.rule, draw=run.draw)
    return jax.jit(step, donate_argnums=1), arguments
