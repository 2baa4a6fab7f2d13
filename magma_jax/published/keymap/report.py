"""Collects all mismatches for a single error."""

from collections import defaultdict

import numpy as np

from magma_jax.output import printable
from magma_jax.storage.deferred import Tensor

# Lines per kind in a message; another model can differ in thousands of names.
MAX_LINES = 500

_HINTS = {
    "keys that no rule knows": "is the checkpoint of another model or configuration?",
    "keys that several entries match": "make the table's patterns exclude each other",
    "keys that several entries write": "make the table's patterns exclude each other",
    "keys whose parameter the model lacks": "the checkpoint has a part that the configuration leaves out",
    "two keys for one parameter": "the checkpoint holds two layouts at once, or the table is wrong",
    "parameters without a tensor": "the configuration has a part that the checkpoint lacks",
    "parameters that no rule knows": "the table lacks a rule for this part of the model",
    "parameters that several rules match": "make the table's patterns exclude each other",
    "wrong shapes": "another model size or vocabulary? compare the configuration",
    "wrong dtypes": "only floats may become floats of another width, and only if casting is allowed",
    "gaps in stacks": "another number of layers, or an incomplete checkpoint?",
    "aliases that differ": "the checkpoint contradicts itself: two names of one tensor hold different values",
    "aliases of nothing": "the tensor that they repeat is not there",
}


class KeyMapError(ValueError):
    """All mismatches between a table, a checkpoint and a model, one line each, grouped by kind."""


class Report:
    """Problems by kind; ``raise_if_any`` raises them as one KeyMapError."""

    def __init__(self):
        self._problems: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, line: str) -> None:
        """Records one problem of a kind listed above."""
        assert kind in _HINTS, kind
        self._problems[kind].append(line)

    def raise_if_any(self) -> None:
        """Raises KeyMapError if there are any problems."""
        if self._problems:
            groups = ("\n  ".join(self._lines(kind)) for kind in self._problems)
            raise KeyMapError(printable("names and tensors do not fit:\n" + "\n".join(groups)))

    def _lines(self, kind: str) -> list[str]:
        lines = self._problems[kind]
        more = [f"... and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
        return [f"{len(lines)} {kind} ({_HINTS[kind]}):", *lines[:MAX_LINES], *more]


def describe(tensor: Tensor) -> str:
    """Shape and dtype as ``float16[64,32]``."""
    return f"{np.dtype(tensor.dtype).name}[{','.join(map(str, tensor.shape))}]"
