"""Loss terms of VQ-GAN training (Esser et al., 2021) as functions of images and of a discriminator's scores.

The codebook's loss is in ``quantizer``. Everything is computed in fp32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from magma_jax.typing import Array, Float, Int

# taming-transformers: discriminator_weight of its configs, and the limits of the adaptive weight.
ADVERSARIAL_WEIGHT = 0.8
SMALLEST_NORM, LARGEST_WEIGHT = 1e-4, 1e4


def reconstruction_loss(
    images: Float[Array, "B H W 3"], targets: Float[Array, "B H W 3"], *, l1: float = 1.0, l2: float = 0.0
) -> Float[Array, ""]:
    """``l1`` times the mean absolute difference plus ``l2`` times the mean squared one."""
    difference = images.astype(jnp.float32) - targets.astype(jnp.float32)
    return l1 * jnp.abs(difference).mean() + l2 * jnp.square(difference).mean()


def discriminator_loss(real: Float[Array, "*scores"], fake: Float[Array, "*scores"]) -> Float[Array, ""]:
    """Hinge loss: real scores below 1 and fake scores above -1 cost, each half."""
    real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def generator_loss(fake: Float[Array, "*scores"]) -> Float[Array, ""]:
    """Negative mean score of decoded images."""
    return -fake.astype(jnp.float32).mean()


def adaptive_weight(
    decode: Callable[[Array], Array],
    weight: Float[Array, "o i k k"],
    reconstruction: Callable[[Array], Array],
    adversarial: Callable[[Array], Array],
) -> Float[Array, ""]:
    """Ratio of the two losses' gradient norms at the decoder's last convolution, without a gradient of its own.

    Args:
        decode: ``weight`` of the last convolution to images.
        weight: its value.
        reconstruction: images to the reconstruction loss, the perceptual one included.
        adversarial: images to ``generator_loss``.
    """

    def norm(loss: Callable[[Array], Array]) -> Array:
        gradient = jax.grad(lambda weight: loss(decode(weight)))(jax.lax.stop_gradient(weight))
        return jnp.sqrt(jnp.square(gradient.astype(jnp.float32)).sum())

    ratio = norm(reconstruction) / (norm(adversarial) + SMALLEST_NORM)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0, LARGEST_WEIGHT))


def adversarial_factor(step: Int[Array, ""] | int, start: int, weight: float = ADVERSARIAL_WEIGHT) -> Float[Array, ""]:
    """Factor of both adversarial losses: 0 before step ``start``, then ``weight``."""
    return jnp.where(jnp.asarray(step) < start, 0.0, weight)


def psnr(images: Float[Array, "B H W 3"], targets: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
    """Peak signal-to-noise ratio of each image in dB, for values clipped to -1 to 1; infinite for equal ones."""
    difference = jnp.clip(images.astype(jnp.float32), -1, 1) - jnp.clip(targets.astype(jnp.float32), -1, 1)
    return 10 * jnp.log10(4 / jnp.square(difference).mean((1, 2, 3)))
