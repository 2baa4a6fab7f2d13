"""Device mesh, and the sharding of every array of a run by a table from parameter path to mesh axes.

The mesh has four axes. ``slice`` and ``data`` split the batch only, ``slice`` between devices that only a data center
network connects: parameters stay within a slice, and gradients are summed over all. ``fsdp`` splits the batch, the
parameters and the optimizer state; parameters are gathered one layer at a time where they are used. ``model`` splits
the matrix products: the first matrix of a pair by its outputs, the second by its inputs, so that a pair costs one
all-reduce. The MLP of one layer on fsdp = 2, model = 2:

    c_fc (F, D)      fsdp0  fsdp1        c_proj (D, F)     model0  model1
           model0      .      .                   fsdp0      .       .
           model1      .      .                   fsdp1      .       .

Results do not depend on the mesh, except for the order of summation.
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

# From the slowest connection to the fastest.
AXES = ("slice", "data", "fsdp", "model")
BATCH_AXES = ("slice", "data", "fsdp")

# Rows shared by all families; a family adds its own (``Family.shardings``). At most one row matches a path; it names a
# mesh axis for each trailing dimension. Leading dimensions (the layers of a stack) are not split. Weights are
# (out, in), convolutions (out, in, height, width).
SHARED: tuple[ShardingRow, ...] = (
    (r"(lm/)?layers/.*(q_proj|k_proj|v_proj|qkv_proj|c_fc|c_gate)/weight(_scale)?", ("model", "fsdp")),
    (r"(lm/)?layers/.*(q_proj|k_proj|v_proj|qkv_proj|c_fc|c_gate)/bias", ("model",)),
    (r"(lm/)?layers/.*(out_proj|c_proj)/weight(_scale)?", ("fsdp", "model")),
    (r"(lm/)?lm_head/weight(_scale)?", ("model", "fsdp")),
    (r"(lm/)?lm_head/bias", ("model",)),
    # Split by width: row counts such as 50,258 rarely divide by the axis sizes. Over fsdp first: the other order moves
    # less between chips, but XLA then computes wrong values, as tests/families/test_magvlt_loss.py shows.
    (r"(lm/)?w[tp]e/weight", (None, ("fsdp", "model"))),
    (r"(lm/)?layers/.*(q_proj|k_proj|v_proj|qkv_proj|c_fc|c_gate)/lora/down/weight", (None, "fsdp")),
    (r"(lm/)?layers/.*(q_proj|k_proj|v_proj|qkv_proj|c_fc|c_gate)/lora/up/weight", ("model", None)),
    (r"(lm/)?layers/.*(out_proj|c_proj)/lora/down/weight", (None, "model")),
    (r"(lm/)?layers/.*(out_proj|c_proj)/lora/up/weight", ("fsdp", None)),
    (r"(lm/)?layers/.*_adapter/down/weight", (None, "fsdp")),
    (r"(lm/)?layers/.*_adapter/up/weight", ("fsdp", None)),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Mesh sizes; their product is the number of devices.

    Attributes:
        data: devices along ``data``; -1 for all remaining devices of a slice.
        fsdp: devices along ``fsdp``.
        model: devices along ``model``; it should divide the number of attention heads.
        slice: TPU slices that only the data center network connects, each with all parameters and its part of the
            batch; the other sizes are those of one slice.
        frozen: whether frozen parameters are ``sharded`` over ``fsdp`` like all others, or ``replicated``, which takes
            more memory but no all-gather in every layer. They are always split over ``model``.
    """

    data: int = -1
    fsdp: int = 1
    model: int = 1
    slice: int = 1
    frozen: Literal["sharded", "replicated"] = "sharded"

    def __post_init__(self):
        for name in AXES:
            size = getattr(self, name)
            if size < 1 and not (name == "data" and size == -1):
                raise ValueError(f"mesh.{name} must be at least 1, got {size}")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh of a config from ``devices`` (default: the devices of all processes).

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or ``slice`` is not their number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = _slices(devices, config.slice)
    rest = config.slice * config.fsdp * config.model
    data = len(devices) // rest if config.data == -1 else config.data
    sizes = (data, config.fsdp, config.model)
    if config.slice * math.prod(sizes) != len(devices):
        wanted = " x ".join(f"{name} {getattr(config, name)}" for name in AXES)
        raise ValueError(f"mesh {wanted} does not fit {len(devices)} devices")
    # JAX's default, Explicit, requires an output sharding for every product.
    types = (AxisType.Auto,) * len(AXES)
    # jax.make_mesh arranges the devices of one slice by its links.
    within = [jax.make_mesh(sizes, AXES[1:], axis_types=types[1:], devices=part).devices for part in slices]
    return Mesh(np.stack(within), AXES, axis_types=types)


def _slices(devices: Sequence[Any], count: int) -> list[list[Any]]:
    """The devices of each slice: of TPUs by what they belong to, of others in equal parts."""
    if devices[0].platform != "tpu":
        size = -(-len(devices) // count)
        return [list(devices[first : first + size]) for first in range(0, len(devices), size)]
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    if len(slices) != count:
        raise ValueError(f"mesh.slice is {count}, but the TPUs belong to {len(slices)}: set mesh.slice={len(slices)}")
    sizes = {len(part) for part in slices.values()}
    if len(sizes) > 1:
        raise ValueError(f"slices of different sizes, {min(sizes)} and {max(sizes)} devices; all must be equal")
    return [slices[index] for index in sorted(slices)]


def parameter_spec(
    path: str, shape: Sequence[int], mesh: Mesh, own: Sequence[ShardingRow], *, over_fsdp: bool = True
) -> PartitionSpec:
    """Partition spec of one parameter; a dimension that its axis does not divide is not split.

    Args:
        own: rows of the model's family, in addition to ``SHARED``.

    Raises:
        ValueError: no row matches a matrix, or two rows match a parameter.
    """
    found = [(pattern, axes) for pattern, axes in (*own, *SHARED) if re.fullmatch(pattern, path)]
    if len(found) > 1:
        raise ValueError(f"parameter {path} matches two sharding rows, {found[0][0]} and {found[1][0]}; narrow one")
    if not found:
        # Biases, norms and statistics are small; a large parameter without a row is an oversight.
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
    """Shardings by path for a flat dict of arrays or shapes; see ``parameter_spec``."""
    return {
        path: NamedSharding(mesh, parameter_spec(path, leaf.shape, mesh, own, over_fsdp=over_fsdp))
        for path, leaf in params.items()
    }


def tree_shardings(tree: Any, mesh: Mesh, own: Sequence[ShardingRow]) -> Any:
    """Shardings of a pytree with parameters, such as a ``TrainState``; moments are sharded like their parameter.

    A leaf whose innermost dictionary key is a parameter path follows the table; all others are replicated.
    """

    def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = next((key.key for key in reversed(keys) if isinstance(key, jax.tree_util.DictKey)), None)
        spec = parameter_spec(name, leaf.shape, mesh, own) if isinstance(name, str) and leaf.ndim else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(sharding, tree)


def placed(shapes: Any, shardings: Any) -> Any:
    """``jax.ShapeDtypeStruct`` with shardings, for readers and ahead-of-time compilation."""
    return jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, shardings)


def replicated(mesh: Mesh) -> NamedSharding:
    """Replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over ``slice``, ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def split_rows(x: jax.Array, *, features: str | None = None) -> jax.Array:
    """Constrains an activation, and its gradient, to be split over the batch axes.

    Without the constraint the compiler may gather whole batches of activations for a weight shard instead of gathering
    the weight for a batch shard, which costs many times the memory and traffic.

    Args:
        x: activation, batch first; returned unchanged outside ``on_mesh``.
        features: mesh axis that splits the last dimension; None for no split.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *[None] * (x.ndim - 2), features))


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Wraps ``function`` so that tracing sets the mesh for ``split_rows`` and the platform for kernels."""

    @functools.wraps(function)
    def traced(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), traced_for(mesh.devices.flat[0].platform):
            return function(*arguments)

    return traced


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """Sets the target platform of programs traced inside; its devices need not exist."""
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def target_platform() -> str:
    """Platform of the program being traced, such as ``tpu``; default: that of this process."""
    return _PLATFORM.get() or jax.default_backend()


def batch_shards(mesh: Mesh) -> int:
    """Number of batch shards; it must divide the batch size."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Rows of a global batch held by this process's devices, in ascending order; all rows with one process.

    Processes that differ only along ``model`` hold the same rows.
    """
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    # JAX's type allows None, which does not occur for devices of this process.
    return sorted({row for part in parts if part is not None for row in range(*part[0].indices(batch_size))})


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int) -> Params:
    """Places a global batch on the devices; ``batch`` holds its ``local_rows`` in order."""
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
