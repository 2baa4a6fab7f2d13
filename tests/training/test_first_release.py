"""Runs of release 0.1: their configs are read in today's fields, their optimizer's state in today's layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from magma_jax.config import ConfigError, to_dict
from magma_jax.data.folder_dataset import FoldersConfig
from magma_jax.families.magma import MAGMA
from magma_jax.storage.model_folder import with_sharding
from magma_jax.training.checkpoints.checkpoint import CHECKPOINTS, RunCheckpoints, Snapshot
from magma_jax.training.checkpoints.first_release import read_optimizer
from magma_jax.training.run.config import completed
from magma_jax.training.run.stored import read_stored_run
from magma_jax.training.step.optim import Group, OptimConfig, make_optimizer, make_schedule
from magma_jax.training.step.train_step import TrainState, init_state
from tests import tiny

# The fields of all kinds of data, as every run kept them.
DATA = {
    "name": "openmoji",
    "folders": {},
    "tokenizer": None,
    "classes": [],
    "length": 32,
    "buckets": [],
    "pack": 1,
    "overlong": "error",
    "image_size": 128,
    "augment": None,
    "decode": "exact",
    "workers": None,
    "max_skipped": 0.01,
    "cache_dir": "~/.cache/magma_jax",
    "weights": [0.375, 0.125, 0.5],
    "questions": ["tone", "gender", "hair", "facing", "what", "count", "hand", "flag"],
    "question_draws": 8,
    "lines": 100_000,
    "vocab_size": 2048,
}
GROUPS = {"language": "frozen", "adapter": "rest", "prefix": "rest", "head": "rest", "encoder": "encoder"}


def stored_of(**optim):
    stored = to_dict(completed(MAGMA, tiny.run_config()))
    del stored["ema"], stored["validation"]["ema"], stored["optim"]["restarts"]
    stored["optim"] |= {"encoder_learning_rate": 1e-3, "groups": GROUPS} | optim
    return stored | {"data": DATA}


def test_its_configs_are_todays():
    assert read_stored_run(MAGMA, stored_of()) == completed(MAGMA, tiny.run_config())
    frozen = read_stored_run(MAGMA, stored_of(groups={**GROUPS, "encoder": "frozen", "language": "rest"}))
    assert frozen.optim.groups == {
        "language": Group(),
        "prefix": Group(),
        "encoder": "frozen",
        "adapter": Group(),
    }
    folders = read_stored_run(MAGMA, stored_of() | {"data": DATA | {"name": "folders", "folders": {"train": ["a"]}}})
    assert folders.data == FoldersConfig(folders={"train": ("a",)}, image_size=64, augment="none", tokenizer="gpt2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DATA | {"name": "vqa"}}, r"model\.json: run\.data\.kind: 'vqa' is not one of openmoji, folders"),
        ({"model": {"kind": "gptj"}}, r"model\.json: run\.model\.kind: 'gptj' is not one of magma"),
        ({"optim": {"encoder_learning_rate": 1e-3, "groups": 3}}, r"run\.optim\.groups: expected a mapping, got 3"),
    ],
)
def test_what_cannot_be_read_is_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_stored_run(MAGMA, stored_of() | changes)
    assert "\n" not in str(caught.value)


LABELS = {"prefix/proj/weight": "prefix", "lm/layers/mlp_adapter/up/weight": "adapter", "enc/conv/weight": "encoder"}
CONFIG = OptimConfig(
    learning_rate=1e-2,
    steps=4,
    weight_decay=0.1,
    groups={"prefix": Group(), "adapter": Group(), "encoder": Group(learning_rate=1e-3)},
)


def optimizer_of_first_release(clip_norm):
    groups = {"encoder": 1e-3, "rest": 1e-2}
    transforms = {
        group: optax.adamw(
            make_schedule(CONFIG, peak), weight_decay=0.1, mask=lambda params: dict.fromkeys(params, True)
        )
        for group, peak in groups.items()
    }
    labels = {path: label if label == "encoder" else "rest" for path, label in LABELS.items()}
    by_group = optax.multi_transform(transforms, labels)
    return optax.chain(optax.clip_by_global_norm(clip_norm), by_group) if clip_norm else by_group


def step(optimizer, state, seed):
    rng = np.random.default_rng(seed)
    gradients = {path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for path, leaf in state.trainable.items()}
    updates, opt_state = jax.jit(optimizer.update)(gradients, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    return TrainState(state.step + 1, trainable, state.statistics, opt_state)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_its_optimizer_goes_on_with_the_same_bits(tmp_path, clip_norm):
    theirs = optimizer_of_first_release(clip_norm)
    ours = make_optimizer(dataclasses.replace(CONFIG, clip_norm=clip_norm), LABELS)
    rng = np.random.default_rng(0)
    trainable = {path: jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for path in LABELS}
    state = init_state(trainable, {}, theirs)
    for seed in (1, 2):
        state = step(theirs, state, seed)
    with RunCheckpoints(tmp_path, writing=True) as checkpoints:
        checkpoints.save(Snapshot(state, jax.random.key(3), {"next_index": 2}))
    with RunCheckpoints(tmp_path, writing=True) as checkpoints:
        resumed = checkpoints.restore(init_state(trainable, {}, ours), jax.random.key(0))
    assert int(resumed.state.step) == 2
    assert resumed.data == {"next_index": 2}
    np.testing.assert_array_equal(jax.random.key_data(resumed.key), jax.random.key_data(jax.random.key(3)))
    expected, got = step(theirs, state, 3), step(ours, resumed.state, 3)
    for path, leaf in expected.trainable.items():
        np.testing.assert_array_equal(got.trainable[path], leaf, err_msg=path)


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    theirs, trainable = optimizer_of_first_release(0.0), {path: jnp.zeros((4, 3)) for path in LABELS}
    with RunCheckpoints(tmp_path, writing=True) as checkpoints:
        checkpoints.save(Snapshot(init_state(trainable, {}, theirs), jax.random.key(0), {}))
    folder = tmp_path / CHECKPOINTS / "0" / "optimizer"
    wider = make_optimizer(CONFIG, LABELS).init({path: jnp.zeros((4, 5)) for path in LABELS})
    with pytest.raises(ValueError, match=r"mu.* has the shape \(4, 3\) in place of \(4, 5\)"):
        read_optimizer(folder, {"opt_state": jax.tree.map(with_sharding, wider)})
    other = make_optimizer(CONFIG, {"other": "prefix"}).init({"other": jnp.zeros((4, 3))})
    with pytest.raises(ValueError, match=r"'other'.* is not in a checkpoint of release 0\.1"):
        read_optimizer(folder, {"opt_state": jax.tree.map(with_sharding, other)})
