"""MAGVLT checkpoints: converted and written back bit for bit, verified with the original's results, opened."""

import json

import numpy as np
import pytest
from flax import nnx

from magma_jax.config import to_dict
from magma_jax.convert.__main__ import main as convert
from magma_jax.families import family_of_checkpoint, open_generator
from magma_jax.families.magvlt import MAGVLT
from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.models.magvlt.model import MagvltModel
from magma_jax.nn.modules import abstract
from magma_jax.published.keymap.engine import to_theirs
from magma_jax.published.open_magvlt import magvlt_table
from magma_jax.storage.model_folder import write_model_folder
from magma_jax.storage.torch.reader import open_torch_file, state_dict
from magma_jax.storage.torch.writer import write_torch_file
from tests.families.magvlt_tiny import TOKENIZER


def contents(path):
    with open_torch_file(path) as file:
        tensors = state_dict(file.tree)[0]
        others = {key: value for key, value in file.tree.items() if key != "state_dict"}
        return others, [(key, tensor.read().tobytes()) for key, tensor in tensors.items()]


@pytest.fixture(scope="module")
def folder(golden_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("magvlt") / "model"
    assert convert(["from-torch", str(golden_checkpoint("magvlt/stage2")), str(folder)]) == 0
    return folder


def test_there_and_back(folder, golden_checkpoint, tmp_path, capsys):
    source = golden_checkpoint("magvlt/stage2")
    assert family_of_checkpoint(source) is family_of_checkpoint(folder) is MAGVLT
    assert convert(["to-torch", str(folder), str(tmp_path / "back.ckpt")]) == 0
    assert contents(tmp_path / "back.ckpt") == contents(source)
    assert convert(["verify", str(folder), str(source)]) == 0
    assert "all bits equal, 0 problems" in capsys.readouterr().out


def test_with_its_image_tokenizer(tmp_path, capsys):
    """As the released files: transformer and tokenizer in one, without a config, so the vocabulary is what is left."""
    sizes = {"image_rows": 32, "text_rows": 60, "image_positions": 16, "text_positions": 8}
    config = MagvltConfig(layers=1, width=128, heads=1, tokenizer=TOKENIZER, **sizes)
    shapes, rng = abstract(lambda: MagvltModel(config, rngs=nnx.Rngs(0)))[1], np.random.default_rng(0)
    params = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    theirs = {key: np.asarray(tensor.read()) for key, tensor in to_theirs(magvlt_table(config), params).items()}
    assert sum(key.startswith("model_vqvae.") for key in theirs) > 50
    write_torch_file(tmp_path / "whole.ckpt", {"state_dict": theirs, "epoch": 3})
    assert convert(["from-torch", str(tmp_path / "whole.ckpt"), str(tmp_path / "model")]) == 0
    said = capsys.readouterr()
    assert said.out.endswith("model: 1 layers of width 128, 32 codes, images of 16 pixels\n")
    assert "assumed transformer.n_heads 1 (heads of 128, as in the released models)" in said.err
    assert convert(["to-torch", str(tmp_path / "model"), str(tmp_path / "back.ckpt")]) == 0
    assert contents(tmp_path / "back.ckpt") == contents(tmp_path / "whole.ckpt")
    assert open_generator(tmp_path / "model").config == config


@pytest.mark.parametrize(("name", "compared"), [("forward", 28), ("decode", 12)])
def test_it_is_verified_with_the_originals_results(name, compared, folder, golden, capsys):
    assert convert(["verify", str(folder), "--golden", str(golden / f"magvlt/{name}.npz"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["comparisons"]) == compared
    assert max(row["difference"] for row in result["comparisons"]) < 1e-4


def test_a_model_without_a_tokenizer_draws_nothing(folder, golden_checkpoint):
    for path in (folder, golden_checkpoint("magvlt/stage2")):
        model = open_generator(path)
        assert model.makes == frozenset()
        assert model.config.heads == 4
        with pytest.raises(ValueError, match="this model has no image tokenizer"):
            model.generate_image("a cat")


def test_refused(folder, golden_checkpoint, tmp_path, capsys):
    source, out = str(golden_checkpoint("magvlt/stage2")), str(tmp_path / "out")
    with open_torch_file(source) as file:
        tensors = {key: tensor.read() for key, tensor in state_dict(file.tree)[0].items()}

    def refused(*arguments):
        assert convert(["from-torch", *arguments]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "already exists" in refused(source, str(folder))
    write_torch_file(tmp_path / "fewer.ckpt", {"state_dict": {k: v for k, v in tensors.items() if "length" not in k}})
    settings = tmp_path / "settings.json"
    settings.write_text('{"transformer": {"n_heads": 4, "text_rows": 53}}')
    assert "length_head/weight" in refused(str(tmp_path / "fewer.ckpt"), out, "--model-config", str(settings))
    settings.write_text('{"transformer": {"n_heads": 5, "text_rows": 53}}')
    write_torch_file(tmp_path / "bare.ckpt", {"state_dict": tensors})
    assert "5 heads do not divide the width 32" in refused(
        str(tmp_path / "bare.ckpt"), out, "--model-config", str(settings)
    )
    assert "90 rows, which is not 49408 text tokens" in refused(str(tmp_path / "bare.ckpt"), out)


def test_the_published_layout_refuses_what_is_not_the_originals(tmp_path, capsys):
    sizes = {"layers": 1, "width": 32, "heads": 1, "image_rows": 8, "text_rows": 8, "text_positions": 4}
    for changes, said in (
        ({"image_patch": 2}, "every code has a position, but in the model 4 codes share one"),
        ({"caption_vector": True}, "the published layout has no caption vector"),
        ({"context_head": True}, "the published layout has no context head"),
    ):
        config = MagvltConfig(image_positions=16, **sizes, **changes)
        folder = tmp_path / next(iter(changes))
        shapes = abstract(lambda config=config: MagvltModel(config, rngs=nnx.Rngs(0)))[1]
        params = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}
        write_model_folder(folder, {"model": to_dict(config)}, params)
        assert convert(["to-torch", str(folder), str(tmp_path / "back.ckpt")]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "back.ckpt").exists()
