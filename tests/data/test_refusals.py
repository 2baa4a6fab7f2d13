"""Sources that are not what they should be: one line that names file and field, or a counted skip."""

import copy
import gzip
import json

import pytest

from magma_jax.data import readers
from magma_jax.data.format.records import DataError, Record, Skipped

# The smallest whole source of every format that is JSON, about the image 1.jpg. VQA's two files are one here.
SOURCES = {
    "coco": {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "A cat."}]},
    "coco_karpathy": {
        "images": [
            {"filename": "1.jpg", "filepath": ".", "split": "train", "cocoid": 1, "sentences": [{"raw": "A cat."}]}
        ]
    },
    "vqav2": {
        "data_subtype": "val2014",
        "questions": [{"question_id": 7, "image_id": 1, "question": "What?"}],
        "annotations": [
            {"question_id": 7, "answers": [{"answer": "cat", "raw_answer": "cats", "answer_confidence": "yes"}]}
        ],
    },
    "gqa": {"7": {"question": "What?", "imageId": "1", "answer": "cat", "isBalanced": True}},
    "vizwiz": [{"image": "1.jpg", "question": "What?", "answers": [{"answer": "cat"}], "answerable": 1}],
    "snli_ve": {"Flickr30K_ID": "1", "pairID": "1#0", "gold_label": "neutral", "sentence1": "A", "sentence2": "B"},
    "hateful_memes": {"id": 1, "img": "1.jpg", "label": 0, "text": "cat"},
    "visual_genome": [{"id": 1, "regions": [{"region_id": 1, "x": 0, "phrase": "a cat"}]}],
    "localized_narratives": {"image_id": "1", "annotator_id": 2, "caption": "A cat."},
    "magma": {"image_path": "1.jpg", "captions": ["A cat."], "metadata": {"a": 1}},
}
ODD = (None, 3, "odd", [], {}, [None], {"odd": None})


@pytest.fixture
def images(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"an image, never opened")
    (tmp_path / f"{1:012d}.jpg").write_bytes(b"as COCO calls it")
    return tmp_path


def read(name, content, images):
    """Records and skips of a source with this content."""
    text = content if isinstance(content, str) else json.dumps(content)
    file = images / "image_data" / "1.json" if name == "magma" else images / "source.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    options = {"annotations": str(file)} if name == "vqav2" else {}
    return list(readers.read(name, images if name == "magma" else file, images, **options))


def outcome(name, content, images):
    """What ``read`` gives, and the line that refuses it."""
    try:
        return read(name, content, images), None
    except DataError as error:
        return [], str(error)


def places(content, path=()):
    """The path of every value in a JSON value."""
    yield path
    for key in range(len(content)) if isinstance(content, list) else content if isinstance(content, dict) else ():
        yield from places(content[key], (*path, key))


def changed(content, path, value):
    """A copy with another value at a place."""
    if not path:
        return value
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


@pytest.mark.parametrize("name", SOURCES)
def test_whatever_stands_at_whichever_place_is_read_or_refused(images, name):
    (record,) = read(name, SOURCES[name], images)
    assert isinstance(record, Record)
    for path in places(SOURCES[name]):
        for odd in ODD:
            found, refusal = outcome(name, changed(SOURCES[name], path, odd), images)
            assert refusal is None or (str(images) in refusal and "\n" not in refusal), (path, odd)
            for entry in found:
                if isinstance(entry, Record):
                    texts = [*entry.captions, *(answer for asked in entry.questions for answer in asked.answers)]
                    assert all(isinstance(text, str) for text in texts), (path, odd)


@pytest.mark.parametrize(
    ("name", "path", "says"),
    [
        ("vqav2", ("annotations", 0, "answers", 0, "answer"), "question 7: 'answer' is null, not text"),
        ("coco", ("annotations", 0, "caption"), "annotation of image 1: 'caption' is null, not text"),
        ("gqa", ("7", "answer"), "question 7: 'answer' is null, not text"),
        ("hateful_memes", ("label",), "line 1: 'label' is null, not a number or text"),
        ("magma", ("captions", 0), "1.json: a caption is null, not text"),
        ("visual_genome", (0, "id"), "image: 'id' is null, not a number or text"),
    ],
)
def test_null_is_no_text(images, name, path, says):
    with pytest.raises(DataError) as error:
        read(name, changed(SOURCES[name], path, None), images)
    assert says in str(error.value)


def test_two_entries_of_one_id_are_an_error(images):
    coco, vqa = SOURCES["coco"], SOURCES["vqav2"]
    pair = json.dumps(SOURCES["snli_ve"])
    question = json.dumps(SOURCES["gqa"]["7"])
    for name, content, says in [
        ("coco", coco | {"images": coco["images"] * 2}, "images: two entries have the id 1"),
        ("vqav2", vqa | {"questions": vqa["questions"] * 2}, "questions: two entries have the id 7"),
        ("gqa", f'{{"7": {question}, "7": {question}}}', "an object has the key '7' twice"),
        ("snli_ve", f"{pair}\n{pair}\n", "line 2: two entries have the id '1#0'"),
    ]:
        with pytest.raises(DataError) as error:
            read(name, content, images)
        assert says in str(error.value)


def test_a_missing_image_takes_its_questions_along(images):
    questions = [{"question_id": i, "image_id": 2, "question": "What?"} for i in range(3)]
    answers = [{"question_id": i, "answers": [{"answer": "cat"}]} for i in range(3)]
    assert read("vqav2", {"questions": questions, "annotations": answers}, images) == [Skipped("2", "image missing", 3)]


def test_a_byte_order_mark_is_read_over(images):
    for name in ("coco", "hateful_memes"):
        assert len(read(name, "\ufeff" + json.dumps(SOURCES[name]), images)) == 1
    (images / "1.txt").write_text("\ufeffA cat.")
    (record,) = [entry for entry in readers.read("folder", images) if isinstance(entry, Record)]
    assert record.captions == ("A cat.",)


def test_a_json_that_is_something_else_is_told(images):
    with pytest.raises(DataError, match=r"source\.json: no 'annotations' \(there is: text\)"):
        read("coco", '"a plain string"', images)
    with pytest.raises(DataError, match=r"source\.json is text, not an object"):
        read("vqav2", '"a plain string"', images)


def test_damaged_compression_is_told(tmp_path):
    whole = gzip.compress(bytes(range(256)) * 99)
    (tmp_path / "lines.tsv.gz").write_bytes(whole[:20] + b"\xff" * 20 + whole[40:])
    with pytest.raises(DataError, match=r"lines\.tsv\.gz: cannot be read to its end"):
        list(readers.common.read_lines(tmp_path / "lines.tsv.gz"))


@pytest.mark.parametrize("name", ["/etc/1.jpg", "../1.jpg"])
def test_annotations_name_images_within_their_folder(images, name):
    for format, path in (("coco", ("images", 0, "file_name")), ("magma", ("image_path",))):
        with pytest.raises(DataError, match="leads out of"):
            read(format, changed(SOURCES[format], path, name), images)


def test_links_to_folders_are_followed_once(images, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "dog.jpg").write_bytes(b"a dog")
    (elsewhere / "dog.txt").write_text("A dog.")
    (elsewhere / "back").symlink_to(images)
    (elsewhere / "folder.jpg").mkdir()
    (images / "linked").symlink_to(elsewhere)
    (images / "again").symlink_to(elsewhere)
    found = {entry.id: entry for entry in readers.read("folder", images)}
    assert found["again/dog"].captions == ("A dog.",)
    assert set(found) == {"1", f"{1:012d}", "again/dog"}
    assert read("coco", changed(SOURCES["coco"], ("images", 0, "file_name"), "dog.jpg"), images)[0].id == "1"
    assert read("magma", changed(SOURCES["magma"], ("image_path",), "linked/dog.jpg"), images)[0].id == "1"
