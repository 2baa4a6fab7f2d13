"""The full-size models, built without memory: keys, shapes and dtypes of the published layout, and who learns."""

import gzip
import json

import jax
import numpy as np
import pytest
from flax import nnx

from magma_jax.families.magma.config import roles
from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.models.magma import MagmaConfig, MagmaModel
from magma_jax.models.prefix import PrefixConfig
from magma_jax.models.vision.catalog import build_encoder
from magma_jax.models.vision.nf_resnet import NFResNetConfig
from magma_jax.nn.adapters import AdapterConfig
from magma_jax.nn.modules import abstract, parameter_count
from magma_jax.published.keymap.engine import to_theirs
from magma_jax.published.magma_keys import attention_buffers, encoder_table, magma_table
from magma_jax.training.step.optim import OptimConfig, label_parameters, make_optimizer, partition, with_groups

LM = GPTJConfig(dtype="float16")
V1 = MagmaConfig(LM, mlp_adapter=AdapterConfig(downsample_factor=4))
V2 = MagmaConfig(LM, mlp_adapter=AdapterConfig(downsample_factor=8), attn_adapter=AdapterConfig(downsample_factor=8))
SCALED = MagmaConfig(
    LM,
    mlp_adapter=AdapterConfig("scaled_parallel", 4, layernorm=True),
    attn_adapter=AdapterConfig("scaled_parallel", 8),
)
# Tsimpoukelli et al. (2021): no adapters, two positions an image; the prefix has no LayerNorm there.
FROZEN = MagmaConfig(LM, NFResNetConfig(), PrefixConfig(image_positions=2, layernorm=False))


def rows(golden, name):
    return json.loads(gzip.decompress((golden / f"{name}.json.gz").read_bytes()))["rows"]


def shapes_and_types(config):
    return abstract(lambda: MagmaModel(config, rngs=nnx.Rngs(0)))[1:]


@pytest.mark.parametrize(
    ("config", "name"),
    [(V1, "keys_MAGMA_v1"), (V2, "keys_MAGMA_v2"), (SCALED, "keys_hypothetical_scaled_parallel_ln")],
    ids=["v1", "v2", "scaled_parallel_ln"],
)
def test_keys_shapes_and_dtypes(config, name, golden):
    table = magma_table(config, attention_buffers(config, np.dtype(np.float16)))
    ours = to_theirs(table, shapes_and_types(config)[0], dtype=np.float16)
    expected = {key: (tuple(shape), dtype) for key, shape, _, dtype, _ in rows(golden, name)}
    assert {key: (tensor.shape, tensor.dtype.name) for key, tensor in ours.items()} == expected


def test_keys_and_shapes_of_nf_resnet_50(golden):
    table = encoder_table(NFResNetConfig(), "image_prefix.enc.")
    shapes = abstract(lambda: build_encoder(NFResNetConfig(), rngs=nnx.Rngs(0)))[1]
    ours = {key: (tensor.shape, tensor.dtype.name) for key, tensor in to_theirs(table, shapes).items()}
    assert ours == {key: (tuple(shape), dtype) for key, shape, dtype in rows(golden, "keys_nfresnet50_encoder")}


@pytest.mark.parametrize(
    ("config", "trainable", "frozen"),
    [
        (V1, (101, 383_822_224), (15, 6_050_301_152)),
        (V2, (105, 383_936_912), (15, 6_050_301_152)),
        (FROZEN, (89, 40_293_440), (15, 6_050_301_152)),
    ],
    ids=["v1", "v2", "frozen"],
)
def test_who_learns(config, trainable, frozen):
    """Leaves (layers of a stack count once) and numbers."""
    shapes, types = shapes_and_types(config)
    labels = label_parameters(types, roles(config))
    learns, rests, statistics = partition(shapes, labels)
    assert (len(learns), parameter_count(learns)) == trainable
    assert (len(rests), parameter_count(rests)) == frozen
    assert not set(learns) & set(rests)
    assert set(learns) | set(rests) | set(statistics) == set(shapes)
    assert all(leaf.dtype == np.float32 for leaf in learns.values())

    optimizer = jax.eval_shape(make_optimizer(with_groups(OptimConfig(steps=1), roles(config)), labels).init, learns)
    moments = [leaf for leaf in jax.tree.leaves(optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * parameter_count(learns)


@pytest.mark.parametrize(("config", "name"), [(V1, "keys_MAGMA_v1"), (V2, "keys_MAGMA_v2")], ids=["v1", "v2"])
def test_the_published_layout_counts_the_same(config, name, golden):
    """The same two numbers, counted over the original's keys."""
    learns = rests = 0
    for key, shape, _, _, kind in rows(golden, name):
        if kind == "param" and not key.startswith(("transformer.", "word_embedding.")):
            count = int(np.prod(shape))
            is_frozen = key.startswith("lm.") and "adapter" not in key
            learns, rests = learns + count * (not is_frozen), rests + count * is_frozen
    shapes, types = shapes_and_types(config)
    ours = partition(shapes, label_parameters(types, roles(config)))
    assert (parameter_count(ours[0]), parameter_count(ours[1])) == (learns, rests)


def test_both_published_models_learn_the_same_number_of_weights():
    bottlenecks = []
    for config in (V1, V2):
        shapes = shapes_and_types(config)[0]
        adapters = {path: leaf for path, leaf in shapes.items() if "_adapter/" in path and "weight" in path}
        bottlenecks.append(parameter_count(adapters))
    assert bottlenecks[0] == bottlenecks[1] == 28 * 2 * 4096 * 1024
