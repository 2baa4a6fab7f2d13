"""Tables of positions of a square grid, resized to another grid as the models' authors do it.

Resizing is linear along each axis, so a table is multiplied by one matrix for its rows and one for its columns; they
equal PyTorch's ``interpolate`` with ``align_corners=False``.
"""

import math
from typing import Literal

import numpy as np

from magma_jax.typing import Float

# Cubic with the coefficient -0.75 on four neighbours (CLIP, SigLIP, DINOv2); cubic with -0.5 (DINOv2 with registers) or
# linear (SigLIP 2 NaFlex) on all that fall into a cell of the new grid.
Resize = Literal["cubic", "smooth cubic", "smooth linear"]


def resized_table(table: Float[np.ndarray, "P D"], side: int, how: Resize) -> Float[np.ndarray, "Q D"]:
    """A table of a square grid for ``side`` x ``side`` positions, in its dtype; unchanged if it has this size.

    Raises:
        ValueError: rows that are no square.
    """
    old = math.isqrt(len(table))
    if old * old != len(table):
        raise ValueError(f"a table of {len(table)} positions is no square")
    if old == side:
        return table
    weights = _weights(old, side, how)
    grid = table.astype(np.float64).reshape(old, old, -1)
    new = np.einsum("ia,jb,abd->ijd", weights, weights, grid, optimize=True)
    return new.reshape(side * side, -1).astype(table.dtype)


def _weights(old: int, new: int, how: Resize) -> Float[np.ndarray, "new old"]:
    scale = old / new
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * scale - 0.5
        if how == "cubic":
            first = math.floor(centre) - 1
            for j in range(first, first + 4):
                # Positions beyond the edge repeat it.
                weights[i, min(max(j, 0), old - 1)] += _cubic(centre - j, -0.75)
        else:
            wide = max(scale, 1.0)
            distances = (np.arange(old) - centre) / wide
            weights[i] = [_cubic(x, -0.5) if how == "smooth cubic" else max(0.0, 1 - abs(x)) for x in distances]
    return weights / weights.sum(1, keepdims=True)


def _cubic(x: float, a: float) -> float:
    """Keys's cubic (1981)."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0
