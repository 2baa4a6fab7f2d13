"""Before anything imports JAX: eight devices on the CPU, quick compilation, and shape annotations that are checked."""

import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Eight devices are for the tests of sharding. Tests compile a lot and compute little, so the compiler optimizes less.
FLAGS = ["--xla_force_host_platform_device_count=8"]
FLAGS += ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")])
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Not the config reader and the interface: they check what users give them, and the tests give them wrong things.
CHECKED = ["nn", "models", "training", "convert", "data", "evaluation", "inference.decode", "inference.sampling"]
install_import_hook([f"magma_jax.{name}" for name in CHECKED], "beartype.beartype")

GOLDEN = Path(__file__).parent / "fixtures" / "golden"


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """Name of a golden case to its checkpoint, as torch.save wrote it."""
    folder = tmp_path_factory.mktemp("golden")

    def unpack(name: str) -> Path:
        path = folder / f"{name}.pt"
        if not path.exists():
            path.write_bytes(lzma.decompress((GOLDEN / f"{name}.pt.xz").read_bytes()))
        return path

    return unpack


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden arrays and settings."""
    return GOLDEN
