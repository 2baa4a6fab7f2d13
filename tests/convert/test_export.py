"""Runs and model folders exported as one folder: the same bits, opened elsewhere, read by others."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from magma_jax import Magma
from magma_jax.config import to_dict
from magma_jax.convert.__main__ import main
from magma_jax.families import open_generator
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import split
from magma_jax.storage.array_files import open_arrays
from magma_jax.storage.model_folder import CheckpointError, write_model_folder
from magma_jax.storage.objects.copies import uploading
from tests import tiny
from tests.storage.gcs_server import bucket_server
from tests.storage.hub_server import Hub, serve


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose frozen parameters are in another folder."""
    folder = tmp_path_factory.mktemp("export")
    from flax import nnx

    tokenizer = tiny.dataset().tokenizer
    params = split(MagmaModel(tiny.MODEL, rngs=nnx.Rngs(3)))[1]
    base = {"model": to_dict(tiny.MODEL), "source": {"file": "gpt.pt", "sha256": {"gpt.pt": "ab"}}}
    write_model_folder(folder / "base", base, params, lambda made: tokenizer.save(made / "tokenizer"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("magma_jax.training.run.setup.load_dataset", lambda config: tiny.dataset())
        tiny.train(tiny.run_config(steps=1, base=str(folder / "base"), weights={}), folder / "run")
    (folder / "run/results.json").write_text(
        json.dumps({"caption_exact": 56.7, "bleu4": 0.8, "blind": {}, "protocol": {"split": "test"}})
    )
    return folder / "run"


@pytest.fixture(scope="module")
def exported(trained):
    """Exported, with the run and its base gone."""
    out = trained.parent / "mine"
    assert main(["export", str(trained), str(out)]) == 0
    return out


def assert_same(one, other):
    assert one.params.keys() == other.params.keys()
    for path, leaf in one.params.items():
        np.testing.assert_array_equal(leaf, other.params[path], err_msg=path)
        assert leaf.dtype == other.params[path].dtype


def test_another_folder_opens_with_the_same_bits(trained, exported, tmp_path):
    model = Magma.from_checkpoint(trained)
    shutil.copytree(exported, tmp_path / "elsewhere")
    assert_same(model, open_generator(tmp_path / "elsewhere"))
    assert main(["export", str(trained), str(tmp_path / "arrays"), "--to", "params"]) == 0
    assert_same(model, Magma.from_checkpoint(tmp_path / "arrays"))
    # An export can be exported, and converted as its source can.
    assert main(["export", str(exported), str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    assert main(["to-torch", str(exported), str(tmp_path / "mine.pt")]) == 0
    assert main(["verify", str(tmp_path / "mine.pt"), str(trained)]) == 0


def test_files_are_complete_and_readable_by_others(trained, exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {"model.json", "model.safetensors", "tokenizer", "README.md", "SHA256SUMS"}
    metadata = json.loads((exported / "model.json").read_text())
    assert "base" not in metadata
    arrays, model = load_file(exported / "model.safetensors"), Magma.from_checkpoint(trained)
    assert arrays.keys() == model.params.keys()
    for path, leaf in arrays.items():
        np.testing.assert_array_equal(leaf, model.params[path], err_msg=path)
    _, head, text = (exported / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "magma_jax", "tags": ["magma", "jax"], "license": "other"}
    assert "| caption_exact | 56.7 |" in text
    assert "| steps | 1 |" in text
    assert "| adapter | " in text


def test_weights_are_placed_on_a_mesh(exported):
    mesh = jax.make_mesh((1, 2, 1), ("data", "fsdp", "model"), devices=jax.devices()[:2])
    model = Magma.from_checkpoint(exported, mesh=mesh)
    assert_same(Magma.from_checkpoint(exported), model)
    assert any(not leaf.sharding.is_fully_replicated for leaf in model.params.values())
    half = Magma.from_checkpoint(exported, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in half.params.values()} == {"bfloat16"}


def test_damage_is_noticed_and_the_card_may_be_edited(exported, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(exported, folder)
    (folder / "README.md").write_text("mine")
    assert main(["verify", str(folder), "--checksums"]) == 0
    Magma.from_checkpoint(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-9] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed since it was written"):
        Magma.from_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Magma.from_checkpoint(folder)


def test_what_cannot_be_exported_is_said(exported, tmp_path, capsys):
    assert main(["export", str(exported), str(exported)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "not a model folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_is_saved(trained, tmp_path):
    model = Magma.from_checkpoint(trained)
    model.save(tmp_path / "saved")
    assert_same(model, Magma.from_checkpoint(tmp_path / "saved"))
    model.remove_adapters().save(tmp_path / "bare")
    bare = Magma.from_checkpoint(tmp_path / "bare")
    assert not any("_adapter/" in path for path in bare.params)
    with pytest.raises(CheckpointError, match="already exists"):
        model.save(tmp_path / "saved")


@pytest.fixture(scope="module")
def trained_alone(trained):
    """What the run has trained, as a file."""
    out = trained.parent / "adapters.safetensors"
    assert main(["export", str(trained), str(out), "--trained"]) == 0
    return out


def test_what_was_trained_goes_on_the_same_frozen_weights(trained, trained_alone, exported, tmp_path, capsys):
    base, model = trained.parent / "base", Magma.from_checkpoint(trained)
    names = load_file(trained_alone).keys()
    assert not any(name.startswith("lm/") and "_adapter" not in name for name in names)
    for number, other in enumerate((base, trained, exported)):  # a model folder, a run, an export
        out = tmp_path / f"on{number}"
        assert main(["put-on", str(trained_alone), str(other), str(out)]) == 0
        assert_same(model, Magma.from_checkpoint(out))
        assert open_arrays(out / "params").keys() == names
    assert "the others are those of" in capsys.readouterr().out
    # Both are moved together.
    (tmp_path / "moved").mkdir()
    shutil.copytree(base, tmp_path / "here/base")
    assert main(["put-on", str(trained_alone), str(tmp_path / "here/base"), str(tmp_path / "here/model")]) == 0
    (tmp_path / "here").rename(tmp_path / "moved/there")
    assert_same(model, Magma.from_checkpoint(tmp_path / "moved/there/model"))


def test_another_base_is_refused(trained, trained_alone, exported, tmp_path, capsys):
    def refused(*words):
        capsys.readouterr()
        assert main([*map(str, words), str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        *notices, error = capsys.readouterr().err.splitlines()
        assert all("has no SHA256SUMS" in notice for notice in notices)
        return error

    other = shutil.copytree(exported, tmp_path / "other")
    (other / "SHA256SUMS").unlink()
    weights = load_file(other / "model.safetensors")
    weights["lm/wte/weight"] = weights["lm/wte/weight"] + np.float32(1e-6)
    save_file(weights, other / "model.safetensors", {"format": "magma_jax"})
    assert "was trained with other frozen weights than those of" in refused("put-on", trained_alone, other)
    del weights["lm/wte/weight"]
    save_file(weights, other / "model.safetensors", {"format": "magma_jax"})
    assert "belongs to another base" in refused("put-on", trained_alone, other)
    assert "not a file of convert export" in refused("put-on", exported / "model.safetensors", exported)
    assert "nothing says what was trained" in refused("export", "--trained", trained.parent / "base")
    (tmp_path / "cut").write_bytes(trained_alone.read_bytes()[:-9])
    assert "cut short" in refused("put-on", tmp_path / "cut", exported)
    for words in (["put-on", trained_alone, exported], ["export", "--trained", trained]):
        assert main([*map(str, words), str(tmp_path / "cut")]) == 2
        assert "already exists" in capsys.readouterr().err


def test_an_export_goes_to_the_hub_and_back(exported, tmp_path):
    """The two commands of docs/conversion.md, against a server on the loopback."""
    with serve(Hub({})) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path / "hf")}
        environment = {**os.environ, **settings, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        program = Path(sys.executable).with_name("hf")
        for words in (
            ["upload", "me/mine", str(exported)],
            ["download", "me/mine", "--local-dir", str(tmp_path / "back")],
        ):
            done = subprocess.run(
                [program, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-2000:]
    assert hub.repositories["me/mine"].keys() == {
        path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()
    }
    assert_same(Magma.from_checkpoint(exported), Magma.from_checkpoint(tmp_path / "back"))


@pytest.fixture
def bucket(trained, tmp_path, monkeypatch):
    """Holds the run, and the base to which it refers there."""
    pytest.importorskip("gcsfs")
    bucket = bucket_server()
    bucket.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("run", "base"):
        with uploading(f"gs://bucket/{name}") as folder:
            shutil.copytree(trained.parent / name, folder, dirs_exist_ok=True)
    return bucket


def test_from_a_bucket_to_a_bucket(exported, bucket, capsys):
    command = ["export", "gs://bucket/run", "gs://bucket/mine"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("gs://bucket/mine: ")
    assert bucket.objects["mine/model.safetensors"][0] == (exported / "model.safetensors").read_bytes()
    assert_same(Magma.from_checkpoint("gs://bucket/mine"), Magma.from_checkpoint(exported))
    assert main(command) == 2
    assert "gs://bucket/mine: already exists; choose another name" in capsys.readouterr().err


def test_every_conversion_reads_and_writes_buckets(trained, trained_alone, exported, bucket, tmp_path, capsys):
    model = Magma.from_checkpoint(trained)
    at = "gs://bucket"
    for command, name in (("to-torch", "mine.pt"), ("to-safetensors", "mine.safetensors"), ("to-hf", "gpt")):
        assert main([command, f"{at}/run", f"{at}/{name}"]) == 0
        assert main([command, str(trained), str(tmp_path / name)]) == 0
        local = tmp_path / name
        for file in [local] if local.is_file() else local.iterdir():
            stored = bucket.objects[file.relative_to(tmp_path).as_posix()][0]
            assert stored == file.read_bytes() or file.suffix == ".pt", file  # zip entries have times
    assert main(["from-torch", f"{at}/mine.safetensors", f"{at}/again"]) == 0
    assert main(["verify", f"{at}/again", f"{at}/run"]) == 0
    assert main(["verify", f"{at}/again", "--checksums"]) == 0
    assert main(["verify", f"{at}/run", "--checksums"]) == 0
    assert main(["quantize", f"{at}/run", f"{at}/small"]) == 0
    assert main(["quantize", str(trained), str(tmp_path / "small")]) == 0
    assert_same(Magma.from_checkpoint(f"{at}/small"), Magma.from_checkpoint(tmp_path / "small"))
    # What was trained, on a base in the bucket, to which the new folder refers by its address.
    assert main(["export", f"{at}/run", f"{at}/mine", "--trained"]) == 0
    assert bucket.objects["mine"][0] == trained_alone.read_bytes()
    for out in (f"{at}/both", str(tmp_path / "both")):
        assert main(["put-on", f"{at}/mine", f"{at}/base", out]) == 0
        assert_same(model, Magma.from_checkpoint(out))
    metadata = json.loads((tmp_path / "both/model.json").read_text())
    assert metadata["base"].keys() == {"path", "sha256"}
    assert metadata["base"]["path"] == f"{at}/base"
    assert metadata == json.loads(bucket.objects["both/model.json"][0])
    capsys.readouterr()
    assert main(["put-on", f"{at}/mine", f"{at}/base", f"{at}/both"]) == 2
    assert f"{at}/both: already exists" in capsys.readouterr().err
    assert main(["quantize", f"{at}/none", f"{at}/new"]) == 2
    assert f"{at}/none: holds nothing" in capsys.readouterr().err
    assert not [name for name in bucket.objects if name.startswith("new")]
