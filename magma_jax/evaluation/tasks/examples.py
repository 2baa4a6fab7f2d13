"""Examples of a task, from a dataset folder or a run's own split, for use as queries or shots."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from magma_jax.data.batches.stored_images import ImageOptions, StoredImages
from magma_jax.data.datasets import Dataset
from magma_jax.data.format.records import DataError, Record
from magma_jax.data.readers.common import checked
from magma_jax.evaluation.results.results import CAPTION, question_of
from magma_jax.evaluation.scoring.protocols import Reference, gqa_groups, stem
from magma_jax.evaluation.tasks.task import Kind
from magma_jax.inference.image_features import Images
from magma_jax.typing import Int, UInt8

# Number of annotators in the official VQA rule; a single true answer counts as all of them.
ANNOTATORS = 10


@dataclasses.dataclass(frozen=True)
class Example:
    """An image with a question or caption task, and its true answers.

    Attributes:
        id: id of the question, or of the image for captions, as in the dataset's own files.
        image: row of the image in its source.
        text: the question; empty for captions.
        answers: annotators' answers or true captions; empty if the split keeps them secret.
        raw_answers: annotators' original answers, if ``answers`` holds processed ones (OK-VQA).
        groups: kind of group to group, such as ``{"answer_type": "number"}``.
    """

    id: str
    image: int
    text: str
    answers: tuple[str, ...]
    raw_answers: tuple[str, ...] = ()
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The answer shown in a completed example: the most frequent one, or the first of equals."""
        counts = collections.Counter(self.answers)
        return max(counts, key=lambda answer: counts[answer])

    def reference(self, protocol: str) -> Reference:
        """The reference that an answer is scored against under a protocol.

        Raises:
            DataError: the dataset lacks the data that the protocol needs.
        """
        answers = self.answers
        if protocol in ("okvqa_raw_answer", "okvqa_stemmed"):
            if not self.raw_answers:
                raise DataError(f"question {self.id} has no raw answers, which {protocol} compares with")
            answers = tuple(map(stem, self.raw_answers)) if protocol == "okvqa_stemmed" else self.raw_answers
        if protocol.startswith("nocaps") and "domain" not in self.groups:
            raise DataError(f"image {self.id} has no domain; convert the NoCaps file that has them")
        return Reference(answers, self.groups)


class OwnExamples(Sequence[Example]):
    """A split of a run's own data."""

    def __init__(self, dataset: Dataset, split: str, kind: Kind):
        if split not in dataset.evaluation:
            names = ", ".join(dataset.evaluation) or "none"
            raise DataError(f"the run's data has no split {split!r}; its splits: {names}; or give --data")
        if dataset.images is None:
            raise DataError("the run's data has no images; give --data")
        wanted = [s for s in dataset.evaluation[split] if (s.kind == CAPTION) == (kind == CAPTION)]
        times = 1 if kind == CAPTION else ANNOTATORS
        self._examples = [
            Example(
                f"{split}-{number}", int(s.image), question_of(s), (s.answer.strip(),) * times, (), {"kind": s.kind}
            )
            for number, s in enumerate(wanted)
        ]
        self.images = dataset.images
        self.name = split

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def shot(self, index: int) -> Example:
        """An example for use as a shot."""
        return self._examples[index]

    def image(self, index: int) -> int:
        """Row of an example's image."""
        return self._examples[index].image


class StoredExamples(Sequence[Example]):
    """Examples of a dataset folder; records are read lazily.

    ``images`` are their images at the encoder's size, decoded by ``workers`` processes.
    """

    def __init__(self, folder: str | Path, kind: Kind, image_size: int, workers: int = 0):
        self.images = StoredImages([folder], ImageOptions(image_size), workers)
        (records,) = self.images.records
        captions, questions = records.texts.T
        self._counts = np.minimum(captions, 1) if kind == CAPTION else questions
        if not self._counts.sum():
            wanted = "captions" if kind == CAPTION else "questions"
            raise DataError(f"{folder}: holds no {wanted}; convert the dataset that has them")
        self._records, self._kind = records, kind
        self._ends = np.cumsum(self._counts)
        self._last: tuple[int, Record] | None = None
        self.name = str(folder)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        row, number = self._locate(index)
        if self._last is None or self._last[0] != row:
            # Questions of an image are adjacent, so its record is read once.
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
        """An example without its groups and raw answers, which is much faster to read."""
        row, number = self._locate(index)
        record = read_record(self._records.text, row, self.name)
        if self._kind == CAPTION:
            return Example(record.id, row, "", record.captions)
        question = record.questions[number]
        return Example(question.id, row, question.text, question.answers)

    def image(self, index: int) -> int:
        """Row of an example's image, without reading the image."""
        return self._locate(index)[0]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = int(np.searchsorted(self._ends, index, side="right"))
        return row, index - int(self._ends[row] - self._counts[row])


Examples: TypeAlias = OwnExamples | StoredExamples


def read_record(read: Callable[[int], Record], row: int, name: str) -> Record:
    """``read(row)``, whose errors name the dataset folder.

    Raises:
        DataError: the record is damaged.
    """
    try:
        return read(row)
    except (DataError, OSError, RuntimeError) as error:  # RuntimeError comes from the file library
        raise DataError(f"{name}: record {row} cannot be read ({error}); convert the dataset again") from None


def image_marks(images: Images, row: int, *, stored: bool) -> frozenset[str]:
    """Identifiers of an image across sources: two images with a common mark are the same.

    Args:
        images: source of the image.
        row: row of the image.
        stored: whether both sources are stored images. Marks are then the record's id and a hash of the file, which
            need no decoding; otherwise a hash of the pixels.
    """
    if not stored:
        return frozenset({_hash(np.ascontiguousarray(images[np.array([row])]).tobytes())})
    assert isinstance(images, StoredImages)  # ``stored`` says so
    folder, local = images.where(row)
    records = images.records[images.folders.index(folder)]
    record = read_record(records.__getitem__, local, folder)
    return frozenset({f"id {record.id}", _hash(record.image_bytes())})


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class JoinedImages:
    """Two sources of images, concatenated."""

    def __init__(self, first: Images, second: Images):
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


def close(images: Any) -> None:
    """Ends the decoding processes; they start again at the next access."""
    for source in images.sources if isinstance(images, JoinedImages) else (images,):
        if isinstance(source, StoredImages):
            source.close()


class BlackImages:
    """A source of ``count`` black images."""

    def __init__(self, count: int, size: int):
        self._count, self._size = count, size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: Int[np.ndarray, " N"]) -> UInt8[np.ndarray, "N h w 3"]:
        return np.zeros((len(rows), self._size, self._size, 3), np.uint8)


def spaced(count: int, limit: int | None) -> range | list[int]:
    """Up to ``limit`` of ``count`` indices, evenly spaced."""
    return range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]


def _texts(metadata: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    return {name: str(metadata[name]) for name in names if metadata.get(name) is not None}
