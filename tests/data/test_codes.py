"""Images become codes once: resumable, with crops and flips as asked; training reads the codes with the texts."""

import json

import numpy as np
import pytest

from magma_jax.config import ConfigError
from magma_jax.data.codes_dataset import CodesConfig
from magma_jax.data.datasets import load_dataset
from magma_jax.data.format.code_folder import StoredCodes
from magma_jax.data.format.record_folder import StoredRecords
from magma_jax.data.format.records import DataError, Record
from magma_jax.data.images import load_image, to_uint8
from magma_jax.data.write import encoding
from magma_jax.data.write.encoding import EncodeOptions, encode_folder
from tests import datafolders

SIZE, GRID = 32, 4


class Means:
    """A tokenizer whose codes are the mean brightness of a grid's cells."""

    image_size, size, tokens, digest = SIZE, 256, GRID**2, "means"

    def __init__(self):
        self.calls = 0

    def encode(self, images):
        self.calls += 1
        cells = images.reshape(len(images), GRID, SIZE // GRID, GRID, SIZE // GRID, 3)
        return cells.mean((2, 4, 5)).astype(np.int32).reshape(len(images), -1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return datafolders.folder(tmp_path_factory.mktemp("data") / "images", datafolders.captions())


def options(**changes):
    return EncodeOptions(**{"shard_records": 5, "batch_size": 3, "workers": 0} | changes)


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("codes") / "codes"
    encode_folder(source, path, Means(), options(crops=1, flips=True))
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_codes_of_every_view(source, folder):
    stored, records = StoredCodes(folder), StoredRecords(source)
    assert (len(stored), stored.views, stored.tokens, stored.size) == (12, 4, 16, 256)
    assert stored.info["files"] == {f"codes-0000{i}.array_record": count for i, count in enumerate((5, 5, 2))}
    for row in range(12):
        codes = stored[row]
        centre = to_uint8(load_image(records[row].image_bytes()), SIZE)
        np.testing.assert_array_equal(codes[0], Means().encode(centre[None])[0])
        np.testing.assert_array_equal(codes[1].reshape(GRID, GRID), codes[0].reshape(GRID, GRID)[:, ::-1])
        np.testing.assert_array_equal(codes[3].reshape(GRID, GRID), codes[2].reshape(GRID, GRID)[:, ::-1])
        assert not np.array_equal(codes[2], codes[0])
        assert stored.text(row).captions == records.text(row).captions
        assert stored.text(row).id == records.text(row).id


def test_an_interrupted_run_goes_on_and_gives_the_same_files(source, folder, tmp_path, monkeypatch):
    """Finished shards are not encoded again."""
    out, whole = tmp_path / "out", encoding._write_shard

    def dies(work, number, *rest):
        if number == 2:
            raise KeyboardInterrupt
        return whole(work, number, *rest)

    monkeypatch.setattr(encoding, "_write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        encode_folder(source, out, Means(), options(crops=1, flips=True))
    assert not out.exists()
    monkeypatch.setattr(encoding, "_write_shard", whole)
    with pytest.raises(DataError, match=r"holds an interrupted conversion to .* with other options"):
        encode_folder(source, out, Means(), options())
    other = Means()
    other.digest = "other"
    with pytest.raises(DataError, match="holds an interrupted conversion"):
        encode_folder(source, out, other, options(crops=1, flips=True))
    encoder = Means()
    encode_folder(source, out, encoder, options(crops=1, flips=True))
    assert encoder.calls == 4  # one batch of the last shard, in four views
    assert contents(out).keys() == contents(folder).keys()
    first, second = StoredCodes(out), StoredCodes(folder)
    for row in range(12):
        np.testing.assert_array_equal(first[row], second[row])
    assert first.info == second.info
    with pytest.raises(DataError, match="already exists"):
        encode_folder(source, out, Means(), options())


def test_unusable_images_are_left_out_and_counted(tmp_path):
    records = [*datafolders.captions(3), Record("broken", datafolders.noise(9)[:900], ("a caption",))]
    source = datafolders.folder(tmp_path / "images", records, check="header")
    with pytest.raises(DataError, match=r"1 of 4 samples would be left out"):
        encode_folder(source, tmp_path / "strict", Means(), options())
    info = encode_folder(source, tmp_path / "codes", Means(), options(max_skipped=0.5))
    assert info["records"] == 3
    assert sum(info["skipped"].values()) == 1
    (line,) = (tmp_path / "codes/skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "broken"


def batches_of(config, count, rows=range(4), state=None):
    iterator = iter(load_dataset(config).batches(4, 3, rows))
    if state is not None:
        iterator.set_state(state)
    return [next(iterator) for _ in range(count)], iterator.get_state()


def test_batches_hold_codes_and_texts(folder):
    config = CodesConfig(folders={"train": (str(folder),), "validation": (str(folder),)}, length=16)
    data, stored = load_dataset(config), StoredCodes(folder)
    batches, _ = batches_of(config, 6)
    seen = set()
    for batch in batches:
        assert batch["codes"].shape == (4, 16)
        assert batch["codes"].dtype == np.int32
        for row, codes, tokens in zip(batch["image_rows"], batch["codes"], batch["tokens"], strict=True):
            (view,) = [view for view in range(4) if np.array_equal(stored[int(row)][view], codes)]
            seen.add(view)
            text = data.tokenizer.decode(tokens[: int((tokens != data.tokenizer.pad_id).sum())].tolist())
            assert text in stored.text(int(row)).captions
    assert len(seen) > 2

    # Rows of one process, and continued from a position.
    (first,), state = batches_of(config, 1, rows=[1, 3])
    np.testing.assert_array_equal(first["codes"], batches[0]["codes"][[1, 3]])
    (second,), _ = batches_of(config, 1, rows=[1, 3], state=state)
    np.testing.assert_array_equal(second["codes"], batches[1]["codes"][[1, 3]])

    (held_out,) = data.validation_batches("validation", 4, 4, range(4))
    for row, codes in zip(held_out["image_rows"], held_out["codes"], strict=True):
        np.testing.assert_array_equal(codes, stored[int(row)][0])
    (first_view,), _ = batches_of(
        CodesConfig(folders={"train": (str(folder),)}, length=16, views="first"), 1, rows=range(4)
    )
    np.testing.assert_array_equal(first_view["codes"], [stored[int(row)][0] for row in first_view["image_rows"]])


def test_what_cannot_be_read_is_refused_in_one_line(source, folder, tmp_path):
    with pytest.raises(DataError, match=r"holds 'magma_jax codes', but 'magma_jax records' are wanted here"):
        StoredRecords(folder)
    with pytest.raises(DataError, match=r"holds 'magma_jax records', but 'magma_jax codes' .*magma_jax.data encode"):
        StoredCodes(source)
    with pytest.raises(ConfigError, match=r"set data\.folders\.train"):
        load_dataset(CodesConfig())
    other = Means()
    other.digest = "another"
    encode_folder(source, tmp_path / "other", other, options())
    with pytest.raises(DataError, match="hold codes of different tokenizers"):
        load_dataset(CodesConfig(folders={"train": (str(folder), str(tmp_path / "other"))}))
    for changes, message in (
        ({"crops": -1}, "crops must be 0 or more"),
        ({"max_skipped": 2.0}, "max_skipped is a share"),
    ):
        with pytest.raises(DataError, match=message):
            options(**changes)
    info = json.loads((folder / "info.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in contents(folder).items():
        (copy / name).write_bytes(content)
    (copy / "info.json").write_text(json.dumps(info | {"size": 4}))
    with pytest.raises(DataError, match="the codes of row 0 are damaged"):
        StoredCodes(copy)[0]
