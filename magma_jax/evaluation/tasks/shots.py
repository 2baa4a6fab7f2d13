"""Random selection of the shots of every query, from a stored seed."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from magma_jax.data.batches.stored_images import StoredImages
from magma_jax.data.format.records import DataError
from magma_jax.evaluation.tasks.examples import Example, Examples, image_marks
from magma_jax.evaluation.tasks.task import TaskConfig


class Shot(NamedTuple):
    """A completed example, and its row in the pool."""

    row: int
    example: Example


def choose_shots(task: TaskConfig, queries: Examples, pool: Examples, examples: Sequence[Example]) -> list[list[Shot]]:
    """The shots of every query; a single list if they are shared.

    No query sees its own image, nor the same image under another name or in another folder.

    Args:
        task: config of the task.
        queries: source of ``examples``.
        pool: source of the shots.
        examples: the queries.

    Raises:
        DataError: the pool is too small, or has an example without an answer.
    """
    shared = task.shot_policy == "run"
    if not task.shots:
        return [[] for _ in examples[: 1 if shared else None]]
    if shared and pool is queries:
        raise DataError("shots of a whole run may not come from the questions themselves; give --shot-data")
    stored = all(isinstance(source.images, StoredImages) for source in (queries, pool))
    marks_asked = functools.cache(lambda row: image_marks(queries.images, row, stored=stored))
    marks_shown = functools.cache(lambda row: image_marks(pool.images, row, stored=stored))
    ids, asked = [example.id for example in examples], [marks_asked(example.image) for example in examples]
    if shared:
        ids, asked = None, [frozenset().union(*asked)]
    try:
        rows = draw_shots(
            len(pool), task.shots, task.seed, ids, lambda i, row: marks_shown(pool.image(row)).isdisjoint(asked[i])
        )
    except ValueError as error:
        raise DataError(f"{pool.name}: {error}") from None
    shots = [[Shot(row, pool.shot(row)) for row in chosen] for chosen in rows]
    bare = next((shot.example.id for chosen in shots for shot in chosen if not shot.example.answers), None)
    if bare is not None:
        raise DataError(f"{pool.name}: example {bare} has no answer to show; take shots from a split with answers")
    return shots


def draw_shots(
    pool: int,
    shots: int,
    seed: int,
    queries: Sequence[str] | None,
    allowed: Callable[[int, int], bool] = lambda query, shot: True,
) -> list[list[int]]:
    """Rows of the shots of every query, without repetition; the shot next to the question is last.

    The selection depends only on the seed and the query's id, so a subset or another order of queries has the same
    shots. Fewer shots are the last ones of more, so that numbers of shots can be compared in pairs.

    Args:
        pool: size of the pool.
        shots: shots per query.
        seed: random seed.
        queries: ids of the queries; None for one selection shared by all.
        allowed: whether a query (by position, 0 if shared) may see an example (by row).

    Raises:
        ValueError: the pool is too small.
    """
    drawn = []
    for number, query in enumerate([""] if queries is None else queries):
        digest = hashlib.blake2b(query.encode(), digest_size=16).digest()
        rng = np.random.default_rng([seed, *np.frombuffer(digest, np.uint32).tolist()])
        chosen: list[int] = []
        refused: set[int] = set()
        while len(chosen) < shots:
            if len(chosen) + len(refused) == pool:
                raise ValueError(f"{pool} examples are too few to draw {shots} shots from; give other shot data")
            row = int(rng.integers(pool))
            if row in chosen or row in refused:
                continue
            if allowed(number, row):
                chosen.append(row)
            else:
                refused.add(row)
        drawn.append(chosen[::-1])
    return drawn
