"""Training from dataset folders: mixed as asked, the same on any number of processes, resumed, and nothing silent."""

import dataclasses
import io
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from magma_jax.config import ConfigError, from_dict, to_dict
from magma_jax.data.batches.sources import FolderSamples, SourceConfig
from magma_jax.data.datasets import load_dataset
from magma_jax.data.folder_dataset import FoldersConfig
from magma_jax.data.format.record_folder import StoredRecords
from magma_jax.data.format.records import DataError, Question, Record
from magma_jax.data.images import load_image, to_uint8
from magma_jax.typing import IGNORED
from tests import datafolders

SIZE = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of captions and one of questions."""
    root = tmp_path_factory.mktemp("data")
    return (
        datafolders.folder(root / "captions", datafolders.captions()),
        datafolders.folder(root / "questions", datafolders.questions()),
    )


def config_of(*sources, **changes):
    options = {"length": 24, "image_size": SIZE, "workers": 0} | changes
    return FoldersConfig(folders={"train": sources, "validation": sources}, **options)


def batches_of(config, count, batch_size=4, rows=None, seed=3, state=None):
    """Some batches, and the state behind them."""
    iterator = iter(load_dataset(config).batches(batch_size, seed, rows or range(batch_size)))
    if state is not None:
        iterator.set_state(state)
    try:
        return [next(iterator) for _ in range(count)], iterator.get_state()
    finally:
        iterator.close()


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name, array in batch.items():
            np.testing.assert_array_equal(other[name], array, err_msg=name)


def texts_of(batches, tokenizer):
    return [tokenizer.decode(row.tolist()) for batch in batches for row in batch["tokens"]]


def test_a_batch_holds_texts_and_the_pixels_of_their_images(folders):
    config = config_of(folders[0])
    tokenizer = load_dataset(config).tokenizer
    (batch,), _ = batches_of(config, 1)
    assert batch["images"].shape == (4, SIZE, SIZE, 3)
    assert batch["images"].dtype == np.uint8
    images = {f"image {i}": to_uint8(load_image(datafolders.noise(i)), SIZE) for i in range(12)}
    for text, pixels in zip(texts_of([batch], tokenizer), batch["images"], strict=True):
        np.testing.assert_array_equal(pixels, images[text.removeprefix("the ").replace("number ", "")])


def test_every_image_comes_once_an_epoch_with_a_caption_drawn_anew(folders):
    config = config_of(folders[0])
    tokenizer = load_dataset(config).tokenizer
    batches, _ = batches_of(config, 12)
    texts = texts_of(batches, tokenizer)
    epochs = [texts[start : start + 12] for start in range(0, 48, 12)]
    for epoch in epochs:
        assert sorted(int(text.split()[-1]) for text in epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert 10 < sum(text.startswith("the") for text in texts) < 38


def test_questions_have_their_prompt_and_one_of_their_answers(folders):
    prompt = "Q: What colour is it? A:"
    source = SourceConfig(folders[1], words={"white": "pale"})
    dataset = load_dataset(config_of(source))
    batches, _ = batches_of(config_of(source), 10)
    texts = set(texts_of(batches, dataset.tokenizer))
    assert texts <= {
        f"{prompt} {answer}" for name in ("red", "green", "blue", "pale", "white") for answer in (name, f"dark {name}")
    } - {f"{prompt} white"}
    assert f"{prompt} pale" in texts
    assert any("dark" in text for text in texts)
    # For evaluation the most frequent answer.
    assert [s.answer for s in dataset.evaluation["validation"]] == [" red", " green", " blue", " pale"]
    # The reference learns every token of a text; the answer alone on request.
    for learn in (True, False):
        config = config_of(dataclasses.replace(source, learn_prompt=learn))
        (batch,), _ = batches_of(config, 1)
        given = len(dataset.tokenizer.encode(prompt))
        assert (batch["labels"][:, :given] != IGNORED).all() == learn
        assert (batch["labels"][:, given] != IGNORED).all()


def test_the_mixture_has_the_weights_of_its_sources(folders):
    captions, questions = folders
    tokenizer = load_dataset(config_of(captions)).tokenizer

    def share(*sources):
        batches, _ = batches_of(config_of(*sources, workers=0), 32)
        return np.mean([text.startswith("Q:") for text in texts_of(batches, tokenizer)])

    assert share(captions, questions) == pytest.approx(4 / 16, abs=0.02)
    weighted = SourceConfig(captions, weight=1.0), SourceConfig(questions, weight=3.0)
    assert share(*weighted) == pytest.approx(0.75, abs=0.02)


FORMS = {"padded": {}, "bucketed": {"buckets": (5, 9)}, "packed": {"length": 40, "pack": 3}}


@pytest.mark.parametrize("form", FORMS)
def test_a_mixture_resumes_at_the_exact_sample(folders, form):
    config = config_of(*folders, **FORMS[form])
    whole, _ = batches_of(config, 6)
    first, state = batches_of(config, 2)
    rest, _ = batches_of(config, 4, state=state)
    assert_same(first + rest, whole)


@pytest.mark.parametrize("form", FORMS)
def test_processes_share_the_rows_of_the_same_batches(folders, form):
    config = config_of(*folders, **FORMS[form])
    whole, _ = batches_of(config, 3)
    for rows in ([0, 1], [2, 3]):
        part, _ = batches_of(config, 3, rows=rows)
        assert_same(part, [{name: array[rows] for name, array in batch.items()} for batch in whole])


def test_worker_processes_give_the_same_batches(folders):
    config = config_of(*folders, augment="random_crop")
    assert_same(batches_of(dataclasses.replace(config, workers=2), 3)[0], batches_of(config, 3)[0])


def test_random_crops_are_drawn_anew_and_can_be_repeated(folders):
    plain, augmented = config_of(folders[1], length=16), config_of(folders[0], augment="random_crop")
    assert_same(batches_of(augmented, 2)[0], batches_of(augmented, 2)[0])
    centre, _ = batches_of(config_of(folders[0]), 3)
    crops, _ = batches_of(augmented, 3)
    assert (centre[0]["images"] != crops[0]["images"]).any()
    np.testing.assert_array_equal(centre[0]["tokens"], crops[0]["tokens"])
    # One colour stays one colour, and no margin appears in an image that is large enough.
    squares, _ = batches_of(dataclasses.replace(plain, augment="random_crop"), 1)
    assert all(np.ptp(image.reshape(-1, 3).astype(int), axis=0).max() < 3 for image in squares[0]["images"])


def test_packed_rows_have_the_images_of_their_samples(folders):
    config = config_of(folders[0], length=40, pack=3)
    tokenizer = load_dataset(config).tokenizer
    (batch,), _ = batches_of(config, 1)
    images = {i: to_uint8(load_image(datafolders.noise(i)), SIZE) for i in range(12)}
    for row, segments in enumerate(batch["segments"]):
        for slot in range(3):
            tokens = batch["tokens"][row][segments == slot + 1]
            if not len(tokens):
                assert not batch["images"][row, slot].any()
                continue
            number = int(tokenizer.decode(tokens.tolist()).split()[-1])
            np.testing.assert_array_equal(batch["images"][row, slot], images[number])


@pytest.fixture
def damaged(tmp_path):
    """Twelve images, of which two are damaged, and a question without an answer."""
    records = datafolders.captions()
    whole = records[3].image
    records[3] = dataclasses.replace(records[3], image=whole[: len(whole) // 2])
    records[7] = dataclasses.replace(records[7], image=datafolders.noise(7)[:-300])
    records.append(Record("silent", datafolders.noise(20), questions=(Question("q", "Why?", ("", " ")),)))
    return datafolders.folder(tmp_path / "damaged", records, check="header")


@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_used_has_no_loss_and_is_counted_the_same_every_time(damaged, form):
    config = config_of(damaged, max_skipped=0.5, **FORMS[form])
    batches, state = batches_of(config, 16)
    assert_same(batches, batches_of(config, 16)[0])
    assert state["skipped"] > 0
    if form == "padded":
        # 64 samples are four times thirteen and twelve more.
        assert 4 * 3 <= state["skipped"] <= 5 * 3
        lost = [(batch["labels"] == IGNORED).all(axis=1) for batch in batches]
        assert sum(map(np.sum, lost)) == state["skipped"]
        for batch, rows in zip(batches, lost, strict=True):
            assert not batch["images"][rows].any()
            assert batch["images"][~rows].any(axis=(1, 2, 3)).all()
    # Counts go on where a run goes on.
    _, half = batches_of(config, 8)
    assert batches_of(config, 8, state=half)[1] == state


def test_it_is_said_what_was_left_out(damaged):
    iterator = iter(load_dataset(config_of(damaged, max_skipped=0.5)).batches(13, 3, range(13)))
    next(iterator)
    told = {(entry["row"], entry["reason"]) for entry in iterator.just_skipped}
    assert told == {(3, "image damaged"), (7, "image damaged"), (12, "question without answers")}
    assert iterator.just_skipped[0]["folder"] == damaged


def test_too_many_unusable_samples_are_an_error(damaged, monkeypatch):
    monkeypatch.setattr("magma_jax.data.batches.folders.JUDGED_SAMPLES", 20)
    with pytest.raises(DataError, match=r"samples could not be used, more than data\.max_skipped 10\.00%"):
        batches_of(config_of(damaged, max_skipped=0.1), 20)


def test_a_damaged_shard_is_skipped_and_counted(tmp_path):
    path = datafolders.folder(tmp_path / "data", datafolders.captions())
    for name, within in (("texts-00001.array_record", b"image 6"), ("records-00000.array_record", b"image 2")):
        file = tmp_path / "data" / name
        content = file.read_bytes()
        assert within in content
        file.write_bytes(content.replace(within, b"#" * len(within)))
    _, state = batches_of(config_of(path, max_skipped=1.0), 6)
    assert (state["seen"], state["skipped"]) == (24, 4)


def test_images_by_number_are_as_for_evaluation(folders):
    images = load_dataset(config_of(*folders, augment="random_crop")).images
    assert len(images) == 16
    expected = to_uint8(load_image(datafolders.noise(5)), SIZE)
    np.testing.assert_array_equal(images[5], expected)
    np.testing.assert_array_equal(images[[[5], [6]]][0, 0], expected)
    assert images[10:14].shape == (4, SIZE, SIZE, 3)
    assert images.where(13) == (folders[1], 1)


def test_a_damaged_image_by_number_is_an_error(damaged):
    with pytest.raises(DataError, match=r"damaged: image damaged \(row 3\); repair the image"):
        load_dataset(config_of(damaged)).images[[1, 3]]


def test_fast_decoding_stays_close_and_small_images_are_exact(tmp_path):
    file = io.BytesIO()
    smooth = Image.open(io.BytesIO(datafolders.noise(0))).resize((12, 10)).resize((400, 320), Image.Resampling.BICUBIC)
    smooth.save(file, "JPEG", quality=90)
    records = [Record("large", file.getvalue(), ("a",)), Record("small", datafolders.noise(1), ("b",))]
    path = datafolders.folder(tmp_path / "data", records)
    exact, fast = (load_dataset(config_of(path, decode=decode)).images[:] for decode in ("exact", "fast"))
    np.testing.assert_array_equal(fast[1], exact[1])
    difference = np.abs(fast[0].astype(int) - exact[0])
    assert 0 < difference.mean() < 2


def test_samples_are_found_by_number(folders):
    samples = FolderSamples(StoredRecords(folders[0]), SourceConfig(folders[0], texts="captions"), 100)
    assert (len(samples), samples[4].image, samples[4].answer) == (12, 104, "image 4")
    with pytest.raises(DataError, match="holds no questions"):
        FolderSamples(StoredRecords(folders[0]), SourceConfig(folders[0], texts="questions"), 0)
    prompted = SourceConfig(folders[0], caption_prompt="A picture of")
    sample = FolderSamples(StoredRecords(folders[0]), prompted, 0)[1]
    assert sample.prompt + sample.answer == "A picture of image 1"


def test_classes_are_learned_at_the_end_of_the_statement(folders):
    source = SourceConfig(folders[1], texts="questions", question_prompt="{}")
    config = config_of(source, classes=("red", "green", "blue", "white", *(f"dark {n}" for n in datafolders.COLOURS)))
    tokenizer = load_dataset(config).tokenizer
    (batch,), _ = batches_of(config, 1)
    statement = tokenizer.encode("What colour is it?")
    assert (batch["tokens"][:, : len(statement)] == statement).all()
    assert (batch["tokens"][:, len(statement)] == tokenizer.eos_id).all()
    learned = batch["labels"] != IGNORED
    assert (learned.sum(axis=1) == 1).all()
    assert learned[:, len(statement)].all()
    with pytest.raises(ValueError, match=r"is none of data\.classes: yes, no"):
        batches_of(config_of(source, classes=("yes", "no")), 1)


def test_configs_of_sources():
    config = config_of("a", SourceConfig("b", texts="captions"))
    assert config.folders["train"][0] == SourceConfig("a")
    assert from_dict(FoldersConfig, to_dict(config)) == config
    with pytest.raises(ValueError, match=r"data\.folders\.train: give all of its folders a weight, or none"):
        config_of("a", SourceConfig("b", weight=1.0))
    with pytest.raises(ValueError, match="weight of b must be above 0"):
        SourceConfig("b", weight=0.0)
    with pytest.raises(ValueError, match=r"must hold \{\} once"):
        SourceConfig("b", question_prompt="Q: A:")
    with pytest.raises(ConfigError, match=r"set data\.folders\.train"):
        load_dataset(FoldersConfig())
    with pytest.raises(DataError, match="nowhere: no dataset folder"):
        load_dataset(config_of("nowhere"))


KILLED = """
import sys, time
from magma_jax.data.folder_dataset import FoldersConfig, open_folders
config = FoldersConfig(folders={"train": (sys.argv[1],)}, length=24, image_size=32, workers=2)
iterator = iter(open_folders(config).batches(4, 0, range(4)))
next(iterator)
print(*iterator._images.worker_ids(), flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_workers_do_not_outlive_a_run_that_is_killed(folders):
    process = subprocess.Popen([sys.executable, "-c", KILLED, folders[0]], stdout=subprocess.PIPE, text=True)
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(200):
        if not any(_alive(pid) for pid in workers):
            return
        time.sleep(0.05)
    raise AssertionError("workers are still there")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().split()[2] != "Z"


# One of several processes that fails ends without its exit handlers.
FAILS = """
from magma_jax.runtime.distributed import distributed_run
with distributed_run():
    {takes}
    raise ValueError("no such data")
"""


@pytest.mark.parametrize(("code", "status", "said"), [("{takes}", 0, ""), (FAILS, 2, "process 0 of 1: no such data\n")])
def test_shared_memory_is_given_back_at_the_end_of_a_process(code, status, said, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    takes = "from magma_jax.data.batches.stored_images import _Blocks; blocks = _Blocks(); blocks.take(10)"
    command = [sys.executable, "-c", code.format(takes=takes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, said)
