"""Weight files of every kind through one function: the same names, bits and errors."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from magma_jax.output import OutputError
from magma_jax.storage.byte_file import ByteFile
from magma_jax.storage.files import WeightFileError, open_tensors
from magma_jax.storage.safetensors_file import write_safetensors
from magma_jax.storage.torch.writer import write_torch_file

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "b.weight": np.array([1, -3, 0.125], ml_dtypes.bfloat16),
    "c.count": np.array(7),
    "d.flag": np.array([True, False]),
    "e.none": np.zeros((0, 4), np.float32),
}


def contents(path):
    with open_tensors(path) as weights:
        return {name: tensor.read() for name, tensor in weights.tensors.items()}


def assert_same(found, expected=TENSORS):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def shards(folder, suffix, write):
    """Two shards and their index, as Hugging Face lays them out."""
    folder.mkdir()
    names = {"a": f"x-00001-of-00002{suffix}", "b": f"x-00002-of-00002{suffix}"}
    where = {key: names["a" if key < "c" else "b"] for key in TENSORS}
    for name in names.values():
        write(folder / name, {key: array for key, array in TENSORS.items() if where[key] == name})
    stem = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.fixture(params=[(".bin", write_torch_file), (".safetensors", write_safetensors)], ids=["bin", "safetensors"])
def sharded(request, tmp_path):
    return shards(tmp_path / "model", *request.param)


def test_single_files(tmp_path):
    write_torch_file(tmp_path / "x.pt", {"module": TENSORS, "step": 3})
    write_safetensors(tmp_path / "x.safetensors", TENSORS, {"step": "3"})
    for name, step in (("x.pt", 3), ("x.safetensors", "3")):
        assert_same(contents(tmp_path / name))
        with open_tensors(tmp_path / name) as weights:
            assert weights.others == {"step": step}
            assert weights.files == (tmp_path / name,)
        with pytest.raises(ValueError, match="closed"):
            weights.tensors["a.weight"].read()


def test_shards(sharded):
    assert_same(contents(sharded))
    (index,) = sharded.glob("*.index.json")
    assert_same(contents(index))


def test_a_folder_with_one_file(tmp_path):
    with pytest.raises(WeightFileError, match="holds no weights"):
        contents(tmp_path)
    write_torch_file(tmp_path / "pytorch_model.bin", TENSORS)
    assert_same(contents(tmp_path))
    write_torch_file(tmp_path / "pytorch_model.bin", TENSORS)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "one.bin")
    write_torch_file(tmp_path / "two.bin", TENSORS)
    with pytest.raises(WeightFileError, match=r"several weight files and no index \(one.bin, two.bin\)"):
        contents(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda where: where.pop("a.weight"), r"does not know, 1 in all, such as \['a\.weight'\]"),
        (lambda where: where.update(new="absent.bin"), "absent.bin is missing"),
        (lambda where: where.update(new="../x.bin"), "do not trust"),
        (lambda where: where.update(new=3), "do not trust"),
        (lambda where: where.clear(), "no weight_map"),
    ],
)
def test_an_index_that_lies(sharded, change, message):
    (path,) = sharded.glob("*.index.json")
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(WeightFileError, match=message):
        contents(sharded)
    path.write_text("{")
    with pytest.raises(WeightFileError, match="not valid JSON"):
        contents(sharded)


def test_a_shard_may_lack_the_second_name_of_a_tied_tensor(sharded, capsys):
    (path,) = sharded.glob("*.index.json")
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["a.weight"]
    path.write_text(json.dumps(index))
    assert contents(sharded).keys() == TENSORS.keys()
    assert "lacks ['lm_head.weight'], which" in capsys.readouterr().err


def test_safetensors_agree_with_the_library(tmp_path):
    write_safetensors(tmp_path / "ours.safetensors", TENSORS)
    assert_same(safetensors.numpy.load_file(tmp_path / "ours.safetensors"))
    safetensors.numpy.save_file(TENSORS, tmp_path / "theirs.safetensors", {"format": "np"})
    assert_same(contents(tmp_path / "theirs.safetensors"))
    with safe_open(tmp_path / "theirs.safetensors", "np") as file:
        assert file.metadata() == {"format": "np"}
    with pytest.raises(OutputError, match="complex128"):
        write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(1, np.complex128)})


def test_damaged_safetensors(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", TENSORS)
    whole = (tmp_path / "x.safetensors").read_bytes()
    for content in (whole[:-1], whole[:50], b"", b"<!DOCTYPE html>", whole + b"x", whole.replace(b"F16", b"F99")):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(WeightFileError, match=r"x.safetensors: .*") as error:
            contents(tmp_path / "x.safetensors")
        assert "\n" not in str(error.value)


def test_nothing_half_written_stays(tmp_path):
    (tmp_path / "x.safetensors").write_text("mine")

    class Broken:
        shape, dtype = (2,), np.dtype(np.float32)

        def read(self):
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        write_safetensors(tmp_path / "x.safetensors", {"a": Broken()})
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    (tmp_path / "x").write_bytes(bytes(100))
    file = ByteFile(tmp_path / "x")
    (tmp_path / "x").write_bytes(bytes(50))
    with pytest.raises(WeightFileError, match="became shorter"):
        file.read(0, 100)
    file.close()
    file.close()
