"""Language models of today against transformers' PyTorch ones, with random weights in files as they are published."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.decode import generate
from magma_jax.inference.decoding.sampling import row_keys, sampling_rows
from magma_jax.models.language.decoder import Decoder
from magma_jax.nn.modules import abstract, merge
from magma_jax.published.hf.write import to_hf_config
from magma_jax.published.hf_config import read_config
from magma_jax.published.keymap.engine import to_theirs
from magma_jax.published.language_model_keys import language_model_table
from magma_jax.published.language_model_sources import open_lm
from magma_jax.storage.files import open_tensors
from tests.data.vocabularies import published
from tests.models.language_tiny import LANGUAGE_MODELS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# What other libraries warn about is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH, PROMPT, NEW, LENGTHS = 24, 11, 9, np.array([11, 7, 4], np.int32)
# Largest difference of logits, as a part of the largest logit.
TOLERANCE = 2e-5


# Together these have everything that the models vary; the others' logits are compared by the slow tests.
SOON = ("llama", "smollm3", "gemma3", "phi3")


@functools.cache
def pytorch_model(name):
    """transformers' model, with weights large enough for attention to choose."""
    config = LANGUAGE_MODELS[name]
    values = to_hf_config(config)
    # Special tokens of the published vocabularies are beyond a tiny one.
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    settings = transformers.AutoConfig.for_model(**values, **special)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    assert type(theirs).__name__ == values["architectures"][0]
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight") and "gemma" not in config.kind
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1) + is_norm)
    return theirs


def parameters(name, folder):
    """Our parameters, from the files that transformers writes."""
    pytorch_model(name).save_pretrained(folder, max_shard_size="30KB")
    with open_lm(folder, LANGUAGE_MODELS[name]) as (plan, _):
        return {path: jnp.asarray(tensor.read()) for path, tensor in plan.items()}


@pytest.mark.supports
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_files_there_and_back(name, tmp_path, supports):
    """Config and weights, bit for bit; several files with an index, as large models have."""
    config, params = LANGUAGE_MODELS[name], parameters(name, tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert read_config(tmp_path) == config
    written = to_theirs(language_model_table(config), params)
    if config.head == "tied":
        assert written.pop("lm_head.weight") is not None  # safetensors hold a tensor once
    with open_tensors(tmp_path) as weights:
        assert set(written) == set(weights.tensors)
        for key, tensor in weights.tensors.items():
            assert written[key].read().tobytes() == tensor.read().tobytes(), key
    supports(config.kind, "round trip")


@pytest.mark.supports
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in SOON else pytest.mark.slow) for n in LANGUAGE_MODELS]
)
def test_logits(name, tmp_path, supports):
    """Whole rows, a ragged batch of prompts, and cached decoding behind each of them."""
    config, theirs, params = LANGUAGE_MODELS[name], pytorch_model(name), parameters(name, tmp_path)
    definition = abstract(lambda: Decoder(config, rngs=nnx.Rngs(0)))[0]

    @jax.jit
    def run(params, ids):
        model = merge(definition, params)
        whole = model.logits(model(model.embed(ids)).hidden)
        # What stands behind a prompt must not matter.
        prompts = jnp.where(jnp.arange(PROMPT) < LENGTHS[:, None], ids[:, :PROMPT], 1)
        output = model(model.embed(prompts), cache=model.init_cache(len(LENGTHS), LENGTH))

        def step(cache, number):
            positions = (LENGTHS + number)[:, None]
            tokens = jnp.take_along_axis(ids, positions, axis=1)
            output = model(model.embed(tokens), positions=positions, cache=cache)
            return output.cache, model.logits(output.hidden)[:, 0]

        _, steps = jax.lax.scan(step, output.cache, jnp.arange(NEW))
        return whole, model.logits(output.hidden), steps

    ids = np.random.default_rng(0).integers(0, 97, (len(LENGTHS), LENGTH))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    whole, prompts, steps = (np.asarray(logits) for logits in run(params, ids))
    differences = {
        "whole rows": np.abs(whole - expected).max(),
        "prompts": max(np.abs(prompts[row, :n] - expected[row, :n]).max() for row, n in enumerate(LENGTHS)),
        "decoding": max(np.abs(steps[:, row] - expected[row, n : n + NEW]).max() for row, n in enumerate(LENGTHS)),
    }
    for part, difference in differences.items():
        assert difference <= TOLERANCE * np.abs(expected).max(), part
        shows = "cached decoding" if part == "decoding" else "matches transformers"
        supports(config.kind, shows, difference / np.abs(expected).max())


def test_generation_ends_where_transformers_ends(tmp_path):
    """Greedily, at either of two ends of ``generation_config.json``, which the vocabulary is read with."""
    config, theirs, params = LANGUAGE_MODELS["llama"], pytorch_model("llama"), parameters("llama", tmp_path)
    definition = abstract(lambda: Decoder(config, rngs=nnx.Rngs(0)))[0]
    ids = np.random.default_rng(0).integers(0, 97, (len(LENGTHS), PROMPT))
    prompts, options = torch.from_numpy(ids), {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompts)  # id 0 is a word too
    free = theirs.generate(prompts, eos_token_id=None, **options)[:, PROMPT:].tolist()
    ends = [free[0][6], free[1][2]]
    transformers.GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"{i}": i for i in range(97)}, unk_token="0"))
    backend.add_special_tokens([str(end) for end in ends])
    words = Tokenizer.load(published(tmp_path, backend, {"eos_token": str(ends[0])}))
    assert words.end_ids == tuple(ends)

    @jax.jit
    def run(params, ids):
        model, rows = merge(definition, params), len(ids)
        sampling = sampling_rows([SamplingConfig()] * rows)
        keys = row_keys(jax.random.key(0), rows)
        lengths = jnp.full(rows, PROMPT)
        found = generate(
            model, model.embed(ids), lengths, keys, max_new_tokens=NEW, sampling=sampling, ends=words.end_ids
        )
        return found.tokens, found.lengths

    expected = theirs.generate(prompts, eos_token_id=ends, **options)[:, PROMPT:].tolist()
    stops = [next((at for at, token in enumerate(row) if token in ends), NEW) for row in expected]
    assert stops[0] <= 6
    assert stops[1] <= 2
    for tokens, length, row, stop in zip(*map(np.asarray, run(params, ids)), expected, stops, strict=True):
        assert length == stop
        assert tokens[: stop + 1].tolist() == row[: stop + 1]
