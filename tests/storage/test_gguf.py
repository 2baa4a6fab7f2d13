"""GGUF files: plain and quantized tensors as the ``gguf`` package reads them, and every kind of damaged file."""

import contextlib
import re
import struct

import ml_dtypes
import numpy as np
import pytest

from magma_jax.storage.byte_file import WeightFileError
from magma_jax.storage.gguf.tensors import TYPES, is_gguf, open_gguf
from tests.storage.gguf_files import gguf_bytes, text, write_gguf

METADATA = {"general.architecture": "llama", "llama.rope.freq_base": 0.5, "flag": True, "words": ["a", "bc"], "n": [3]}
PLAIN = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1, -3], np.float16),
    "c": np.array([[1, -3, 0.125]], ml_dtypes.bfloat16),
}


def values(path):
    file, metadata, tensors = open_gguf(path)
    try:
        return metadata, {name: tensor.read() for name, tensor in tensors.items()}
    finally:
        file.close()


def test_metadata_and_plain_tensors(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", METADATA, PLAIN)
    metadata, tensors = values(path)
    assert {**metadata, "n": metadata["n"].tolist()} == METADATA
    for name, array in PLAIN.items():
        assert (tensors[name].dtype, tensors[name].shape) == (array.dtype, array.shape)
        assert tensors[name].tobytes() == array.tobytes()
    assert is_gguf(path)
    assert is_gguf(path.rename(tmp_path / "renamed"))
    assert not is_gguf(tmp_path)


def test_quantized_tensors_equal_those_of_the_package(tmp_path):
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    blocks = {}
    for kind in TYPES.values():
        if kind.dtype is None:
            assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.block, kind.nbytes)
            # Bytes without large exponents: the scales of random ones may be no numbers.
            content = rng.integers(0, 64, (3, 2, kind.nbytes), np.uint8).tobytes()
            blocks[kind.name] = (kind.name, (3, 2 * kind.block), content)
    path = write_gguf(tmp_path / "a.gguf", METADATA, blocks)
    ours = values(path)[1]
    theirs = gguf.GGUFReader(path).tensors
    assert len(theirs) == len(blocks) == 10
    for tensor in theirs:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert (ours[tensor.name].dtype, ours[tensor.name].shape) == (
            np.float32,
            (3, 2 * TYPES[tensor.tensor_type].block),
        )
        np.testing.assert_array_equal(ours[tensor.name], expected)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    monkeypatch.setitem(__import__("sys").modules, "gguf.constants", None)
    path = write_gguf(tmp_path / "a.gguf", {}, {"a": ("Q8_0", (32,), bytes(34))})
    with pytest.raises(WeightFileError, match=r"type Q8_0 need the package gguf: pip install 'magma_jax\[gguf\]'"):
        open_gguf(path)


HEAD = b"GGUF" + struct.pack("<I", 3)
ENTRY = text("k") + struct.pack("<I", 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\3\4" + bytes(20), "is no GGUF file; it begins with b'PK"),
        (b"", "is no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "GGUF version 4 is none of 2, 3"),
        (HEAD + struct.pack("<QQ", 0, 2**60), f"claims {2**60} metadata entries, more than fit"),
        (HEAD + struct.pack("<QQ", 2**60, 0), f"claims {2**60} tensors, more than fit"),
        (HEAD + struct.pack("<QQQ", 0, 1, 2**62) + b"k" * 30, "asks for 4611686018427387904 more, past 62 bytes"),
        (HEAD + struct.pack("<QQ", 0, 1) + ENTRY + struct.pack("<IQ", 8, 2**59), "texts in an array, more than fit"),
        (HEAD + struct.pack("<QQ", 0, 1) + ENTRY + struct.pack("<IQ", 0, 2**59), "cut short, or not what it claims"),
        (HEAD + struct.pack("<QQ", 0, 1) + ENTRY + struct.pack("<IQ", 9, 1), "arrays of type 9 in metadata"),
        (HEAD + struct.pack("<QQ", 0, 1) + text("k") + struct.pack("<I", 77), "unknown type 77 of metadata"),
        (HEAD + struct.pack("<QQQ", 0, 1, 1) + b"\xff" + bytes(20), "is not UTF-8"),
        (gguf_bytes({"general.alignment": 24}, {}), "general.alignment 24 is no power of two"),
        (gguf_bytes({}, {"a": (99, (1,), b"")}), "'a' has the element type 99, none of F32, F16"),
        (gguf_bytes({}, {"a": ("Q8_0", (33,), b"")}), r"'a' of shape \(33,\) is not made of Q8_0 blocks of 32"),
        (gguf_bytes({}, {"a": ("F32", (2**40, 2**40), b"")}), "'a' claims the shape"),
        (gguf_bytes({}, {"a": ("F32", (1, 1, 1, 1, 1), b"")}), "'a' has 5 axes, more than 4"),
        (gguf_bytes({}, {"a": ("F32", (9,), bytes(32))}), "cut short: 'a' ends at byte 100 of 96"),
        (gguf_bytes({}, {"a": ("F32", (9,), bytes(32)), "b": ("F32", (8,), bytes(32))}), "'b' begins inside of 'a'"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(WeightFileError, match=message) as caught:
        open_gguf(path)
    assert re.fullmatch(f"{re.escape(str(path))}: .*", str(caught.value))


def test_a_file_that_is_cut_or_has_a_wrong_byte_is_read_or_refused(tmp_path):
    whole = gguf_bytes(METADATA, PLAIN)
    path = tmp_path / "a.gguf"
    rng = np.random.default_rng(0)
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(WeightFileError):
            open_gguf(path)
    for place in rng.integers(0, len(whole), 300):
        wrong = bytearray(whole)
        wrong[place] ^= 1 << rng.integers(8)
        path.write_bytes(wrong)
        with contextlib.suppress(WeightFileError):
            values(path)
