"""Parity with the PyTorch models of transformers and open_clip, random weights, where these are installed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.convert.keymap import Rule, to_ours
from magma_jax.convert.magma_table import encoder_table
from magma_jax.models.clip_resnet import CLIP_RESNETS, CLIPResNet
from magma_jax.models.gptj import GPTJ, GPTJConfig
from magma_jax.nn.modules import abstract, merge

# What other libraries warn about is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


def tensors(module):
    return {key: value.numpy() for key, value in module.state_dict().items()}


def planned(table, module, shapes):
    return {path: jnp.asarray(tensor.read()) for path, tensor in to_ours(table, tensors(module), shapes).items()}


def test_gptj_equals_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = GPTJConfig(
        layers=3, width=64, heads=4, rotary_dim=8, feed_forward=128, vocab_rows=97, head_rows=97, context_length=64
    )
    sizes = {"vocab_size": 97, "n_positions": 64, "n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8}
    torch.manual_seed(0)
    theirs = transformers.GPTJForCausalLM(
        transformers.GPTJConfig(**sizes, n_inner=128, attn_implementation="eager", tie_word_embeddings=False)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.5))
    layer, ours = "transformer.h.{layer}.", "layers/"
    names = {"ln_1": "ln_1", "mlp.fc_in": "mlp/c_fc", "mlp.fc_out": "mlp/c_proj"}
    outside = {"transformer.ln_f": "ln_f", "lm_head": "lm_head"}
    parts = ("weight", "bias")
    table = [Rule("transformer.wte.weight", "wte/weight")]
    table += [Rule(f"{a}.{part}", f"{b}/{part}") for a, b in outside.items() for part in parts]
    table += [Rule(f"{layer}{a}.{p}", f"{ours}{b}/{p}", stack="layer") for a, b in names.items() for p in parts]
    table += [
        Rule(f"{layer}attn.{name}_proj.weight", f"{ours}attn/{name}_proj/weight", stack="layer") for name in "qkv"
    ]
    table += [Rule(f"{layer}attn.out_proj.weight", f"{ours}attn/out_proj/weight", stack="layer")]
    definition, shapes, _ = abstract(lambda: GPTJ(config, rngs=nnx.Rngs(0)))
    params = planned(table, theirs, shapes)

    ids = np.random.default_rng(0).integers(0, 97, (2, 40))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), output_hidden_states=True, output_attentions=True)

    @jax.jit
    def run(params, ids):
        model = merge(definition, params)
        output = model(model.embed(ids), collect=("out", "attentions"))
        return model.logits(output.hidden), output

    logits, output = run(params, ids)
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=2e-4)
    np.testing.assert_allclose(output.hidden, expected.hidden_states[-1].numpy(), atol=2e-4)
    for i in range(config.layers):
        np.testing.assert_allclose(output.collected["attentions"][i], expected.attentions[i].numpy(), atol=1e-5)
        if i + 1 < config.layers:
            np.testing.assert_allclose(output.collected["out"][i], expected.hidden_states[i + 1].numpy(), atol=2e-4)


@pytest.mark.slow
def test_rn50x16_equals_open_clip(modified_resnet):
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(CLIP_RESNETS["RN50x16"], attention_pool=True)
    torch.manual_seed(0)
    theirs = modified_resnet(config.blocks, config.embedding_width, config.pool_heads, config.image_size, config.width)
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            # Fresh statistics and scales are the same for every channel, which would hide a wrong one.
            if value.ndim == 1 and "attnpool" not in name:
                value.copy_(torch.rand_like(value) + (0.5 if "weight" in name or "var" in name else -0.5))
    theirs.eval()
    definition, shapes, _ = abstract(lambda: CLIPResNet(config, rngs=nnx.Rngs(0)))
    params = planned(encoder_table(config), theirs, shapes)
    image = np.random.default_rng(0).normal(size=(1, 3, 384, 384)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(image)).numpy()
        grid = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(theirs.stem(torch.from_numpy(image))))))

    def run(params, images):
        model = merge(definition, params)
        grid = model(images)
        return grid, model.pool(grid)

    # This one computes a lot, so it is optimized, unlike the other tests' programs.
    options = {"xla_backend_optimization_level": "3", "xla_llvm_disable_expensive_passes": False}
    run = jax.jit(run, compiler_options=options)
    found, pooled = run(params, image.transpose(0, 2, 3, 1))
    grid = grid.numpy().transpose(0, 2, 3, 1).reshape(1, 144, 3072)
    np.testing.assert_allclose(found, grid, atol=1e-4 * np.abs(grid).max())
    np.testing.assert_allclose(pooled, expected, atol=1e-4 * np.abs(expected).max())
