"""Every reader on a small fixture in the format of the release."""

import gzip
import io
import json
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
from magma_jax.data.format.records import DataError, Record, Skipped
from magma_jax.data.readers.web import WIT_COLUMNS


def picture(path, colour=(200, 30, 30)):
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
        picture(tmp_path / "images" / "val2014" / f"COCO_val2014_{i:012d}.jpg")
    source = dump(tmp_path / "captions_val2014.json", coco_content())
    records, skipped = read("coco", source, tmp_path / "images")
    assert records["2"].captions == ("A bicycle replica with a clock as the front wheel.", "A bicycle")
    assert records["1"].captions == ("A red square.",)
    assert records["1"].metadata["width"] == 640
    assert records["1"].image_bytes().startswith(b"\xff\xd8")
    assert skipped == [("3", "picture without an annotation")]


def test_shuffled_annotations_give_the_same_pictures_the_same_captions(tmp_path):
    for i in (1, 2):
        picture(tmp_path / f"COCO_val2014_{i:012d}.jpg")
    content = coco_content()
    first, _ = read("coco", dump(tmp_path / "a.json", content), tmp_path)
    random.Random(0).shuffle(content["images"])
    content["annotations"].reverse()
    second, _ = read("coco", dump(tmp_path / "b.json", content), tmp_path)
    assert {k: sorted(r.captions) for k, r in first.items()} == {k: sorted(r.captions) for k, r in second.items()}


def test_missing_pictures_and_foreign_annotations_are_told(tmp_path):
    content = coco_content()
    content["annotations"].append({"image_id": 99, "id": 40, "caption": "Nothing."})
    picture(tmp_path / "COCO_val2014_000000000001.jpg")
    _, skipped = read("coco", dump(tmp_path / "c.json", content), tmp_path)
    assert ("2", "picture missing") in skipped
    assert ("99", "annotation of a picture that the file does not list") in skipped


def test_karpathy_train_includes_restval(tmp_path):
    def entry(split, folder, cocoid):
        name = f"COCO_{folder}_{cocoid:012d}.jpg"
        picture(tmp_path / folder / name)
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
    with pytest.raises(DataError, match="no picture of split 'dev'"):
        read("coco_karpathy", source, tmp_path, split="dev")


def test_nocaps_keeps_the_domain(tmp_path):
    picture(tmp_path / "0013ea2087020901.jpg")
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
        picture(folder / "val2014" / f"COCO_val2014_{i:012d}.jpg")
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
    picture(tmp_path / "images" / "n250821.jpg")
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


def test_vizwiz_has_no_ids_but_picture_names(tmp_path):
    picture(tmp_path / "VizWiz_val_00000000.jpg")
    picture(tmp_path / "VizWiz_val_00000001.jpg")
    given = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
    entry = {
        "image": "VizWiz_val_00000000.jpg",
        "question": "Ok. There is another picture I hope it is a better one.",
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
    picture(tmp_path / "4705552913.jpg")

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
        picture(tmp_path / "img" / f"{name}.png")
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
    picture(tmp_path / "VG_100K_2" / "2407890.jpg")
    region = {"region_id": 1353, "x": -3, "y": 79, "width": 249, "height": 107, "image_id": 2407890}
    content = [{"id": 2407890, "regions": [region | {"phrase": "a cat sitting on a table."}]}]
    records, _ = read("visual_genome", dump(tmp_path / "region_descriptions.json", content), tmp_path)
    assert records["2407890"].captions == ("a cat sitting on a table.",)
    assert records["2407890"].metadata["regions"][0]["x"] == -3


def test_localized_narratives_shards_and_coco_names(tmp_path):
    picture(tmp_path / "images" / "000000137576.jpg")

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


# The web


@pytest.fixture
def downloads(tmp_path):
    """What img2dataset leaves: keys with gaps, a JSON and a text beside every picture, a parquet beside the tar."""
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
    assert skipped == [("2", "picture not downloaded")]
    assert read("cc12m", tmp_path / "cc12m.tsv", downloads)[0]["1"].captions == ("a caption",)
    with pytest.raises(DataError, match="cc3m and cc12m differ in order"):
        read("cc3m", tmp_path / "cc12m.tsv", downloads)


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
    assert skipped == [("2", "picture not downloaded")]


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
    picture(tmp_path / "a" / "cat.png")
    (tmp_path / "a" / "cat.txt").write_text("A cat\n\nA red cat\n")
    picture(tmp_path / "dog.jpg")
    picture(tmp_path / "bird.jpg")
    (tmp_path / "bird.txt").write_bytes(b"\xff")
    records, skipped = read("folder", tmp_path, None)
    assert records["a/cat"].captions == ("A cat", "A red cat")
    assert skipped == [("bird", "caption is not UTF-8"), ("dog", "picture without an annotation")]


def test_the_originals_own_folder(tmp_path):
    for name in ("images/0/x.jpg", "images/1/2.jpg"):
        picture(tmp_path / name)
    dump(tmp_path / "image_data/0/0.json", {"image_path": "images/0/x.jpg", "captions": ["A"], "metadata": {"k": 1}})
    dump(tmp_path / "image_data/1/2.json", {"captions": ["B", "C"], "metadata": {}})
    dump(tmp_path / "image_data/1/3.json", {"captions": ["lost"], "metadata": {}})
    records, skipped = read("magma", tmp_path, None)
    assert records["0/0"].metadata == {"k": 1}
    assert records["1/2"].captions == ("B", "C")
    assert skipped == [("1/3", "picture missing")]
    dump(tmp_path / "image_data/1/4.json", {"image_path": "../../etc/passwd", "captions": ["out"]})
    with pytest.raises(DataError, match="leads out of"):
        read("magma", tmp_path, None)


def test_data_sets_that_tfds_prepared(tmp_path):
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
    with pytest.raises(DataError, match="split 'train'"):
        read("tfds", Path(builder.data_path), None)
    with pytest.raises(DataError, match="not a data set that TFDS prepared"):
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


def test_two_pictures_of_one_name_are_not_guessed_between(tmp_path):
    for folder in ("a", "b"):
        picture(tmp_path / folder / "COCO_val2014_000000000001.jpg")
    with pytest.raises(DataError, match="several pictures are called"):
        read("coco", dump(tmp_path / "c.json", coco_content()), tmp_path)
