"""Documents of folders with codes and texts, and what was retrieved for them from a memory bank."""

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from magma_jax.config import ConfigError
from magma_jax.data.dataset import Dataset
from magma_jax.data.documents.annotation import Annotation, open_annotation
from magma_jax.data.documents.bank import Entry, MemoryBank, open_bank
from magma_jax.data.documents.document import Image, Parts, RetrievedDocuments, Text
from magma_jax.data.documents.settings import DocumentsConfig, block_batches, held_out_documents
from magma_jax.data.documents.templates import Template, parse_template
from magma_jax.data.format.code_folder import Codes, StoredCodes
from magma_jax.data.format.records import DataError
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.data.tokenizers.load import load_tokenizer
from magma_jax.typing import Int

# A text and its image, as in pretraining (figure 8 of the paper).
PAIR = "{text} | {image}"
# Fields of a question; a template with one of them makes documents of questions, others of captions.
QUESTION_FIELDS = ("question", "answer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentFoldersConfig(DocumentsConfig):
    """Folders of codes and texts.

    Attributes:
        folders: split to the folders in it, which ``python -m magma_jax.data encode`` writes. Every caption is a
            document, and so is every question with its answer, of which the template asks for one or the other.
        memory: bank that ``annotation`` refers to; it holds codes.
        template: what a document looks like, see ``data.documents.templates``.
        tokenizer: ``gpt2``, a ``tokenizer.json`` or its folder; None for the tokenizer of the run's ``base``, or
            ``gpt2`` without one.
    """

    folders: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    memory: str | None = None
    template: str = PAIR
    tokenizer: str | None = None
    kind: Literal["documents"] = "documents"

    may_change: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.retrieved and not self.memory:
            raise ValueError("data.retrieved: set data.memory to the bank that the annotation refers to")
        parse_template(self.template)


class Encoded:
    """Samples of a folder of codes: every caption, or every question, of every record.

    Args:
        folder: see ``data.format.code_folder``.
        template: it says which of the two are used.
    """

    def __init__(self, folder: str | Path, template: Template):
        self._stored, self.name = StoredCodes(folder), str(folder)
        self._questions = not template.fields.isdisjoint(QUESTION_FIELDS)
        self._starts = np.cumsum([0, *self._stored.texts[:, int(self._questions)].tolist()])
        if not len(self):
            wanted = "questions" if self._questions else "captions"
            raise DataError(f"{folder}: has no {wanted}, which the template asks for")

    @property
    def stored(self) -> StoredCodes:
        """The folder."""
        return self._stored

    def __len__(self) -> int:
        return int(self._starts[-1])

    def entry(self, number: int) -> Entry:
        """Text and fields of a sample; its id is that of the record."""
        row = self._row(number)
        record, own = self._stored.text(row), number - int(self._starts[row])
        fields = {name: value for name, value in record.metadata.items() if isinstance(value, str)}
        if not self._questions:
            return Entry(id=record.id, text=record.captions[own], split="", fields=fields)
        question = record.questions[own]
        fields |= {name: value for name, value in question.metadata.items() if isinstance(value, str)}
        fields |= {"question": question.text, "answer": question.answers[0] if question.answers else ""}
        return Entry(id=record.id, text=question.text, split="", fields=fields)

    def image(self, number: int) -> Int[np.ndarray, " T"]:
        """Codes of a sample's image."""
        return self._stored[self._row(number)][0]

    def _row(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1


class Remembered:
    """Documents of a memory bank."""

    def __init__(self, bank: MemoryBank):
        self.bank, self.name = bank, str(bank.folder)

    def __len__(self) -> int:
        return len(self.bank)

    def entry(self, number: int) -> Entry:
        """Id, text and fields of a document."""
        return self.bank.entries[number]

    def image(self, number: int) -> Int[np.ndarray, " T"]:
        """Codes of a document's image."""
        assert self.bank.codes is not None  # checked when it was opened
        return np.asarray(self.bank.codes[number], np.int32)


class Documents(Sequence[Parts]):
    """Documents of several folders, read on access.

    Args:
        folders: the folders.
        tokenizer: of their texts.
        template: what a document looks like.
    """

    def __init__(self, folders: Sequence[Encoded | Remembered], tokenizer: Tokenizer, template: Template):
        self._folders, self._tokenizer, self._template = folders, tokenizer, template
        self._ends = list(itertools.accumulate(map(len, folders)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: Any) -> Any:  # a row; slices are not used
        folder, row = self._place(number)
        entry = folder.entry(row)
        fields = {**entry.fields, "text": entry.text, "image": folder.image(row)}
        return tuple(
            Text(np.array(self._tokenizer.encode(part), np.int32)) if isinstance(part, str) else Image(part)
            for part in self._template.fill(fields, f"{folder.name}: document {entry.id!r}")
        )

    def sample_id(self, number: int) -> str:
        """Id of a document."""
        folder, row = self._place(number)
        return folder.entry(row).id

    def _place(self, number: int) -> tuple[Encoded | Remembered, int]:
        folder = bisect.bisect_right(self._ends, number)
        return self._folders[folder], number - (self._ends[folder] - len(self._folders[folder]))


class Neighbours(Sequence[Int[np.ndarray, " K"]]):
    """Rows of the documents retrieved for every sample, looked up on access."""

    def __init__(self, documents: Documents, annotation: Annotation, rows: Mapping[str, int]):
        self._documents, self._annotation, self._rows = documents, annotation, rows

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, number: Any) -> Any:  # a row; slices are not used
        return self._annotation.rows([self._documents.sample_id(number)], self._rows)[0]


def open_document_folders(config: DocumentFoldersConfig) -> Dataset:
    """Opens the folders.

    Raises:
        ConfigError: no folders to train on, or an unknown tokenizer. DataError: folders that cannot be read, or an
        annotation of other documents.
    """
    layout, image_tokens = config.layout()
    if not config.folders.get("train"):
        raise ConfigError("data.folders names no folders to train on; set data.folders.train")
    tokenizer, template = load_tokenizer(config.tokenizer), parse_template(config.template)
    encoded = {split: [Encoded(one, template) for one in folders] for split, folders in config.folders.items()}
    codes = Codes([one.stored for members in encoded.values() for one in members])
    _check_grid(codes.tokens, codes.size, str(codes.folders[0]), image_tokens, layout)
    splits = {split: Documents(members, tokenizer, template) for split, members in encoded.items()}
    memory: Sequence[Parts] = ()
    neighbours: dict[str, Any] = dict.fromkeys(splits, ())
    if config.retrieved and config.annotation and config.memory:
        bank, annotation = open_bank(config.memory), open_annotation(config.annotation)
        if bank.codes is None:
            raise DataError(f"{config.memory}: holds no codes; build it with --codes, a folder of encoded images")
        _check_grid(bank.codes.shape[1], None, config.memory, image_tokens, layout)
        memory = Documents([Remembered(bank)], tokenizer, parse_template(PAIR))
        neighbours = {split: Neighbours(one, annotation, bank.rows) for split, one in splits.items()}
    documents = {
        split: RetrievedDocuments(
            queries=pairs,
            layout=layout,
            image_tokens=image_tokens,
            retrieved=config.retrieved,
            memory=memory,
            neighbours=neighbours[split],
        )
        for split, pairs in splits.items()
    }
    return Dataset(
        tokenizer=tokenizer,
        batches=block_batches(documents["train"], config),
        evaluation={split: range(len(pairs)) for split, pairs in splits.items()},
        validation_batches=held_out_documents(documents, config.length),
    )


def _check_grid(tokens: int, size: int | None, folder: str, image_tokens: int, layout: VocabLayout) -> None:
    if tokens != image_tokens or (size is not None and size != layout.image):
        raise DataError(
            f"{folder}: has {tokens} codes of an image{'' if size is None else f' from a codebook of {size}'}, but the "
            f"model's grid has {image_tokens} of {layout.image}; encode the images with the model's own tokenizer"
        )
