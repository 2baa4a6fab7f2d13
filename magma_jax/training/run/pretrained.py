"""Sources of pretrained parts by name, for a run's starting weights."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from magma_jax.config import ConfigError
from magma_jax.family import Family
from magma_jax.models.vision import lpips
from magma_jax.published import efficientnet_lite
from magma_jax.storage.files import open_tensors
from magma_jax.storage.hub import local_path
from magma_jax.typing import Params

# Parts of the package; assets/README.md says how to train them again.
QUICKSTART_LM = "assets/quickstart_lm.safetensors"
QUICKSTART_VQGAN = "assets/quickstart_vqgan.safetensors"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Pretrained parameters, read lazily where possible.

    Attributes:
        params: path to array, or to a tensor with ``shape``, ``dtype`` and ``read()``.
        files: path prefix to the files that its parameters are read from; empty for installed packages.
    """

    params: Params
    files: dict[str, tuple[Path, ...]]


@contextlib.contextmanager
def open_weights(
    family: Family, model: Any, names: Mapping[str, str], shapes: Mapping[str, Any]
) -> Iterator[Pretrained]:
    """Opens the pretrained parts that a config names; tensors can be read inside the block.

    Args:
        family: family of the model.
        model: config of the model.
        names: path prefix to source: a name in ``SOURCES``; a ``.safetensors`` file whose keys are the paths below
            that prefix; or published weights, as a file, a folder or an ``hf://`` address, for prefixes that the
            family can open.
        shapes: every path of the model, with its shape.

    Raises:
        ConfigError: a source that is unknown, incomplete or of other shapes. Also the errors of its reader.
    """
    params: Params = {}
    files: dict[str, tuple[Path, ...]] = {}
    with contextlib.ExitStack() as stack:
        for prefix, name in names.items():
            below = f"{prefix}/"
            wanted = {
                path.removeprefix(below): shape
                for path, shape in shapes.items()
                if path.startswith(below) and not re.fullmatch(family.fresh, path)
            }
            if not wanted:
                raise ConfigError(f"weights.{prefix}: the model has no parameter below {below}")
            loaded, files[prefix] = stack.enter_context(_open(family, model, prefix, name, wanted))
            differing = sorted(wanted.keys() ^ loaded.keys())
            differing += [path for path in wanted.keys() & loaded.keys() if loaded[path].shape != wanted[path].shape]
            if differing:
                raise ConfigError(
                    f"weights.{prefix}: {name} does not fit the model in {len(differing)} tensors, such as "
                    f"{', '.join(differing[:5])}; check the model's sizes"
                )
            params |= {below + path: tensor for path, tensor in loaded.items()}
        yield Pretrained(params, files)


def _part_of_the_package(name: str, wanted: Params) -> Params:
    with resources.as_file(resources.files("magma_jax") / name) as path:
        return load_file(path)


# A source takes the requested paths and shapes and returns the arrays it has.
SOURCES: dict[str, Callable[[Params], Params]] = {
    "quickstart_lm": functools.partial(_part_of_the_package, QUICKSTART_LM),
    "quickstart_vqgan": functools.partial(_part_of_the_package, QUICKSTART_VQGAN),
    "efficientnet_lite0": efficientnet_lite.read_weights,
    "lpips_alexnet": lambda wanted: lpips.read_weights("alexnet"),
    "lpips_vgg16": lambda wanted: lpips.read_weights("vgg16"),
}


@contextlib.contextmanager
def _open(
    family: Family, model: Any, prefix: str, name: str, wanted: Params
) -> Iterator[tuple[Mapping[str, Any], tuple[Path, ...]]]:
    if name in SOURCES:
        yield SOURCES[name](wanted), ()
        return
    path = local_path(name)
    if not path.exists():
        raise ConfigError(
            f"weights.{prefix}: {name!r} is no file or folder, no hf:// address and none of the known sources "
            f"({', '.join(SOURCES)})"
        )
    with contextlib.ExitStack() as stack:
        if path.suffix == ".safetensors":
            weights = stack.enter_context(open_tensors(path))
            if weights.tensors.keys() & wanted.keys():  # keys are our paths
                yield weights.tensors, weights.files
                return
        if prefix not in family.parts:
            raise ConfigError(f"weights.{prefix}: {name} does not hold paths below {prefix}/ of this model")
        yield stack.enter_context(family.parts[prefix](path, model))
