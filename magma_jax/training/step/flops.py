"""Floating-point operations of a training step, by the frozen-model count, and what devices can do at best.

A matmul weight costs 2 operations a position forward, 2 more for the gradient of its input and 2 more for its own. A
frozen weight under something that learns has no gradient of its own: 4 a position, where the usual rule says 6. With
N frozen and M trained matmul weights in the language model, D wide with L layers, a row of T positions costs

    (4 N + 6 M) T  +  12 T^2 D L (attention scores and their weighted sum)  +  encoder

What a family has beside a language model it counts itself, see ``Family.flops``. All
positions that are run count, padding and the whole square of scores too; what remat computes again does not.
Embedding look-ups, normalisation, activations, the optimizer, and depthwise convolutions that are written as shifted
products (EfficientNet-Lite) are left out.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from magma_jax.training.step.optim import learns

# Dense bf16 (fp16 where there is no bf16) operations a second of one JAX device, from the makers' data sheets. TPU v2
# and v3 show each of a chip's two cores as a device.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v4 lite": 138e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # half a chip
    "NVIDIA A100": 312e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200": 989.4e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "Tesla T4": 65e12,
    "Tesla V100": 125e12,
}

# What multiplies the weights of a path, in vectors a row by name; None for what is no matmul.
Inputs = Sequence[tuple[re.Pattern[str], str | None]]

# Of the parameters of ``models.language``, alone or inside another model.
LANGUAGE_INPUTS: Inputs = (
    (re.compile(r"(lm/)?(.*/)?ln(_\w+)?/weight"), None),
    (re.compile(r"(lm/)?(wte|wpe)/weight"), None),  # looked up
    (re.compile(r"(lm/)?layers/.*weight"), "positions"),
    (re.compile(r"(lm/)?lm_head/weight"), "predicted"),
)


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations of one optimizer step over the whole batch.

    Attributes:
        frozen: matmuls with frozen weights of language model and prefix.
        trained: matmuls with weights that learn there.
        attention: scores and their weighted sums.
        encoder: the image encoder.
    """

    frozen: int
    trained: int
    attention: int
    encoder: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.frozen + self.trained + self.attention + self.encoder


def learning_paths(labels: Mapping[str, str]) -> set[str]:
    """Paths of the parameters that learn."""
    return {path for path, label in labels.items() if learns(label)}


def matrix_flops(
    shapes: Mapping[str, Any],
    labels: Mapping[str, str],
    inputs: Inputs,
    vectors: Mapping[str, int],
    *,
    first: Sequence[str] = (),
) -> tuple[int, int]:
    """Operations that one row costs in matmuls with frozen weights, and with weights that learn.

    Args:
        shapes: parameters, arrays or ``jax.ShapeDtypeStruct`` by path.
        labels: who learns, see ``training.step.optim.label_parameters``.
        inputs: the first pattern that matches a path names its inputs.
        vectors: how many vectors of each name a row has; "predicted" for the head, which is the embedding table where
            there is no other.
        first: names of inputs below which nothing learns, so that they need no gradient.

    Raises:
        ValueError: a matrix that no pattern matches.
    """
    learning = learning_paths(labels)
    # Two numbers in 4 bits are a byte.
    matrices = {
        path: math.prod(leaf.shape) * (2 if leaf.dtype == jnp.uint8 else 1)
        for path, leaf in shapes.items()
        if path.endswith("weight")
    }
    names = {path: _inputs(path, inputs) for path in matrices}
    if "predicted" not in names.values():
        # No head of its own: the embedding table is used as one.
        names |= dict.fromkeys((path for path in names if path.removeprefix("lm/") == "wte/weight"), "predicted")

    counts = {True: 0, False: 0}
    for path, name in names.items():
        if name is None:
            continue
        backward = bool(learning) and name not in first
        counts[path in learning] += (2 + 2 * (path in learning) + 2 * backward) * vectors[name] * matrices[path]
    return counts[False], counts[True]


def attention_flops(width: int, layers: int, positions: int) -> int:
    """Operations of scores and their weighted sums, forward and backward, in one row."""
    return 12 * positions**2 * width * layers


def matmul_flops(jaxpr: Any) -> int:
    """Operations of the matmuls and convolutions in a ``jaxpr``, loop bodies multiplied by their trip count.

    ``while`` loops count once: their trip count is not known. Of branches the most expensive one counts.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            # The gradient of a strided convolution is one over pixels spread apart; zeros between them are no work.
            skipped = outputs * math.prod(params["lhs_dilation"])
            total += 2 * equation.outvars[0].aval.size * math.prod(kernel) // skipped
        elif name == "cond":
            total += max(map(matmul_flops, jaxprs_in_params(params)))
        else:
            inner = sum(map(matmul_flops, jaxprs_in_params(params)))
            total += inner * (params["length"] if name == "scan" else 1)
    return total


def peak_flops(device_kind: str) -> float | None:
    """Operations a second that a device can do at best; None for one that the table lacks, as a CPU.

    Names of GPUs go on with memory or socket ("NVIDIA A100-SXM4-80GB"): the longest name that fits counts.
    """
    fitting = [name for name in PEAK_FLOPS if re.match(rf"{re.escape(name)}(?![A-Za-z0-9])", device_kind)]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting else None


def _inputs(path: str, inputs: Inputs) -> str | None:
    for pattern, name in inputs:
        if pattern.fullmatch(path):
            return name
    raise ValueError(f"parameter {path}: its family's flops do not say what it multiplies")
