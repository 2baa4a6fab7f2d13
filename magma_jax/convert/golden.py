"""Golden files: arrays computed by the original, their tolerances, and the comparison.

A golden file is an ``.npz`` of named arrays in PyTorch's layout (images NCHW, parameters by their PyTorch keys). All
arrays are optional, except the inputs ``images`` and ``captions``; see ``golden_run`` for the names.
"""

import fnmatch
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

Measure = Literal["absolute", "relative", "each", "unequal"]


class GoldenError(ValueError):
    """Golden file that cannot be read or does not fit the model; one line with the remedy."""


class Tolerance(NamedTuple):
    """Largest difference that counts as equal.

    Attributes:
        limit: largest allowed value of the measure.
        measure: ``absolute``; ``relative`` to the array's largest entry; ``each`` entry relative to itself;
            ``unequal``, the number of unequal entries.
    """

    limit: float
    measure: Measure = "absolute"


# The first pattern that a name matches decides. The original in fp32 differs from itself in fp64 by up to 1.2e-5 in
# logits and 2.3e-5 of a tensor's largest entry in gradients.
# NumPy's exceptions for an archive that is damaged or claims more bytes than it has.
BAD_NPZ = (
    *(AttributeError, TypeError, ValueError, EOFError, KeyError, OverflowError, RecursionError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError),
)
# The largest golden file of the tests takes 3 MB.
MAX_NBYTES = 4 * 2**30

TOLERANCES: dict[str, Tolerance] = {
    "labels": Tolerance(0, "unequal"),
    "ids*": Tolerance(0, "unequal"),
    "gen*/new_tokens*": Tolerance(0, "unequal"),
    "gen*/out*": Tolerance(0, "unequal"),
    "geneos/kept_*": Tolerance(0, "unequal"),
    "*num_batches_tracked": Tolerance(0, "unequal"),
    "loss": Tolerance(2e-5),
    "train/loss": Tolerance(2e-5),
    # A ReLU whose input is zero up to rounding flips with the order of summation: 2.6e-6 with XLA's default options,
    # 1.7e-3 of one norm with those of the tests.
    "grad_norms_*": Tolerance(3e-3, "each"),
    "grad_*": Tolerance(1e-3, "relative"),
    "opt/losses": Tolerance(2e-3),
    "opt/eval_loss_after": Tolerance(2e-3),
    # Adam normalises by the gradient's size, so a gradient of rounding noise gives a step of noise, and a ReLU that
    # flips after such a step changes the next gradients by about one percent.
    "opt/grad_norms_before_clip": Tolerance(1e-2, "each"),
    "opt/param_delta_norms": Tolerance(1e-2, "each"),
    "opt/param/*": Tolerance(1e-2, "relative"),
    "opt/bn/*": Tolerance(1e-3, "relative"),
    # Half precision: about twice the difference between the original's half-precision and fp32 runs.
    "fp16/*": Tolerance(3e-2),
    "bf16/*": Tolerance(5e-1),
    "*": Tolerance(2e-4),
}


class Comparison(NamedTuple):
    """Comparison of one array: largest difference by ``tolerance.measure``, and the golden array's shape."""

    name: str
    difference: float
    tolerance: Tolerance
    shape: tuple[int, ...]
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance; never for NaN."""
        return self.difference <= self.tolerance.limit

    def as_json(self) -> dict[str, Any]:
        """Plain values; a difference that is not finite is None."""
        return {
            "name": self.name,
            "difference": self.difference if math.isfinite(self.difference) else None,
            "tolerance": self.tolerance.limit,
            "measure": self.tolerance.measure,
            "ok": self.ok,
            "shape": list(self.shape),
            "note": self.note,
        }


def compare(name: str, computed: Any, golden: np.ndarray) -> Comparison:
    """Compares a computed array with the golden one of the same name; a shape mismatch is an infinite difference."""
    tolerance = next(t for pattern, t in TOLERANCES.items() if fnmatch.fnmatchcase(name, pattern))
    computed = np.asarray(computed)
    if computed.shape != golden.shape:
        return Comparison(name, math.inf, tolerance, golden.shape, f"computed {list(computed.shape)}")
    if tolerance.measure == "unequal":
        return Comparison(name, int(np.sum(computed != golden)), tolerance, golden.shape)
    expected = golden.astype(np.float64)
    difference = np.abs(computed.astype(np.float64) - expected)
    if tolerance.measure == "each":
        # A gradient that is zero on both sides agrees; one that is zero on one side only does not.
        difference = np.where(difference == 0, 0, difference / np.maximum(np.abs(expected), np.finfo(np.float64).tiny))
    largest = float(difference.max(initial=0.0))
    if tolerance.measure == "relative" and largest:
        largest /= max(float(np.abs(expected).max()), np.finfo(np.float64).tiny)
    return Comparison(name, largest, tolerance, golden.shape)


def read_golden(path: str | Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a golden file; pickled objects are refused.

    Raises:
        GoldenError: not an ``.npz`` of plain arrays.
    """
    path = Path(path)
    if not path.is_file():
        raise GoldenError(f"{path}: no such golden file")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            sizes = sum(info.file_size for info in arrays.zip.infolist())
            if sizes > MAX_NBYTES:
                raise ValueError(f"it claims to hold {sizes} bytes")
            return {name: arrays[name] for name in arrays.files}
    except (*BAD_NPZ, OSError) as error:
        raise GoldenError(f"{path}: not an .npz of named, plain arrays ({error}); write it with numpy.savez") from None


def inputs_of(golden: Mapping[str, np.ndarray], name: str, shape: tuple[int | None, ...], kinds: str) -> np.ndarray:
    """Returns an input array after checking its shape (None: any length) and NumPy dtype kind.

    Raises:
        GoldenError: it is missing, or has another shape or type.
    """
    if name not in golden:
        raise GoldenError(f"the golden file lacks the input {name!r}; it has: {', '.join(list(golden)[:10])}")
    array = golden[name]
    fits = len(array.shape) == len(shape) and all(
        want in (None, have) for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype.kind not in kinds or 0 in array.shape:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise GoldenError(f"golden input {name!r} is {array.dtype}{list(array.shape)}, but the model needs [{wanted}]")
    return array
