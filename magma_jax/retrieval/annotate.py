"""Annotates a data set: for every sample the documents of a bank that may be retrieved for it."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from magma_jax.data.documents.annotation import ANNOTATION_FILE, format_part, part_file
from magma_jax.data.documents.bank import Entry, MemoryBank
from magma_jax.data.format.records import DataError
from magma_jax.output import replace_file
from magma_jax.retrieval.build import TRAIN, begin
from magma_jax.retrieval.encoders import Encoder, document_vectors
from magma_jax.retrieval.search import Index
from magma_jax.retrieval.selection import MAX_SIMILARITY, QUERY_DROPOUT, cover, drop_words, select_documents
from magma_jax.retrieval.sources import Documents

# Samples of a part, which are searched together.
PART = 1024


def annotate(
    documents: Documents,
    bank: MemoryBank,
    encoder: Encoder,
    index: Index,
    out: str | Path,
    *,
    splits: Collection[str],
    count: int = 2,
    by_text: bool = True,
    by_image: Collection[str] = (TRAIN,),
    candidates: int = 128,
    max_similarity: float = MAX_SIMILARITY,
    dropout: float = QUERY_DROPOUT,
    decay: float = 1.0,
    seed: int = 0,
    with_evaluation: bool = False,
    progress: bool = True,
) -> int:
    """Writes an annotation (``data.documents.annotation``) of the samples of some splits; returns their number.

    ``count`` documents are found by a sample's text, of which some words are dropped, and ``count`` more by its image.
    The sample itself and near copies of it are never among them.

    Args:
        documents: the samples.
        bank: what may be retrieved.
        encoder: the one that made the bank.
        index: index of the bank.
        out: folder; an interrupted annotation continues there.
        splits: splits to annotate.
        count: documents per query.
        by_text: whether texts are queries; captions that are to be found must not be.
        by_image: splits whose images are queries too. For a sample whose image is to be drawn, it is not known.
        candidates: documents among which those are chosen.
        max_similarity: see ``selection``.
        dropout: share of the words of a text query that are dropped.
        decay: below 1, a document counts for less where it repeats those before it, see ``selection.cover``.
        seed: seed of that.
        with_evaluation: whether the bank may hold samples of a split other than train.
        progress: whether to show a progress bar.

    Raises:
        DataError: a bank that another encoder made, one that holds samples of evaluation, or no samples.
    """
    out = Path(out)
    check_encoder(bank, encoder)
    if count < 1 or candidates < count:
        raise DataError(f"there are {candidates} candidates for {count} documents; give at least as many")
    if not by_text and not set(splits) <= set(by_image):
        raise DataError("without texts every split needs its images as queries; name all splits in by_image")
    if not 0 <= decay <= 1:
        raise DataError(f"decay must be 0 to 1, got {decay}")
    rows = [row for row, entry in enumerate(documents.entries) if entry.split in splits]
    if not rows:
        raise DataError(f"{documents.name} has no samples of {', '.join(sorted(splits))}")
    held = [documents.entries[row].id for row in rows if documents.entries[row].split != TRAIN]
    leaked = [one for one in held if one in bank.rows]
    if leaked and not with_evaluation:
        raise DataError(
            f"{bank.folder}: holds {len(leaked)} samples of evaluation, such as {leaked[0]!r}, so that their documents "
            "would be themselves; build it without them, or say --with-evaluation"
        )
    settings = {
        "data": documents.name,
        "bank": bank.folder.name,
        "encoder": encoder.name,
        "samples": len(rows),
        "splits": sorted(splits),
        "documents": count,
        "by_text": by_text,
        "by_image": sorted(by_image),
        "candidates": candidates,
        "max_similarity": max_similarity,
        "dropout": dropout,
        "decay": decay,
        "seed": seed,
    }
    begin(out, settings)
    starts = range(0, len(rows), PART)
    for number, start in enumerate(tqdm(starts, desc="annotating", unit="part", disable=None if progress else True)):
        file = part_file(out, number)
        if file.exists():
            continue
        part = rows[start : start + PART]
        found, scores = _retrieve(
            documents,
            part,
            bank,
            encoder,
            index,
            count=count,
            by_text=by_text,
            by_image=by_image,
            candidates=candidates,
            max_similarity=max_similarity,
            dropout=dropout,
            decay=decay,
            seed=seed,
        )
        ids = [documents.entries[row].id for row in part]
        replace_file(file, format_part(ids, found, scores).encode())
    replace_file(out / ANNOTATION_FILE, json.dumps(settings | {"parts": len(starts)}, indent=2).encode())
    return len(rows)


def check_encoder(bank: MemoryBank, encoder: Encoder) -> None:
    """Raises DataError if another encoder made the bank's vectors."""
    if bank.encoder != encoder.name or bank.vectors.shape[1] != encoder.width:
        raise DataError(
            f"{bank.folder}: its vectors were made by {bank.encoder} ({bank.vectors.shape[1]} entries), which "
            f"{encoder.name} ({encoder.width}) cannot search; use that encoder or build the bank again"
        )


def _retrieve(
    documents: Documents,
    rows: Sequence[int],
    bank: MemoryBank,
    encoder: Encoder,
    index: Index,
    *,
    count: int,
    by_text: bool,
    by_image: Collection[str],
    candidates: int,
    max_similarity: float,
    dropout: float,
    decay: float,
    seed: int,
) -> tuple[list[list[str]], list[list[float]]]:
    entries: list[Entry] = [documents.entries[row] for row in rows]
    pixels = documents.pixels(rows, encoder.image_size)
    images = None if pixels is None else encoder.images(pixels)
    own = document_vectors(encoder.texts([entry.text for entry in entries]), images)
    queries = encoder.texts([drop_words(entry.text, entry.id, dropout, seed) for entry in entries])
    by_words = index.search(queries, candidates)
    by_pixels = None if images is None else index.search(images, candidates)
    found: list[list[str]] = []
    scores: list[list[float]] = []
    for i, entry in enumerate(entries):
        itself = {bank.rows[entry.id]} if entry.id in bank.rows else set()
        chosen: dict[int, float] = {}
        lists = ([by_words] if by_text else []) + (
            [by_pixels] if by_pixels is not None and entry.split in by_image else []
        )
        for result in lists:
            score = dict(zip(result.rows[i].tolist(), result.scores[i].tolist(), strict=True))
            ordered = result.rows[i]
            if decay < 1 and result is by_words:
                others = [row for row in ordered.tolist() if row not in itself]
                ordered = cover(others, bank.vectors, queries[i], decay, count)
            new = select_documents(
                ordered,
                bank.vectors,
                count,
                query=np.asarray(own[i]),
                exclude=itself | chosen.keys(),
                max_similarity=max_similarity,
            )
            chosen |= {row: score[row] for row in new}
        found.append([bank.entries[row].id for row in chosen])
        scores.append(list(chosen.values()))
    return found, scores
