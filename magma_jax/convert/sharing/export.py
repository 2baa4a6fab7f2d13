"""Exports a run or a model folder of any family as one folder that needs no other."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from magma_jax.config import to_dict
from magma_jax.convert.open_folder import open_checkpoint
from magma_jax.convert.sharing.model_card import model_card
from magma_jax.storage.exported_weights import EXPORTED_FILE
from magma_jax.storage.model_folder import (
    BASE,
    BUFFER_FILE,
    CARD_FILE,
    TORCH_FILE,
    CheckpointError,
    nbytes_of,
    read_model_json,
    write_model_folder,
)
from magma_jax.storage.progress import writing
from magma_jax.storage.safetensors_file import write_safetensors
from magma_jax.version import __version__

Format: TypeAlias = Literal["safetensors", "params"]

# Entries of model.json that a run needs to be continued, and an export does not.
_OF_A_RUN = (BASE, "groups")


def export(
    folder: str | Path, out: str | Path, form: Format = "safetensors", *, ema: bool | None = None
) -> dict[str, int]:
    """Writes the weights of a run's result step, or of a model folder, with config, vocabulary and model card.

    Frozen parameters that the folder has from its base are written too. Opening the result gives the same bits.

    Args:
        folder: run folder or model folder.
        out: the folder to write.
        form: ``safetensors``, one file with the library's own paths as names; or ``params``, as train.py writes them,
            which many processes can read in parts.
        ema: whether to take a run's moving averages; default: whichever the run was validated with.

    Returns:
        the number of parameters by role.

    Raises:
        CheckpointError: no such folder, ``out`` exists, or the disk is too small.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise CheckpointError(f"{out}: already exists; choose another name or remove it first")
    family, config, types, params = open_checkpoint(folder, ema=ema)
    counts: dict[str, int] = {}
    for path, kind in types.items():
        role = getattr(kind, "role", "statistics")
        counts[role] = counts.get(role, 0) + math.prod(params[path].shape)
    about = {key: value for key, value in read_model_json(folder).items() if key not in _OF_A_RUN}
    about |= {"model": to_dict(config), "magma_jax": __version__}

    def write_extras(made: Path) -> None:
        _copy_files(folder, made)
        (made / CARD_FILE).write_text(model_card(out.name, family.name, about, counts, _results(folder)))

    with writing(out, nbytes_of(params)) as progress:
        write = _write_safetensors if form == "safetensors" else None
        write_model_folder(out, about, params, write_extras, progress, write)
    return counts


def _write_safetensors(folder: Path, params: Mapping[str, Any], progress: Callable[[int], None]) -> None:
    write_safetensors(folder / EXPORTED_FILE, params, {"format": "magma_jax"}, progress)


def _copy_files(folder: Path, made: Path) -> None:
    """The vocabulary, and what a conversion back to PyTorch needs."""
    names = [path.relative_to(folder) for path in sorted((folder / "tokenizer").rglob("*")) if path.is_file()]
    for name in (*names, Path(TORCH_FILE), Path(BUFFER_FILE), Path("template.jinja")):
        if (folder / name).is_file():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_bytes((folder / name).read_bytes())


def _results(folder: Path) -> dict[str, Any]:
    """The figures of a run's evaluation; empty if it was not evaluated."""
    try:
        return json.loads((folder / "results.json").read_text())
    except (OSError, ValueError):
        return {}
