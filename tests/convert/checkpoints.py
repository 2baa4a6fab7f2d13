"""Checkpoints taken apart and put together again, for tests of the conversion."""

import numpy as np

from magma_jax.storage.torch.reader import open_torch_file, state_dict
from magma_jax.storage.torch.writer import write_torch_file


def contents(path):
    """Counters and tensors as bytes, in the file's order."""
    with open_torch_file(path) as file:
        tensors, counters = state_dict(file.tree)
        bits = [(key, t.dtype, t.shape, np.ascontiguousarray(t.read()).tobytes()) for key, t in tensors.items()]
        groups = {}
        for key, tensor in tensors.items():
            groups.setdefault(tensor.alias_key, set()).add(key)
        return counters, bits, sorted(map(sorted, groups.values()))


def rewrite(source, target, change):
    """Copies a checkpoint after ``change(module)``."""
    with open_torch_file(source) as file:
        tree = dict(file.tree)
        # Names of one storage stay names of one array.
        arrays = {}
        for tensor in tree["module"].values():
            arrays.setdefault(tensor.alias_key, np.array(tensor.read()))
        tree["module"] = {key: arrays[tensor.alias_key] for key, tensor in tree["module"].items()}
    change(tree["module"])
    write_torch_file(target, tree)
    return target
