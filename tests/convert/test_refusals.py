"""What ``from-torch`` refuses, at the command line: a named error, exit status 2, nothing run, nothing written."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from magma_jax.convert.__main__ import main
from magma_jax.storage.safetensors_file import write_safetensors
from tests.convert.checkpoints import rewrite


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Unknown:
    def __reduce__(self):
        return _anything, ()


def _anything():
    return None


def pickled(tree, compression=zipfile.ZIP_STORED, storage=bytes(24)):
    def make(path, whole):
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(tree(path), 2))
            archive.writestr("archive/data/0", storage)
            archive.writestr("archive/version", "3\n")

    return make


def content(change):
    """A file made of the bytes of a whole checkpoint."""
    return lambda path, whole: path.write_bytes(change(whole.read_bytes()))


def tensors(change):
    """A checkpoint some of whose tensors are others."""

    def make(path, whole):
        rewrite(whole, path, change)

    return make


def _missing(module):
    del module["image_prefix.proj.bias"]
    del module["lm.transformer.h.1.ln_1.bias"], module["transformer.1.ln_1.bias"]


def _extra(module):
    module["lm.transformer.h.0.new.weight"] = np.zeros(3, np.float32)


def _wrong_shape(module):
    module["image_prefix.ln.weight"] = np.zeros(65, np.float32)


def _swapped(module):
    first, second = "image_prefix.proj.weight", "lm.transformer.ln_f.weight"
    module[first], module[second] = module[second], module[first]


def _swapped_layers(module):
    # Of equal shapes, so only the layers' second names tell.
    for name in ("q_proj", "k_proj"):
        first, second = (f"lm.transformer.h.{layer}.attn.attention.{name}.weight" for layer in (0, 1))
        module[first], module[second] = module[second], module[first]


def _whole_numbers(module):
    module["image_prefix.ln.weight"] = np.ones(64, np.int32)


def _mixed_layers(module):
    for key in ("lm.transformer.h.1.ln_1.weight", "transformer.1.ln_1.weight"):
        module[key] = module["lm.transformer.h.1.ln_1.weight"].astype(np.float16)


def _not_magma(module):
    for key in [key for key in module if key.startswith("lm.")]:
        del module[key]


def _lying_index(path, whole):
    path.mkdir()
    where = {"a": "../secret.bin"}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


def _cut_safetensors(path, whole):
    write_safetensors(path, {"a": np.zeros(1000, np.float32)})
    path.write_bytes(path.read_bytes()[:-1])


# Name of the file, how it is made, what the error says.
REFUSALS = {
    "malicious pickle": ("x.pt", pickled(lambda path: {"module": Attack(path.with_name("ran"))}), ["nothing was run"]),
    "unknown global": ("x.pt", pickled(lambda path: {"module": Unknown()}), ["_anything", "nothing was run"]),
    "zip bomb": ("x.pt", pickled(lambda path: {}, zipfile.ZIP_DEFLATED, bytes(10**8)), ["is compressed"]),
    "truncated archive": ("x.pt", content(lambda whole: whole[: len(whole) // 2]), ["cut short"]),
    "truncated safetensors": ("x.safetensors", _cut_safetensors, ["cut short"]),
    "web page": ("x.pt", content(lambda whole: b"<!DOCTYPE html><html>Sign in</html>"), ["web page"]),
    "empty file": ("x.pt", content(lambda whole: b""), ["empty"]),
    "text": ("x.pt", content(lambda whole: b"hello"), ["not a PyTorch checkpoint"]),
    "index that leads out": ("x", _lying_index, ["'../secret.bin'", "do not trust"]),
    "swapped tensors": ("x.pt", tensors(_swapped), ["image_prefix.proj.weight"]),
    "swapped layers": ("x.pt", tensors(_swapped_layers), ["aliases that differ", "h.0.attn.attention.q_proj.weight"]),
    "missing key": (
        "x.pt",
        tensors(_missing),
        ["image_prefix.proj.bias", "lm.transformer.h.{layer}.ln_1.bias", "missing [1]"],
    ),
    "extra key": ("x.pt", tensors(_extra), ["keys that no rule knows", "lm.transformer.h.0.new.weight"]),
    "wrong shape": ("x.pt", tensors(_wrong_shape), ["wrong shapes", "image_prefix.ln.weight"]),
    "wrong dtype": ("x.pt", tensors(_whole_numbers), ["wrong dtypes", "image_prefix.ln.weight"]),
    "mixed dtypes": ("x.pt", tensors(_mixed_layers), ["different dtypes", "lm.transformer.h.1.ln_1.weight"]),
    "another model": ("x.pt", tensors(_not_magma), ["not a MAGMA checkpoint"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case, golden, golden_checkpoint, tmp_path, capsys):
    name, make, messages = REFUSALS[case]
    bad = tmp_path / name
    make(bad, golden_checkpoint("v1_mlp_normal"))
    before = sorted(tmp_path.rglob("*"))
    config = str(golden / "v1_mlp_normal.json")
    assert main(["from-torch", str(bad), str(tmp_path / "out"), "--model-config", config]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    error = capsys.readouterr().err
    assert error.startswith(f"magma_jax.convert: {bad}")
    for message in messages:
        assert message in error
