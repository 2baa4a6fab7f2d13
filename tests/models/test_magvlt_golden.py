"""MAGVLT's transformer equals the original: masks, hidden states, logits; and its weights survive both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.models.magvlt.layout import attention_mask, layout_of
from magma_jax.models.magvlt.model import MagvltModel, canvas_of
from magma_jax.nn.modules import abstract, merge
from magma_jax.published.keymap.engine import KeyMapError, check_table, to_ours, to_theirs
from magma_jax.published.magvlt_keys import transformer_table, without_tokenizer
from magma_jax.storage.torch.reader import open_torch_file, state_dict

TINY = MagvltConfig(layers=2, width=32, heads=4, image_rows=37, text_rows=53, image_positions=16, text_positions=8)
TOLERANCE = 1e-4
CASES = ("t2i", "t2i_sel", "i2t", "i2t_lr", "i2t_tb", "it2it")


@pytest.fixture(scope="module")
def tensors(golden_checkpoint):
    with open_torch_file(golden_checkpoint("magvlt/stage2")) as file:
        return {key: tensor.read() for key, tensor in state_dict(file.tree)[0].items()}


@pytest.fixture(scope="module")
def model(tensors):
    definition, shapes, _ = abstract(lambda: MagvltModel(TINY, rngs=nnx.Rngs(0)))
    planned = to_ours(transformer_table(), tensors, shapes, allow_cast=False)
    return merge(definition, {path: jnp.asarray(tensor.read()) for path, tensor in planned.items()})


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "magvlt/forward.npz") as file:
        return {name: jnp.asarray(array) for name, array in file.items()}


def order_of(case):
    return "text_first" if case.startswith("t2i") else "image_first"


def batch_of(case, arrays):
    """The case's canvas, from the sequence that the original assembled."""
    layout = layout_of(TINY, order_of(case))
    masked = arrays[f"{case}/loc_mask"]
    return canvas_of(
        arrays[f"{case}/img"],
        arrays[f"{case}/txt"],
        arrays[f"{case}/n_txt"],
        image_masked=masked[:, layout.image : layout.image + 16],
        text_masked=masked[:, layout.text : layout.text + 8],
        selectors=arrays[f"{case}/selectors"],
    )


@pytest.mark.parametrize("case", CASES)
def test_attention_mask(case, arrays):
    mask = attention_mask(TINY, order_of(case), arrays[f"{case}/n_txt"])
    np.testing.assert_array_equal(mask.dense(28, 28), arrays[f"{case}/attn_mask_effective"])


@pytest.mark.parametrize("case", CASES)
def test_forward(case, model, arrays):
    with jax.default_matmul_precision("highest"):
        canvas = batch_of(case, arrays)
        layout = layout_of(TINY, order_of(case))
        states = model(
            model.embed(order_of(case), canvas), mask=attention_mask(TINY, order_of(case), canvas.text_lengths)
        )
        hidden = model.hidden(order_of(case), canvas)
        computed = {
            "hidden": states.hidden,
            "logits_img": model.logits(hidden.image, "image"),
            "logits_txt": model.logits(hidden.text, "text"),
        }
        if order_of(case) == "image_first":
            computed["length_logits"] = model.length_logits(hidden.bot)
    assert layout.bot == (1 if order_of(case) == "text_first" else 19)
    for name, value in computed.items():
        np.testing.assert_allclose(value, arrays[f"{case}/{name}"], rtol=0, atol=TOLERANCE, err_msg=name)


def test_both_directions_keep_every_bit(tensors):
    shapes = abstract(lambda: MagvltModel(TINY, rngs=nnx.Rngs(0)))[1]
    table = transformer_table()
    check_table(table)
    ours = {path: tensor.read() for path, tensor in to_ours(table, tensors, shapes, allow_cast=False).items()}
    theirs = {key: tensor.read() for key, tensor in to_theirs(table, ours).items()}
    assert theirs.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert theirs[key].tobytes() == tensor.tobytes(), key


def test_keys_that_are_not_the_transformers(tensors):
    shapes = abstract(lambda: MagvltModel(TINY, rngs=nnx.Rngs(0)))[1]
    whole = tensors | {"model_vqvae.quant_conv.bias": np.zeros(8, np.float32)}
    assert without_tokenizer(whole.items()).keys() == tensors.keys()
    with pytest.raises(KeyMapError, match=r"model_vqvae\.quant_conv\.bias"):
        to_ours(transformer_table(), whole, shapes)
    with pytest.raises(KeyMapError, match="length_head/weight"):
        to_ours(transformer_table(), {key: t for key, t in tensors.items() if "length" not in key}, shapes)
