"""One step on several devices, in parts, and in bfloat16."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.families import family_of
from magma_jax.families.magma import MAGMA
from magma_jax.families.magma.loss import caption_loss
from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.models.magma import MagmaModel
from magma_jax.models.prefix import PrefixConfig
from magma_jax.nn.modules import split, variable_types
from magma_jax.runtime.sharding import MeshConfig, make_mesh
from magma_jax.training.run.program import build_program, fresh_params
from magma_jax.training.step.optim import OptimConfig, label_parameters, make_optimizer, partition, with_groups
from magma_jax.training.step.options import LossOptions
from magma_jax.training.step.train_step import init_state, make_train_step
from magma_jax.typing import IGNORED
from tests import tiny

TEXT_MODEL = GPTJConfig(
    layers=2, width=16, heads=2, rotary_dim=4, feed_forward=32, vocab_rows=64, head_rows=64, context_length=32
)
ROWS, LENGTH = 32, 12


def _uneven_text():
    """Rows with 0, 0, ..., 11 labels: means over rows, devices or parts would differ widely from that over tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (ROWS, LENGTH)).astype(np.int32)
    counted = np.arange(LENGTH) < np.maximum(np.arange(ROWS) - ROWS + LENGTH, 0)[:, None]
    return {"tokens": tokens, "labels": np.where(counted, tokens, IGNORED).astype(np.int32)}


def _text_step(mesh, accumulate):
    config = tiny.run_config(
        model=TEXT_MODEL,
        optim=OptimConfig(learning_rate=1e-2, schedule="constant"),
        batch_size=ROWS,
        accumulate=accumulate,
        mesh=mesh,
    )
    devices = jax.devices()[: 1 if mesh == MeshConfig(data=1) else 8]
    program = build_program(family_of(config.model), config, make_mesh(mesh, devices))
    params = fresh_params(family_of(config.model), config, program.params)
    state, metrics = program.step(program.init_state(params), {}, _uneven_text(), jax.random.key(0))
    return program, metrics, state.trainable


def test_the_mean_is_over_tokens_whatever_devices_and_parts_hold():
    _, expected, _ = _text_step(MeshConfig(data=1), 1)
    program, metrics, _ = _text_step(MeshConfig(data=8), 2)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    # Every device holds a share of both parts: rows, losses and gradients are summed, and nothing else travels.
    compiled = program.step.lower(program.state, program.frozen, _uneven_text(), jax.random.key(0)).compile()
    kinds = set(re.findall(r" (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", compiled.as_text()))
    assert kinds == {"all-reduce"}


def test_slices_train_as_one_to_the_bit(capfd):
    _, expected, one = _text_step(MeshConfig(data=2, fsdp=2, model=2), 1)
    _, metrics, several = _text_step(MeshConfig(data=1, fsdp=2, model=2, slice=2), 1)
    assert metrics["loss"] == expected["loss"]
    for path, leaf in several.items():
        np.testing.assert_array_equal(leaf, one[path], err_msg=path)
        assert "slice" not in str(leaf.sharding.spec)
    # XLA's complaint if it replicates an array to get from one sharding to another.
    assert "rematerialization" not in capfd.readouterr().err


@pytest.fixture(scope="module")
def by_dtype():
    """State, metrics and frozen weights after one step, with fp32 and with bf16 activations and frozen weights."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 290, (4, 12)).astype(np.int32)
    batch = {"features": rng.normal(size=(4, 4, 32)).astype(np.float32), "tokens": tokens, "labels": tokens}
    results = {}
    for dtype in ("float32", "bfloat16"):
        lm = dataclasses.replace(tiny.MODEL.lm, dtype=dtype)
        model = MagmaModel(
            dataclasses.replace(tiny.MODEL, lm=lm, dtype=dtype, prefix=PrefixConfig(dropout=0.0)), rngs=nnx.Rngs(0)
        )
        labels = label_parameters(variable_types(model), {**MAGMA.roles(tiny.MODEL), "encoder": "frozen"})
        graphdef, params = split(model)
        trainable, frozen, statistics = partition(params, labels)
        optimizer = make_optimizer(
            with_groups(OptimConfig(learning_rate=1e-3, schedule="constant"), MAGMA.roles(tiny.MODEL)), labels
        )
        state = init_state(trainable, statistics, optimizer)

        def loss(model, batch, key):
            return caption_loss(model, batch, key, options=LossOptions())

        step = jax.jit(make_train_step(graphdef, loss, optimizer))
        results[dtype] = (*step(state, frozen, batch, jax.random.key(0)), frozen)
    return results


@pytest.mark.slow
def test_in_bfloat16_what_learns_and_the_loss_stay_fp32(by_dtype):
    state, metrics, frozen = by_dtype["bfloat16"]
    assert {leaf.dtype for path, leaf in frozen.items() if path.startswith("lm/")} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in state.trainable.values()} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.dtype("float32")


@pytest.mark.slow
def test_bfloat16_is_near_fp32(by_dtype):
    expected, near = by_dtype["float32"][1], by_dtype["bfloat16"][1]
    np.testing.assert_allclose(near["loss"], expected["loss"], rtol=1e-3)
    # Eight bits of mantissa, through two layers and back.
    np.testing.assert_allclose(near["grad_norm"], expected["grad_norm"], rtol=2e-2)
