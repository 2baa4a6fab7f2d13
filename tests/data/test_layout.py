"""Vocabulary layout: ranges meet without gaps or overlaps, and ids and codes convert both ways."""

import numpy as np
import pytest

from magma_jax.data.tokenizers.layout import SPECIAL, VocabLayout


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [({}, 65_152), ({"sentinels": 1018}, 65_536), ({"text": 10, "image": 5, "sentinels": 3}, 128)],
)
def test_ranges_follow_each_other_up_to_a_multiple_of_128(sizes, rows):
    layout = VocabLayout(**sizes)
    ranges = [range(len(SPECIAL)), layout.sentinel_ids, layout.text_ids, layout.image_ids]
    assert [r.stop for r in ranges[:-1]] == [r.start for r in ranges[1:]]
    assert [len(r) for r in ranges[1:]] == [layout.sentinels, layout.text, layout.image]
    assert layout.rows == rows
    assert (layout.pad, layout.bos, layout.eos, layout.unk, layout.brk, layout.eoss) == (0, 1, 2, 3, 4, 5)


def test_ids_convert_both_ways():
    layout = VocabLayout(text=10, image=5, sentinels=3)
    codes, tokens = np.arange(5).reshape(1, 5), np.arange(10)
    np.testing.assert_array_equal(layout.from_codes(codes), [[19, 20, 21, 22, 23]])
    np.testing.assert_array_equal(layout.to_codes(layout.from_codes(codes)), codes)
    np.testing.assert_array_equal(layout.to_text(layout.from_text(tokens)), tokens)
    assert layout.from_codes(codes.astype(np.uint16)).dtype == np.int32
    # Codes are stored in few bits; ids do not wrap around.
    assert VocabLayout().from_codes(np.array([255], np.uint8)) == VocabLayout().image_ids.start + 255
    assert [layout.sentinel(i) for i in range(3)] == [6, 7, 8]
    ids = np.arange(layout.rows)
    assert layout.is_text(ids).sum() == 10
    assert list(ids[layout.is_image(ids)]) == list(layout.image_ids)
    assert [layout.name(i) for i in (4, 7, 9, 23, 24)] == ["<break>", "<sentinel:1>", "text 0", "image 4", "unused 24"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layout: layout.from_codes(np.array([0, 5])), "image code 5 is not one of the codes of the codebook"),
        (lambda layout: layout.to_codes(np.array([18])), "id 18 is not one of the image ids, 19 to 23"),
        (lambda layout: layout.from_text(np.array([-1])), "text token -1 is not one of the tokens of the tokenizer"),
        (lambda layout: layout.to_text(np.array([4])), "id 4 is not one of the text ids, 9 to 18"),
        (lambda layout: layout.sentinel(3), "sentinel 3 is not one of the sentinels, 0 to 2"),
        (lambda layout: layout.name(128), "id 128 is not one of the 128 rows"),
        (lambda layout: layout.from_codes(np.array([0.5])), "image codes are integers, not float64"),
        (lambda layout: VocabLayout(text=0), "text must be at least 1"),
    ],
)  # fmt: skip
def test_what_is_outside_of_a_range_is_named(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(VocabLayout(text=10, image=5, sentinels=3))
    assert "\n" not in str(error.value)
