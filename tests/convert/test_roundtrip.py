"""PyTorch file to model folder and back: the same keys in the same order, the same bits; and what is refused."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
from safetensors import safe_open

from magma_jax.convert.__main__ import main
from magma_jax.convert.compare import compare_checkpoints
from magma_jax.convert.magma_checkpoint import from_torch, to_safetensors, to_torch
from magma_jax.convert.open_folder import open_model_folder
from magma_jax.convert.verify import read_model_config
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.published.open_magma import read_torch_magma
from magma_jax.storage.torch.reader import open_torch_file
from magma_jax.training.run import setup
from magma_jax.version import __version__
from tests import tiny
from tests.convert.checkpoints import contents, rewrite

CASES = ["none", "v1_mlp_normal", "v2_mlp_attn_normal", "mlp_parallel", "scaled_parallel_ln", "vit_mlp_normal"]


def to_half(only=""):
    """A change that rounds the floating tensors whose key contains ``only`` to fp16."""

    def change(module):
        halves = {}
        for key, array in module.items():
            if array.dtype == np.float32 and only in key:
                with np.errstate(over="ignore"):
                    module[key] = halves.setdefault(id(array), array.astype(np.float16))

    return change


@pytest.mark.parametrize("case", CASES)
def test_round_trip_keeps_every_bit(case, golden, golden_checkpoint, tmp_path):
    source = golden_checkpoint(case)
    from_torch(source, tmp_path / "model", read_model_config(golden / f"{case}.json"))
    to_torch(tmp_path / "model", tmp_path / "back.pt")
    assert contents(tmp_path / "back.pt") == contents(source)


@pytest.mark.parametrize("only", ["", "lm."], ids=["fp16", "fp16 language model"])
def test_round_trip_keeps_the_dtypes_of_the_file(only, golden, golden_checkpoint, tmp_path):
    def change(module):
        to_half(only)(module)
        for key in module:  # the layers' second names
            if key.startswith("transformer."):
                module[key] = module[key.replace("transformer.", "lm.transformer.h.", 1)]
        module["word_embedding.weight"] = module["lm.transformer.wte.weight"]

    source = rewrite(golden_checkpoint("v1_mlp_normal"), tmp_path / "half.pt", change)
    config = read_model_config(golden / "v1_mlp_normal.json")
    from_torch(source, tmp_path / "model", config)
    to_torch(tmp_path / "model", tmp_path / "back.pt")
    assert contents(tmp_path / "back.pt") == contents(source)

    # Weights are exact in fp16, and sines are recomputed: the parameters equal those of the fp32 file.
    full = read_torch_magma(golden_checkpoint("v1_mlp_normal"), config)[1]
    half = read_torch_magma(source, config)[1]
    assert half["lm/wte/weight"].dtype == np.float16
    for path, array in full.items():
        np.testing.assert_array_equal(half[path].astype(array.dtype), array)


def test_a_file_without_second_names_and_buffers_gets_none(golden, golden_checkpoint, tmp_path):
    def change(module):
        for key in list(module):
            second = key.startswith(("transformer.", "word_embedding."))
            if second or (".attention." in key and not key.endswith("_proj.weight")):
                del module[key]

    source = rewrite(golden_checkpoint("none"), tmp_path / "bare.pt", change)
    from_torch(source, tmp_path / "model", read_model_config(golden / "none.json"))
    to_torch(tmp_path / "model", tmp_path / "back.pt")
    assert contents(tmp_path / "back.pt") == contents(source)


def test_existing_output_stays_untouched(golden, golden_checkpoint, tmp_path, capsys):
    config = golden / "none.json"
    from_torch(golden_checkpoint("none"), tmp_path / "model", read_model_config(config))
    command = ["from-torch", str(golden_checkpoint("none")), str(tmp_path / "model"), "--model-config", str(config)]
    before = (tmp_path / "model" / "model.json").stat().st_mtime_ns
    assert main(command) == 2
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "model" / "model.json").stat().st_mtime_ns == before

    (tmp_path / "there.pt").write_text("mine")
    assert main(["to-torch", str(tmp_path / "model"), str(tmp_path / "there.pt")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "there.pt").read_text() == "mine"

    shutil.rmtree(tmp_path / "model" / "params")
    assert main(["to-torch", str(tmp_path / "model"), str(tmp_path / "new.pt")]) == 2
    assert "not a model folder" in capsys.readouterr().err
    assert main(["to-torch", str(tmp_path / "nowhere"), str(tmp_path / "new.pt")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "there.pt"]


def test_sizes_that_no_tensor_tells(golden_checkpoint, tmp_path, capsys):
    assert main(["from-torch", str(golden_checkpoint("none")), str(tmp_path / "out")]) == 2
    assert "--model-config" in capsys.readouterr().err
    assert main(["from-torch", str(tmp_path / "absent.pt"), str(tmp_path / "out")]) == 2
    assert "absent.pt: No such file" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_trained_run_is_written_with_what_it_learned(tmp_path, monkeypatch):
    config = tiny.run_config(steps=1, model=dataclasses.replace(tiny.MODEL, encoder=tiny.RESNET))
    monkeypatch.setattr(setup, "load_dataset", lambda config: tiny.dataset())
    run = tiny.train(config, tmp_path / "run")
    to_torch(tmp_path / "run", tmp_path / "run.pt")
    with open_torch_file(tmp_path / "run.pt") as file:
        written = file.tree["module"]["image_prefix.proj.weight"].read()
    np.testing.assert_array_equal(written, run.state.trainable["image_prefix/proj/weight"])


def test_what_is_no_weight_and_no_number_is_left_out_and_named(golden_checkpoint, golden, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    tree = torch.load(golden_checkpoint("none"), weights_only=True) | {"names": {"a", "b"}}
    torch.save(tree, tmp_path / "with_set.pt")
    config = json.loads((golden / "none.json").read_text())
    from_torch(tmp_path / "with_set.pt", tmp_path / "out", config)
    assert "dropped, not weights: 'names'" in capsys.readouterr().err
    to_torch(tmp_path / "out", tmp_path / "back.pt")


def test_through_safetensors(golden, golden_checkpoint, tmp_path):
    source = golden_checkpoint("v2_mlp_attn_normal")
    from_torch(source, tmp_path / "model", read_model_config(golden / "v2_mlp_attn_normal.json"))
    to_safetensors(tmp_path / "model", tmp_path / "new" / "x.safetensors")
    (tmp_path / "new" / "x.safetensors").rename(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert not any(key.startswith("transformer.") or key.endswith("masked_bias") for key in file.keys())  # noqa: SIM118
        assert json.loads(file.metadata()["magma_config"])["lm"]["layers"] == 3
    # The config travels in the file, and no buffer has to tell it.
    config = from_torch(tmp_path / "x.safetensors", tmp_path / "again")
    assert config == open_model_folder(tmp_path / "model").config
    assert compare_checkpoints(tmp_path / "again", source).ok


def test_model_json_tells_the_source(golden, golden_checkpoint, tmp_path):
    source = golden_checkpoint("none")
    from_torch(source, tmp_path / "model", read_model_config(golden / "none.json"))
    metadata = json.loads((tmp_path / "model" / "model.json").read_text())
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert metadata["source"] == {"file": source.name, "sha256": {source.name: digest}}
    assert metadata["magma_jax"] == __version__


def test_an_interrupted_conversion_can_be_run_again(golden, golden_checkpoint, tmp_path, monkeypatch):
    config = read_model_config(golden / "none.json")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Tokenizer, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            from_torch(golden_checkpoint("none"), tmp_path / "model", config)
    assert not any(tmp_path.iterdir())
    # As a killed process leaves it.
    (tmp_path / ".model.partial" / "params").mkdir(parents=True)
    from_torch(golden_checkpoint("none"), tmp_path / "model", config)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_without_room(golden, golden_checkpoint, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    command = ["from-torch", str(golden_checkpoint("none")), str(tmp_path / "model")]
    assert main([*command, "--model-config", str(golden / "none.json")]) == 2
    assert "but only 1.0 MB are free" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
