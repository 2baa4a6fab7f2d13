"""Records: an image with all of its texts.

Readers convert every dataset to records, the converter stores them, the pipeline samples from them. An image with five
captions, or with a dozen questions, is one record, so its bytes are stored once.

A stored record is a MessagePack map with the keys of ``Record``; ``image`` holds the original bytes of the image file,
never re-encoded. A sample is one text about one image.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgpack


class DataError(ValueError):
    """Data that is missing, damaged or in the wrong format; one line with file and remedy."""


@dataclasses.dataclass(frozen=True)
class FileSlice:
    """Byte range of a file, such as a member of a tar archive."""

    path: str
    offset: int = 0
    nbytes: int | None = None

    def read(self) -> bytes:
        """Reads the bytes.

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
    """Question or statement about an image.

    Attributes:
        id: id in the dataset, unique in its split.
        text: the question; for entailment the hypothesis.
        answers: the annotators' answers, one each, in file order; a class name for classification; empty in splits
            with hidden answers.
        metadata: other fields of the dataset, JSON values by their original names.
    """

    id: str
    text: str
    answers: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Record:
    """Image with its captions and questions.

    Attributes:
        id: unique in its dataset and split.
        image: encoded bytes, or their location.
        captions: captions without surrounding whitespace.
        questions: see ``Question``.
        metadata: other fields of the dataset, JSON values by their original names.
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
        """Number of training samples: one for the captions, and one per question."""
        return count_samples(len(self.captions), len(self.questions))


@dataclasses.dataclass(frozen=True)
class Sample:
    """Prompt and target text for one image.

    Attributes:
        image: row of the image in its dataset.
        prompt: the given text.
        answer: the target text, with its leading space.
        kind: ``caption``, or the kind of question.
        learn_prompt: whether the loss includes the prompt tokens.
    """

    image: int
    prompt: str
    answer: str
    kind: str
    learn_prompt: bool = False


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Entry that a reader could not convert to a record.

    Attributes:
        id: id of the record or the question.
        reason: short reason, the same text for all entries with this problem, so that they can be counted.
        samples: number of samples lost, counted as ``Record.samples``.
        detail: details of this entry.
    """

    id: str
    reason: str
    samples: int = 1
    detail: str = dataclasses.field(default="", compare=False)


# Reasons that are normal in datasets: skipped and counted, but not a sign of an error.
NOT_DOWNLOADED, DUPLICATE, HIDDEN = "image not downloaded", "duplicate", "hidden file"
EXPECTED = frozenset({NOT_DOWNLOADED, DUPLICATE, HIDDEN})


def count_samples(captions: int, questions: int) -> int:
    """Number of samples of a record; one without texts counts as one."""
    return (captions > 0) + questions or 1


def pack(record: Record) -> bytes:
    """Serialises a record, reading its image."""
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    fields["questions"] = [dataclasses.asdict(question) for question in record.questions]
    packed = msgpack.packb(fields | {"image": record.image_bytes()})
    assert packed is not None  # packb returns bytes for a map
    return packed


def pack_text(record: Record) -> bytes:
    """Serialises a record without image and metadata."""
    questions = [dataclasses.replace(question, metadata={}) for question in record.questions]
    return pack(dataclasses.replace(record, image=b"", questions=tuple(questions), metadata={}))


def unpack(content: bytes) -> Record:
    """Inverse of ``pack``.

    Raises:
        DataError: the bytes are not a stored record.
    """
    try:
        fields = msgpack.unpackb(content)
        questions = tuple(
            Question(**(question | {"answers": tuple(question["answers"])})) for question in fields.pop("questions")
        )
        return Record(questions=questions, captions=tuple(fields.pop("captions")), **fields)
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
        raise DataError(f"not a stored record ({error}); convert the dataset again") from None
