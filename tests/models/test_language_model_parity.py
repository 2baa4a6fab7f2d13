"""Every language model against transformers' PyTorch one: random weights, saved and read as published files are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.decode import generate
from magma_jax.inference.decoding.sampling import row_keys, sampling_rows
from magma_jax.models.language.catalog import PUBLISHED_LANGUAGE_MODELS
from magma_jax.models.language.decoder import Decoder
from magma_jax.nn.modules import abstract, merge, parameter_count
from magma_jax.published.hf.write import to_hf_config
from magma_jax.published.hf_config import read_config
from magma_jax.published.keymap.engine import to_theirs
from magma_jax.published.language_model_keys import language_model_table
from magma_jax.published.language_model_sources import open_lm
from magma_jax.storage.files import open_tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# What other libraries warn about is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

ROWS, LENGTH, NEW = 2, 20, 9


def gpt2(**changes):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=3, n_head=4, **changes)
    )


def gpt_neo(**changes):
    sizes = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 48, "vocab_size": 97}
    kinds = [[["global", "local"], 1], [["local"], 1]]
    return transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(**sizes, attention_types=kinds, window_size=5, max_position_embeddings=32, **changes)
    )


def gpt_neox(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    rope = {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_type": "default"}
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**sizes, vocab_size=97, max_position_embeddings=32, rope_parameters=rope, **changes)
    )


def gptj(**changes):
    sizes = {"vocab_size": 97, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes, tie_word_embeddings=False, **changes))


MODELS = {
    "gpt2": gpt2,
    "gpt_neo": gpt_neo,
    "gpt_neox": gpt_neox,
    "gpt_neox sequential": functools.partial(
        gpt_neox, use_parallel_residual=False, hidden_act="gelu_fast", attention_bias=False
    ),
    "gptj": gptj,
}


@pytest.fixture(scope="module", params=MODELS)
def both(request, tmp_path_factory):
    """The PyTorch model, and ours from the folder it saved: (folder, theirs, config, definition, params)."""
    torch.manual_seed(0)
    theirs = MODELS[request.param](attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # Large enough for attention to choose, and for greedy tokens to differ.
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1) + is_norm)
    folder = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(folder)
    config = read_config(folder)
    with open_lm(folder, config) as (plan, _):
        params = {path: jnp.asarray(tensor.read()) for path, tensor in plan.items()}
    definition = abstract(lambda: Decoder(config, rngs=nnx.Rngs(0)))[0]
    return folder, theirs, config, definition, params


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 97, (ROWS, LENGTH))


@pytest.mark.supports
def test_forward(both, ids, supports):
    """Logits, hidden states before every block, and attention weights."""
    _, theirs, config, definition, params = both
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), output_hidden_states=True, output_attentions=True)

    @jax.jit
    def run(params, ids):
        model = merge(definition, params)
        output = model(model.embed(ids), collect=("out", "attentions"))
        return model.logits(output.hidden), output

    logits, output = run(params, ids)
    hidden = [output.inputs, *output.collected["out"][:-1], output.hidden]
    wanted = expected.logits.numpy()
    np.testing.assert_allclose(logits, wanted, atol=1e-5 * np.abs(wanted).max())
    supports(config.kind, "matches transformers", np.abs(logits - wanted).max() / np.abs(wanted).max())
    for found, wanted in zip(hidden, expected.hidden_states, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)
    assert len(expected.attentions) == config.layers
    for found, wanted in zip(output.collected["attentions"], expected.attentions, strict=True):
        # Scores that are not scaled are larger, and so is what rounding leaves of them.
        np.testing.assert_allclose(found, wanted.numpy(), atol=5e-5)


@pytest.mark.supports
def test_cached_decoding(both, ids, supports):
    """A padded batch of two lengths, against each row alone in transformers: greedy tokens and all their logits."""
    _, theirs, config, definition, params = both
    lengths = [LENGTH, LENGTH - 7]
    options = {"sampling": sampling_rows([SamplingConfig()] * ROWS)}
    options |= {"max_new_tokens": NEW, "ends": (), "return_logits": True}

    @jax.jit
    def run(params, ids, lengths):
        model = merge(definition, params)
        return generate(model, model.embed(ids), lengths, row_keys(jax.random.key(0), ROWS), **options)

    result = run(params, ids, np.array(lengths, np.int32))
    for row, length in enumerate(lengths):
        prompt = torch.from_numpy(ids[row : row + 1, :length])
        greedy = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        whole = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)
        np.testing.assert_array_equal(result.tokens[row], whole[0, length:].numpy())
        with torch.no_grad():
            logits = theirs(whole).logits[0, length - 1 : -1].numpy()
        np.testing.assert_allclose(result.logits[row], logits, atol=1e-5 * np.abs(logits).max())
        difference = np.abs(np.asarray(result.logits[row]) - logits).max() / np.abs(logits).max()
        supports(config.kind, "cached decoding", difference)


@pytest.mark.supports
def test_conversion_back_gives_the_same_bits(both, supports):
    folder, _, config, _, params = both
    written = to_theirs(language_model_table(config), params)
    # The second name of a tied head; safetensors hold a tensor once.
    if "lm_head/weight" not in params:
        del written["lm_head.weight"]
    with open_tensors(folder) as weights:
        assert set(written) == set(weights.tensors)
        for key, tensor in weights.tensors.items():
            assert written[key].read().tobytes() == tensor.read().tobytes(), key
    supports(config.kind, "round trip")


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED_LANGUAGE_MODELS)
def test_full_size_counts(name):
    """Keys, shapes and the number of parameters of the full-size model, without memory."""
    config = PUBLISHED_LANGUAGE_MODELS[name]
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**to_hf_config(config))
        )
    shapes = abstract(lambda: Decoder(config, rngs=nnx.Rngs(0)))[1]
    assert parameter_count(shapes) == sum(parameter.numel() for parameter in theirs.parameters())
    ours = {key: tuple(tensor.shape) for key, tensor in to_theirs(language_model_table(config), shapes).items()}
    ours["lm_head.weight"] = ours.pop("embed_out.weight", ours.get("lm_head.weight"))  # its name inside transformers 5
    masks = (".attn.bias", ".attention.bias", "masked_bias")
    state = {key: tuple(value.shape) for key, value in theirs.state_dict().items() if not key.endswith(masks)}
    assert ours == state
