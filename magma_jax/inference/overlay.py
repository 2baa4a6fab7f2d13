"""Maps of attention drawn over images."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from magma_jax.typing import Float

# From no attention to the most: nothing, yellow, red. Seen beside each other they differ in lightness too.
_COLOURS = np.array([(255, 237, 160), (254, 178, 76), (240, 59, 32), (189, 0, 38)], np.float32)
_STRENGTH = 0.72  # opacity of the most
_OUTSIDE = 0.35  # brightness of what the encoder does not see


def overlay(image: Image.Image, weights: Float[np.ndarray, "rows columns"], *, size: int = 384) -> Image.Image:
    """An image with a grid of weights over the square in its middle, which is what the encoder sees.

    Cells are drawn as they are, without smoothing: there is nothing between them. Colours go from the grid's least
    weight (the image as it is) to its greatest.

    Args:
        image: any size and mode; it is scaled to ``size`` pixels at its shorter side.
        weights: not negative.
        size: of the square, in pixels.
    """
    image = _scaled(image, size)
    pixels = np.asarray(image, np.float32)
    left, top = ((side - size) // 2 for side in image.size)
    square = (slice(top, top + size), slice(left, left + size))
    shown = pixels * _OUTSIDE
    lowest, highest = weights.min(), weights.max()
    # A map without differences has nothing to point at.
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
    """Images of one size beside each other, each with a line of text below it."""
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
    """The image as the model sees its colours, its shorter side ``size``; a very long one is cut at its ends."""
    image = image.copy()
    # Pillow warns when a palette's transparency is dropped; RGB has no use for it.
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
