"""Maps of attention drawn over pictures."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from magma_jax.typing import Float

# From no attention to the most: nothing, yellow, red. Seen beside each other they differ in lightness too.
_COLOURS = np.array([(255, 237, 160), (254, 178, 76), (240, 59, 32), (189, 0, 38)], np.float32)
_STRENGTH = 0.72  # opacity of the most
_OUTSIDE = 0.35  # brightness of what the encoder does not see


def overlay(picture: Image.Image, weights: Float[np.ndarray, "rows columns"], *, size: int = 384) -> Image.Image:
    """A picture with a grid of weights over the square in its middle, which is what the encoder sees.

    Cells are drawn as they are, without smoothing: there is nothing between them. Colours go from the grid's least
    weight (the picture as it is) to its greatest.

    Args:
        picture: any size and mode; it is scaled to ``size`` pixels at its shorter side.
        weights: not negative.
        size: of the square, in pixels.
    """
    picture = _scaled(picture, size)
    pixels = np.asarray(picture, np.float32)
    left, top = ((side - size) // 2 for side in picture.size)
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
    """Pictures of one size beside each other, each with a line of text below it."""
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


def _scaled(picture: Image.Image, size: int) -> Image.Image:
    """The picture as the model sees its colours, its shorter side ``size``; a very long one is cut at its ends."""
    picture = picture.copy()
    # Pillow warns when a palette's transparency is dropped; RGB has no use for it.
    picture.info.pop("transparency", None)
    picture = picture.convert("RGB")
    shorter = min(picture.size)
    longest = 3 * shorter
    if max(picture.size) > longest:
        cut = [max(0, (side - longest) // 2) for side in picture.size]
        picture = picture.crop((*cut, *(cut[i] + min(side, longest) for i, side in enumerate(picture.size))))
    return picture.resize([max(size, round(side * size / shorter)) for side in picture.size], Image.Resampling.BICUBIC)


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "\u2026"
    return text
