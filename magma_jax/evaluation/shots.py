"""Which completed examples stand before which question: drawn at random, from a seed that is stored."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np


def draw_shots(
    pool: int,
    shots: int,
    seed: int,
    queries: Sequence[str] | None,
    allowed: Callable[[int, int], bool] = lambda query, shot: True,
) -> list[list[int]]:
    """Rows of the shots of every query, all different, the one next to the question last.

    The draw depends on the seed and the query's id alone: fewer queries, or in another order, have the same shots.
    Fewer shots are the last ones of more, so that numbers of shots can be compared in pairs.

    Args:
        pool: how many examples there are to draw from.
        shots: how many each query gets.
        seed: of the draw.
        queries: ids of the queries; None for one draw that serves all.
        allowed: whether a query (by position) may see an example (by row): never its own picture.

    Raises:
        ValueError: the pool is too small.
    """
    if not shots:
        return [[] for _ in queries or [""]]
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
