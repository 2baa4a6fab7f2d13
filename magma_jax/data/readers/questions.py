"""Questions and statements about pictures: VQAv2, OKVQA, GQA, VizWiz, SNLI-VE, Hateful Memes.

Questions and answers are joined by id, never by position: shuffled files give the same records.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from magma_jax.data.readers.common import PictureFolder, field, metadata, read_json, read_json_lines
from magma_jax.data.records import DataError, FileSlice, Question, Record, Skipped


def read_vqa(source: Path, images: Path, *, annotations: str = "") -> Iterator[Record | Skipped]:
    """VQAv2 and OKVQA: a file of questions and one of answers.

    Args:
        source: the questions, ``v2_OpenEnded_mscoco_val2014_questions.json`` or
            ``OpenEnded_mscoco_val2014_questions.json``.
        images: folder with the pictures of COCO 2014 (for the test splits, 2015).
        annotations: the answers; by default the file beside the questions that is named as in the release, and for
            test splits none.
    """
    content = read_json(source)
    answers_file = Path(annotations) if annotations else _answers_beside(source)
    answers: dict[int, Mapping[str, Any]] = {}
    if answers_file is not None:
        for entry in field(read_json(answers_file), "annotations", str(answers_file)):
            key = field(entry, "question_id", str(answers_file))
            if key in answers:
                raise DataError(f"{answers_file}: question {key} is answered twice; repair the file")
            answers[key] = entry
    subset = content.get("data_subtype", "") if isinstance(content, Mapping) else ""
    grouped: dict[int, list[Question | Skipped]] = defaultdict(list)
    for entry in field(content, "questions", str(source)):
        key = field(entry, "question_id", str(source))
        answer = answers.pop(key, None)
        text = field(entry, "question", str(source)).strip()
        grouped[field(entry, "image_id", str(source))].append(_vqa_question(str(key), text, answer, answers_file))
    pictures = PictureFolder(images)
    for image, questions in grouped.items():
        # test-dev2015 asks about pictures of test2015.
        names = [f"COCO_{name}_{image:012d}.jpg" for name in (subset.replace("-dev", ""), "val2014", "train2014")]
        yield from _record(str(image), pictures.find(*names, f"{image:012d}.jpg"), questions)
    for key in answers:
        yield Skipped(str(key), "answers to a question that the file of questions lacks")


def read_gqa(source: Path, images: Path, *, balanced: bool = True) -> Iterator[Record | Skipped]:
    """GQA: ``testdev_balanced_questions.json``, or a folder of chunks such as ``train_all_questions/``.

    Args:
        source: a file, or a folder whose ``.json`` files are read in the order of their numbers.
        images: folder with ``IMAGE_ID.jpg``.
        balanced: keep only questions with ``isBalanced``.
    """
    files = sorted(source.glob("*.json"), key=_natural) if source.is_dir() else [source]
    if not files:
        raise DataError(f"{source}: holds no .json files")
    grouped: dict[str, list[Question | Skipped]] = defaultdict(list)
    seen: set[str] = set()
    kept = ("isBalanced", "fullAnswer", "types", "groups", "entailed", "equivalent", "semanticStr")
    for file in files:
        content = read_json(file)
        if not isinstance(content, Mapping):
            raise DataError(f"{file}: expected an object of questions by id, found a {type(content).__name__}")
        for key, entry in content.items():
            if key in seen:
                raise DataError(f"{file}: question {key} is there twice")
            seen.add(key)
            if balanced and not entry.get("isBalanced", True):
                continue
            answers = (entry["answer"],) if "answer" in entry else ()
            question = Question(key, field(entry, "question", str(file)).strip(), answers, metadata(entry, kept))
            grouped[field(entry, "imageId", str(file))].append(question)
    pictures = PictureFolder(images)
    for image, questions in grouped.items():
        yield from _record(image, pictures.find(f"{image}.jpg"), questions)


def read_vizwiz(source: Path, images: Path) -> Iterator[Record | Skipped]:
    """VizWiz ``val.json``: a list without ids; the picture's name is the id of both."""
    pictures = PictureFolder(images)
    content = read_json(source)
    if not isinstance(content, list):
        raise DataError(f"{source}: expected a list of questions, found a {type(content).__name__}")
    for entry in content:
        name = field(entry, "image", str(source))
        key = Path(name).stem
        answer = entry if "answers" in entry else None
        question = _vqa_question(key, field(entry, "question", str(source)).strip(), answer, source)
        yield from _record(key, pictures.find(name), [question])


def read_snli_ve(source: Path, images: Path) -> Iterator[Record | Skipped]:
    """SNLI-VE, JSON lines: a Flickr30k picture, a statement, and entailment, neutral or contradiction.

    The picture's id is ``Flickr30K_ID`` in files of the generator and ``Flikr30kID`` (with ``.jpg``) in the released
    ones; both are read. Statements without a majority label (``-``) are skipped.
    """
    grouped: dict[str, list[Question | Skipped]] = defaultdict(list)
    captions: dict[str, list[str]] = defaultdict(list)
    for number, entry in read_json_lines(source):
        image = entry.get("Flickr30K_ID") or entry.get("Flikr30kID")
        if not image:
            raise DataError(f"{source}: line {number} has neither Flickr30K_ID nor Flikr30kID")
        image = str(image).removesuffix(".jpg")
        key, label = str(entry.get("pairID", number)), field(entry, "gold_label", f"{source}: line {number}")
        if label == "-":
            grouped[image].append(Skipped(key, "no majority label"))
            continue
        text = field(entry, "sentence2", f"{source}: line {number}").strip()
        kept = metadata(entry, ("captionID", "annotator_labels"))
        grouped[image].append(Question(key, text, (label,), kept))
        if (premise := entry.get("sentence1", "").strip()) and premise not in captions[image]:
            captions[image].append(premise)
    pictures = PictureFolder(images)
    for image, questions in grouped.items():
        yield from _record(image, pictures.find(f"{image}.jpg"), questions, tuple(captions[image]))


def read_hateful_memes(source: Path, images: Path) -> Iterator[Record | Skipped]:
    """Hateful Memes, JSON lines: a picture, the text on it, and label 0 or 1 (none in the test split)."""
    pictures = PictureFolder(images)
    for number, entry in read_json_lines(source):
        where = f"{source}: line {number}"
        key, name = str(field(entry, "id", where)), field(entry, "img", where)
        answers = (str(entry["label"]),) if "label" in entry else ()
        yield from _record(key, pictures.find(name), [Question(key, field(entry, "text", where).strip(), answers)])


def _vqa_question(key: str, text: str, answer: Mapping[str, Any] | None, where: Path | None) -> Question | Skipped:
    if answer is None:
        return Skipped(key, "question without answers") if where is not None else Question(key, text)
    entries = field(answer, "answers", f"{where}: question {key}")
    if not entries:
        return Skipped(key, "empty list of answers")
    kept = metadata(answer, ("question_type", "answer_type", "multiple_choice_answer", "answerable"))
    for name in ("raw_answer", "answer_confidence"):
        if all(name in entry for entry in entries):
            kept[f"{name}s"] = [entry[name] for entry in entries]
    return Question(key, text, tuple(field(entry, "answer", f"{where}: question {key}") for entry in entries), kept)


def _record(
    key: str, picture: FileSlice | None, questions: list[Question | Skipped], captions: tuple[str, ...] = ()
) -> Iterator[Record | Skipped]:
    kept = tuple(question for question in questions if isinstance(question, Question))
    yield from (question for question in questions if isinstance(question, Skipped))
    if picture is None:
        yield Skipped(key, "picture missing")
    elif kept:
        yield Record(key, picture, captions, kept)


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
