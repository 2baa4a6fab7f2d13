"""NF-ResNet-50: the encoder of the Frozen baseline, a ResNet without normalisation layers (Brock et al., 2021).

Convolution weights are standardised per output channel; each block divides its input by its expected standard deviation
at initialisation (``beta``) and adds its branch scaled by ``alpha``. The output is the mean over the grid, which the
prefix maps to ``image_positions`` vectors.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.config import check_sizes
from magma_jax.nn.convolution import BatchNormMode, Conv2d, conv2d
from magma_jax.nn.modules import EncoderParam
from magma_jax.nn.stack import Remat, remat_call, scan, stack
from magma_jax.typing import Array, Float

# Keeps the variance of relu(x) at about one for a unit normal x. This is timm's empirical value, used to train its
# weights; the exact sqrt(2 / (1 - 1/pi)) = 1.71286 is 0.06 % less.
RELU_GAMMA = 1.7139588594436646


@dataclasses.dataclass(frozen=True)
class NFResNetConfig:
    """Sizes of an NF-ResNet; the defaults are NF-ResNet-50.

    Attributes:
        blocks: residual blocks in each stage.
        stage_channels: channels after each stage; those of the last are the output's.
        stem_channels: channels after the stem.
        image_size: pixels per side of an image.
        alpha: factor of a block's residual branch.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    stage_channels: tuple[int, ...] = (256, 512, 1024, 2048)
    stem_channels: int = 64
    image_size: int = 256
    alpha: float = 0.2
    kind: Literal["nf_resnet"] = "nf_resnet"

    def __post_init__(self):
        check_sizes(self, "blocks", "stage_channels", "stem_channels", "image_size")
        if not self.blocks or len(self.blocks) != len(self.stage_channels):
            raise ValueError(f"encoder: blocks {self.blocks} and stage_channels {self.stage_channels} do not match")

    @property
    def channels(self) -> int:
        """Channels of the pooled output."""
        return self.stage_channels[-1]

    @property
    def positions(self) -> None:
        """The output is pooled."""
        return None


class StandardizedConv2d(Conv2d):
    """Convolution whose weight has zero mean and unit variance per output channel, times a learned gain."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, stride=1, padding=0, rngs: nnx.Rngs):
        options = {"param": EncoderParam, "stride": stride, "padding": padding, "use_bias": True, "rngs": rngs}
        super().__init__(in_channels, out_channels, kernel, **options)
        self.gain = EncoderParam(jnp.ones((out_channels, 1, 1, 1)))

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h2 w2 o"]:
        weight = self.weight[...]
        mean = weight.mean((1, 2, 3), keepdims=True)
        variance = jnp.square(weight - mean).mean((1, 2, 3), keepdims=True)
        scale = RELU_GAMMA / math.sqrt(math.prod(weight.shape[1:]))
        weight = (weight - mean) * jax.lax.rsqrt(variance + 1e-5) * self.gain[...] * scale
        y = conv2d(x, weight.astype(x.dtype), self.stride, self.padding)
        assert self.bias is not None  # use_bias above
        return y + self.bias[...].astype(x.dtype)


class Block(nnx.Module):
    """Pre-activation bottleneck; the stride is in the 3x3 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int, alpha: float, *, rngs: nnx.Rngs):
        self.stride, self.alpha = stride, alpha
        middle = channels // 4
        changes = stride > 1 or in_channels != channels
        self.downsample = StandardizedConv2d(in_channels, channels, 1, rngs=rngs) if changes else None
        self.conv1 = StandardizedConv2d(in_channels, middle, 1, rngs=rngs)
        self.conv2 = StandardizedConv2d(middle, middle, 3, stride=stride, padding=1, rngs=rngs)
        self.conv3 = StandardizedConv2d(middle, channels, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"], beta: Float[Array, ""]) -> Float[Array, "B h2 w2 C2"]:
        y = jax.nn.relu(x) * beta.astype(x.dtype)
        if self.downsample is not None:
            x = self.downsample(_average_pool_ceil(y) if self.stride > 1 else y)
        y = self.conv2(jax.nn.relu(self.conv1(y)))
        return x + self.alpha * self.conv3(jax.nn.relu(y))


class Stage(nnx.Module):
    """A first block that changes the shape, then identical ones as one stack."""

    def __init__(self, in_channels, channels, blocks, stride, alpha, *, rngs: nnx.Rngs):
        self.first = Block(in_channels, channels, stride, alpha, rngs=rngs)
        self.rest = (
            stack(lambda rngs: Block(channels, channels, 1, alpha, rngs=rngs), blocks - 1, rngs) if blocks > 1 else None
        )

    def __call__(
        self, x: Float[Array, "B h w C"], betas: Float[Array, " N"], remat: Remat = "none"
    ) -> Float[Array, "B h2 w2 C2"]:
        x = remat_call(self.first, lambda block, x: block(x, betas[0]), x, remat=remat)
        if self.rest is not None:
            x, _ = scan(self.rest, lambda block, x, beta: (block(x, beta), None), x, betas[1:], remat=remat)
        return x


class NFResNet(nnx.Module):
    """Normalised images to one pooled feature vector each."""

    def __init__(self, config: NFResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.stem_conv = StandardizedConv2d(3, config.stem_channels, 7, stride=2, padding=3, rngs=rngs)
        inputs = (config.stem_channels, *config.stage_channels[:-1])
        self.stage1, self.stage2, self.stage3, self.stage4 = (
            Stage(
                inputs[i],
                config.stage_channels[i],
                config.blocks[i],
                1 if i == 0 else 2,
                config.alpha,
                rngs=rngs,
            )
            for i in range(4)
        )

    def stem(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B h4 w4 C"]:
        """Convolution and max pool: a quarter of the resolution."""
        return jax.lax.reduce_window(
            self.stem_conv(images),
            -jnp.inf,
            jax.lax.max,
            (1, 3, 3, 1),
            (1, 2, 2, 1),
            ((0, 0), (1, 1), (1, 1), (0, 0)),
        )

    def betas(self) -> list[Float[Array, " N"]]:
        """Per stage and block, the reciprocal of the expected standard deviation of the block's input.

        The variance grows by alpha**2 per block and restarts from one at each block that projects its shortcut.
        """
        variance, stages = 1.0, []
        for blocks in self.config.blocks:
            betas = []
            for block in range(blocks):
                betas.append(variance**-0.5)
                variance = (1.0 if block == 0 else variance) + self.config.alpha**2
            stages.append(jnp.array(betas, jnp.float32))
        return stages

    def __call__(
        self, images: Float[Array, "B h w 3"], *, batch_norm: BatchNormMode = "frozen", remat: Remat = "none"
    ) -> Float[Array, "B C"]:
        """``batch_norm`` is part of the encoder interface and is ignored."""
        x = self.stem(images)
        stages = (self.stage1, self.stage2, self.stage3, self.stage4)
        for stage, betas in zip(stages, self.betas(), strict=True):
            x = stage(x, betas, remat)
        return jax.nn.relu(x).mean((1, 2))


def _average_pool_ceil(x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C"]:
    """2x2 means with stride 2; an odd last row or column is averaged over its pixels only (as in timm's shortcut)."""
    pad = ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0))
    window = ((1, 2, 2, 1), (1, 2, 2, 1), pad)
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, *window)
    count = jax.lax.reduce_window(jnp.ones((1, *x.shape[1:3], 1), x.dtype), 0.0, jax.lax.add, *window)
    return total / count
