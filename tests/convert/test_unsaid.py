"""What tensors cannot tell is asked for or said; what a checkpoint's keys and types are, when they are not MAGMA's."""

import json

import ml_dtypes
import numpy as np
import pytest

from magma_jax import Magma
from magma_jax.convert.__main__ import main
from magma_jax.convert.magma_checkpoint import from_torch, to_safetensors
from magma_jax.convert.verify import read_model_config
from magma_jax.published.infer_config import InferenceError, infer_config
from magma_jax.storage.model_folder import CheckpointError, read_model_json
from magma_jax.storage.safetensors_file import write_safetensors
from tests.convert.checkpoints import rewrite

VIT = "vit_mlp_normal"


def magma_tensors(encoder, features=64):
    """As much of a MAGMA state dict as its config is inferred from."""
    shapes = {
        "lm.transformer.wte.weight": (100, 64),
        "lm.transformer.h.0.ln_1.weight": (64,),
        "lm.transformer.h.0.mlp.c_fc.weight": (256, 64),
        "lm.lm_head.weight": (100, 64),
        "image_prefix.proj.weight": (64, features),
    }
    shapes |= {f"image_prefix.enc.{key}": shape for key, shape in encoder.items()}
    return {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}


def vit(layers, width, patch, positions=49):
    return {
        "class_embedding": (width,),
        "conv1.weight": (width, 3, patch, patch),
        "positional_embedding": (positions + 1, width),
        **{f"transformer.resblocks.{i}.ln_1.weight": (width,) for i in range(layers)},
    }


LM = {"lm": {"n_heads": 4, "rotary_dim": 8}}


def inferred(tensors, **settings):
    said = []
    return infer_config(tensors, LM | settings, said.append), " ".join(said)


def test_a_vision_transformer_that_nobody_published_must_tell_its_heads():
    tensors = magma_tensors(vit(2, 64, 16))
    with pytest.raises(
        InferenceError, match=r'head count is unknown; give --model-config with \{"encoder": \{"heads": N'
    ):
        inferred(tensors)
    config, said = inferred(tensors, encoder={"heads": 4, "activation": "gelu"})
    assert (config.encoder.heads, config.encoder.activation, config.encoder.image_size) == (4, "gelu", 112)
    assert "encoder" not in said


@pytest.mark.parametrize(
    ("size", "heads", "name"),
    [((12, 768, 32), 12, "ViT-B/32"), ((12, 768, 16), 12, "ViT-B/16"), ((24, 1024, 14), 16, "ViT-L/14")],
)
def test_of_a_published_one_a_line_says_what_was_taken(size, heads, name):
    config, said = inferred(magma_tensors(vit(*size), size[1]))
    assert config.encoder.heads == heads
    assert f"encoder.heads {heads} (as CLIP's {name})" in said
    assert "encoder.activation quick_gelu (as OpenAI's" in said
    assert "lm.seq_len 2048 (as GPT-J)" in said
    assert said.endswith("--model-config sets what differs")
    config, said = inferred(magma_tensors(vit(*size), size[1]), encoder={"heads": 8, "activation": "quick_gelu"})
    assert config.encoder.heads == 8
    assert "encoder" not in said


def test_image_sizes():
    blocks = {
        f"layer{i}.{j}.conv1.weight": (8, 8, 1, 1) for i, count in enumerate((3, 4, 6, 3), 1) for j in range(count)
    }
    config, said = inferred(magma_tensors({"conv3.weight": (64, 3, 3, 3), **blocks}, 2048))
    assert config.encoder.image_size == 224
    assert "encoder.res 224 (as CLIP's RN50)" in said
    with pytest.raises(InferenceError, match="image size is unknown"):
        inferred(magma_tensors({"conv3.weight": (48, 3, 3, 3), **blocks}, 2048))
    stages = {f"0.1.{i}.0.{conv}.weight": (32, 32, 1, 1) for i in range(4) for conv in ("conv1", "conv3")}
    config, said = inferred(magma_tensors({"0.0.conv.weight": (16, 3, 3, 3), **stages}, 32))
    assert "encoder.res 256 (as timm's nf_resnet50)" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": {"heads": 0}}, "head count is unknown"),
        ({"encoder": {"heads": -4}}, "heads must be at least 1"),
        ({"encoder": {"heads": 5}}, "5 heads do not divide the width 64"),
        ({"encoder": {"heads": "4"}}, "encoder.heads must be of type int, got '4'"),
        ({"encoder": {"heads": 4, "activation": "swish"}}, "'swish' is not one of 'quick_gelu', 'gelu'"),
        ({"lm": {"n_heads": 3, "rotary_dim": 8}, "encoder": {"heads": 4}}, "3 heads do not divide the width 64"),
        ({"lm": {"n_heads": 4, "rotary_dim": 7}, "encoder": {"heads": 4}}, "rotary_dim 7 must be even"),
        ({"lm": {"n_heads": 4}, "encoder": {"heads": 4}}, "do not tell rotary_dim of the language model"),
        ({"lm": LM["lm"] | {"layernorm_eps": "0"}, "encoder": {"heads": 4}}, "layernorm_eps must be of type float"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(InferenceError, match=message):
        infer_config(magma_tensors(vit(2, 64, 16)), LM | settings)


def test_from_torch_of_a_vit_asks(golden, golden_checkpoint, tmp_path, capsys):
    settings = read_model_config(golden / f"{VIT}.json")
    heads = settings["encoder"].pop("heads")
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    command = ["from-torch", str(golden_checkpoint(VIT)), str(tmp_path / "out"), "--model-config"]
    assert main([*command, str(tmp_path / "settings.json")]) == 2
    assert "head count is unknown" in capsys.readouterr().err
    assert main([*command, str(golden / f"{VIT}.json")]) == 0
    assert read_model_json(tmp_path / "out")["model"]["encoder"]["heads"] == heads
    assert "encoder.activation quick_gelu" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_the_prefix_of_a_wrapper_is_named(prefix, golden, golden_checkpoint, tmp_path, capsys):
    def wrap(module):
        for key in list(module):
            module[prefix + key] = module.pop(key)

    bad = rewrite(golden_checkpoint("none"), tmp_path / "x.pt", wrap)
    assert main(["from-torch", str(bad), str(tmp_path / "out"), "--model-config", str(golden / "none.json")]) == 2
    assert f"its keys begin with {prefix!r}, which a wrapper" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_8_bit_floats_are_refused(kind, suffix, golden, golden_checkpoint, tmp_path, capsys):
    torch = pytest.importorskip("torch") if suffix == ".pt" else None
    bad = tmp_path / f"x{suffix}"
    if torch is not None:
        module = torch.load(golden_checkpoint("none"), weights_only=True)["module"]
        small = {key: leaf.to(getattr(torch, kind)) if "c_fc.weight" in key else leaf for key, leaf in module.items()}
        torch.save({"module": small}, bad)
    else:
        whole = {}
        rewrite(golden_checkpoint("none"), tmp_path / "y.pt", whole.update)
        dtype = getattr(ml_dtypes, kind)
        write_safetensors(bad, {k: v.astype(dtype) if "c_fc.weight" in k else v for k, v in whole.items()})
    settings = golden / "none.json"
    assert main(["from-torch", str(bad), str(tmp_path / "out"), "--model-config", str(settings)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"magma_jax.convert: {bad}: ")
    assert f"are in 8-bit floats, such as lm.transformer.h.0.mlp.c_fc.weight ({kind})" in line
    with pytest.raises(ValueError, match="8-bit floats"):
        Magma.from_checkpoint(bad, model_config=read_model_config(settings))


@pytest.mark.parametrize("name", ["model.safetensors", "any.safetensors", "pytorch_model.bin"])
def test_a_folder_with_one_file_of_weights(name, golden, golden_checkpoint, tmp_path):
    settings = read_model_config(golden / "none.json")
    source = tmp_path / "weights" / name
    source.parent.mkdir()
    if name.endswith(".bin"):
        source.write_bytes(golden_checkpoint("none").read_bytes())
    else:
        from_torch(golden_checkpoint("none"), tmp_path / "model", settings)
        to_safetensors(tmp_path / "model", source)
    model = Magma.from_checkpoint(source.parent, model_config=settings)
    assert model.config == Magma.from_checkpoint(source, model_config=settings).config


def test_a_folder_without_weights_is_no_model(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"not a model folder \(no model.json\)"):
            Magma.from_checkpoint(path)
