"""Padded and packed batches: every sample once and whole, few shapes, any number of processes, exact resuming."""

import grain
import numpy as np
import pytest

from magma_jax.data.batches.batching import WINDOW, packed_batches, padded_batches
from magma_jax.typing import IGNORED

PAD, B, BUCKETS = 99, 4, (4, 8, 16)
PADDING = {"tokens": PAD, "labels": IGNORED}
LENGTHS = np.random.default_rng(0).integers(1, 17, 4 * WINDOW * B)
SAMPLES = [
    {"tokens": np.full(n, i, np.int32), "labels": np.full(n, 1000 + i, np.int32), "image_rows": np.int32(i)}
    for i, n in enumerate(LENGTHS)
]


def _padded(rows=range(B), buckets=BUCKETS):
    source = grain.MapDataset.source(SAMPLES)
    return padded_batches(source, batch_size=B, rows=rows, buckets=buckets, padding=PADDING, seed=0)


def _packed(rows=range(B), pack=3):
    source = grain.MapDataset.source(SAMPLES)
    return packed_batches(source, batch_size=B, rows=rows, length=24, pack=pack, padding=PADDING)


def test_padded_batches_hold_every_sample_once_in_the_smallest_bucket():
    batches = list(_padded())
    assert sorted(np.concatenate([batch["image_rows"] for batch in batches])) == list(range(len(SAMPLES)))
    for batch in batches:
        length = batch["tokens"].shape[1]
        lengths = LENGTHS[batch["image_rows"]]
        assert length == min(bucket for bucket in BUCKETS if bucket >= lengths.max())
        for i, row in enumerate(batch["image_rows"]):
            np.testing.assert_array_equal(batch["tokens"][i], [row] * lengths[i] + [PAD] * (length - lengths[i]))
            np.testing.assert_array_equal(batch["labels"][i][lengths[i] :], IGNORED)
            np.testing.assert_array_equal(batch["labels"][i][: lengths[i]], 1000 + row)
    # Sorted by bucket, only two batches of each window can mix three of them.
    shapes = [batch["tokens"].shape[1] for batch in batches]
    assert set(shapes) == set(BUCKETS)
    assert shapes != sorted(shapes)
    assert 1 - LENGTHS.sum() / (B * sum(shapes)) < 0.35


def test_one_bucket_keeps_the_order_of_the_samples():
    assert [list(batch["image_rows"]) for batch in _padded(buckets=(16,))][:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("batches", [_padded, _packed])
def test_processes_form_the_same_batches_and_take_their_rows(batches):
    parts = [list(batches(rows)) for rows in ([0, 1], [2, 3])]
    for whole, *own in zip(batches(), *parts, strict=True):
        for name, array in whole.items():
            np.testing.assert_array_equal(array, np.concatenate([part[name] for part in own]))


@pytest.mark.parametrize("batches", [_padded, _packed])
@pytest.mark.parametrize("read", [1, 5, WINDOW + 1])
def test_a_restored_iterator_continues_with_the_next_batch(batches, read):
    expected = list(batches())[read]
    first, second = iter(batches()), iter(batches())
    for _ in range(read):
        next(first)
    second.set_state(first.get_state())
    for name, array in next(second).items():
        np.testing.assert_array_equal(array, expected[name])


def test_packed_rows_hold_whole_samples_with_their_own_positions():
    seen = []
    for batch in _packed():
        assert batch["tokens"].shape == (B, 24)
        assert batch["image_rows"].shape == (B, 3)
        for row in range(B):
            segments = batch["segments"][row]
            np.testing.assert_array_equal(batch["tokens"][row][segments == 0], PAD)
            np.testing.assert_array_equal(batch["labels"][row][segments == 0], IGNORED)
            for segment in range(1, segments.max() + 1):
                sample = batch["image_rows"][row, segment - 1]
                inside = segments == segment
                np.testing.assert_array_equal(batch["tokens"][row][inside], SAMPLES[sample]["tokens"])
                np.testing.assert_array_equal(batch["labels"][row][inside], SAMPLES[sample]["labels"])
                np.testing.assert_array_equal(batch["positions"][row][inside], np.arange(LENGTHS[sample]))
                seen.append(int(sample))
    assert sorted(seen) == sorted(set(seen))
    assert len(seen) >= len(SAMPLES) - 3 * B  # a batch that does not fill its rows is left out
