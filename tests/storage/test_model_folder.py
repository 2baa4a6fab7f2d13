"""Folders on disk: whole or not there, and errors that say what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magma_jax.config import ConfigError
from magma_jax.families.magma import MAGMA
from magma_jax.storage.model_folder import (
    CheckpointError,
    open_params,
    read_model_json,
    read_params,
    write_model_folder,
)
from magma_jax.training.run.pretrained import open_weights
from tests import tiny

PARAMS = {"a/b": jnp.arange(6.0).reshape(2, 3), "a/c": np.ones(3, np.float16), "n": jnp.zeros((), jnp.int32)}


@pytest.fixture
def folder(tmp_path):
    write_model_folder(tmp_path / "model", {"model": {"width": 3}}, PARAMS)
    return tmp_path / "model"


def test_parameters_come_back_in_their_own_dtype_or_in_another(folder):
    shapes = {path: jax.ShapeDtypeStruct(np.shape(leaf), jnp.bfloat16) for path, leaf in PARAMS.items() if path != "n"}
    for path, leaf in read_params(folder, shapes).items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf.astype(jnp.float32), PARAMS[path])
    for path, leaf in open_params(folder).items():
        assert (leaf.shape, leaf.dtype) == (PARAMS[path].shape, PARAMS[path].dtype)
        np.testing.assert_array_equal(leaf.read(), PARAMS[path])
    assert read_model_json(folder)["model"] == {"width": 3}


def test_relative_paths_serve(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    write_model_folder("other", {}, PARAMS)
    assert read_params("other", {"a/c": jax.ShapeDtypeStruct((3,), jnp.float32)}).keys() == {"a/c"}


def test_only_what_is_named_is_read(folder):
    assert read_params(folder, {"a/c": jax.ShapeDtypeStruct((3,), jnp.float32)}).keys() == {"a/c"}


def test_what_does_not_fit_is_listed(folder):
    shapes = {"a/b": jax.ShapeDtypeStruct((2, 4), jnp.float32), "z": jax.ShapeDtypeStruct((1,), jnp.float32)}
    with pytest.raises(CheckpointError, match=r"z is missing; a/b has shape \(2, 3\), expected \(2, 4\)"):
        read_params(folder, shapes)


def test_nothing_is_overwritten_and_nothing_half_written_stays(folder, tmp_path):
    with pytest.raises(CheckpointError, match="already exists"):
        write_model_folder(folder, {}, PARAMS)

    def fail(path):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_model_folder(tmp_path / "other", {}, PARAMS, fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    write_model_folder(tmp_path / "empty", {"model": {}}, PARAMS)
    assert read_model_json(tmp_path / "empty") == {"model": {}}


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a model folder \(no model\.json\)"):
        read_model_json(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_model_json(tmp_path)
    (tmp_path / "model.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no model config"):
        read_model_json(tmp_path)


@pytest.mark.parametrize("victim", ["_METADATA", ".zarray", "0"])
def test_damaged_parameters_are_named(folder, victim):
    found = sorted((folder / "params").rglob(victim))
    assert found
    for path in found:
        path.write_bytes(b"{")
    with pytest.raises(CheckpointError, match=r"a\.[bc]|_METADATA"):
        read_params(folder, {"a/c": jax.ShapeDtypeStruct((3,), jnp.float32)})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"lm": "gpt5"}, r"'gpt5' is no file or folder.* known sources \(quickstart_lm"),
        ({"lm": "none.safetensors"}, "'none.safetensors' is no file or folder"),
        ({"nowhere": "quickstart_lm"}, "no parameter below nowhere/"),
        ({"lm": "quickstart_lm"}, "does not fit the model"),
    ],
)
def test_pretrained_parts_that_do_not_fit(names, message):
    with pytest.raises(ConfigError, match=message):
        open_weights(MAGMA, tiny.MODEL, names, {"lm/wte/weight": jax.ShapeDtypeStruct((3, 4), jnp.float32)}).__enter__()
