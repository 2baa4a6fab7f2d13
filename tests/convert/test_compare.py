"""``verify A B``: layouts, differences, exit status."""

import json

import numpy as np
import pytest

from magma_jax.convert.__main__ import main
from magma_jax.convert.compare import compare_checkpoints
from magma_jax.convert.magma_checkpoint import from_torch, to_safetensors
from magma_jax.convert.verify import read_model_config
from magma_jax.storage.safetensors_file import write_safetensors
from magma_jax.storage.torch.writer import write_torch_file
from tests.convert.checkpoints import rewrite


@pytest.fixture(scope="module")
def layouts(golden, golden_checkpoint, tmp_path_factory):
    """One model as PyTorch file, model folder and safetensors file."""
    folder = tmp_path_factory.mktemp("layouts")
    pt = golden_checkpoint("v2_mlp_attn_normal")
    from_torch(pt, folder / "model", read_model_config(golden / "v2_mlp_attn_normal.json"))
    to_safetensors(folder / "model", folder / "x.safetensors")
    return {"pt": pt, "folder": folder / "model", "safetensors": folder / "x.safetensors"}


@pytest.mark.parametrize("pair", ["pt folder", "folder pt", "folder folder", "safetensors pt", "folder safetensors"])
def test_one_model_in_two_layouts(pair, layouts, capsys):
    a, b = (str(layouts[name]) for name in pair.split())
    assert main(["verify", a, b]) == 0
    table = capsys.readouterr().out
    assert "all bits equal, 0 problems" in table
    assert "lm/layers/mlp/c_fc" in table or "lm.transformer.h.*.mlp.*.c_fc" in table


def test_differences_are_named_by_module(layouts, golden_checkpoint, tmp_path, capsys):
    def change(module):
        swapped = [f"lm.transformer.h.{layer}.mlp.0.c_fc.weight" for layer in (0, 1)]
        module[swapped[0]], module[swapped[1]] = module[swapped[1]], module[swapped[0]]
        module["image_prefix.ln.bias"] = module["image_prefix.ln.bias"] + np.float32(0.5)
        module["image_prefix.proj.bias"] = np.zeros(3, np.float32)
        del module["lm.transformer.ln_f.bias"], module["word_embedding.weight"]

    other = rewrite(layouts["pt"], tmp_path / "other.pt", change)
    assert main(["verify", str(layouts["folder"]), str(other)]) == 1
    lines = capsys.readouterr().out.splitlines()
    (c_fc,) = (line for line in lines if line.startswith("lm.transformer.h.*.mlp.*.c_fc"))
    assert c_fc.endswith("DIFFERS")
    (ln,) = (line for line in lines if line.startswith("image_prefix.ln"))
    assert "0.5" in ln
    assert any("image_prefix.proj.bias has shape" in line for line in lines)
    assert any(f"lm.transformer.ln_f.bias is missing in {other}" in line for line in lines)
    assert "3 with unequal bits, 2 problems, 1 aliases" in lines[-1]
    assert main(["verify", str(layouts["folder"]), str(other), "--json", "--tolerance", "9"]) == 1
    assert json.loads(capsys.readouterr().out)["modules"]["image_prefix.ln"]["difference"] == pytest.approx(0.5)


def test_numbers_are_compared_and_bits_reported(tmp_path):
    values = np.array([1.0, np.nan, np.inf, -0.0], np.float16)
    write_safetensors(tmp_path / "half.safetensors", {"a.b": values})
    write_torch_file(tmp_path / "full.pt", {"a.b": values.astype(np.float32)})
    result = compare_checkpoints(tmp_path / "half.safetensors", tmp_path / "full.pt")
    assert result.ok
    assert result.modules["a"].unequal == 1
    for third in (np.float16(0.0), np.float16(np.nan)):
        write_safetensors(tmp_path / "other.safetensors", {"a.b": np.array([1.0, np.nan, third, 0.0], np.float16)})
        result = compare_checkpoints(tmp_path / "half.safetensors", tmp_path / "other.safetensors")
        assert not result.ok
        assert result.modules["a"].difference == np.inf
    assert result.as_json()["modules"]["a"]["difference"] is None


def test_unusable_input(layouts, tmp_path, capsys):
    write_torch_file(tmp_path / "x.pt", {"other": np.zeros(2)})
    assert main(["verify", str(layouts["pt"]), str(tmp_path / "x.pt")]) == 2
    assert "no tensor name in common" in capsys.readouterr().err
    assert main(["verify", str(layouts["pt"])]) == 2
    assert "takes either two checkpoints" in capsys.readouterr().err
