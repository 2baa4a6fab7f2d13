"""Pictures of a request: data URIs, files below one folder, and URLs where these are allowed."""

import base64
import binascii
import dataclasses
import io
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from magma_jax.data.images import ImageError, ImageInput, load_image
from magma_jax.serve.fetch import FetchRules, fetch

# A progressive JPEG has about ten scans, each as long to decode as the whole picture; a hostile one has thousands in
# few bytes. The marker cannot occur within the data of a scan.
MAX_SCANS = 100
_SCAN = b"\xff\xda"


@dataclasses.dataclass(frozen=True)
class PictureRules:
    """What pictures a server takes.

    Attributes:
        max_pictures: in one request, counted before any is looked at.
        max_bytes: of one encoded picture.
        max_pixels: width times height, checked before decoding.
        folder: files below it may be named by ``file:`` URLs; None for none.
        fetch: rules for http and https URLs; None for no such URLs.
    """

    max_pictures: int = 16
    max_bytes: int = 10 * 2**20
    max_pixels: int = 40_000_000
    folder: Path | None = None
    fetch: FetchRules | None = None


class RequestPicture(ImageInput):
    """A picture of a request, opened when the prompt is encoded: one after another, whatever a request has."""

    def __init__(self, url: str, rules: PictureRules):
        self._url, self._rules = url, rules

    def load(self, **options) -> Image.Image:
        """See ``open_picture``; ``options`` are the server's to choose."""
        return open_picture(self._url, self._rules)


def open_picture(url: str, rules: PictureRules) -> Image.Image:
    """The decoded picture behind a URL of a request.

    Raises:
        ImageError, FetchError: not allowed, not there, too large, or no picture in a known format; one line.
    """
    scheme = urlsplit(url[:64]).scheme.lower() if ":" in url[:64] else ""
    if scheme == "data":
        content = _data(url, rules)
    elif scheme in ("http", "https"):
        if rules.fetch is None:
            raise ImageError("pictures by http URL are not enabled on this server; send a data: URI")
        content = fetch(url, dataclasses.replace(rules.fetch, max_bytes=rules.max_bytes))
    elif scheme == "file":
        content = _file(url, rules)
    else:
        raise ImageError(f"{url[:40]!r}: pictures come as data: URIs, such as data:image/png;base64,...")
    if content[:2] == b"\xff\xd8" and content.count(_SCAN) > MAX_SCANS:
        raise ImageError(f"a JPEG of more than {MAX_SCANS} scans takes too long to decode; save the picture anew")
    return load_image(content, max_pixels=rules.max_pixels)


def data_uri(image: Image.Image) -> str:
    """A picture as a PNG data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _data(url: str, rules: PictureRules) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError("data: URI without ;base64, in front of its content; encode the picture in base64")
    # Four characters hold three bytes: too long a text need not be decoded to be too long.
    if len(body) * 3 // 4 > rules.max_bytes + 2:
        raise ImageError(f"the picture has more than {rules.max_bytes} bytes; send a smaller one")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"data: URI with broken base64 ({error})") from None


def _file(url: str, rules: PictureRules) -> bytes:
    if rules.folder is None:
        raise ImageError("pictures by file: URL are not enabled on this server; send a data: URI")
    folder = rules.folder.resolve()
    try:
        path = (folder / unquote(urlsplit(url).path).lstrip("/")).resolve()
        inside = path.is_relative_to(folder) and path.is_file()
    except (OSError, ValueError):  # names too long, null bytes
        inside = False
    if not inside:
        # The same words whether it does not exist or lies elsewhere: what exists outside is nobody's business.
        raise ImageError(f"{url[:80]!r}: no such picture in the server's folder")
    if path.stat().st_size > rules.max_bytes:
        raise ImageError(f"the picture has more than {rules.max_bytes} bytes; send a smaller one")
    return path.read_bytes()
