"""A VQ-GAN with the parts that only its training uses."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from magma_jax.models.vision.lpips import SMALLEST, Lpips, PerceptualNet
from magma_jax.models.vision.patchgan import PatchGAN, PatchGANConfig
from magma_jax.models.vision.vqgan import SHARDINGS as TOKENIZER_SHARDINGS
from magma_jax.models.vision.vqgan import VQGAN, VQGANConfig
from magma_jax.nn.modules import DiscriminatorParam, PerceptualParam, Statistic, TokenizerParam
from magma_jax.training.step.optim import Group

# Together, exactly one row matches each parameter.
SHARDINGS = (
    *TOKENIZER_SHARDINGS,
    (r"discriminator/conv\w*/weight", ("fsdp", None, None, None)),
    (r"discriminator/(conv\w*/bias|bn\d+/.*)", ()),
    (r"perceptual/.*", ()),
    (r"usage|passes", ()),
)


@dataclasses.dataclass(frozen=True)
class TrainingParts:
    """Parts that only training uses.

    Attributes:
        discriminator: judges decoded images; None to train without one.
        perceptual: network whose features LPIPS compares; None to train without it.
    """

    discriminator: PatchGANConfig | None = None
    perceptual: PerceptualNet | None = None


@dataclasses.dataclass(frozen=True)
class VQGANModelConfig(VQGANConfig):
    """A VQ-GAN as a model of its own.

    Attributes:
        training: parts that only training uses; None in converted models. A run always has them.
    """

    training: TrainingParts | None = None
    kind: Literal["vqgan"] = "vqgan"

    def __post_init__(self):
        super().__post_init__()
        parts = self.training
        if parts is not None and parts.perceptual is not None and self.image_size < SMALLEST[parts.perceptual]:
            raise ValueError(
                f"model.training.perceptual: {parts.perceptual} needs images of at least {SMALLEST[parts.perceptual]} "
                f"pixels, got image_size {self.image_size}"
            )
        if parts is not None and parts.discriminator is not None and self.image_size < parts.discriminator.smallest:
            raise ValueError(
                f"model.training.discriminator of {parts.discriminator.layers} layers needs images of at least "
                f"{parts.discriminator.smallest} pixels, got image_size {self.image_size}; lower its layers"
            )

    @property
    def tokenizer(self) -> VQGANConfig:
        """The config of the tokenizer in it, as other models hold it."""
        return VQGANConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(VQGANConfig)})


class VQGANModel(VQGAN):
    """A VQ-GAN, its discriminator, the network of LPIPS, and running averages of training.

    ``usage`` is a moving average of how often a batch uses each code, ``passes`` the number of training passes.
    """

    config: VQGANModelConfig

    def __init__(self, config: VQGANModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        if config.training is None:
            return
        self.usage = Statistic(jnp.zeros((config.codes,)))
        self.passes = Statistic(jnp.zeros((), jnp.int32))
        discriminator = config.training.discriminator
        self.discriminator = None if discriminator is None else PatchGAN(discriminator, rngs=rngs)
        net = config.training.perceptual
        self.perceptual = None if net is None else Lpips(net, rngs=rngs)


def build(config: VQGANModelConfig, rngs: nnx.Rngs) -> VQGANModel:
    """The module of a config."""
    return VQGANModel(config, rngs=rngs)


def roles(config: VQGANModelConfig) -> dict[str, Literal["frozen"] | Group]:
    """Roles of the parameters; the discriminator learns in the same step as the tokenizer, in a group of its own."""
    groups: dict[str, Literal["frozen"] | Group] = {TokenizerParam.role: Group()}
    if config.training is not None and config.training.perceptual is not None:
        groups[PerceptualParam.role] = "frozen"
    if config.training is not None and config.training.discriminator is not None:
        groups[DiscriminatorParam.role] = Group()
    return groups
