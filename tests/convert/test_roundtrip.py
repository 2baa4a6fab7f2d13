"""PyTorch file to model folder and back: the same keys in the same order, the same bits; and what is refused."""

import dataclasses
import json
import pickle
import shutil
import zipfile

import numpy as np
import pytest

from magma_jax.convert.__main__ import main
from magma_jax.convert.magma import from_torch, read_torch_magma, to_torch
from magma_jax.convert.torch_reader import open_torch_file, state_dict
from magma_jax.convert.torch_writer import write_torch_file
from magma_jax.convert.verify import read_model_config
from magma_jax.training import setup
from tests import tiny

CASES = ["none", "v1_mlp_normal", "v2_mlp_attn_normal", "mlp_parallel", "scaled_parallel_ln", "vit_mlp_normal"]


def contents(path):
    """Counters and tensors as bytes, in the file's order."""
    with open_torch_file(path) as file:
        tensors, counters = state_dict(file.tree)
        bits = [(key, t.dtype, t.shape, np.ascontiguousarray(t.read()).tobytes()) for key, t in tensors.items()]
        groups = {}
        for key, tensor in tensors.items():
            groups.setdefault(tensor.alias_key, set()).add(key)
        return counters, bits, sorted(map(sorted, groups.values()))


def rewrite(source, target, change):
    """Copies a checkpoint after ``change(module)``."""
    with open_torch_file(source) as file:
        tree = dict(file.tree)
        # Names of one storage stay names of one array.
        arrays = {}
        for tensor in tree["module"].values():
            arrays.setdefault(tensor.alias_key, np.array(tensor.read()))
        tree["module"] = {key: arrays[tensor.alias_key] for key, tensor in tree["module"].items()}
    change(tree["module"])
    write_torch_file(target, tree)
    return target


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


def _missing(module):
    del module["image_prefix.proj.bias"]
    del module["lm.transformer.h.1.ln_1.bias"], module["transformer.1.ln_1.bias"]


def _extra(module):
    module["lm.transformer.h.0.new.weight"] = np.zeros(3, np.float32)


def _wrong_shape(module):
    module["image_prefix.ln.weight"] = np.zeros(65, np.float32)


def _alias_differs(module):
    module["word_embedding.weight"] = module["word_embedding.weight"] + 1


def _mixed_layers(module):
    for key in ("lm.transformer.h.1.ln_1.weight", "transformer.1.ln_1.weight"):
        module[key] = module["lm.transformer.h.1.ln_1.weight"].astype(np.float16)


def _not_magma(module):
    for key in [key for key in module if key.startswith("lm.")]:
        del module[key]


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (_missing, ["image_prefix.proj.bias", "lm.transformer.h.{layer}.ln_1.bias", "missing [1]"]),
        (_extra, ["keys that no rule knows", "lm.transformer.h.0.new.weight"]),
        (_wrong_shape, ["wrong shapes", "image_prefix.ln.weight"]),
        (_alias_differs, ["aliases that differ", "word_embedding.weight"]),
        (_mixed_layers, ["different dtypes", "lm.transformer.h.1.ln_1.weight"]),
        (_not_magma, ["not a MAGMA checkpoint"]),
    ],
)
def test_tensors_that_do_not_fit(change, messages, golden, golden_checkpoint, tmp_path, capsys):
    bad = rewrite(golden_checkpoint("v1_mlp_normal"), tmp_path / "bad.pt", change)
    error = refused(bad, tmp_path, golden, capsys)
    for message in ["bad.pt", *messages]:
        assert message in error


def refused(bad, tmp_path, golden, capsys):
    """Converts, expects exit status 2 and nothing written, returns the message."""
    before = sorted(tmp_path.iterdir())
    config = str(golden / "v1_mlp_normal.json")
    assert main(["from-torch", str(bad), str(tmp_path / "out"), "--model-config", config]) == 2
    assert sorted(tmp_path.iterdir()) == before
    return capsys.readouterr().err


class _CallsAFunction:
    def __reduce__(self):
        return print, ("executed",)


def test_files_that_are_no_checkpoints(golden, golden_checkpoint, tmp_path, capsys):
    whole = golden_checkpoint("none").read_bytes()
    files = {
        "page.pt": (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        "empty.pt": (b"", "empty"),
        "cut.pt": (whole[: len(whole) // 2], "cut short"),
        "text.pt": (b"hello", "no PyTorch checkpoint"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        error = refused(tmp_path / name, tmp_path, golden, capsys)
        assert error.startswith(f"error: {tmp_path / name}: ")
        assert message in error
        assert error.count("\n") == 1

    with zipfile.ZipFile(tmp_path / "call.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"module": _CallsAFunction()}, protocol=2))
        archive.writestr("archive/version", "3\n")
    error = refused(tmp_path / "call.pt", tmp_path, golden, capsys)
    assert "call.pt" in error
    assert "executed" not in error


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
    assert "not kept, since no weights: names" in capsys.readouterr().err
    to_torch(tmp_path / "out", tmp_path / "back.pt")
