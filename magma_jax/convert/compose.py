"""Composes a trainable MAGMA model from a published language model and a published image encoder.

Both are read one tensor at a time. The language model is stored once, in ``model.lm.dtype``; runs that start from the
folder refer to it (``base`` in a run's config). Adapters, prefix and head are initialised from the config's seed, with
the same values as in a run of that config.
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax

from magma_jax.config import ConfigError, to_dict
from magma_jax.families.magma import MAGMA
from magma_jax.models.magma import MagmaConfig
from magma_jax.nn.modules import abstract, parameter_count, split
from magma_jax.published.language_model_sources import read_tokenizer
from magma_jax.storage.hashing import hashing
from magma_jax.storage.hub import local_path
from magma_jax.storage.model_folder import CheckpointError, nbytes_of, write_model_folder
from magma_jax.storage.progress import writing
from magma_jax.training.run.config import RunConfig, completed
from magma_jax.training.run.pretrained import open_weights
from magma_jax.training.run.program import create_model
from magma_jax.training.run.setup import check_begin
from magma_jax.training.step.optim import label_parameters, partition
from magma_jax.typing import Params
from magma_jax.version import __version__


@dataclasses.dataclass(frozen=True)
class Composition:
    """Parameter counts of a composed model, by how a run of its config treats them."""

    frozen: int
    trainable: int
    fresh: int


def compose(config: RunConfig, lm: str, encoder: str, out: str | Path) -> Composition:
    """Writes a model folder to start runs from.

    Args:
        config: run config; only its model and seed are used.
        lm: a language model, see ``published.language_model_sources``: folder, file or ``hf://`` address.
        encoder: an image encoder, see ``published.encoder_sources``: file or ``hf://`` address, or a name in
            ``training.run.pretrained.SOURCES``.
        out: the model folder; must not exist.

    Raises:
        ConfigError: not the config of a MAGMA model, or sources that do not fit it. CheckpointError: ``out`` already
        exists, or the disk is too small. HubError, WeightFileError, TorchFileError, KeyMapError, LanguageModelError: a
        source that cannot be read.
    """
    if not isinstance(config.model, MagmaConfig):
        raise ConfigError(f"compose: the config's model is a {config.model.kind}, but a magma is composed")
    if Path(out).exists():  # checked again before writing; this check comes before downloading 12 GB
        raise CheckpointError(f"{out}: already exists; choose another name or remove it first")
    lm_path = local_path(lm)
    tokenizer = read_tokenizer(lm_path, config.model.lm)
    check_begin(tokenizer, config.model.begin)
    _, shapes, types = abstract(functools.partial(create_model, MAGMA, config))
    names = {"lm": str(lm_path), "image_prefix/encoder": encoder}
    with open_weights(MAGMA, config.model, names, shapes) as pretrained:
        fresh = _fresh(config, [path for path in shapes if path not in pretrained.params])
        params = {path: {**pretrained.params, **fresh}[path] for path in shapes}
        files = [file for group in pretrained.files.values() for file in group]
        with hashing(files) as digest_of, writing(out, nbytes_of(params)) as progress:

            def metadata() -> dict[str, Any]:
                sources = {
                    prefix: {
                        "from": {"lm": lm, "image_prefix/encoder": encoder}[prefix],
                        **_commit(group),
                        "sha256": {_name(file, lm_path): digest_of(file) for file in group},
                    }
                    for prefix, group in pretrained.files.items()
                }
                return {
                    "model": to_dict(config.model),
                    "groups": to_dict(config.optim)["groups"],
                    "source": {**sources, "seed": config.seed},
                    "magma_jax": __version__,
                }

            write_model_folder(out, metadata, params, lambda folder: tokenizer.save(folder / "tokenizer"), progress)
    trainable, frozen, _ = partition(shapes, label_parameters(types, completed(MAGMA, config).optim.groups))
    return Composition(parameter_count(frozen), parameter_count(trainable), parameter_count(fresh))


def _fresh(config: RunConfig, paths: list[str]) -> Params:
    def create() -> Params:
        params = split(create_model(MAGMA, config))[1]
        return {path: params[path] for path in paths}

    # Under jit only the returned parameters are computed; the pretrained parts are not initialised.
    return jax.jit(create)()


def _name(file: Path, folder: Path) -> str:
    """File name, relative to the folder if the file is inside it."""
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) and file != folder else file.name


def _commit(files: tuple[Path, ...]) -> dict[str, str]:
    """Commit of files in the hub's cache."""
    found = re.search(r"/snapshots/([0-9a-f]{40})/", files[0].as_posix()) if files else None
    return {"commit": found[1]} if found else {}
