"""PatchGAN discriminator (Isola et al., 2017) as in taming-transformers: a score for each overlapping patch."""

import dataclasses
from typing import Literal

import jax
from flax import nnx

from magma_jax.config import check_sizes
from magma_jax.nn.convolution import BatchNorm, BatchNormMode, Conv2d
from magma_jax.nn.layers import normal
from magma_jax.nn.modules import DiscriminatorParam
from magma_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class PatchGANConfig:
    """Sizes of a discriminator; the defaults are those of the published VQ-GANs.

    Attributes:
        width: channels of the first convolution; each further one doubles them, up to eight times.
        layers: convolutions of stride 2. A score sees 70 x 70 pixels with three, 34 x 34 with two.
    """

    width: int = 64
    layers: int = 3
    kind: Literal["patchgan"] = "patchgan"

    def __post_init__(self):
        check_sizes(self, "width", "layers")

    @property
    def smallest(self) -> int:
        """Smallest side of an image that has a score."""
        return 3 * 2**self.layers


class PatchGAN(nnx.Module):
    """Images in -1 to 1 to scores, higher for images that look real."""

    def __init__(self, config: PatchGANConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = [config.width * min(2**i, 8) for i in range(config.layers + 1)]
        options = {"param": DiscriminatorParam, "padding": 1, "weight_init": normal(0.02), "rngs": rngs}
        self.conv_in = Conv2d(3, widths[0], 4, stride=2, use_bias=True, **options)
        for i in range(1, config.layers + 1):
            stride = 2 if i < config.layers else 1
            setattr(self, f"conv{i}", Conv2d(widths[i - 1], widths[i], 4, stride=stride, **options))
            norm = BatchNorm(widths[i], param=DiscriminatorParam)
            norm.weight[...] += 0.02 * jax.random.normal(rngs.params(), (widths[i],))
            setattr(self, f"bn{i}", norm)
        self.conv_out = Conv2d(widths[-1], 1, 4, use_bias=True, **options)

    def __call__(self, images: Float[Array, "B H W 3"], batch_norm: BatchNormMode) -> Float[Array, "B h w"]:
        """Scores of patches. In ``batch`` mode the running statistics are updated (``nn.convolution.BatchNorm``).

        Raises:
            ValueError: the images are too small to have a score.
        """
        if min(images.shape[1:3]) < self.config.smallest:
            raise ValueError(
                f"images of {images.shape[1]} x {images.shape[2]} pixels: a discriminator of {self.config.layers} "
                f"layers needs sides of at least {self.config.smallest}"
            )
        x = jax.nn.leaky_relu(self.conv_in(images), 0.2)
        for i in range(1, self.config.layers + 1):
            x = getattr(self, f"conv{i}")(x)
            x = jax.nn.leaky_relu(getattr(self, f"bn{i}")(x, batch_norm), 0.2)
        return self.conv_out(x)[..., 0]
