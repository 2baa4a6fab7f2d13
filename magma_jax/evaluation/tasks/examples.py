"""Examples of a task, from a data set folder or from a run's own split: asked as queries, or shown as shots."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from magma_jax.data.batches.stored_images import PictureOptions, StoredPictures
from magma_jax.data.datasets import Dataset
from magma_jax.data.format.records import DataError, Record
from magma_jax.data.readers.common import checked
from magma_jax.evaluation.results.results import CAPTION, question_of
from magma_jax.evaluation.scoring.protocols import Reference, gqa_groups, stem
from magma_jax.evaluation.tasks.task import Kind
from magma_jax.training.pictures import Pictures
from magma_jax.typing import Int, UInt8

# Annotators that the official VQA rule expects; a single true answer counts as all of them.
ANNOTATORS = 10


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture, what is asked about it, and what is true.

    Attributes:
        id: of the question, or of the picture where captions are wanted; as in the data set's own files.
        picture: its row in the pictures of its source.
        text: the question; empty for captions.
        answers: annotators' answers or true captions; empty where the split keeps them secret.
        raw_answers: as annotators wrote them, where ``answers`` holds something made of it (OK-VQA).
        groups: kind of group to group, such as ``{"answer_type": "number"}``.
    """

    id: str
    picture: int
    text: str
    answers: tuple[str, ...]
    raw_answers: tuple[str, ...] = ()
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The answer that a completed example shows: the most frequent one, among equals the first."""
        counts = collections.Counter(self.answers)
        return max(counts, key=lambda answer: counts[answer])

    def reference(self, protocol: str) -> Reference:
        """What an answer is judged against under a protocol.

        Raises:
            DataError: the data set does not have what the protocol compares with.
        """
        answers = self.answers
        if protocol in ("okvqa_raw_answer", "okvqa_stemmed"):
            if not self.raw_answers:
                raise DataError(f"question {self.id} has no raw answers, which {protocol} compares with")
            answers = tuple(map(stem, self.raw_answers)) if protocol == "okvqa_stemmed" else self.raw_answers
        if protocol.startswith("nocaps") and "domain" not in self.groups:
            raise DataError(f"picture {self.id} has no domain; convert the NoCaps file that has them")
        return Reference(answers, self.groups)


class OwnExamples(Sequence[Example]):
    """A split of a run's own data."""

    def __init__(self, dataset: Dataset, split: str, kind: Kind):
        if split not in dataset.evaluation:
            names = ", ".join(dataset.evaluation) or "none"
            raise DataError(f"the run's data has no split {split!r}; its splits: {names}; or give --data")
        wanted = [s for s in dataset.evaluation[split] if (s.kind == CAPTION) == (kind == CAPTION)]
        times = 1 if kind == CAPTION else ANNOTATORS
        self._examples = [
            Example(
                f"{split}-{number}", int(s.picture), question_of(s), (s.answer.strip(),) * times, (), {"kind": s.kind}
            )
            for number, s in enumerate(wanted)
        ]
        self.pictures = dataset.images
        self.name = split

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def shot(self, index: int) -> Example:
        """An example to be shown."""
        return self._examples[index]

    def picture(self, index: int) -> int:
        """Row of an example's picture."""
        return self._examples[index].picture


class StoredExamples(Sequence[Example]):
    """A data set folder; records are read when they are asked for.

    ``pictures`` gives their pictures at the encoder's size, decoded by ``workers`` processes.
    """

    def __init__(self, folder: str | Path, kind: Kind, image_size: int, workers: int = 0):
        self.pictures = StoredPictures([folder], PictureOptions(image_size), workers)
        (records,) = self.pictures.records
        captions, questions = records.texts.T
        self._counts = np.minimum(captions, 1) if kind == CAPTION else questions
        if not self._counts.sum():
            wanted = "captions" if kind == CAPTION else "questions"
            raise DataError(f"{folder}: holds no {wanted}; convert the data set that has them")
        self._records, self._kind = records, kind
        self._ends = np.cumsum(self._counts)
        self._last: tuple[int, Record] | None = None
        self.name = str(folder)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        row, number = self._locate(index)
        if self._last is None or self._last[0] != row:
            # Questions of one picture stand together: it is read once.
            self._last = row, read_record(self._records.__getitem__, row, self.name)
        record = self._last[1]
        if self._kind == CAPTION:
            return Example(record.id, row, "", record.captions, (), _texts(record.metadata, ("domain",)))
        question = record.questions[number]
        groups = _texts(question.metadata, ("answer_type", "question_type", "answerable"))
        types = checked(question.metadata.get("types") or {}, dict, f"{self.name}: types of question {question.id}")
        groups |= gqa_groups(types)
        raw = tuple(question.metadata.get("raw_answers", ()))
        return Example(question.id, row, question.text, question.answers, raw, groups)

    def shot(self, index: int) -> Example:
        """An example without its groups and raw answers, which is read many times faster."""
        row, number = self._locate(index)
        record = read_record(self._records.text, row, self.name)
        if self._kind == CAPTION:
            return Example(record.id, row, "", record.captions)
        question = record.questions[number]
        return Example(question.id, row, question.text, question.answers)

    def picture(self, index: int) -> int:
        """Row of an example's picture, found without reading it."""
        return self._locate(index)[0]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = int(np.searchsorted(self._ends, index, side="right"))
        return row, index - int(self._ends[row] - self._counts[row])


Examples: TypeAlias = OwnExamples | StoredExamples


def read_record(read: Callable[[int], Record], row: int, name: str) -> Record:
    """``read(row)``, whose errors name the data set folder.

    Raises:
        DataError: the record is damaged.
    """
    try:
        return read(row)
    except (DataError, OSError, RuntimeError) as error:  # the last from the file library
        raise DataError(f"{name}: record {row} cannot be read ({error}); convert the data set again") from None


def picture_marks(pictures: Pictures, row: int, *, stored: bool) -> frozenset[str]:
    """What tells a picture from others: of two sources, those with a mark in common are the same picture.

    Args:
        pictures: its source.
        row: of the picture.
        stored: whether both sources are stored pictures. Marks are then the record's id and a hash of the file, which
            need no decoding; else a hash of the pixels.
    """
    if not stored:
        return frozenset({_hash(np.ascontiguousarray(pictures[np.array([row])]).tobytes())})
    folder, local = pictures.where(row)
    records = pictures.records[pictures.folders.index(folder)]
    record = read_record(records.__getitem__, local, folder)
    return frozenset({f"id {record.id}", _hash(record.image_bytes())})


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class JoinedPictures:
    """Two sources of pictures as one: rows of the second follow those of the first."""

    def __init__(self, first: Pictures, second: Pictures):
        self.sources = first, second

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, rows: Int[np.ndarray, " N"]) -> UInt8[np.ndarray, "N h w 3"]:
        rows = np.asarray(rows)
        first, second = self.sources
        later = rows >= len(first)
        parts = [(first, ~later, rows), (second, later, rows - len(first))]
        parts = [(mask, source[numbers[mask]]) for source, mask, numbers in parts if mask.any()]
        out = np.empty((len(rows), *parts[0][1].shape[1:]), np.uint8)
        for mask, pixels in parts:
            out[mask] = pixels
        return out


def close(pictures: Any) -> None:
    """Ends the processes that decode, which start again when more pictures are asked for."""
    for source in pictures.sources if isinstance(pictures, JoinedPictures) else (pictures,):
        if isinstance(source, StoredPictures):
            source.close()


class BlackPictures:
    """So many black pictures."""

    def __init__(self, count: int, size: int):
        self._count, self._size = count, size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: Int[np.ndarray, " N"]) -> UInt8[np.ndarray, "N h w 3"]:
        return np.zeros((len(rows), self._size, self._size, 3), np.uint8)


def spaced(count: int, limit: int | None) -> range | list[int]:
    """Up to ``limit`` of ``count`` numbers, evenly spaced."""
    return range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]


def _texts(metadata: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    return {name: str(metadata[name]) for name in names if metadata.get(name) is not None}
