"""Inception v3 of 2015, whose features the Fréchet Inception distance is of, from the file that PyTorch packages use.

The file, ``pt_inception-2015-12-05-6726825d.pth``, is TensorFlow's network in PyTorch's layout; this package has no
copy. The network differs from torchvision's in its average pooling, which leaves out padding, in a maximum pooling in
its last block, and in 1,008 classes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.storage.hashing import hashing
from magma_jax.storage.torch.reader import open_torch_file, state_dict
from magma_jax.typing import Array, Float, UInt8

FILE = "pt_inception-2015-12-05-6726825d.pth"
# Beginning of the file's SHA-256.
DIGEST = "6726825d"
SIDE = 299
# TensorFlow's epsilon of batch normalisation.
EPS = 1e-3
LEAVES = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")

# Branches of each kind of block: names of convolutions in order; those of ``STRIDED`` have stride 2 and no padding.
A = (("branch1x1",), ("branch5x5_1", "branch5x5_2"), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))
B = (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))
C = (
    ("branch1x1",),
    ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
    ("branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"),
)
D = (
    ("branch3x3_1", "branch3x3_2"),
    ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"),
)
# The last convolutions of a branch stand side by side.
E = (("branch1x1",), ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")))
E += (("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),)
BLOCKS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), A),
    "Mixed_6a": B,
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), C),
    "Mixed_7a": D,
    **dict.fromkeys(("Mixed_7b", "Mixed_7c"), E),
}
STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
REDUCING = ("Mixed_6a", "Mixed_7a")
STRIDED = ("Conv2d_1a_3x3", "Mixed_6a.branch3x3", "Mixed_6a.branch3x3dbl_3", "Mixed_7a.branch3x3_2")
STRIDED += ("Mixed_7a.branch7x7x3_4",)
UNPADDED = (*STRIDED, "Conv2d_2a_3x3", "Conv2d_4a_3x3")

Weights = Mapping[str, Array]


def convolutions() -> list[str]:
    """Names of all convolutions."""
    found: list[str] = [*STEM]
    for block, branches in BLOCKS.items():
        for branch in branches:
            for step in branch:
                found += [f"{block}.{name}" for name in (step if isinstance(step, tuple) else (step,))]
        if block not in REDUCING:
            found.append(f"{block}.branch_pool")
    return found


def read_inception(path: str | Path, digest: str = DIGEST) -> Weights:
    """The network's weights, kernels as (height, width, in, out) and normalisation as ``scale`` and ``shift``.

    Raises:
        ValueError: no such file, another file, or one that lacks a tensor. Also the errors of ``open_torch_file``.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file. FID takes the official weights, {FILE} (its SHA-256 begins with {DIGEST}), which "
            "this package does not have; set weights to your copy"
        )
    with hashing([path]) as digest_of:
        found = digest_of(path)
    if not found.startswith(digest):
        raise ValueError(f"{path}: its SHA-256 begins with {found[:8]}, that of {FILE} with {digest}; give that file")
    with open_torch_file(path) as file:
        tensors, _ = state_dict(file.tree)
        wanted = [f"{name}.{leaf}" for name in convolutions() for leaf in LEAVES] + ["fc.weight"]
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise ValueError(f"{path}: lacks {len(missing)} tensors of Inception v3, such as {missing[0]}")
        values = {name: np.asarray(tensors[name].read(), np.float32) for name in wanted}
    weights = {"fc": jnp.asarray(values["fc.weight"].T)}
    for name in convolutions():
        kernel, weight, bias, mean, variance = (values[f"{name}.{leaf}"] for leaf in LEAVES)
        scale = weight / np.sqrt(variance + EPS)
        weights |= {name: jnp.asarray(kernel.transpose(2, 3, 1, 0))}
        weights |= {f"{name}.scale": jnp.asarray(scale), f"{name}.shift": jnp.asarray(bias - mean * scale)}
    return weights


@jax.jit
def look(weights: Weights, images: UInt8[Array, "N H W 3"]) -> tuple[Float[Array, "N 2048"], Float[Array, "N 1008"]]:
    """Features after the last pooling, and class probabilities without the classifier's bias, as for published scores.

    Images of any size are resized as TensorFlow 1 does, without antialiasing and from the corner.
    """
    x = resized(images.astype(jnp.float32), SIDE)
    x = (x - 128) / 128
    for name in STEM:
        x = _convolution(weights, name, x)
        if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
            x = _maximum(x, stride=2, padding="VALID")
    for block in BLOCKS:
        x = _block(weights, block, x)
    features = x.mean((1, 2))
    return features, jax.nn.softmax(features @ weights["fc"])


def resized(images: Float[Array, "N H W 3"], side: int) -> Float[Array, "N {side} {side} 3"]:
    """Bilinear resize whose pixel i lies at i times the ratio of sizes, as in TensorFlow 1."""
    for axis in (1, 2):
        size = images.shape[axis]
        places = np.arange(side) * (size / side)
        first = np.floor(places).astype(int)
        share = (places - first).reshape([-1 if i == axis else 1 for i in range(4)]).astype(np.float32)
        before, after = (jnp.take(images, np.minimum(first + step, size - 1), axis) for step in (0, 1))
        images = before + (after - before) * share
    return images


def _block(weights: Weights, block: str, x: Array) -> Array:
    parts = []
    for branch in BLOCKS[block]:
        y = x
        for step in branch:
            names = step if isinstance(step, tuple) else (step,)
            y = jnp.concatenate([_convolution(weights, f"{block}.{name}", y) for name in names], -1)
        parts.append(y)
    if block in REDUCING:
        parts.append(_maximum(x, stride=2, padding="VALID"))
    else:
        pooled = _maximum(x, stride=1, padding="SAME") if block == "Mixed_7c" else _average(x)
        parts.append(_convolution(weights, f"{block}.branch_pool", pooled))
    return jnp.concatenate(parts, -1)


def _convolution(weights: Weights, name: str, x: Array) -> Array:
    stride, padding = 2 if name in STRIDED else 1, "VALID" if name in UNPADDED else "SAME"
    y = jax.lax.conv_general_dilated(
        x, weights[name], (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(y * weights[f"{name}.scale"] + weights[f"{name}.shift"])


def _maximum(x: Array, *, stride: int, padding: str) -> Array:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _average(x: Array) -> Array:
    """Mean of 3 x 3, without padding in it."""
    sums = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    rows, columns = (3 - (np.arange(size) == 0) - (np.arange(size) == size - 1) for size in x.shape[1:3])
    return sums / np.outer(rows, columns)[None, :, :, None].astype(np.float32)
