"""Floating-point operations of a training step, by the frozen-model count, and peak rates of devices.

A matmul weight costs 2 operations per position in the forward pass, 2 for the gradient of its input and 2 for its own
gradient. A frozen weight that gradients pass through has no gradient of its own, so it costs 4 per position instead of
the usual 6. With N frozen and M trained matmul weights in a language model of width D and L layers, a row of T
positions costs

    (4 N + 6 M) T  +  12 T^2 D L (attention scores and their weighted sum)  +  encoder

A family counts its other parts itself, see ``Family.flops``. All positions that are run count, including padding and
masked scores; recomputation by remat does not. Embedding look-ups, normalisation, activations, the optimizer, and
depthwise convolutions written as shifted products (EfficientNet-Lite) are not counted.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from magma_jax.training.step.optim import learns

# Dense bf16 FLOP/s (fp16 where bf16 is missing) of one JAX device, from the vendors' data sheets. On TPU v2 and v3 each
# of a chip's two cores is a device.
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

# Name of the vectors that a path's weights multiply, counted per row; None if there is no matmul.
Inputs = Sequence[tuple[re.Pattern[str], str | None]]

# Inputs of the parameters of ``models.language``, alone or inside another model.
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
        frozen: matmuls with frozen weights, encoder excluded.
        trained: matmuls with trained weights, encoder excluded.
        attention: scores and their weighted sums.
        encoder: the image encoder.
    """

    frozen: int
    trained: int
    attention: int
    encoder: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
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
    """Operations per row of matmuls with frozen weights, and of matmuls with trained weights.

    Args:
        shapes: parameters, arrays or ``jax.ShapeDtypeStruct`` by path.
        labels: labels of the parameters, see ``training.step.optim.label_parameters``.
        inputs: the first pattern that matches a path names its inputs.
        vectors: number of vectors of each name per row; "predicted" for the head, which is the embedding table if the
            model has no other.
        first: names of inputs below which nothing learns, so that they need no gradient.

    Raises:
        ValueError: a matrix that no pattern matches.
    """
    learning = learning_paths(labels)
    # With 4 bits a byte holds two weights.
    matrices = {
        path: math.prod(leaf.shape) * (2 if leaf.dtype == jnp.uint8 else 1)
        for path, leaf in shapes.items()
        if path.endswith("weight")
    }
    names = {path: _inputs(path, inputs) for path in matrices}
    if "predicted" not in names.values():
        # Tied weights: the embedding table is the head.
        names |= dict.fromkeys((path for path in names if path.removeprefix("lm/") == "wte/weight"), "predicted")

    counts = {True: 0, False: 0}
    for path, name in names.items():
        if name is None:
            continue
        backward = bool(learning) and name not in first
        counts[path in learning] += (2 + 2 * (path in learning) + 2 * backward) * vectors[name] * matrices[path]
    return counts[False], counts[True]


def attention_flops(width: int, layers: int, positions: int) -> int:
    """Operations per row of attention scores and their weighted sums, forward and backward."""
    return 12 * positions**2 * width * layers


def matmul_flops(jaxpr: Any) -> int:
    """Operations of the matmuls and convolutions in a ``jaxpr``, loop bodies multiplied by their trip count.

    ``while`` loops count once, since their trip count is unknown. Of branches the most expensive one counts.
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
            # The gradient of a strided convolution has dilated inputs; the zeros between pixels do not count.
            skipped = outputs * math.prod(params["lhs_dilation"])
            total += 2 * equation.outvars[0].aval.size * math.prod(kernel) // skipped
        elif name == "cond":
            total += max(map(matmul_flops, jaxprs_in_params(params)))
        else:
            inner = sum(map(matmul_flops, jaxprs_in_params(params)))
            total += inner * (params["length"] if name == "scan" else 1)
    return total


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a device; None if the table lacks it, such as a CPU.

    GPU names end in memory or socket ("NVIDIA A100-SXM4-80GB"): the longest matching name is used.
    """
    fitting = [name for name in PEAK_FLOPS if re.match(rf"{re.escape(name)}(?![A-Za-z0-9])", device_kind)]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting else None


def _inputs(path: str, inputs: Inputs) -> str | None:
    for pattern, name in inputs:
        if pattern.fullmatch(path):
            return name
    raise ValueError(f"parameter {path}: its family's flops do not say what it multiplies")
