"""Parts of a run that follow from a VQ-GAN: data settings, batch shapes, operations."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.data.folder_dataset import FoldersConfig
from magma_jax.families.vqgan.model import TrainingParts, VQGANModelConfig, build
from magma_jax.models.vision.vqgan import from_pixels
from magma_jax.nn.modules import abstract, merge
from magma_jax.training.run.config import RunConfig
from magma_jax.training.run.program import Program
from magma_jax.training.step.flops import StepFlops, matmul_flops


def complete(config: RunConfig) -> RunConfig:
    """The config with the parts of training, and with data settings filled in from the model.

    Raises:
        ValueError: the data settings do not fit the model.
    """
    model, data = config.model, config.data
    if model.training is None:
        model = dataclasses.replace(model, training=TrainingParts())
    weights = dict(config.weights)
    if model.training.perceptual is not None:
        if config.base is not None:
            raise ValueError("model.training.perceptual: a run from a base cannot add it; leave one of them out")
        weights.setdefault("perceptual", f"lpips_{model.training.perceptual}")
    if data.pack > 1:
        raise ValueError("data.pack: images are not packed; set it to 1")
    if isinstance(data, FoldersConfig):
        # Texts are not used, so none is too long.
        data = dataclasses.replace(
            data,
            image_size=model.image_size,
            augment=data.augment or "random_crop",
            tokenizer=data.tokenizer or "gpt2",
            overlong="truncate",
        )
    elif data.image_size != model.image_size:
        raise ValueError(f"data.image_size is {data.image_size}, but model.image_size is {model.image_size}")
    return dataclasses.replace(config, model=model, data=data, weights=weights)


def batch_shapes(program: Program) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of a run's batches."""
    size = program.config.model.image_size
    return {"images": ((program.config.batch_size, size, size, 3), jnp.uint8)}


def base_may_differ(base: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields in which a base may differ: the parts of training, which a converted model lacks."""
    training = base.get("training")
    return ("training", *(f"training.{name}" for name in training or ()))


def step_flops(
    config: VQGANModelConfig,
    shapes: Mapping[str, Any],
    labels: Mapping[str, str],
    batch: Mapping[str, tuple[int, ...]],
    options: Any = None,
) -> StepFlops:
    """Operations of a step, see ``training.step.flops``: three forward passes of every part that learns.

    A discriminator scores true and decoded images, and once more passes the gradient on to the latter. LPIPS, which is
    frozen, sees both and passes the gradient on to the latter.
    """
    rows, *image = batch["images"]
    tokenizer, discriminator, both = _forward_flops(config, tuple(image))
    trained = rows * (3 * tokenizer + 8 * discriminator)
    return StepFlops(frozen=rows * both * 3 // 2, trained=trained, attention=0, encoder=0)


@functools.lru_cache
def _forward_flops(config: VQGANModelConfig, image: tuple[int, ...]) -> tuple[int, int, int]:
    """Operations of the tokenizer and of the discriminator for one image, and of LPIPS for two, forward."""
    graphdef, shapes, _ = abstract(lambda: build(config, nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((1, *image), jnp.uint8)

    def operations(function: Any) -> int:
        return matmul_flops(jax.make_jaxpr(function)(shapes, images).jaxpr)

    def judge(params: Any, images: Any) -> Any:
        discriminator = merge(graphdef, params).discriminator
        return discriminator(from_pixels(images), "frozen")

    tokenizer = operations(lambda params, images: merge(graphdef, params)(from_pixels(images)).images)

    def compare(params: Any, images: Any) -> Any:
        return merge(graphdef, params).perceptual(from_pixels(images), from_pixels(images))

    parts = config.training or TrainingParts()
    return (
        tokenizer,
        operations(judge) if parts.discriminator is not None else 0,
        operations(compare) if parts.perceptual is not None else 0,
    )
