"""MAGMA's image input, as described to users of the model."""

from magma_jax.inference.prompts import ImageGrid, ImageSpec
from magma_jax.models.magma import MagmaConfig


def image_spec(config: MagmaConfig) -> ImageSpec:
    """The image input of a model."""
    return ImageSpec(
        size=config.encoder.image_size,
        positions=config.prefix.positions(config.encoder.positions),
        grid=image_grid(config),
    )


def image_grid(config: MagmaConfig) -> ImageGrid | None:
    """The grid of an image's positions over the encoder's input square; None if positions are not spatial.

    A position's features come from its cell and, by the encoder's receptive field, from its surroundings.
    """
    if config.encoder.positions is None or config.prefix.mapping == "resampler":
        return None
    positions = config.prefix.positions(config.encoder.positions)
    notes = []
    if getattr(config.encoder, "statistics", ()):
        notes.append("every position also carries the colours of the whole image")
    if config.prefix.mapping == "transformer":
        notes.append("the prefix mixes the positions before the language model sees them")
    if config.encoder.kind in ("clip_vit", "siglip", "dinov2", "dinov3"):
        notes.append("the encoder's attention mixes the positions")
    side = round(positions**0.5)
    return ImageGrid(side, side, "; ".join(notes))
