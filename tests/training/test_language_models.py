"""Runs of every language model: inside MAGMA from published files to what is served, and alone.

``scripts/support_table.py`` makes the table of docs/language_models.md from what these tests record.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from magma_jax import Magma
from magma_jax.convert.__main__ import main
from magma_jax.convert.compose import compose
from magma_jax.convert.hf_export import to_hf
from magma_jax.families.language import LANGUAGE
from magma_jax.inference.batching import batch
from magma_jax.inference.batching.config import EngineConfig
from magma_jax.inference.buckets import Buckets
from magma_jax.models.language.decoder import Decoder
from magma_jax.models.language.gpt2 import GPT2Config
from magma_jax.models.language.gpt_neo import GPTNeoConfig
from magma_jax.models.language.gpt_neox import GPTNeoXConfig
from magma_jax.models.vision.catalog import build_encoder
from magma_jax.nn.adapters import AdapterConfig
from magma_jax.nn.lora import LoraConfig
from magma_jax.nn.modules import abstract, merge, parameter_count, split
from magma_jax.published.hf.write import to_hf_config
from magma_jax.published.hf_config import read_config
from magma_jax.published.keymap.engine import to_theirs
from magma_jax.published.language_model_keys import language_model_table
from magma_jax.published.magma_keys import encoder_table
from magma_jax.serve import service
from magma_jax.serve.config import ServerConfig
from magma_jax.storage.files import open_tensors
from magma_jax.storage.model_folder import open_params
from magma_jax.storage.safetensors_file import write_safetensors
from magma_jax.storage.torch.writer import write_torch_file
from magma_jax.training.run import setup
from magma_jax.training.step.options import LossOptions
from magma_jax.training.step.train_step import init_state, make_train_step
from tests import tiny
from tests.models import language_tiny
from tests.published import test_gguf_models as test_gguf
from tests.serve.running import Running, square, user
from tests.serve.running import expected as expected_text
from tests.storage import gguf_files as gguf

SIZES = {"layers": 2, "width": 32, "heads": 2, "feed_forward": 64, "vocab_rows": 300, "context_length": 64}
LANGUAGE_MODELS = {
    "gpt2": GPT2Config(**SIZES),
    "gpt_neo": GPTNeoConfig(**SIZES, window=5),
    "gpt_neox": GPTNeoXConfig(**SIZES, rotary_dim=8),
}

ENCODER = tiny.MODEL.encoder
# Published models of every kind, and the kinds that GGUF files hold. Their vocabulary is that of the data.
SOURCES = {
    "gptj": dataclasses.replace(tiny.MODEL.lm, head_rows=300),
    **LANGUAGE_MODELS,
    **{
        config.kind: dataclasses.replace(config, vocab_rows=300)
        for name, config in language_tiny.LANGUAGE_MODELS.items()
        if "tied" not in name
    },
}
IN_GGUF = {f"{kind} from GGUF": dataclasses.replace(SOURCES[kind], rotary_scaling=None) for kind in ("llama", "qwen3")}
# Largest difference of logits from fp32, as a part of the largest logit.
BOUNDS = {"int8": 0.05, "int4": 0.5}
IDS = [1, 5, 9]


class Finished(NamedTuple):
    """A run, and what its language model was composed from.

    ``tensors`` are the language model's parameters as they are published, by our paths.
    """

    folder: Path
    config: Any
    tensors: dict[str, np.ndarray]
    run: setup.Run


def write_source(folder, name, config, tokenizer):
    """Files of a language model and, in ``clip.pt``, of an encoder; the language model's path and parameters."""
    params = random_params(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    encoder = random_params(lambda: build_encoder(ENCODER, rngs=nnx.Rngs(0)))
    tensors = {key: np.asarray(tensor.read()) for key, tensor in to_theirs(encoder_table(ENCODER), encoder).items()}
    write_torch_file(folder / "clip.pt", {"state_dict": {f"visual.{key}": value for key, value in tensors.items()}})
    if name in IN_GGUF:
        words = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"} | gguf_vocabulary(tokenizer)
        gguf.write_gguf(folder / "lm.gguf", test_gguf.metadata(config) | words, test_gguf.tensors(config, params))
        return folder / "lm.gguf", params
    (folder / "hf").mkdir()
    written = to_theirs(language_model_table(config), params)
    write_safetensors(folder / "hf/model.safetensors", without_tied_head(config, written))
    (folder / "hf/config.json").write_text(json.dumps(to_hf_config(config)))
    tokenizer.save(folder / "hf")
    return folder / "hf", params


def random_params(create):
    """Weights larger than fresh ones, so that layers matter and attention chooses."""
    random = np.random.default_rng(0)
    return {
        path: (0.1 * random.normal(size=shape.shape) + ("ln" in path)).astype(np.float32)
        for path, shape in abstract(create)[1].items()
    }


def without_tied_head(config, tensors):
    """Safetensors hold a tensor once."""
    return {key: tensor for key, tensor in tensors.items() if config.head != "tied" or key != "lm_head.weight"}


def gguf_vocabulary(tokenizer):
    content = json.loads(tokenizer.to_json())["model"]
    symbols = sorted(content["vocab"], key=content["vocab"].get)
    return {
        "tokenizer.ggml.tokens": [*symbols, tokenizer.eos],
        "tokenizer.ggml.token_type": [*[1] * len(symbols), 3],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["merges"]],
        "tokenizer.ggml.eos_token_id": len(symbols),
    }


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) for name in SOURCES | IN_GGUF],
)
def finished(request, tmp_path_factory):
    """Two steps on a composed model, with bottleneck adapters at both places and a LoRA on every matrix."""
    folder, lm, data = tmp_path_factory.mktemp("run"), (SOURCES | IN_GGUF)[request.param], tiny.dataset()
    source, tensors = write_source(folder, request.param, lm, data.tokenizer)
    adapter = AdapterConfig("scaled_parallel", 4)
    lora = LoraConfig(rank=2, alpha=3.0, targets=lm.trunk().block.matrices)
    model = dataclasses.replace(tiny.MODEL, lm=lm, attn_adapter=adapter, lora=lora)
    config = tiny.run_config(model=model, steps=2, checkpoint_every=2)
    compose(config, str(source), str(folder / "clip.pt"), folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_dataset", lambda config: data)
        run = tiny.train(dataclasses.replace(config, base=str(folder / "base")), folder / "run")
    return Finished(folder, model, tensors, run)


@pytest.mark.supports
def test_only_what_is_added_learns(finished, supports):
    """No bit of the language model changes, and every adapter does; its parameters are counted exactly."""
    run, lm = finished.run, finished.config.lm
    language = {f"lm/{path}": leaf for path, leaf in finished.tensors.items()}
    assert run.frozen.keys() == language.keys()
    assert parameter_count(run.frozen) == parameter_count(abstract(lambda: Decoder(lm, rngs=nnx.Rngs(0)))[1])
    stored, base = open_params(finished.folder / "run"), open_params(finished.folder / "base")
    for path, leaf in language.items():
        for found in (run.frozen[path], stored[path].read(), base[path].read()):
            assert np.asarray(found).tobytes() == leaf.tobytes(), path
    # A tied head is one frozen leaf and no other.
    assert ("lm/lm_head/weight" in run.frozen) == (lm.head != "tied")
    added = {path: leaf for path, leaf in run.state.trainable.items() if path.startswith("lm/")}
    inner, width, shapes = lm.width // 4, lm.width, {path: leaf.shape for path, leaf in finished.tensors.items()}
    names = [path.removeprefix("lm/").partition("/lora/")[0] for path in added if "/lora/" in path]
    matrices = [shapes[f"{name}/weight"] for name in names]
    assert len(matrices) == 2 * len(lm.trunk().block.matrices)
    loras = sum(lm.layers * 2 * (out + inputs) for _, out, inputs in matrices) // 2
    bottlenecks = 2 * lm.layers * (2 * inner * width + inner + width) + lm.layers
    assert parameter_count(added) == loras + bottlenecks
    for path, leaf in added.items():
        assert not np.array_equal(leaf, base[path].read()), path
    supports(lm.kind, "converts in")
    supports(lm.kind, "trains")


@pytest.mark.supports
def test_a_run_goes_back_to_what_was_published(finished, supports):
    lm = finished.config.lm
    to_hf(finished.folder / "run", finished.folder / "back")
    assert read_config(finished.folder / "back") == lm
    expected = without_tied_head(lm, to_theirs(language_model_table(lm), finished.tensors))
    with open_tensors(finished.folder / "back") as weights:
        assert weights.tensors.keys() == expected.keys()
        for key, tensor in weights.tensors.items():
            assert tensor.read().tobytes() == expected[key].read().tobytes(), key
    supports(lm.kind, "round trip")


@pytest.mark.supports
@pytest.mark.parametrize("dtype", BOUNDS)
def test_in_fewer_bits(finished, dtype, supports):
    """Close to fp32; all that was trained is there; what is decoded is what the whole sequence gives."""
    folder = finished.folder / dtype
    assert main(["quantize", str(finished.folder / "run"), str(folder), "--to", dtype]) == 0
    whole, small = (Magma.from_checkpoint(path) for path in (finished.folder / "run", folder))
    assert small.config.lm.dtype == dtype
    for path, leaf in finished.run.state.trainable.items():
        np.testing.assert_array_equal(small.params[path], leaf, err_msg=path)
    expected, found = (model(model.embed_tokens(IDS)[None]).logits for model in (whole, small))
    difference = float(jnp.abs(found - expected).max() / jnp.abs(expected).max())
    assert 0 < difference < BOUNDS[dtype]
    if dtype == "int4":  # what a server decodes in 8 bits is compared below
        decoded = small.generate_tokens(small.embed_tokens(IDS[:2])[None], 2, return_logits=True)
        np.testing.assert_allclose(decoded.logits[0, 0], found[0, 1], atol=1e-4 * float(jnp.abs(found).max()))
    supports(finished.config.lm.kind, "8 bits" if dtype == "int8" else "4 bits", difference)


@pytest.mark.supports
def test_a_server_answers_with_it(finished, supports, monkeypatch):
    """In 8 bits, about an image."""
    folder = finished.folder / "int8"
    if not folder.exists():
        assert main(["quantize", str(finished.folder / "run"), str(folder)]) == 0
    model = Magma.from_checkpoint(folder)
    # Fewer programs.
    monkeypatch.setattr(batch, "SEQUENCES", Buckets((32,)))
    monkeypatch.setattr(batch, "installed", lambda: False)
    monkeypatch.setattr(service, "attention_warm_up", lambda engine: None)
    server = Running(model, ServerConfig("tiny"), EngineConfig(slots=1, context=48, images=1, steps=4))
    try:
        (message,) = user(square("red"), "a")
        answer = server.post("/v1/completions", prompt=message["content"], max_tokens=6, temperature=0).json()
    finally:
        server.stop()
    assert answer["choices"][0]["text"] == expected_text(model, square("red"), "a", steps=6)
    supports(finished.config.lm.kind, "served")


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("gpt_neo", marks=pytest.mark.slow), "gpt_neox"])
def test_alone(kind):
    """A run of text: every leaf learns, a tied table from both of its uses, and the loss falls."""
    create = functools.partial(LANGUAGE.build, LANGUAGE_MODELS[kind])
    definition = abstract(lambda: create(nnx.Rngs(0)))[0]
    params = jax.jit(lambda: split(create(nnx.Rngs(0)))[1])()
    optimizer = optax.adam(3e-3)
    loss = functools.partial(LANGUAGE.loss, options=LossOptions())
    step = jax.jit(make_train_step(definition, loss, optimizer))
    state = init_state(params, {}, optimizer)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 24)))
    losses = []
    for _ in range(3):
        state, metrics = step(state, {}, {"tokens": tokens, "labels": tokens}, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[1] < losses[0]
    assert all(not np.array_equal(leaf, params[path]) for path, leaf in state.trainable.items())
    # Rows of words that do not occur learn only where the table is the head.
    absent = np.setdiff1d(np.arange(300), tokens)
    moved = np.asarray(state.trainable["wte/weight"] != params["wte/weight"])[absent]
    assert moved.all() == moved.any() == (kind != "gpt_neox")
    assert merge(definition, state.trainable).logits(jnp.zeros((1, 32))).shape == (1, 300)
