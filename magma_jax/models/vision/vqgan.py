"""VQ-GAN (Esser et al., 2021): an image to a grid of codes and back.

Modules and channel counts follow taming-transformers. Images are (B, height, width, 3) in -1 to 1; height and width
are multiples of ``factor`` and need not be the config's ``image_size``, which only places the attention.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.config import check_sizes
from magma_jax.family import ShardingRow
from magma_jax.models.vision.quantizer import nearest_codes, straight_through
from magma_jax.nn.attention import dot_product_attention
from magma_jax.nn.convolution import Conv2d, GroupNorm
from magma_jax.nn.layers import Embedding
from magma_jax.nn.masks import Mask
from magma_jax.nn.modules import TokenizerParam
from magma_jax.typing import Array, Float, Int, PRNGKey, UInt8

# Mean and standard deviation that pixels (0 to 1) are normalised with: -1 to 1.
PIXEL_MEAN = PIXEL_STD = (0.5, 0.5, 0.5)

GROUPS = 32

# Where a model holds its image tokenizer, and the shardings of its parameters, there and alone; one row matches each.
TOKENIZER = "image_tokenizer"
_CONVOLUTION = r"(conv\w*|nin_shortcut|[qkv]|proj_out|upsample\d+|downsample\d+|quant_conv|post_quant_conv)"
SHARDINGS: tuple[ShardingRow, ...] = (
    (rf"({TOKENIZER}/)?((encoder|decoder)/(.*/)?)?{_CONVOLUTION}/weight", ("fsdp", None, None, None)),
    (rf"({TOKENIZER}/)?((encoder|decoder)/(.*/)?)?{_CONVOLUTION}/bias", ()),
    (rf"({TOKENIZER}/)?(encoder|decoder)/(.*/)?norm\w*/(weight|bias)", ()),
    # Split by width, as tables of words are.
    (rf"({TOKENIZER}/)?codebook/weight", (None, ("fsdp", "model"))),
)


@dataclasses.dataclass(frozen=True)
class VQGANConfig:
    """Sizes of a VQ-GAN; the defaults are taming's ``vqgan_imagenet_f16_16384``.

    Attributes:
        image_size: nominal side of the images.
        patch: pixels along the side of what the first convolution makes one position; 1 in published models. With
            larger patches, pixels are added to the first 3 patch^2 channels of a latent, and those to the decoded
            pixels, so that an untrained model is a quantizer of patches.
        width: channels of the first convolution.
        multipliers: channels of each level, in multiples of ``width``; every level but the first halves the sides.
        blocks: residual blocks of a level of the encoder; the decoder's levels have one more.
        attention_sizes: nominal sides, in positions, of the levels with attention. The lowest one always has attention
            in its middle.
        latent_channels: channels between encoder, codebook and decoder.
        code_width: width of a code.
        codes: number of codes.
    """

    image_size: int = 256
    patch: int = 1
    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention_sizes: tuple[int, ...] = (16,)
    latent_channels: int = 256
    code_width: int = 256
    codes: int = 16384
    kind: Literal["vqgan"] = "vqgan"

    def __post_init__(self):
        check_sizes(self, *(field.name for field in dataclasses.fields(VQGANConfig) if field.name != "kind"))
        if not self.multipliers:
            raise ValueError("tokenizer: multipliers must name at least one level")
        if self.width % GROUPS:
            raise ValueError(f"tokenizer: width must be a multiple of {GROUPS}, the groups of its norms; {self.width}")
        if self.image_size % self.factor:
            raise ValueError(
                f"tokenizer: {len(self.multipliers)} levels of patches of {self.patch} need an image_size that is a "
                f"multiple of {self.factor}, got {self.image_size}"
            )
        if self.patch > 1 and (len(self.multipliers) > 1 or self.code_width < 3 * self.patch**2):
            raise ValueError(
                f"tokenizer: a patch of {self.patch} needs a single level and a code_width of at least "
                f"{3 * self.patch**2}, got {len(self.multipliers)} levels and {self.code_width}"
            )
        if unused := sorted(set(self.attention_sizes) - set(self.sizes)):
            raise ValueError(f"tokenizer: attention_sizes {unused} are no level's side; these are {list(self.sizes)}")

    @property
    def factor(self) -> int:
        """Pixels along the side of a code."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Nominal side of each level, in positions."""
        return tuple(self.image_size // self.patch // 2**level for level in range(len(self.multipliers)))

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def tokens(self) -> int:
        """Codes of an image of the nominal size."""
        return (self.image_size // self.factor) ** 2


# Published sizes. f8 has one level fewer, as CM3Leon's 1,024 tokens of an image of 256 pixels ask for.
VQGANS = {
    "vqgan_f16_16384": VQGANConfig(),
    "vqgan_f8_8192": VQGANConfig(multipliers=(1, 1, 2, 4), attention_sizes=(32,), codes=8192),
}


class Reconstruction(NamedTuple):
    """Result of a forward pass: what the losses compare.

    Attributes:
        images: decoded images.
        latents: encoder outputs before quantisation.
        quantized: their codebook rows.
        codes: the indices of these rows.
    """

    images: Float[Array, "B H W 3"]
    latents: Float[Array, "B h w D"]
    quantized: Float[Array, "B h w D"]
    codes: Int[Array, "B h w"]


class ResnetBlock(nnx.Module):
    """Two pre-activated 3x3 convolutions and a shortcut, a 1x1 convolution if the channels change."""

    def __init__(self, in_channels: int, channels: int, *, rngs: nnx.Rngs):
        self.norm1 = _norm(in_channels)
        self.conv1 = _conv(in_channels, channels, 3, rngs)
        self.norm2 = _norm(channels)
        self.conv2 = _conv(channels, channels, 3, rngs)
        self.nin_shortcut = _conv(in_channels, channels, 1, rngs) if in_channels != channels else None

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C2"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttentionBlock(nnx.Module):
    """Attention of one head over all positions, with a residual."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (_conv(channels, channels, 1, rngs) for _ in range(4))

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        y = self.norm(x)
        flat = x.shape[0], x.shape[1] * x.shape[2], x.shape[3]
        q, k, v = (conv(y).reshape(flat) for conv in (self.q, self.k, self.v))
        attended, _ = dot_product_attention(q[:, :, None], k[:, None], v[:, None], Mask(kind="full"))
        return x + self.proj_out(attended.reshape(x.shape))


class Level(nnx.Module):
    """Residual blocks of one resolution, each followed by attention if the level has any."""

    def __init__(self, in_channels: int, channels: int, blocks: int, attention: bool, *, rngs: nnx.Rngs):
        self.blocks, self.attention = blocks, attention
        for i in range(blocks):
            setattr(self, f"block{i}", ResnetBlock(in_channels if i == 0 else channels, channels, rngs=rngs))
            if attention:
                setattr(self, f"attn{i}", AttentionBlock(channels, rngs=rngs))

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C2"]:
        for i in range(self.blocks):
            x = getattr(self, f"block{i}")(x)
            if self.attention:
                x = getattr(self, f"attn{i}")(x)
        return x


class Middle(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.block_1 = ResnetBlock(channels, channels, rngs=rngs)
        self.attn_1 = AttentionBlock(channels, rngs=rngs)
        self.block_2 = ResnetBlock(channels, channels, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nnx.Module):
    """Images to feature maps of ``latent_channels``."""

    def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
        self.levels, patch = len(config.channels), config.patch
        if patch == 1:
            self.conv_in = _conv(3, config.width, 3, rngs)
        else:
            self.conv_in = Conv2d(3, config.width, patch, stride=patch, use_bias=True, param=TokenizerParam, rngs=rngs)
        inputs = (config.width, *config.channels)
        for i, channels in enumerate(config.channels):
            attention = config.sizes[i] in config.attention_sizes
            setattr(self, f"down{i}", Level(inputs[i], channels, config.blocks, attention, rngs=rngs))
            if i < self.levels - 1:
                downsample = Conv2d(channels, channels, 3, stride=2, use_bias=True, param=TokenizerParam, rngs=rngs)
                setattr(self, f"downsample{i}", downsample)
        self.mid = Middle(config.channels[-1], rngs=rngs)
        self.norm_out = _norm(config.channels[-1])
        self.conv_out = _last_conv(config, config.channels[-1], config.latent_channels, rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w Z"]:
        x = self.conv_in(images)
        for i in range(self.levels):
            x = getattr(self, f"down{i}")(x)
            if i < self.levels - 1:
                # Zeros on the right and at the bottom only, as in the original.
                x = getattr(self, f"downsample{i}")(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))))
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Feature maps of ``latent_channels`` to pixels; ``up0`` is the level of the full resolution."""

    def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
        self.levels = len(config.channels)
        self.conv_in = _conv(config.latent_channels, config.channels[-1], 3, rngs)
        self.mid = Middle(config.channels[-1], rngs=rngs)
        inputs = (*config.channels[1:], config.channels[-1])
        for i in reversed(range(self.levels)):
            channels, attention = config.channels[i], config.sizes[i] in config.attention_sizes
            setattr(self, f"up{i}", Level(inputs[i], channels, config.blocks + 1, attention, rngs=rngs))
            if i > 0:
                setattr(self, f"upsample{i}", _conv(channels, channels, 3, rngs))
        self.norm_out = _norm(config.channels[0])
        self.conv_out = _last_conv(config, config.channels[0], 3 * config.patch**2, rngs)

    def features(self, latents: Float[Array, "B h w Z"]) -> Float[Array, "B h2 w2 D"]:
        """Inputs of the last convolution, whose gradients weigh the adversarial loss (``vqgan_losses``)."""
        x = self.mid(self.conv_in(latents))
        for i in reversed(range(self.levels)):
            x = getattr(self, f"up{i}")(x)
            if i > 0:
                x = getattr(self, f"upsample{i}")(x.repeat(2, axis=1).repeat(2, axis=2))
        return jax.nn.silu(self.norm_out(x))

    def __call__(self, latents: Float[Array, "B h w Z"]) -> Float[Array, "B h2 w2 C"]:
        """Pixels of each position, the three of an image unless the config has patches."""
        return self.conv_out(self.features(latents))


class VQGAN(nnx.Module):
    """Image tokenizer: ``encode`` to codes, ``decode`` from codes, and the forward pass of training."""

    def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.codebook = Embedding(
            config.codes, config.code_width, param=TokenizerParam, rngs=rngs, weight_init=_codebook_init
        )
        self.quant_conv = _conv(config.latent_channels, config.code_width, 1, rngs)
        self.post_quant_conv = _conv(config.code_width, config.latent_channels, 1, rngs)

    def latents(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        """Encoder outputs before quantisation. Raises ValueError if a side is not a multiple of ``factor``."""
        factor = self.config.factor
        if images.shape[1] % factor or images.shape[2] % factor:
            height, width = images.shape[1:3]
            raise ValueError(f"images of {height} x {width} pixels: both sides must be multiples of {factor}")
        latents = self.quant_conv(self.encoder(images))
        if self.config.patch == 1:
            return latents
        patches = _to_patches(images, self.config.patch)
        return latents + jnp.pad(patches, ((0, 0),) * 3 + ((0, latents.shape[3] - patches.shape[3]),))

    def encode(self, images: Float[Array, "B H W 3"]) -> Int[Array, "B h w"]:
        """Codes of images in -1 to 1."""
        return nearest_codes(self.latents(images), self.codebook.weight[...])

    def decode(self, codes: Int[Array, "B h w"]) -> Float[Array, "B H W 3"]:
        """Images of codes in 0 to ``codes`` - 1; their values may lie a little outside -1 to 1."""
        return self.decode_latents(self.codebook(codes, self.codebook.weight[...].dtype))

    def decode_latents(self, latents: Float[Array, "B h w D"]) -> Float[Array, "B H W 3"]:
        """Images of vectors in the codebook's space."""
        return self.to_images(self.decoder(self.post_quant_conv(latents)), latents)

    def to_images(self, pixels: Float[Array, "B h2 w2 C"], latents: Float[Array, "B h w D"]) -> Float[Array, "B H W 3"]:
        """Images of the decoder's outputs for ``latents``."""
        patch = self.config.patch
        return pixels if patch == 1 else _from_patches(pixels + latents[..., : 3 * patch**2], patch)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Reconstruction:
        """Encodes and decodes; the decoder's gradient passes the quantisation straight through."""
        latents = self.latents(images)
        codes = nearest_codes(latents, self.codebook.weight[...])
        quantized = self.codebook(codes, latents.dtype)
        return Reconstruction(
            images=self.decode_latents(straight_through(latents, quantized)),
            latents=latents,
            quantized=quantized,
            codes=codes,
        )


def from_pixels(pixels: UInt8[Array, "*batch H W 3"]) -> Float[Array, "*batch H W 3"]:
    """Images in -1 to 1 from pixels of 0 to 255."""
    return pixels.astype(jnp.float32) / 127.5 - 1


def to_pixels(images: Float[Array, "*batch H W 3"]) -> UInt8[Array, "*batch H W 3"]:
    """Pixels of 0 to 255 from images in -1 to 1; clipped and truncated, as in the original."""
    return (jnp.clip(images.astype(jnp.float32) * 0.5 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def _to_patches(images: Float[Array, "B H W 3"], patch: int) -> Float[Array, "B h w C"]:
    batch, height, width, _ = images.shape
    grid = images.reshape(batch, height // patch, patch, width // patch, patch, 3)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // patch, width // patch, 3 * patch**2)


def _from_patches(patches: Float[Array, "B h w C"], patch: int) -> Float[Array, "B H W 3"]:
    batch, rows, columns, _ = patches.shape
    grid = patches.reshape(batch, rows, columns, patch, patch, 3)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * patch, columns * patch, 3)


def _last_conv(config: VQGANConfig, in_channels: int, channels: int, rngs: nnx.Rngs) -> Conv2d:
    """Last convolution of a half; with patches it starts at zero, since what it adds to is an image already."""
    conv = _conv(in_channels, channels, 3, rngs)
    if config.patch > 1:
        conv.weight[...] = jnp.zeros_like(conv.weight[...])
    return conv


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(channels, param=TokenizerParam, groups=GROUPS)


def _conv(in_channels: int, channels: int, kernel: int, rngs: nnx.Rngs) -> Conv2d:
    return Conv2d(in_channels, channels, kernel, padding=kernel // 2, use_bias=True, param=TokenizerParam, rngs=rngs)


def _codebook_init(key: PRNGKey, shape: tuple[int, ...], dtype) -> Array:
    return jax.random.uniform(key, shape, dtype, -1 / shape[0], 1 / shape[0])
