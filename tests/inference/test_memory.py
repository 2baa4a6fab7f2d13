"""Programs on weights of half precision: the temporaries stay far below the weights."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from magma_jax.families.magma.generator import forward_program, magma_graphdef
from magma_jax.inference.batched import generate_program
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.sampling import sampling_rows
from magma_jax.published.open_magma import model_shapes
from magma_jax.storage.model_folder import in_dtype, nbytes_of
from tests import tiny

LM = dataclasses.replace(tiny.MODEL.lm, layers=24, width=128, feed_forward=512, heads=2)
CONFIG = dataclasses.replace(tiny.MODEL, lm=LM, dtype="bfloat16")


@pytest.mark.parametrize("program", ["forward", "generate"])
def test_layers_are_widened_one_at_a_time(program):
    params = in_dtype(model_shapes(CONFIG), jnp.bfloat16)
    embeddings = jax.ShapeDtypeStruct((1, 32, LM.width), jnp.bfloat16)
    graphdef = magma_graphdef(CONFIG)
    if program == "forward":
        lowered = forward_program.lower(graphdef, params, embeddings, (False, False))
    else:
        lowered = generate_program.lower(
            graphdef,
            params,
            embeddings,
            jnp.array([20]),
            jax.random.split(jax.random.key(0), 1),
            max_new_tokens=3,
            sampling=sampling_rows([SamplingConfig()]),
            compat=None,
            ends=(0,),
            return_logits=False,
        )
    temporaries = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporaries < nbytes_of(params) / 3
