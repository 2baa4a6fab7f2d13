"""The frozen-model count against counts by hand, and against what tracing the real step finds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.families import family_of
from magma_jax.families.magma import MAGMA
from magma_jax.families.magma.flops import encoder_flops, step_flops
from magma_jax.families.magma.loss import caption_loss
from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.models.magma import MagmaConfig
from magma_jax.models.prefix import PrefixConfig
from magma_jax.models.vision.clip_resnet import CLIPResNetConfig
from magma_jax.models.vision.clip_vit import CLIPViTConfig
from magma_jax.nn.adapters import AdapterConfig
from magma_jax.nn.modules import abstract, merge
from magma_jax.training.step.flops import matmul_flops, peak_flops
from magma_jax.training.step.optim import Group, label_parameters, partition
from magma_jax.training.step.options import LossOptions
from magma_jax.training.step.terms import LOSS
from tests import tiny


def build(model):
    return abstract(lambda: family_of(model).build(model, nnx.Rngs(0)))


def count(model, groups=None, **sizes):
    _, shapes, types = build(model)
    labels = label_parameters(types, {**family_of(model).roles(model), **(groups or {})})
    return family_of(model).flops(model, shapes, labels, batch_of(**sizes))


def batch_of(batch_size, length, pack=1, cached_features=False):
    """Shapes of a batch, as far as the count looks at them."""
    images = (batch_size, pack) if pack > 1 else (batch_size,)
    shapes = {"tokens": (batch_size, length), "features" if cached_features else "images": images}
    return shapes | ({"segments": (batch_size, length)} if pack > 1 else {})


def test_full_size_v2_by_hand():
    """256 rows, 144 positions of an image and 112 tokens: 255 positions are run."""
    adapters = AdapterConfig(downsample_factor=8)
    model = MagmaConfig(GPTJConfig(dtype="bfloat16"), mlp_adapter=adapters, attn_adapter=adapters)
    flops = count(model, batch_size=256, length=112)
    width, layers = 4096, 28
    frozen = layers * (4 * width**2 + 2 * width * 4 * width)  # 5.64e9
    bottlenecks = layers * 2 * 2 * width * width // 8  # 0.235e9
    assert flops.frozen == 256 * 4 * (frozen * 255 + 50400 * width * 112)
    assert flops.trained == 256 * 6 * (bottlenecks * 255 + 3072 * width * 144)
    assert flops.attention == 256 * 12 * 255**2 * width * layers
    assert flops.encoder == 256 * 3 * encoder_flops(CLIPResNetConfig())
    assert flops.total == flops.frozen + flops.trained + flops.attention + flops.encoder
    # The usual rule of 6 operations for every weight and position overstates.
    usual = 256 * 6 * ((frozen + bottlenecks) * 255 + 50400 * width * 112 + 3072 * width * 144)
    assert 1.4 < usual / (flops.frozen + flops.trained) < 1.5


def test_packed_rows_have_room_for_several_images():
    """Two images of four positions each and all 20 tokens of a row are run; the whole square of scores counts."""
    flops = count(tiny.MODEL, batch_size=3, length=20, pack=2)
    single = count(tiny.MODEL, batch_size=3, length=20)
    assert flops.encoder == 2 * single.encoder
    assert flops.attention == 3 * 12 * (2 * 4 + 20) ** 2 * 32 * 2
    assert single.attention == 3 * 12 * (4 + 19) ** 2 * 32 * 2


def test_vit_encoder_by_hand():
    config = CLIPViTConfig()
    tokens, width = config.positions or 0, config.width
    flops = encoder_flops(dataclasses.replace(config, output="grid"))
    tokens = (config.image_size // config.patch) ** 2
    patches = 2 * tokens * 3 * config.patch**2 * width
    block = 24 * (tokens + 1) * width**2 + 4 * (tokens + 1) ** 2 * width
    assert flops == pytest.approx(patches + config.layers * block, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({}, {}),
        ({}, {"encoder": "frozen"}),
        ({"prefix": PrefixConfig(mapping="mlp", dropout=0.0)}, {"language": Group()}),
        ({"prefix": PrefixConfig(mapping="transformer", dropout=0.0)}, {}),
        ({"encoder": dataclasses.replace(tiny.MODEL.encoder, output="pooled")}, {}),
    ],
    ids=["usual", "frozen encoder", "all learn", "transformer", "pooled"],
)
def test_the_formula_finds_what_tracing_the_gradient_finds(changes, groups):
    """Every matmul of the traced step. The count of an encoder that learns includes the gradient of its pixels."""
    model = dataclasses.replace(tiny.MODEL, **changes)
    graphdef, shapes, types = build(model)
    labels = label_parameters(types, {**MAGMA.roles(model), **groups})
    trainable, frozen, statistics = partition(shapes, labels)
    images = jax.ShapeDtypeStruct((3, 64, 64, 3), jnp.float32)
    texts = {"tokens": jax.ShapeDtypeStruct((3, 20), jnp.int32), "labels": jax.ShapeDtypeStruct((3, 20), jnp.int32)}

    def loss(trainable, images, frozen, statistics, texts):
        model = merge(graphdef, trainable, frozen, statistics)
        return caption_loss(model, {"images": images, **texts}, None, options=LossOptions())[LOSS].total

    gradient = jax.grad(loss, argnums=(0,) if groups.get("encoder") == "frozen" else (0, 1))
    traced = matmul_flops(jax.make_jaxpr(gradient)(trainable, images, frozen, statistics, texts).jaxpr)
    formula = step_flops(model, shapes, labels, batch_of(3, 20)).total
    assert traced == pytest.approx(formula, rel=1e-6)


def test_language_model_alone():
    model = GPTJConfig(layers=2, width=32, heads=2, rotary_dim=8, feed_forward=64, vocab_rows=300, head_rows=310)
    flops = count(model, {"language": Group()}, batch_size=4, length=11)
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 310 * 32
    assert flops.frozen == 0
    assert flops.trained == 4 * 6 * 10 * weights
    assert flops.attention == 4 * 12 * 10**2 * 32 * 2


def test_a_tied_head_counts_where_it_predicts():
    _, shapes, types = build(tiny.MODEL)
    labels = label_parameters(types, MAGMA.roles(tiny.MODEL))
    tied = {path: leaf for path, leaf in shapes.items() if not path.startswith("lm/lm_head/")}
    sizes = {"batch_size": 1, "length": 20}
    without, full = (step_flops(tiny.MODEL, given, labels, batch_of(**sizes)) for given in (tied, shapes))
    assert full.frozen - without.frozen == 4 * 20 * 32 * (310 - 300)


def test_cached_features_cost_nothing_and_unknown_matrices_are_refused():
    _, shapes, types = build(tiny.MODEL)
    labels = label_parameters(types, {**MAGMA.roles(tiny.MODEL), "encoder": "frozen"})
    sizes = {"batch_size": 1, "length": 20}
    assert step_flops(tiny.MODEL, shapes, labels, batch_of(**sizes, cached_features=True)).encoder == 0
    assert step_flops(tiny.MODEL, shapes, labels, batch_of(**sizes)).encoder == encoder_flops(tiny.MODEL.encoder)
    with pytest.raises(ValueError, match="parameter lm/other/weight: its family's flops do not say"):
        step_flops(tiny.MODEL, {**shapes, "lm/other/weight": np.zeros((2, 2))}, labels, batch_of(**sizes))


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("cpu", None),
    ],
)
def test_peaks_by_device_kind(kind, peak):
    assert peak_flops(kind) == peak
