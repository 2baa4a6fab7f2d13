"""Where a run starts: fresh, from pretrained parts, or from a base folder whose frozen parameters are not copied."""

from pathlib import Path
from typing import Any

from magma_jax.config import ConfigError, from_dict, to_dict
from magma_jax.convert.deferred import read_array
from magma_jax.nn.modules import Params
from magma_jax.sharding import place
from magma_jax.training.checkpoint import CHECKPOINTS
from magma_jax.training.config import RunConfig
from magma_jax.training.continuation import differences
from magma_jax.training.model_folder import BASE, base_reference, read_model_json, read_params
from magma_jax.training.program import Program
from magma_jax.training.weights import open_weights

# What a run's model may have otherwise than its base: how it is run and stored, and how fresh parts would begin.
MAY_DIFFER = ("dtype", "lm.dtype", "lm.embedding_std", "prefix.dropout", "mlp_adapter.init", "attn_adapter.init")


def starting_params(program: Program) -> tuple[Params, dict[str, Any]]:
    """The parameters that a run starts with, and what its ``model.json`` says of those that it will not hold itself.

    With a base, frozen parameters are left out, unless they are needed to compute the statistics of features.

    Raises:
        ConfigError: weights or a base that do not fit the model. CheckpointError: no model folder.
    """
    config, shapes = program.config, program.params
    if config.base is not None:
        _check_base(config)
        needed = shapes if "image_prefix/feature_mean" in shapes else own_paths(program)
        return read_params(config.base, {path: shapes[path] for path in needed}), {BASE: base_reference(config.base)}
    params: Params = {}
    with open_weights(config.model, config.weights, shapes) as pretrained:
        for path, tensor in pretrained.params.items():  # one at a time on its way to the devices
            params |= place({path: read_array(tensor)}, {path: shapes[path]})
    return params | program.fresh_params([path for path in shapes if path not in params]), {}


def own_paths(program: Program) -> list[str]:
    """The parameters that a run's folder holds: all, or those that are not frozen if it has a base."""
    everything = program.config.base is None
    return [path for path in program.params if everything or program.labels[path] != "frozen"]


def _check_base(config: RunConfig) -> None:
    base = Path(config.base or "")
    if (base / CHECKPOINTS).is_dir():
        raise ConfigError(
            f"base: {base} is a run, whose frozen and trained parts lie apart; make a model folder of it first "
            "(python -m magma_jax.convert to-torch, then from-torch)"
        )
    theirs = to_dict(from_dict(type(config.model), read_model_json(base)["model"], f"{base}: model"))
    changed = [name for name in differences(theirs, to_dict(config.model)) if name not in MAY_DIFFER]
    if changed:
        raise ConfigError(
            f"base: {base} holds another model ({', '.join(changed[:5])} differ); compose one from this config"
        )
