"""Image preprocessing, from an encoded image to an encoder's input.

Three steps: ``load_image`` decodes a user's image and refuses unsafe or broken ones, ``to_uint8`` resizes and crops,
``normalize`` scales. Data pipelines store the output of ``to_uint8`` and normalise on the device. Untrusted images
belong in ``data.decoders``.
"""

import io
import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from magma_jax.data.pillow_steps import (
    FORMATS,
    MAX_PIXELS,
    ImageError,
    check_size,
    decode,
    name_of,
    open_image,
    resizable,
    to_square,
)
from magma_jax.typing import Float, UInt8

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "FORMATS",
    "MAX_PIXELS",
    "ImageError",
    "ImageInput",
    "ImageSource",
    "load_image",
    "normalize",
    "open_header",
    "random_crop",
    "refuse_url",
    "to_square",
    "to_uint8",
]

# Channel statistics of CLIP's training images, in units of the full range (released with Radford et al. 2021).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ImageSource: TypeAlias = str | os.PathLike | bytes | Image.Image


class ImageInput:
    """Image in a multimodal prompt, as in ``["Describe:", ImageInput("cat.png")]``.

    Holds the source (path, encoded bytes or PIL image) and decodes it on demand, so that a prompt can be written before
    its files exist. Raises ``ImageError`` at once for a URL: nothing is ever downloaded.
    """

    def __init__(self, source: ImageSource):
        refuse_url(source)
        self.source = source

    def load(self, **options) -> Image.Image:
        """Decodes the image; options and errors as of ``load_image``."""
        return load_image(self.source, **options)

    def pixels(self, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
        """``to_uint8`` of the decoded image; errors as of ``load_image`` and ``to_uint8``."""
        return to_uint8(self.load(), size)

    def __repr__(self) -> str:
        return f"ImageInput({name_of(self.source)})"


def load_image(
    source: ImageSource, *, max_pixels: int = MAX_PIXELS, exif_transpose: bool = True, draft: int = 0
) -> Image.Image:
    """Opens and fully decodes one image.

    Accepts PNG, JPEG, WebP, GIF and BMP; an animation gives its first frame. The image keeps the mode of its file,
    because the resize in ``to_uint8`` depends on it, with these exceptions:

    - 16-bit grey: scaled to 8 bits, 65535 to 255.
    - ``I``, 32-bit integers, the mode of integer arrays: values from 0 to 255 are kept; otherwise values from 0 to
      65535 are scaled as 16 bits.
    - ``F``, floating point: values from 0 to 1 are scaled by 255; otherwise values from 0 to 255 are rounded.
    - ``La``, ``PA``, ``RGBa``, ``HSV``, which do not occur in files: converted to ``LA``, ``RGBA``, ``RGBA``, ``RGB``.

    Args:
        source: path, encoded bytes, or an image opened by PIL (returned unchanged if no conversion is needed).
        max_pixels: largest width times height, checked from the header before decoding. PIL's own limit
            (``PIL.Image.MAX_IMAGE_PIXELS``) applies too.
        exif_transpose: apply the EXIF orientation, as viewers do. The original ignores it: pass False to reproduce
            its input.
        draft: smallest side to which a JPEG may be decoded at a half, quarter or eighth of its size; 0 for full size.
            Several times faster for large images, with slightly different pixels.

    Raises:
        ImageError: too large, empty, truncated, damaged, another format, a URL, or ``I`` or ``F`` values outside these
            ranges.
        OSError: the file cannot be read.
    """
    refuse_url(source)
    name = name_of(source)
    if isinstance(source, Image.Image):
        return decode(check_size(source, name, max_pixels), name, exif_transpose)
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        image = open_image(file, name, max_pixels)
        if draft:
            image.draft(None, (draft, draft))
        return decode(image, name, exif_transpose)


def open_header(content: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image without decoding it; format and size are known. Errors as of ``load_image``."""
    return open_image(io.BytesIO(content), name_of(content), max_pixels)


def to_uint8(image: Image.Image, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Resizes the shorter side to ``size``, crops the centre and converts to RGB, in this order.

    Equal, bit for bit, to the original's CLIP transform before scaling: Pillow's bicubic filter, the longer side
    truncated to whole pixels. Because RGB comes last, palette and two-colour images are resized without interpolation,
    and transparent areas become black.

    Raises:
        ImageError: an aspect ratio whose resized image would exceed ``MAX_PIXELS``, or a mode that ``load_image``
            refuses.
    """
    return np.array(to_square(image, size))


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Random square crop, resized by a small random factor, then cropped again (Ramesh et al. 2021, section A.3).

    The original's augmentation for encoders trained from scratch, without its horizontal flips, which would contradict
    captions with left and right, and without its centre crop of large images, which its padding causes by mistake. An
    image smaller than ``size`` gets black margins.
    """
    image = resizable(image, name_of(image)).convert("RGB")
    width, height = (max(side, size) for side in image.size)
    if image.size != (width, height):
        margins = Image.new("RGB", (width, height))
        margins.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        image = margins
    side = min(width, height)
    left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    smallest, largest = (min(side, round(factor * size)) for factor in (9 / 8, 12 / 8))
    resized = int(rng.integers(smallest, largest + 1))
    box = (left, top, left + side, top + side)
    image = image.resize((resized, resized), Image.Resampling.BILINEAR, box=box)
    left, top = (int(rng.integers(resized - size + 1)) for _ in range(2))
    return np.array(image.crop((left, top, left + size, top + size)))


def normalize(
    pixels: UInt8[Any, "*batch H W 3"],
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Float[Any, "*batch H W 3"]:
    """``(pixels / 255 - mean) / std`` in fp32; returns a NumPy array for NumPy input, a JAX array for JAX input."""
    of_channels = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    return (pixels.astype(np.float32) / np.float32(255) - of_channels[0]) / of_channels[1]


def refuse_url(source: ImageSource) -> None:
    """Raises ImageError for a URL: nothing is ever downloaded."""
    if isinstance(source, str) and ("://" in source or source.startswith("data:")):
        raise ImageError(f"{source[:80]!r}: images by URL are not enabled; download the file and pass its path")
