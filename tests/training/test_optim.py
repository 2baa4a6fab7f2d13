"""Who learns, at what rate, and what one optimizer step does."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from magma_jax.families.magma.loss import caption_labels, caption_loss
from magma_jax.models.magma import MagmaModel
from magma_jax.models.vision.clip_resnet import CLIPResNetConfig
from magma_jax.nn.modules import LanguageParam, abstract, split, variable_types
from magma_jax.published.keymap.engine import to_theirs
from magma_jax.published.magma_keys import magma_table
from magma_jax.training.step.optim import (
    OptimConfig,
    decays,
    label_parameters,
    make_optimizer,
    make_schedule,
    partition,
)
from magma_jax.training.step.options import LossOptions
from magma_jax.training.step.train_step import init_state, make_train_step
from magma_jax.typing import IGNORED
from tests import tiny

OPTIM = OptimConfig(learning_rate=1e-2, encoder_learning_rate=1e-3, schedule="constant", clip_norm=1.0)


@pytest.mark.parametrize("name", ["warmup_decay", "warmup"])
def test_the_originals_schedules(name, golden):
    with np.load(golden / "lr_schedule.npz") as file:
        expected, peaks = file[f"{name}_lr"], file["max_lrs"]
        config = OptimConfig(
            schedule=name, warmup_steps=int(file["warmup_num_steps"]), steps=int(file["total_num_steps"])
        )
    for column, peak in enumerate(peaks):
        rates = jax.vmap(make_schedule(config, float(peak)))(jnp.arange(len(expected)))
        np.testing.assert_allclose(rates, expected[:, column], rtol=1e-5, atol=peak * 1e-6)


def test_the_papers_schedule_is_cosine_to_a_tenth():
    schedule = make_schedule(OptimConfig(steps=1000), 8e-4)
    np.testing.assert_allclose([schedule(step) for step in (0, 500, 1000, 2000)], [8e-4, 4.4e-4, 8e-5, 8e-5], rtol=1e-5)
    warm = make_schedule(OptimConfig(steps=1000, warmup_steps=10), 8e-4)
    np.testing.assert_allclose([warm(0), warm(5), warm(10), warm(1000)], [0, 4e-4, 8e-4, 8e-5], rtol=1e-5)


class Unlabelled(nnx.Param):
    """Of no role."""


class TwoRoles(LanguageParam):
    """Of one role by inheritance."""


def test_a_parameter_without_a_role_or_group_is_an_error():
    groups = OptimConfig().groups
    assert label_parameters({"a": TwoRoles}, groups) == {"a": "frozen"}
    with pytest.raises(ValueError, match="parameter a/b of type Unlabelled has no role"):
        label_parameters({"a/b": Unlabelled}, groups)
    with pytest.raises(ValueError, match="its role 'language' has no group"):
        label_parameters({"a": LanguageParam}, {"encoder": "rest"})
    with pytest.raises(ValueError, match="unknown role decoder"):
        OptimConfig(groups={"decoder": "rest"})


def test_weight_decay_spares_what_the_original_spares(golden):
    """The groups that the original made for its v2 config."""
    groups = json.loads((golden / "v2_mlp_attn_normal.json").read_text())["opt_groups"]
    encoder = CLIPResNetConfig((1, 1, 1, 1), 8, 96)
    config = dataclasses.replace(tiny.MODEL, encoder=encoder)
    config = dataclasses.replace(config, lm=dataclasses.replace(config.lm, layers=3))
    _, shapes, types = abstract(lambda: MagmaModel(config, rngs=nnx.Rngs(0)))
    labels = label_parameters(types, OPTIM.groups)
    for group in groups:
        label = "encoder" if group["params"][0].startswith("image_prefix.enc.") else "rest"
        ours = {
            path: shape
            for path, shape in shapes.items()
            if labels[path] == label and decays(path) == bool(group["weight_decay"])
        }
        theirs = {key for key in to_theirs(magma_table(config), ours) if not key.startswith("transformer.")}
        assert theirs == set(group["params"])


def test_labels_of_captions(golden):
    with np.load(golden / "labels.npz") as file:
        captions, eos = file["captions"], int(file["eos"])
        lengths = [int(name.removeprefix("labels_prefix")) for name in file.files if name.startswith("labels_prefix")]
        assert lengths
        for prefix in lengths:
            labels = caption_labels(jnp.asarray(captions[:, : captions.shape[1] - prefix]), eos)
            padded = np.pad(labels, ((0, 0), (prefix, 0)), constant_values=IGNORED)
            np.testing.assert_array_equal(padded, file[f"labels_prefix{prefix}"])


@pytest.fixture(scope="module")
def problem():
    """A tiny model in its parts, and a batch of four."""
    model = MagmaModel(tiny.MODEL, rngs=nnx.Rngs(0))
    types = variable_types(model)
    graphdef, params = split(model)
    labels = label_parameters(types, OPTIM.groups)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 290, (4, 12)).astype(np.int32)
    labels_of_tokens = np.where(np.arange(12) < rng.integers(2, 12, (4, 1)), tokens, IGNORED).astype(np.int32)
    images = rng.normal(size=(4, 64, 64, 3)).astype(np.float32)
    return graphdef, partition(params, labels), labels, {"images": images, "tokens": tokens, "labels": labels_of_tokens}


def run(problem, optimizer, steps=1, accumulate=1):
    graphdef, (trainable, frozen, statistics), _, batch = problem
    # Its dropout draws other numbers for the parts of a batch than for the whole.
    step = make_train_step(graphdef, without_dropout, optimizer, accumulate=accumulate)
    state = init_state(trainable, statistics, optimizer)
    step = jax.jit(step)
    for _ in range(steps):
        state, metrics = step(state, frozen, batch, jax.random.key(0))
    return state, metrics


def without_dropout(model, batch, key):
    del key
    return caption_loss(model, batch, None, options=LossOptions())


@pytest.fixture(scope="module")
def stepped(problem):
    return run(problem, make_optimizer(OPTIM, problem[2]), steps=3)


def test_only_the_trainable_part_changes_and_has_optimizer_state(problem, stepped):
    _, (trainable, frozen, _), labels, _ = problem
    state, _ = stepped
    assert set(state.trainable) == set(trainable)
    # Behind the LayerNorm a shift of all features is taken out again.
    unchanged = [path for path in trainable if np.array_equal(state.trainable[path], trainable[path])]
    assert unchanged == []
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    assert not any(path in name for path in frozen for name in names)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(trainable)
    assert {labels[path] for path in frozen} == {"frozen"}


@pytest.mark.slow
def test_accumulation_equals_the_large_batch(problem, stepped):
    state, metrics = run(problem, make_optimizer(OPTIM, problem[2]), steps=3, accumulate=2)
    np.testing.assert_allclose(metrics["loss"], stepped[1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], stepped[1]["grad_norm"], rtol=1e-4)
    for path, leaf in state.trainable.items():
        # Adam turns rounding noise into steps where a gradient is nothing else.
        np.testing.assert_allclose(leaf, stepped[0].trainable[path], atol=2e-3)


@pytest.fixture(scope="module")
def descended(problem):
    """One step of plain descent, which is the gradient itself."""
    return run(problem, optax.sgd(1.0))


def test_accumulated_gradients_equal_those_of_the_large_batch(problem, descended):
    whole, _ = descended
    parts, _ = run(problem, optax.sgd(1.0), accumulate=4)
    for path, leaf in parts.trainable.items():
        start = problem[1][0][path]
        np.testing.assert_allclose(leaf - start, whole.trainable[path] - start, atol=1e-5)


@pytest.mark.slow
def test_clipping_sees_the_norm_of_trainable_gradients_only(problem, descended):
    _, (trainable, _, _), labels, _ = problem
    norm = float(descended[1]["grad_norm"])
    state, _ = run(problem, optax.chain(optax.clip_by_global_norm(norm / 4), optax.sgd(1.0)))
    moved = {path: state.trainable[path] - trainable[path] for path in trainable}
    np.testing.assert_allclose(optax.tree.norm(moved), norm / 4, rtol=1e-3)
    # The optimizer of a config clips its whole tree, and that has no frozen leaf.
    optimizer = make_optimizer(dataclasses.replace(OPTIM, clip_norm=norm / 4), labels)
    grads = jax.tree.map(jnp.ones_like, trainable)
    optimizer.update(grads, optimizer.init(trainable), trainable)
    with pytest.raises(ValueError, match="lm/wte/weight"):
        optimizer.init(problem[1][0] | problem[1][1])
