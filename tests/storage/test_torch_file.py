"""The readers against files that PyTorch wrote, the writer against the readers and against PyTorch."""

import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from magma_jax.output import OutputError
from magma_jax.storage.deferred import Deferred
from magma_jax.storage.torch import writer as torch_writer
from magma_jax.storage.torch.reader import LazyTensor, TorchFileError, open_torch_file, state_dict
from magma_jax.storage.torch.writer import write_torch_file

FIXTURES = Path(__file__).parent / "fixtures"
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
# What fixtures/make.py saved.
MODULE = {
    "base": BASE,
    "again": BASE,
    "transposed": BASE.T,
    "column": BASE[:, 2],
    "middle": BASE[1:3, 2:5],
    "expanded": np.full((3, 2), 7, np.float32),
    "half": np.array([1, -0.5, np.inf], np.float16),
    "bfloat16": np.array([1, -3, 0.125], ml_dtypes.bfloat16),
    "int64": np.array([-(2**40), 5]),
    "uint8": np.array([0, 255, 3], np.uint8),
    "bool": np.array([[True, False], [False, True]]),
    "complex64": np.array([1 + 2j], np.complex64),
    "scalar": np.array(-1e-9, np.float32),
    "empty": np.zeros((0, 3), np.int32),
    "parameter": np.array([0.25, 0.5], np.float32),
}


def assert_same(found, expected):
    """Same structure, and bit-equal tensors."""
    if isinstance(found, LazyTensor):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        found = found.read()
    if isinstance(expected, np.ndarray):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.tobytes() == expected.tobytes()
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    else:
        assert type(found) is type(expected)
        assert found == expected


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt"])
def test_reads_what_torch_wrote(name):
    with open_torch_file(FIXTURES / name) as file:
        tree = dict(file.tree)
        assert_same(tree.pop("module"), MODULE)
        assert_same(tree.pop("linear")["weight"], np.arange(6, dtype=np.float64).reshape(2, 3) / 4)
        plain = {"shape": (2, 3), "names": {"x"}, "step": 2**40, "rate": 2e-6, "none": None}
        assert_same(tree, plain | {"list": [True, (1, "two"), -3]})


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt"])
def test_knows_aliases_without_reading(name):
    with open_torch_file(FIXTURES / name) as file:
        module = file.tree["module"]
    keys = {name: tensor.alias_key for name, tensor in module.items()}
    assert keys["base"] == keys["again"]
    assert len(set(keys.values())) == len(keys) - 1
    assert module["transposed"].storage_key == module["base"].storage_key != module["half"].storage_key


def test_reads_dtypes_without_a_storage_class():
    with open_torch_file(FIXTURES / "newer_dtypes.pt") as file:
        expected = {
            "uint16": np.arange(3, dtype=np.uint16),
            "uint64": np.arange(3, dtype=np.uint64),
            "float8_e4m3fn": np.arange(3).astype(ml_dtypes.float8_e4m3fn),
        }
        assert_same(file.tree, expected)


def test_arrays_are_read_only_views_that_outlive_the_file():
    with open_torch_file(FIXTURES / "zip.pt") as file:
        tensors = file.tree["module"]
        array = tensors["transposed"].read()
    assert not array.flags.writeable
    assert not array.flags.owndata
    np.testing.assert_array_equal(array, BASE.T)
    with pytest.raises(ValueError, match="closed"):
        tensors["base"].read()


def test_finds_the_weights(tmp_path):
    weights = {"a.weight": np.ones(2, np.float32)}
    for tree, others in [
        ({"module": weights, "global_steps": 7}, {"global_steps": 7}),
        ({"state_dict": weights, "epoch": 1}, {"epoch": 1}),
        (weights | {"version": 3}, {"version": 3}),
    ]:
        write_torch_file(tmp_path / "x.pt", tree)
        with open_torch_file(tmp_path / "x.pt") as file:
            found, other = state_dict(file.tree)
            assert_same(found, weights)
            assert other == others


@pytest.mark.parametrize("tree", [[1], {"a": 1}, {"module": {"a": 1}}])
def test_says_when_there_are_no_weights(tree):
    with pytest.raises(TorchFileError):
        state_dict(tree)


def test_round_trip(tmp_path):
    tree = {
        "module": OrderedDict(MODULE),
        "numbers": [0, -1, 2**31, -(2**63), 2**64 - 1, 0.1, True, False, None],
        "tuple": (1, ("é", "")),
        "nested": {"empty": {}, 3: []},
    }
    write_torch_file(tmp_path / "x.pt", tree)
    with open_torch_file(tmp_path / "x.pt") as file:
        assert_same(file.tree, tree)
        write_torch_file(tmp_path / "y.pt", file.tree)  # a copy, tensor by tensor
    with open_torch_file(tmp_path / "y.pt") as file:
        assert_same(file.tree, tree)


def test_equal_trees_give_equal_files(tmp_path):
    for name in ("x.pt", "y.pt"):
        write_torch_file(tmp_path / name, {"a": BASE})
    assert (tmp_path / "x.pt").read_bytes() == (tmp_path / "y.pt").read_bytes()


def test_one_array_twice_is_one_storage(tmp_path):
    write_torch_file(tmp_path / "x.pt", {"a": BASE, "b": BASE, "c": BASE.copy()})
    with open_torch_file(tmp_path / "x.pt") as file:
        a, b, c = (file.tree[name] for name in "abc")
        assert a.alias_key == b.alias_key != c.alias_key
    names = zipfile.ZipFile(tmp_path / "x.pt").namelist()
    assert names == [
        "archive/data.pkl",
        "archive/byteorder",
        "archive/data/0",
        "archive/data/1",
        "archive/version",
    ]


def test_storages_are_aligned(tmp_path):
    write_torch_file(tmp_path / "x.pt", {str(n): np.ones(n, np.uint8) for n in (1, 63, 64, 5)})
    with open_torch_file(tmp_path / "x.pt") as file:
        assert [tensor._storage.start % torch_writer.ALIGNMENT for tensor in file.tree.values()] == [0] * 4


def test_deferred_tensors_are_read_one_at_a_time(tmp_path):
    alive = 0

    def read(value):
        nonlocal alive
        alive += 1
        assert alive == 1
        alive -= 1
        return np.full((2, 3), value, ml_dtypes.bfloat16)

    tree = {str(n): Deferred((2, 3), np.dtype(ml_dtypes.bfloat16), lambda n=n: read(n)) for n in range(3)}
    write_torch_file(tmp_path / "x.pt", tree)
    with open_torch_file(tmp_path / "x.pt") as file:
        assert_same(file.tree, {str(n): np.full((2, 3), n, ml_dtypes.bfloat16) for n in range(3)})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    write_torch_file(path, {"a": BASE})
    before = path.read_bytes()

    def fail():
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_torch_file(path, {"a": BASE, "b": Deferred((2,), np.dtype(np.float32), fail)})
    with pytest.raises(ValueError, match="announced"):
        write_torch_file(path, {"a": Deferred((2,), np.dtype(np.float32), lambda: BASE)})
    with pytest.raises(TypeError, match=r"\['a'\]\[1\].*object"):
        write_torch_file(path, {"a": [BASE, object()]})
    with pytest.raises(OutputError, match="<U1"):
        write_torch_file(path, {"a": np.array("x")})
    endless = []
    endless.append(endless)
    with pytest.raises(TypeError, match="contains itself"):
        write_torch_file(path, endless)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.pt"]


def test_zip64(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)  # so that 96 bytes count as more than 2 GiB
    write_torch_file(tmp_path / "x.pt", {"a": BASE, "b": np.ones(3, np.float32)})
    with open_torch_file(tmp_path / "x.pt") as file:
        assert file.tree["a"]._storage.start % torch_writer.ALIGNMENT == 0
        assert_same(file.tree, {"a": BASE, "b": np.ones(3, np.float32)})


def test_torch_reads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    tree = {"module": OrderedDict(MODULE), "step": 2**40, "more": [1.5, None, True, (1, "é")]}
    write_torch_file(tmp_path / "x.pt", tree)
    for mapped in (False, True):
        loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mapped)
        assert loaded["more"] == tree["more"]
        assert loaded["step"] == tree["step"]
        module = loaded["module"]
        assert module["base"].untyped_storage().data_ptr() == module["again"].untyped_storage().data_ptr()
        for name, array in MODULE.items():
            tensor = module[name]
            assert (tuple(tensor.shape), str(tensor.dtype)) == (array.shape, f"torch.{array.dtype}")
            assert tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_we_read_what_torch_writes(tmp_path, zipped, protocol):
    torch = pytest.importorskip("torch")
    tensor = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    tensor.note = "an attribute"  # makes PyTorch write it in another way
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save({"a": tensor, "b": tensor[:, 1:], "bytes": b"\xff"}, tmp_path / "x.pt", **options)
    with open_torch_file(tmp_path / "x.pt") as file:
        expected = np.arange(6, dtype=np.float32).reshape(2, 3)
        assert_same(file.tree, {"a": expected, "b": expected[:, 1:], "bytes": b"\xff"})
