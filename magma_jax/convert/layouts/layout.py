"""What converting and verifying a family's published layout takes, and parts that families share."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magma_jax.config import to_dict
from magma_jax.convert.magma_checkpoint import absent, is_json
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.foreign import ForeignError, read_json, shown
from magma_jax.storage.deferred import alias_key
from magma_jax.storage.hashing import hashing
from magma_jax.storage.model_folder import TORCH_FILE, CheckpointError, nbytes_of, write_model_folder
from magma_jax.storage.progress import writing
from magma_jax.storage.torch.writer import write_torch_file
from magma_jax.version import __version__

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Functions of a published layout.

    Attributes:
        from_torch: ``(checkpoint, out, model_config, tokenizer)`` writes a model folder; returns a line that describes
            the model. ``model_config`` holds values that tensors cannot tell, ``tokenizer`` the vocabulary; both may be
            None.
        to_torch: ``(folder, checkpoint)`` writes the file again, bit for bit.
        params: a folder's parameters by path, lazy where possible.
        published: a folder's tensors by their published names.
        golden_inputs: names of a golden file's arrays that are inputs.
        quantities: ``(checkpoint, arrays, model_config)`` to names and values, computed from the inputs, for comparison
            with the arrays of the same names. The model runs in fp32.
    """

    from_torch: Callable[[str | Path, str | Path, Settings | None, Tokenizer | None], str]
    to_torch: Callable[[str | Path, str | Path], None]
    params: Callable[[str | Path], Mapping[str, Any]]
    published: Callable[[str | Path], Mapping[str, Any]]
    golden_inputs: frozenset[str]
    quantities: Callable[[Path, Mapping[str, np.ndarray], Settings | None], Iterator[tuple[str, Any]]]


def write_folder(
    checkpoint: str | Path,
    out: str | Path,
    config: Any,
    params: Mapping[str, Any],
    files: Sequence[Path],
    source: Mapping[str, Any],
    write_extras: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Writes an open checkpoint as a model folder.

    Args:
        checkpoint: name of the source.
        out: the folder; must not exist.
        config: config of the model.
        params: path to lazy tensor.
        files: files of the source, whose hashes are recorded.
        source: JSON values for ``read_source``; ``counters``, which may hold anything, keeps what JSON can hold.
        write_extras: adds files such as a tokenizer.

    Raises:
        CheckpointError: ``out`` already exists, or the disk is too small.
    """
    absent_folder(out)
    counters = {key: value for key, value in source["counters"].items() if is_json(value)}
    if dropped := sorted(set(source["counters"]) - set(counters), key=str):
        print(f"{checkpoint}: dropped, not weights: {', '.join(map(shown, dropped[:20]))}", file=sys.stderr)

    def extras(folder: Path) -> None:
        (folder / TORCH_FILE).write_text(json.dumps({**source, "counters": counters}))
        write_extras(folder)

    with hashing(files) as digest_of, writing(out, nbytes_of(params)) as progress:

        def metadata() -> dict[str, Any]:
            sums = {file.name: digest_of(file) for file in files}
            described = {"file": Path(checkpoint).name, "sha256": sums}
            return {"model": to_dict(config), "source": described, "magma_jax": __version__}

        write_model_folder(out, metadata, params, extras, progress)


def read_source(folder: str | Path) -> dict[str, Any]:
    """The ``source`` of ``write_folder``; without counters and keys for a model that was trained here.

    Raises:
        CheckpointError: a damaged file.
    """
    file = Path(folder) / TORCH_FILE
    if not file.exists():
        return {"counters": {}, "keys": []}
    try:
        source = read_json(file)
        if not isinstance(source["counters"], dict) or not all(isinstance(key, str) for key in source["keys"]):
            raise ForeignError("does not hold counters and keys")
    except (OSError, ForeignError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}; convert the checkpoint again") from None
    return source


def in_order(module: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Tensors in the order of ``keys``, others last."""
    order = {key: i for i, key in enumerate(keys)}
    return dict(sorted(module.items(), key=lambda item: order.get(item[0], len(order))))


def write_checkpoint(checkpoint: str | Path, module: Mapping[str, Any], counters: Mapping[str, Any]) -> None:
    """Writes tensors as ``state_dict`` of a PyTorch file, and the values beside it.

    Raises:
        FileExistsError: ``checkpoint`` already exists. OutputError: the disk is too small.
    """
    absent(checkpoint)
    with writing(checkpoint, nbytes_of({alias_key(tensor): tensor for tensor in module.values()})) as progress:
        write_torch_file(checkpoint, {"state_dict": dict(module), **counters}, progress)


def absent_folder(path: str | Path) -> None:
    """Raises CheckpointError if there is something at ``path``."""
    if Path(path).exists():
        raise CheckpointError(f"{path}: already exists; choose another name or remove it first")
