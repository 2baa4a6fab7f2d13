"""Questions and statements about images: VQAv2, OKVQA, GQA, VizWiz, SNLI-VE, Hateful Memes.

Questions and answers are joined by id, not by position, so that shuffled files give the same records.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from magma_jax.data.format.records import DataError, FileSlice, Question, Record, Skipped, count_samples
from magma_jax.data.readers.common import (
    ID,
    ImageFolder,
    Missing,
    checked,
    claim,
    field,
    files_in,
    metadata,
    read_json,
    read_json_lines,
    text,
)


def read_vqa(source: Path, images: Path, *, annotations: str = "") -> Iterator[Record | Skipped]:
    """VQAv2 and OKVQA: questions file and answers file, joined by ``question_id``; 1 and "1" are the same id.

    Image file names come from ``file_name`` in the ``images`` list of the questions file, if it has one (as in COCO's
    caption files), otherwise from the naming of COCO's releases.

    Args:
        source: questions file, ``v2_OpenEnded_mscoco_val2014_questions.json`` or
            ``OpenEnded_mscoco_val2014_questions.json``.
        images: folder with the images of COCO 2014 (for the test splits, 2015).
        annotations: answers file; default: the release's file name beside the questions, and none for test splits.
    """
    content = read_json(source, dict)
    answers_file = Path(annotations) if annotations else _answers_beside(source)
    answers: dict[str, Mapping[str, Any]] = {}
    if answers_file is not None:
        for entry in field(read_json(answers_file), "annotations", str(answers_file), list):
            key = str(field(entry, "question_id", f"{answers_file}: annotation", ID))
            if key in answers:
                raise DataError(f"{answers_file}: question {key} is answered twice; repair the file")
            answers[key] = entry
    subset = field(content, "data_subtype", str(source), str) if "data_subtype" in content else ""
    file_names = _file_names(content, source)
    grouped: dict[str, list[Question | Skipped]] = defaultdict(list)
    asked: set[str] = set()
    for entry in field(content, "questions", str(source), list):
        key = claim(field(entry, "question_id", f"{source}: question", ID), asked, f"{source}: questions")
        where = f"{source}: question {key}"
        question = _vqa_question(key, text(entry, "question", where), answers.get(key), answers_file)
        grouped[str(field(entry, "image_id", where, ID))].append(question)
    image_files = ImageFolder(images)
    for image, questions in grouped.items():
        number = image.zfill(12)
        listed = [file_names[image]] if image in file_names else []
        # test-dev2015 uses images of test2015.
        names = [f"COCO_{name}_{number}.jpg" for name in (subset.replace("-dev", ""), "val2014", "train2014")]
        yield from _record(image, image_files.find(*listed, *names, f"{number}.jpg"), questions)
    for key in answers:
        if key not in asked:
            yield Skipped(key, "answers to a question that the file of questions lacks")


def read_gqa(source: Path, images: Path, *, balanced: bool = True) -> Iterator[Record | Skipped]:
    """GQA: ``testdev_balanced_questions.json``, or a folder of chunks such as ``train_all_questions/``.

    Args:
        source: a file, or a folder whose ``.json`` files are read in numeric order.
        images: folder with ``IMAGE_ID.jpg``.
        balanced: keep only questions with ``isBalanced``.
    """
    grouped: dict[str, list[Question | Skipped]] = defaultdict(list)
    kept = ("isBalanced", "fullAnswer", "types", "groups", "entailed", "equivalent", "semanticStr")
    for key, entry, where in gqa_questions(source):
        asked = text(entry, "question", where)
        if balanced and not entry.get("isBalanced", True):
            continue
        answers = (field(entry, "answer", where, str),) if "answer" in entry else ()
        question = Question(key, asked, answers, metadata(entry, kept))
        grouped[str(field(entry, "imageId", where, ID))].append(question)
    image_files = ImageFolder(images)
    for image, questions in grouped.items():
        yield from _record(image, image_files.find(f"{image}.jpg"), questions)


def gqa_questions(source: Path) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Yields id, entry and location of every question of a GQA file or a folder of chunks.

    Raises:
        DataError: another format, or a duplicate id.
    """
    files = sorted(files_in(source, "*.json"), key=_natural) if source.is_dir() else [source]
    if not files:
        raise DataError(f"{source}: holds no .json files")
    seen: set[str] = set()
    for file in files:
        for key, entry in read_json(file, dict).items():
            claim(key, seen, f"{file}: questions")
            where = f"{file}: question {key}"
            yield key, checked(entry, dict, where), where


def read_vizwiz(source: Path, images: Path) -> Iterator[Record | Skipped]:
    """VizWiz ``val.json``: a list without ids; the image's name is the id of the image and of the question."""
    image_files = ImageFolder(images)
    for entry in read_json(source, list):
        name = field(entry, "image", f"{source}: question", str)
        key = Path(name).stem
        answer = entry if "answers" in entry else None
        question = _vqa_question(key, text(entry, "question", f"{source}: question {key}"), answer, source)
        yield from _record(key, image_files.find(name), [question])


def read_snli_ve(source: Path, images: Path) -> Iterator[Record | Skipped]:
    """SNLI-VE, JSON lines: a Flickr30k image, a statement, and entailment, neutral or contradiction.

    The image's id is ``Flickr30K_ID`` in files of the generator and ``Flikr30kID`` (with ``.jpg``) in released files;
    both are supported. Statements without a majority label (``-``) are skipped.
    """
    grouped: dict[str, list[Question | Skipped]] = defaultdict(list)
    captions: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for number, entry in read_json_lines(source):
        where = f"{source}: line {number}"
        name = field(entry, "Flickr30K_ID" if "Flickr30K_ID" in entry else "Flikr30kID", where, ID)
        image = str(name).removesuffix(".jpg")
        key = str(field(entry, "pairID", where, ID)) if "pairID" in entry else str(number)
        claim(key, seen, where)
        label = field(entry, "gold_label", where, str)
        if label == "-":
            grouped[image].append(Skipped(key, "no majority label"))
            continue
        kept = metadata(entry, ("captionID", "annotator_labels"))
        grouped[image].append(Question(key, text(entry, "sentence2", where), (label,), kept))
        premise = text(entry, "sentence1", where) if "sentence1" in entry else ""
        if premise and premise not in captions[image]:
            captions[image].append(premise)
    image_files = ImageFolder(images)
    for image, questions in grouped.items():
        yield from _record(image, image_files.find(f"{image}.jpg"), questions, tuple(captions[image]))


def read_hateful_memes(source: Path, images: Path) -> Iterator[Record | Skipped]:
    """Hateful Memes, JSON lines: an image, its text, and label 0 or 1 (none in the test split)."""
    image_files = ImageFolder(images)
    for number, entry in read_json_lines(source):
        where = f"{source}: line {number}"
        key, name = str(field(entry, "id", where, ID)), field(entry, "img", where, str)
        answers = (str(field(entry, "label", where, ID)),) if "label" in entry else ()
        yield from _record(key, image_files.find(name), [Question(key, text(entry, "text", where), answers)])


def _vqa_question(key: str, asked: str, answer: Mapping[str, Any] | None, file: Path | None) -> Question | Skipped:
    if answer is None:
        return Skipped(key, "question without answers") if file is not None else Question(key, asked)
    where = f"{file}: question {key}"
    entries = field(answer, "answers", where, list)
    if not entries:
        return Skipped(key, "empty list of answers")
    answers = tuple(field(entry, "answer", where, str) for entry in entries)
    kept = metadata(answer, ("question_type", "answer_type", "multiple_choice_answer", "answerable"))
    for name in ("raw_answer", "answer_confidence"):
        if all(name in entry for entry in entries):
            kept[f"{name}s"] = [field(entry, name, where, str) for entry in entries]
    return Question(key, asked, answers, kept)


def _record(
    key: str, image: FileSlice | Missing, questions: list[Question | Skipped], captions: tuple[str, ...] = ()
) -> Iterator[Record | Skipped]:
    kept = tuple(question for question in questions if isinstance(question, Question))
    yield from (question for question in questions if isinstance(question, Skipped))
    if not kept:
        return
    if isinstance(image, Missing):
        yield image.skipped(key, count_samples(len(captions), len(kept)))
    else:
        yield Record(key, image, captions, kept)


def _file_names(content: Mapping[str, Any], source: Path) -> dict[str, str]:
    """File names of the listed images by id; images without one are named as in the release."""
    listed: set[str] = set()
    names = {}
    for image in checked(content.get("images", []), list, f"{source}: 'images'"):
        if isinstance(image, Mapping) and "file_name" in image:
            key = claim(field(image, "id", f"{source}: image", ID), listed, f"{source}: images")
            names[key] = field(image, "file_name", f"{source}: image {key}", str)
    return names


def _answers_beside(source: Path) -> Path | None:
    name = re.sub(r"OpenEnded_(.*)_questions\.json$", r"\1_annotations.json", source.name)
    if name == source.name:
        raise DataError(f"{source}: cannot tell the file of answers from this name; give --option annotations=FILE")
    if (source.parent / name).is_file():
        return source.parent / name
    if "test" in source.name:
        return None
    raise DataError(f"{source.parent / name}: no such file; give --option annotations=FILE")


def _natural(path: Path) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", path.stem)], path.name
