"""Image-text pairs: everything random follows from the batch's number, whatever rows are asked for."""

import numpy as np
import pytest

from magma_jax.config import ConfigError
from magma_jax.data.code_pairs import CodePairsConfig
from magma_jax.data.datasets import load_dataset
from magma_jax.data.openmoji.pairs import OpenmojiPairsConfig, open_openmoji_pairs
from magma_jax.data.tokenizers.clip_bpe import clip_bpe
from magma_jax.data.tokenizers.text import encode_padded, load_text_tokenizer, separator_id, text_tokenizer
from magma_jax.data.write.encoding import EncodeOptions, encode_folder
from tests import datafolders
from tests.data.test_codes import Means


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    source = datafolders.folder(folder / "images", datafolders.captions())
    encode_folder(source, folder / "codes", Means(), EncodeOptions(batch_size=3, workers=0, crops=1))
    folders = {"train": (str(folder / "codes"),), "validation": (str(folder / "codes"),)}
    return load_dataset(CodePairsConfig(folders=folders, length=12, bpe_dropout=0.2))


def test_processes_take_their_rows_of_the_same_batches(data):
    whole = iter(data.batches(6, 1, range(6)))
    parts = [iter(data.batches(6, 1, rows)) for rows in ([0, 1, 2], [3, 5])]
    seen = []
    for _ in range(4):
        batch = next(whole)
        assert batch["codes"].shape == (6, 16)
        assert batch["tokens"].shape == (6, 12)
        for part, rows in zip(parts, ([0, 1, 2], [3, 5]), strict=True):
            for name, array in next(part).items():
                np.testing.assert_array_equal(array, batch[name][rows], err_msg=name)
        for name in ("codes", "tokens", "lengths"):
            np.testing.assert_array_equal(batch[f"partner_{name}"], np.roll(batch[name], -1, 0))
        assert (batch["draws"] == batch["draws"][0]).all()
        assert len(set(batch["seeds"].tolist())) == 6
        seen.append(batch["draws"][0, 0])
    assert len(set(seen)) == 4


def test_the_position_is_the_number_of_batches(data):
    first = iter(data.batches(6, 1, range(6)))
    next(first)
    state = first.get_state()
    expected = next(first)
    again = iter(data.batches(6, 1, range(6)))
    again.set_state(state)
    for name, array in next(again).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_validation_is_the_same_each_time_and_fills_its_last_batch(data):
    first, second = (data.validation_batches("validation", 9, 4, range(4)) for _ in range(2))
    assert [float(batch["draws"][0, 0]) for batch in first] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    for one, other in zip(first, second, strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name])
    np.testing.assert_array_equal(first[2]["tokens"][1:], first[0]["tokens"][:3])


def test_texts_are_padded_with_the_end(tmp_path):
    small = text_tokenizer("quickstart")
    text = encode_padded(small, "a cat", 8)
    assert text.ids[text.length - 1] == small.eos_id
    assert small.decode(text.ids) == "a cat"
    assert encode_padded(small, "a cat " * 9, 8).length == 8
    with pytest.raises(ValueError, match="tokens, more than 8"):
        encode_padded(small, "a cat " * 9, 8, too_long="error")
    assert (separator_id(clip_bpe()), small.decode([separator_id(small)])) == (91, "|")
    for tokenizer, folder in ((clip_bpe(), tmp_path / "clip"), (small, tmp_path / "small")):
        tokenizer.save(folder)
        assert load_text_tokenizer(folder).encode("a cat") == tokenizer.encode("a cat")


def test_bad_configs():
    with pytest.raises(ConfigError, match=r"data\.folders names no folders"):
        load_dataset(CodePairsConfig(length=12))
    with pytest.raises(ValueError, match=r"only data\.tokenizer=clip drops merges"):
        OpenmojiPairsConfig(tokenizer="quickstart", bpe_dropout=0.1)
    with pytest.raises(ValueError, match=r"data\.image_size and data\.length must be set"):
        open_openmoji_pairs(OpenmojiPairsConfig())
