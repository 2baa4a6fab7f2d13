"""Files that are damaged, that lie, that attack, or that are no checkpoints: one line of error, nothing run."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from magma_jax.storage.torch import reader as torch_reader
from magma_jax.storage.torch.reader import TorchFileError, open_torch_file, state_dict

FIXTURES = Path(__file__).parent / "fixtures"


def archive(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries:
            file.writestr(zipfile.ZipInfo(name), content, compress_type=compression)


def with_pickle(path, code, storage=bytes(24)):
    archive(path, [("a/data.pkl", code), ("a/data/0", storage), ("a/version", b"3\n")])


def tensor_code(storage_numel=6, offset=0, shape=(2, 3), strides=(3, 1), storage="torch FloatStorage"):
    """A pickle of one tensor, with whatever claims about it."""

    def number(value):
        return pickle.dumps(value, 2)[2:-1]

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    module, name = storage.split()
    pid = b"(X\x07\0\0\0storagec%s\n%s\nX\x01\0\0\x000X\x03\0\0\0cpu" % (module.encode(), name.encode())
    tensor = pid + number(storage_numel) + b"tQ" + number(offset) + numbers(shape) + numbers(strides)
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + tensor + b"\x89ccollections\nOrderedDict\n)RtR."


def refuses(path, message):
    with pytest.raises(TorchFileError, match=message) as error:
        open_torch_file(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_runs_nothing(tmp_path, protocol, legacy):
    code = pickle.dumps({"module": Attack(tmp_path / "ran")}, protocol)
    if legacy:
        start = io.BytesIO()
        for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(item, start, 2)
        (tmp_path / "x.pt").write_bytes(start.getvalue() + code)
    else:
        with_pickle(tmp_path / "x.pt", code)
    # Protocol 0 is refused at its first instruction, the others at the name.
    refuses(tmp_path / "x.pt", r"'(posix|nt)\.system'.*nothing was run|instruction")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"\x80\x02c__main__\nModel\n)R.", "'__main__.Model'"),
        (b"\x80\x02cbuiltins\neval\n.", "'builtins.eval'"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}(X\x01\0\0\0aK\x01ub.", "sets the attributes"),
        (b"\x80\x02ccollections\nOrderedDict\n}(X\x01\0\0\0aK\x01ub.", "sets the attributes"),
        (b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.", "arguments that PyTorch does not write"),
        (b"\x80\x02K\x01)R.", "not a function"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x02(ios\nsystem\n.", "instruction INST"),
        (b"\x80\x02}(K\x01K\x02\x86K\x03u.", "a tuple as a key"),
        (b"\x80\x02}(K\x01u.", "damaged"),
        (b"\x80\x02]K\x01s.", "damaged"),
        (b"\x80\x02)K\x01a.", "fills a tuple"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x02r\xff\xff\xff\xff.", "damaged"),
        (b"\x80\x02X\xff\xff\xff\x7fshort.", "damaged"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),
        (b"\x80\x02K\x01K\x02.", "left over"),
        (b"\x80\x02K\x01", "damaged"),
        (b"\x80\x02\xff.", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02K\x01Q.", "not a tensor storage"),
    ],
)
def test_refuses_other_pickles(tmp_path, code, message):
    with_pickle(tmp_path / "x.pt", code)
    refuses(tmp_path / "x.pt", message)


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"storage_numel": 7}, "should have 28 bytes but has 24"),
        ({"storage_numel": 5}, "reaches element 6"),
        ({"storage_numel": 2**62}, "should have"),
        ({"storage_numel": -1}, "not a count"),
        ({"offset": 1}, "reaches element 7 of a storage that has 6"),
        ({"offset": -1}, "not a count"),
        ({"strides": (-3, 1)}, "not a count"),
        ({"strides": (4, 1)}, "reaches element 7"),
        ({"strides": (1,)}, "strides"),
        ({"shape": (2, True)}, "not a count"),
        ({"shape": (2**40, 2**40), "strides": (0, 0)}, "exceeds the file"),
        ({"shape": (2**62, 2**62)}, "reaches element"),
        ({"shape": (1,) * 65, "strides": (1,) * 65}, "strides"),
        ({"storage": "torch QInt8Storage"}, "QInt8Storage"),
        ({"storage": "collections OrderedDict"}, "not a tensor storage"),
    ],
)
def test_refuses_false_claims_about_tensors(tmp_path, claims, message):
    with_pickle(tmp_path / "good.pt", tensor_code())
    open_torch_file(tmp_path / "good.pt").close()
    with_pickle(tmp_path / "x.pt", tensor_code(**claims))
    refuses(tmp_path / "x.pt", message)


def test_keys_that_would_take_for_ever_to_hash(tmp_path):
    # (x, x) of (x, x) of ... 200 times: small, but a walk through it never ends.
    nested = b")" + b"q\x00h\x00\x86" * 200
    for code in (b"}(" + nested + b"K\x01u", nested + b"Q", b"ctorch\nSize\n" + nested + b"\x85R"):
        with_pickle(tmp_path / "x.pt", b"\x80\x02" + code + b".")
        refuses(tmp_path / "x.pt", "key|storage|count")


def test_refuses_a_huge_pickle(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_reader, "MAX_PICKLE_NBYTES", 100)
    with_pickle(tmp_path / "x.pt", tensor_code())
    refuses(tmp_path / "x.pt", "more than the limit of 100")


def test_refuses_compressed_archives(tmp_path):
    content = [
        ("a/data.pkl", tensor_code(10**7, shape=(10**7,), strides=(1,))),
        ("a/data/0", bytes(4 * 10**7)),
    ]
    archive(tmp_path / "x.pt", content, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "x.pt").stat().st_size < 10**5
    refuses(tmp_path / "x.pt", "compressed")


@pytest.mark.parametrize("name", ["a/../b", "/a/b", "a\\b", "../data/0"])
def test_refuses_names_that_lead_out(tmp_path, name):
    archive(tmp_path / "x.pt", [("a/data.pkl", tensor_code()), ("a/data/0", bytes(24)), (name, b"x")])
    refuses(tmp_path / "x.pt", "leads out")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_refuses_double_names(tmp_path):
    archive(tmp_path / "x.pt", [("a/data.pkl", tensor_code()), ("a/data/0", bytes(24)), ("a/data/0", bytes(24))])
    refuses(tmp_path / "x.pt", "there twice")


def edit_directory(path, name, field, value):
    """Changes a number in an entry of a zip archive's directory."""
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(name))
    struct.pack_into("<I", content, entry + field, value)
    path.write_bytes(content)


def test_refuses_overlapping_entries(tmp_path):
    with_pickle(tmp_path / "x.pt", tensor_code())
    edit_directory(tmp_path / "x.pt", b"a/version", 42, 0)  # now where data.pkl starts
    refuses(tmp_path / "x.pt", "where the archive says|another name")


def test_refuses_entries_larger_than_the_file(tmp_path):
    with_pickle(tmp_path / "x.pt", tensor_code(2**28, shape=(2**28,), strides=(1,)))
    for field in (20, 24):  # compressed size, size
        edit_directory(tmp_path / "x.pt", b"a/data/0", field, 2**30)
    refuses(tmp_path / "x.pt", "past the end|where the archive says|exceeds the file")


def test_refuses_incomplete_archives(tmp_path):
    archive(tmp_path / "x.pt", [("a/data.pkl", tensor_code())])
    refuses(tmp_path / "x.pt", "'a/data/0' is missing")
    archive(tmp_path / "x.pt", [("word/document.xml", b"")])
    refuses(tmp_path / "x.pt", "not one of PyTorch")
    archive(tmp_path / "x.pt", [("a/data.pkl", tensor_code()), ("a/byteorder", b"big")])
    refuses(tmp_path / "x.pt", "big-endian")


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt", "script.pt"])
def test_refuses_truncated_files(tmp_path, name):
    content = (FIXTURES / name).read_bytes()
    for length in [*range(1, len(content), 97), len(content) - 1]:
        (tmp_path / "x.pt").write_bytes(content[:length])
        refuses(tmp_path / "x.pt", "fetch|check where|damaged|a pickle")


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt"])
def test_damage_gives_values_or_an_error_and_nothing_else(tmp_path, name):
    content = (FIXTURES / name).read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for position in generator.integers(0, min(len(content), 3000), 3):
            damaged[position] = generator.integers(256)
        (tmp_path / "x.pt").write_bytes(damaged)
        try:
            with open_torch_file(tmp_path / "x.pt") as file:
                tensors, _ = state_dict(file.tree)
                for tensor in tensors.values():
                    tensor.read()
        except TorchFileError:
            pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty.*fetch it again"),
        (b"\n<!DOCTYPE html><html>", "web page.*download page"),
        (b"<?xml version='1.0'?><Error>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (struct.pack("<Q", 2) + b"{}", "safetensors"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x89HDF\r\n", "HDF5"),
        (pickle.dumps({"a": 1}), "a pickle, but not a PyTorch checkpoint"),
        (b"PK\x05\x06" + bytes(18), "zip"),
        (b"hello", "starts with b'hello'"),
    ],
)
def test_says_what_the_file_is(tmp_path, content, message):
    (tmp_path / "x.pt").write_bytes(content)
    refuses(tmp_path / "x.pt", message)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_torch_file(tmp_path / "x.pt")
