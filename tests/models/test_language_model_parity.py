"""Every language model against transformers' PyTorch one: random weights, saved and read as published files are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magma_jax.convert.keymap import to_theirs
from magma_jax.convert.language_models import language_model_table, open_language_model
from magma_jax.models.language_models import build_language_model
from magma_jax.nn.modules import abstract, merge
from tests import tiny

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
        transformers.GPTNeoConfig(
            **sizes, attention_types=kinds, window_size=5, max_position_embeddings=32, **changes
        )
    )


def gpt_neox(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    rope = {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_type": "default"}
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            **sizes, vocab_size=97, max_position_embeddings=32, rope_parameters=rope, **changes
        )
    )


def gptj(**changes):
    sizes = {"vocab_size": 97, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes, tie_word_embeddings=False, **changes))


MODELS = {
    "gpt2": gpt2,
    "gpt_neo": gpt_neo,
    "gpt_neox": gpt_neox,
    "gpt_neox sequential": functools.partial(gpt_neox, use_parallel_residual=False, hidden_act="gelu_fast"),
    "gpt_neox without biases": functools.partial(gpt_neox, attention_bias=False),
    "gptj": gptj,
}


@pytest.fixture(scope="module", params=MODELS)
def both(request, tmp_path_factory):
    """The PyTorch model, and ours from the folder it saved: (theirs, config, definition, params)."""
    torch.manual_seed(0)
    theirs = MODELS[request.param](attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # Large enough for attention to choose and for greedy tokens to differ.
            scale = 0.3 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn_like(parameter) * scale + ("norm" in name or "ln_" in name) * (parameter.ndim == 1))
    folder = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(folder)
    with open_language_model(folder) as (config, plan):
        params = {path: jnp.asarray(tensor.read()) for path, tensor in plan.items()}
    definition = abstract(lambda: build_language_model(config, rngs=tiny.rngs()))[0]
    return theirs, config, definition, params


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 97, (ROWS, LENGTH))


def test_forward(both, ids):
    """Logits, hidden states before every block, and attention weights."""
    theirs, config, definition, params = both
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), output_hidden_states=True, output_attentions=True)

    @jax.jit
    def run(params, ids):
        model = merge(definition, params)
        output = model(model.embed(ids), collect=("out", "attentions"))
        return model.logits(output.hidden), output

    logits, output = run(params, ids)
    hidden = [output.inputs, *output.collected["out"][:-1], output.hidden]
    scale = float(np.abs(expected.logits.numpy()).max())
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-5 * scale)
    for found, wanted in zip(hidden, expected.hidden_states, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)
    assert len(expected.attentions) == config.layers
    for found, wanted in zip(output.collected["attentions"], expected.attentions, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_greedy_tokens(both, ids):
    """Cached decoding from a padded batch of two lengths, against each row alone in transformers."""
    theirs, _, definition, params = both
    lengths = np.array([LENGTH, LENGTH - 7], np.int32)
    expected = [
        theirs.generate(
            torch.from_numpy(row[None, :length]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, length:].numpy()
        for row, length in zip(ids, lengths, strict=True)
    ]
    options = {"max_new_tokens": NEW, "sampling": SamplingConfig(), "eos_id": None, "return_logits": True}

    @jax.jit
    def run(params, ids, lengths):
        model = merge(definition, params)
        return generate(model, model.embed(ids), lengths, row_keys(jax.random.key(0), ROWS), **options)

    result = run(params, ids, lengths)
    np.testing.assert_array_equal(result.tokens, expected)
    assert len({tuple(row) for row in expected}) == ROWS
    assert all(len(set(row)) > 2 for row in expected)


def test_conversion_back_gives_the_same_bits(both):
    theirs, config, _, params = both
    state = theirs.state_dict()
    written = to_theirs(language_model_table(config), params)
    masks = {key for key in state if key.endswith(("attn.bias", "attention.bias", "masked_bias"))}
    assert set(written) == set(state) - masks
    for key, tensor in written.items():
        assert tensor.read().tobytes() == state[key].numpy().tobytes(), key
