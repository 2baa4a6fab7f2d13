"""Questions from a command line of images, folders and texts."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from magma_jax.data.decoders import Decoders
from magma_jax.data.format.records import Skipped
from magma_jax.data.images import FORMATS, ImageInput
from magma_jax.data.readers.common import files_below
from magma_jax.generate import DEFAULT_PROMPT
from magma_jax.output import printable

# Timeout for the images of a prompt, which may be on a network disk.
READ_SECONDS = 120.0
SUFFIXES = tuple(f".{name.lower()}" for name in (*FORMATS, "JPG"))


class Question(NamedTuple):
    """A prompt, and the image it is named after if there are several prompts."""

    name: str | None
    parts: list[str | ImageInput]

    def prompt(self, decoders: Decoders) -> list[str | ImageInput]:
        """The prompt with its images read."""
        deadline = time.monotonic() + READ_SECONDS
        return [
            part if isinstance(part, str) else ImageInput(decoders.image(_path(part), deadline)) for part in self.parts
        ]

    @property
    def images(self) -> list[str]:
        """Paths of its images."""
        return [_path(part) for part in self.parts if isinstance(part, ImageInput)]

    @property
    def shown_name(self) -> str:
        r"""Printable name; bytes of a file name that are not UTF-8 are shown as ``\xff``."""
        return os.fsencode(self.name or " ".join(self.images)).decode(errors="backslashreplace")

    @property
    def text(self) -> str:
        """The texts of the prompt, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


def read_inputs(inputs: Sequence[str], *, together: bool = False) -> list[Question]:
    """The questions of a command line.

    Args:
        inputs: images, folders of images, texts.
        together: whether all inputs form one prompt.

    Raises:
        ValueError: no inputs, an empty text, or a folder without images or among texts.
    """
    if not inputs:
        raise ValueError("nothing is asked; give an image, a folder of images or a text")
    parts = [_part(text) for text in inputs]
    texts = [part for part in parts if isinstance(part, str)]
    if any(not text.strip() for text in texts):
        raise ValueError(f"the prompt is empty; leave it out for {DEFAULT_PROMPT!r}")
    if not texts:
        parts.append(DEFAULT_PROMPT)
    *images, last = parts
    one_by_one = images and isinstance(last, str) and all(isinstance(part, ImageInput) for part in images)
    folders = any(isinstance(part, ImageInput) and os.path.isdir(_path(part)) for part in parts)
    if together or not one_by_one:
        if folders:
            raise ValueError("a folder stands for separate prompts, one per image; put it first, followed by one text")
        return [Question(None, parts)]
    found = [file for part in images if isinstance(part, ImageInput) for file in _images_in(_path(part))]
    several = len(found) > 1 or folders
    return [Question(file if several else None, [ImageInput(file), last]) for file in found]


def read_parts(inputs: Sequence[str]) -> list[str | ImageInput]:
    """The images and texts of one prompt.

    Raises:
        ValueError: no inputs, an empty text, or a folder.
    """
    parts = [_part(text) for text in inputs]
    if not parts or any(isinstance(part, str) and not part.strip() for part in parts):
        raise ValueError("the prompt is empty; say what the image shows")
    for part in parts:
        if isinstance(part, ImageInput) and os.path.isdir(_path(part)):
            raise ValueError(f"{_path(part)}: a folder; one prompt takes files")
    return parts


def _part(text: str) -> str | ImageInput:
    """An image (or folder of images) if the path exists or has an image's suffix; otherwise text."""
    try:
        is_image = text.lower().endswith(SUFFIXES) or os.path.exists(text)
    except ValueError:  # null bytes
        is_image = False
    return ImageInput(text) if text and is_image else text


def _path(image: ImageInput) -> str:
    """Path of an image from the command line, which is never given as pixels."""
    assert isinstance(image.source, str)
    return image.source


def _images_in(path: str) -> list[str]:
    """The images below a folder in order, without hidden files; a file gives itself."""
    if not os.path.isdir(path):
        return [path]
    ignored: list[Skipped] = []
    found = sorted(map(str, map(Path, filter(os.path.isfile, files_below(Path(path), SUFFIXES, ignored)))))
    if ignored:
        print(printable(f"note: {path}: {len(ignored)} hidden files are left out"), file=sys.stderr)
    if not found:
        raise ValueError(f"{path}: no images in it ({', '.join(SUFFIXES)})")
    return found
