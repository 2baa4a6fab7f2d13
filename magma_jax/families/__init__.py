"""The model families. A new one is a package below this one and one row here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from magma_jax.config import ConfigError, Settings
from magma_jax.data.write.encoding import ImageEncoder
from magma_jax.evaluation import own_split
from magma_jax.families.cm3leon import CM3LEON
from magma_jax.families.language import LANGUAGE
from magma_jax.families.magma import MAGMA
from magma_jax.families.magvlt import MAGVLT
from magma_jax.families.vqgan import VQGAN
from magma_jax.family import Family
from magma_jax.foreign import shown
from magma_jax.inference.generator import Generator, TokenGenerator
from magma_jax.storage.files import holds_weights, open_tensors
from magma_jax.storage.hub import local_path
from magma_jax.storage.model_folder import MODEL_FILE, CheckpointError, read_model_json
from magma_jax.storage.objects.copies import uploading
from magma_jax.training.run.config import RunConfig, completed, read_run_config

FAMILIES: dict[str, Family] = {family.name: family for family in (MAGMA, LANGUAGE, VQGAN, MAGVLT, CM3LEON)}


def family_of(model: Any) -> Family:
    """The family of a model's config.

    Raises:
        ConfigError: no family has models of this type.
    """
    for family in FAMILIES.values():
        if isinstance(model, family.configs):
            return family
    raise ConfigError(f"{type(model).__name__}: no family has such models; there are {', '.join(FAMILIES)}")


def run_config(values: Settings, where: str = "config") -> RunConfig:
    """The config of a run, from nested mappings, for a model of any family.

    Raises:
        ConfigError: an unknown kind of model, or as ``config.from_dict``.
    """
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    kind, kinds = dict(values.get("model") or {}).get("kind"), _families_by_kind()
    if kind not in list(kinds):
        raise ConfigError(f"{where}.model.kind: {shown(kind)} is not one of {', '.join(kinds)}")
    return completed(kinds[kind], read_run_config(kinds[kind], values, where))


def family_of_checkpoint(path: Path) -> Family:
    """The family of a run folder, model folder or weight file in a published layout.

    Raises:
        CheckpointError: no such folder, or a model of no known family. Also the errors of ``open_tensors``.
    """
    if not (path / MODEL_FILE).exists() and holds_weights(path):
        return family_of_weights(path)
    # Folders of the first release may lack the kind.
    model = read_model_json(path)["model"]
    kind = model.get("kind", MAGMA.name) if isinstance(model, dict) else model
    kinds = _families_by_kind()
    if kind not in list(kinds):
        raise CheckpointError(f"{path}: holds a model of kind {shown(kind)}; there are {', '.join(kinds)}")
    return kinds[kind]


def family_of_weights(path: Path) -> Family:
    """The family of a weight file in a published layout; raises as ``open_tensors``."""
    with open_tensors(path) as weights:
        keys = weights.tensors.keys()
        # Of a file that no family recognises, the reader of the first one says what it lacks.
        return next((family for family in FAMILIES.values() if family.recognises(keys)), MAGMA)


def open_generator(
    path: str | Path, *, dtype: str | None = None, mesh: Mesh | None = None, ema: bool | None = None
) -> Generator:
    """Opens a checkpoint of any family for inference.

    Args:
        path: run folder, model folder, weight file, or a ``gs://``, ``s3://`` or ``hf://`` address.
        dtype: dtype of weights and activations; default: the checkpoint's.
        mesh: devices to shard the weights over; default: one device.
        ema: whether to use a run's moving averages of weights; default: whichever the run was validated with.

    Raises:
        CheckpointError: no checkpoint, or one of a family that cannot be opened. Also the errors of the family.
    """
    path = local_path(path)
    return family_of_checkpoint(path).open(path, dtype=dtype, mesh=mesh, ema=ema)


def open_token_generator(
    path: str | Path, *, dtype: str | None = None, mesh: Mesh | None = None, ema: bool | None = None
) -> TokenGenerator:
    """``open_generator`` for autoregressive text models; others are rejected before weights are read."""
    path = local_path(path)
    family = family_of_checkpoint(path)
    if not _opens_token_generator(family):
        names = ", ".join(other.name for other in FAMILIES.values() if _opens_token_generator(other))
        raise CheckpointError(
            f"{path}: a {family.name} model does not write text token by token; give a checkpoint of another family "
            f"({names})"
        )
    return family.open(path, dtype=dtype, mesh=mesh, ema=ema)


def evaluate_run(
    workdir: str | Path,
    split: str = "test",
    limit: int | None = None,
    *,
    overview: str | Path | None = None,
    settings: Sequence[str] = (),
    ema: bool | None = None,
) -> None:
    """Evaluates a run of any family and writes its files, see ``Family.evaluate`` and ``own_split.evaluate_run``.

    Raises:
        ConfigError: an overview or settings that the family's evaluation does not have. Also its own errors.
    """
    with uploading(workdir) as folder:
        family = family_of_checkpoint(folder)
        if family.evaluate is None:
            if settings:
                raise ConfigError(
                    f"--set {settings[0]}: a {family.name} run is evaluated without settings; give a --task"
                )
            own_split.evaluate_run(open_token_generator, folder, split, limit, overview, ema=ema)
            return
        if overview is not None:
            raise ConfigError(f"--overview: a {family.name} run has none; see its report.html")
        family.evaluate(folder, split, limit, settings, ema=ema)


def _opens_token_generator(family: Family) -> bool:
    return family.decode_program is not None and family.token_generator


def open_image_encoder(path: str | Path) -> ImageEncoder:
    """Opens an image tokenizer; other checkpoints are rejected before weights are read.

    Raises:
        CheckpointError: no checkpoint, or one of another family. Also the errors of the family.
    """
    path = local_path(path)
    family = family_of_checkpoint(path)
    if family is not VQGAN:
        raise CheckpointError(f"{path}: holds a {family.name} model, but an image tokenizer is wanted here")
    return family.open(path)


def _families_by_kind() -> dict[str, Family]:
    return {config.kind: family for family in FAMILIES.values() for config in family.configs}
