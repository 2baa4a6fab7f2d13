"""Checks of the arrays that the samplers take; a wrong one is refused before anything runs.

They are NumPy arrays here, since operations on JAX arrays outside a program are compiled one by one.
"""

from typing import Any

import numpy as np

from magma_jax.models.magvlt.config import MagvltConfig


def ids_of(name: str, ids: Any, shape: tuple[int, ...], rows: int) -> np.ndarray:
    """Token ids as int32.

    Raises:
        ValueError: another shape, or ids that are not in [0, rows).
    """
    ids = _shaped(name, ids, shape)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise ValueError(f"{name} holds ids from {int(ids.min())} to {int(ids.max())}; the model knows 0 to {rows - 1}")
    return ids.astype(np.int32)


def lengths_of(lengths: Any, rows: int, longest: int) -> np.ndarray:
    """Text lengths as int32.

    Raises:
        ValueError: another shape, or lengths that are not in [1, longest].
    """
    lengths = _shaped("lengths", lengths, (rows,))
    if lengths.size and not 1 <= int(lengths.min()) <= int(lengths.max()) <= longest:
        raise ValueError(
            f"lengths are {int(lengths.min())} to {int(lengths.max())}; the model knows texts of 1 to {longest} tokens"
        )
    return lengths.astype(np.int32)


def pairs_of(config: MagvltConfig, image: Any, text: Any, lengths: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (B, I) of images, texts (B, T) and their lengths (B,), as int32.

    Raises:
        ValueError: arrays of wrong shapes, ids or lengths out of range.
    """
    image = ids_of("image", image, (len(image), config.image_positions), config.image_rows)
    text = ids_of("text", text, (len(image), config.text_positions), config.text_rows)
    return image, text, lengths_of(lengths, len(image), config.text_positions)


def places_of(editable: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Places as booleans.

    Raises:
        ValueError: another shape.
    """
    return _shaped("editable", editable, shape).astype(bool)


def editable_places(editable: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Places to draw anew.

    Raises:
        ValueError: another shape, or a row without any such place.
    """
    places = places_of(editable, shape)
    if not places.any(-1).all():
        raise ValueError("editable keeps everything in a row, so there is nothing to draw; mark the places to draw")
    return places


def check_steps(steps: Any) -> None:
    """Raises ValueError unless there is at least one step."""
    if not 1 <= int(steps) < 2**31:
        raise ValueError(f"{steps} steps; give at least 1")


def _shaped(name: str, array: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(array)
    if array.shape != shape:
        raise ValueError(f"{name} has the shape {array.shape}; {shape} is needed")
    return array
