"""Vision transformers of today: SigLIP and SigLIP 2 (Zhai et al., 2023; Tschannen et al., 2025), DINOv2 (Oquab et al.,
2023) with and without registers (Darcet et al., 2023), and DINOv3 (Siméoni et al., 2025).

Each kind is a config whose ``layout`` describes the blocks. ``grid`` gives the patch tokens after the last LayerNorm;
``pooled`` gives the class token of a DINO, and what SigLIP's attention head reads from the patches.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.config import check_sizes
from magma_jax.models.vision.clip_vit import scaled
from magma_jax.nn.activations import ACTIVATIONS
from magma_jax.nn.attention import dot_product_attention
from magma_jax.nn.convolution import BatchNormMode, Conv2d
from magma_jax.nn.layers import LayerNorm, Linear, normal
from magma_jax.nn.masks import Mask
from magma_jax.nn.modules import EncoderParam
from magma_jax.nn.rotary import apply_rotary
from magma_jax.nn.stack import Remat, scan, stack
from magma_jax.runtime.sharding import split_rows
from magma_jax.typing import Array, Float

Output = Literal["pooled", "grid"]
# A gate beside the MLP's first matrix, or in the first half of its rows.
Gate = Literal["none", "beside", "joined"]


class ViTLayout(NamedTuple):
    """What the kinds vary.

    Attributes:
        extra: tokens before the patches, the class token and registers.
        table: rows of the table of positions; 0 for none.
        rotary_base: base of rotary angles of the patches; None for none.
        layer_scale: whether a learned factor per channel follows attention and MLP.
        key_bias: whether keys have a bias.
        pool: how ``pooled`` reads the tokens.
    """

    extra: int
    table: int
    pool: Literal["class", "attention"]
    activation: str
    eps: float
    rotary_base: float | None = None
    layer_scale: bool = False
    key_bias: bool = True
    gate: Gate = "none"


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer.

    Attributes:
        layers: number of blocks.
        width: features of a patch token.
        heads: number of attention heads.
        feed_forward: hidden features of the MLP.
        patch: pixels per side of a patch.
        image_size: pixels per side; published tables of positions are resized to it.
        output: ``grid`` (patch tokens) or ``pooled`` (one vector).
        eps: added to the variance in LayerNorms.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    feed_forward: int = 3072
    patch: int = 16
    image_size: int = 224
    output: Output = "grid"
    eps: float = 1e-6

    def __post_init__(self):
        check_sizes(self, "layers", "width", "heads", "feed_forward", "patch", "image_size")
        if self.width % self.heads:
            raise ValueError(f"encoder: {self.heads} heads do not divide the width {self.width}")
        if self.image_size < self.patch:
            raise ValueError(f"encoder: image_size {self.image_size} is smaller than a patch of {self.patch}")

    @property
    def patches(self) -> int:
        """Patches of an image; pixels beyond the last whole patch are not seen."""
        return (self.image_size // self.patch) ** 2

    @property
    def channels(self) -> int:
        """Channels of the output."""
        return self.width

    @property
    def positions(self) -> int | None:
        """Positions of the grid; None for the pooled output."""
        return None if self.output == "pooled" else self.patches

    def layout(self) -> ViTLayout:
        """The blocks of this kind."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SiglipConfig(ViTConfig):
    """SigLIP, and SigLIP 2 of fixed size or NaFlex on square images."""

    kind: Literal["siglip"] = "siglip"

    def layout(self) -> ViTLayout:
        return ViTLayout(0, self.patches, "attention", "gelu_tanh", self.eps)


@dataclasses.dataclass(frozen=True)
class DINOv2Config(ViTConfig):
    """DINOv2.

    Attributes:
        registers: tokens without content beside the class token.
        gated: SwiGLU in place of the MLP, with ``feed_forward`` gated features.
    """

    patch: int = 14
    image_size: int = 518
    registers: int = 0
    gated: bool = False
    kind: Literal["dinov2"] = "dinov2"

    def layout(self) -> ViTLayout:
        return ViTLayout(
            1 + self.registers,
            1 + self.patches,
            "class",
            "silu" if self.gated else "gelu",
            self.eps,
            layer_scale=True,
            gate="joined" if self.gated else "none",
        )


@dataclasses.dataclass(frozen=True)
class DINOv3Config(ViTConfig):
    """DINOv3: rotary angles in place of a table of positions.

    Attributes:
        registers: tokens without content beside the class token.
        gated: SwiGLU in place of the MLP, with ``feed_forward`` gated features.
        rotary_base: base of the rotary frequencies, ``theta``.
    """

    eps: float = 1e-5
    registers: int = 4
    gated: bool = False
    rotary_base: float = 100.0
    kind: Literal["dinov3"] = "dinov3"

    def __post_init__(self):
        super().__post_init__()
        if self.width // self.heads % 4:
            raise ValueError(f"encoder: heads of {self.width // self.heads} do not divide into rows and columns by 4")

    def layout(self) -> ViTLayout:
        return ViTLayout(
            1 + self.registers,
            0,
            "class",
            "silu" if self.gated else "gelu",
            self.eps,
            rotary_base=self.rotary_base,
            layer_scale=True,
            key_bias=False,
            gate="beside" if self.gated else "none",
        )


_SO400M: dict[str, Any] = {"layers": 27, "width": 1152, "heads": 16, "feed_forward": 4304}
_LARGE: dict[str, Any] = {"layers": 24, "width": 1024, "heads": 16, "feed_forward": 4096}
_SMALL: dict[str, Any] = {"width": 384, "heads": 6, "feed_forward": 1536}

# The grids; ``output`` chooses the pooled vector.
VITS: dict[str, SiglipConfig | DINOv2Config | DINOv3Config] = {
    "google/siglip-base-patch16-224": SiglipConfig(),
    "google/siglip-base-patch16-384": SiglipConfig(image_size=384),
    "google/siglip-large-patch16-256": SiglipConfig(**_LARGE, image_size=256),
    "google/siglip-so400m-patch14-384": SiglipConfig(**_SO400M, patch=14, image_size=384),
    "google/siglip2-base-patch16-224": SiglipConfig(),
    "google/siglip2-so400m-patch14-384": SiglipConfig(**_SO400M, patch=14, image_size=384),
    "google/siglip2-base-patch16-naflex": SiglipConfig(image_size=256),
    "facebook/dinov2-small": DINOv2Config(**_SMALL),
    "facebook/dinov2-base": DINOv2Config(),
    "facebook/dinov2-large": DINOv2Config(**_LARGE),
    "facebook/dinov2-giant": DINOv2Config(40, 1536, 24, 4096, gated=True),
    "facebook/dinov2-with-registers-base": DINOv2Config(registers=4),
    "facebook/dinov3-vits16-pretrain-lvd1689m": DINOv3Config(**_SMALL),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": DINOv3Config(),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": DINOv3Config(**_LARGE),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": DINOv3Config(32, 1280, 20, 5120, gated=True),
}


class Attention(nnx.Module):
    """Full attention; with a table of sines and cosines (S, R) queries and keys are rotated."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        width = config.width
        options: dict[str, Any] = {"param": EncoderParam, "weight_init": normal(0.02), "rngs": rngs}
        self.q_proj = Linear(width, width, **options)
        self.k_proj = Linear(width, width, use_bias=config.layout().key_bias, **options)
        self.v_proj = Linear(width, width, **options)
        self.out_proj = Linear(width, width, **options)

    def __call__(self, x: Float[Array, "B S D"], turned: tuple[Array, Array] | None) -> Float[Array, "B S D"]:
        q, k, v = (proj(x).reshape(*x.shape[:2], self.heads, -1) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if turned is not None:
            q, k = (apply_rotary(part, *turned, interleaved=False) for part in (q, k))
        out, _ = dot_product_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), Mask("full"))
        return self.out_proj(out.reshape(x.shape))


class MLP(nnx.Module):
    """Two linear layers, or SwiGLU."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        layout, inner = config.layout(), config.feed_forward
        options: dict[str, Any] = {"param": EncoderParam, "weight_init": normal(0.02), "rngs": rngs}
        self.layout = layout
        self.c_gate = Linear(config.width, inner, **options) if layout.gate == "beside" else None
        self.c_fc = Linear(config.width, 2 * inner if layout.gate == "joined" else inner, **options)
        self.c_proj = Linear(inner, config.width, **options)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        function = ACTIVATIONS[self.layout.activation].function
        if self.layout.gate == "joined":
            gate, inner = jnp.split(self.c_fc(x), 2, axis=-1)
            return self.c_proj(function(gate) * inner)
        inner = self.c_fc(x)
        return self.c_proj(function(inner) if self.c_gate is None else function(self.c_gate(x)) * inner)


class Block(nnx.Module):
    """Pre-LayerNorm block."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        width, layout = config.width, config.layout()
        self.ln_1, self.ln_2 = (LayerNorm(width, param=EncoderParam, eps=layout.eps) for _ in range(2))
        self.attn, self.mlp = Attention(config, rngs=rngs), MLP(config, rngs=rngs)
        scales = [EncoderParam(jnp.ones((width,)), decay=False) if layout.layer_scale else None for _ in range(2)]
        self.scale_1, self.scale_2 = scales

    def __call__(self, x: Float[Array, "B S D"], turned: tuple[Array, Array] | None) -> Float[Array, "B S D"]:
        x = x + scaled(self.attn(self.ln_1(x), turned), self.scale_1)
        return x + scaled(self.mlp(self.ln_2(x)), self.scale_2)


class AttentionPool(nnx.Module):
    """SigLIP's head: a learned query reads the patches, and an MLP follows."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        width = config.width
        options: dict[str, Any] = {"param": EncoderParam, "weight_init": normal(0.02), "rngs": rngs}
        self.heads = config.heads
        self.probe = EncoderParam(jax.random.normal(rngs.params(), (width,)))
        self.in_proj, self.out_proj = Linear(width, 3 * width, **options), Linear(width, width, **options)
        self.ln = LayerNorm(width, param=EncoderParam, eps=config.eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B D"]:
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        q, _, _ = self._split(probe)
        _, k, v = self._split(x)
        out, _ = dot_product_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), Mask("full"))
        out = self.out_proj(out.reshape(probe.shape))[:, 0]
        return out + self.mlp(self.ln(out))

    def _split(self, x: Array) -> list[Array]:
        return [part.reshape(*x.shape[:2], self.heads, -1) for part in jnp.split(self.in_proj(x), 3, axis=-1)]


class VisionTransformer(nnx.Module):
    """Images to a pooled vector (B, D) or a grid of patch tokens (B, P, D)."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, layout = config.width, config.layout()
        table = normal(0.02)
        self.conv1 = Conv2d(3, width, config.patch, param=EncoderParam, stride=config.patch, use_bias=True, rngs=rngs)
        registers = layout.extra - 1
        self.class_token = EncoderParam(table(rngs.params(), (width,), jnp.float32)) if layout.extra else None
        self.registers = EncoderParam(table(rngs.params(), (registers, width), jnp.float32)) if registers > 0 else None
        self.position_table = (
            EncoderParam(table(rngs.params(), (layout.table, width), jnp.float32)) if layout.table else None
        )
        self.blocks = stack(lambda rngs: Block(config, rngs=rngs), config.layers, rngs)
        self.ln_post = LayerNorm(width, param=EncoderParam, eps=layout.eps)
        pools = config.output == "pooled" and layout.pool == "attention"
        self.head = AttentionPool(config, rngs=rngs) if pools else None

    def embed(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B S D"]:
        """Class token, registers and patches, with the positions of a table if there is one."""
        patches = self.conv1(images)
        x = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        if self.class_token is not None:
            x = jnp.concatenate([self._repeated(self.class_token[...][None], x), x], axis=1)
        if self.position_table is not None:
            x = x + self.position_table[...].astype(x.dtype)
        if self.registers is None:
            return x
        return jnp.concatenate([x[:, :1], self._repeated(self.registers[...], x), x[:, 1:]], axis=1)

    def _repeated(self, tokens: Array, x: Array) -> Array:
        return jnp.broadcast_to(tokens.astype(x.dtype), (x.shape[0], *tokens.shape))

    def __call__(
        self, images: Float[Array, "B h w 3"], *, batch_norm: BatchNormMode = "frozen", remat: Remat = "none"
    ) -> Float[Array, "B ..."]:
        """Normalised images to features; ``batch_norm`` is part of the encoder interface and is ignored."""
        layout = self.config.layout()
        x = self.embed(images)
        turned = None if layout.rotary_base is None else _rotary_of_patches(self.config, layout, x.shape[0])
        x, _ = scan(self.blocks, lambda block, x, _: (block(split_rows(x), turned), None), x, remat=remat)
        x = self.ln_post(x)
        if self.head is not None:
            return self.head(x)
        return x[:, 0] if self.config.output == "pooled" else x[:, layout.extra :]


def _rotary_of_patches(config: ViTConfig, layout: ViTLayout, batch: int) -> tuple[Array, Array]:
    """Sines and cosines (B, S, R) of rows and columns, from -1 to 1 over the image; other tokens are not turned."""
    side, size = config.image_size // config.patch, config.width // config.heads
    assert layout.rotary_base is not None
    frequencies = 1 / layout.rotary_base ** (jnp.arange(0, size // 4, dtype=jnp.float32) * (4 / size))
    centres = 2 * (jnp.arange(side, dtype=jnp.float32) + 0.5) / side - 1
    grid = jnp.stack(jnp.meshgrid(centres, centres, indexing="ij"), axis=-1).reshape(-1, 2)
    angles = (2 * math.pi * grid[:, :, None] * frequencies).reshape(grid.shape[0], -1)
    angles = jnp.pad(angles, ((layout.extra, 0), (0, 0)))
    angles = jnp.broadcast_to(angles, (batch, *angles.shape))
    return jnp.sin(angles), jnp.cos(angles)
