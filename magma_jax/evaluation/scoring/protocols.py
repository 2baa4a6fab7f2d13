"""Protocols for prediction files in the official formats: their file formats and metrics.

A protocol's name stands for every choice that affects the score. ``evaluation.metrics.by_protocol`` has the metrics;
this module reads the files. References and predictions are joined by id, and a missing, unknown or duplicate prediction
is an error, because a score over part of a set looks like one over the whole.
"""

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import snowballstemmer

from magma_jax.data.format.records import DataError
from magma_jax.data.readers.common import ID, checked, field, read_json, read_json_lines
from magma_jax.evaluation.metrics.by_protocol import METRICS, Metric
from magma_jax.evaluation.metrics.gqa import read_questions


@dataclasses.dataclass(frozen=True)
class Reference:
    """Alternatives that a prediction is scored against, and its groups by kind."""

    answers: tuple[str, ...]
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)


# References by id; None for entries that are not scored.
References: TypeAlias = dict[str, Reference | None]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How files of a benchmark are scored.

    Attributes:
        metric: name in ``METRICS``.
        references: reader of the official annotation file.
        keys: field names of the id in a prediction file.
        values: field names of the predicted text.
        numbers: whether a prediction may also be an integer, such as a class.
        transform: applied to predictions before scoring.
        per_group: whether groups are scored as separate sets, as NoCaps does with its domains, or as means of the
            whole set's scores.
    """

    metric: str
    references: Callable[[Path], References]
    keys: tuple[str, ...]
    values: tuple[str, ...]
    numbers: bool = False
    transform: Callable[[str], str] = lambda text: text
    per_group: bool = False

    @property
    def judge(self) -> Metric:
        """The metric function."""
        return METRICS[self.metric]


def read_predictions(path: Path, protocol: Protocol) -> dict[str, str]:
    """Reads ``[{id: ..., text: ...}, ...]``, or the same as JSON lines; id to text.

    Raises:
        DataError: another format, or a duplicate id.
    """
    lines = path.suffix == ".jsonl"
    entries = read_json_lines(path) if lines else enumerate(read_json(path, list), start=1)
    kind = ID if protocol.numbers else str
    predictions: dict[str, str] = {}
    for number, entry in entries:
        where = f"{path}: {'line' if lines else 'entry'} {number}"
        key = str(_one_of(entry, protocol.keys, where, ID))
        if key in predictions:
            raise DataError(f"{path}: {key} is predicted twice")
        predictions[key] = str(_one_of(entry, protocol.values, where, kind))
    return predictions


def join(references: References, predictions: Mapping[str, str], where: str) -> tuple[list[str], list[Reference]]:
    """Predictions and references in the order of the references, without those that are not scored.

    Raises:
        DataError: the ids differ; entries that are not scored need no prediction.
    """
    scored = {key: reference for key, reference in references.items() if reference is not None}
    missing = [key for key in scored if key not in predictions]
    foreign = [key for key in predictions if key not in references]
    for keys, what in ((missing, "without a prediction"), (foreign, "predicted that the references do not have")):
        if keys:
            raise DataError(f"{where}: {len(keys)} ids {what}, such as {', '.join(keys[:3])}")
    return [predictions[key] for key in scored], list(scored.values())


def stem(text: str) -> str:
    """The Porter stem of every word, which OK-VQA's authors used to merge forms of an answer."""
    return " ".join(_stemmer().stemWords(text.lower().split()))


@functools.cache
def _stemmer() -> Any:
    return snowballstemmer.stemmer("porter")


def _vqa(name: str, transform: Callable[[str], str] = str) -> Callable[[Path], References]:
    def read(path: Path) -> References:
        def read_one(entry: Any, where: str) -> tuple[str, Reference]:
            key = str(field(entry, "question_id", where, ID))
            answers = tuple(map(transform, _answers(entry, name, f"{path}: question {key}")))
            return key, Reference(answers, _groups(entry, ("answer_type", "question_type")))

        return _collect(path, field(read_json(path), "annotations", str(path), list), read_one)

    return read


def _vizwiz(path: Path) -> References:
    def read_one(entry: Any, where: str) -> tuple[str, Reference]:
        key = field(entry, "image", where, str)
        answers = tuple(_answers(entry, "answer", f"{path}: {key}"))
        return key, Reference(answers, _groups(entry, ("answer_type", "answerable")))

    return _collect(path, read_json(path, list), read_one)


def _gqa(path: Path) -> References:
    references: References = {}
    for key, question in read_questions(path).items():
        groups = gqa_groups(question.get("types") or {})
        references[key] = Reference((question["answer"],), groups) if question.get("isBalanced", True) else None
    return references


def gqa_groups(types: Mapping[str, str]) -> dict[str, str]:
    """The question types of GQA, as groups."""
    groups = _groups(types, ("structural", "semantic"))
    if "structural" in groups:
        # The two columns of the official table: yes, no and choices, against everything else.
        groups["form"] = "open" if groups["structural"] == "query" else "binary"
    return groups


def _captions(path: Path, *, domains: bool = False) -> References:
    content = read_json(path)
    captions: dict[str, list[str]] = defaultdict(list)
    for number, entry in enumerate(field(content, "annotations", str(path), list), start=1):
        where = f"{path}: annotation {number}"
        captions[str(field(entry, "image_id", where, ID))].append(field(entry, "caption", where, str))
    if not domains:
        return {key: Reference(tuple(texts)) for key, texts in captions.items()}
    images = field(content, "images", str(path), list)
    domain = {str(field(image, "id", f"{path}: images", ID)): _groups(image, ("domain",)) for image in images}
    lacking = [key for key in captions if not domain.get(key)]
    if lacking:
        raise DataError(f"{path}: {len(lacking)} images have no domain, such as {lacking[0]}; take the file that has")
    return {key: Reference(tuple(texts), domain[key]) for key, texts in captions.items()}


def _labels(path: Path) -> References:
    def read_one(entry: Any, where: str) -> tuple[str, Reference | None]:
        key, label = (str(_one_of(entry, names, where, ID)) for names in (("pairID", "id"), ("gold_label", "label")))
        # SNLI-VE: "-" means that the annotators have no majority. Such statements are customarily excluded.
        return key, None if label == "-" else Reference((label,), {"label": label})

    return _collect(path, (entry for _, entry in read_json_lines(path)), read_one)


def _collect(
    path: Path, entries: Iterable[Any], read_one: Callable[[Any, str], tuple[str, Reference | None]]
) -> References:
    references: References = {}
    for number, entry in enumerate(entries, start=1):
        key, reference = read_one(entry, f"{path}: entry {number}")
        if key in references:
            raise DataError(f"{path}: {key} is annotated twice")
        if reference is not None and not reference.answers:
            raise DataError(f"{path}: {key} has no answers")
        references[key] = reference
    return references


def _answers(entry: Any, name: str, where: str) -> list[str]:
    return [field(answer, name, where, str) for answer in field(entry, "answers", where, list)]


def _groups(entry: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    return {name: str(entry[name]) for name in names if entry.get(name) not in (None, "")}


def _one_of(entry: Any, names: Sequence[str], where: str, kind: type | tuple[type, ...]) -> Any:
    """Value of the first of these fields that an entry has."""
    entry = checked(entry, dict, where)
    return field(entry, next((name for name in names if name in entry), names[0]), where, kind)


_QUESTION: dict[str, Any] = {"keys": ("question_id",), "values": ("answer",)}
_VIZWIZ: dict[str, Any] = {"references": _vizwiz, "keys": ("image",), "values": ("answer",)}
_GQA: dict[str, Any] = {"references": _gqa, "keys": ("questionId", "question_id"), "values": ("prediction", "answer")}
_CAPTION: dict[str, Any] = {"keys": ("image_id",), "values": ("caption",)}
_nocaps = functools.partial(_captions, domains=True)

PROTOCOLS: MappingProxyType[str, Protocol] = MappingProxyType(
    {
        "vqa_official": Protocol("vqa_official", _vqa("answer"), **_QUESTION),
        "vqa_always_normalised": Protocol("vqa_always_normalised", _vqa("answer"), **_QUESTION),
        "vqa_before_2021": Protocol("vqa_before_2021", _vqa("answer"), **_QUESTION),
        "okvqa_answer": Protocol("vqa_official", _vqa("answer"), **_QUESTION),
        "okvqa_raw_answer": Protocol("vqa_official", _vqa("raw_answer"), **_QUESTION),
        "okvqa_stemmed": Protocol("vqa_official", _vqa("raw_answer", stem), **_QUESTION, transform=stem),
        "vizwiz_by_index": Protocol("vizwiz_by_index", **_VIZWIZ),
        "vizwiz_by_value": Protocol("vizwiz_by_value", **_VIZWIZ),
        "gqa_exact": Protocol("exact_match", **_GQA),
        "gqa_relaxed": Protocol("exact_match_relaxed", **_GQA),
        "coco": Protocol("coco", _captions, **_CAPTION),
        "coco_nlgeval": Protocol("nlgeval", _captions, **_CAPTION),
        "coco_meteor": Protocol("meteor", _captions, **_CAPTION),
        "coco_spice": Protocol("spice", _captions, **_CAPTION),
        "nocaps": Protocol("coco", _nocaps, **_CAPTION, per_group=True),
        "nocaps_nlgeval": Protocol("nlgeval", _nocaps, **_CAPTION, per_group=True),
        "accuracy": Protocol("exact_match", _labels, ("pairID", "id"), ("label", "gold_label", "answer"), numbers=True),
    }
)


def commonest_answer(references: Sequence[Reference]) -> str:
    """The answer that most references share; ties are broken alphabetically."""
    counts = Counter(answer for reference in references for answer in set(reference.answers))
    return min(counts, key=lambda answer: (-counts[answer], answer))
