"""Parity with the original: every array of the six golden model cases, through the command that users have for it."""

import io
import json
import re

import numpy as np
import pytest

from magma_jax.convert.__main__ import main
from magma_jax.convert.magma_checkpoint import from_torch
from magma_jax.convert.verify import read_model_config, verify

CASES = ["none", "v1_mlp_normal", "v2_mlp_attn_normal", "mlp_parallel", "scaled_parallel_ln", "vit_mlp_normal"]
NPY = io.BytesIO()
np.save(NPY, np.zeros(3))


# The others add a minute each and what they alone show is little: another adapter's place, another encoder.
QUICK = ("none", "v1_mlp_normal", "v2_mlp_attn_normal", "scaled_parallel_ln")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_every_golden_array_within_tolerance(case, golden, golden_checkpoint):
    result = verify(golden_checkpoint(case), golden / f"{case}.npz")
    assert result.ok, result.as_table()
    assert result.not_compared == []
    assert len(result.comparisons) > 20


@pytest.fixture(scope="module")
def dump(tmp_path_factory, golden):
    """What a user may have: images, captions, logits, and something of their own."""
    path = tmp_path_factory.mktemp("dump") / "dump.npz"
    with np.load(golden / "v1_mlp_normal.npz") as arrays:
        np.savez(path, notes=np.zeros(3), **{name: arrays[name] for name in ("images", "captions", "logits")})
    return path


def test_a_small_dump_and_a_converted_folder(dump, golden, golden_checkpoint, tmp_path, capsys):
    config = golden / "v1_mlp_normal.json"
    from_torch(golden_checkpoint("v1_mlp_normal"), tmp_path / "model", read_model_config(config))
    command = ["verify", str(tmp_path / "model"), "--golden", str(dump), "--model-config", str(config)]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"]
    assert result["not_compared"] == ["notes"]
    (row,) = result["comparisons"]
    assert row["difference"] < row["tolerance"]
    assert (row["name"], row["ok"], row["shape"]) == ("logits", True, [3, 56, 512])

    assert main(command) == 0
    table = capsys.readouterr().out
    assert "not compared: notes" in table
    assert "1 quantities compared, 0 past tolerance" in table


def test_another_checkpoint_is_past_its_tolerance(dump, golden, golden_checkpoint, capsys):
    config = str(golden / "none.json")
    assert main(["verify", str(golden_checkpoint("none")), "--golden", str(dump), "--model-config", config]) == 1
    assert "PAST TOLERANCE" in capsys.readouterr().out


def _images_of_another_size(arrays):
    arrays["images"] = arrays["images"][:, :, :64, :64]


def _token_outside_the_table(arrays):
    arrays["captions"][0, 0] = 500


def _nothing_to_compare(arrays):
    del arrays["logits"]


def _no_images(arrays):
    del arrays["images"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_images_of_another_size, r"'images' is float16\[3, 3, 64, 64\], but the model needs \[any, 3, 96, 96\]"),
        (_token_outside_the_table, "outside the model's 500 rows"),
        (_nothing_to_compare, "holds nothing to compare"),
        (_no_images, "lacks the input 'images'"),
    ],
)
def test_unusable_golden_files(change, message, dump, golden, golden_checkpoint, tmp_path, capsys):
    with np.load(dump) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    command = ["verify", str(golden_checkpoint("v1_mlp_normal")), "--golden", str(tmp_path / "bad.npz")]
    assert main([*command, "--model-config", str(golden / "v1_mlp_normal.json")]) == 2
    _one_error_line(capsys, message)


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"PK\x03\x04 cut short", b"\x93NUMPY", NPY.getvalue()])
def test_golden_files_that_are_none(content, golden_checkpoint, tmp_path, capsys):
    (tmp_path / "bad.npz").write_bytes(content)
    command = ["verify", str(golden_checkpoint("none")), "--golden", str(tmp_path / "bad.npz")]
    assert main(command) == 2
    _one_error_line(capsys, r"bad\.npz")


def test_a_pickled_golden_file_runs_nothing(golden_checkpoint, tmp_path, capsys):
    np.savez(tmp_path / "bad.npz", images=np.array([{"an": "object"}]))
    assert main(["verify", str(golden_checkpoint("none")), "--golden", str(tmp_path / "bad.npz")]) == 2
    _one_error_line(capsys, "not an .npz of named, plain arrays")


@pytest.mark.parametrize("content", ["{", "[1]", '{"lm": 3}'])
def test_model_configs_that_are_none(content, dump, golden_checkpoint, tmp_path, capsys):
    (tmp_path / "bad.json").write_text(content)
    command = ["verify", str(golden_checkpoint("none")), "--golden", str(dump)]
    assert main([*command, "--model-config", str(tmp_path / "bad.json")]) == 2
    _one_error_line(capsys, r"bad\.json")


def _one_error_line(capsys, message):
    output = capsys.readouterr()
    assert output.out == ""
    # What the tensors could not tell is said before it.
    *notes, error = output.err.splitlines()
    assert error.startswith("magma_jax.convert: ")
    assert not [note for note in notes if note.startswith("magma_jax.convert: ")]
    assert re.search(message, error)
