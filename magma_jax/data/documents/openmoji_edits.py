"""Edits of OpenMoji's drawings: two drawings of one concept that differ by skin tone, gender or hair alone."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from magma_jax.data.dataset import Dataset
from magma_jax.data.documents.beside import BesideDocuments, beside_batches, held_out_beside
from magma_jax.data.documents.document import Image, Parts, RetrievedDocuments, Text
from magma_jax.data.documents.openmoji import OpenmojiDocumentsConfig, load_drawings
from magma_jax.data.documents.settings import block_batches, held_out_documents
from magma_jax.data.documents.templates import parse_template
from magma_jax.data.openmoji.drawings import DEFAULT_TONE, Drawing

_HAIR = re.compile(r"(bald|beard|(?:blond|curly|red|white) hair)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenmojiEditsConfig(OpenmojiDocumentsConfig):
    """Edits of drawings, as documents of the template ``edit``.

    Attributes:
        template: what a document looks like; its fields are ``source``, ``instruction`` and ``image``.
    """

    length: int = 640
    template: str = "edit"
    kind: Literal["openmoji_edits"] = "openmoji_edits"

    def _check_beside(self) -> None:
        """Nothing is retrieved: beside an edit stands the drawing to change."""

    def __post_init__(self):
        super().__post_init__()
        if self.retrieved:
            raise ValueError("data.retrieved: edits have the drawing to change before them; set it to 0")
        parse_template(self.template)


class Edit(NamedTuple):
    """An edit: the row of the drawing, what is asked for, and the row of the drawing that answers it."""

    source: int
    instruction: str
    target: int


def edits(records: Sequence[Drawing], split: str) -> list[Edit]:
    """The edits whose answer is in a split; drawings to change are training drawings, or in the same split."""
    groups: dict[tuple, list[Drawing]] = defaultdict(list)
    for record in records:
        for group in _groups(record):
            groups[group].append(record)
    return [
        Edit(source.index, _instruction(group[0], target), target.index)
        for group, members in groups.items()
        for source in members
        for target in members
        if source is not target and target.split == split and source.split in ("train", split)
    ]


def examples(records: Sequence[Drawing], found: Sequence[Edit]) -> list[int | None]:
    """A training drawing for every edit that has the name that its answer will have, in another skin tone.

    A retriever of names finds it by the name of the drawing to change with the word that the instruction changes; the
    answer itself is never one. None where there is no other.
    """
    by_base: dict[str, list[Drawing]] = defaultdict(list)
    for record in records:
        if record.split == "train" and len(record.tones) <= 1:
            by_base[record.base].append(record)
    chosen: list[int | None] = []
    for edit in found:
        source, target = records[edit.source], records[edit.target]
        others = [one for one in by_base[target.base] if one.index not in (edit.source, edit.target)]
        # In the tones of the drawing to change if there is such a one.
        others.sort(key=lambda one: one.tones != source.tones)
        chosen.append(others[0].index if others else None)
    return chosen


def _groups(record: Drawing) -> Iterator[tuple]:
    """Names of the groups whose members differ from a drawing by one attribute alone."""
    if record.kind not in ("person", "hand", "body part") or len(record.tones) > 1:
        return
    hair = _HAIR.search(record.base)
    yield ("tone", record.base)
    if record.gender is not None:
        yield ("gender", record.concept, record.tones)
    if hair and record.gender is not None:
        yield ("hair", record.gender, record.tones)


def _instruction(attribute: str, target: Drawing) -> str:
    if attribute == "tone":
        return f"make the skin tone {target.tones[0] if target.tones else DEFAULT_TONE}"
    if attribute == "gender":
        return f"make it a {target.gender}"
    found = _HAIR.search(target.base)
    assert found is not None  # only drawings with hair are in such a group
    return f"make the hair {found[1].removesuffix(' hair')}" if "hair" in found[1] else f"make it {found[1]}"


def open_openmoji_edits(config: OpenmojiEditsConfig) -> Dataset:
    """Loads the drawings; batches are as those of ``open_openmoji_documents``, of which ``evaluation`` has ``Edit``.

    Raises:
        ConfigError: vocabulary or number of image tokens is not set.
    """
    records, images, tokenizer, layout, image_tokens = load_drawings(config)
    template = parse_template(config.template)

    def codes(row: int) -> np.ndarray:
        return np.arange(row * image_tokens, (row + 1) * image_tokens)

    def document(edit: Edit) -> Parts:
        fields = {"source": codes(edit.source), "instruction": edit.instruction, "image": codes(edit.target)}
        return tuple(
            Text(np.array(tokenizer.encode(part))) if isinstance(part, str) else Image(part)
            for part in template.fill(fields, f"edit {edit.instruction!r}")
        )

    splits = {split: edits(records, split) for split in ("train", "validation", "test")}
    if config.beside.images:
        # The first text of the template belongs to the drawing to change, as its name would.
        given = [
            (Text(np.array(tokenizer.encode(template.segments[0]))), Image(codes(row))) for row in range(len(records))
        ]
        named = [(Text(np.array(tokenizer.encode(record.caption))), Image(codes(record.index))) for record in records]
        by_side = {
            split: BesideDocuments(
                queries=[
                    (Text(np.array(tokenizer.encode(edit.instruction))), Image(codes(edit.target))) for edit in found
                ],
                memory=[*given, *named],
                neighbours=[
                    (edit.source,) if example is None else (edit.source, len(given) + example)
                    for edit, example in zip(found, examples(records, found), strict=True)
                ],
                by_image=None,
                groups=(range(len(found)), ()),
                layout=layout,
                image_tokens=image_tokens,
                decode=tokenizer.decode,
                config=config.beside,
                least=1,
            )
            for split, found in splits.items()
        }
        batches, validation = beside_batches(by_side["train"], config), held_out_beside(by_side, config.length)
    else:
        documents = {
            split: RetrievedDocuments(
                queries=[document(edit) for edit in found], layout=layout, image_tokens=image_tokens, retrieved=0
            )
            for split, found in splits.items()
        }
        batches = block_batches(documents["train"], config)
        validation = held_out_documents(documents, config.length)
    return Dataset(
        tokenizer=tokenizer,
        batches=batches,
        images=images,
        learned=[record.index for record in records if record.split == "train"],
        evaluation=splits,
        records=records,
        validation_batches=validation,
    )
