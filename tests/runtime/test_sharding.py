"""Every parameter has a place on every mesh, and moments lie where their parameters lie."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from magma_jax.models.language.catalog import PUBLISHED_LANGUAGE_MODELS
from magma_jax.models.language.decoder import Decoder
from magma_jax.models.magma import SHARDINGS, MagmaConfig, MagmaModel
from magma_jax.models.vision.catalog import PUBLISHED_ENCODERS
from magma_jax.nn.adapters import AdapterConfig
from magma_jax.nn.convolution import Conv2d
from magma_jax.nn.modules import EncoderParam, abstract
from magma_jax.runtime import sharding
from magma_jax.runtime.sharding import MeshConfig, make_mesh
from magma_jax.training.step.train_step import init_state


@pytest.fixture(scope="module", params=["RN50x16", "ViT-L/14-grid", "nf_resnet50", "efficientnet_lite0"])
def shapes(request):
    adapter = AdapterConfig(downsample_factor=8)
    config = MagmaConfig(
        encoder=PUBLISHED_ENCODERS[request.param], mlp_adapter=adapter, attn_adapter=adapter, classes=3
    )
    return abstract(lambda: MagmaModel(config, rngs=nnx.Rngs(0)))[1]


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_every_full_size_parameter_has_a_place(shapes, sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    for path, placement in sharding.parameter_shardings(shapes, mesh, SHARDINGS).items():
        placement.shard_shape(shapes[path].shape)  # raises where an axis does not divide


def test_a_device_holds_its_share(shapes):
    mesh = make_mesh(MeshConfig(fsdp=4, model=2))
    shardings = sharding.parameter_shardings(shapes, mesh, SHARDINGS)
    # Adapters and encoder are not split over model: they are small, and it would cost an all-reduce each.
    held = sum(int(np.prod(shardings[path].shard_shape(shape.shape))) for path, shape in shapes.items())
    assert held < 1.1 * sum(shape.size for shape in shapes.values()) / 8


def test_replicated_frozen_weights_are_split_over_model_alone():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    spec = sharding.parameter_spec("lm/layers/mlp/c_fc/weight", (28, 16384, 4096), mesh, (), over_fsdp=False)
    assert spec == P(None, "model")


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = make_mesh(MeshConfig(fsdp=8))
    assert sharding.parameter_spec("lm/layers/mlp/c_fc/weight", (2, 16, 12), mesh, ()) == P()


def test_a_large_parameter_without_a_row_is_an_error():
    with pytest.raises(ValueError, match="no sharding row; add one to its family"):
        sharding.parameter_spec("lm/new/matrix", (2048, 2048), make_mesh(MeshConfig()), ())


def test_a_parameter_that_two_rows_match_is_an_error():
    rows = ((r"lm/layers/mlp/c_fc/weight", ("fsdp", None)),)
    with pytest.raises(ValueError, match=r"lm/layers/mlp/c_fc/weight matches two sharding rows, .*; narrow one"):
        sharding.parameter_spec("lm/layers/mlp/c_fc/weight", (2, 16, 16), make_mesh(MeshConfig()), rows)


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/gpt-neo-125m", "EleutherAI/pythia-70m", "EleutherAI/gpt-j-6b"])
def test_a_language_model_alone_lies_as_it_does_inside_magma(name):
    config = PUBLISHED_LANGUAGE_MODELS[name]
    shapes = abstract(lambda: Decoder(config, rngs=nnx.Rngs(0)))[1]
    mesh = make_mesh(MeshConfig(fsdp=4, model=2))
    inside = {f"lm/{path}": shape for path, shape in shapes.items()}
    alone = sharding.parameter_shardings(shapes, mesh, SHARDINGS)
    assert {f"lm/{path}": place for path, place in alone.items()} == sharding.parameter_shardings(
        inside, mesh, SHARDINGS
    )
    held = sum(int(np.prod(alone[path].shard_shape(shape.shape))) for path, shape in shapes.items())
    # GPT-J's table and head have 50,400 rows; biases and norms are whole on every device.
    assert held < 1.02 * sum(shape.size for shape in shapes.values()) / 8


def test_moments_lie_where_their_parameters_lie():
    mesh = make_mesh(MeshConfig(fsdp=8))
    trainable = {"lm/layers/mlp_adapter/down/weight": jax.ShapeDtypeStruct((2, 4, 16), np.float32)}
    state = jax.eval_shape(lambda t: init_state(t, {}, optax.adam(1e-3)), trainable)
    placed = sharding.placed(state, sharding.tree_shardings(state, mesh, ()))
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(placed) if leaf.ndim]
    assert specs == [P(None, None, "fsdp")] * 3
    assert placed.step.sharding.spec == P()


def test_a_mesh_that_does_not_fit_the_devices_is_an_error():
    with pytest.raises(ValueError, match="data -1 x fsdp 3 x model 1 does not fit 8 devices"):
        make_mesh(MeshConfig(fsdp=3))
    with pytest.raises(ValueError, match=r"mesh\.fsdp must be at least 1"):
        MeshConfig(fsdp=-1)


def test_slices_are_the_outer_axis_and_split_the_batch_alone():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, model=2, slice=2))
    assert [[device.id for device in part.flat] for part in mesh.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sharding.parameter_spec("lm/layers/mlp/c_fc/weight", (28, 16384, 4096), mesh, ()) == P(None, "model", "fsdp")
    assert sharding.batch_shards(mesh) == 4


@pytest.mark.parametrize(
    ("belongs", "count", "message"),
    [
        ((0, 0, 1, 1), 1, r"mesh\.slice is 1, but the TPUs belong to 2: set mesh\.slice=2"),
        ((None, None), 2, r"mesh\.slice is 2, but the TPUs belong to 1: set mesh\.slice=1"),
        ((0, 0, 1), 2, "slices of different sizes, 1 and 2 devices"),
    ],
)
def test_tpus_know_their_slices(belongs, count, message):
    devices = [SimpleNamespace(platform="tpu", slice_index=index) for index in belongs]
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(slice=count), devices)


def test_weights_of_convolutions_travel_and_activations_do_not():
    rngs = nnx.Rngs(0)
    sizes = ((16, 64), (64, 16), (16, 64))
    graph, params = nnx.split([Conv2d(*channels, 1, param=EncoderParam, rngs=rngs) for channels in sizes])

    def loss(params, x):
        for conv in nnx.merge(graph, params):
            x = jax.nn.relu(conv(x))
        return jnp.square(x).sum()

    mesh = make_mesh(MeshConfig(fsdp=8))
    by_outputs = jax.NamedSharding(mesh, P("fsdp"))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_outputs), params)
    x = jax.ShapeDtypeStruct((8, 2, 2, 16), jnp.float32, sharding=sharding.batch_sharding(mesh))
    text = jax.jit(sharding.on_mesh(jax.grad(loss), mesh)).lower(params, x).compile().as_text()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text)
    assert sorted(gathered) == ["16,64", "64,16", "64,16"]


def test_rows_of_a_batch_are_split_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    batch = sharding.place_batch({"tokens": np.arange(8).reshape(4, 2)}, mesh, 4)["tokens"]
    assert batch.sharding.shard_shape(batch.shape) == (1, 2)
    assert sharding.batch_shards(mesh) == 4
