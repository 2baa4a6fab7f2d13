"""Documents of folders with codes and texts, and what was retrieved for them from a memory bank."""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from magma_jax.config import ConfigError
from magma_jax.data.dataset import Dataset
from magma_jax.data.documents.annotation import open_annotation
from magma_jax.data.documents.bank import MemoryBank, open_bank
from magma_jax.data.documents.document import Image, Parts, RetrievedDocuments, Text
from magma_jax.data.documents.settings import DocumentsConfig, block_batches, held_out_documents
from magma_jax.data.documents.templates import Template, parse_template
from magma_jax.data.format.records import DataError
from magma_jax.data.tokenizers.byte_level import Tokenizer, gpt2_tokenizer

# A text and its image, as in pretraining (figure 8 of the paper).
PAIR = "{text} | {image}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentFoldersConfig(DocumentsConfig):
    """Folders of codes and texts.

    Attributes:
        folders: split to the folders in it, see ``data.documents.bank``.
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


class FolderPairs(Sequence[Parts]):
    """Documents of several folders, read on access.

    Args:
        banks: the folders.
        tokenizer: of their texts.
        template: what a document looks like.
    """

    def __init__(self, banks: Sequence[MemoryBank], tokenizer: Tokenizer, template: Template):
        self._banks, self._tokenizer, self._template = banks, tokenizer, template
        self._ends = list(itertools.accumulate(len(bank) for bank in banks))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: Any) -> Any:  # a row; slices are not used
        folder = bisect.bisect_right(self._ends, number)
        bank = self._banks[folder]
        row = number - (self._ends[folder] - len(bank))
        assert bank.codes is not None  # checked when it was opened
        entry = bank.entries[row]
        fields = {**entry.fields, "text": entry.text, "image": bank.codes[row]}
        where = f"{bank.folder}: document {entry.id!r}"
        return tuple(
            Text(np.array(self._tokenizer.encode(part), np.int32)) if isinstance(part, str) else Image(part)
            for part in self._template.fill(fields, where)
        )

    @property
    def ids(self) -> list[str]:
        """Ids of all documents."""
        return [entry.id for bank in self._banks for entry in bank.entries]


def open_document_folders(config: DocumentFoldersConfig) -> Dataset:
    """Opens the folders.

    Raises:
        ConfigError: no folders to train on, or an unknown tokenizer. DataError: folders that cannot be read, or an
        annotation of other documents.
    """
    layout, image_tokens = config.layout()
    if not config.folders.get("train"):
        raise ConfigError("data.folders names no folders to train on; set data.folders.train")
    tokenizer, template = _tokenizer(config.tokenizer), parse_template(config.template)
    splits = {
        split: FolderPairs([_open(folder, image_tokens) for folder in folders], tokenizer, template)
        for split, folders in config.folders.items()
    }
    memory: Sequence[Parts] = ()
    neighbours: dict[str, Any] = dict.fromkeys(splits, ())
    if config.retrieved and config.annotation and config.memory:
        bank, annotation = _open(config.memory, image_tokens), open_annotation(config.annotation)
        memory = FolderPairs([bank], tokenizer, parse_template(PAIR))
        neighbours = {split: annotation.rows(pairs.ids, bank.rows) for split, pairs in splits.items()}
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


def _open(folder: str, image_tokens: int) -> MemoryBank:
    bank = open_bank(folder)
    if bank.codes is None:
        raise DataError(f"{folder}: holds no codes; build it from images with an image tokenizer")
    if bank.codes.shape[1] != image_tokens:
        raise DataError(
            f"{folder}: has {bank.codes.shape[1]} codes of an image, but the model's grid has {image_tokens}; encode "
            "the images with the model's own tokenizer"
        )
    return bank


def _tokenizer(name: str | None) -> Tokenizer:
    if name in (None, "gpt2"):
        return gpt2_tokenizer()
    path = Path(name)
    # A model folder has its vocabulary in tokenizer/.
    path = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    if not path.exists():
        raise ConfigError(f"data.tokenizer: {path} is not there; give gpt2, a tokenizer.json or its folder")
    return Tokenizer.load(path)
