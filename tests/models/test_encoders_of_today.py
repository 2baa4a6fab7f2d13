"""SigLIP, DINO and CLIP against transformers' PyTorch models, with random weights in files as they are published."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.config import ConfigError
from magma_jax.models.vision.catalog import build_encoder
from magma_jax.models.vision.clip_vit import CLIPViTConfig
from magma_jax.models.vision.vit import DINOv2Config, DINOv3Config, SiglipConfig
from magma_jax.nn.modules import abstract, merge
from magma_jax.published.encoder_sources import open_encoder, read_encoder_config
from magma_jax.published.hf.encoders import vit_table
from magma_jax.published.hf.position_tables import resized_table
from magma_jax.published.keymap.engine import check_table, to_theirs
from magma_jax.storage.files import open_tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# What other libraries warn about is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

# Largest difference of features, as a part of the largest one.
TOLERANCE = 2e-5
SIZES = {"layers": 2, "width": 24, "heads": 2, "feed_forward": 40, "patch": 4, "image_size": 20}
VITS = {
    "siglip": SiglipConfig(**SIZES),
    "siglip2": SiglipConfig(**SIZES),
    "dinov2": DINOv2Config(**SIZES | {"feed_forward": 48}),
    "dinov2 gated": DINOv2Config(**SIZES | {"feed_forward": 32}, gated=True),
    "dinov2 registers": DINOv2Config(**SIZES | {"feed_forward": 48}, registers=3),
    "dinov3": DINOv3Config(**SIZES, registers=3),
    "dinov3 gated": DINOv3Config(**SIZES, registers=0, gated=True),
    "clip": CLIPViTConfig(2, 24, 2, 4, 20, 16, output="grid"),
    "clip gelu": CLIPViTConfig(2, 24, 2, 4, 20, 16, activation="gelu", output="grid"),
}
# Together these have everything that the encoders vary but the gates.
SOON = ("siglip", "dinov2 registers", "dinov3", "clip")


def settings(name, **changes):
    """transformers' model of a name."""
    common = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 20,
    }
    kind, *how = name.split()
    gated = "gated" in how
    if kind == "siglip":
        return transformers.SiglipVisionModel, transformers.SiglipVisionConfig(**common, intermediate_size=40)
    if kind == "siglip2":
        del common["image_size"]
        config = transformers.Siglip2VisionConfig(**common, intermediate_size=40, num_patches=25)
        return transformers.Siglip2VisionModel, config
    if kind == "dinov2" and "registers" in how:
        config = transformers.Dinov2WithRegistersConfig(**common, mlp_ratio=2, num_register_tokens=3)
        return transformers.Dinov2WithRegistersModel, config
    if kind == "dinov2":
        return transformers.Dinov2Model, transformers.Dinov2Config(**common, mlp_ratio=2, use_swiglu_ffn=gated)
    if kind == "dinov3":
        mlp = {"use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu", "intermediate_size": 40}
        config = transformers.DINOv3ViTConfig(**common, **mlp, num_register_tokens=0 if gated else 3)
        return transformers.DINOv3ViTModel, config
    act = {"hidden_act": "gelu" if "gelu" in how else "quick_gelu", "intermediate_size": 96, "projection_dim": 16}
    return transformers.CLIPVisionModelWithProjection, transformers.CLIPVisionConfig(**common, **act)


@functools.cache
def pytorch_model(name):
    cls, config = settings(name)
    torch.manual_seed(0)
    theirs = cls._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            size = 0.1 if parameter.ndim == 1 else 0.3
            parameter.copy_(torch.randn_like(parameter) * size + (parameter.ndim == 1) * 0.5)
    return theirs


def images(side=20, count=2):
    return np.random.default_rng(0).normal(size=(count, side, side, 3)).astype(np.float32)


def expected(name, pixels):
    """Grid and pooled vector."""
    theirs, side = pytorch_model(name), pixels.shape[1] // 4
    inputs = torch.from_numpy(pixels.transpose(0, 3, 1, 2))
    resized = pixels.shape[1] != 20
    with torch.no_grad():
        if name == "siglip2":
            patches = pixels.reshape(len(pixels), side, 4, side, 4, 3).transpose(0, 1, 3, 2, 4, 5)
            patches = torch.from_numpy(patches.reshape(len(pixels), side * side, -1).copy())
            seen = torch.ones(patches.shape[:2], dtype=torch.int32)
            shapes = torch.tensor([[side, side]] * len(pixels))
            output = theirs(pixel_values=patches, pixel_attention_mask=seen, spatial_shapes=shapes)
        elif name.startswith(("siglip", "clip")):
            output = theirs(inputs, interpolate_pos_encoding=resized)
        else:
            output = theirs(inputs)
    hidden = output.last_hidden_state
    if name.startswith("clip"):
        hidden = theirs.vision_model.post_layernorm(hidden)[:, 1:].detach()
        return hidden.numpy(), output.image_embeds.numpy()
    return hidden[:, -side * side :].numpy(), output.pooler_output.numpy()


def features(config, plan, pixels):
    definition = abstract(lambda: build_encoder(config, rngs=nnx.Rngs(0)))[0]
    params = {path: jnp.asarray(tensor.read()) for path, tensor in plan.items()}
    return np.asarray(jax.jit(lambda params, x: merge(definition, params)(x))(params, pixels))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SOON else pytest.mark.slow) for n in VITS])
def test_features(name, tmp_path, record_property):
    """Grid and pooled vector, from files read by their config; ``--junitxml=FILE`` writes the differences."""
    pytorch_model(name).save_pretrained(tmp_path)
    assert read_encoder_config(tmp_path) == VITS[name]
    for output, wanted in zip(("grid", "pooled"), expected(name, images()), strict=True):
        config = dataclasses.replace(VITS[name], output=output)
        with open_encoder(tmp_path, config) as (plan, _):
            found = features(config, plan, images())
        difference = np.abs(found - wanted).max() / np.abs(wanted).max()
        record_property(output, f"{difference:.1e}")
        assert found.shape == wanted.shape
        assert difference <= TOLERANCE, output


@pytest.mark.slow
@pytest.mark.parametrize("side", [12, 32])
@pytest.mark.parametrize("name", [n for n in VITS if n not in ("clip gelu", "dinov2 gated", "dinov3 gated")])
def test_other_image_sizes(name, side, tmp_path):
    """Tables of positions are resized as transformers does it, to fewer and to more positions."""
    pytorch_model(name).save_pretrained(tmp_path)
    config = dataclasses.replace(VITS[name], image_size=side)
    with open_encoder(tmp_path, config) as (plan, _):
        found = features(config, plan, images(side))
    wanted, _ = expected(name, images(side))
    assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize("side", [3, 8])
def test_resized_tables_equal_pytorchs(side):
    table = np.random.default_rng(0).normal(size=(25, 6)).astype(np.float32)
    grid = torch.from_numpy(table.reshape(1, 5, 5, 6).transpose(0, 3, 1, 2).copy())
    for how, options in {
        "cubic": {"mode": "bicubic"},
        "smooth cubic": {"mode": "bicubic", "antialias": True},
        "smooth linear": {"mode": "bilinear", "antialias": True},
    }.items():
        wanted = torch.nn.functional.interpolate(grid, (side, side), align_corners=False, **options)
        wanted = wanted.numpy().transpose(0, 2, 3, 1).reshape(-1, 6)
        np.testing.assert_allclose(resized_table(table, side, how), wanted, atol=2e-6, err_msg=how)
    assert resized_table(table, 5, "cubic") is table


@pytest.mark.parametrize("name", [name for name in VITS if not name.startswith("clip")])
def test_files_there_and_back(name, tmp_path):
    """Bit for bit, whatever else a file holds."""
    pytorch_model(name).save_pretrained(tmp_path)
    config = dataclasses.replace(VITS[name], output="pooled")
    table = vit_table(config, flat_patches=name == "siglip2")
    check_table(table)
    with open_encoder(tmp_path, config) as (plan, _), open_tensors(tmp_path) as weights:
        written = to_theirs(table, {path: tensor.read() for path, tensor in plan.items()})
        assert set(weights.tensors) - set(written) <= {"embeddings.mask_token", "embeddings.register_tokens"}
        for key, tensor in written.items():
            assert tensor.read().tobytes() == weights.tensors[key].read().tobytes(), key


def test_clips_of_open_clip_with_layer_scale(tmp_path):
    open_clip = pytest.importorskip("open_clip.transformer")
    torch.manual_seed(0)
    theirs = open_clip.VisionTransformer(
        image_size=20, patch_size=4, width=24, layers=2, heads=2, mlp_ratio=4.0, ls_init_value=0.3, output_dim=16
    ).eval()
    torch.save({f"visual.{key}": value for key, value in theirs.state_dict().items()}, tmp_path / "clip.pt")
    config = CLIPViTConfig(2, 24, 2, 4, 20, 16, activation="gelu", layer_scale=True)
    with open_encoder(tmp_path / "clip.pt", config) as (plan, _):
        found = features(config, plan, images())
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(images().transpose(0, 3, 1, 2))).numpy()
    assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    with (
        pytest.raises(ConfigError, match="it has layer_scale True, not False"),
        open_encoder(tmp_path / "clip.pt", dataclasses.replace(config, layer_scale=False)),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_attention_heads": 4}, "does not fit model.encoder of the config: it has heads 4, not 2"),
        ({"model_type": "vit"}, "model_type 'vit' is none of the encoders here: siglip_vision_model, "),
        ({"query_key_norm": True}, "settings that are not known here: 'query_key_norm'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not offered here, only 'gelu_pytorch_tanh'"),
        ({"hidden_size": "24"}, "not the config of a published encoder"),
        (
            {"model_type": "dinov2", "hidden_act": "gelu"},
            "settings that are not known here: 'intermediate_size', 'vision_use",
        ),
    ],
)
def test_encoders_that_do_not_fit(changes, says, tmp_path):
    pytorch_model("siglip").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(ConfigError, match=says) as caught, open_encoder(tmp_path, VITS["siglip"]):
        pass
    assert "\n" not in str(caught.value)
