"""A grid of images with the model's texts as one image; right texts are green, wrong ones red."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from magma_jax.typing import UInt8

COLUMNS = 4
# In pixels: width of a card, margin around it, side of an image.
CARD, MARGIN, IMAGE = 300, 14, 104
SOFT, LINE, RIGHT, WRONG = "#5b646d", "#dfe3e7", "#1a7f47", "#b3352b"
# Cards are drawn at twice the size and downsampled for smooth edges and letters.
SCALE = 2
FIRST_SIZE, NEXT_SIZE = 15, 13


class Line(NamedTuple):
    """The model's text, the truth, and the question (empty for a caption)."""

    said: str
    truth: str
    question: str = ""


class Card(NamedTuple):
    """An image, uint8 (h, w, 3), and the lines under it."""

    pixels: np.ndarray
    lines: Sequence[Line]


def draw_cards(cards: Sequence[Card]) -> UInt8[np.ndarray, "H W 3"]:
    """The grid, 1200 pixels wide.

    The font is Pillow's own, so the image is the same on every machine. It has only ASCII letters; others are drawn as
    question marks.
    """
    drawn = [_draw(card) for card in cards]
    rows = [drawn[start : start + COLUMNS] for start in range(0, len(drawn), COLUMNS)]
    heights = [max(height for _, height in row) + 2 * MARGIN * SCALE for row in rows]
    canvas = Image.new("RGB", (COLUMNS * CARD * SCALE, sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    gap, top = MARGIN * SCALE // 2, 0
    for row, height in zip(rows, heights, strict=True):
        for column, (card, used) in enumerate(row):
            left = column * CARD * SCALE
            canvas.paste(card.crop((0, 0, card.width, used)), (left + 2 * gap, top + 2 * gap))
            frame = (left + gap, top + gap, left + CARD * SCALE - gap, top + height - gap)
            draw.rounded_rectangle(frame, radius=8 * SCALE, outline=LINE, width=SCALE)
        top += height
    return np.asarray(canvas.reduce(SCALE))


def _draw(card: Card) -> tuple[Image.Image, int]:
    """An image with its texts, and their total height."""
    width, side = (CARD - 2 * MARGIN) * SCALE, IMAGE * SCALE
    texts = [_words(line) for line in card.lines]
    sizes = [FIRST_SIZE, *[NEXT_SIZE] * len(texts)]
    # Upper bound: one line per word.
    room = sum((len(words) + 1) * round(size * 1.3) * SCALE for words, size in zip(texts, sizes, strict=False))
    image = Image.new("RGB", (width, side + 8 * SCALE + room), "white")
    draw = ImageDraw.Draw(image)
    shown = Image.fromarray(card.pixels).resize((side, side), Image.Resampling.LANCZOS)
    image.paste(shown, ((width - side) // 2, 0))
    y = side + 8 * SCALE
    for line, words, size in zip(card.lines, texts, sizes, strict=False):
        _mark(draw, 5 * SCALE, y + size * SCALE * 0.55, line.said == line.truth)
        y = _write(draw, 16 * SCALE, y, width, words, size) + 5 * SCALE
    return image, y


def _words(line: Line) -> list[tuple[str, str]]:
    """Words with their colours: question, the model's text, and the truth if it differs."""
    right = line.said == line.truth
    parts = [(line.question, SOFT), (line.said or "(nothing)", RIGHT if right else WRONG)]
    parts += [] if right else [(f"(truth: {line.truth})", SOFT)]
    return [(_ascii(word), colour) for text, colour in parts for word in text.split()]


def _write(
    draw: ImageDraw.ImageDraw, left: int, y: int, right: int, words: Sequence[tuple[str, str]], size: int
) -> int:
    """Writes coloured words into lines between ``left`` and ``right``; returns the y of the next line."""
    font = ImageFont.load_default(size * SCALE)
    line_height = round(size * 1.3) * SCALE
    x = left
    for word, colour in words:
        length = font.getlength(word)
        if x > left and x + length > right:
            x, y = left, y + line_height
        draw.text((x, y), word, font=font, fill=colour)
        x += length + font.getlength(" ")
    return y + line_height


def _mark(draw: ImageDraw.ImageDraw, x: float | int, y: float | int, correct: bool) -> None:
    """A tick or a cross, drawn as lines: the font has neither."""
    s = 4 * SCALE
    if correct:
        draw.line([(x - s, y), (x - s / 3, y + s * 0.7), (x + s, y - s * 0.8)], fill=RIGHT, width=2 * SCALE)
    else:
        draw.line([(x - s * 0.8, y - s * 0.8), (x + s * 0.8, y + s * 0.8)], fill=WRONG, width=2 * SCALE)
        draw.line([(x - s * 0.8, y + s * 0.8), (x + s * 0.8, y - s * 0.8)], fill=WRONG, width=2 * SCALE)


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode()
