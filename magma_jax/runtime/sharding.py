"""Where every array of a run lies: a named mesh of devices, and one table from parameter path to its axes.

The mesh has three axes. ``data`` splits the batch and nothing else. ``fsdp`` splits the batch too, and with it
parameters and optimizer state, which are gathered one layer at a time where they are used. ``model`` splits the
matrix products themselves: the first matrix of a pair by its outputs, the second by its inputs, so that a pair costs
one all-reduce. For the MLP of one layer, on fsdp = 2, model = 2:

    c_fc (F, D)      fsdp0  fsdp1        c_proj (D, F)     model0  model1
           model0      .      .                   fsdp0      .       .
           model1      .      .                   fsdp1      .       .

Numbers do not depend on the mesh, except for the order of summation.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from magma_jax.family import ShardingRow
from magma_jax.typing import Params

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")

# Rows that all families share; a family adds its own (``Family.shardings``). The one row that matches a path names an
# axis for each of the last dimensions; dimensions before them (the layers of a stack) are whole on every device.
# Weights are (out, in), convolutions (out, in, height, width).
SHARED: tuple[ShardingRow, ...] = (
    (r"(lm/)?layers/.*(q_proj|k_proj|v_proj|qkv_proj|c_fc|c_gate)/weight(_scale)?", ("model", "fsdp")),
    (r"(lm/)?layers/.*(q_proj|k_proj|v_proj|qkv_proj|c_fc|c_gate)/bias", ("model",)),
    (r"(lm/)?layers/.*(out_proj|c_proj)/weight(_scale)?", ("fsdp", "model")),
    (r"(lm/)?lm_head/weight(_scale)?", ("model", "fsdp")),
    (r"(lm/)?lm_head/bias", ("model",)),
    # By width: vocabularies such as 50,258 rows divide by nothing.
    (r"(lm/)?w[tp]e/weight", (None, ("fsdp", "model"))),
    (r"(lm/)?layers/.*_adapter/down/weight", (None, "fsdp")),
    (r"(lm/)?layers/.*_adapter/up/weight", ("fsdp", None)),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; the product of the three sizes is the number of devices.

    Attributes:
        data: devices along ``data``; -1 for all that the other axes leave.
        fsdp: devices along ``fsdp``.
        model: devices along ``model``; it should divide the number of attention heads.
        frozen: whether frozen parameters are ``sharded`` over ``fsdp`` like all others, or ``replicated`` over it:
            more memory, but nothing to gather in every layer. They are always split over ``model``.
    """

    data: int = -1
    fsdp: int = 1
    model: int = 1
    frozen: Literal["sharded", "replicated"] = "sharded"

    def __post_init__(self):
        for name in AXES:
            size = getattr(self, name)
            if size < 1 and not (name == "data" and size == -1):
                raise ValueError(f"mesh.{name} must be at least 1, got {size}")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges ``devices`` (default: all of all processes) as the config says.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    data = len(devices) // (config.fsdp * config.model) if config.data == -1 else config.data
    sizes = (data, config.fsdp, config.model)
    if math.prod(sizes) != len(devices):
        wanted = " x ".join(f"{name} {getattr(config, name)}" for name in AXES)
        raise ValueError(f"mesh {wanted} does not fit {len(devices)} devices")
    # Auto is stated because JAX's default, Explicit, wants a sharding for the result of every product.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def parameter_spec(
    path: str, shape: Sequence[int], mesh: Mesh, own: Sequence[ShardingRow], *, over_fsdp: bool = True
) -> PartitionSpec:
    """How one parameter is split; an axis that does not divide its dimension leaves that dimension whole.

    Args:
        own: rows of the model's family, beside ``SHARED``.

    Raises:
        ValueError: a matrix that no row covers, or a parameter that two rows match.
    """
    found = [(pattern, axes) for pattern, axes in (*own, *SHARED) if re.fullmatch(pattern, path)]
    if len(found) > 1:
        raise ValueError(f"parameter {path} matches two sharding rows, {found[0][0]} and {found[1][0]}; narrow one")
    if not found:
        # Biases, norms and statistics are small; nothing else may be left whole by oversight.
        if math.prod(shape) >= 2**20:
            raise ValueError(
                f"parameter {path} of shape {tuple(shape)} is in no sharding row; add one to its family's shardings"
            )
        return PartitionSpec()
    row = found[0][1]
    axes: list[Any] = [None] * (len(shape) - len(row))
    for size, axis in zip(shape[len(axes) :], row, strict=True):
        kept = tuple(name for name in _names(axis) if mesh.shape[name] > 1 and (over_fsdp or name != "fsdp"))
        divides = size % math.prod(mesh.shape[name] for name in kept) == 0
        axes.append((kept[0] if len(kept) == 1 else kept) if kept and divides else None)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def parameter_shardings(
    params: Mapping[str, Any], mesh: Mesh, own: Sequence[ShardingRow], *, over_fsdp: bool = True
) -> dict[str, NamedSharding]:
    """The sharding of every path of a flat dict of arrays or shapes; see ``parameter_spec``."""
    return {
        path: NamedSharding(mesh, parameter_spec(path, leaf.shape, mesh, own, over_fsdp=over_fsdp))
        for path, leaf in params.items()
    }


def tree_shardings(tree: Any, mesh: Mesh, own: Sequence[ShardingRow]) -> Any:
    """Shardings of a pytree that holds parameters, such as a ``TrainState``: moments lie where their parameter lies.

    A leaf whose innermost dictionary key is a parameter's path follows the table; all others are replicated.
    """

    def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = next((key.key for key in reversed(keys) if isinstance(key, jax.tree_util.DictKey)), None)
        spec = parameter_spec(name, leaf.shape, mesh, own) if isinstance(name, str) and leaf.ndim else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(sharding, tree)


def placed(shapes: Any, shardings: Any) -> Any:
    """``shapes`` as ``jax.ShapeDtypeStruct`` that carry ``shardings``, as readers and compilers want them."""
    return jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, shardings)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def split_rows(x: jax.Array, *, features: str | None = None) -> jax.Array:
    """Keeps the rows of an activation, and of its gradient, on the devices of their batch.

    Left alone, the compiler may prefer to bring whole batches of activations to a slice of a weight over bringing the
    weight to a slice of the batch, which costs many times the memory and traffic.

    Args:
        x: batch first; outside of ``on_mesh`` it comes back as it is.
        features: mesh axis that splits the last dimension; by default it is whole.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *[None] * (x.ndim - 2), features))


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """``function``, traced in such a way that ``split_rows`` knows the mesh and kernels know its kind of device."""

    @functools.wraps(function)
    def traced(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), traced_for(mesh.devices.flat[0].platform):
            return function(*arguments)

    return traced


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """What is traced inside is meant for devices of this platform, which need not be there."""
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def target_platform() -> str:
    """Platform that the program at hand is traced for, such as ``tpu``; by default that of this process."""
    return _PLATFORM.get() or jax.default_backend()


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that a batch is split into; it must divide the batch size."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Rows of a global batch that the devices of this process hold, ascending; all of them with one process.

    Processes that share a part of ``model`` hold the same rows.
    """
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    # JAX may give None for an index, but not for devices of this process.
    return sorted({row for part in parts if part is not None for row in range(*part[0].indices(batch_size))})


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int) -> Params:
    """Puts the ``local_rows`` of a global batch, which ``batch`` holds in their order, on the devices."""
    sharding = batch_sharding(mesh)
    position = {row: i for i, row in enumerate(local_rows(mesh, batch_size))}

    def place_rows(rows: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # as above
            first, stop, _ = index[0].indices(batch_size)
            return rows[position[first] : position[first] + stop - first]

        return jax.make_array_from_callback((batch_size, *rows.shape[1:]), sharding, part)

    return {name: place_rows(np.asarray(rows)) for name, rows in batch.items()}


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axis is None:
        return ()
    return axis if isinstance(axis, tuple) else (axis,)
