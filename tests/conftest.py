"""Before anything imports JAX: eight devices on the CPU, quick compilation, and shape annotations that are checked."""

import atexit
import gc
import importlib.util
import lzma
import os
import shutil
import sys
import tempfile
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxlib.version
import jaxtyping
import pytest

# Eight devices are for the tests of sharding. Tests compile a lot and compute little, so the compiler optimizes less.
FLAGS = ["--xla_force_host_platform_device_count=8"]
FLAGS += ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
FLAGS += ["--xla_cpu_parallel_codegen_split_count=1"]
# The older emitters compile three times faster; newer releases have lost them, and would refuse the flag.
if jaxlib.version.__version_info__ < (0, 11):
    FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests, and the processes that they start, compile many programs several times: each is compiled once per run. Programs
# of other runs are not used and nothing is left in the user's own cache. Workers take over the first process's folder.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="magma_jax_programs_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# Not the config reader and the interface: they check what users give them, and the tests give them wrong things.
CHECKED = ["nn", "storage", "data", "models", "published", "training", "evaluation", "convert", "inference.decoding"]


def _has_shapes(hint: Any) -> bool:
    """Whether an annotation names the shape of an array."""
    return type(hint).__module__.startswith("jaxtyping") or any(map(_has_shapes, typing.get_args(hint)))


def _jaxtyped(*, typechecker: Callable[[Any], Any], jaxtyped: Callable[..., Any] = jaxtyping.jaxtyped) -> Any:
    """jaxtyping's decorator, which costs a hundred times the call of a small function, only where there are shapes.

    Other functions have their types checked without it, except those inside functions: they would be prepared anew with
    each call of the outer one.
    """

    def decorate(function: Any) -> Any:
        if not isinstance(function, types.FunctionType) or any(map(_has_shapes, function.__annotations__.values())):
            return jaxtyped(function, typechecker=typechecker)
        return function if "<locals>" in function.__qualname__ else typechecker(function)

    return decorate


jaxtyping.jaxtyped = _jaxtyped
jaxtyping.install_import_hook([f"magma_jax.{name}" for name in CHECKED], "beartype.beartype")

# A compiled program takes seven memory maps or so. Linux allows a process 65,530, and LLVM crashes at the next one.
MOST_MAPS = 30_000

GOLDEN = Path(__file__).parent / "fixtures" / "golden"


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs before a process is full of them, after a file of tests."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        import jax  # reads the environment that is set above

        jax.clear_caches()
        gc.collect()


@pytest.fixture
def supports(request) -> Callable[..., None]:
    """Records what a test has shown of a kind of language model, with a figure or without one; the test must pass.

    ``scripts/support_table.py`` reads it; the tests have the mark ``supports``.
    """

    def record(kind: str, shows: str, figure: float | None = None) -> None:
        request.node.user_properties.append((f"supports|{kind}|{shows}", "" if figure is None else f"{figure:.3g}"))

    return record


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """Name of a golden case to its checkpoint, as torch.save wrote it."""
    folder = tmp_path_factory.mktemp("golden")

    def unpack(name: str) -> Path:
        path = folder / f"{name}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(lzma.decompress((GOLDEN / f"{name}.pt.xz").read_bytes()))
        return path

    return unpack


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden arrays and settings."""
    return GOLDEN


@pytest.fixture
def open_clip_module(monkeypatch):
    """Imports modules of open_clip without the package's own start: that needs a torchvision that fits torch."""
    torch = pytest.importorskip("torch")
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip is not installed")
    package = types.ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "open_clip", package)
    vision = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc")}
    vision["torchvision.ops.misc"].FrozenBatchNorm2d = torch.nn.Module
    for name, module in vision.items():
        monkeypatch.setitem(sys.modules, name, module)
    # Its tokenizer repairs damaged texts by this package.
    repair = types.ModuleType("ftfy")
    repair.fix_text = lambda text: text
    monkeypatch.setitem(sys.modules, "ftfy", repair)

    def forget():
        for name in [name for name in sys.modules if name.startswith("open_clip.")]:
            sys.modules.pop(name)

    forget()
    yield lambda name: importlib.import_module(f"open_clip.{name}")
    forget()


@pytest.fixture
def modified_resnet(open_clip_module):
    """open_clip's class."""
    return open_clip_module("modified_resnet").ModifiedResNet
