"""Subcommands of ``python -m magma_jax.retrieval``."""

import argparse
import sys
from collections.abc import Callable

import numpy as np

from magma_jax.data.documents.annotation import open_annotation
from magma_jax.data.documents.bank import MemoryBank, open_bank
from magma_jax.data.images import ImageInput
from magma_jax.output import printable
from magma_jax.retrieval.annotate import annotate, check_encoder
from magma_jax.retrieval.build import build_bank
from magma_jax.retrieval.encoders import open_encoder
from magma_jax.retrieval.recall import pair_recall
from magma_jax.retrieval.search import ExactIndex, Index, make_index, recall_at
from magma_jax.retrieval.sources import open_documents
from magma_jax.typing import Float

# Queries of a bank by its own documents, to measure recall.
RECALL_QUERIES = 256


def _build(options: argparse.Namespace) -> int:
    documents = open_documents(options.data, options.split, options.codes, options.cache_dir)
    encoder = open_encoder(options.encoder, options.weights)
    count = build_bank(
        documents, encoder, options.out, splits=_names(options.splits), with_evaluation=options.with_evaluation
    )
    print(f"{options.out}: {count:,} documents, vectors of {encoder.width} entries by {encoder.name}")
    return 0


def _annotate(options: argparse.Namespace) -> int:
    documents = open_documents(options.data, options.split, cache_dir=options.cache_dir)
    bank = open_bank(options.bank)
    encoder = open_encoder(options.encoder, options.weights)
    check_encoder(bank, encoder)
    index = make_index(bank.vectors, options.method)
    count = annotate(
        documents,
        bank,
        encoder,
        index,
        options.out,
        splits=_names(options.splits),
        count=options.documents,
        by_text=not options.images_only,
        by_image=_names(options.splits if options.images_only else options.by_image),
        candidates=options.candidates,
        max_similarity=options.max_similarity,
        dropout=options.dropout,
        decay=options.decay,
        seed=options.seed,
        with_evaluation=options.with_evaluation,
    )
    found = [len(one) for one in open_annotation(options.out).documents.values()]
    print(f"{options.out}: {count:,} samples, {np.mean(found):.1f} documents each, at least {min(found)}")
    if options.recall:
        rows = np.unique(np.linspace(0, len(bank) - 1, RECALL_QUERIES).astype(int))
        _print_recall(bank, index, np.asarray(bank.vectors[rows], np.float32), options.documents)
    return 0


def _search(options: argparse.Namespace) -> int:
    bank, encoder = open_bank(options.bank), open_encoder(options.encoder, options.weights)
    check_encoder(bank, encoder)
    if not options.text and not options.image:
        raise ValueError("give a text to search by, or --image FILE")
    index = make_index(bank.vectors, options.method)
    queries = encoder.texts(options.text)
    if options.image:
        pixels = np.stack([ImageInput(path).pixels(encoder.image_size) for path in options.image])
        queries = np.concatenate([queries, encoder.images(pixels)])
    found = index.search(queries, options.k)
    for name, rows, scores in zip([*options.text, *map(str, options.image)], found.rows, found.scores, strict=True):
        print(printable(name))
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            if row >= 0:
                entry = bank.entries[row]
                print(f"  {score:.4f}  {printable(entry.id)}  {printable(entry.text)}")
    if options.recall:
        _print_recall(bank, index, queries, options.k)
    return 0


def _fit(options: argparse.Namespace) -> int:
    from magma_jax.retrieval.bi_encoder import fit_projection  # here: other commands need no networks

    documents = open_documents(options.data, options.split, cache_dir=options.cache_dir)
    count = fit_projection(documents, options.out, splits=_names(options.splits), ridge=options.ridge)
    print(f"{options.out}: fitted to {count:,} pairs of {documents.name}")
    return 0


def _recall(options: argparse.Namespace) -> int:
    documents = open_documents(options.data, options.split, cache_dir=options.cache_dir)
    encoder = open_encoder(options.encoder, options.weights)
    found = pair_recall(documents, encoder, options.k, _names(options.splits))
    print(
        f"{encoder.name}, {found.pairs:,} pairs: recall@{options.k} of images by text {found.by_text:.3f}, "
        f"of texts by image {found.by_image:.3f}; by chance {min(options.k / found.pairs, 1):.3f}"
    )
    return 0


def _print_recall(bank: MemoryBank, index: Index, queries: Float[np.ndarray, "Q D"], k: int) -> None:
    exact = ExactIndex(bank.vectors).search(queries, k)
    share = recall_at(index.search(queries, k).rows, exact.rows)
    print(f"recall@{k} against exact search, {len(queries)} queries: {share:.4f}", file=sys.stderr)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


# Functions by subcommand; each returns the exit status.
RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "build": _build,
    "annotate": _annotate,
    "search": _search,
    "fit": _fit,
    "recall": _recall,
}
