"""CLIP's ResNet: a three-convolution stem, bottlenecks that downsample by average pooling, an attention pool.

MAGMA uses the grid before the pool, flattened row by row: 144 x 3072 for RN50x16 at 384 px (paper, section 3.1).
With ``attention_pool=True`` the module also gives CLIP's own image embedding (Radford et al., 2021, section 2.4).
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.config import check_sizes
from magma_jax.nn.attention import dot_product_attention
from magma_jax.nn.convolution import BatchNorm, BatchNormMode, Conv2d, average_pool
from magma_jax.nn.layers import Linear, normal
from magma_jax.nn.masks import Mask
from magma_jax.nn.modules import EncoderParam
from magma_jax.nn.stack import Remat, remat_call, scan, stack
from magma_jax.typing import Array, Float

_conv = functools.partial(Conv2d, param=EncoderParam)
_norm = functools.partial(BatchNorm, param=EncoderParam)


@dataclasses.dataclass(frozen=True)
class CLIPResNetConfig:
    """Sizes of a CLIP ResNet.

    Attributes:
        blocks: bottlenecks in each of the four stages.
        width: channels after the stem; the grid has 32 times as many.
        image_size: pixels per side; the grid has image_size / 32 positions per side.
        embedding_width: width of CLIP's pooled embedding.
        attention_pool: whether the module has CLIP's attention pool; MAGMA drops it.
    """

    blocks: tuple[int, int, int, int] = (6, 8, 18, 8)
    width: int = 96
    image_size: int = 384
    embedding_width: int = 768
    attention_pool: bool = False
    kind: Literal["clip_resnet"] = "clip_resnet"

    def __post_init__(self):
        check_sizes(self, "blocks", "width", "image_size", "embedding_width")
        if self.image_size < 32:
            raise ValueError(f"encoder: image_size {self.image_size} is below 32 and leaves no position")

    @property
    def channels(self) -> int:
        """Channels of the grid."""
        return self.width * 32

    @property
    def positions(self) -> int:
        """Positions of the grid."""
        return (self.image_size // 32) ** 2

    @property
    def pool_heads(self) -> int:
        """Heads of the attention pool: 64 channels each (CLIP), at least one."""
        return max(self.channels // 64, 1)


# Radford et al. (2021), table 20. RN50x4 at 288 px gives 9 x 9 = 81 positions.
CLIP_RESNETS = {
    "RN50": CLIPResNetConfig((3, 4, 6, 3), 64, 224, 1024),
    "RN101": CLIPResNetConfig((3, 4, 23, 3), 64, 224, 512),
    "RN50x4": CLIPResNetConfig((4, 6, 10, 6), 80, 288, 640),
    "RN50x16": CLIPResNetConfig((6, 8, 18, 8), 96, 384, 768),
    "RN50x64": CLIPResNetConfig((3, 15, 36, 10), 128, 448, 1024),
}


class Bottleneck(nnx.Module):
    """1x1, 3x3, average pool in place of a stride, 1x1; the shortcut is pooled and projected where shapes change."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, rngs: nnx.Rngs):
        self.stride = stride
        self.conv1, self.bn1 = _conv(in_channels, channels, 1, rngs=rngs), _norm(channels)
        self.conv2, self.bn2 = _conv(channels, channels, 3, padding=1, rngs=rngs), _norm(channels)
        self.conv3, self.bn3 = _conv(channels, 4 * channels, 1, rngs=rngs), _norm(4 * channels)
        changes = stride > 1 or in_channels != 4 * channels
        self.downsample_conv = _conv(in_channels, 4 * channels, 1, rngs=rngs) if changes else None
        self.downsample_bn = _norm(4 * channels) if changes else None

    def __call__(self, x: Float[Array, "B h w C"], mode: BatchNormMode) -> Float[Array, "B h2 w2 C2"]:
        y = jax.nn.relu(self.bn1(self.conv1(x), mode))
        y = jax.nn.relu(self.bn2(self.conv2(y), mode))
        y = self.bn3(self.conv3(average_pool(y, self.stride)), mode)
        if self.downsample_conv is not None and self.downsample_bn is not None:
            x = self.downsample_bn(self.downsample_conv(average_pool(x, self.stride)), mode)
        return jax.nn.relu(x + y)


class Stage(nnx.Module):
    """A first bottleneck that changes the shape, then identical ones as one stack."""

    def __init__(self, in_channels: int, channels: int, blocks: int, stride: int, *, rngs: nnx.Rngs):
        self.first = Bottleneck(in_channels, channels, stride, rngs=rngs)
        self.rest = (
            stack(lambda rngs: Bottleneck(4 * channels, channels, 1, rngs=rngs), blocks - 1, rngs)
            if blocks > 1
            else None
        )

    def __call__(
        self, x: Float[Array, "B h w C"], mode: BatchNormMode, remat: Remat = "none"
    ) -> Float[Array, "B h2 w2 C2"]:
        x = remat_call(self.first, lambda block, x: block(x, mode), x, remat=remat)
        if self.rest is not None:
            x, _ = scan(self.rest, lambda block, x, _: (block(x, mode), None), x, remat=remat)
        return x


class AttentionPool(nnx.Module):
    """CLIP's pool: the mean of the grid attends to the grid, with learned positions."""

    def __init__(self, config: CLIPResNetConfig, *, rngs: nnx.Rngs):
        width = config.channels
        self.heads = config.pool_heads
        init = normal(1 / math.sqrt(width))
        self.positional_embedding = EncoderParam(init(rngs.params(), (config.positions + 1, width), jnp.float32))
        options: dict[str, Any] = {"param": EncoderParam, "weight_init": init, "rngs": rngs}
        self.q_proj, self.k_proj, self.v_proj = (Linear(width, width, **options) for _ in range(3))
        self.c_proj = Linear(width, config.embedding_width, **options)

    def __call__(self, grid: Float[Array, "B P C"]) -> Float[Array, "B E"]:
        x = jnp.concatenate([grid.mean(1, keepdims=True), grid], axis=1)
        x = x + self.positional_embedding[...].astype(x.dtype)
        q, k, v = (
            proj(y).reshape(*y.shape[:2], self.heads, -1)
            for proj, y in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        pooled, _ = dot_product_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), Mask("full"))
        return self.c_proj(pooled.reshape(x.shape[0], -1))


class CLIPResNet(nnx.Module):
    """Images to a grid of features; the stages are attributes so that each can be tested alone."""

    def __init__(self, config: CLIPResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        half, width = config.width // 2, config.width
        self.conv1, self.bn1 = _conv(3, half, 3, stride=2, padding=1, rngs=rngs), _norm(half)
        self.conv2, self.bn2 = _conv(half, half, 3, padding=1, rngs=rngs), _norm(half)
        self.conv3, self.bn3 = _conv(half, width, 3, padding=1, rngs=rngs), _norm(width)
        blocks = config.blocks
        self.layer1 = Stage(width, width, blocks[0], 1, rngs=rngs)
        self.layer2 = Stage(4 * width, 2 * width, blocks[1], 2, rngs=rngs)
        self.layer3 = Stage(8 * width, 4 * width, blocks[2], 2, rngs=rngs)
        self.layer4 = Stage(16 * width, 8 * width, blocks[3], 2, rngs=rngs)
        self.attnpool = AttentionPool(config, rngs=rngs) if config.attention_pool else None

    def stem(self, images: Float[Array, "B h w 3"], mode: BatchNormMode) -> Float[Array, "B h4 w4 C"]:
        """Three convolutions and a pool: a quarter of the resolution."""
        x = jax.nn.relu(self.bn1(self.conv1(images), mode))
        x = jax.nn.relu(self.bn2(self.conv2(x), mode))
        x = jax.nn.relu(self.bn3(self.conv3(x), mode))
        return average_pool(x, 2)

    def __call__(
        self, images: Float[Array, "B h w 3"], *, batch_norm: BatchNormMode = "frozen", remat: Remat = "none"
    ) -> Float[Array, "B P C"]:
        """Normalised images to the grid, row by row."""
        x = remat_call(self, lambda model, images: model.stem(images, batch_norm), images, remat=remat)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x, batch_norm, remat)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def pool(self, grid: Float[Array, "B P C"]) -> Float[Array, "B E"]:
        """CLIP's image embedding of the grid."""
        if self.attnpool is None:
            raise ValueError("this CLIP ResNet was built without its attention pool (attention_pool=False)")
        return self.attnpool(grid)
