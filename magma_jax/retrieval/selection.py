"""Which of the best documents are used: by score, but not too similar to the query or to each other."""

import hashlib
from collections.abc import Collection, Sequence

import numpy as np

from magma_jax.retrieval.vectors import unit
from magma_jax.typing import Float, Int

# Documents more similar than this to the query's document or a chosen one are left out (section 2.1: "relevance score
# of at most 0.9"; of documents, since a text never scores that high against the mean of text and image).
MAX_SIMILARITY = 0.9
# Share of a query's words that are left out before it is encoded (section 2.1).
QUERY_DROPOUT = 0.2


def select_documents(
    candidates: Sequence[int] | Int[np.ndarray, " C"],
    vectors: np.ndarray,
    count: int,
    *,
    query: Float[np.ndarray, " D"] | None = None,
    exclude: Collection[int] = (),
    max_similarity: float = MAX_SIMILARITY,
) -> list[int]:
    """Up to ``count`` of the candidates, in their order.

    Args:
        candidates: rows, best first; -1 is none.
        vectors: (N, D), of all documents.
        count: number of documents.
        query: vector of the query's own document, if it is known.
        exclude: rows that may not be chosen: the query itself, and those chosen for it elsewhere.
        max_similarity: largest cosine between two documents.
    """
    chosen: list[int] = []
    kept = [unit(np.asarray(query, np.float32)[None])[0]] if query is not None else []
    kept += [unit(np.asarray(vectors[row], np.float32)[None])[0] for row in exclude]
    for row in (int(one) for one in candidates):
        if len(chosen) == count:
            break
        if row < 0 or row in exclude:
            continue
        vector = unit(np.asarray(vectors[row], np.float32)[None])[0]
        if any(float(vector @ other) > max_similarity for other in kept):
            continue
        chosen.append(row)
        kept.append(vector)
    return chosen


def cover(
    candidates: Sequence[int] | Int[np.ndarray, " C"],
    vectors: np.ndarray,
    query: Float[np.ndarray, " D"],
    decay: float,
    count: int,
) -> list[int]:
    """The candidates reordered so that the first ``count`` together contain what the query asks for.

    Each is the best for a query whose entries that those before it have, too, are multiplied by ``decay``: of two
    people's skin tones, the first document may have the left one and the second one the right one.
    """
    left = [int(row) for row in candidates if row >= 0]
    found = np.asarray(vectors[left], np.float32)
    query, order = np.array(query, np.float32), []
    for _ in range(min(count, len(left))):
        scores = found @ query
        scores[order] = -np.inf
        order.append(int(scores.argmax()))
        query = np.where(found[order[-1]] * query > 0, decay * query, query)
    chosen = [left[place] for place in order]
    return chosen + [row for row in left if row not in set(chosen)]


def drop_words(text: str, name: str, rate: float = QUERY_DROPOUT, seed: int = 0) -> str:
    """A text without some of its words, drawn by its ``name``, so that a restarted command draws the same.

    At least one word is kept.
    """
    words = text.split()
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    draws = rng.random(len(words))
    kept = [word for word, draw in zip(words, draws, strict=True) if draw >= rate]
    return " ".join(kept or words[int(np.argmax(draws)) :][:1]) if words else text
