"""What a compiled step needs beside its arguments."""

import dataclasses

import jax
import numpy as np
import pytest

from magma_jax.families import family_of
from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.runtime.sharding import make_mesh
from magma_jax.training.run.program import build_program
from magma_jax.training.step.options import LossOptions
from tests import tiny


@pytest.mark.slow
def test_a_cpu_does_not_hold_the_frozen_model_a_second_time():
    lm = GPTJConfig(
        *(16, 256, 4, 16, 1024), vocab_rows=300, head_rows=310, context_length=64, dtype="bfloat16", embedding_std=0.02
    )
    model = dataclasses.replace(tiny.MODEL, lm=lm)
    config = tiny.run_config(model=model, batch_size=1, loss=LossOptions(remat="full"))
    program = build_program(family_of(config.model), config, make_mesh(config.mesh, jax.devices()[:1]))
    tokens = jax.ShapeDtypeStruct((1, 8), np.int32)
    batch = {"images": jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32), "tokens": tokens, "labels": tokens}
    key = jax.eval_shape(lambda: jax.random.key(0))
    memory = program.step.lower(program.state, program.frozen, batch, key).compile().memory_analysis()
    learns = sum(leaf.size for leaf in program.state.trainable.values())
    frozen = sum(leaf.size for leaf in program.frozen.values())
    # Gradients and updates, and less than the frozen stack in fp32.
    assert memory.temp_size_in_bytes < 4 * (3 * learns + frozen / 2)
