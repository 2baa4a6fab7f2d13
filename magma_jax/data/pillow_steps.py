"""What Pillow does between the bytes of an image and a square of pixels.

Imports Pillow and NumPy alone, so that a process that only decodes (``data.decoder_process``) starts in a tenth of a
second. The interface for users is ``data.images``.
"""

import contextlib
import io
import os
import re
import resource
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# TIFF, PSD, EPS and the rest stay shut: rare in captioned data, and their decoders have the most faults.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000

# Memory of an image in bytes a pixel: 17 are the most that a decoder was seen to take (WebP with alpha), beside the
# encoded bytes.
BYTES_A_PIXEL = 24
# Just below the largest that glibc keeps.
LARGE = 31 << 20

# A progressive JPEG has about ten scans, each as long to decode as the whole image, and libjpeg decodes a thousand of
# them, in 64 kB, in one call. The marker cannot occur within the data of a scan.
MAX_SCANS = 100
_SCAN = b"\xff\xda"

# Modes in which Pillow resizes wrongly or not at all, and what they become first: hues do not interpolate, indices of
# a palette neither, and premultiplied colours have no way to RGB, or pass alpha by.
_FIRST = {"HSV": "RGB", "La": "LA", "PA": "RGBA", "RGBa": "RGBA"}
# In which a part that is resized alone may have the pixels of the whole.
_EXACT_MODES = ("RGB", "L")
_ORIENTATION = 0x0112

TOO_LONG = "image takes too long to decode"

# A damaged tag each is a warning of its own: one image of 0.8 MB has 65,534 of them. What they tell of does not
# concern pixels.
_QUIET = ("ignore", None, UserWarning, re.compile(r"PIL\."), 0)


class ImageError(ValueError):
    """An image that cannot or must not be decoded; one line that names the image and the remedy.

    ``kind`` says in a few words what is wrong, the same for all images with that fault.
    """

    def __init__(self, message: str, kind: str = "image damaged"):
        super().__init__(message)
        self.kind = kind


def open_image(file: io.BytesIO | io.BufferedReader, name: str, max_pixels: int) -> Image.Image:
    """The image with format and size known and nothing decoded.

    Raises:
        ImageError: empty, damaged, another format, or too large; ``name`` stands in the message.
    """
    if not file.read(1):
        raise ImageError(f"{name}: the file is empty; fetch or export it again", "image empty")
    file.seek(0)
    _silence_pillow()
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        message = f"{name}: no image in one of the formats {', '.join(FORMATS)}; convert it to PNG"
        raise ImageError(message, "no image, or not in a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name, "more pixels than PIL opens", max_pixels) from None
    except Exception as error:  # a plug-in may raise anything on a damaged header
        raise damaged(name, error) from error
    if "progressive" in image.info:
        _check_scans(file, name)
    return check_size(image, name, max_pixels)


def check_size(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """The image, if it has no more pixels than these."""
    if image.width * image.height > max_pixels:
        raise _too_large(name, f"{image.width} x {image.height} pixels", max_pixels)
    return image


def decode(image: Image.Image, name: str, exif_transpose: bool = True) -> Image.Image:
    """The whole image, turned the way its EXIF orientation says, in a mode that can be resized."""
    _silence_pillow()
    try:
        image.load()
    except Exception as error:  # so may a decoder on damaged data
        raise damaged(name, error) from error
    if exif_transpose:
        # EXIF that cannot be parsed states no orientation, and the pixels are sound all the same.
        with contextlib.suppress(Exception):
            image = ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image
    return resizable(image, name)


def to_square(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to ``size`` by Pillow's bicubic filter, the centre cropped, RGB last.

    Raises:
        ImageError: so long and thin that resizing would exceed ``MAX_PIXELS``, or a mode that has no way to RGB.
    """
    image = resizable(image, name_of(image))
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))
    if size * longer > MAX_PIXELS:
        raise ImageError(f"{width} x {height} image is too long and thin to resize to {size}; crop it first")
    resized = (size, longer) if width <= height else (longer, size)
    left, top = (round((side - size) / 2) for side in resized)
    scale = width / longer
    edges = left * scale, (left + size) * scale
    try:
        if width > height and image.mode in _EXACT_MODES and _is_exact(scale, edges):
            # What is cropped away need not be computed.
            square = image.resize((size, size), Image.Resampling.BICUBIC, box=(edges[0], 0, edges[1], height))
        else:
            square = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        # Pillow warns when a palette's transparency is dropped; RGB has no use for it.
        square.info.pop("transparency", None)
        return square.convert("RGB")
    except (ValueError, ImportError) as error:  # the latter without LittleCMS, for LAB
        message = f"{name_of(image)}: this mode has no way to RGB ({error}); convert it first"
        raise ImageError(message, "image in an unknown mode") from None


def too_long(name: str, seconds: float) -> ImageError:
    """The error of an image that takes more processor time than it may."""
    return ImageError(f"{name}: takes more than {seconds:g} s to decode; save it anew or smaller", TOO_LONG)


def resizable(image: Image.Image, name: str) -> Image.Image:
    """The image in a mode that Pillow resizes, by the rule of ``images.load_image``; itself if it has one already.

    Raises:
        ImageError: values of 32 bits that the rule has no scale for.
    """
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255; 65535 / 255 = 257.
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        return Image.fromarray(_scaled(np.asarray(image), name))
    return image.convert(_FIRST[image.mode]) if image.mode in _FIRST else image


def keep_freed_memory() -> None:
    """Lets the C library use large blocks again.

    It gives a block back to the system as soon as it is free, until it has seen one as large as this; and fetching
    memory anew for every image costs a tenth of the time it takes to decode.
    """
    block = bytearray(LARGE)
    del block


def limit_memory(max_pixels: int, spare: int) -> None:
    """Lets this process have so much memory more as an image may need, and ``spare`` bytes for what else it does.

    Decoding then fails as an ``ImageError``. Only where the system tells what the process has, which is on Linux.
    """
    statm = Path("/proc/self/statm")
    if statm.exists():
        size = int(statm.read_text().split()[0]) * resource.getpagesize() + BYTES_A_PIXEL * max_pixels + spare
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def name_of(source: str | os.PathLike | bytes | Image.Image) -> str:
    """What a message calls an image."""
    if isinstance(source, Image.Image):
        return f"<{source.mode} image, {source.width} x {source.height}>"
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else repr(os.fspath(source))


def damaged(name: str, error: Exception) -> ImageError:
    """The error of an image on which a decoder fails."""
    if isinstance(error, MemoryError):
        return ImageError(f"{name}: takes too much memory to decode; save it anew or smaller", "image too large")
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{name}: the image is truncated or damaged ({reason}); fetch or export it again")


def _scaled(values: np.ndarray, name: str) -> np.ndarray:
    """Values of 32 bits as 8 bits."""
    low, high = values.min(), values.max()
    floating = values.dtype.kind == "f"
    smaller, larger = (1, 255) if floating else (255, 65535)
    if low >= 0 and high <= smaller:
        return np.rint(values * 255).astype(np.uint8) if floating else values.astype(np.uint8)
    if low >= 0 and high <= larger:
        return np.rint(values).astype(np.uint8) if floating else ((values + 128) // 257).astype(np.uint8)
    # Also of NaN.
    message = f"{name}: values from {low:g} to {high:g} lie neither in 0 to {smaller} nor in 0 to {larger}; scale them"
    raise ImageError(message, "image without a known scale")


def _is_exact(scale: float, edges: tuple[float, float]) -> bool:
    """Whether resizing what lies between two edges gives the pixels of resizing all and cropping.

    Pillow then reckons without rounding; it holds edges in single precision. So it is for images of 4:3 at 384
    pixels, which are 512 at length. Images that are higher than wide come out otherwise all the same.
    """
    return (1024 * scale).is_integer() and all(float(np.float32(edge)) == edge for edge in edges)


def _check_scans(file: io.BytesIO | io.BufferedReader, name: str) -> None:
    place = file.tell()
    file.seek(0)
    scans = file.read().count(_SCAN)
    file.seek(place)
    if scans > MAX_SCANS:
        message = f"{name}: a JPEG of more than {MAX_SCANS} scans takes too long to decode; save it anew"
        raise ImageError(message, TOO_LONG)


def _silence_pillow() -> None:
    # Once in a process, as a rule; whoever resets the filters would have the flood back.
    if _QUIET not in warnings.filters:
        warnings.filterwarnings(_QUIET[0], category=_QUIET[2], module=_QUIET[3].pattern)


def _too_large(name: str, what: str, max_pixels: int) -> ImageError:
    message = f"{name}: {what}, the limit is {max_pixels}; shrink the image or raise max_pixels if you trust it"
    return ImageError(message, "image too large")
