"""The VQ-GAN as a family: converted, opened, trained, resumed, sharded, planned."""

import dataclasses
import json
from importlib import resources

import numpy as np
import pytest

from magma_jax.config import ConfigError, load_config_file
from magma_jax.convert.__main__ import main as convert
from magma_jax.convert.layouts import layout_of
from magma_jax.data.__main__ import main as data
from magma_jax.data.format.code_folder import StoredCodes
from magma_jax.data.format.record_folder import StoredRecords
from magma_jax.data.images import load_image, to_uint8
from magma_jax.families import family_of_checkpoint, open_generator, run_config
from magma_jax.families.vqgan import VQGAN
from magma_jax.families.vqgan.loading import open_image_tokenizer
from magma_jax.models.vision.vqgan import VQGANConfig
from magma_jax.storage.torch.reader import open_torch_file, state_dict
from magma_jax.storage.torch.writer import write_torch_file
from magma_jax.training.run.pretrained import QUICKSTART_VQGAN
from tests import datafolders
from tests.convert.checkpoints import contents

GOLDEN = VQGANConfig(
    image_size=16,
    width=32,
    multipliers=(2, 1),
    blocks=1,
    attention_sizes=(8,),
    latent_channels=8,
    code_width=12,
    codes=40,
)


@pytest.fixture(scope="module")
def source(golden_checkpoint):
    return golden_checkpoint("magvlt/vqgan_tiny")


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("vqgan") / "model"
    assert convert(["from-torch", str(source), str(path)]) == 0
    return path


def tensors_of(path):
    with open_torch_file(path) as file:
        return {key: tensor.read() for key, tensor in state_dict(file.tree)[0].items()}


@pytest.mark.parametrize(
    ("prefix", "dtype"), [("", np.float16), ("model_vqvae.", np.float32)], ids=["taming", "magvlt"]
)
def test_conversion_and_back_keeps_every_bit(prefix, dtype, source, tmp_path, capsys):
    """The original's training weights are left out, and that is said."""
    kept = {key: array.astype(dtype) for key, array in tensors_of(source).items() if not key.startswith("loss.")}
    # An order of its own, and values beside the weights.
    weights = {prefix + key: kept[key] for key in sorted(kept, reverse=True)}
    counters = {"global_step": 7, "config": {"resolution": 16}}
    write_torch_file(tmp_path / "kept.ckpt", {"state_dict": weights, **counters})
    extra = {"loss.logvar": np.zeros((), np.float32)}
    write_torch_file(tmp_path / "whole.ckpt", {"state_dict": weights | extra, **counters})
    assert convert(["from-torch", str(tmp_path / "whole.ckpt"), str(tmp_path / "model")]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'model'}: 40 codes of width 12, 8 x 8 of them for 16 pixels\n"
    assert "dropped, used by the original's training only: loss.*" in said.err
    assert convert(["to-torch", str(tmp_path / "model"), str(tmp_path / "back.ckpt")]) == 0
    assert contents(tmp_path / "back.ckpt") == contents(tmp_path / "kept.ckpt")
    capsys.readouterr()
    assert convert(["verify", str(tmp_path / "model"), str(tmp_path / "kept.ckpt")]) == 0
    assert "all bits equal, 0 problems" in capsys.readouterr().out


def test_a_conversion_is_verified_with_the_originals_results(folder, golden, capsys):
    assert convert(["verify", str(folder), "--golden", str(golden / "magvlt/vqgan_tiny.npz"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in result["comparisons"]} == {
        *("enc0", "z0", "ids0", "quant0", "recon0", "decode_code0")
    }
    assert result["not_compared"] == []


def test_what_cannot_be_converted_is_refused_in_one_line(folder, source, tmp_path, capsys):
    out = str(tmp_path / "out")

    def refused(*arguments):
        assert convert(list(arguments)) == 2
        assert not (tmp_path / "out").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "already exists" in refused("from-torch", str(source), str(folder))
    settings = tmp_path / "settings.json"
    settings.write_text('{"image_tokenizer": {"resolution": 17}}')
    error = refused("from-torch", str(source), out, "--model-config", str(settings))
    assert "need an image_size that is a multiple of 2, got 17" in error
    settings.write_text('{"image_tokenizer": {"resolution": "large"}}')
    error = refused("from-torch", str(source), out, "--model-config", str(settings))
    assert "image_tokenizer.resolution is a number of pixels up to 65536, got 'large'" in error
    fewer = {key: array for key, array in tensors_of(source).items() if key != "quant_conv.bias"}
    write_torch_file(tmp_path / "fewer.pt", fewer)
    assert convert(["from-torch", str(tmp_path / "fewer.pt"), out]) == 2
    assert "quant_conv/bias" in capsys.readouterr().err


def test_layouts_are_told_by_their_keys(folder, source, golden_checkpoint, tmp_path):
    assert family_of_checkpoint(source) is VQGAN
    assert family_of_checkpoint(folder) is VQGAN
    assert family_of_checkpoint(golden_checkpoint("none")).name == "magma"
    inside = {f"model_vqvae.{key}": array for key, array in tensors_of(source).items()}
    write_torch_file(tmp_path / "inside.ckpt", {"state_dict": inside})
    assert family_of_checkpoint(tmp_path / "inside.ckpt") is VQGAN
    # A tokenizer with a model around it is not a tokenizer.
    write_torch_file(tmp_path / "more.ckpt", {"state_dict": inside | {"model.tok_emb.weight": np.zeros((2, 2))}})
    assert family_of_checkpoint(tmp_path / "more.ckpt") is not VQGAN
    assert layout_of(folder).published(folder).keys() == {
        key for key in tensors_of(source) if not key.startswith("loss.")
    }


def test_it_encodes_and_decodes(folder, source, golden):
    with np.load(golden / "magvlt/vqgan_tiny.npz") as file:
        expected = dict(file)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    codes = None
    for path in (folder, source):
        tokenizer = open_generator(path)
        assert tokenizer.makes == frozenset()
        found = tokenizer.encode(pixels)
        assert found.shape == (4, 64)
        assert found.dtype == np.int32
        assert codes is None or np.array_equal(found, codes)
        codes = found
        np.testing.assert_array_equal(tokenizer.encode(pixels[1:]), codes[1:])
        images = tokenizer.decode(expected["rand_ids0"].reshape(2, -1))
        truth = (np.clip(expected["decode_code0"].transpose(0, 2, 3, 1) * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)
        assert np.abs(images.astype(int) - truth).max() <= 1
    wide = tokenizer.encode(pixels[:1, :8])
    assert wide.shape == (1, 32)
    assert tokenizer.decode(wide, height=8).shape == (1, 8, 16, 3)
    assert tokenizer.encode(pixels[:0]).shape == (0, 64)
    with pytest.raises(ValueError, match="codes are 0 to 39 for this tokenizer, got 0 to 40"):
        tokenizer.decode(np.array([[0, 1, 2, 40]]))
    with pytest.raises(ValueError, match="32 codes of 2 x 2 pixels do not fill a square"):
        tokenizer.decode(wide)
    with pytest.raises(ValueError, match="images of 15 x 16 pixels: both sides must be multiples of 2"):
        tokenizer.encode(pixels[:, :15])
    with pytest.raises(ValueError, match=r"images must be uint8 \(N, H, W, 3\), got float32"):
        tokenizer.encode(pixels.astype(np.float32))
    with pytest.raises(ValueError, match="answers no prompts"):
        tokenizer.answers([["A picture of"]])


def test_other_models_take_it_as_their_image_tokenizer(folder, source):
    """From a folder and from a file, for ``Family.parts``."""
    arrays = []
    for path in (folder, source):
        with open_image_tokenizer(path, GOLDEN) as (params, files):
            assert files
            arrays.append({name: tensor.read() for name, tensor in params.items()})
        with (
            pytest.raises(ConfigError, match=r"holds VQGANConfig\(.*codes=40.*but the config asks for .*codes=64"),
            open_image_tokenizer(path, dataclasses.replace(GOLDEN, codes=64)),
        ):
            pass
    assert arrays[0].keys() == arrays[1].keys()
    for name, array in arrays[0].items():
        np.testing.assert_array_equal(array, arrays[1][name])


def test_the_quick_starts_tokenizer():
    """It opens by itself, and is the model of its config."""
    path = resources.files("magma_jax") / QUICKSTART_VQGAN
    assert path.stat().st_size <= 3e6
    tokenizer = open_generator(path)
    config = run_config(load_config_file("configs/vqgan_quickstart.py"))
    assert tokenizer.config == config.model.tokenizer
    image = np.full((1, 64, 64, 3), 255, np.uint8)
    image[:, 16:48, 16:48] = (252, 234, 43)  # the yellow of faces
    codes = tokenizer.encode(image)
    assert codes.shape == (1, 256)
    assert np.abs(tokenizer.decode(codes)[0].astype(int) - image[0]).mean() < 8
    assert np.abs(tokenizer.decode(codes)[0, 32, 32].astype(int) - image[0, 32, 32]).max() < 16


def test_a_dataset_is_encoded_at_the_command_line(folder, golden_checkpoint, tmp_path, capsys):
    images = datafolders.folder(tmp_path / "images", datafolders.captions(3))
    arguments = [images, str(tmp_path / "codes"), "--workers", "0", "--batch-size", "4", "--flips"]
    assert data(["encode", *arguments, "--tokenizer", str(folder)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'codes'}: 3 records, 2 x 64 codes each\n"
    stored = StoredCodes(tmp_path / "codes")
    pixels = np.stack([to_uint8(load_image(StoredRecords(images)[row].image_bytes()), 16) for row in range(3)])
    np.testing.assert_array_equal([stored[row][0] for row in range(3)], open_generator(folder).encode(pixels))
    other = str(golden_checkpoint("none"))
    assert data(["encode", images, str(tmp_path / "other"), "--tokenizer", other]) == 2
    assert "holds a magma model, but an image tokenizer is wanted here" in capsys.readouterr().err
    assert data(["encode", str(tmp_path), str(tmp_path / "other"), "--tokenizer", str(folder)]) == 2
    assert "no dataset folder (no info.json)" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
