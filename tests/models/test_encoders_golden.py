"""Parity of the image encoders alone with CLIP's and timm's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.convert.golden import compare
from magma_jax.models.prefix import ImagePrefix, PrefixConfig
from magma_jax.models.vision.clip_resnet import CLIPResNet, CLIPResNetConfig
from magma_jax.models.vision.clip_vit import CLIPViT, CLIPViTConfig
from magma_jax.models.vision.nf_resnet import NFResNet, NFResNetConfig
from magma_jax.nn.convolution import average_pool
from magma_jax.nn.modules import Statistic, abstract, merge, split, variable_types
from magma_jax.published.keymap.engine import Rule, to_ours, to_theirs
from magma_jax.published.magma_keys import encoder_table
from magma_jax.storage.torch.reader import open_torch_file, state_dict

RESNET = CLIPResNetConfig((1, 2, 1, 1), 8, 96, 32, attention_pool=True)
VIT = CLIPViTConfig(layers=2, width=64, heads=4, patch=16, image_size=64, embedding_width=48)
NF_RESNET = NFResNetConfig((1, 2, 1, 1), (32, 64, 96, 128), 16, 64)


def load(create, table, path):
    """The module, with the weights of a PyTorch file."""
    graphdef, shapes, _ = abstract(create)
    with open_torch_file(path) as file:
        planned = to_ours(table, state_dict(file.tree)[0], shapes)
        return graphdef, {name: jnp.asarray(tensor.read()) for name, tensor in planned.items()}


def check(computed, golden):
    """Every golden array but the images is within its tolerance."""
    results = [compare(name, computed[name], golden[name]) for name in golden if name != "images"]
    assert all(result.ok for result in results), [result for result in results if not result.ok]


def arrays(golden, name):
    with np.load(golden / f"{name}.npz") as file:
        values = dict(file)
    return values, jnp.asarray(values["images"].astype(np.float32).transpose(0, 2, 3, 1))


def nchw(x):
    return x.transpose(0, 3, 1, 2)


def test_clip_resnet(golden, golden_checkpoint):
    expected, images = arrays(golden, "enc_clip_resnet")
    table = encoder_table(RESNET)
    graphdef, params = load(lambda: CLIPResNet(RESNET, rngs=nnx.Rngs(0)), table, golden_checkpoint("enc_clip_resnet"))

    @jax.jit
    def run(params, images):
        model = merge(graphdef, params)
        x = model.stem(images, "frozen")
        out = {"stem_out": nchw(x)}
        for i in (1, 2, 3, 4):
            x = getattr(model, f"layer{i}")(x, "frozen")
            out[f"layer{i}_out"] = nchw(x)
        grid = model(images)
        out |= {"grid_tokens": grid, "attnpool_out": model.pool(grid)}

        trained = merge(graphdef, params)
        grid = trained(images, batch_norm="batch")
        out["train/layer4_out"] = nchw(grid.reshape(x.shape))
        out["train/attnpool_out"] = trained.pool(grid)
        return out, split(trained)[1]

    computed, after = run(params, images)
    statistics = {path for path, kind in variable_types(merge(graphdef, params)).items() if kind is Statistic}
    theirs = to_theirs(table, {path: after[path] for path in statistics})
    computed |= {f"train/bn_after/{key}": tensor.read() for key, tensor in theirs.items()}
    np.testing.assert_array_equal(
        computed["grid_tokens"], computed["layer4_out"].transpose(0, 2, 3, 1).reshape(2, 9, -1)
    )
    check(computed, expected)
    for path in set(params) - statistics:
        np.testing.assert_array_equal(after[path], params[path])


def test_clip_vit(golden, golden_checkpoint):
    expected, images = arrays(golden, "enc_clip_vit")
    graphdef, params = load(
        lambda: CLIPViT(VIT, rngs=nnx.Rngs(0)), encoder_table(VIT), golden_checkpoint("enc_clip_vit")
    )

    @jax.jit
    def run(params, images):
        model = merge(graphdef, params)
        x = model.embed(images)
        out = {"conv1_out": nchw(model.conv1(images)), "ln_pre_out": x, "out": model(images)}
        definition, layers = split(model.blocks)
        for i in range(VIT.layers):
            x = merge(definition, {path: leaf[i] for path, leaf in layers.items()})(x)
            out[f"resblock{i}_out_LND"] = x.transpose(1, 0, 2)
        out["ln_post_cls_out"] = model.ln_post(x[:, 0])
        out["grid"] = model.ln_post(x[:, 1:])
        return out

    computed = run(params, images)
    check(computed, expected)

    # The grid is another output of the same weights, without the projection.
    as_grid = CLIPViTConfig(**{**VIT.__dict__, "output": "grid"})
    params.pop("proj")
    grid_definition = abstract(lambda: CLIPViT(as_grid, rngs=nnx.Rngs(0)))[0]
    grid = jax.jit(lambda params: merge(grid_definition, params)(images))(params)
    np.testing.assert_allclose(grid, computed["grid"], atol=1e-5)


def test_nf_resnet_inside_its_prefix(golden, golden_checkpoint):
    expected, images = arrays(golden, "enc_nfresnet")
    settings = json.loads((golden / "enc_nfresnet.json").read_text())
    table = encoder_table(NF_RESNET, "image_prefix.enc.", "encoder/")
    table += [
        Rule(f"image_prefix.{part}.{name}", f"{part}/{name}") for part in ("proj", "ln") for name in ("weight", "bias")
    ]
    prefix = PrefixConfig(image_positions=2, dropout=0.0)

    def create():
        return ImagePrefix(NFResNet(NF_RESNET, rngs=nnx.Rngs(0)), 40, prefix, rngs=nnx.Rngs(0))

    graphdef, params = load(create, table, golden_checkpoint("enc_nfresnet"))
    betas = np.concatenate(merge(graphdef, params).encoder.betas())
    np.testing.assert_allclose(betas, [block["beta"] for block in settings["blocks"]], rtol=1e-6)

    @jax.jit
    def run(params, images):
        def loss(params):
            model = merge(graphdef, params)
            return jnp.sum(jnp.square(model(model.encoder(images))))

        model = merge(graphdef, params)
        x = model.encoder.stem(images)
        out = {"stem_out": nchw(x)}
        first = model.encoder.stage1.first
        out["stage0_block0_conv1_out"] = nchw(first.conv1(jax.nn.relu(x) * model.encoder.betas()[0][0]))
        for i, betas in enumerate(model.encoder.betas()):
            x = getattr(model.encoder, f"stage{i + 1}")(x, betas)
            out[f"stage{i}_out"] = nchw(x)
        features = model.encoder(images)
        return out | {"enc_out": features[..., None, None], "prefix": model(features)}, jax.grad(loss)(params)

    computed, grads = run(params, images)
    theirs = to_theirs(table, grads)
    computed |= {f"grad_of_sum_prefix_squared/{key}": tensor.read() for key, tensor in theirs.items()}
    check(computed, expected)


@pytest.mark.parametrize(
    ("create", "size"),
    [
        (lambda: CLIPResNet(RESNET, rngs=nnx.Rngs(0)), 96),
        (lambda: CLIPViT(VIT, rngs=nnx.Rngs(0)), 64),
        (lambda: NFResNet(NF_RESNET, rngs=nnx.Rngs(0)), 64),
    ],
    ids=["clip_resnet", "clip_vit", "nf_resnet"],
)
def test_bfloat16_is_close_to_float32(create, size):
    graphdef, params = split(create())
    images = jax.random.normal(jax.random.key(0), (2, size, size, 3))
    run = jax.jit(lambda params, images: merge(graphdef, params)(images))
    full, half = run(params, images), run(params, images.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert float(jnp.abs(half - full).max()) < 0.05 * float(jnp.abs(full).max())


def test_average_pool_drops_what_fills_no_window():
    x = jnp.arange(2 * 5 * 7 * 3.0).reshape(2, 5, 7, 3)
    expected = np.asarray(x)[:, :4, :6].reshape(2, 2, 2, 3, 2, 3).mean((2, 4))
    np.testing.assert_allclose(average_pool(x, 2), expected, rtol=1e-6)
