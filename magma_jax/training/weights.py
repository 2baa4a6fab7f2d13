"""Pretrained parts by name: where a run's starting weights come from."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from magma_jax.config import ConfigError
from magma_jax.models import ModelConfig
from magma_jax.nn.modules import Params

# Committed with the package; assets/README.md says how it was trained and how to do so again.
QUICKSTART_LM = "assets/quickstart_lm.safetensors"


def load_weights(names: Mapping[str, str], model: ModelConfig, shapes: Mapping[str, Any]) -> Params:
    """Loads the parts of a model that a config names.

    Args:
        names: path prefix to source: ``quickstart_lm``, ``efficientnet_lite0``, or the path of a
            ``.safetensors`` file whose keys are our paths below that prefix.
        model: the config of the whole model.
        shapes: every path of the model and its shape.

    Raises:
        ConfigError: a source that is unknown, incomplete or of other shapes.
    """
    params: Params = {}
    for prefix, name in names.items():
        wanted = {
            path.removeprefix(f"{prefix}/"): shape for path, shape in shapes.items() if path.startswith(f"{prefix}/")
        }
        if not wanted:
            raise ConfigError(f"weights.{prefix}: the model has no parameter below {prefix}/")
        loaded = _load(name, prefix, model)
        # What is fresh in this model (adapters inside a pretrained language model) is not expected in the file.
        missing = [path for path in wanted if path not in loaded and "_adapter/" not in path]
        wrong = [path for path in wanted if path in loaded and loaded[path].shape != tuple(wanted[path].shape)]
        extra = [path for path in loaded if path not in wanted]
        if missing or wrong or extra:
            raise ConfigError(
                f"weights.{prefix}: {name} does not fit the model; missing: {missing[:5]}, other shape: "
                f"{wrong[:5]}, unknown: {extra[:5]}"
            )
        params |= {f"{prefix}/{path}": array for path, array in loaded.items()}
    return params


def _load(name: str, prefix: str, model: ModelConfig) -> dict[str, np.ndarray]:
    if name == "quickstart_lm":
        with resources.as_file(resources.files("magma_jax") / QUICKSTART_LM) as path:
            return load_file(path)
    if name == "efficientnet_lite0":
        from magma_jax.convert.efficientnet import read_efficientnet_lite0

        return read_efficientnet_lite0()
    if name.endswith(".safetensors"):
        if not Path(name).is_file():
            raise ConfigError(f"weights.{prefix}: {name}: no such file")
        return load_file(name)
    raise ConfigError(f"weights.{prefix}: unknown source {name!r}; name quickstart_lm, efficientnet_lite0 or a file")
