"""What holds for every language model: sizes, positions and masks, adapters, and a place in MAGMA."""

import dataclasses
import functools
import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.config import from_dict
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.decode import generate
from magma_jax.inference.decoding.sampling import row_keys, sampling_rows
from magma_jax.models.language.catalog import PUBLISHED_LANGUAGE_MODELS
from magma_jax.models.language.decoder import Decoder
from magma_jax.models.language.gpt2 import GPT2Config
from magma_jax.models.language.gpt_neo import GPTNeoConfig
from magma_jax.models.language.gpt_neox import GPTNeoXConfig
from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.models.magma import MagmaConfig, MagmaModel
from magma_jax.nn.adapters import AdapterConfig
from magma_jax.nn.masks import Mask
from magma_jax.nn.modules import AdapterParam, LanguageParam, abstract, merge, parameter_count, split
from magma_jax.nn.transformer.cache import write_row_by_row, write_scattered
from magma_jax.training.step.optim import Group, label_parameters, partition
from tests import tiny
from tests.models.language_tiny import LANGUAGE_MODELS

SIZES = {"layers": 3, "width": 32, "heads": 4, "feed_forward": 64, "vocab_rows": 50, "context_length": 24}
TINY = {
    "gptj": GPTJConfig(**SIZES, rotary_dim=4, head_rows=50),
    "gpt2": GPT2Config(**SIZES),
    "gpt_neo": GPTNeoConfig(**SIZES, window=3),
    "gpt_neox": GPTNeoXConfig(**SIZES, rotary_dim=4),
    **LANGUAGE_MODELS,
}
LEARNED_POSITIONS = ["gpt2", "gpt_neo"]

# Numbers of transformers' models without a second count of tied weights (the slow test counts them again); Pythia's are
# those of its paper, table 1, GPT-NeoX-20B's and GPT-J's those of their model cards.
COUNTS = {
    "EleutherAI/gpt-j-6b": 6_050_882_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "EleutherAI/gpt-neo-125m": 125_198_592,
    "EleutherAI/gpt-neo-1.3B": 1_315_575_808,
    "EleutherAI/gpt-neo-2.7B": 2_651_307_520,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "EleutherAI/pythia-12b": 11_846_072_320,
    "EleutherAI/gpt-neox-20b": 20_554_567_680,
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-1.3b": 1_315_758_080,
    "facebook/opt-2.7b": 2_651_596_800,
    "facebook/opt-6.7b": 6_658_473_984,
    "facebook/opt-13b": 12_853_473_280,
    "facebook/opt-30b": 29_974_540_288,
    "facebook/opt-66b": 65_719_701_504,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "google/gemma-3-4b-pt": 3_880_263_168,
    "google/gemma-3-12b-pt": 11_766_034_176,
    "google/gemma-3-27b-pt": 27_009_346_304,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/OLMo-2-1124-13B": 13_716_198_400,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200,
}


def sizes():
    """The published names: the first of each kind, and the others for the slow tests."""
    kinds = set()
    for name, config in PUBLISHED_LANGUAGE_MODELS.items():
        yield pytest.param(name, marks=pytest.mark.slow) if config.kind in kinds else name
        kinds.add(config.kind)


@pytest.mark.parametrize("name", list(sizes()))
def test_published_sizes(name):
    config = PUBLISHED_LANGUAGE_MODELS[name]
    _, shapes, types = abstract(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    assert parameter_count(shapes) == COUNTS[name]
    assert set(types.values()) == {LanguageParam}
    # A tied head is one leaf.
    assert ("lm_head/weight" in shapes) == (config.head != "tied")


def fresh(name, mlp=None, attn=None):
    """Definition, parameters and their types."""

    def create():
        return Decoder(TINY[name], mlp_adapter=mlp, attn_adapter=attn, rngs=nnx.Rngs(3))

    definition, _, types = abstract(create)
    return definition, jax.jit(lambda: split(create())[1])(), types


@functools.cache
def bare(name):
    definition, params, _ = fresh(name)
    # Larger weights than fresh ones, so that layers matter and attention chooses.
    return definition, {path: 8 * leaf if leaf.ndim > 2 else leaf for path, leaf in params.items()}


@functools.cache
def runner(name):
    definition, _ = bare(name)

    @jax.jit
    def run(params, embeddings, positions=None, mask=None):
        model = merge(definition, params)
        return model.logits(model(embeddings, positions=positions, mask=mask).hidden)

    return run


def embeddings_of(batch, length, width=32):
    return 0.02 * jax.random.normal(jax.random.key(0), (batch, length, width))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "gpt_neox"])
def test_two_documents_in_one_row_give_what_they_give_alone(name):
    """A mask keeps them apart and positions start again; local attention and learned positions follow both."""
    run, params = runner(name), bare(name)[1]
    both = embeddings_of(1, 16)
    document = jnp.repeat(jnp.arange(2), jnp.array([7, 9]), total_repeat_length=16)
    positions = jnp.concatenate([jnp.arange(7), jnp.arange(9)])[None]
    packed = run(params, both, positions, Mask("causal", segments=document[None]))[0]
    # What stands behind a document changes nothing in it.
    first, second = run(params, jnp.stack([both[0], jnp.roll(both[0], -7, axis=0)]))
    np.testing.assert_allclose(packed[:7], first[:7], atol=1e-4)
    np.testing.assert_allclose(packed[7:], second[:9], atol=1e-4)
    assert not np.allclose(packed[7:], first[7:], atol=1e-2)


def test_local_layers_see_their_window_within_any_mask():
    definition, params = bare("gpt_neo")

    @jax.jit
    def run(params, embeddings, mask):
        return merge(definition, params)(embeddings, mask=mask, collect=("attentions",)).collected["attentions"]

    at = np.arange(12)
    mask = Mask("full", extra=jnp.broadcast_to(at != 4, (1, 12, 12)))
    seen = run(params, embeddings_of(1, 12), mask)[:, 0, 0] > 0
    expected = np.broadcast_to(at != 4, (12, 12))
    np.testing.assert_array_equal(seen[0], expected)
    np.testing.assert_array_equal(seen[1], expected & (at[:, None] - at < 3))
    np.testing.assert_array_equal(seen[2], expected)


@pytest.mark.parametrize("name", LEARNED_POSITIONS)
def test_learned_positions_end_with_the_context(name):
    params = bare(name)[1]
    with pytest.raises(ValueError, match=r"25 positions exceed the context of 24"):
        runner(name)(params, embeddings_of(1, 25))
    assert jax.eval_shape(runner(name), params, embeddings_of(1, 24)).shape == (1, 24, 50)


def test_padding_may_pass_the_context():
    """The last new token stands on the last position, whatever the prompt was padded to."""
    definition, params = bare("gpt2")
    prompt = embeddings_of(1, 20)
    options = {"sampling": sampling_rows([SamplingConfig()])}
    options |= {"max_new_tokens": 4, "ends": (), "return_logits": True}

    @jax.jit
    def run(params, embeddings):
        keys = row_keys(jax.random.key(0), 1)
        return generate(merge(definition, params), embeddings, jnp.array([20]), keys, **options)

    exact, padded = (run(params, jnp.pad(prompt, ((0, 0), (0, more), (0, 0)))) for more in (0, 12))
    np.testing.assert_array_equal(padded.tokens, exact.tokens)
    np.testing.assert_allclose(padded.logits, exact.logits, atol=1e-4)


@pytest.mark.parametrize("name", LEARNED_POSITIONS)
def test_positions_go_on_through_a_image(name):
    """A picture of four positions, then words: the first word stands on position 4."""
    config = dataclasses.replace(tiny.MODEL, lm=TINY[name], mlp_adapter=None, attn_adapter=None)
    definition, shapes, _ = abstract(lambda: MagmaModel(config, rngs=nnx.Rngs(0)))
    params = {path: jnp.ones(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}
    params["lm/wpe/weight"] = embeddings_of(1, 24)[0]

    @jax.jit
    def run(params, features, words):
        model = merge(definition, params)
        sequence = jnp.concatenate([model.embed_features(features), model.embed_tokens(words)], axis=1)
        return sequence, model(sequence).inputs

    sequence, inputs = run(params, jnp.ones((1, 4, 32)), jnp.array([[5, 6, 7]]))
    np.testing.assert_array_equal(inputs[0], sequence[0] + params["lm/wpe/weight"][:7])


@pytest.mark.parametrize("name", TINY)
def test_no_leaf_of_the_language_model_learns(name):
    """With adapters at both places, 4 arrays each learn: weights and biases down and up. All others are frozen."""
    adapter, config = AdapterConfig(), TINY[name]
    _, shapes, types = abstract(lambda: Decoder(config, mlp_adapter=adapter, attn_adapter=adapter, rngs=nnx.Rngs(0)))
    labels = label_parameters(types, {"language": "frozen", "adapter": Group()})
    learns, frozen, statistics = partition(shapes, labels)
    plain = abstract(lambda: Decoder(config, rngs=nnx.Rngs(0)))[1]
    assert not statistics
    assert frozen == plain
    inner, width = config.width // adapter.downsample_factor, config.width
    assert parameter_count(learns) == 2 * config.layers * (2 * inner * width + inner + width)
    assert len(learns) == 8
    assert {types[path] for path in frozen} == {LanguageParam}


@pytest.mark.parametrize(
    ("name", "mlp", "attn"),
    [
        ("gpt2", "normal", "parallel"),
        pytest.param("gpt_neo", "scaled_parallel", "normal", marks=pytest.mark.slow),
        ("gpt_neox", "parallel", "scaled_parallel"),
        *(pytest.param(name, "normal", "parallel", marks=pytest.mark.slow) for name in LANGUAGE_MODELS),
    ],
)
def test_adapters_in_both_places(name, mlp, attn):
    """Fresh ones change nothing; only they learn; without them the language model is there again, bit for bit."""
    definition, params, types = fresh(name, AdapterConfig(mlp, init="zero_up"), AdapterConfig(attn, init="zero_up"))
    labels = label_parameters(types, {"language": "frozen", "adapter": Group()})
    learns, frozen, _ = partition(params | bare(name)[1], labels)
    assert {types[path] for path in learns} == {AdapterParam}
    assert set(frozen) == set(bare(name)[1])
    embeddings = embeddings_of(2, 12, TINY[name].width)
    expected = runner(name)(frozen, embeddings)

    def logits(learns):
        model = merge(definition, learns, frozen)
        logits = model.logits(model(embeddings).hidden)
        return jnp.square(logits).mean(), logits

    run = jax.jit(jax.value_and_grad(logits, has_aux=True))
    np.testing.assert_allclose(run(learns)[0][1], expected, atol=1e-5)
    rng = np.random.default_rng(0)
    trained = {path: leaf + rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in learns.items()}
    (_, changed), gradients = run(trained)
    assert not np.allclose(changed, expected, atol=1e-2)
    assert all(float(jnp.abs(leaf[0]).max()) > 0 for leaf in gradients.values())

    @jax.jit
    def removed(frozen, embeddings):
        model = merge(definition, trained, frozen)
        model.remove_adapters()
        return model.logits(model(embeddings).hidden)

    np.testing.assert_array_equal(removed(frozen, embeddings), expected)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_an_mlp_adapter_reads_what_its_mlp_reads(name):
    """The second LayerNorm's output: of the sum where the parts follow each other, of the input where not."""
    definition, params, _ = fresh(name, AdapterConfig("parallel", init="zero_up"))
    params["layers/mlp_adapter/up/weight"] += 1.0
    params["layers/ln_2/bias"] += 0.5

    @jax.jit
    def run(params, x):
        model = merge(definition, params)
        output = model(x, collect=("attn", "mlp_inner", "mlp", "out"))
        first = {field: value[0] for field, value in output.collected.items()}
        layer_definition, layers = split(model.layers)
        layer = merge(layer_definition, {path: leaf[0] for path, leaf in layers.items()})
        h = layer.ln_2(output.inputs + first["attn"] if name == "gpt2" else output.inputs)
        mlp = layer.mlp(h)
        return first, (mlp, layer.mlp_adapter(h, mlp), output.inputs + first["attn"] + first["mlp"])

    first, (mlp, adapted, out) = run(params, embeddings_of(1, 6))
    np.testing.assert_allclose(first["mlp_inner"], mlp, atol=1e-5)
    np.testing.assert_allclose(first["mlp"], adapted, atol=1e-5)
    np.testing.assert_allclose(first["out"], out, atol=1e-5)
    assert not np.allclose(adapted, mlp, atol=1e-2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: GPT2Config(heads=5), "5 heads do not divide the width 768"),
        (lambda: GPTJConfig(head_rows=50257), "head_rows 50257 is below vocab_rows 50258"),
        (lambda: GPTNeoConfig(window=0), "window must be at least 1, got 0"),
        (lambda: GPTNeoConfig(attention=()), "attention names no kind of layer"),
        (lambda: GPTNeoXConfig(rotary_dim=65), "rotary_dim 65 must be even and fit in one head"),
    ],
)
def test_sizes_that_do_not_fit_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        config()


def test_the_documentation_names_every_size_and_runs(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(root / "scripts")
    text = (root / "docs" / "language_models.md").read_text()
    assert text == importlib.import_module("language_model_table").document(), "run scripts/language_model_table.py"
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict = {}
    exec(compile(blocks[0], "language_models.md", "exec"), names)
    assert from_dict(MagmaConfig, names["model"]).lm.dtype == "bfloat16"
    exec(compile(blocks[1].partition("\nconfig =")[0], "language_models.md", "exec"), names)


def test_the_table_of_what_is_supported_is_that_of_tests(monkeypatch):
    """Every recorded cell names tests that are there and marked; ``--check`` runs them, and names cells without any."""
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(root / "scripts")
    support = importlib.import_module("support_table")
    found = support.stored()
    assert support.DOCUMENT.read_text() == support.document(found), "run scripts/support_table.py"
    for kind, column, test in support.tests_of(found):
        file, _, name = test.partition("::")
        assert file in support.TESTS
        marked = rf"@pytest\.mark\.supports\n(@.*\n(    .*\n|\)\n)*)*def {name}\("
        assert re.search(marked, (root / file).read_text()), (kind, column, test)
    lost = {kind: cells for kind, cells in found.items() if kind != "llama"}
    assert {f"llama: {column}" for column in support.COLUMNS} <= set(support.lacking(lost))


def test_writing_the_cache_row_by_row_is_a_scatter():
    """On TPUs; a position behind the last slot writes nothing."""
    kept, new = np.arange(2 * 3 * 2 * 4 * 5.0).reshape(2, 3, 2, 4, 5), -np.ones((3, 1, 2, 5))
    arguments = (1, jnp.array([2, 0, 1]), jnp.array([[3], [4], [0]]), jnp.asarray(new))
    written = write_row_by_row(jnp.asarray(kept), *arguments)
    np.testing.assert_array_equal(written, write_scattered(jnp.asarray(kept), *arguments))
    assert (written != kept).sum() == 2 * 2 * 5
