"""Pillow steps from an image's bytes to a square of pixels.

Imports only Pillow and NumPy, so that a decoding process (``data.decoder_process``) starts in a tenth of a second. The
public interface is ``data.images``.
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

# TIFF, PSD, EPS and others are excluded: rare in captioned data, and their decoders have the most bugs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000

# Decoding memory in bytes per pixel, in addition to the encoded bytes; the largest observed is 17 (WebP with alpha).
BYTES_A_PIXEL = 24
# Just below glibc's maximum of the mmap threshold.
LARGE = 31 << 20

# A progressive JPEG has about ten scans, each of which takes as long to decode as the whole image; a hostile one can
# hold a thousand scans in 64 kB, which libjpeg decodes in one call. The marker cannot occur within the data of a scan.
MAX_SCANS = 100
_SCAN = b"\xff\xda"

# Modes that Pillow resizes wrongly or not at all -> mode to convert to first. Hues and palette indices do not
# interpolate; premultiplied colours cannot be converted to RGB, or lose alpha.
_FIRST = {"HSV": "RGB", "La": "LA", "PA": "RGBA", "RGBa": "RGBA"}
# Modes in which resizing only a box can equal resizing the whole image and cropping.
_EXACT_MODES = ("RGB", "L")
_ORIENTATION = 0x0112

TOO_LONG = "image takes too long to decode"

# Pillow warns about every damaged tag, of which an image of 0.8 MB can have 65,534. Tags do not affect pixels.
_QUIET = ("ignore", None, UserWarning, re.compile(r"PIL\."), 0)


class ImageError(ValueError):
    """Image that cannot or must not be decoded; one line with the image and the remedy.

    ``kind`` is a short reason, the same text for all images with this problem.
    """

    def __init__(self, message: str, kind: str = "image damaged"):
        super().__init__(message)
        self.kind = kind


def open_image(file: io.BytesIO | io.BufferedReader, name: str, max_pixels: int) -> Image.Image:
    """Opens an image without decoding it; format and size are known.

    Raises:
        ImageError: empty, damaged, another format, or too large; the message contains ``name``.
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
    """Returns the image; raises ImageError if it has more than ``max_pixels``."""
    if image.width * image.height > max_pixels:
        raise _too_large(name, f"{image.width} x {image.height} pixels", max_pixels)
    return image


def decode(image: Image.Image, name: str, exif_transpose: bool = True) -> Image.Image:
    """Decodes the image, applies its EXIF orientation, and converts it to a resizable mode."""
    _silence_pillow()
    try:
        image.load()
    except Exception as error:  # a decoder may raise anything on damaged data
        raise damaged(name, error) from error
    if exif_transpose:
        # EXIF that cannot be parsed is ignored; the pixels are valid.
        with contextlib.suppress(Exception):
            image = ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image
    return resizable(image, name)


def to_square(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side to ``size`` with Pillow's bicubic filter, crops the centre, converts to RGB last.

    Raises:
        ImageError: an aspect ratio whose resized image would exceed ``MAX_PIXELS``, or a mode without a conversion to
            RGB.
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
            # Skips the area that would be cropped away.
            square = image.resize((size, size), Image.Resampling.BICUBIC, box=(edges[0], 0, edges[1], height))
        else:
            square = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        # Avoids Pillow's warning about dropping a palette's transparency.
        square.info.pop("transparency", None)
        return square.convert("RGB")
    except (ValueError, ImportError) as error:  # ImportError: LAB without LittleCMS
        message = f"{name_of(image)}: this mode cannot be converted to RGB ({error}); convert it first"
        raise ImageError(message, "image in an unknown mode") from None


def too_long(name: str, seconds: float) -> ImageError:
    """Error for an image that exceeds the CPU time limit."""
    return ImageError(f"{name}: takes more than {seconds:g} s to decode; save it anew or smaller", TOO_LONG)


def resizable(image: Image.Image, name: str) -> Image.Image:
    """Converts the image to a mode that Pillow can resize, as described in ``images.load_image``.

    Raises:
        ImageError: 32-bit values without a known scale.
    """
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255; 65535 / 255 = 257.
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        return Image.fromarray(_scaled(np.asarray(image), name))
    return image.convert(_FIRST[image.mode]) if image.mode in _FIRST else image


def keep_freed_memory() -> None:
    """Makes glibc reuse large freed blocks.

    By default it returns large blocks to the system at once, until it has freed one of this size; allocating memory
    anew for every image takes a tenth of the decoding time.
    """
    block = bytearray(LARGE)
    del block


def limit_memory(max_pixels: int, spare: int) -> None:
    """Limits this process to its current memory plus that of one image plus ``spare`` bytes.

    Beyond it decoding raises ``ImageError``. Only on Linux, where the current memory is known.
    """
    statm = Path("/proc/self/statm")
    if statm.exists():
        size = int(statm.read_text().split()[0]) * resource.getpagesize() + BYTES_A_PIXEL * max_pixels + spare
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def name_of(source: str | os.PathLike | bytes | Image.Image) -> str:
    """Name of an image in messages."""
    if isinstance(source, Image.Image):
        return f"<{source.mode} image, {source.width} x {source.height}>"
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else repr(os.fspath(source))


def damaged(name: str, error: Exception) -> ImageError:
    """Error for an image that a decoder cannot decode."""
    if isinstance(error, MemoryError):
        return ImageError(f"{name}: takes too much memory to decode; save it anew or smaller", "image too large")
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{name}: the image is truncated or damaged ({reason}); fetch or export it again")


def _scaled(values: np.ndarray, name: str) -> np.ndarray:
    """Scales 32-bit values to 8 bits."""
    low, high = values.min(), values.max()
    floating = values.dtype.kind == "f"
    smaller, larger = (1, 255) if floating else (255, 65535)
    if low >= 0 and high <= smaller:
        return np.rint(values * 255).astype(np.uint8) if floating else values.astype(np.uint8)
    if low >= 0 and high <= larger:
        return np.rint(values).astype(np.uint8) if floating else ((values + 128) // 257).astype(np.uint8)
    # Also reached by NaN.
    message = f"{name}: values from {low:g} to {high:g} lie neither in 0 to {smaller} nor in 0 to {larger}; scale them"
    raise ImageError(message, "image without a known scale")


def _is_exact(scale: float, edges: tuple[float, float]) -> bool:
    """Whether resizing only the box between two edges equals resizing the whole image and cropping.

    It does if Pillow, which stores edges in single precision, does not round, as for 4:3 images at 384 pixels (512
    wide). Images that are taller than wide differ even then.
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
    # Normally set once per process; set again if the filters were reset.
    if _QUIET not in warnings.filters:
        warnings.filterwarnings(_QUIET[0], category=_QUIET[2], module=_QUIET[3].pattern)


def _too_large(name: str, what: str, max_pixels: int) -> ImageError:
    message = f"{name}: {what}, the limit is {max_pixels}; shrink the image or raise max_pixels if you trust it"
    return ImageError(message, "image too large")
