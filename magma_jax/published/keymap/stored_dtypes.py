"""Dtypes of our parameters as a foreign checkpoint stores them, so that conversion keeps every bit."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from magma_jax.published.keymap.patterns import fill
from magma_jax.published.keymap.report import KeyMapError
from magma_jax.published.keymap.rules import Rule, Table, match_theirs


def in_stored_dtypes(shapes: Mapping[str, Any], table: Table, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """``shapes`` in the floating dtypes of ``tensors``, which may differ between parameters.

    Raises:
        KeyMapError: layers of one parameter have different dtypes.
    """
    found: dict[str, dict[np.dtype, str]] = {}
    for key, tensor in tensors.items():
        for rule in table:
            if isinstance(rule, Rule) and (values := match_theirs(rule, key)) is not None:
                found.setdefault(fill(rule.ours, values, "/"), {}).setdefault(tensor.dtype, key)
    mixed = [" and ".join(f"{key} {dtype.name}" for dtype, key in by.items()) for by in found.values() if len(by) > 1]
    if mixed:
        raise KeyMapError(
            "layers of one parameter have different dtypes, which a stack cannot hold: " + "; ".join(mixed)
        )
    return {
        path: jax.ShapeDtypeStruct(shape.shape, next(iter(found[path])))
        if path in found and np.issubdtype(shape.dtype, np.floating) and "float" in next(iter(found[path])).name
        else shape
        for path, shape in shapes.items()
    }
