"""Who learns, at what rate, and what one optimizer step does."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from magma_jax.config import ConfigError, from_dict
from magma_jax.families.language import LANGUAGE
from magma_jax.families.magma.config import roles
from magma_jax.families.magma.loss import caption_labels, caption_loss
from magma_jax.models.magma import MagmaModel
from magma_jax.models.vision.clip_resnet import CLIPResNetConfig
from magma_jax.models.vision.efficientnet_lite import EfficientNetLiteConfig
from magma_jax.models.vision.nf_resnet import NFResNetConfig
from magma_jax.nn.modules import AdapterParam, LanguageParam, Statistic, spared_by_decay, split, variable_types
from magma_jax.published.keymap.engine import to_theirs
from magma_jax.published.magma_keys import magma_table
from magma_jax.training.step.optim import (
    Group,
    OptimConfig,
    label_parameters,
    learns,
    make_optimizer,
    make_schedule,
    partition,
    peak_rates,
    with_groups,
)
from magma_jax.training.step.options import LossOptions
from magma_jax.training.step.train_step import init_state, make_train_step
from magma_jax.typing import IGNORED
from tests import tiny

OPTIM = with_groups(
    OptimConfig(learning_rate=1e-2, schedule="constant", clip_norm=1.0, groups={"encoder": Group(learning_rate=1e-3)}),
    roles(tiny.MODEL),
)


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


class Inherited(LanguageParam):
    """Of one role by inheritance."""


class Renamed(LanguageParam):
    """Of another role than its base."""

    role = "head"


class TwoRoles(LanguageParam, AdapterParam):
    """Of the roles of two bases."""


def test_a_parameter_without_a_role_or_group_is_an_error():
    groups = {"language": "frozen", "head": Group()}
    assert label_parameters({"a": Inherited, "b": Renamed}, groups) == {"a": "frozen", "b": "head"}
    with pytest.raises(ValueError, match="parameter a/b of type Unlabelled has no role; its type must name one"):
        label_parameters({"a/b": Unlabelled}, groups)
    with pytest.raises(ValueError, match=r"parameter c of type TwoRoles has 2 roles \(adapter, language\)"):
        label_parameters({"c": TwoRoles}, groups)
    with pytest.raises(ValueError, match="parameter a: its role 'language' has no group"):
        label_parameters({"a": LanguageParam}, {"encoder": Group()})


def test_groups_are_those_of_the_models_roles():
    config = OptimConfig(groups={"encoder": "frozen"})
    assert with_groups(config, roles(tiny.MODEL)).groups == {
        "language": "frozen",
        "prefix": Group(),
        "encoder": "frozen",
        "adapter": Group(),
    }
    with pytest.raises(ValueError, match=r"optim\.groups\.head: no parameter of the model has this role; .* adapter$"):
        with_groups(OptimConfig(groups={"head": Group()}), roles(tiny.MODEL))
    with pytest.raises(ValueError, match=r"all roles \(language\) are frozen, so nothing would learn"):
        with_groups(OptimConfig(groups={"language": "frozen"}), LANGUAGE.roles(tiny.MODEL.lm))
    where = r"config\.groups\.encoder: 'rest' is not one of 'frozen'"
    with pytest.raises(ConfigError, match=where):
        from_dict(OptimConfig, {"groups": {"encoder": "rest"}})


def test_every_group_has_its_own_rate_and_decay():
    """The same bits as an AdamW for each group."""
    rng = np.random.default_rng(0)
    params = {path: jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for path in ("a/w", "a/bias", "b/w", "c/w")}
    labels = {"a/w": "one", "a/bias": "one", "b/w": "two", "c/w": "three", "d/w": "frozen"}
    groups = {
        "one": Group(weight_decay=0.3),
        "two": Group(learning_rate=0.2),
        "three": Group(learning_rate=0.01, weight_decay=0.0),
        "four": "frozen",
    }
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5, steps=4, clip_norm=1.0, groups=groups)
    settings = {"one": (0.1, 0.3), "two": (0.2, 0.5), "three": (0.01, 0.0)}
    apart = optax.multi_transform(
        {
            role: optax.adamw(
                make_schedule(config, rate),
                weight_decay=decay,
                mask=lambda params: {path: not path.endswith("bias") for path in params},
            )
            for role, (rate, decay) in settings.items()
        },
        {path: label for path, label in labels.items() if path in params},
    )
    apart = optax.chain(optax.clip_by_global_norm(1.0), apart)
    ours = _three_steps(make_optimizer(config, labels, {"a/bias"}), params)
    theirs = _three_steps(apart, params)
    for path in params:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    assert peak_rates(config) == {"learning_rate": 0.1, "two_learning_rate": 0.2, "three_learning_rate": 0.01}


def _three_steps(optimizer, params):
    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        params, state = step(params, state, {path: rng.normal(size=(3, 4)).astype(np.float32) for path in params})
    return params


def test_cosine_returns_to_the_peak_at_every_restart():
    peak, floor = 8e-4, 8e-5
    schedule = make_schedule(OptimConfig(steps=100, restarts=(20, 60), warmup_steps=4), peak)
    for step in (4, 10, 19, 20, 40, 59, 60, 99, 100, 300):
        start, end = (4, 20) if step < 20 else (20, 60) if step < 60 else (60, 100)
        part = min(step - start, end - start) / (end - start)
        assert schedule(step) == pytest.approx(floor + (peak - floor) * (1 + np.cos(np.pi * part)) / 2, rel=1e-5), step
    assert [float(schedule(step)) for step in (0, 2)] == pytest.approx([0, peak / 2])
    for wrong in ({"restarts": (20, 10)}, {"restarts": (100,)}, {"restarts": (4,)}, {"restarts": (0,)}):
        with pytest.raises(ValueError, match=r"optim\.restarts .* must ascend"):
            OptimConfig(steps=100, **{"warmup_steps": 4, **wrong})
    with pytest.raises(ValueError, match="restarts belong to the schedule cosine, not to warmup"):
        OptimConfig(steps=100, restarts=(50,), schedule="warmup")


@pytest.mark.parametrize(
    "encoder",
    [tiny.RESNET, NFResNetConfig(), EfficientNetLiteConfig(), tiny.MODEL.encoder],
    ids=lambda config: config.kind,
)
def test_layers_say_what_weight_decay_spares(encoder):
    """Biases and the weights of LayerNorms; those of BatchNorms decay."""
    config = dataclasses.replace(tiny.MODEL, encoder=encoder, classes=2)
    model = nnx.eval_shape(lambda: MagmaModel(config, rngs=nnx.Rngs(0)))
    learned = [path for path, kind in variable_types(model).items() if not issubclass(kind, Statistic)]
    by_name = {path for path in learned if re.search(r"(^|/)(bias|ln(_\w+)?/weight)$", path)}
    assert by_name
    assert spared_by_decay(model) == by_name


def test_weight_decay_spares_what_the_original_spares(golden):
    """The groups that the original made for its v2 config."""
    groups = json.loads((golden / "v2_mlp_attn_normal.json").read_text())["opt_groups"]
    encoder = CLIPResNetConfig((1, 1, 1, 1), 8, 96)
    config = dataclasses.replace(tiny.MODEL, encoder=encoder)
    config = dataclasses.replace(config, lm=dataclasses.replace(config.lm, layers=3))
    model = nnx.eval_shape(lambda: MagmaModel(config, rngs=nnx.Rngs(0)))
    shapes, spared = split(model)[1], spared_by_decay(model)
    labels = label_parameters(variable_types(model), OPTIM.groups)
    for group in groups:
        is_encoder = group["params"][0].startswith("image_prefix.enc.")
        ours = {
            path: shape
            for path, shape in shapes.items()
            if learns(labels[path])
            and (labels[path] == "encoder") == is_encoder
            and (path not in spared) == bool(group["weight_decay"])
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
