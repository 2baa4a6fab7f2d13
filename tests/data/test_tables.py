"""Tables of one's own, and their splits."""

import csv
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from magma_jax.data.__main__ import main
from magma_jax.data.format.record_folder import StoredRecords
from magma_jax.data.format.records import DataError, Record, Skipped
from magma_jax.data.readers import read
from magma_jax.data.write.splits import parse_split, split_of


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path):
    """A folder of three images."""
    for i, name in enumerate(("a.png", "b.png", "more/c.png")):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return tmp_path / "images"


def entries(name, source, images=None, **options):
    found = list(read(name, source, images, **options))
    records = {entry.id: entry for entry in found if isinstance(entry, Record)}
    return records, [entry for entry in found if isinstance(entry, Skipped)]


ROWS = [
    {"image": "a.png", "caption": "one", "question": None, "answer": None},
    {"image": "b.png", "caption": "two", "question": "how many?", "answer": ["2", "two"]},
    {"image": "a.png", "caption": "first", "question": "what?", "answer": "a letter"},
    {"image": "more/c.png", "caption": "", "question": "which?", "answer": "third"},
]


def write_rows(path, rows):
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".parquet":
            lists = [
                {**r, "answer": r["answer"] if isinstance(r["answer"], list | None) else [r["answer"]]} for r in rows
            ]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lists), path)
        case suffix:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
                writer.writeheader()
                for row in rows:
                    cells = {k: (v[0] if isinstance(v, list) else v) for k, v in row.items()}
                    writer.writerow(cells)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_rows_about_an_image_are_one_record(pictures, suffix):
    records, skipped = entries("table", write_rows(pictures / f"mine{suffix}", ROWS))
    assert list(records) == ["a.png", "b.png", "more/c.png"]
    assert not skipped
    assert records["a.png"].captions == ("one", "first")
    assert [(q.text, q.answers) for q in records["a.png"].questions] == [("what?", ("a letter",))]
    answers = records["b.png"].questions[0].answers
    assert answers == (("2",) if suffix in (".csv", ".tsv") else ("2", "two"))
    assert records["more/c.png"].captions == ()
    assert records["more/c.png"].image_bytes() == png(2)


def test_columns_by_option_and_images_elsewhere(pictures, tmp_path):
    rows = [{"bild": "a.png", "satz": ["x", "y"], "frage": "?", "antwort": 7, "nr": 41}]
    table = write_rows(tmp_path / "rows.jsonl", rows)
    names = {"image": "bild", "caption": "satz", "question": "frage", "answer": "antwort", "id": "nr"}
    records, _ = entries("table", table, pictures, **names)
    assert records["41"].captions == ("x", "y")
    assert records["41"].questions[0].answers == ("7",)


def embedded(path, rows):
    """As Hugging Face's datasets store images."""
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {
        "image": pyarrow.array([{"bytes": data, "path": name} for data, name, _ in rows], image),
        "text": pyarrow.array([text for _, _, text in rows]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_images_in_parquet(tmp_path):
    embedded(
        tmp_path / "data" / "train-0.parquet", [(png(1), "1.png", "a"), (png(1), "1.png", "b"), (png(2), None, "c")]
    )
    embedded(tmp_path / "data" / "train-1.parquet", [(png(3), "1.png", "d")])
    records, skipped = entries("table", tmp_path)
    assert not skipped
    assert {key: record.captions for key, record in records.items()} == {
        "1.png": ("a", "b"),
        "3": ("c",),
        "1.png#2": ("d",),
    }
    assert records["3"].image_bytes() == png(2)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_imagefolder(pictures, suffix):
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "more/c.png", "text": "three"}]
    write_rows(pictures / f"metadata{suffix}", rows)
    records, _ = entries("table", pictures)
    assert {key: record.captions for key, record in records.items()} == {"a.png": ("one",), "more/c.png": ("three",)}


def test_what_a_row_lacks_is_counted(pictures):
    rows = [
        {"image": "a.png", "caption": " ", "question": "", "answer": ""},
        {"image": "gone.png", "caption": "x", "question": "y", "answer": "z"},
        {"image": "b.png", "caption": "", "question": "unanswered", "answer": None},
    ]
    records, skipped = entries("table", write_rows(pictures / "mine.jsonl", rows))
    assert not records
    assert {(entry.id, entry.reason, entry.samples) for entry in skipped} == {
        ("a.png", "empty caption", 1),
        ("gone.png", "image missing", 2),
        ("b.png", "question without answers", 1),
    }


TABLES = {
    "no image column": ("x.csv", "name,caption\na,b\n", "no column of images (there is: name, caption); name it with"),
    "no text column": ("x.csv", "image,label\na,b\n", "no column of captions, or of questions and answers"),
    "half a question": ("x.csv", "image,question\na,b\n", "no column of captions, or of questions and answers"),
    "an image that is none": ("x.jsonl", '{"image": 7, "caption": "a"}', "row 1: 'image' is 7, neither the path"),
    "several images": ("x.jsonl", '{"image": ["a", "b"], "caption": "a"}', "row 1: 'image' is 2 images"),
    "an empty path": (
        "x.csv",
        "image,caption\n,a\n",
        "row 1: 'image' is '', neither the path of an image",
    ),
    "a path out": ("x.csv", "image,caption\n../a.png,a\n", "leads out of"),
    "a caption that is none": ("x.jsonl", '{"image": "a", "caption": {"en": "b"}}', "row 1: 'caption' is an object"),
    "missing cells": ("x.csv", "image,caption\na\n", "row 1 has 1 cells, the header has 2"),
    "a column twice": ("x.csv", "image,image\na,b\n", "two columns are called 'image'"),
    "an open quote": ("x.csv", 'image,caption\na,"b\n', "is not a table of cells"),
    "nothing": ("x.csv", "", "is empty"),
    "no rows": ("x.csv", "image,caption\n", "holds no rows"),
    "no list": ("x.json", "{}", "is an object, not a list"),
    "another file": ("x.xlsx", "PK", "its name must end with .jsonl"),
}


@pytest.mark.parametrize("name", TABLES)
def test_unusable_tables_are_named(tmp_path, name):
    file, content, says = TABLES[name]
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError) as caught:
        entries("table", tmp_path / file)
    assert says in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_that_is_not_there(pictures):
    table = write_rows(pictures / "mine.csv", ROWS)
    with pytest.raises(DataError, match=r"no column 'titel' \(there is: image, caption, question, answer\)"):
        entries("table", table, caption="titel")
    with pytest.raises(DataError, match=r"holds neither metadata\.jsonl"):
        entries("table", pictures)


def test_conversations(pictures, tmp_path):
    def turns(*texts):
        return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]

    rows = [
        {"id": "7", "image": "a.png", "conversations": turns("<image>\nWhat?", "A.", "And?", "Red.")},
        {"id": "8", "conversations": turns("Hello", "Hi")},
        {"id": "9", "image": ["a.png", "b.png"], "conversations": turns("Which?", "B.")},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    records, skipped = entries("llava", tmp_path / "llava.json", pictures)
    assert [(q.text, q.answers) for q in records["7"].questions] == [("What?", ("A.",)), ("And?", ("Red.",))]
    reasons = ["conversation without an image", "conversation about several images"]
    assert [entry.reason for entry in skipped] == reasons
    rows[0]["conversations"].reverse()
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="entry 1: turns of gpt and human"):
        entries("llava", tmp_path / "llava.json", pictures)


def test_splits_keep_copies_together(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.png").write_bytes(png(i % 40))  # the last twenty are copies
    rows = [{"image": f"{i}.png", "caption": f"c{i}"} for i in range(60)]
    table = write_rows(folder / "mine.jsonl", [*rows, {"image": "gone.png", "caption": "x"}])
    command = [
        "convert",
        "--from",
        "table",
        str(table),
        str(tmp_path / "out"),
        "--workers",
        "0",
        "--max-skipped",
        "0.1",
    ]
    split = ["--split", "train=0.6", "validation=0.2", "test=0.2"]
    assert main([*command, *split]) == 0
    shares = parse_split(split[1:])
    found = {}
    for name in shares:
        stored = StoredRecords(tmp_path / "out" / name)
        for row in range(len(stored)):
            record = stored[row]
            assert split_of(record.image_bytes(), shares) == name
            found[record.id] = name
    assert len(found) == 60
    assert all(found[f"{i}.png"] == found[f"{i + 40}.png"] for i in range(20))
    assert all(4 <= list(found.values()).count(name) <= 45 for name in shares)
    # What a reader skipped is told once.
    counts = [StoredRecords(tmp_path / "out" / name).info["skipped"] for name in shares]
    assert counts == [{"image missing": 1}, {}, {}]
    assert main([*command, *split]) == 2


@pytest.mark.parametrize(
    ("split", "says"),
    [
        (["train=0.9"], "add up to 0.9"),
        (["train=0.9", "test=0.2"], "add up to 1.1"),
        (["train=x"], "expected NAME=SHARE"),
        (["=1"], "expected NAME=SHARE"),
        (["a/b=1"], "expected NAME=SHARE"),
        (["a=0.5", "a=0.5"], "a comes twice"),
    ],
)
def test_splits_that_do_not_add_up(split, says):
    with pytest.raises(DataError, match=says):
        parse_split(split)
