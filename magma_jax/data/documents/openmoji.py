"""OpenMoji's drawings as documents: a name, then the drawing."""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from magma_jax.data.dataset import Dataset
from magma_jax.data.documents.annotation import open_annotation
from magma_jax.data.documents.beside import BesideConfig, BesideDocuments, beside_batches, held_out_beside
from magma_jax.data.documents.document import Image, Parts, RetrievedDocuments, Text
from magma_jax.data.documents.settings import DocumentsConfig, block_batches, held_out_documents
from magma_jax.data.openmoji import drawings
from magma_jax.data.openmoji.dataset import QUICKSTART_TOKENIZER
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.typing import UInt8


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenmojiDocumentsConfig(DocumentsConfig):
    """Names and drawings. Their codes are made by the model's own image tokenizer when a run begins.

    Attributes:
        length: tokens that a model reads.
        beside: retrieved images beside the sequence, see ``beside``; ``images`` of it is 0 for none.
        image_size: pixels per side of an image; a run uses its tokenizer's.
        cache_dir: cache folder of rasterised drawings.
    """

    length: int = 512
    beside: BesideConfig = BesideConfig()
    image_size: int = 128
    cache_dir: str = "~/.cache/magma_jax"
    kind: Literal["openmoji_documents"] = "openmoji_documents"

    may_change: ClassVar[tuple[str, ...]] = ("cache_dir",)

    def __post_init__(self):
        super().__post_init__()
        if self.beside.images and self.retrieved:
            raise ValueError("data.beside.images puts retrieved documents beside the sequence; set data.retrieved to 0")
        self._check_beside()

    def _check_beside(self) -> None:
        if self.beside.images and not self.annotation:
            raise ValueError("data.beside.images: set data.annotation to a folder of magma_jax.retrieval annotate")


def load_drawings(
    config: OpenmojiDocumentsConfig,
) -> tuple[list[drawings.Drawing], UInt8[np.ndarray, "N H W 3"], Tokenizer, VocabLayout, int]:
    """Drawings, their pixels, the tokenizer of their names, a vocabulary with an id for every code of every drawing,
    and the number of codes of a drawing.

    Raises:
        ConfigError: vocabulary or number of image tokens is not set.
    """
    layout, image_tokens = config.layout()
    records, images = drawings.load(Path(config.cache_dir).expanduser(), config.image_size)
    with resources.as_file(resources.files("magma_jax") / QUICKSTART_TOKENIZER) as path:
        tokenizer = Tokenizer.load(path)
    placeholders = dataclasses.replace(layout, image=len(images) * image_tokens)
    return records, images, tokenizer, placeholders, image_tokens


def open_openmoji_documents(config: OpenmojiDocumentsConfig) -> Dataset:
    """Loads the drawings.

    Image tokens of its batches are no codes yet: token ``image_ids.start + row * image_tokens + i`` stands for code i
    of the drawing in that row of ``Dataset.images``. Retrieved pairs are training drawings.

    Raises:
        ConfigError: vocabulary or number of image tokens is not set. DataError: an unusable annotation.
    """
    records, images, tokenizer, placeholders, image_tokens = load_drawings(config)

    def pair(record: drawings.Drawing) -> Parts:
        first = record.index * image_tokens
        return Text(np.array(tokenizer.encode(record.caption))), Image(np.arange(first, first + image_tokens))

    members = {split: [one for one in records if one.split == split] for split in ("train", "validation", "test")}
    pairs = {split: [pair(record) for record in found] for split, found in members.items()}
    memory: Sequence[Parts] = ()
    neighbours = dict.fromkeys(members, ())
    if config.retrieved and config.annotation:
        annotation, memory = open_annotation(config.annotation), pairs["train"]
        rows = {record.codepoints: row for row, record in enumerate(members["train"])}
        neighbours = {
            split: annotation.rows([record.codepoints for record in found], rows) for split, found in members.items()
        }
    if config.beside.images:
        by_side = _beside(config, members, pairs, placeholders, tokenizer)
        return Dataset(
            tokenizer=tokenizer,
            batches=beside_batches(by_side["train"], config),
            images=images,
            learned=[record.index for record in members["train"]],
            evaluation=members,
            records=records,
            validation_batches=held_out_beside(by_side, config.length),
        )
    documents = {
        split: RetrievedDocuments(
            queries=found,
            layout=placeholders,
            image_tokens=image_tokens,
            retrieved=config.retrieved,
            memory=memory,
            neighbours=neighbours[split],
        )
        for split, found in pairs.items()
    }
    return Dataset(
        tokenizer=tokenizer,
        batches=block_batches(documents["train"], config),
        images=images,
        learned=[record.index for record in members["train"]],
        evaluation=members,
        records=records,
        validation_batches=held_out_documents(documents, config.length),
    )


def _beside(
    config: OpenmojiDocumentsConfig,
    members: Mapping[str, Sequence[drawings.Drawing]],
    pairs: Mapping[str, Sequence[Parts]],
    layout: VocabLayout,
    tokenizer: Tokenizer,
) -> dict[str, BesideDocuments]:
    """Documents with retrieved images beside them, by split."""
    rows = {record.codepoints: row for row, record in enumerate(members["train"])}
    assert config.annotation is not None  # checked by the config
    by_text = open_annotation(config.annotation)
    by_image = open_annotation(config.beside.by_image) if config.beside.by_image else None
    documents = {}
    for split, found in members.items():
        ids = [record.codepoints for record in found]
        others = [row for row, record in enumerate(found) if record.kind in ("thing", "flag")]
        documents[split] = BesideDocuments(
            queries=pairs[split],
            memory=pairs["train"],
            neighbours=by_text.rows(ids, rows),
            by_image=None if by_image is None else by_image.rows(ids, rows),
            groups=(sorted(set(range(len(found))) - set(others)), others),
            layout=layout,
            image_tokens=config.layout()[1],
            decode=tokenizer.decode,
            config=config.beside,
        )
    return documents
