"""Protocols for prediction files in the official formats: which file holds what, and which metric judges it.

A protocol's name stands for every choice that changes the number. ``evaluation.metrics`` has the arithmetic; here are
the files: references and predictions are joined by id, and a prediction that is missing, foreign or there twice is an
error, for a score over part of a set looks like one over the whole.
"""

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import snowballstemmer

from magma_jax.data.readers.common import field, read_json, read_json_lines
from magma_jax.data.records import DataError
from magma_jax.evaluation.metrics import METRICS, Metric


@dataclasses.dataclass(frozen=True)
class Reference:
    """What one prediction is judged against: alternatives, and the groups it is also counted in, by their kind."""

    answers: tuple[str, ...]
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How files of a benchmark are scored.

    Attributes:
        metric: name in ``METRICS``.
        references: reads the official file of annotations, id to reference.
        keys: names that the id may have in an entry of a prediction file.
        values: names that the predicted text may have.
        transform: applied to predictions before they are judged.
        per_group: groups are scored as sets of their own, as NoCaps does with its domains; else means over the whole.
    """

    metric: str
    references: Callable[[Path], dict[str, Reference]]
    keys: tuple[str, ...]
    values: tuple[str, ...]
    transform: Callable[[str], str] = lambda text: text
    per_group: bool = False

    @property
    def judge(self) -> Metric:
        """The metric itself."""
        return METRICS[self.metric]


def read_predictions(path: Path, protocol: Protocol) -> dict[str, str]:
    """Reads ``[{id: ..., text: ...}, ...]``, or the same as JSON lines; id to text.

    Raises:
        DataError: another format, or an id that is there twice.
    """
    entries = [entry for _, entry in read_json_lines(path)] if path.suffix == ".jsonl" else read_json(path)
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of predictions, found a {type(entries).__name__}")
    predictions: dict[str, str] = {}
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}"
        key, value = _one_of(entry, protocol.keys, where), _one_of(entry, protocol.values, where)
        if not isinstance(value, str):
            raise DataError(f"{where}: the prediction is a {type(value).__name__}, expected text")
        if str(key) in predictions:
            raise DataError(f"{path}: {key} is predicted twice")
        predictions[str(key)] = value
    return predictions


def join(
    references: Mapping[str, Reference], predictions: Mapping[str, str], where: str
) -> tuple[list[str], list[Reference]]:
    """Predictions and references in the order of the references.

    Raises:
        DataError: the ids are not the same on both sides.
    """
    missing = [key for key in references if key not in predictions]
    foreign = [key for key in predictions if key not in references]
    for keys, what in ((missing, "without a prediction"), (foreign, "predicted that the references do not have")):
        if keys:
            raise DataError(f"{where}: {len(keys)} ids {what}, such as {', '.join(keys[:3])}")
    return [predictions[key] for key in references], list(references.values())


def stem(text: str) -> str:
    """Every word's Porter stem, as the authors of OK-VQA merged the forms of an answer."""
    return " ".join(_stemmer().stemWords(text.lower().split()))


@functools.cache
def _stemmer() -> Any:
    return snowballstemmer.stemmer("porter")


def _vqa(answer_of: Callable[[Mapping[str, Any], str], str]) -> Callable[[Path], dict[str, Reference]]:
    def read(path: Path) -> dict[str, Reference]:
        references: dict[str, Reference] = {}
        for entry in field(read_json(path), "annotations", str(path)):
            key = str(field(entry, "question_id", str(path)))
            where = f"{path}: question {key}"
            answers = tuple(answer_of(answer, where) for answer in field(entry, "answers", where))
            groups = {name: entry[name] for name in ("answer_type", "question_type") if name in entry}
            _add(references, key, Reference(answers, groups), path)
        return references

    return read


def _vizwiz(path: Path) -> dict[str, Reference]:
    references: dict[str, Reference] = {}
    for entry in read_json(path):
        key = field(entry, "image", str(path))
        answers = tuple(answer["answer"] for answer in field(entry, "answers", f"{path}: {key}"))
        groups = {name: str(entry[name]) for name in ("answer_type", "answerable") if name in entry}
        _add(references, key, Reference(answers, groups), path)
    return references


def _gqa(path: Path) -> dict[str, Reference]:
    references: dict[str, Reference] = {}
    for key, entry in read_json(path).items():
        if not entry.get("isBalanced", True):
            continue
        references[key] = Reference((field(entry, "answer", f"{path}: {key}"),), gqa_groups(entry.get("types") or {}))
    return references


def gqa_groups(types: Mapping[str, str]) -> dict[str, str]:
    """What GQA says of a question's type, as groups."""
    groups = {name: types[name] for name in ("structural", "semantic") if types.get(name)}
    if "structural" in groups:
        # The official table's two columns: yes, no and choices against everything else.
        groups["form"] = "open" if groups["structural"] == "query" else "binary"
    return groups


def _captions(path: Path, *, domains: bool = False) -> dict[str, Reference]:
    content = read_json(path)
    captions: dict[str, list[str]] = defaultdict(list)
    for entry in field(content, "annotations", str(path)):
        captions[str(field(entry, "image_id", str(path)))].append(field(entry, "caption", str(path)))
    if not domains:
        return {key: Reference(tuple(texts)) for key, texts in captions.items()}
    domain = {str(image["id"]): image.get("domain") for image in field(content, "images", str(path))}
    lacking = [key for key in captions if not domain.get(key)]
    if lacking:
        raise DataError(f"{path}: {len(lacking)} pictures have no domain, such as {lacking[0]}; take the file that has")
    return {key: Reference(tuple(texts), {"domain": domain[key]}) for key, texts in captions.items()}


def _labels(path: Path) -> dict[str, Reference]:
    references: dict[str, Reference] = {}
    for number, entry in read_json_lines(path):
        where = f"{path}: line {number}"
        key = str(_one_of(entry, ("pairID", "id"), where))
        label = str(_one_of(entry, ("gold_label", "label"), where))
        if label != "-":  # SNLI-VE: no majority among the annotators
            _add(references, key, Reference((label,), {"label": label}), path)
    return references


def _add(references: dict[str, Reference], key: str, reference: Reference, path: Path) -> None:
    if key in references:
        raise DataError(f"{path}: {key} is annotated twice")
    if not reference.answers:
        raise DataError(f"{path}: {key} has no answers")
    references[key] = reference


def _one_of(entry: Any, names: Sequence[str], where: str) -> Any:
    name = next((name for name in names if isinstance(entry, Mapping) and name in entry), None)
    if name is None:
        has = ", ".join(list(entry)[:8]) if isinstance(entry, Mapping) else type(entry).__name__
        raise DataError(f"{where}: no {' or '.join(names)} (there is: {has})")
    return entry[name]


def _answer(name: str, transform: Callable[[str], str] = str) -> Callable[[Mapping[str, Any], str], str]:
    return lambda answer, where: transform(field(answer, name, where))


_QUESTION = {"keys": ("question_id",), "values": ("answer",)}
_VIZWIZ = {"references": _vizwiz, "keys": ("image",), "values": ("answer",)}
_GQA = {"references": _gqa, "keys": ("questionId", "question_id"), "values": ("prediction", "answer")}
_CAPTION = {"keys": ("image_id",), "values": ("caption",)}
_nocaps = functools.partial(_captions, domains=True)

PROTOCOLS: MappingProxyType[str, Protocol] = MappingProxyType(
    {
        "vqa_official": Protocol("vqa_official", _vqa(_answer("answer")), **_QUESTION),
        "vqa_always_normalised": Protocol("vqa_always_normalised", _vqa(_answer("answer")), **_QUESTION),
        "vqa_before_2021": Protocol("vqa_before_2021", _vqa(_answer("answer")), **_QUESTION),
        "okvqa_answer": Protocol("vqa_official", _vqa(_answer("answer")), **_QUESTION),
        "okvqa_raw_answer": Protocol("vqa_official", _vqa(_answer("raw_answer")), **_QUESTION),
        "okvqa_stemmed": Protocol("vqa_official", _vqa(_answer("raw_answer", stem)), **_QUESTION, transform=stem),
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
        "accuracy": Protocol("exact_match", _labels, ("pairID", "id"), ("label", "gold_label", "answer")),
    }
)


def constant_prediction(references: Sequence[Reference]) -> str:
    """The answer that most references share, the first in alphabetical order among equals."""
    counts = Counter(answer for reference in references for answer in set(reference.answers))
    return min(counts, key=lambda answer: (-counts[answer], answer))
