"""Peak rates of TPU chips, and compile-only topologies."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any

from magma_jax.config import ConfigError
from magma_jax.training.step.flops import PEAK_FLOPS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Limits of one JAX device: a whole chip, unless ``devices_per_chip`` is larger.

    Attributes:
        name: name in topologies.
        kind: JAX's ``device_kind``.
        hbm_bytes: HBM per device, in bytes.
        hbm_bandwidth: HBM bandwidth, in bytes per second.
        ici_bandwidth: bytes per second that a device receives from its neighbours, over all links together.
        dcn_bandwidth: bytes per second that a device receives from other slices; None if not published.
        devices_per_chip: JAX devices per chip of a topology.
        options: further options of ``get_topology_desc``.
    """

    name: str
    kind: str
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float | None
    devices_per_chip: int = 1
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def peak_flops(self) -> float:
        """Peak dense bf16 FLOP/s."""
        return PEAK_FLOPS[self.kind]


# https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x: HBM capacity and bandwidth, and inter-chip bandwidth,
# given there in Gbit/s (2400, 1600, 4800, 3584) or as the sum of both directions (TPU7x: 1200 GB/s); here in bytes and
# one direction. Bandwidth of the data center network: of a chip (v5p 50, TPU7x 100 Gbit/s), or that of a pod divided by
# its 256 chips (v5e 6.4, v6e 25.6 Tbit/s).
CHIPS = {
    chip.name: chip
    for chip in (
        # By default the two cores of a v4 chip are separate devices with half the memory.
        Chip(
            "v4",
            "TPU v4",
            32 * GIB,
            1228e9,
            300e9,
            None,
            options={"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)},
        ),
        Chip("v5e", "TPU v5 lite", 16 * GIB, 819e9, 200e9, 3.125e9),
        Chip("v5p", "TPU v5", 95 * GIB, 2765e9, 600e9, 6.25e9),
        Chip("v6e", "TPU v6 lite", 32 * GIB, 1638e9, 448e9, 12.5e9),
        # Two devices share the 192 GiB, 7380 GB/s, the links and the network of a chip.
        Chip("tpu7x", "TPU7x", 96 * GIB, 3690e9, 300e9, 6.25e9, devices_per_chip=2),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Compile-only devices.

    Attributes:
        name: chip and shape of one slice, such as ``v5e:4x4``.
        devices: devices of all slices, for ``make_mesh``.
        slices: number of slices.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    slices: int = 1


def open_topology(name: str, slices: int = 1) -> Topology:
    """The devices of ``slices`` slices of a topology, from XLA's TPU compiler.

    Raises:
        ConfigError: an unknown chip, a shape that the compiler rejects, several slices of a chip whose network is not
            known, or libtpu is missing.
    """
    chip_name, _, shape = name.partition(":")
    if chip_name not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ConfigError(
            f"--topology {name}: expected CHIP:SHAPE, such as v5e:4x4 or tpu7x:2x2x1, CHIP: {', '.join(CHIPS)}"
        )
    chip = CHIPS[chip_name]
    if slices > 1 and chip.dcn_bandwidth is None:
        raise ConfigError(f"mesh.slice={slices}: the bandwidth between slices of {chip_name} is not published")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"XLA's TPU compiler is not installed: pip install '{_libtpu_requirement()}'")
    # Without these libtpu queries a metadata server, logs warnings, and refuses to load beside another process.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies  # after the environment is set

    sides = tuple(map(int, shape.split("x")))
    # The compiler assumes hosts of 2x2 chips; a smaller slice is one host.
    one_host = {"chips_per_host_bounds": (*sides, 1, 1)[:3]} if all(side <= 2 for side in sides[:2]) else {}
    several = {"num_slices": slices} if slices > 1 else {}
    options: dict[str, Any] = chip.options | one_host | several
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"--topology {name}: {str(error).splitlines()[0]}") from None
    if len(devices) != slices * math.prod(sides) * chip.devices_per_chip:
        raise ConfigError(f"--topology {name}: the compiler shows {len(devices)} devices; try another shape")
    return Topology(name, chip, tuple(devices), slices)


def _libtpu_requirement() -> str:
    """The libtpu requirement of the installed jax."""
    named = (re.match(r"libtpu\s*([^;]*)", line) for line in importlib.metadata.requires("jax") or ())
    return next((f"libtpu{match[1].strip()}" for match in named if match and match[1].strip()), "libtpu")
