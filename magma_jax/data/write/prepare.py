"""Preparation of one record for storage: its image is read, checked and fingerprinted.

The converter's worker processes and the Beam pipeline share this function.
"""

import dataclasses
import hashlib
from typing import Literal

import numpy as np
from PIL import Image

from magma_jax.data.format.records import DataError, Record, Skipped, pack
from magma_jax.data.images import MAX_PIXELS, ImageError, load_image, open_header
from magma_jax.data.time_limit import TimeLimit

# The only reason that may not recur when the file is read again.
UNREADABLE = "image cannot be read"

Check = Literal["decode", "header"]
Fingerprint = Literal["none", "content", "perceptual"]


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Options of image checks.

    Attributes:
        check: ``decode`` decodes every image completely, so that truncated ones are found now and not in training;
            ``header`` checks only format and size.
        max_pixels: images with more pixels are skipped.
        duplicates: skip images with the same bytes as an earlier one (``content``), or with the same difference hash
            (``perceptual``: equal for the same image in other sizes and qualities, and for some similar images).
    """

    check: Check = "decode"
    max_pixels: int = MAX_PIXELS
    duplicates: Fingerprint = "none"

    def __post_init__(self):
        if self.max_pixels < 1:
            raise DataError(f"max_pixels must be 1 or more, got {self.max_pixels}")


def prepare(record: Record, options: PrepareOptions) -> tuple[bytes, str] | Skipped:
    """Returns the serialised record and its fingerprint ("" if disabled), or ``Skipped`` with the reason."""

    def skipped(reason: str) -> Skipped:
        return Skipped(record.id, reason, record.samples)

    try:
        content = record.image_bytes()
        with TimeLimit(record.id):
            if options.check == "decode" or options.duplicates == "perceptual":
                image = load_image(content, max_pixels=options.max_pixels, draft=64)
            else:
                image = open_header(content, max_pixels=options.max_pixels)
    except ImageError as error:
        return skipped(error.kind)
    except FileNotFoundError:
        return skipped("image missing")
    except OSError:
        return skipped(UNREADABLE)
    except DataError:
        return skipped("image cut short")
    try:
        stored = pack(dataclasses.replace(record, image=content))
    except UnicodeEncodeError:  # JSON may contain lone surrogates, which cannot be encoded
        return skipped("text is not Unicode")
    except (OverflowError, TypeError, ValueError) as error:
        return skipped(f"metadata cannot be stored ({error})")
    return stored, fingerprint(content, image, options.duplicates)


def fingerprint(content: bytes, image: Image.Image, kind: Fingerprint) -> str:
    """Fingerprint that is equal for duplicates."""
    if kind == "none":
        return ""
    return hashlib.sha256(content).hexdigest() if kind == "content" else difference_hash(image)


def difference_hash(image: Image.Image) -> str:
    """64 bits: whether each pixel of an 8 x 8 grid is darker than its right neighbour (Krawetz's dHash)."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return np.packbits(grey[:, :-1] < grey[:, 1:]).tobytes().hex()
