"""The language model alone, as transformers reads it."""

import numpy as np
import pytest

from magma_jax.convert.__main__ import main
from magma_jax.convert.verify import read_model_config
from magma_jax.published.hf_config import read_config
from magma_jax.published.magma_checkpoint import from_torch, open_model_folder
from magma_jax.storage.files import open_tensors


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


def test_nothing_is_overwritten(exported, capsys):
    assert main(["to-hf", str(exported / "model"), str(exported / "hf")]) == 2
    assert "already exists" in capsys.readouterr().err
