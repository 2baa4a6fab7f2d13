from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from magma_jax.data.format.records import DataError
from magma_jax.data.images import load_image
from magma_jax.data.openmoji import drawings as openmoji
from magma_jax.data.openmoji import text as openmoji_text
from magma_jax.data.readers import read

CONFIGS = Path(__file__).parents[2] / "configs"
SIZE = 128


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("openmoji")


@pytest.fixture(scope="module")
def data(cache_dir):
    return openmoji.load(cache_dir, SIZE)


@pytest.fixture(scope="module")
def images(data):
    return data[0]


def of(images, split):
    return [p for p in images if p.split == split]


def test_images_and_pixels(data):
    images, pixels = data
    assert pixels.shape == (len(images), SIZE, SIZE, 3)
    assert pixels.dtype == np.uint8
    assert len(images) > 3600
    assert [p.index for p in images] == list(range(len(images)))
    assert len({array.tobytes() for array in pixels}) == len(images), "two names for one drawing"
    assert (pixels[:, 0, 0] == 255).all(), "white corners"


def test_cache_is_one_whole_file(cache_dir, data, monkeypatch):
    assert len(list(cache_dir.iterdir())) == 1
    monkeypatch.setattr(openmoji, "_draw", None)  # not drawn again
    assert (openmoji.load(cache_dir, SIZE)[1] == data[1]).all()


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    names = dict(list(openmoji._names().items())[:3])
    monkeypatch.setattr(openmoji, "_names", lambda: names)

    def fail(file, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(KeyboardInterrupt):
        openmoji.load(tmp_path, 16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("woman firefighter dark skin tone", "a woman firefighter with dark skin tone"),
        ("man medium-light skin tone red hair", "a man with red hair with medium-light skin tone"),
        ("woman bald", "a bald woman"),
        ("women holding hands", "women holding hands"),
        ("kiss woman man dark skin tone light skin tone", "a kiss of woman and man with dark and light skin tone"),
        ("family man girl boy", "a family of man, girl and boy"),
        ("Kosovo", "the flag of Kosovo"),
        ("eagle", "an eagle"),
        ("nesting dolls", "nesting dolls"),
    ],
)
def test_captions(images, name, caption):
    (image,) = [p for p in images if p.name == name]
    assert image.caption == caption


def test_captions_are_invertible(images):
    for p in images:
        assert openmoji.undescribe(p.caption) == (p.base, p.tones)
    assert len({p.caption for p in images}) == len(images)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("woman firefighter dark skin tone", ("firefighter", "person", "woman", ("dark",), 1)),
        ("detective", ("detective", "person", "person", (), 1)),
        ("mermaid light skin tone", ("merfolk", "person", "woman", ("light",), 1)),
        ("kiss woman man dark skin tone light skin tone", ("kiss", "people", "woman man", ("dark", "light"), 2)),
        ("thumbs up medium skin tone", ("thumbs up", "hand", None, ("medium",), 0)),
        ("nose", ("nose", "body part", None, (), 0)),
        ("Wales", ("Wales", "flag", None, (), 0)),
        ("teapot", ("teapot", "thing", None, (), 0)),
    ],
)
def test_parts(images, name, parts):
    (p,) = [p for p in images if p.name == name]
    assert (p.concept, p.kind, p.gender, p.tones, p.people) == parts


def test_held_out_list_is_the_recorded_one(images):
    held_out = sorted((p.split, p.name) for p in images if p.split != "train")
    assert "".join(f"{split}\t{name}\n" for split, name in held_out) == (CONFIGS / "quickstart_heldout.txt").read_text()


def test_parts_of_held_out_combinations_occur_in_training(images):
    train = of(images, "train")
    things = {(p.concept, p.gender) for p in train}
    tones = Counter((tone, p.kind) for p in train for tone in p.tones)
    names = {p.name for p in train}
    for p in of(images, "test") + of(images, "validation"):
        assert p.name not in names
        assert (p.concept, p.gender) in things
        assert all(tones[tone, p.kind] > 2 for tone in p.tones)
    assert len(of(images, "test")) > 200
    assert len(of(images, "validation")) > 100


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_questions_are_balanced(images, split):
    samples = openmoji.questions(of(images, split), seed=1)
    answers = defaultdict(Counter)
    for sample in samples:
        assert images[sample.image].split == split
        assert sample.prompt.startswith("Q: ")
        assert sample.prompt.endswith(" A:")
        answers[sample.kind][sample.answer] += 1
    assert {"tone", "is tone", "gender", "is gender", "what", "is what", "count", "hand"} <= set(answers)
    for kind, counts in answers.items():
        if kind != "what":
            frequent = [n for n in counts.values() if n >= max(counts.values()) // 4]
            assert min(frequent) == max(frequent), (kind, counts)
    assert len(answers["what"]) > 50
    # A wrong suggestion is drawn like a right one: the question alone tells little.
    suggested = defaultdict(Counter)
    for sample in samples:
        if sample.kind.startswith("is "):
            suggested[sample.prompt][sample.answer] += 1
    best = sum(max(c.values()) for c in suggested.values() if sum(c.values()) >= 20)
    assert best < 0.65 * sum(sum(c.values()) for c in suggested.values() if sum(c.values()) >= 20)


def test_questions_depend_on_the_seed_alone(images):
    test = of(images, "test")
    assert openmoji.questions(test, 3) == openmoji.questions(test, 3)
    assert openmoji.questions(test, 3) != openmoji.questions(test, 4)


def test_text_has_no_held_out_combination(images):
    held_out = [p for p in images if p.split != "train"]
    pairs = openmoji_text.lines(images, 4000, seed=1)
    assert len(pairs) > 3000
    assert pairs == openmoji_text.lines(images, 4000, seed=1)
    lines = [words + text for words, text in pairs]
    # "clapping hands" alone is a concept, which a question may name; after "image of" it is a caption.
    captions = [p.caption if p.tones else f"image of {p.caption}" for p in held_out]
    text = "".join(f"{line}\n" for line in lines)
    ends = ("\n", ".", " here")
    assert not [caption for caption in captions if any(f" {caption}{end}" in text for end in ends)]


def test_drawings_are_read_as_records(data, cache_dir):
    options = {"kinds": "is tone,flag", "cache_dir": str(cache_dir)}
    records = list(read("openmoji", Path("validation"), **options))
    drawn = {p.codepoints: p for p in of(data[0], "validation")}
    assert {record.id: record.captions for record in records} == {key: (p.caption,) for key, p in drawn.items()}
    kinds = [question.metadata["kind"] for record in records for question in record.questions]
    assert set(kinds) <= {"is tone", "flag"}
    asked = next(q for record in records for q in record.questions if q.metadata["kind"] == "is tone")
    assert asked.text.startswith("Is the skin tone ")
    assert asked.answers[0] in ("yes", "no")
    pixels = np.asarray(load_image(records[0].image))
    np.testing.assert_array_equal(pixels, data[1][drawn[records[0].id].index])
    with pytest.raises(DataError, match="takes a split in place of a file: train, validation, test, not all"):
        next(read("openmoji", Path("all")))
