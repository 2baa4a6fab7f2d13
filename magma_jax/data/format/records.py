"""The record: one image and everything that is said about it.

Readers turn every dataset into records, the converter stores them, the pipeline draws samples from them. An image
with five captions, or with a dozen questions, is one record, so its bytes are stored once.

Stored, a record is one MessagePack map with the keys of ``Record``; ``image`` holds the bytes of the image file as
they were found, never decoded and encoded again. A sample is one text about one image.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgpack


class DataError(ValueError):
    """Data that is missing, damaged or not in the format it should be; one line with file and remedy."""


@dataclasses.dataclass(frozen=True)
class FileSlice:
    """Bytes of a file, or of a part of it such as a member of a tar archive."""

    path: str
    offset: int = 0
    nbytes: int | None = None

    def read(self) -> bytes:
        """The bytes.

        Raises:
            DataError: the file ends before the slice does.
            OSError: the file cannot be opened or read.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            content = file.read() if self.nbytes is None else file.read(self.nbytes)
        if self.nbytes is not None and len(content) < self.nbytes:
            raise DataError(f"{self.path}: ends {self.nbytes - len(content)} bytes before it should; fetch it again")
        return content


@dataclasses.dataclass(frozen=True)
class Question:
    """A question or statement about an image.

    Attributes:
        id: as in the dataset, unique in its split.
        text: the question; for entailment the hypothesis.
        answers: what annotators answered, one each, in the order of the file; a class name for classification;
            empty where the split keeps its answers secret.
        metadata: what else the dataset says, JSON values by its own names.
    """

    id: str
    text: str
    answers: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Record:
    """An image with its captions and questions.

    Attributes:
        id: unique in its dataset and split.
        image: encoded bytes, or where they lie.
        captions: as in the dataset, without surrounding space.
        questions: see ``Question``.
        metadata: what else the dataset says, JSON values by its own names.
    """

    id: str
    image: bytes | FileSlice
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def image_bytes(self) -> bytes:
        """The encoded image."""
        return self.image if isinstance(self.image, bytes) else self.image.read()

    @property
    def samples(self) -> int:
        """What training makes of it: a sample of its captions, and one of every question."""
        return count_samples(len(self.captions), len(self.questions))


@dataclasses.dataclass(frozen=True)
class Sample:
    """One text to learn or to ask.

    Attributes:
        image: row of the image in its dataset.
        prompt: what is given.
        answer: what is to be produced, with its leading blank.
        kind: ``caption``, or which kind of question.
        learn_prompt: whether the loss counts the tokens of the prompt too.
    """

    image: int
    prompt: str
    answer: str
    kind: str
    learn_prompt: bool = False


@dataclasses.dataclass(frozen=True)
class Skipped:
    """What a reader found and cannot give as a record.

    Attributes:
        id: of the record, or of the question.
        reason: in words that group well when counted.
        samples: how many are lost with it, counted as ``Record.samples``.
        detail: what helps to find out why; differs from entry to entry.
    """

    id: str
    reason: str
    samples: int = 1
    detail: str = dataclasses.field(default="", compare=False)


# Reasons that are in the nature of data: left out and counted, but no sign that something is wrong.
NOT_DOWNLOADED, DUPLICATE, HIDDEN = "image not downloaded", "duplicate", "hidden file"
EXPECTED = frozenset({NOT_DOWNLOADED, DUPLICATE, HIDDEN})


def count_samples(captions: int, questions: int) -> int:
    """Samples of a record with so many texts; one without any counts as one."""
    return (captions > 0) + questions or 1


def pack(record: Record) -> bytes:
    """A record as it is stored, its image read."""
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    fields["questions"] = [dataclasses.asdict(question) for question in record.questions]
    packed = msgpack.packb(fields | {"image": record.image_bytes()})
    assert packed is not None  # it is, where a map is packed
    return packed


def pack_text(record: Record) -> bytes:
    """The record without its image and what else is known of it."""
    questions = [dataclasses.replace(question, metadata={}) for question in record.questions]
    return pack(dataclasses.replace(record, image=b"", questions=tuple(questions), metadata={}))


def unpack(content: bytes) -> Record:
    """The inverse of ``pack``.

    Raises:
        DataError: the bytes are no stored record.
    """
    try:
        fields = msgpack.unpackb(content)
        questions = tuple(
            Question(**(question | {"answers": tuple(question["answers"])})) for question in fields.pop("questions")
        )
        return Record(questions=questions, captions=tuple(fields.pop("captions")), **fields)
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
        raise DataError(f"not a stored record ({error}); convert the dataset again") from None
