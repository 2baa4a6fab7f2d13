"""The optimizer's state as release 0.1 laid it out, with two groups of fixed names, ``rest`` and ``encoder``.

    opt_state/1/inner_states/rest/inner_state/0/mu/PATH      first moments; likewise nu/PATH and the count of updates
    opt_state/1/inner_states/rest/inner_state/2/count        count of the schedule, the same number

Today a group is named after its roles (``training.step.optim``). Both groups were always present, even if empty.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from magma_jax.storage.array_files import open_item
from magma_jax.storage.deferred import read_array

# Without gradient clipping the groups are one level higher.
_OLD = re.compile(r"opt_state(/1)?/inner_states/(rest|encoder)/inner_state/0/(count|(?P<moment>mu|nu)/(?P<path>.*))")


def is_of_first_release(folder: Path) -> bool:
    """Whether an ``optimizer`` item has that layout."""
    return any("/inner_states/rest/" in name for name in open_item(folder))


def read_optimizer(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads an ``optimizer`` item of that layout into the tree, dtypes and shardings of ``wanted``.

    Raises:
        ValueError: moments that are missing or of another shape.
    """
    stored = open_item(folder)
    matches = {name: match for name in stored if (match := _OLD.fullmatch(name))}
    moments = {(match["moment"], match["path"]): stored[name] for name, match in matches.items()}
    counts = {name: stored[name] for name in matches if name.endswith("/count")}

    def find(keys: tuple[Any, ...]) -> Any:
        names = [getattr(key, "name", getattr(key, "key", "")) for key in keys]
        if names[0] != "opt_state":
            return stored[names[0]]
        return next(iter(counts.values())) if names[-1] == "count" else moments[names[-2], names[-1]]

    def read(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        try:
            array = find(keys)
        except KeyError:
            raise ValueError(f"{jax.tree_util.keystr(keys)} is not in a checkpoint of release 0.1") from None
        if tuple(array.shape) != tuple(leaf.shape):
            raise ValueError(f"{jax.tree_util.keystr(keys)} has the shape {array.shape} in place of {leaf.shape}")
        whole = np.asarray(read_array(array), leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda part: whole[part])

    return jax.tree.map_with_path(read, dict(wanted))
