"""A small model that says many things, and a dataset folder in VQA's shape."""

import io

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from magma_jax import Magma
from magma_jax.data.format.records import Question, Record
from magma_jax.data.write.conversion import ConvertOptions, convert
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import split
from tests import tiny

DATA = tiny.dataset()


@pytest.fixture(scope="session")
def talkative():
    """Random weights answer with one token only; larger ones do not."""
    params = split(MagmaModel(tiny.MODEL, rngs=nnx.Rngs(0)))[1]
    return Magma(tiny.MODEL, {k: 4 * v if v.ndim > 1 else v for k, v in params.items()}, DATA.tokenizer)


def jpeg(seed: int) -> bytes:
    """A picture of 8 x 9 coloured squares, as a file."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((72, 64), Image.Resampling.NEAREST).save(file, "JPEG")
    return file.getvalue()


def vqa_records(count: int, first: int = 0):
    """Images with two questions each, ten answers a question."""
    for i in range(first, first + count):
        questions = tuple(
            Question(
                f"{10 * i + k}",
                f"Q{k}?",
                (("red",) * 6 + ("dark blue",) * 4) if k else ("yes",) * 10,
                {"answer_type": ("yes/no", "other")[k], "raw_answers": ["reds"] * 10},
            )
            for k in range(2)
        )
        yield Record(str(i), jpeg(i), (f"an image {i}", "a square"), questions, {"domain": "in-domain"})


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Dataset folders of 6 images to ask about and 5 to draw shots from."""
    root = tmp_path_factory.mktemp("folders")
    for name, records in (("val", vqa_records(6)), ("train", vqa_records(5, first=100))):
        convert(records, root / name, ConvertOptions(workers=0))
    return root
