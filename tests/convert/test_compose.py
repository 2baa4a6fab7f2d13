"""A model put together from published parts, and runs that start from it without copying what is frozen."""

import dataclasses
import hashlib
import json
import shutil

import jax
import numpy as np
import pytest

from magma_jax import Magma
from magma_jax.config import ConfigError, to_dict
from magma_jax.convert.__main__ import main
from magma_jax.convert.compose import compose
from magma_jax.families.magma import MAGMA
from magma_jax.models.magma import MagmaConfig
from magma_jax.models.prefix import PrefixConfig
from magma_jax.models.vision.clip_vit import CLIPViTConfig
from magma_jax.models.vision.nf_resnet import NFResNetConfig
from magma_jax.nn.adapters import AdapterConfig
from magma_jax.published.open_magma import model_shapes
from magma_jax.storage.array_files import open_arrays
from magma_jax.storage.checksums import SUMS_FILE
from magma_jax.storage.model_folder import CheckpointError, open_params, read_model_json, read_params
from magma_jax.storage.objects.copies import local_copy, uploading
from magma_jax.storage.torch.writer import write_torch_file
from magma_jax.training.run import setup
from tests import tiny
from tests.published import published
from tests.storage.gcs_server import bucket_server

ENCODER = CLIPViTConfig(layers=1, width=32, heads=2, patch=32, image_size=64, embedding_width=16, output="grid")
MODEL = MagmaConfig(
    lm=dataclasses.replace(published.GPTJ, dtype="bfloat16"),
    encoder=ENCODER,
    prefix=PrefixConfig(dropout=0.1),
    mlp_adapter=AdapterConfig(downsample_factor=4),
    attn_adapter=AdapterConfig(downsample_factor=4),
)
CONFIG = tiny.run_config(model=MODEL, seed=7, steps=2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    lm = published.gptj_folder(folder / "gptj")
    tensors, encoder = published.clip_tensors(ENCODER)
    write_torch_file(folder / "clip.pt", {"state_dict": tensors})
    return folder, lm, encoder


@pytest.fixture(scope="module")
def composed(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("composed") / "model"
    made = compose(CONFIG, str(sources[0] / "gptj"), str(sources[0] / "clip.pt"), out)
    return out, made


def config_file(folder):
    """``CONFIG`` as a file in ``folder``."""
    path = folder / "config.py"
    values = f"    return ConfigDict({to_dict(CONFIG)!r})\n"
    path.write_text("from ml_collections import ConfigDict\n\n\ndef get_config():\n" + values)
    return str(path)


def test_every_parameter_is_published_or_fresh(sources, composed):
    folder, lm, encoder = sources
    out, made = composed
    stored = open_params(out)
    assert stored.keys() == model_shapes(MODEL).keys()
    prefix = ("image_prefix/proj", "image_prefix/ln")
    fresh = {path for path in stored if "_adapter/" in path or path.startswith(prefix)}
    expected = {f"lm/{path}": leaf for path, leaf in lm.items()}
    expected |= {f"image_prefix/encoder/{path}": leaf for path, leaf in encoder.items()}
    assert fresh == stored.keys() - expected.keys()
    for path, tensor in stored.items():
        array = tensor.read()
        assert array.dtype.name == ("bfloat16" if path in expected and path.startswith("lm/") else "float32")
        if path in expected:
            np.testing.assert_array_equal(array, expected[path].astype(array.dtype), path)
    assert made.frozen == sum(leaf.size for leaf in lm.values())
    assert made.fresh == sum(np.prod(stored[path].shape) for path in fresh)
    assert made.trainable == made.fresh + sum(leaf.size for leaf in encoder.values())

    # The source is on record.
    source = read_model_json(out)["source"]
    digest = hashlib.sha256((folder / "clip.pt").read_bytes()).hexdigest()
    assert source["image_prefix/encoder"] == {"from": str(folder / "clip.pt"), "sha256": {"clip.pt": digest}}
    assert list(source["lm"]["sha256"]) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert source["seed"] == 7


def test_rows_of_a_table_share_one_language_model(sources, composed, tmp_path):
    folder, lm, _ = sources
    encoder = NFResNetConfig(blocks=(1, 1, 1, 1), stage_channels=(8, 8, 16, 16), stem_channels=8, image_size=64)
    prefix = PrefixConfig(image_positions=2)
    model = dataclasses.replace(MODEL, encoder=encoder, prefix=prefix, mlp_adapter=None)
    row = dataclasses.replace(CONFIG, model=model)
    made = compose(row, str(composed[0]), None, tmp_path / "row")
    assert made.fresh == made.trainable
    assert read_model_json(tmp_path / "row")["base"]["path"] == str(composed[0])
    own, stored = open_arrays(tmp_path / "row/params"), open_params(tmp_path / "row")
    assert not any(path.startswith("lm/") and "_adapter/" not in path for path in own)
    for path, leaf in lm.items():
        np.testing.assert_array_equal(stored[f"lm/{path}"].read(), leaf.astype(stored[f"lm/{path}"].dtype), path)
    assert read_params(tmp_path / "row", model_shapes(model)).keys() == model_shapes(model).keys()

    other = dataclasses.replace(model, lm=dataclasses.replace(model.lm, dtype="float32"))
    with pytest.raises(ConfigError, match=r"holds another language model \(lm.dtype differ\)"):
        compose(dataclasses.replace(CONFIG, model=other), str(composed[0]), None, tmp_path / "other")
    frozen = dataclasses.replace(row, optim=dataclasses.replace(row.optim, groups={"encoder": "frozen"}))
    for config, how in ((CONFIG, "trained clip_vit"), (frozen, "frozen nf_resnet")):
        with pytest.raises(ConfigError, match=f"give --encoder; .* this is a {how}"):
            compose(config, str(folder / "gptj"), None, tmp_path / "other")


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # gcsfs's own
def test_sources_and_models_in_a_bucket(sources, composed, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gcsfs")
    bucket_server().clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with uploading("gs://bucket/parts") as parts:
        shutil.copytree(sources[0], parts, dirs_exist_ok=True)
    command = ["compose", "--encoder", "gs://bucket/parts/clip.pt", "--config", config_file(tmp_path), "--lm"]
    assert main([*command, "gs://bucket/parts/gptj", "gs://bucket/model"]) == 0
    assert main([*command, "gs://bucket/model", "gs://bucket/row"]) == 0
    row = local_copy("gs://bucket/row")
    assert read_model_json(row)["base"]["path"] == "gs://bucket/model"
    assert not any(path.startswith("lm/") and "_adapter/" not in path for path in open_arrays(row / "params"))
    expected = open_params(composed[0])
    for path, tensor in open_params(row).items():
        np.testing.assert_array_equal(tensor.read(), expected[path].read(), path)
    capsys.readouterr()
    assert main([*command, "gs://bucket/parts/gptj", "gs://bucket/model"]) == 2
    assert "gs://bucket/model: already exists" in capsys.readouterr().err


def test_fresh_parts_are_those_of_a_run(sources, composed, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "load_dataset", lambda config: tiny.dataset())
    names = {"lm": str(sources[0] / "gptj"), "image_prefix/encoder": str(sources[0] / "clip.pt")}
    run = setup.prepare_run(MAGMA, dataclasses.replace(CONFIG, weights=names), tmp_path / "run", jax.devices()[:1])
    for path, tensor in open_params(composed[0]).items():
        np.testing.assert_array_equal(tensor.read(), np.asarray(run.params[path]), path)


@pytest.mark.slow
def test_runs_share_the_frozen_part_of_their_base(composed, tmp_path, monkeypatch):
    base = shutil.copytree(composed[0], tmp_path / "base")
    monkeypatch.setattr(setup, "load_dataset", lambda config: tiny.dataset())
    config = dataclasses.replace(CONFIG, base=str(base))
    run = tiny.train(config, tmp_path / "run")
    start = open_params(base)
    for path, leaf in run.frozen.items():
        np.testing.assert_array_equal(np.asarray(leaf), start[path].read())
    assert not np.array_equal(run.state.trainable["image_prefix/proj/weight"], start["image_prefix/proj/weight"].read())
    metadata = read_model_json(tmp_path / "run")
    assert metadata["base"]["path"] == str(base)
    (tmp_path / "alone").mkdir()
    shutil.copytree(tmp_path / "run" / "params", tmp_path / "alone" / "params")
    (tmp_path / "alone" / "model.json").write_text(json.dumps({"model": metadata["model"]}))
    assert open_params(tmp_path / "alone").keys() == run.state.trainable.keys() | run.state.statistics.keys()

    # Every reader follows the reference.
    shapes = model_shapes(MODEL)
    assert read_params(tmp_path / "run", shapes).keys() == shapes.keys()
    loaded = Magma.from_checkpoint(tmp_path / "run")
    np.testing.assert_array_equal(
        np.asarray(loaded.params["lm/wte/weight"]), start["lm/wte/weight"].read().astype(np.float32)
    )
    np.testing.assert_array_equal(
        loaded.params["image_prefix/proj/weight"], run.state.trainable["image_prefix/proj/weight"]
    )

    # The run goes on, from the same base only.
    assert (
        int(tiny.train(dataclasses.replace(config, steps=3, optim=run.config.optim), tmp_path / "run").state.step) == 3
    )
    metadata = json.loads((base / "model.json").read_text())
    (base / "model.json").write_text(json.dumps(metadata | {"source": {}}))
    (base / SUMS_FILE).unlink()  # another folder, not a damaged one
    with pytest.raises(CheckpointError, match=r"its base .* has been replaced by another model"):
        read_params(tmp_path / "run", shapes)
    base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"which is not there; put it back, or correct base.path"):
        Magma.from_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (dataclasses.replace(MODEL, lm=dataclasses.replace(MODEL.lm, rotary_dim=2)), r"another model \(lm.rotary_dim"),
        (dataclasses.replace(MODEL, mlp_adapter=None), r"another model \(mlp_adapter"),
    ],
)
def test_a_base_of_another_model(composed, tmp_path, monkeypatch, model, message):
    monkeypatch.setattr(setup, "load_dataset", lambda config: tiny.dataset())
    with pytest.raises(ConfigError, match=message):
        tiny.train(dataclasses.replace(CONFIG, model=model, base=str(composed[0])), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_base_and_weights_exclude_each_other():
    with pytest.raises(ValueError, match="either base or weights"):
        dataclasses.replace(CONFIG, base="x", weights={"lm": "y"})


def test_the_command_line(sources, tmp_path, capsys):
    folder = sources[0]
    command = ["compose", "--lm", str(folder / "gptj"), "--encoder", str(folder / "clip.pt")]
    command += ["--config", config_file(tmp_path)]
    assert main([*command, str(tmp_path / "out"), "--set", "seed=3"]) == 0
    assert f"{tmp_path / 'out'}: " in capsys.readouterr().out
    assert read_model_json(tmp_path / "out")["source"]["seed"] == 3

    before = sorted(tmp_path.iterdir())
    for changed, message in (
        ([*command, str(tmp_path / "out")], "already exists"),
        ([*command, str(tmp_path / "new"), "--set", "model.encoder.layers=2"], "it has layers 1, not 2"),
        ([*command, str(tmp_path / "new"), "--set", "model.lm.vocab_rows=999"], "is below vocab_rows 999"),
        (
            [*command, str(tmp_path / "new"), "--set", "model.begin=3"],
            "puts no token before every sequence, but model.b",
        ),
        (
            ["compose", "--lm", str(tmp_path / "no"), *command[3:], str(tmp_path / "new")],
            "is no file or folder",
        ),
    ):
        assert main(changed) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
