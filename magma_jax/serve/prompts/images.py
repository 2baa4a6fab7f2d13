"""Images of a request: data URIs, files below one folder, and URLs if these are allowed.

They are untrusted, so separate processes decode them, see ``data.decoders``.
"""

import base64
import binascii
import dataclasses
import io
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from magma_jax.data.decoders import Decoders
from magma_jax.data.images import ImageError, ImageInput
from magma_jax.serve.prompts.fetch import FetchRules, fetch
from magma_jax.typing import UInt8


@dataclasses.dataclass(frozen=True)
class ImageRules:
    """Rules for the images of requests.

    Attributes:
        max_images: maximum number per request, counted before any is opened.
        max_bytes: limit on an encoded image.
        max_pixels: limit on width times height, checked before decoding.
        seconds: CPU time limit for decoding an image.
        folder: folder whose files may be named by ``file:`` URLs; None to disable them.
        fetch: rules for http and https URLs; None to disable them.
    """

    max_images: int = 16
    max_bytes: int = 10 * 2**20
    max_pixels: int = 40_000_000
    seconds: float = 1.5
    folder: Path | None = None
    fetch: FetchRules | None = None


class RequestImage(ImageInput):
    """Image of a request, opened when the prompt is encoded, so that a request's images are opened one at a time.

    Args:
        url: URL of the image.
        rules: rules for images.
        decoders: decoders of the server.
        deadline: deadline of the request, in ``time.monotonic()``.
    """

    def __init__(self, url: str, rules: ImageRules, decoders: Decoders, deadline: float):
        self.source, self._rules, self._decoders, self._deadline = url, rules, decoders, deadline

    def pixels(self, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
        """Square of pixels for the encoder; errors as of ``read_image`` and ``Decoders.square``."""
        return self._decoders.square(read_image(self.source, self._rules), size, self._deadline)

    def load(self, **options: Any) -> Image.Image:
        """The whole image; ``options`` are ignored."""
        return self._decoders.image(read_image(self.source, self._rules), self._deadline)


def decoders_of(rules: ImageRules, processes: int, waiting: int) -> Decoders:
    """Decoders with the limits of these rules."""
    return Decoders(processes, seconds=rules.seconds, max_pixels=rules.max_pixels, waiting=waiting)


def read_image(url: str, rules: ImageRules) -> bytes:
    """Reads the encoded image at a URL of a request.

    Raises:
        ImageError, FetchError: not allowed, missing, or too large; one line.
    """
    scheme = urlsplit(url[:64]).scheme.lower() if ":" in url[:64] else ""
    if scheme == "data":
        return _data(url, rules)
    elif scheme in ("http", "https"):
        if rules.fetch is None:
            raise ImageError("images by http URL are not enabled on this server; send a data: URI")
        return fetch(url, dataclasses.replace(rules.fetch, max_bytes=rules.max_bytes))
    elif scheme == "file":
        return _file(url, rules)
    raise ImageError(f"{url[:40]!r}: images come as data: URIs, such as data:image/png;base64,...")


def data_uri(image: Image.Image) -> str:
    """An image as a PNG data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _data(url: str, rules: ImageRules) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError("data: URI without ;base64, in front of its content; encode the image in base64")
    # Four base64 characters encode three bytes, so the size is known before decoding.
    if len(body) * 3 // 4 > rules.max_bytes + 2:
        raise ImageError(f"the image has more than {rules.max_bytes} bytes; send a smaller one")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"data: URI with broken base64 ({error})") from None


def _file(url: str, rules: ImageRules) -> bytes:
    if rules.folder is None:
        raise ImageError("images by file: URL are not enabled on this server; send a data: URI")
    try:
        folder = rules.folder.resolve()
        path = (folder / unquote(urlsplit(url).path).lstrip("/")).resolve()
        if not (path.is_relative_to(folder) and path.is_file()):
            raise FileNotFoundError
        with path.open("rb") as file:
            content = file.read(rules.max_bytes + 1)
    except (OSError, ValueError, RuntimeError):  # names too long, null bytes, not readable, a link loop
        # The same message for missing and for outside files, so that it does not reveal which files exist.
        raise ImageError(f"{url[:80]!r}: no such image in the server's folder") from None
    if len(content) > rules.max_bytes:
        raise ImageError(f"the image has more than {rules.max_bytes} bytes; send a smaller one")
    return content
