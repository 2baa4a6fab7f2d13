"""Loss of a VQ-GAN (Esser et al., 2021) as terms of one step.

The discriminator learns in the same step as the tokenizer: its term stops the gradient at the images, the generator's
stops it at the discriminator's weights, so each moves parameters of its own. (The original alternates two updates.)
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from magma_jax.families.vqgan.model import VQGANModel
from magma_jax.models.vision.codebook import code_counts, perplexity, restart_unused, share_used, update_usage
from magma_jax.models.vision.quantizer import CodebookLoss, nearest_codes, straight_through
from magma_jax.models.vision.vqgan import from_pixels
from magma_jax.models.vision.vqgan_losses import adaptive_weight, adversarial_factor, psnr, reconstruction_loss
from magma_jax.nn.convolution import conv2d
from magma_jax.nn.modules import merge, split
from magma_jax.training.step.terms import Term, Terms
from magma_jax.training.step.train_step import Batch
from magma_jax.typing import Array, Float, Int, PRNGKey

# Equal images have an infinite ratio; 8-bit pixels that differ by one have 48 dB.
LARGEST_PSNR = 60.0


@dataclasses.dataclass(frozen=True)
class VQGANOptions:
    """Options of the loss.

    Attributes:
        l1: weight of the mean absolute difference of images.
        l2: weight of the mean squared difference of images.
        perceptual_weight: weight of LPIPS, if the model has its network.
        codebook_loss: ``taming`` or ``vqvae``, which say which term ``beta`` multiplies, see ``quantizer``.
        beta: weight of the smaller one of the codebook's two terms.
        codebook_weight: weight of both.
        gan_weight: weight of the discriminator's losses, if the model has one.
        gan_start: step from which on they count.
        restart_below: a code restarts from a latent of the batch once its average use falls below this share of the
            mean; 0 for never. Where one code is most frequent, such as an empty background's, it must be small.
        usage_decay: decay of the averages of use.
        validating: whether running averages and codes stay as they are.
    """

    l1: float = 1.0
    l2: float = 0.0
    perceptual_weight: float = 1.0
    codebook_loss: CodebookLoss = "taming"
    beta: float = 0.25
    codebook_weight: float = 1.0
    gan_weight: float = 0.8
    gan_start: int = 10_000
    restart_below: float = 0.03
    usage_decay: float = 0.99
    validating: bool = False

    may_change: ClassVar[tuple[str, ...]] = ()
    # Parts of a batch restart codes one after the other, and a discriminator's BatchNorm sees the parts.
    adds_up: ClassVar[bool] = False

    def __post_init__(self):
        for name in ("l1", "l2", "perceptual_weight", "beta", "codebook_weight", "gan_weight", "gan_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} must not be negative, got {getattr(self, name)}")
        if not self.l1 and not self.l2:
            raise ValueError("loss: l1 and l2 are both 0, so nothing would compare the images")
        for name in ("restart_below", "usage_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"loss.{name} must be at least 0 and below 1, got {getattr(self, name)}")

    def for_validation(self) -> "VQGANOptions":
        """The options for validation: nothing is updated."""
        return dataclasses.replace(self, validating=True)


def vqgan_loss(model: VQGANModel, batch: Batch, key: PRNGKey | None, *, options: VQGANOptions) -> Terms:
    """Terms of a batch of ``images`` (B, H, W, 3), uint8.

    In training the model's averages are updated and its unused codes restart, see ``training.step.train_step``.

    Terms, by name: ``l1``, ``l2``, ``lpips``, ``commitment`` (moves the encoder to its codes), ``codebook`` (moves
    codes to the encoder's outputs), ``generator``, ``discriminator``; only logged: ``psnr`` in dB, ``codes_used`` (a
    share) and ``perplexity`` of the codes' average use (in validation of the batch), ``restarted`` codes,
    ``gan_weight``.
    """
    images = from_pixels(batch["images"])
    latents = model.latents(images)
    weight = model.codebook.weight[...]
    codes = nearest_codes(latents, weight)
    quantized = model.codebook(codes, latents.dtype)
    passed = straight_through(latents, quantized)
    features = model.decoder.features(model.post_quant_conv(passed))
    decoded = model.to_images(model.decoder.conv_out(features), passed)

    rows = jnp.int32(len(images))
    latents32, quantized32 = latents.astype(jnp.float32), quantized.astype(jnp.float32)
    to_codes = jnp.square(jax.lax.stop_gradient(quantized32) - latents32)
    to_latents = jnp.square(quantized32 - jax.lax.stop_gradient(latents32))
    taming = options.codebook_loss == "taming"
    weights = (1.0, options.beta) if taming else (options.beta, 1.0)
    terms = {
        "l1": _mean(jnp.abs(decoded - images), options.l1),
        "l2": _mean(jnp.square(decoded - images), options.l2),
        "commitment": _mean(to_codes, options.codebook_weight * weights[0]),
        "codebook": _mean(to_latents, options.codebook_weight * weights[1]),
        "psnr": Term(jnp.minimum(psnr(decoded, images), LARGEST_PSNR).sum(), rows, weight=0.0),
    }
    if model.perceptual is not None:
        terms["lpips"] = _mean(model.perceptual(decoded, images), options.perceptual_weight)
    if model.discriminator is not None:
        terms |= _adversarial(model, images, decoded, (features, passed), options)
    terms |= _codebook_terms(model, latents, codes, to_codes.mean(-1), key, options)
    return terms


def _mean(values: Float[Array, "B *rest"], weight: float) -> Term:
    """Mean over images of each image's mean."""
    values = values.astype(jnp.float32)
    return Term(values.reshape(len(values), -1).mean(1).sum(), jnp.int32(len(values)), weight=float(weight))


def _adversarial(
    model: VQGANModel,
    images: Float[Array, "B H W 3"],
    decoded: Float[Array, "B H W 3"],
    inputs: tuple[Float[Array, "B h w C"], Float[Array, "B h2 w2 D"]],
    options: VQGANOptions,
) -> dict[str, Term]:
    judge, mode = model.discriminator, "frozen" if options.validating else "batch"
    conv, (features, latents) = model.decoder.conv_out, jax.lax.stop_gradient(inputs)
    assert judge is not None  # the caller asks
    assert conv.bias is not None
    real, fake = judge(images, mode), judge(jax.lax.stop_gradient(decoded), mode)
    definition, params = split(judge)
    bias = jax.lax.stop_gradient(conv.bias[...])

    def fixed(images: Array) -> Array:
        # A copy for every call, since in batch mode a call updates its averages.
        return _by_image(merge(definition, jax.lax.stop_gradient(params))(images, mode))

    def decode(weight: Array) -> Array:
        pixels = conv2d(features, weight.astype(features.dtype), 1, 1) + bias.astype(features.dtype)
        return model.to_images(pixels, latents)

    def reconstruction(decoded: Array) -> Array:
        loss = reconstruction_loss(decoded, images, l1=options.l1, l2=options.l2)
        if model.perceptual is not None and options.perceptual_weight:
            loss = loss + options.perceptual_weight * model.perceptual(decoded, images).mean()
        return loss

    factor = adversarial_factor(model.passes[...], options.gan_start, options.gan_weight)
    factor_of_images = factor * adaptive_weight(
        decode, conv.weight[...], reconstruction, lambda decoded: -fixed(decoded).mean()
    )
    rows = jnp.int32(len(images))
    hinge = 0.5 * (_by_image(jax.nn.relu(1 - real)) + _by_image(jax.nn.relu(1 + fake)))
    return {
        "generator": Term(-fixed(decoded).sum() * factor_of_images, rows),
        "discriminator": Term(hinge.sum() * factor, rows),
        "gan_weight": _logged(factor_of_images),
    }


def _by_image(scores: Float[Array, "B h w"]) -> Float[Array, " B"]:
    return scores.astype(jnp.float32).mean((1, 2))


def _codebook_terms(
    model: VQGANModel,
    latents: Float[Array, "B h w D"],
    codes: Int[Array, "B h w"],
    errors: Float[Array, "B h w"],
    key: PRNGKey | None,
    options: VQGANOptions,
) -> dict[str, Term]:
    size = model.config.codes
    counts = code_counts(codes, size)
    terms = {"codes_used": _logged(share_used(counts)), "perplexity": _logged(perplexity(counts))}
    if options.validating:
        return terms
    if key is None:
        raise ValueError("training needs a key, from which restarted codes are drawn")
    passes = model.passes[...]
    # At the start all codes count as equally used.
    usage = jnp.where(passes == 0, codes.size / size, model.usage[...])
    restarted = restart_unused(
        key,
        model.codebook.weight[...],
        update_usage(usage, codes, options.usage_decay),
        latents,
        errors,
        threshold=options.restart_below,
    )
    model.usage[...], model.codebook.weight[...] = jax.lax.stop_gradient((restarted.usage, restarted.codebook))
    model.passes[...] = passes + 1
    return terms | {"restarted": _logged(restarted.replaced)}


def _logged(value: Array) -> Term:
    return Term(value.astype(jnp.float32), jnp.int32(1), weight=0.0)
