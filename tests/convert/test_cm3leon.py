"""CM3Leon in OPT's and metaseq's layouts, in and out, and verified against a golden file."""

import json

import numpy as np
import pytest
import tokenizers

from magma_jax.convert.__main__ import main as convert
from magma_jax.data.tokenizers.byte_level import EOS, Tokenizer
from magma_jax.families import family_of_checkpoint, open_generator
from magma_jax.published.infer_config import InferenceError
from magma_jax.published.keymap.engine import KeyMapError
from magma_jax.published.open_cm3leon import PARTS, join, open_torch_cm3leon
from magma_jax.storage.files import open_tensors
from magma_jax.storage.torch.writer import write_torch_file

SIZES = {"text": 40, "image": 8, "sentinels": 4, "image_tokens": 4}


@pytest.fixture(scope="module")
def opt(golden_checkpoint):
    return golden_checkpoint("cm3leon/opt_nobias_tiny")


@pytest.fixture(scope="module")
def tensors(opt):
    with open_tensors(opt) as weights:
        return {key: tensor.read() for key, tensor in weights.tensors.items()}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Arguments of from-torch."""
    folder = tmp_path_factory.mktemp("settings")
    (folder / "sizes.json").write_text(json.dumps({"cm3leon": SIZES}))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, EOS: 2}, merges=[]))
    Tokenizer(backend).save(folder)
    return ["--model-config", str(folder / "sizes.json"), "--tokenizer", str(folder)]


def metaseq(tensors, *, joint):
    found = {key.removeprefix("model."): value for key, value in tensors.items() if key != "lm_head.weight"}
    return (
        {key: value.read() if hasattr(value, "read") else value for key, value in join(found).items()}
        if joint
        else found
    )


def test_the_golden_file_is_verified_by_the_command(opt, golden, tmp_path, capsys):
    command = ["verify", str(opt), "--golden", str(golden / "cm3leon/opt_nobias_tiny.npz")]
    assert convert(command) == 0
    assert "5 quantities compared, 0 past tolerance" in capsys.readouterr().out
    arrays = dict(np.load(command[-1]))
    np.savez(tmp_path / "wrong.npz", **arrays | {"logits": arrays["logits"] + 1e-3})
    assert convert([*command[:3], str(tmp_path / "wrong.npz")]) == 1
    assert "PAST TOLERANCE" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["opt", "metaseq", "joint"])
def test_a_file_comes_back_bit_for_bit(kind, tensors, settings, tmp_path, capsys):
    stored = tensors if kind == "opt" else metaseq(tensors, joint=kind == "joint")
    config = {"h": 4, "activation_fn": "gelu"}
    write_torch_file(tmp_path / "in.pt", {"state_dict": stored, "config": config, "step": 7})
    assert family_of_checkpoint(tmp_path / "in.pt").name == "cm3leon"
    assert convert(["from-torch", str(tmp_path / "in.pt"), str(tmp_path / "model"), *settings]) == 0
    assert "2 layers of width 32, gelu, vocabulary 61" in capsys.readouterr().out
    assert convert(["to-torch", str(tmp_path / "model"), str(tmp_path / "out.pt")]) == 0
    with open_tensors(tmp_path / "out.pt") as weights:
        assert list(weights.tensors) == list(stored)
        assert weights.others == {"config": config, "step": 7}
        for key, tensor in weights.tensors.items():
            np.testing.assert_array_equal(tensor.read(), stored[key])
    assert convert(["verify", str(tmp_path / "in.pt"), str(tmp_path / "model")]) == 0
    model = open_generator(tmp_path / "model")
    assert model.config.vocabulary.text == 40
    np.testing.assert_array_equal(
        model.params["layers/attn/v_proj/weight"][1], tensors["model.decoder.layers.1.self_attn.v_proj.weight"]
    )


def test_the_joint_matrix_holds_keys_values_and_queries(tensors):
    joint = metaseq(tensors, joint=True)["decoder.layers.0.self_attn.qkv_proj.weight"]
    names = [f"model.decoder.layers.0.self_attn.{part}.weight" for part in PARTS]
    assert PARTS == ("k_proj", "v_proj", "q_proj")
    np.testing.assert_array_equal(joint, np.concatenate([tensors[name] for name in names]))


@pytest.mark.parametrize(
    ("changes", "config", "settings", "error", "message"),
    [
        (
            {},
            {"h": 4},
            {},
            InferenceError,
            "which of its 61 ids are texts and images is in no tensor; give --model-config",
        ),
        ({}, {}, SIZES, InferenceError, "the number of heads is in no tensor; give"),
        ({}, {"h": 5}, SIZES, InferenceError, "5 heads do not divide the width 32"),
        ({}, {"h": 4, "act": "silu"}, SIZES, InferenceError, "cm3leon.activation is one of relu, gelu"),
        ({}, {"h": 4}, SIZES | {"text": 400}, InferenceError, "more than the 61 vocab_rows"),
        ({}, {"h": 4}, SIZES | {"text": "many"}, InferenceError, "cm3leon.text is a number of at least 1, got 'many'"),
        (
            {"model.decoder.final_layer_norm.weight": np.ones(32, np.float32)},
            {"h": 4},
            SIZES,
            KeyMapError,
            "final_layer_norm",
        ),
    ],
)
def test_refusals(changes, config, settings, error, message, tensors, tmp_path):
    write_torch_file(tmp_path / "in.pt", {"state_dict": tensors | changes, "config": config})
    with pytest.raises(error, match=message), open_torch_cm3leon(tmp_path / "in.pt", {"cm3leon": settings}):
        pass
