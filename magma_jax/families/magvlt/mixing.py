"""MixSel: contexts of two halves, of which a selector names the one to serve.

Of images each half is squashed to half its height or width and encoded by itself, so the codes of both halves are put
together instead of their pixels: at the border, and by the tokenizer's attention, the codes of a whole picture would
differ a little. Of images that are known by their codes alone, a half is the middle of the codes. Of texts, both are
cut to half the positions, with "|" between them and an end token after them.
"""

from typing import NamedTuple

import numpy as np

from magma_jax.data.batches.batching import Batch
from magma_jax.data.batches.pairs import PARTNER
from magma_jax.families.magvlt.options import BOTH, IMAGE_TO_TEXT, TEXT_TO_IMAGE
from magma_jax.models.magvlt.layout import BOTTOM, LEFT, RIGHT, TOP
from magma_jax.typing import Bool, Int


class Halves(NamedTuple):
    """Codes of squashed images, by row: of half the width (N, h, w / 2), and of half the height (N, h / 2, w)."""

    narrow: np.ndarray
    flat: np.ndarray


def cropped_halves(codes: Int[np.ndarray, "B I"], grid: tuple[int, int]) -> Halves:
    """Halves of images that are known by their codes: the middle columns, and the middle rows."""
    height, width = grid
    codes = codes.reshape(-1, height, width)
    left, top = width // 4, height // 4
    return Halves(codes[:, :, left : left + width // 2], codes[:, top : top + height // 2])


def mixed(
    batch: Batch, task: int, halves: tuple[Halves, Halves] | None, *, stacked: bool, pad_id: int, separator: int
) -> Batch:
    """The arrays of a batch that the loss of mixed contexts needs.

    Args:
        batch: ``codes``, ``tokens``, ``lengths``, those of the next rows, and ``seeds``.
        task: the batch's task.
        halves: halves of the batch's images and of the next rows'; only tasks with an image first need them.
        stacked: whether the halves of images stand one above the other instead of side by side.
        pad_id: padding of texts.
        separator: token between two texts.

    Returns:
        ``mixed_codes``, ``mixed_tokens``, ``mixed_lengths``, ``selectors``, and the maskable ``mixed_image_places`` and
        ``mixed_text_places``. The row's own half is the one to serve; whether it is the first follows from its seed.
    """
    first = (batch["seeds"] & 1).astype(bool)
    codes, tokens, lengths = batch["codes"], batch["tokens"], batch["lengths"]
    places = np.ones(codes.shape, bool)
    words = np.arange(tokens.shape[1]) < lengths[:, None]
    if task != IMAGE_TO_TEXT:
        tokens, lengths, own = _mixed_text(batch, first, pad_id, separator)
        words = own if task == BOTH else words
    names = (LEFT, RIGHT)
    if task != TEXT_TO_IMAGE:
        assert halves is not None  # as said above
        codes, places = _mixed_image(*halves, first, stacked)
        names = (TOP, BOTTOM) if stacked else names
        places = places if task == BOTH else np.ones(codes.shape, bool)
    return {
        "mixed_codes": codes,
        "mixed_tokens": tokens,
        "mixed_lengths": lengths,
        "mixed_image_places": places,
        "mixed_text_places": words,
        "selectors": np.where(first, *names).astype(np.int32),
    }


def _mixed_image(
    own: Halves, other: Halves, first: Bool[np.ndarray, " B"], stacked: bool
) -> tuple[Int[np.ndarray, "B I"], Bool[np.ndarray, "B I"]]:
    """Codes of both halves in their order, and the places of the own ones."""
    axis = 1 if stacked else 2
    one, two = (half.flat if stacked else half.narrow for half in (own, other))
    order = first[:, None, None]
    ahead, behind = np.where(order, one, two), np.where(order, two, one)
    codes = np.concatenate([ahead, behind], axis)
    is_own = np.concatenate([np.broadcast_to(order, one.shape), np.broadcast_to(~order, one.shape)], axis)
    return codes.reshape(len(codes), -1), is_own.reshape(len(codes), -1)


def _mixed_text(
    batch: Batch, first: Bool[np.ndarray, " B"], pad_id: int, separator: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"], Bool[np.ndarray, "B T"]]:
    """Texts of both in their order, their lengths with the end token, and the places of the own text's tokens."""
    rows, positions = batch["tokens"].shape
    room = (positions - 2) // 2
    tokens = np.full((rows, positions), pad_id, np.int32)
    own = np.zeros((rows, positions), bool)
    total = np.zeros(rows, np.int32)
    for row in range(rows):
        texts = [
            batch[f"{prefix}tokens"][row][: min(room, _words(batch, prefix, row, pad_id))] for prefix in ("", PARTNER)
        ]
        ahead, behind = texts if first[row] else reversed(texts)
        line = [*ahead, separator, *behind]
        tokens[row, : len(line)] = line
        start = 0 if first[row] else len(ahead) + 1
        own[row, start : start + max(1, len(texts[0]))] = True
        total[row] = len(line) + 1
    return tokens, total, own


def _words(batch: Batch, prefix: str, row: int, pad_id: int) -> int:
    """Tokens of a text without its end token, which a text that fills its positions lacks."""
    length = int(batch[f"{prefix}lengths"][row])
    return length - (batch[f"{prefix}tokens"][row][length - 1] == pad_id)
