"""From an encoded picture to the pixels an encoder sees.

Three steps, usable apart: ``load_image`` opens what a user hands over and refuses what is unsafe or broken,
``to_uint8`` resizes and crops, ``normalize`` scales. Data pipelines store what ``to_uint8`` gives and
normalise on the device; ``clip_preprocess`` does both at once.
"""

import contextlib
import io
import os
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from magma_jax.typing import Array, Float, UInt8

# Per channel, in units of the full range, over CLIP's training pictures (released with Radford et al. 2021).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# TIFF, PSD, EPS and the rest stay shut: rare in captioned data, and their decoders have the most faults.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000

ImageSource: TypeAlias = str | os.PathLike | bytes | Image.Image


class ImageError(ValueError):
    """A picture that cannot or must not be decoded; one line that names the picture and the remedy.

    ``kind`` says in a few words what is wrong, the same for all pictures with that fault.
    """

    def __init__(self, message: str, kind: str = "picture damaged"):
        super().__init__(message)
        self.kind = kind


class ImageInput:
    """A picture inside a multimodal prompt, as in ``["Describe:", ImageInput("cat.png")]``.

    Holds the source (path, encoded bytes or PIL image) and decodes it when asked, so that a prompt can be
    written before its files exist. Raises ``ImageError`` at once for a URL: nothing is ever fetched.
    """

    def __init__(self, source: ImageSource):
        _refuse_url(source)
        self.source = source

    def load(self, **options) -> Image.Image:
        """The decoded picture; ``options`` and errors are those of ``load_image``."""
        return load_image(self.source, **options)

    def __repr__(self) -> str:
        return f"ImageInput({_name(self.source)})"


def load_image(
    source: ImageSource, *, max_pixels: int = MAX_PIXELS, exif_transpose: bool = True, draft: int = 0
) -> Image.Image:
    """Opens and fully decodes one picture.

    Accepts PNG, JPEG, WebP, GIF and BMP. Of an animation the first frame counts. 16-bit grey becomes 8-bit
    grey, 65535 mapping to 255; every other mode is kept, because the resize in ``to_uint8`` depends on it.

    Args:
        source: path, encoded bytes, or an image opened by PIL (returned as it is if nothing has to change).
        max_pixels: largest width times height, checked from the header before anything is decoded. PIL's own
            limit (``PIL.Image.MAX_IMAGE_PIXELS``) holds besides.
        exif_transpose: turn the picture the way its EXIF orientation says, as viewers show it. The original
            ignores the tag: pass False to see what it saw.
        draft: a JPEG may be decoded at a half, quarter or eighth of its size, as long as no side falls below this;
            0 for never. Several times faster for large pictures, and not quite the same pixels.

    Raises:
        ImageError: too large, empty, truncated, damaged, another format, or a URL.
        OSError: the file cannot be read at all.
    """
    _refuse_url(source)
    name = _name(source)
    if isinstance(source, Image.Image):
        return _decode(_checked(source, name, max_pixels), name, exif_transpose)
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        image = _checked(_open(file, name, max_pixels), name, max_pixels)
        if draft:
            image.draft(None, (draft, draft))
        return _decode(image, name, exif_transpose)


def open_header(content: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture with format and size known and nothing decoded; errors as ``load_image``."""
    name = _name(content)
    return _checked(_open(io.BytesIO(content), name, max_pixels), name, max_pixels)


def to_uint8(image: Image.Image, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Resizes the shorter side to ``size``, crops the centre and converts to RGB, in this order.

    Equal, bit for bit, to the original's CLIP transform before scaling: Pillow's bicubic filter, the longer
    side truncated to a whole pixel. Because RGB comes last, palette and two-colour pictures are resized
    without interpolation, and what alpha hides goes black.

    Raises:
        ImageError: the picture is so long and thin that resizing it would exceed ``MAX_PIXELS``.
    """
    return np.array(to_square(image, size))


def to_square(image: Image.Image, size: int) -> Image.Image:
    """``to_uint8`` as an RGB picture, with its errors."""
    image = _eight_bits(image)
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))
    if size * longer > MAX_PIXELS:
        raise ImageError(f"{width} x {height} image is too long and thin to resize to {size}; crop it first")
    resized = (size, longer) if width <= height else (longer, size)
    left, top = (round((side - size) / 2) for side in resized)
    scale = width / longer
    edges = left * scale, (left + size) * scale
    if width > height and image.mode in ("RGB", "L") and _is_exact(scale, edges):
        # What is cropped away need not be computed.
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(edges[0], 0, edges[1], height))
    else:
        image = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    # Pillow warns when a palette's transparency is dropped; RGB has no use for it.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _is_exact(scale: float, edges: tuple[float, float]) -> bool:
    """Whether resizing what lies between two edges gives the pixels of resizing all and cropping.

    Pillow then reckons without rounding; it holds edges in single precision. So it is for pictures of 4:3 at 384
    pixels, which are 512 at length. Pictures that are higher than wide come out otherwise all the same.
    """
    return (1024 * scale).is_integer() and all(float(np.float32(edge)) == edge for edge in edges)


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """A random square, enlarged a little at random, and of that a random square (Ramesh et al. 2021, section A.3).

    The original's augmentation for encoders that are trained from scratch, without its mirroring, which would belie
    captions that speak of left and right, and without cutting large pictures to their centre first (its padding does
    so by mistake). A picture smaller than ``size`` gets black margins.
    """
    image = _eight_bits(image).convert("RGB")
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
    pixels: UInt8[Array | np.ndarray, "*batch H W 3"],
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Float[Array | np.ndarray, "*batch H W 3"]:
    """``(pixels / 255 - mean) / std`` in fp32; a NumPy array gives a NumPy array, a JAX array a JAX array."""
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def clip_preprocess(
    image: Image.Image, size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Float[np.ndarray, "{size} {size} 3"]:
    """``normalize(to_uint8(image, size))``: the original's CLIP transform, channels last, fp32."""
    return normalize(to_uint8(image, size), mean, std)


def _refuse_url(source: ImageSource) -> None:
    if isinstance(source, str) and ("://" in source or source.startswith("data:")):
        raise ImageError(f"{source[:80]!r}: images by URL are not enabled; download the file and pass its path")


def _name(source: ImageSource) -> str:
    if isinstance(source, Image.Image):
        return f"<{source.mode} image, {source.width} x {source.height}>"
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else repr(os.fspath(source))


def _open(file, name: str, max_pixels: int) -> Image.Image:
    if not file.read(1):
        raise ImageError(f"{name}: the file is empty; fetch or export it again", "picture empty")
    file.seek(0)
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        message = f"{name}: no image in one of the formats {', '.join(FORMATS)}; convert it to PNG"
        raise ImageError(message, "no picture, or not in a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name, "more pixels than PIL opens", max_pixels) from None
    except Exception as error:  # a plug-in may raise anything on a damaged header
        raise _damaged(name, error) from error


def _checked(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    if image.width * image.height > max_pixels:
        raise _too_large(name, f"{image.width} x {image.height} pixels", max_pixels)
    return image


def _decode(image: Image.Image, name: str, exif_transpose: bool) -> Image.Image:
    try:
        image.load()
    except Exception as error:  # so may a decoder on damaged data
        raise _damaged(name, error) from error
    if exif_transpose:
        # EXIF that cannot be parsed states no orientation, and the pixels are sound all the same.
        with contextlib.suppress(Exception):
            image = ImageOps.exif_transpose(image) if image.getexif().get(0x0112, 1) != 1 else image
    return _eight_bits(image)


def _eight_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I;16"):
        return image
    # Pillow's own conversion clips at 255; 65535 / 255 = 257.
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))


def _too_large(name: str, what: str, max_pixels: int) -> ImageError:
    message = f"{name}: {what}, the limit is {max_pixels}; shrink the image or raise max_pixels if you trust it"
    return ImageError(message, "picture too large")


def _damaged(name: str, error: Exception) -> ImageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{name}: the image is truncated or damaged ({reason}); fetch or export it again")
