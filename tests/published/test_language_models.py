"""Published language models: their config.json, and files as older libraries wrote them."""

import json
import math

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from magma_jax.models.language.catalog import PUBLISHED_LANGUAGE_MODELS
from magma_jax.models.language.decoder import Decoder
from magma_jax.models.language.gpt2 import GPT2Config
from magma_jax.models.language.gpt_neo import GPTNeoConfig
from magma_jax.nn.modules import split
from magma_jax.published.hf.write import to_hf_config
from magma_jax.published.hf_config import LanguageModelError, from_hf_config, read_config
from magma_jax.published.keymap.engine import KeyMapError, check_table, to_theirs
from magma_jax.published.language_model_keys import TABLES, language_model_table
from magma_jax.published.language_model_sources import open_lm
from tests.models.language_tiny import LANGUAGE_MODELS

GPT2_JSON = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
GPT_NEO_JSON = {
    "model_type": "gpt_neo",
    "activation_function": "gelu_new",
    "attention_layers": ["global", "local"] * 12,
    "attention_types": [[["global", "local"], 12]],
    "hidden_size": 2048,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 2048,
    "num_heads": 16,
    "num_layers": 24,
    "vocab_size": 50257,
    "window_size": 256,
}
PYTHIA_JSON = {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
NEOX_JSON = PYTHIA_JSON | {
    "hidden_act": "gelu_fast",
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_attention_heads": 64,
    "num_hidden_layers": 44,
    "vocab_size": 50432,
}
GPTJ_JSON = {
    "model_type": "gptj",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-05,
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "rotary_dim": 64,
    "tie_word_embeddings": False,
    "vocab_size": 50400,
}


LLAMA_JSON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN2_JSON = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA3_JSON = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}


GEMMA2_JSON, MISTRAL_JSON = (
    to_hf_config(PUBLISHED_LANGUAGE_MODELS[name]) for name in ("google/gemma-2-2b", "mistralai/Mistral-7B-v0.1")
)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("meta-llama/Llama-3.1-8B", LLAMA_JSON),
        ("Qwen/Qwen2.5-1.5B", QWEN2_JSON),
        ("google/gemma-3-1b-pt", GEMMA3_JSON),
        ("gpt2", GPT2_JSON),
        ("EleutherAI/gpt-neo-1.3B", GPT_NEO_JSON),
        ("EleutherAI/pythia-410m", PYTHIA_JSON),
        ("EleutherAI/gpt-neox-20b", NEOX_JSON),
        ("EleutherAI/gpt-j-6b", GPTJ_JSON),
    ],
)
def test_published_configs(name, values):
    assert from_hf_config(values) == PUBLISHED_LANGUAGE_MODELS[name]


@pytest.mark.parametrize("name", PUBLISHED_LANGUAGE_MODELS)
def test_written_configs_are_read_again(name):
    config = PUBLISHED_LANGUAGE_MODELS[name]
    assert from_hf_config(json.loads(json.dumps(to_hf_config(config)))) == config


def test_the_text_part_of_a_gemma_3_with_images(tmp_path):
    """From 4B on, published files hold an image encoder too, and the config leaves out what are defaults."""
    scaling = {"factor": 8.0, "rope_type": "linear"}
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"rope_scaling": scaling, "sliding_window": 1024}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "mm_tokens_per_image": 256}
    assert from_hf_config(whole) == PUBLISHED_LANGUAGE_MODELS["google/gemma-3-4b-pt"]
    with pytest.raises(LanguageModelError, match="not known here: 'fusion'"):
        from_hf_config(whole | {"fusion": 1})
    with pytest.raises(LanguageModelError, match="text_config None is not that of a gemma3_text"):
        from_hf_config({"model_type": "gemma3"})

    config = LANGUAGE_MODELS["gemma3"]
    _, params = split(Decoder(config, rngs=nnx.Rngs(0)))
    tensors = {key: tensor.read() for key, tensor in to_theirs(language_model_table(config), params).items()}
    del tensors["lm_head.weight"]
    for number, root in enumerate(("language_model.model.", "model.language_model.")):
        folder = tmp_path / str(number)
        folder.mkdir()
        renamed = {key.replace("model.", root, 1): tensor for key, tensor in tensors.items()}
        write(
            folder,
            {"model_type": "gemma3", "text_config": to_hf_config(config)},
            renamed | {f"{'model.' * number}vision_tower.embeddings.weight": np.zeros(3, np.float32)},
        )
        with open_lm(folder, config) as (plan, _):
            assert plan.keys() == params.keys()
            assert all(tensor.read().tobytes() == np.asarray(params[path]).tobytes() for path, tensor in plan.items())


def test_other_settings_are_read():
    new = {"rope_theta": 500, "partial_rotary_factor": 0.5, "rope_type": "default"}
    config = from_hf_config(PYTHIA_JSON | {"rope_parameters": new, "use_parallel_residual": False})
    assert (config.rotary_dim, config.rotary_base, config.parallel_residual) == (32, 500.0, False)
    config = from_hf_config(GPT_NEO_JSON | {"num_layers": 3, "attention_types": [[["global"], 2], [["local"], 1]]})
    assert config.attention == ("global", "global", "local")
    assert from_hf_config(GPT2_JSON | {"n_inner": 100, "activation_function": "relu"}).feed_forward == 100


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "falcon"}, "model_type 'falcon' is none of the language models here: gptj, gpt2, gpt_neo"),
        ([], "model_type None is none of"),
        ({k: v for k, v in GPT2_JSON.items() if k != "n_head"}, "a gpt2 config lacks 'n_head'"),
        (GPT2_JSON | {"n_head": 5}, "5 heads do not divide the width 768"),
        (GPT2_JSON | {"n_layer": "12"}, r"not the config .* \(gpt2\.layers: expected int, got '12'\)"),
        (GPT2_JSON | {"n_embd": [8]}, r"n_embd \[8\] is no size"),
        (GPT2_JSON | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not offered"),
        (GPT2_JSON | {"tie_word_embeddings": False}, "tie_word_embeddings False is not offered here, only True"),
        (GPT2_JSON | {"activation_function": "swish"}, "activation 'swish' is none of gelu, gelu_new"),
        (GPT_NEO_JSON | {"num_layers": 23}, r"do not fit 23 layers"),
        (GPT_NEO_JSON | {"attention_types": [[["sparse"], 24]]}, r"do not fit 24 layers"),
        (PYTHIA_JSON | {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling .* is not offered"),
        (PYTHIA_JSON | {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not offered"),
        (
            LLAMA_JSON | {"key_scale": 2, "quantization_config": {}},
            "not known here: 'key_scale', 'quantization_config'",
        ),
        (LLAMA_JSON | {"attention_bias": True}, "attention_bias True is not offered here, only False"),
        (LLAMA_JSON | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not offered"),
        (LLAMA_JSON | {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "not known here: 'beta'"),
        (LLAMA_JSON | {"rope_scaling": {"type": "linear", "factor": 0.5}}, "scaling.factor must be at least 1"),
        (LLAMA_JSON | {"num_key_value_heads": 5}, "5 kv_heads do not divide 32 heads"),
        (QWEN2_JSON | {"use_sliding_window": True}, "use_sliding_window True is not offered"),
        (QWEN2_JSON | {"layer_types": ["sliding_attention"] * 28}, r"layer_types .* do not fit 28 layers of full_att"),
        (GEMMA3_JSON | {"num_hidden_layers": 10**12}, "layer_types .* do not fit 1000000000000 layers"),
        (GEMMA3_JSON | {"num_hidden_layers": 0}, "attention names no kind of layer"),
        (GEMMA3_JSON | {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not offered"),
        (LLAMA_JSON | {"num_attention_heads": 0}, "num_attention_heads 0 is no size"),
        (LLAMA_JSON | {"hidden_size": "4096"}, "hidden_size '4096' is no size"),
        (PYTHIA_JSON | {"num_attention_heads": True}, "num_attention_heads True is no size"),
        (LLAMA_JSON | {"rope_theta": 0}, r"rotary: base must be positive and finite, got 0\.0"),
        (LLAMA_JSON | {"rope_theta": math.nan}, "rotary: base must be positive and finite, got nan"),
        (LLAMA_JSON | {"rope_scaling": {"type": "linear", "factor": math.nan}}, "at least 1 and finite, got nan"),
        (LLAMA_JSON | {"rms_norm_eps": -1.0}, r"norm: eps must be 0 or positive and finite, got -1\.0"),
        (GPTJ_JSON | {"layer_norm_epsilon": math.inf}, "norm: eps must be 0 or positive and finite, got inf"),
        (GEMMA2_JSON | {"attn_logit_softcapping": 0.0}, "score_cap must be positive and finite"),
        (GEMMA2_JSON | {"final_logit_softcapping": -1.0}, "logit_cap must be positive and finite"),
        (MISTRAL_JSON | {"sliding_window": 0}, "window must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(values, message):
    with pytest.raises(LanguageModelError, match=message) as error:
        from_hf_config(values)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_config_says_so(tmp_path):
    with pytest.raises(LanguageModelError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(LanguageModelError, match=r"config\.json: not valid JSON"):
        read_config(tmp_path / "model.safetensors")


@pytest.mark.parametrize("kind", TABLES)
def test_tables_are_sound(kind):
    config = next(config for config in PUBLISHED_LANGUAGE_MODELS.values() if config.kind == kind)
    check_table(language_model_table(config))


SIZES = {"layers": 2, "width": 16, "heads": 2, "feed_forward": 24, "vocab_rows": 30, "context_length": 8}
SMALL_JSON = GPT2_JSON | {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_inner": 24, "vocab_size": 30, "n_positions": 8}


def write(folder, values, tensors):
    (folder / "config.json").write_text(json.dumps(values))
    save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.fixture
def gpt2_tensors():
    """The first files of GPT-2: no common name before the keys, a mask in every layer, fp16."""
    config = GPT2Config(**SIZES, dtype="float16")
    _, params = split(Decoder(config, rngs=nnx.Rngs(0)))
    tensors = {key: tensor.read() for key, tensor in to_theirs(language_model_table(config, {}), params).items()}
    del tensors["lm_head.weight"]
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.float32))
        tensors[f"h.{layer}.attn.masked_bias"] = np.float32(-1e4)
    return params, tensors


def test_old_files_of_gpt2(tmp_path, gpt2_tensors):
    params, tensors = gpt2_tensors
    assert tensors["h.1.attn.c_attn.weight"].shape == (16, 48)
    write(tmp_path, SMALL_JSON, tensors)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert read_config(path) == GPT2Config(**SIZES)
        with open_lm(path, GPT2Config(**SIZES, dtype="float16")) as (plan, _):
            assert plan.keys() == params.keys()
            for name, tensor in plan.items():
                assert tensor.read().tobytes() == np.asarray(params[name]).tobytes()


def test_a_head_that_is_not_the_table_is_refused(tmp_path, gpt2_tensors):
    _, tensors = gpt2_tensors
    write(tmp_path, SMALL_JSON, tensors | {"lm_head.weight": tensors["wte.weight"]})
    with open_lm(tmp_path, read_config(tmp_path)) as (plan, _):
        assert "lm_head/weight" not in plan
    write(tmp_path, SMALL_JSON, tensors | {"lm_head.weight": tensors["wte.weight"] + 1})
    with pytest.raises(KeyMapError, match="aliases that differ"), open_lm(tmp_path, read_config(tmp_path)):
        pass


def test_old_files_of_gpt_neo_hold_masks_too():
    table = language_model_table(GPTNeoConfig(), {"transformer.wte.weight": None})
    ignored = {entry.theirs for entry in table if type(entry).__name__ == "Ignored"}
    assert ignored == {f"transformer.h.{{layer}}.attn.attention.{name}" for name in ("bias", "masked_bias")}
