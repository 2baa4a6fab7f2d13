"""Compares two checkpoints of any layout tensor by tensor, in bounded memory."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from magma_jax.convert.layouts import layout_of
from magma_jax.published.magma_keys import is_weight
from magma_jax.storage.deferred import alias_key, read_array, read_row
from magma_jax.storage.files import WeightFileError, open_tensors
from magma_jax.storage.model_folder import MODEL_FILE

# Elements cast to fp64 at a time.
_SLAB = 2**22


@dataclasses.dataclass
class Module:
    """Comparison of the tensors of one module over all layers.

    Attributes:
        tensors: number of tensors compared.
        numbers: number of elements compared.
        difference: largest absolute difference; infinite if only one side is NaN.
        norms: Euclidean norm of each side.
        unequal: number of tensors that differ bitwise.
    """

    tensors: int = 0
    numbers: int = 0
    difference: float = 0.0
    norms: tuple[float, float] = (0.0, 0.0)
    unequal: int = 0


@dataclasses.dataclass(frozen=True)
class CheckpointComparison:
    """Result of ``compare_checkpoints``.

    Attributes:
        modules: comparisons by module name, layer numbers replaced by ``*``.
        problems: tensors missing on one side, and shape mismatches, one line each.
        not_compared: aliases and recomputed buffers that only one side has.
        tolerance: largest difference that counts as equal.
    """

    modules: dict[str, Module]
    problems: list[str]
    not_compared: int
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether both hold the same tensors within the tolerance."""
        return not self.problems and all(module.difference <= self.tolerance for module in self.modules.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON output; an infinite difference is None."""
        modules = {name: dataclasses.asdict(module) for name, module in self.modules.items()}
        for module in modules.values():
            module["difference"] = module["difference"] if math.isfinite(module["difference"]) else None
        return {"ok": self.ok, "modules": modules, "problems": self.problems, "not_compared": self.not_compared}

    def as_table(self) -> str:
        """One line per module, the problems, and a summary."""
        width = max(map(len, ["module", *self.modules]))
        lines = [f"{'module':{width}}  tensors        numbers  difference      norm A      norm B"]
        for name, m in self.modules.items():
            verdict = "" if m.difference <= self.tolerance else "  DIFFERS"
            lines.append(
                f"{name:{width}}  {m.tensors:7d}  {m.numbers:13,d}  {m.difference:10.3g}"
                f"  {m.norms[0]:10.5g}  {m.norms[1]:10.5g}{verdict}"
            )
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        tensors = sum(module.tensors for module in self.modules.values())
        unequal = sum(module.unequal for module in self.modules.values())
        bits = "all bits equal" if not unequal else f"{unequal} with unequal bits"
        rest = f", {self.not_compared} aliases and buffers on one side only" if self.not_compared else ""
        lines.append(f"{tensors} tensors compared, {bits}, {len(self.problems)} problems{rest}")
        return "\n".join(lines)


def compare_checkpoints(a: str | Path, b: str | Path, tolerance: float = 0.0) -> CheckpointComparison:
    """Compares model folders, run folders and weight files of any format that ``open_tensors`` supports.

    A folder and a file are compared under the file's names. Values are compared, so an fp16 and an fp32 tensor of the
    same numbers have difference 0 (though unequal bits).

    Raises:
        WeightFileError, CheckpointError: a checkpoint cannot be read, or they have no tensor name in common.
    """
    with _open(a, b) as (ours, theirs):
        common = [name for name in ours if name in theirs]
        if not common:
            raise WeightFileError(f"{a} and {b} have no tensor name in common; they are not the same kind of model")
        problems, one_sided = [], 0
        for here, there, path in ((ours, theirs, b), (theirs, ours, a)):
            missing = [name for name in here if name not in there]
            problems += [f"{name} is missing in {path}" for name in missing if is_weight(name)]
            one_sided += sum(not is_weight(name) for name in missing)
        modules: dict[str, Module] = {}
        known: dict[tuple[object, object], Module] = {}
        for name in common:
            first, second = ours[name], theirs[name]
            if tuple(first.shape) != tuple(second.shape):
                problems.append(f"{name} has shape {list(first.shape)} in {a} and {list(second.shape)} in {b}")
                continue
            pair = alias_key(first), alias_key(second)
            if pair not in known:  # tied tensors are compared once
                known[pair] = _compare(first, second)
            _add(modules.setdefault(_module_of(name), Module()), known[pair])
        return CheckpointComparison(modules, problems, one_sided, tolerance)


@contextlib.contextmanager
def _open(a: str | Path, b: str | Path) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    folders = [(Path(path) / MODEL_FILE).is_file() for path in (a, b)]
    with contextlib.ExitStack() as stack:
        sides = []
        for path, is_folder in zip((a, b), folders, strict=True):
            if not is_folder:
                sides.append(stack.enter_context(open_tensors(path)).tensors)
                continue
            layout = layout_of(path)
            sides.append(layout.params(path) if all(folders) else layout.published(path))
        yield sides[0], sides[1]


def _compare(first: Any, second: Any) -> Module:
    if getattr(first, "rows", ()) and first.shape:
        result = Module()
        for row in range(first.shape[0]):
            _add(result, _compare_arrays(read_row(first, row), read_row(second, row)))
        return dataclasses.replace(result, tensors=1, unequal=min(result.unequal, 1))
    return _compare_arrays(read_array(first), read_array(second))


def _compare_arrays(first: np.ndarray, second: np.ndarray) -> Module:
    first, second = np.ascontiguousarray(first).reshape(-1), np.ascontiguousarray(second).reshape(-1)
    result = Module(1, first.size)
    for start in range(0, first.size, _SLAB):
        a, b = first[start : start + _SLAB], second[start : start + _SLAB]
        same = a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8))
        wide_a = _wide(a)
        wide_b = wide_a if same else _wide(b)
        result.norms = math.hypot(result.norms[0], _norm(wide_a)), math.hypot(result.norms[1], _norm(wide_b))
        if not same:
            result.unequal = 1
            with np.errstate(invalid="ignore"):
                apart = np.where(wide_a == wide_b, 0.0, np.abs(wide_a - wide_b))
            apart[np.isnan(apart)] = math.inf
            apart[np.isnan(wide_a) & np.isnan(wide_b)] = 0.0
            result.difference = max(result.difference, float(apart.max()))
    return result


def _wide(array: np.ndarray) -> np.ndarray:
    # fp32 represents half precision exactly and takes half the time of fp64.
    half = array.dtype.itemsize <= 2 and array.dtype.kind not in "iu"
    return array.astype(np.float32 if half else np.float64)


def _norm(array: np.ndarray) -> float:
    finite = array if np.isfinite(norm := float(np.linalg.norm(array))) else array[np.isfinite(array)]
    return norm if finite is array else float(np.linalg.norm(finite))


def _add(total: Module, part: Module) -> None:
    total.tensors += part.tensors
    total.numbers += part.numbers
    total.unequal += part.unequal
    total.difference = max(total.difference, part.difference)
    total.norms = math.hypot(total.norms[0], part.norms[0]), math.hypot(total.norms[1], part.norms[1])


def _module_of(name: str) -> str:
    parent = re.split(r"[./][^./]*$", name)[0]
    return re.sub(r"(?<![^./])\d+(?![^./])", "*", parent)
