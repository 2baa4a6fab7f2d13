"""Attention maps drawn over images."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from magma_jax.typing import Float

# From low to high attention: yellow to dark red, with decreasing lightness.
_COLOURS = np.array([(255, 237, 160), (254, 178, 76), (240, 59, 32), (189, 0, 38)], np.float32)
_STRENGTH = 0.72  # opacity of the greatest weight
_OUTSIDE = 0.35  # brightness of the area that the encoder does not see


def overlay(image: Image.Image, weights: Float[np.ndarray, "rows columns"], *, size: int = 384) -> Image.Image:
    """An image with a grid of weights over its central square, which is the encoder's input.

    Cells are drawn without smoothing, since no values exist between them. Colours range from the grid's least weight
    (transparent) to its greatest.

    Args:
        image: any size and mode; its shorter side is scaled to ``size`` pixels.
        weights: nonnegative weights of the cells.
        size: side of the square in pixels.
    """
    image = _scaled(image, size)
    pixels = np.asarray(image, np.float32)
    left, top = ((side - size) // 2 for side in image.size)
    square = (slice(top, top + size), slice(left, left + size))
    shown = pixels * _OUTSIDE
    lowest, highest = weights.min(), weights.max()
    # A constant map is drawn as zeros.
    scale = (weights - lowest) / (highest - lowest) if highest > lowest else np.zeros_like(weights)
    rows, columns = (np.arange(size) * count // size for count in weights.shape)
    strength = scale[rows][:, columns][..., None]
    places = strength * (len(_COLOURS) - 1)
    below = np.minimum(places.astype(int), len(_COLOURS) - 2)
    colour = _COLOURS[below[..., 0]] * (1 - (places - below)) + _COLOURS[below[..., 0] + 1] * (places - below)
    opacity = _STRENGTH * strength
    shown[square] = pixels[square] * (1 - opacity) + colour * opacity
    return Image.fromarray(shown.round().astype(np.uint8))


def sheet(tiles: Sequence[tuple[Image.Image, str]], *, columns: int = 4, gap: int = 12) -> Image.Image:
    """A grid of equally sized images, each with a line of text below it."""
    font = ImageFont.load_default(20)
    width, height = tiles[0][0].size
    line = 36
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    page = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + line + gap) + gap), "white")
    draw = ImageDraw.Draw(page)
    for i, (tile, text) in enumerate(tiles):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + line + gap)
        page.paste(tile, (x, y))
        draw.text((x + width / 2, y + height + 6), _fitted(text, font, width), fill="black", font=font, anchor="ma")
    return page


def _scaled(image: Image.Image, size: int) -> Image.Image:
    """The image in the model's colours, scaled to a shorter side of ``size``; very long images are cut at both ends."""
    image = image.copy()
    # Pillow warns when a palette's transparency is dropped; RGB does not need it.
    image.info.pop("transparency", None)
    image = image.convert("RGB")
    shorter = min(image.size)
    longest = 3 * shorter
    if max(image.size) > longest:
        left, top = (max(0, (side - longest) // 2) for side in image.size)
        width, height = (min(side, longest) for side in image.size)
        image = image.crop((left, top, left + width, top + height))
    return image.resize([max(size, round(side * size / shorter)) for side in image.size], Image.Resampling.BICUBIC)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "\u2026"
    return text
