"""Which family opens a checkpoint, and what is said where none does."""

import json

import pytest
from flax import nnx

from magma_jax import Magma
from magma_jax.config import to_dict
from magma_jax.families import family_of_checkpoint, open_generator, open_token_generator
from magma_jax.inference.answers import AnswerOptions
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import split
from magma_jax.storage.model_folder import CheckpointError, write_model_folder
from tests import tiny


def folder(path, model):
    (path / "model.json").write_text(json.dumps({"model": model}))
    return path


@pytest.mark.parametrize(
    ("model", "family"),
    [({"kind": "magma"}, "magma"), ({}, "magma"), ({"kind": "gptj"}, "language"), ({"kind": "gpt2"}, "language")],
)
def test_the_kind_of_a_model_tells_its_family(model, family, tmp_path):
    """Folders of the first release may leave out the kind."""
    assert family_of_checkpoint(folder(tmp_path, model)).name == family


@pytest.mark.parametrize("kind", ["llava", 3, ["magma"], None])
def test_a_kind_that_no_family_has_is_named(kind, tmp_path):
    says = r"holds a model of kind .*; there are magma, gptj"
    with pytest.raises(CheckpointError, match=says):
        open_generator(folder(tmp_path, {"kind": kind}))


def test_a_language_model_alone_is_refused(tmp_path):
    run = folder(tmp_path, {"kind": "gptj"})
    for opens in (open_generator, open_token_generator):
        with pytest.raises(CheckpointError, match=r"a plain language model, which cannot be prompted or served"):
            opens(run)
    with pytest.raises(CheckpointError, match=r"holds a model of kind 'gptj', but a magma is wanted here"):
        Magma.from_checkpoint(run)


def test_a_checkpoint_is_opened_and_answers(tmp_path):
    params = split(MagmaModel(tiny.MODEL, rngs=nnx.Rngs(0)))[1]
    tokenizer, metadata = tiny.dataset().tokenizer, {"model": to_dict(tiny.MODEL)}
    write_model_folder(tmp_path / "tiny", metadata, params, lambda path: tokenizer.save(path / "tokenizer"))
    model = open_generator(tmp_path / "tiny")
    assert model.makes == {"text"}
    answers = list(model.answers(iter([["A picture of"], ["Q:"]]), AnswerOptions(max_new_tokens=3), count=2))
    assert [len(found) for found in answers] == [1, 1]
    assert answers[0][0].parts == (answers[0][0].text,)
