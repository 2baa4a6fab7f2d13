"""The language model alone, as transformers reads it."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

from magma_jax import Magma
from magma_jax.config import to_dict
from magma_jax.convert import hf_export
from magma_jax.convert.__main__ import main
from magma_jax.convert.hf_export import to_hf
from magma_jax.convert.magma_checkpoint import from_torch, to_safetensors, to_torch
from magma_jax.convert.open_folder import open_model_folder
from magma_jax.convert.verify import read_model_config
from magma_jax.data.tokenizers.byte_level import Tokenizer, gpt2_tokenizer
from magma_jax.models.language.decoder import Decoder
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import abstract, split
from magma_jax.published.hf_config import read_config
from magma_jax.published.language_model_sources import open_lm
from magma_jax.published.open_magma import model_shapes
from magma_jax.storage.files import open_tensors
from magma_jax.storage.model_folder import write_model_folder
from tests import tiny
from tests.models.language_tiny import LANGUAGE_MODELS
from tests.published import published


@pytest.fixture(scope="module")
def exported(golden, golden_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    case = "v2_mlp_attn_normal"
    from_torch(golden_checkpoint(case), folder / "model", read_model_config(golden / f"{case}.json"))
    assert main(["to-hf", str(folder / "model"), str(folder / "hf")]) == 0
    return folder


def test_sizes_and_bits(exported):
    model = open_model_folder(exported / "model")
    ours, theirs = model.config.lm, read_config(exported / "hf")
    assert theirs.vocab_rows == theirs.head_rows == ours.head_rows > ours.vocab_rows
    assert (theirs.layers, theirs.heads, theirs.rotary_dim) == (ours.layers, ours.heads, ours.rotary_dim)
    with open_tensors(exported / "hf") as weights:
        assert not any("adapter" in key for key in weights.tensors)
        stack = model.params["lm/layers/mlp/c_proj/weight"].read()
        np.testing.assert_array_equal(weights.tensors["transformer.h.1.mlp.fc_out.weight"].read(), stack[1])
        table = weights.tensors["transformer.wte.weight"].read()
        np.testing.assert_array_equal(table[: ours.vocab_rows], model.params["lm/wte/weight"].read())
        assert not table[ours.vocab_rows :].any()


@pytest.mark.filterwarnings("ignore")  # what other libraries warn about
def test_transformers_reads_it(exported):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, report = transformers.GPTJForCausalLM.from_pretrained(exported / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


@pytest.fixture(scope="module")
def own_words(tmp_path_factory):
    """A model with a vocabulary of its own that has one thing to say: the end."""
    folder, words = tmp_path_factory.mktemp("own"), tiny.dataset().tokenizer
    params = {path: np.asarray(leaf) for path, leaf in split(MagmaModel(tiny.MODEL, rngs=nnx.Rngs(0)))[1].items()}
    params["lm/lm_head/bias"] = params["lm/lm_head/bias"].copy()
    params["lm/lm_head/bias"][words.eos_id] = 1e4
    write_model_folder(
        folder / "model", {"model": to_dict(tiny.MODEL)}, params, lambda made: words.save(made / "tokenizer")
    )
    return folder, words


@pytest.mark.filterwarnings("ignore")  # what other libraries warn about
def test_transformers_speaks_its_words_and_stops(own_words, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, words = own_words
    assert words.eos_id != 50256
    to_hf(folder / "model", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("A picture of", " a red  square, isn't it?", "\u00fc \u732b\n"):
        assert theirs(text)["input_ids"] == words.encode(text)
        assert theirs.decode(words.encode(text)) == text
    assert theirs(words.eos)["input_ids"] == [words.eos_id]
    ids = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.model_max_length
    assert ids == (words.eos_id, words.eos_id, words.eos_id, tiny.MODEL.lm.context_length)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (model.config.bos_token_id, model.config.eos_token_id) == (words.eos_id, words.eos_id)
    prompts = theirs(["A picture of", "Q: What colour is it? A:"], return_tensors="pt", padding=True)
    generated = model.generate(**prompts, max_new_tokens=20)
    assert generated[:, prompts["input_ids"].shape[1] :].tolist() == [[words.eos_id], [words.eos_id]]


def test_the_place_of_a_image_is_left_out_where_it_has_no_row(own_words, tmp_path):
    _, words = own_words
    lm = dataclasses.replace(tiny.MODEL.lm, vocab_rows=words.vocab_size, head_rows=words.vocab_size)
    hf_export._write_tokenizer(tmp_path, words, lm)
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert [token["content"] for token in added] == [words.eos]


def test_files_keep_a_vocabulary_that_is_not_gpt2s(own_words, tmp_path, capsys):
    folder, words = own_words
    to_safetensors(folder / "model", tmp_path / "x.safetensors")
    assert Magma.from_checkpoint(tmp_path / "x.safetensors").tokenizer.to_json() == words.to_json()
    from_torch(tmp_path / "x.safetensors", tmp_path / "again")
    assert Magma.from_checkpoint(tmp_path / "again").tokenizer.to_json() == words.to_json()
    capsys.readouterr()
    to_torch(folder / "model", tmp_path / "x.pt")
    assert "--tokenizer" in capsys.readouterr().err
    settings = tmp_path / "settings.json"
    settings.write_text('{"encoder": {"heads": 2}}')
    command = ["from-torch", str(tmp_path / "x.pt"), "--model-config", str(settings)]
    assert main([*command, str(tmp_path / "gpt2")]) == 0
    assert "--tokenizer sets the right one" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "own"), "--tokenizer", str(folder / "model" / "tokenizer")]) == 0
    assert "--tokenizer" not in capsys.readouterr().err
    assert Magma.from_checkpoint(tmp_path / "own").tokenizer.to_json() == words.to_json()


@pytest.mark.parametrize("name", ["gemma3", "qwen2"])
def test_other_language_models(name, tmp_path):
    """With a tied head, which is stored once, and without; the adapters are left out, both ends of text are kept."""
    config = dataclasses.replace(tiny.MODEL, lm=LANGUAGE_MODELS[name])
    params = published.noise(model_shapes(config))
    words = tiny.with_ends(gpt2_tokenizer(), 60_000)
    write_model_folder(
        tmp_path / "model", {"model": to_dict(config)}, params, lambda made: words.save(made / "tokenizer")
    )
    to_hf(tmp_path / "model", tmp_path / "hf")
    assert read_config(tmp_path / "hf") == config.lm
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / file).read_text())["eos_token_id"] == [50256, 60_000]
    assert Tokenizer.load(tmp_path / "hf").end_ids == words.end_ids
    with open_lm(tmp_path / "hf", config.lm) as (plan, _):
        expected = {f"lm/{path}": tensor.read().tobytes() for path, tensor in plan.items()}
    assert expected == {
        path: leaf.tobytes() for path, leaf in params.items() if path.startswith("lm/") and "_adapter/" not in path
    }


def test_a_language_model_by_itself(tmp_path):
    """A run of one has no prefix and no adapters; the result is a source of another run."""
    config, words = LANGUAGE_MODELS["qwen2"], gpt2_tokenizer()
    shapes = abstract(lambda: Decoder(config, rngs=nnx.Rngs(0)))[1]
    params = published.noise(shapes)
    write_model_folder(
        tmp_path / "model", {"model": to_dict(config)}, params, lambda made: words.save(made / "tokenizer")
    )
    assert main(["to-hf", str(tmp_path / "model"), str(tmp_path / "hf")]) == 0
    assert read_config(tmp_path / "hf") == config
    with open_lm(tmp_path / "hf", config) as (plan, _):
        assert {path: tensor.read().tobytes() for path, tensor in plan.items()} == {
            path: leaf.tobytes() for path, leaf in params.items()
        }


def test_nothing_is_overwritten(exported, capsys):
    assert main(["to-hf", str(exported / "model"), str(exported / "hf")]) == 2
    assert "already exists" in capsys.readouterr().err
