"""Pretrained parts by name: where a run's starting weights come from."""

from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from magma_jax.config import ConfigError
from magma_jax.convert import efficientnet_lite
from magma_jax.nn.modules import Params

# Committed with the package; assets/README.md says how it was trained and how to do so again.
QUICKSTART_LM = "assets/quickstart_lm.safetensors"


def load_weights(names: Mapping[str, str], shapes: Mapping[str, Any]) -> Params:
    """Loads the parts of a model that a config names.

    Args:
        names: path prefix to source: a name in ``SOURCES``, or a ``.safetensors`` file whose keys are the paths
            below that prefix.
        shapes: every path of the model, with its shape.

    Raises:
        ConfigError: a source that is unknown, incomplete or of other shapes.
    """
    params: Params = {}
    for prefix, name in names.items():
        below = f"{prefix}/"
        # Adapters sit inside a pretrained language model and start fresh.
        wanted = {
            path.removeprefix(below): shape
            for path, shape in shapes.items()
            if path.startswith(below) and "_adapter/" not in path
        }
        if not wanted:
            raise ConfigError(f"weights.{prefix}: the model has no parameter below {below}")
        loaded = _load(name, f"weights.{prefix}")(wanted)
        differing = sorted(wanted.keys() ^ loaded.keys())
        differing += [path for path in wanted.keys() & loaded.keys() if loaded[path].shape != wanted[path].shape]
        if differing:
            raise ConfigError(
                f"weights.{prefix}: {name} does not fit the model in {len(differing)} tensors, such as "
                f"{', '.join(differing[:5])}; check the model's sizes"
            )
        params |= {below + path: array for path, array in loaded.items()}
    return params


def _quickstart_lm(wanted: Params) -> Params:
    with resources.as_file(resources.files("magma_jax") / QUICKSTART_LM) as path:
        return load_file(path)


# A source is given the paths and shapes that are wanted and returns the arrays it has.
SOURCES: dict[str, Callable[[Params], Params]] = {
    "quickstart_lm": _quickstart_lm,
    "efficientnet_lite0": efficientnet_lite.read_weights,
}


def _load(name: str, where: str) -> Callable[[Params], Params]:
    if name in SOURCES:
        return SOURCES[name]
    if not name.endswith(".safetensors"):
        raise ConfigError(f"{where}: unknown source {name!r}; known: {', '.join(SOURCES)}, or a .safetensors file")
    if not Path(name).is_file():
        raise ConfigError(f"{where}: {name}: no such file")
    return lambda wanted: load_file(name)
