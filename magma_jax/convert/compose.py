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
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.families.magma import MAGMA
from magma_jax.models.magma import MagmaConfig
from magma_jax.nn.modules import abstract, parameter_count, split
from magma_jax.output import object_address
from magma_jax.published.language_model_sources import read_tokenizer
from magma_jax.storage.hashing import hashing
from magma_jax.storage.hub import local_path
from magma_jax.storage.model_folder import (
    BASE,
    MODEL_FILE,
    CheckpointError,
    base_reference,
    nbytes_of,
    open_params,
    read_model_json,
    write_model_folder,
)
from magma_jax.storage.objects.copies import new_folder
from magma_jax.storage.progress import writing
from magma_jax.training.run.config import RunConfig, completed
from magma_jax.training.run.continuation import differences
from magma_jax.training.run.pretrained import open_weights
from magma_jax.training.run.program import create_model
from magma_jax.training.run.setup import check_begin
from magma_jax.training.step.optim import FROZEN, label_parameters, partition
from magma_jax.typing import Params
from magma_jax.version import __version__


@dataclasses.dataclass(frozen=True)
class Composition:
    """Parameter counts of a composed model, by how a run of its config treats them."""

    frozen: int
    trainable: int
    fresh: int


def compose(config: RunConfig, lm: str, encoder: str | None, out: str | Path) -> Composition:
    """Writes a model folder to start runs from.

    A language model in a model folder, such as another composed one, is not copied: the new folder refers to it.

    Args:
        config: run config; only its model and seed are used.
        lm: a language model, see ``published.language_model_sources``: folder, file or ``hf://`` address.
        encoder: an image encoder, see ``published.encoder_sources``: file or ``hf://`` address, or a name in
            ``training.run.pretrained.SOURCES``; None for an NF-ResNet that starts from fresh weights.
        out: the model folder, also an address in object storage, as of the sources; must not exist.

    Raises:
        ConfigError: not the config of a MAGMA model, or sources that do not fit it. CheckpointError: ``out`` already
        exists, or the disk is too small. HubError, WeightFileError, TorchFileError, KeyMapError, LanguageModelError: a
        source that cannot be read.
    """
    if not isinstance(config.model, MagmaConfig):
        raise ConfigError(f"compose: the config's model is a {config.model.kind}, but a magma is composed")
    if Path(out).exists():  # checked again before writing; this check comes before downloading 12 GB
        raise CheckpointError(f"{out}: already exists; choose another name or remove it first")
    with new_folder(out) as folder:
        return _compose(config, lm, encoder, folder, out)


def _compose(config: RunConfig, lm: str, encoder: str | None, folder: Path, out: str | Path) -> Composition:
    """Writes ``folder``, which will be at ``out``."""
    lm_path = local_path(lm)
    groups, kind = completed(MAGMA, config).optim.groups, config.model.encoder.kind
    if encoder is None and (kind != "nf_resnet" or groups["encoder"] == FROZEN):
        how = "frozen" if groups["encoder"] == FROZEN else "trained"
        raise ConfigError(
            f"compose: give --encoder; only a trained nf_resnet starts from fresh weights, this is a {how} {kind}"
        )
    _, shapes, types = abstract(functools.partial(create_model, MAGMA, config))
    shared = _shared_lm(config, lm_path, shapes) if (lm_path / MODEL_FILE).is_file() else set()
    tokenizer = Tokenizer.load(lm_path / "tokenizer") if shared else read_tokenizer(lm_path, config.model.lm)
    check_begin(tokenizer, config.model.begin)
    names = {} if shared else {"lm": str(lm_path)}
    names |= {} if encoder is None else {"image_prefix/encoder": encoder}
    with open_weights(MAGMA, config.model, names, shapes) as pretrained:
        fresh = _fresh(config, [path for path in shapes if path not in pretrained.params and path not in shared])
        params = {path: {**pretrained.params, **fresh}[path] for path in shapes if path not in shared}
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
                    **({BASE: base_reference(lm if object_address(lm) else lm_path, out, lm_path)} if shared else {}),
                    "model": to_dict(config.model),
                    "groups": to_dict(config.optim)["groups"],
                    "source": {**sources, "seed": config.seed},
                    "magma_jax": __version__,
                }

            write_model_folder(folder, metadata, params, lambda made: tokenizer.save(made / "tokenizer"), progress)
    trainable, frozen, _ = partition(shapes, label_parameters(types, groups))
    return Composition(parameter_count(frozen), parameter_count(trainable), parameter_count(fresh))


def _shared_lm(config: RunConfig, folder: Path, shapes: Params) -> set[str]:
    """Paths of the language model, without adapters, that a model folder has for this config.

    Raises:
        ConfigError: it has another language model.
    """
    theirs, ours = read_model_json(folder)["model"].get("lm"), to_dict(config.model)["lm"]
    changed = differences(theirs, ours) if isinstance(theirs, dict) else {"kind": ()}
    paths = {path for path in shapes if path.startswith("lm/") and not re.fullmatch(MAGMA.fresh, path)}
    stored = open_params(folder)
    lacking = [path for path in paths if path not in stored or tuple(stored[path].shape) != shapes[path].shape]
    if changed or lacking:
        named = ", ".join([*(f"lm.{name}" for name in changed), *lacking][:3])
        raise ConfigError(f"compose: {folder} holds another language model ({named} differ); take its source for --lm")
    return paths


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
