"""Every reader on a small fixture in the format of the release."""

import gzip
import io
import json
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from magma_jax.data import readers
from magma_jax.data.format.records import HIDDEN, DataError, Record, Skipped
from magma_jax.data.readers.web import WIT_COLUMNS


def write_image(path, colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), colour).save(path)


def jpeg(colour=(200, 30, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def lines(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def read(name, *arguments, **options):
    found = list(readers.read(name, *arguments, **options))
    records = {entry.id: entry for entry in found if isinstance(entry, Record)}
    return records, [(entry.id, entry.reason) for entry in found if isinstance(entry, Skipped)]


# Captions


def coco_content():
    images = [
        {"license": 4, "file_name": f"COCO_val2014_{i:012d}.jpg", "id": i, "width": 640, "height": 480}
        for i in (1, 2, 3)
    ]
    annotations = [
        {"image_id": 2, "id": 37, "caption": "A bicycle replica with a clock as the front wheel. "},
        {"image_id": 1, "id": 38, "caption": "A red square."},
        {"image_id": 2, "id": 39, "caption": "A bicycle"},
    ]
    return {"info": {}, "images": images, "licenses": [], "annotations": annotations}


def test_coco_joins_captions_by_image_id(tmp_path):
    for i in (1, 2, 3):
        write_image(tmp_path / "images" / "val2014" / f"COCO_val2014_{i:012d}.jpg")
    source = dump(tmp_path / "captions_val2014.json", coco_content())
    records, skipped = read("coco", source, tmp_path / "images")
    assert records["2"].captions == ("A bicycle replica with a clock as the front wheel.", "A bicycle")
    assert records["1"].captions == ("A red square.",)
    assert records["1"].metadata["width"] == 640
    assert records["1"].image_bytes().startswith(b"\xff\xd8")
    assert skipped == [("3", "image without an annotation")]


def test_shuffled_annotations_give_the_same_images_the_same_captions(tmp_path):
    for i in (1, 2):
        write_image(tmp_path / f"COCO_val2014_{i:012d}.jpg")
    content = coco_content()
    first, _ = read("coco", dump(tmp_path / "a.json", content), tmp_path)
    random.Random(0).shuffle(content["images"])
    content["annotations"].reverse()
    second, _ = read("coco", dump(tmp_path / "b.json", content), tmp_path)
    assert {k: sorted(r.captions) for k, r in first.items()} == {k: sorted(r.captions) for k, r in second.items()}


@pytest.mark.parametrize("listed", [str, int])
def test_ids_join_as_numbers_or_as_text(tmp_path, listed):
    """As ``score`` joins them: exports of data frames turn numbers into text, or the reverse."""
    other = int if listed is str else str
    for i in (1, 2):
        write_image(tmp_path / f"COCO_val2014_{i:012d}.jpg")
    content = coco_content()
    for image in content["images"]:
        image["id"] = listed(image["id"])
    for annotation in content["annotations"]:
        annotation["image_id"] = other(annotation["image_id"])
    records, skipped = read("coco", dump(tmp_path / "a.json", content), tmp_path)
    assert set(records) == {"1", "2"}
    assert skipped == [("3", "image missing")]
    content["images"].append(content["images"][0] | {"id": other(1)})
    with pytest.raises(DataError, match=r"two entries have the id '?1"):
        read("coco", dump(tmp_path / "b.json", content), tmp_path)

    source, annotations = vqa_files(tmp_path / "vqa")
    for annotation in annotations:
        annotation["question_id"] = str(annotation["question_id"])
    dump(tmp_path / "vqa" / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    assert read("vqav2", source, tmp_path / "vqa")[1] == []


def test_missing_images_and_foreign_annotations_are_told(tmp_path):
    content = coco_content()
    content["annotations"].append({"image_id": 99, "id": 40, "caption": "Nothing."})
    write_image(tmp_path / "COCO_val2014_000000000001.jpg")
    _, skipped = read("coco", dump(tmp_path / "c.json", content), tmp_path)
    assert ("2", "image missing") in skipped
    assert ("99", "annotation of an image that the file does not list") in skipped


def test_karpathy_train_includes_restval(tmp_path):
    def entry(split, folder, cocoid):
        name = f"COCO_{folder}_{cocoid:012d}.jpg"
        write_image(tmp_path / folder / name)
        sentences = [{"tokens": ["a", "man"], "raw": "A man with a red helmet. ", "imgid": 0, "sentid": 770337}]
        return {
            "filepath": folder,
            "filename": name,
            "imgid": 0,
            "split": split,
            "sentences": sentences,
            "cocoid": cocoid,
        }

    images = [entry("train", "train2014", 1), entry("restval", "val2014", 2), entry("test", "val2014", 3)]
    source = dump(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    assert set(read("coco_karpathy", source, tmp_path)[0]) == {"1", "2"}
    assert set(read("coco_karpathy", source, tmp_path, split="train_only")[0]) == {"1"}
    records, _ = read("coco_karpathy", source, tmp_path, split="test")
    assert records["3"].captions == ("A man with a red helmet.",)
    with pytest.raises(DataError, match="no image of split 'dev'"):
        read("coco_karpathy", source, tmp_path, split="dev")


def test_nocaps_keeps_the_domain(tmp_path):
    write_image(tmp_path / "0013ea2087020901.jpg")
    image = {
        "id": 0,
        "open_images_id": "0013ea2087020901",
        "height": 1024,
        "width": 732,
        "coco_url": "",
        "file_name": "0013ea2087020901.jpg",
        "license": 0,
        "date_captured": "2018-11-06 11:04:33",
        "domain": "near-domain",
    }
    content = {"images": [image], "annotations": [{"image_id": 0, "id": 0, "caption": "A baby."}]}
    records, _ = read("nocaps", dump(tmp_path / "nocaps_val.json", content), tmp_path)
    assert records["0"].metadata["domain"] == "near-domain"


# Questions


def answers(*texts, **extra):
    return [{"answer": t, "answer_confidence": "yes", "answer_id": i, **extra} for i, t in enumerate(texts, 1)]


def vqa_files(folder, prefix="v2_"):
    questions = [
        {"image_id": 393714, "question": "What colour is it?", "question_id": 393714000},
        {"image_id": 458752, "question": "Is it big?", "question_id": 458752000},
        {"image_id": 393714, "question": "How many?", "question_id": 393714001},
    ]
    annotations = [
        {
            "image_id": q["image_id"],
            "question_id": q["question_id"],
            "question_type": "what",
            "answer_type": "other",
            "multiple_choice_answer": str(q["question_id"]),
            "answers": answers(*[str(q["question_id"])] * 10),
        }
        for q in reversed(questions)
    ]
    for i in (393714, 458752):
        write_image(folder / "val2014" / f"COCO_val2014_{i:012d}.jpg")
    head = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    dump(folder / f"{prefix}mscoco_val2014_annotations.json", head | {"annotations": annotations})
    return dump(
        folder / f"{prefix}OpenEnded_mscoco_val2014_questions.json", head | {"questions": questions}
    ), annotations


def test_vqa_joins_by_question_id_though_the_orders_differ(tmp_path):
    source, _ = vqa_files(tmp_path)
    records, skipped = read("vqav2", source, tmp_path)
    assert not skipped
    assert [q.id for q in records["393714"].questions] == ["393714000", "393714001"]
    for record in records.values():
        for question in record.questions:
            assert question.answers == (question.id,) * 10
            assert question.metadata["answer_type"] == "other"


def test_vqa_of_ones_own_images_finds_them_by_file_name(tmp_path):
    write_image(tmp_path / "images" / "kitchen" / "my cat.png")
    content = {
        "images": [{"id": 7, "file_name": "kitchen/my cat.png"}, {"id": 9, "file_name": "gone.png"}, {"id": 8}],
        "questions": [
            {"question_id": i, "image_id": image, "question": "What?"} for i, image in enumerate(("7", 8, 9))
        ],
        "annotations": [{"question_id": i, "answers": answers("cat")} for i in range(3)],
    }
    source = dump(tmp_path / "own.json", content)
    write_image(tmp_path / "images" / f"{8:012d}.jpg")
    found = list(readers.read("vqav2", source, tmp_path / "images", annotations=str(source)))
    assert [entry.id for entry in found if isinstance(entry, Record)] == ["7", "8"]
    (missing,) = [entry for entry in found if isinstance(entry, Skipped)]
    assert (missing.id, missing.reason) == ("9", "image missing")
    assert missing.detail.startswith("looked for gone.png, COCO__000000000009.jpg, COCO_val2014_000000000009.jpg, ")


def test_okvqa_keeps_raw_answers(tmp_path):
    source, annotations = vqa_files(tmp_path, prefix="")
    for annotation in annotations:
        annotation["answers"] = answers("race", "race", raw_answer="racing")
    dump(tmp_path / "mscoco_val2014_annotations.json", {"annotations": annotations})
    records, _ = read("okvqa", source, tmp_path)
    assert records["458752"].questions[0].metadata["raw_answers"] == ["racing", "racing"]


def test_questions_without_answers_and_the_reverse_are_told(tmp_path):
    source, annotations = vqa_files(tmp_path)
    annotations[0]["question_id"] = 5
    annotations[1]["answers"] = []
    dump(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    _, skipped = read("vqav2", source, tmp_path)
    assert ("393714001", "question without answers") in skipped
    assert ("458752000", "empty list of answers") in skipped
    assert ("5", "answers to a question that the file of questions lacks") in skipped


def test_a_question_answered_twice_is_an_error(tmp_path):
    source, annotations = vqa_files(tmp_path)
    dump(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": annotations + annotations[:1]})
    with pytest.raises(DataError, match="is answered twice"):
        read("vqav2", source, tmp_path)


def test_missing_answers_are_an_error_unless_it_is_a_test_split(tmp_path):
    source, _ = vqa_files(tmp_path)
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(DataError, match="option annotations=FILE"):
        read("vqav2", source, tmp_path)
    test = source.rename(tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json")
    records, _ = read("vqav2", test, tmp_path)
    assert records["458752"].questions[0].answers == ()


def gqa_question(text, image="n250821", balanced=True):
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
        "entailed": [],
        "equivalent": ["20644644"],
        "question": text,
        "imageId": image,
        "isBalanced": balanced,
        "groups": {"global": "room", "local": "02q-room"},
        "answer": "bedroom",
        "semanticStr": "select: scene",
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": "place", "semantic": "global", "structural": "query"},
        "fullAnswer": "It is a bedroom.",
    }


def test_gqa_reads_files_and_folders_of_chunks(tmp_path):
    write_image(tmp_path / "images" / "n250821.jpg")
    content = {"20644644": gqa_question("Which room is it?"), "7": gqa_question("Where?", balanced=False)}
    source = dump(tmp_path / "testdev.json", content)
    records, _ = read("gqa", source, tmp_path / "images")
    (question,) = records["n250821"].questions
    assert (question.id, question.answers) == ("20644644", ("bedroom",))
    assert question.metadata["types"]["structural"] == "query"
    assert len(read("gqa", source, tmp_path / "images", balanced=False)[0]["n250821"].questions) == 2

    for i in (0, 1, 10, 2):
        dump(tmp_path / "chunks" / f"train_all_questions_{i}.json", {str(i): gqa_question(f"Question {i}?")})
    records, _ = read("gqa", tmp_path / "chunks", tmp_path / "images")
    assert [q.id for q in records["n250821"].questions] == ["0", "1", "2", "10"]
    dump(tmp_path / "chunks" / "train_all_questions_11.json", {"0": gqa_question("Again?")})
    with pytest.raises(DataError, match="two entries have the id '0'"):
        read("gqa", tmp_path / "chunks", tmp_path / "images")


def test_vizwiz_has_no_ids_but_image_names(tmp_path):
    write_image(tmp_path / "VizWiz_val_00000000.jpg")
    write_image(tmp_path / "VizWiz_val_00000001.jpg")
    given = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
    entry = {
        "image": "VizWiz_val_00000000.jpg",
        "question": "Ok. There is another image I hope it is a better one.",
        "answers": given,
        "answer_type": "unanswerable",
        "answerable": 0,
    }
    secret = {"image": "VizWiz_val_00000001.jpg", "question": "What is it?", "answers": []}
    records, skipped = read("vizwiz", dump(tmp_path / "val.json", [entry, secret]), tmp_path)
    question = records["VizWiz_val_00000000"].questions[0]
    assert question.answers == ("unanswerable",) * 10
    assert question.metadata["answerable"] == 0
    assert skipped == [("VizWiz_val_00000001", "empty list of answers")]


@pytest.mark.parametrize("image", [{"Flickr30K_ID": "4705552913"}, {"Flikr30kID": "4705552913.jpg"}])
def test_snli_ve_in_both_spellings(tmp_path, image):
    write_image(tmp_path / "4705552913.jpg")

    def entry(pair, label):
        return image | {
            "gold_label": label,
            "sentence1": "Two women are hugging.",
            "sentence2": f"Statement {pair}.",
            "annotator_labels": [label],
            "captionID": "4705552913.jpg#2",
            "pairID": pair,
        }

    source = lines(tmp_path / "snli_ve_dev.jsonl", entry("a", "neutral"), entry("b", "-"), entry("c", "entailment"))
    records, skipped = read("snli_ve", source, tmp_path)
    record = records["4705552913"]
    assert record.captions == ("Two women are hugging.",)
    assert [(q.text, q.answers) for q in record.questions] == [
        ("Statement a.", ("neutral",)),
        ("Statement c.", ("entailment",)),
    ]
    assert skipped == [("b", "no majority label")]


def test_hateful_memes_without_labels_in_the_test_split(tmp_path):
    for name in ("42953", "42954"):
        write_image(tmp_path / "img" / f"{name}.png")
    text = "its their character not their color that matters"
    source = lines(
        tmp_path / "dev.jsonl",
        {"id": 42953, "img": "img/42953.png", "label": 0, "text": text},
        {"id": 42954, "img": "img/42954.png", "text": "no label"},
    )
    records, _ = read("hateful_memes", source, tmp_path)
    assert records["42953"].questions[0].answers == ("0",)
    assert records["42954"].questions[0].answers == ()


# Regions


def test_visual_genome_keeps_negative_boxes(tmp_path):
    write_image(tmp_path / "VG_100K_2" / "2407890.jpg")
    region = {"region_id": 1353, "x": -3, "y": 79, "width": 249, "height": 107, "image_id": 2407890}
    content = [{"id": 2407890, "regions": [region | {"phrase": "a cat sitting on a table."}]}]
    records, _ = read("visual_genome", dump(tmp_path / "region_descriptions.json", content), tmp_path)
    assert records["2407890"].captions == ("a cat sitting on a table.",)
    assert records["2407890"].metadata["regions"][0]["x"] == -3


def test_localized_narratives_shards_and_coco_names(tmp_path):
    write_image(tmp_path / "images" / "000000137576.jpg")

    def entry(annotator):
        return {
            "dataset_id": "mscoco_val2017",
            "image_id": "137576",
            "annotator_id": annotator,
            "caption": "In this image there are group of cows.",
            "timed_caption": [{"utterance": "In this", "start_time": 0.0, "end_time": 0.4}],
            "traces": [[{"x": 0.2086, "y": -0.0533, "t": 0.022}]],
            "voice_recording": "coco_val/coco_val_137576_93.ogg",
        }

    folder = tmp_path / "shards"
    folder.mkdir()
    lines(folder / "coco_val-00000-of-00002.jsonl", entry(93))
    lines(folder / "coco_val-00001-of-00002.jsonl", entry(94))
    records, _ = read("localized_narratives", folder, tmp_path / "images")
    assert set(records) == {"137576/93", "137576/94"}
    assert "traces" not in records["137576/93"].metadata
    records, _ = read("localized_narratives", folder, tmp_path / "images", traces=True)
    assert records["137576/93"].metadata["traces"][0][0]["y"] == -0.0533
    lines(folder / "coco_val-00001-of-00002.jsonl", entry(93), entry(94), entry(93))
    (folder / "._coco_val-00001-of-00002.jsonl").write_bytes(b"\0\5\26\7")
    records, _ = read("localized_narratives", folder, tmp_path / "images")
    assert list(records) == ["137576/93", "137576/93/2", "137576/94", "137576/93/3"]


# The web


@pytest.fixture
def downloads(tmp_path):
    """What img2dataset leaves: keys with gaps, a JSON and a text beside every image, a parquet beside the tar."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:

        def add(name, content):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        for i in (0, 2):
            key = f"{i:09d}"
            known = {"url": f"http://a.example/{i}.jpg", "caption": f"caption {i}", "key": key, "status": "success"}
            known |= {"error_message": None, "width": 32, "height": 24, "sha256": "00", "exif": "{}"}
            add(f"{key}.jpg", jpeg())
            add(f"{key}.txt", f"caption {i}".encode() if i == 0 else b"\xff\xfe")
            add(f"{key}.json", json.dumps(known).encode())
    table = pyarrow.table({"key": ["000000000", "000000001"], "similarity": [0.31, 0.2], "status": ["success"] * 2})
    pyarrow.parquet.write_table(table, folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")
    return folder


def test_img2dataset_joins_the_parquet_by_key(downloads):
    records, skipped = read("img2dataset", downloads, None)
    assert records["000000000"].captions == ("caption 0",)
    assert records["000000000"].metadata["similarity"] == 0.31
    assert "status" not in records["000000000"].metadata
    assert records["000000000"].image_bytes() == jpeg()
    assert skipped == [("000000002", "caption is not UTF-8")]


def test_a_tar_that_is_cut_short_is_an_error(downloads):
    tar = downloads / "00000.tar"
    whole = tar.read_bytes()
    with tarfile.open(tar) as archive:
        second = archive.getmembers()[3].offset
    for content in (whole[:700], whole[:second], whole[: second + 100], b"rubbish" * 1000):
        tar.write_bytes(content)
        with pytest.raises(DataError, match=r"00000\.tar: [^\n]*; fetch it again$"):
            [record.image_bytes() for record in readers.read("img2dataset", downloads)]


def test_cc3m_and_cc12m_differ_in_the_order_of_columns(tmp_path, downloads):
    (tmp_path / "cc3m.tsv").write_text("a caption\thttp://a.example/0.jpg\nanother\thttp://a.example/1.jpg\n")
    (tmp_path / "cc12m.tsv").write_text("http://a.example/0.jpg\ta caption\n")
    records, skipped = read("cc3m", tmp_path / "cc3m.tsv", downloads)
    assert records["1"].captions == ("a caption",)
    assert skipped == [("2", "image not downloaded")]
    assert read("cc12m", tmp_path / "cc12m.tsv", downloads)[0]["1"].captions == ("a caption",)
    with pytest.raises(DataError, match="cc3m and cc12m differ in order"):
        read("cc3m", tmp_path / "cc12m.tsv", downloads)


def test_a_header_as_img2dataset_wants_it_decides_which_column_is_which(tmp_path, downloads):
    rows = "a caption\thttp://a.example/0.jpg\n"
    turned = "http://a.example/0.jpg\ta caption\n"
    for name, content in [
        ("cc3m", "caption\turl\n" + rows),
        ("cc3m", "\ufeffURL\tCaption\r\n" + turned),
        ("cc12m", "url\tcaption\n" + turned),
        ("cc12m", "caption\turl\r" + rows.replace("\n", "\r")),
    ]:
        (tmp_path / "list.tsv").write_bytes(content.encode())
        records, skipped = read(name, tmp_path / "list.tsv", downloads)
        assert {key: record.captions for key, record in records.items()} == {"2": ("a caption",)}, (name, content)
        assert skipped == []


ODD_SPACE = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def test_only_line_feeds_and_carriage_returns_end_a_line(tmp_path, downloads):
    said = f"open{ODD_SPACE}nine to five"
    (tmp_path / "cc3m.tsv").write_bytes(f"{said}\thttp://a.example/0.jpg\r\nb\thttp://a.example/2.jpg\n".encode())
    records, _ = read("cc3m", tmp_path / "cc3m.tsv", downloads)
    assert [record.captions for record in records.values()] == [(said,), ("b",)]
    write_image(tmp_path / "own" / "a.png")
    (tmp_path / "own" / "a.txt").write_bytes(f"{said}\rtwo\r\nthree\n\nfour".encode())
    records, _ = read("folder", tmp_path / "own", None)
    assert records["a"].captions == (said, "two", "three", "four")
    entry = json.dumps({"id": 1, "img": "a.png", "label": 0, "text": said}, ensure_ascii=False)
    (tmp_path / "dev.jsonl").write_text(f"{entry}\n{entry}\n".replace('"id": 1', '"id": 2', 1))
    records, _ = read("hateful_memes", tmp_path / "dev.jsonl", tmp_path / "own")
    assert [record.questions[0].text for record in records.values()] == [said, said]


def test_captions_that_are_not_utf8_are_skipped(tmp_path, downloads):
    (tmp_path / "cc3m.tsv").write_bytes(b"caf\xe9\thttp://a.example/0.jpg\n")
    assert read("cc3m", tmp_path / "cc3m.tsv", downloads)[1] == [("1", "caption is not UTF-8")]


def test_laion_parquet(tmp_path, downloads):
    table = pyarrow.table(
        {
            "URL": ["http://a.example/2.jpg", "http://a.example/9.jpg"],
            "TEXT": ["two", "nine"],
            "WIDTH": [32, 1],
            "HEIGHT": [24, 1],
            "similarity": [0.3, 0.3],
            "seen": pyarrow.array([1_700_000_000_123_456_789] * 2, pyarrow.timestamp("ns")),
            "LICENSE": ["?", "?"],
            "NSFW": ["UNLIKELY", "NSFW"],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "part-00000.parquet")
    records, skipped = read("laion", tmp_path / "part-00000.parquet", downloads)
    assert records["1"].captions == ("two",)
    assert records["1"].metadata["nsfw"] == "UNLIKELY"
    assert records["1"].metadata["seen"] == "2023-11-14 22:13:20.123456789"
    assert skipped == [("2", "image not downloaded")]


@pytest.mark.parametrize(
    ("columns", "options", "says"),
    [
        (("url", "caption"), {}, None),
        (("Url", "Text"), {}, None),
        (("image_url", "alt"), {"url": "image_url", "caption": "ALT"}, None),
        (
            ("image_url", "alt"),
            {},
            r"no column url in any case \(there is: image_url, alt\); name it with --option url=",
        ),
        (("url", "alt"), {}, "no column text or caption in any case"),
        (("url", "URL", "text"), {"url": "Url"}, "url and URL differ in case alone; choose with --option url="),
    ],
)
def test_laion_lists_name_their_columns_as_they_like(tmp_path, downloads, columns, options, says):
    row = {name: ["http://a.example/2.jpg" if "url" in name.lower() else "two"] for name in columns}
    pyarrow.parquet.write_table(pyarrow.table(row), tmp_path / "part-00000.parquet")
    (tmp_path / "._part-00000.parquet").write_bytes(b"\0\5\26\7")
    if says is None:
        assert read("laion", tmp_path, downloads, **options)[0]["1"].captions == ("two",)
    else:
        with pytest.raises(DataError, match=says):
            read("laion", tmp_path, downloads, **options)


def test_parquet_files_hold_what_python_has_no_type_for(tmp_path, downloads):
    """None of it is a damaged file."""
    second, long = pyarrow.timestamp("ns"), pyarrow.duration("ns")
    fine = {
        "struct": (pyarrow.array([{"t": 1}], pyarrow.struct([("t", second)])), {"t": "1970-01-01 00:00:00.000000001"}),
        "list": (pyarrow.array([[1, None]], pyarrow.list_(second)), ["1970-01-01 00:00:00.000000001", None]),
        "map": (
            pyarrow.array([[("a", 1)]], pyarrow.map_("string", long)),
            [{"key": "a", "value": "0:00:00.000000001"}],
        ),
        "duration": (pyarrow.array([1_500_000_000], long), "0:00:01.500000"),
        "ages": (pyarrow.array([2**62], pyarrow.duration("s")), f"{2**62} s"),
        "zone": (pyarrow.array([1], pyarrow.timestamp("ns", "Mars/Base")), "1970-01-01 00:00:00.000000001Z"),
        "clock": (pyarrow.array([1], pyarrow.time64("ns")), "00:00:00.000000001"),
        "far": (pyarrow.array([10**7], pyarrow.int32()).cast(pyarrow.date32()), "29349-01-26"),
        "none": (pyarrow.array([None], pyarrow.struct([("t", second)])), None),
    }
    table = {"url": ["http://a.example/2.jpg"], "text": ["two"]} | {name: array for name, (array, _) in fine.items()}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "list.parquet")
    records, _ = read("laion", tmp_path / "list.parquet", downloads)
    assert records["1"].metadata == {"url": "http://a.example/2.jpg"} | {
        name: value for name, (_, value) in fine.items()
    }
    whole = (tmp_path / "list.parquet").read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for content in (whole[:-9], whole[:footer] + b"\xff" * 20 + whole[footer + 20 :]):
        (tmp_path / "list.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"list\.parquet: not a whole parquet file") as error:
            read("laion", tmp_path / "list.parquet", downloads)
        assert "\n" not in str(error.value)


def test_wit_takes_three_columns_as_captions(tmp_path, downloads):
    def row(**values):
        return "\t".join(values.get(name, "") for name in WIT_COLUMNS)

    texts = {"caption_reference_description": "A tower", "caption_alt_text_description": "tower, in Paris"}
    rows = [
        "\t".join(WIT_COLUMNS),
        row(language="en", image_url="http://a.example/0.jpg", **texts),
        row(language="de", image_url="http://a.example/0.jpg", caption_reference_description="Ein Turm"),
    ]
    with gzip.open(tmp_path / "wit_v1.train.all-00000-of-00010.tsv.gz", "wt") as file:
        file.write("\n".join(rows) + "\n")
    source = tmp_path / "wit_v1.train.all-00000-of-00010.tsv.gz"
    records, _ = read("wit", source, downloads, language="en")
    assert [record.captions for record in records.values()] == [("A tower", "tower, in Paris")]
    source.write_bytes(source.read_bytes()[:40])
    with pytest.raises(DataError, match="cannot be read to its end"):
        read("wit", source, downloads)


# Folders


def test_plain_folders(tmp_path):
    write_image(tmp_path / "a" / "cat.png")
    (tmp_path / "a" / "cat.txt").write_text("A cat\n\nA red cat\n")
    write_image(tmp_path / "dog.jpg")
    write_image(tmp_path / "bird.jpg")
    (tmp_path / "bird.txt").write_bytes(b"\xff")
    records, skipped = read("folder", tmp_path, None)
    assert records["a/cat"].captions == ("A cat", "A red cat")
    assert skipped == [("bird", "caption is not UTF-8"), ("dog", "image without an annotation")]


def test_hidden_files_are_counted_and_never_samples(tmp_path):
    names = ["._cat.png", "__MACOSX/cat.png", ".ipynb_checkpoints/cat-checkpoint.png", "a/.hidden/cat.png"]
    for name in ("cat.png", *names):
        write_image(tmp_path / ".data" / name)
        (tmp_path / ".data" / name).with_suffix(".txt").write_text("A cat")
    (tmp_path / ".data" / "._cat.txt").write_bytes(b"\xff")
    records, skipped = read("folder", tmp_path / ".data", None)  # that the folder itself is hidden does not matter
    assert set(records) == {"cat"}
    assert skipped == [(name, HIDDEN) for name in sorted(names)]
    # A twin is no second image of that name.
    source = dump(tmp_path / "c.json", {"images": [{"id": 1, "file_name": "cat.png"}], "annotations": []})
    assert read("coco", source, tmp_path / ".data" / "a")[1] == [("1", "image missing")]
    (tmp_path / ".data" / "cat.png").unlink()
    with pytest.raises(DataError, match=r"holds no images .*, only 4 hidden files"):
        read("folder", tmp_path / ".data", None)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "cat.png")
    (tmp_path / "cat.txt").write_text("A cat")
    os.mkfifo(tmp_path / "pipe.json")
    assert read("folder", tmp_path, None)[1] == [("cat", "image is not a regular file")]
    pipe = tmp_path / "pipe.json"
    for name, images in [("coco", tmp_path), ("hateful_memes", tmp_path), ("img2dataset", None), ("laion", pipe)]:
        with pytest.raises(DataError, match=r"pipe\.json: is not a regular file"):
            read(name, pipe, images)


def test_the_originals_own_folder(tmp_path):
    for name in ("images/0/x.jpg", "images/1/2.jpg"):
        write_image(tmp_path / name)
    dump(tmp_path / "image_data/0/0.json", {"image_path": "images/0/x.jpg", "captions": ["A"], "metadata": {"k": 1}})
    dump(tmp_path / "image_data/1/2.json", {"captions": ["B", "C"], "metadata": {}})
    dump(tmp_path / "image_data/1/3.json", {"captions": ["lost"], "metadata": {}})
    records, skipped = read("magma", tmp_path, None)
    assert records["0/0"].metadata == {"k": 1}
    assert records["1/2"].captions == ("B", "C")
    assert skipped == [("1/3", "image missing")]
    dump(tmp_path / "image_data/1/4.json", {"image_path": "../../etc/passwd", "captions": ["out"]})
    with pytest.raises(DataError, match="leads out of"):
        read("magma", tmp_path, None)


def test_data_sets_that_tfds_prepared(tmp_path, monkeypatch):
    class Drawings(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            texts = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
            features = {"image": tfds.features.Image(), "image/id": np.int64, "captions": texts}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"val": self._generate_examples()}

        def _generate_examples(self):
            for i in (7, 8):
                texts = [{"id": 1, "text": f"drawing {i}"}, {"id": 2, "text": "a drawing"}]
                yield i, {"image": jpeg(), "image/id": i, "captions": texts}

    builder = Drawings(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    records, _ = read("tfds", Path(builder.data_path), None, split="val")
    assert records["7"].captions == ("drawing 7", "a drawing")
    assert records["8"].image_bytes() == jpeg()
    (tmp_path / "evil.py").write_text("raise SystemExit('the code of the dataset runs')")
    monkeypatch.syspath_prepend(tmp_path)
    features = Path(builder.data_path) / "features.json"
    whole = features.read_text()
    feature = "tensorflow_datasets.core.features.image_feature.Image"
    assert feature in whole
    evil = json.dumps({"pythonClassName": "evil.Feature", "jsonFeature": {"json": "{}"}})
    for content in (
        whole.replace(feature, "evil.Feature"),
        json.dumps({"type": "evil.Feature", "content": {}}),
        json.dumps({"pythonClassName": feature, "jsonFeature": {"json": json.dumps({"a": {"type": "evil.Feature"}})}}),
        json.dumps({"type": feature, "proto_cls": "tensorflow_datasets.Feature", "content": evil}),
        json.dumps({"type": "tensorflow_datasets.scripts.cli.main.Feature", "content": {}}),
    ):
        features.write_text(content)
        with pytest.raises(DataError, match=r"features\.json: the feature type '.*' does not come with tensorflow_dat"):
            read("tfds", Path(builder.data_path), None, split="val")
    features.write_text(whole)
    assert set(read("tfds", Path(builder.data_path), None, split="val")[0]) == {"7", "8"}
    with pytest.raises(DataError, match="split 'train'"):
        read("tfds", Path(builder.data_path), None)
    with pytest.raises(DataError, match="not a dataset that TFDS prepared"):
        read("tfds", tmp_path / "nothing", None)


# Bad files


def test_damaged_annotation_files_are_named(tmp_path):
    whole = json.dumps(coco_content())
    (tmp_path / "short.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"short\.json: the file ends too early; fetch it again"):
        read("coco", tmp_path / "short.json", tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"images": ["caf\xe9"]}')
    with pytest.raises(DataError, match=r"latin\.json: byte 16 is not UTF-8"):
        read("coco", tmp_path / "latin.json", tmp_path)
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        read("coco", tmp_path / "none.json", tmp_path)
    with pytest.raises(DataError, match=r"no 'images'.*is this the right file"):
        read("coco", dump(tmp_path / "other.json", {"annotations": [], "questions": []}), tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read("coco", dump(tmp_path / "good.json", coco_content()), tmp_path / "nowhere")


def test_two_images_of_one_name_are_not_guessed_between(tmp_path):
    for folder in ("a", "b"):
        write_image(tmp_path / folder / "COCO_val2014_000000000001.jpg")
    with pytest.raises(DataError, match="several images are called"):
        read("coco", dump(tmp_path / "c.json", coco_content()), tmp_path)
