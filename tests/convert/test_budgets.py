"""Files that claim more than they hold: one clear line, exit status 2, and neither time nor memory is spent on them."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

from magma_jax import Magma
from magma_jax.convert.__main__ import main
from magma_jax.convert.golden import GoldenError, read_golden
from magma_jax.convert.magma_checkpoint import from_torch
from magma_jax.convert.open_folder import open_model_folder
from magma_jax.convert.verify import read_model_config
from magma_jax.foreign import MAX_DEPTH, MAX_VALUES, ForeignError, check_tree, parse_json, read_text, shown
from magma_jax.published.hf_config import LanguageModelError, from_hf_config
from magma_jax.storage.checksums import SUMS_FILE, CheckpointError
from magma_jax.storage.safetensors_file import write_safetensors
from magma_jax.storage.torch import pickle as torch_pickle
from magma_jax.storage.torch.reader import TorchFileError, open_torch_file
from tests.convert.checkpoints import contents

CASE = "none"


@pytest.fixture(scope="module")
def settings(golden):
    return golden / f"{CASE}.json"


@pytest.fixture(scope="module")
def converted(settings, golden_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("budgets") / "model"
    from_torch(golden_checkpoint(CASE), folder, read_model_config(settings))
    (folder / SUMS_FILE).unlink()  # who makes up a folder makes up its sums too
    return folder


@pytest.fixture
def folder(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    return tmp_path / "model"


def one_line(capsys, *command, names=""):
    """Runs a command that must refuse its input; returns what it says."""
    capsys.readouterr()
    assert main([str(part) for part in command]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "has no SHA256SUMS" not in line]
    assert len(said) == 1, said
    assert said[0].startswith("magma_jax.convert: ")
    assert str(names) in said[0]
    assert len(said[0]) < 1000
    return said[0]


def device(path):
    path.symlink_to("/dev/zero")


def text(value):
    return pickle.dumps(value, 2)[2:-1]


# What a checkpoint's counter may be, as the instructions that put it on a pickle's stack.
COUNTERS = {
    "lists of one list, forty times over": b"]K\x00aq\x00"
    + b"".join(b"0](h%ch%ceq%c" % (i, i, i + 1) for i in range(40)),
    "dicts of one dict": b"}q\x00"
    + b"".join(b"0}(X\x01\0\0\0ah%cX\x01\0\0\0bh%cuq%c" % (i, i, i + 1) for i in range(40)),
    "3000 lists deep": b"]" * 3000 + b"a" * 2999,
    "3000 dicts deep": b"}X\x01\0\0\0a" * 2999 + b"}" + b"s" * 2999,
    "itself": b"]q\x00h\x00a",
    "a number of 5000 digits": text(10**5000),
    "half of a character": b"X\x03\0\0\0\xed\xb2\x80",
    "no number": text(float("nan")),
}


def test_a_counter_that_nobody_can_keep_is_left_out(golden_checkpoint, settings, tmp_path, capsys):
    with zipfile.ZipFile(golden_checkpoint(CASE)) as whole, zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for info in whole.infolist():
            content = whole.read(info)
            if info.filename.endswith("data.pkl"):
                added = b"".join(text(name) + code + b"s" for name, code in COUNTERS.items())
                content = content.removesuffix(b".") + added + b"."
            archive.writestr(info.filename, content)
    command = ["from-torch", str(tmp_path / "x.pt"), str(tmp_path / "out"), "--model-config", str(settings)]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert all(f"{name!r}" in said for name in COUNTERS)
    assert main(["to-torch", str(tmp_path / "out"), str(tmp_path / "back.pt")]) == 0
    assert contents(tmp_path / "back.pt") == contents(golden_checkpoint(CASE))


@pytest.mark.parametrize(
    "call",
    [b"c_codecs\nencode\n(h\x00X\x06\0\0\0latin1tR", b"cbuiltins\nset\n(h\x01tR", b"ctorch\nSize\n(h\x01tR"],
    ids=["bytes", "sets", "shapes"],
)
def test_a_pickle_that_copies_itself(call, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "_MAX_COPIED", 250_000)
    memo = text("x" * 10**6) + b"q\x00" + b"0](" + b"K\x01" * 10**4 + b"eq\x01" + b"0"
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + memo + b"](" + call * 20_000 + b"e.")
    with pytest.raises(TorchFileError, match="copies the same values without end"):
        open_torch_file(tmp_path / "x.pt")


DEEP = "[" * 100_000 + "]" * 100_000
MODEL_JSONS = {
    "deep": (lambda model: DEEP, "nested more than 100 deep"),
    "deep in a config": (lambda model: json.dumps(model)[:-1] + ', "x": ' + "[" * 500 + "]" * 500 + "}", "100 deep"),
    "deep in words": (lambda model: '{"model": ' + '{"lm": ' * 5000 + "1" + "}" * 5001, "nested more than 100 deep"),
    "many values": (lambda model: "[" + "[]," * MAX_VALUES + "[]]", "more than 1000000 values"),
    "large": (lambda model: " " * (64 * 2**20 + 1), "is larger than"),
    "no text": (lambda model: b"\xff\xfe", "not UTF-8 text"),
    "a long number": (lambda model: "1" * 5000, "not valid JSON"),
}


@pytest.mark.parametrize("case", MODEL_JSONS)
def test_model_json(case, folder, capsys):
    make, message = MODEL_JSONS[case]
    content = make(json.loads((folder / "model.json").read_text()))
    (folder / "model.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in one_line(capsys, "to-torch", folder, folder.with_name("x.pt"), names=folder / "model.json")


SIZES = [
    ("lm.layers", -1, "layers must be at least 1"),
    ("lm.layers", 0, "layers must be at least 1"),
    ("lm.layers", 10**6, "more than 10000"),
    ("lm.heads", 0, "heads must be at least 1"),
    ("lm.heads", -4, "heads must be at least 1"),
    ("lm.width", 0, "width must be at least 1"),
    ("lm.width", 2**40, "below 2**31"),
    ("lm.rotary_dim", -2, "rotary_dim"),
    ("lm.vocab_rows", -1, "vocab_rows must be"),
    ("lm.context_length", 0, "context_length must be"),
    ("lm.layernorm_eps", 10**400, "too large for a float"),
    ("lm.dtype", "complex64", "is none of float32"),
    ("lm.dtype", "x" * 10**6, "is none of float32"),
    ("lm.kind", ["gptj"], "is not one of"),
    ("lm", "x" * 10**6, "does not fit"),
    ("encoder.blocks", [1, 1, 0, 1], "blocks must be at least 1"),
    ("encoder.blocks", [1] * 10**5, "expected 4 values, got 100000"),
    ("encoder.image_size", 0, "image_size must be"),
    ("encoder.width", -8, "width must be"),
    ("prefix.image_positions", 0, "image_positions must be"),
    ("classes", -3, "classes must not be negative"),
    ("dtype", "int3", "is none of float32"),
    ("mlp_adapter", {"downsample_factor": 0}, "downsample_factor 0"),
]


@pytest.mark.parametrize(("name", "value", "message"), SIZES, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(SIZES)])
def test_sizes_that_no_model_has(name, value, message, folder, capsys):
    metadata = json.loads((folder / "model.json").read_text())
    node = metadata["model"]
    *parents, last = name.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = value
    (folder / "model.json").write_text(json.dumps(metadata))
    assert message in one_line(capsys, "to-torch", folder, folder.with_name("x.pt"))


def array(folder):
    """The description of an array, ``.zarray``, and its values."""
    (file,) = (folder / "params").glob("*/lm.layers.mlp.c_fc.weight/.zarray")
    return file, json.loads(file.read_text())


ARRAYS = {
    "a chunk of 2**50": {"chunks": [1, 2**50, 64]},
    "a shape of 2**50": {"shape": [3, 2**50, 64], "chunks": [1, 2**50, 64]},
    "a shape of 2**34": {"shape": [3, 2**34, 64], "chunks": [1, 256, 64]},
    "101 axes": {"shape": [1] * 101, "chunks": [1] * 101},
    "negative": {"shape": [-3, 256, 64]},
    "a part that is larger than its file": {"shape": [3, 2560, 64], "chunks": [1, 2560, 64]},
    "fewer axes in parts": {"chunks": [1]},
    "another type": {"dtype": "<f8"},
    "a type that is none": {"dtype": "|O"},
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_claim_more_than_there_is(case, folder, capsys):
    file, description = array(folder)
    file.write_text(json.dumps(description | ARRAYS[case]))
    one_line(capsys, "to-torch", folder, folder.with_name("out"), names=folder)
    one_line(capsys, "verify", folder, folder, names=folder)
    with pytest.raises(CheckpointError):
        Magma.from_checkpoint(folder)


@pytest.mark.parametrize(
    "content", [DEEP, "{}", '{"tree_metadata": 3, "use_zarr3": false, "use_ocdbt": false}', "\x00"]
)
def test_the_list_of_arrays(content, folder, capsys):
    (file,) = (folder / "params").glob("*/_METADATA")
    file.write_text(content)
    one_line(capsys, "to-torch", folder, folder.with_name("x.pt"), names=folder)


@pytest.mark.parametrize("name", ["torch.json", "torch_buffers.npz", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.write_text(DEEP)]
)
def test_files_beside_the_parameters(name, make, folder, capsys):
    (folder / name).unlink()
    make(folder / name)
    one_line(capsys, "to-torch", folder, folder.with_name("x.pt"), names=(folder / name).parent)


@pytest.mark.parametrize("what", ["counters", "keys"])
def test_what_is_written_back_is_what_it_should_be(what, folder, capsys):
    content = json.loads((folder / "torch.json").read_text())
    (folder / "torch.json").write_text(json.dumps(content | {what: 3}))
    one_line(capsys, "to-torch", folder, folder.with_name("x.pt"), names=folder / "torch.json")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".index.json"])
@pytest.mark.parametrize("make", [os.mkfifo, device, Path.mkdir])
def test_what_is_no_file_is_not_opened(suffix, make, tmp_path, capsys):
    path = tmp_path / f"x{suffix}"
    make(path)
    for command in (["from-torch", path, tmp_path / "out"], ["verify", path, path]):
        one_line(capsys, *command, names=path)
    assert sorted(tmp_path.iterdir()) == [path]


def test_model_configs_and_golden_files_that_never_end(golden_checkpoint, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    out = tmp_path / "out"
    for name in (tmp_path / "pipe", "/dev/zero"):
        one_line(capsys, "from-torch", golden_checkpoint(CASE), out, "--model-config", name, names=name)
        one_line(capsys, "verify", golden_checkpoint(CASE), "--golden", name, names=name)


@pytest.mark.parametrize("content", [DEEP, '{"weight_map": ' * 5000, '{"weight_map": {"a": "\\u001b[31m.bin"}}'])
def test_indexes(content, tmp_path, capsys):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    line = one_line(capsys, "from-torch", tmp_path, tmp_path / "out", names="model.safetensors.index.json")
    assert line.isprintable()


def safetensors(path, header, data=b""):
    content = json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + data)


def test_safetensors_without_metadata(tmp_path, capsys):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    safetensors(tmp_path / "x.safetensors", {"__metadata__": None, "a": entry}, bytes(4))
    one_line(capsys, "from-torch", tmp_path / "x.safetensors", tmp_path / "out", names="not a MAGMA checkpoint")
    assert main(["verify", str(tmp_path / "x.safetensors"), str(tmp_path / "x.safetensors")]) == 0


@pytest.mark.parametrize("header", [DEEP, '{"lm": ' * 3000, "[1]", '{"layers": -1}', "x" * 10**6])
def test_a_config_in_safetensors(header, tmp_path, capsys):
    write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(1, np.float32)}, {"magma_config": header})
    one_line(capsys, "from-torch", tmp_path / "x.safetensors", tmp_path / "out", names=tmp_path / "x.safetensors")


def test_101_axes(tmp_path, capsys):
    entry = {"dtype": "F32", "shape": [1] * 101, "data_offsets": [0, 4]}
    safetensors(tmp_path / "x.safetensors", {"a": entry}, bytes(4))
    for command in (
        ["from-torch", tmp_path / "x.safetensors", tmp_path / "out"],
        ["verify", *[tmp_path / "x.safetensors"] * 2],
    ):
        assert "101 axes" in one_line(capsys, *command, names=tmp_path / "x.safetensors")


@pytest.mark.parametrize("number", ["1000000", "1" + "0" * 12, "9" * 5000])
def test_layers_of_huge_numbers(number, tmp_path, capsys):
    sizes = {
        "lm.transformer.wte.weight": (8, 4),
        f"lm.transformer.h.{number}.ln_1.weight": (4,),
    }
    write_safetensors(tmp_path / "x.safetensors", {key: np.zeros(shape, np.float32) for key, shape in sizes.items()})
    one_line(capsys, "from-torch", tmp_path / "x.safetensors", tmp_path / "out", names="has a layer of number")


BUFFERS = {
    "a scale of nothing": {"scale_attn": np.zeros((), np.float32)},
    "a scale that is no number": {"scale_attn": np.full((), np.nan, np.float32)},
    "scales": {"scale_attn": np.ones(3, np.float32)},
    "a vector of sines": {"sin": np.zeros(8, np.float32)},
    "sines of nothing": {"sin": np.zeros((0, 0), np.float32)},
    "many positions": {"sin": np.zeros((2**20, 1), np.float32), "scale_attn": np.full((), 2, np.float32)},
}


@pytest.mark.parametrize("case", BUFFERS)
def test_buffers_that_no_model_has(case, tmp_path, capsys):
    tensors = {
        "lm.transformer.wte.weight": (8, 64),
        "lm.transformer.h.0.ln_1.weight": (64,),
        "lm.lm_head.weight": (8, 64),
    }
    arrays = {key: np.zeros(shape, np.float32) for key, shape in tensors.items()}
    arrays |= {f"lm.transformer.h.0.attn.attention.{name}": array for name, array in BUFFERS[case].items()}
    write_safetensors(tmp_path / "x.safetensors", arrays)
    one_line(capsys, "from-torch", tmp_path / "x.safetensors", tmp_path / "out", names=tmp_path / "x.safetensors")


def test_layers_of_gpt_neo_that_repeat_without_end():
    values = {"model_type": "gpt_neo", "num_layers": 2, "attention_types": [[["global", "local"], 10**12]]}
    with pytest.raises(LanguageModelError, match="do not fit 2 layers"):
        from_hf_config(values)
    with pytest.raises(LanguageModelError):
        from_hf_config({"model_type": "gptj", "n_layer": 1, "n_embd": 8, "n_head": 0, "rotary_dim": 0})


def test_a_golden_array_of_2_to_the_50(tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (%d,)}" % 2**47
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(GoldenError, match="named, plain arrays"):
        read_golden(tmp_path / "x.npz")


def test_the_array_of_a_checkpoint_in_orbaxs_own_layout(folder, capsys):
    """As older folders have it; the parts of a database are not files whose size could be looked at."""
    import orbax.checkpoint.experimental.v1 as ocp

    from magma_jax.nn.modules import nest

    params = {path: tensor.read() for path, tensor in open_model_folder(folder).params.items()}
    shutil.rmtree(folder / "params")
    ocp.save(folder / "params", nest(params))
    (item,) = [path.parent for path in (folder / "params").glob("*/_METADATA")]
    base = {"driver": "file", "path": f"{item}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    key = "lm.layers.mlp.c_fc.weight/zarr.json"
    key = key if store.read(key).result().state == "value" else key.replace("zarr.json", ".zarray")
    description = json.loads(store.read(key).result().value)
    shape = [description["shape"][0], 2**50, description["shape"][2]]
    description["shape"] = shape
    if "chunks" in description:
        description["chunks"] = shape
    else:
        description["chunk_grid"]["configuration"]["chunk_shape"] = shape
    store.write(key, json.dumps(description).encode()).result()
    one_line(capsys, "to-torch", folder, folder.with_name("x.pt"), names=folder)


def test_trees():
    check_tree([[1, "a"], {"b": (2, {3})}] * 1000)
    shared = [0]
    for _ in range(40):
        shared = [shared, shared]
    deep = []
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    itself = []
    itself.append(itself)
    for tree in (shared, deep, itself, {"a": shared}, [0] * (MAX_VALUES + 1)):
        with pytest.raises(ForeignError):
            check_tree(tree)
    for content in ("[" * 10**6, "[" * 200 + "]" * 200, "{", "[1, 2", "\ud800"):
        with pytest.raises(ForeignError):
            parse_json(content)
    assert len(shown("a" * 10**6)) < 200
    assert shown("a\x1b[31m\n" * 50).isprintable()


def test_texts(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(ForeignError, match="not a regular file"):
            read_text(path)
    (tmp_path / "x").write_bytes(b"abc")
    (tmp_path / "to x").symlink_to(tmp_path / "x")
    assert read_text(tmp_path / "to x", 3) == "abc"
    with pytest.raises(ForeignError, match="larger than 2 bytes"):
        read_text(tmp_path / "x", 2)
