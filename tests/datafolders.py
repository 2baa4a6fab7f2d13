"""Dataset folders small enough for tests: coloured squares that the converter has stored."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from magma_jax.data.format.records import Question, Record
from magma_jax.data.write.conversion import ConvertOptions, convert
from magma_jax.data.write.prepare import PrepareOptions

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}


def jpeg(colour: Sequence[int], size: tuple[int, int] = (80, 64)) -> bytes:
    """A square of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, tuple(colour)).save(file, "JPEG", quality=95)
    return file.getvalue()


def noise(seed: int, size: tuple[int, int] = (80, 64)) -> bytes:
    """An image that looks like no other."""
    file = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST).save(file, "JPEG", quality=90)
    return file.getvalue()


def captions(count: int = 12, name: str = "image") -> list[Record]:
    """Images with two captions each."""
    return [Record(f"{name} {i}", noise(i), (f"{name} {i}", f"the {name} number {i}")) for i in range(count)]


def questions() -> list[Record]:
    """Coloured squares with a question of three answers each."""
    return [
        Record(name, jpeg(colour), questions=(Question(name, "What colour is it?", (name, name, f"dark {name}")),))
        for name, colour in COLOURS.items()
    ]


def folder(path: Path, records: Sequence[Record], check: str = "decode") -> str:
    """Converts records in this process; ``check="header"`` lets damaged images through. Returns the path."""
    convert(records, path, ConvertOptions(PrepareOptions(check), shard_records=5, workers=0))
    return str(path)
