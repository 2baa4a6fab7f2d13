"""Small images whose files take long to decode, each kind in about so many bytes as asked for."""

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image


def saved(image: Image.Image, kind: str, **options) -> bytes:
    """The encoded image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(chunks: bytes, before: bytes = b"IDAT") -> bytes:
    """A PNG with these chunks in front of another one."""
    content = saved(Image.new("RGB", (8, 8)), "PNG")
    place = content.index(before) - 4
    return content[:place] + chunks + content[place:]


def bmp_runs(width: int, height: int, body: bytes) -> bytes:
    """A BMP in run-length encoding."""
    offset = 54 + 1024
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + head + bytes(1024) + body


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    content = saved(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    return content[:start] + content[start:-2] * scans + content[-2:]


def many_tags() -> bytes:
    """A PNG of 0.8 MB whose 65,534 tags are all damaged, about each of which Pillow warns in other words."""
    tags = b"".join(struct.pack("<HHII", i, 7, 2**20, 2**30) for i in range(65_534))
    return png_with(chunk(b"eXIf", b"II*\0" + struct.pack("<IH", 8, 65_534) + tags + bytes(4)))


def _jpeg_with(segments: bytes) -> bytes:
    content = saved(Image.new("RGB", (8, 8)), "JPEG")
    return content[:2] + segments + content[2:]


def _gif_with(blocks: bytes) -> bytes:
    content = saved(Image.new("P", (8, 8)), "GIF")
    place = content.index(b",")
    return content[:place] + blocks + content[place:]


def _growing_exif(nbytes: int) -> bytes:
    """Every piece of EXIF is added to those before, which are copied."""
    first = b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527)
    return _jpeg_with(first * 4 + b"\xff\xe1\0\x09Exif\0\0a" * ((nbytes - 4 * len(first)) // 11))


def _profile() -> bytes:
    return chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20 - 1), 9))


def _text() -> bytes:
    """Text that turns out not to be UTF-8 at its end, and so does not count as text."""
    return chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2**20 - 2) + b"\xff", 9))


def _filled(piece: bytes, place: Callable[[bytes], bytes]) -> Callable[[int], bytes]:
    return lambda nbytes: place(piece * (nbytes // len(piece)))


# The cost of each grows at least with its bytes; a megabyte takes 0.1 s of a core and more.
SLOW: dict[str, Callable[[int], bytes]] = {
    "a JPEG of empty segments": _filled(b"\xff\xe1\0\2", _jpeg_with),
    "a JPEG of fill bytes": _filled(b"\xff", _jpeg_with),
    "a JPEG of comments": _filled(b"\xff\xfe\0\2", _jpeg_with),
    "a JPEG whose EXIF grows": _growing_exif,
    "a PNG of private chunks": _filled(chunk(b"prVt"), png_with),
    "a PNG of unknown chunks": _filled(chunk(b"aBCd"), png_with),
    "a PNG of chunks at its end": _filled(chunk(b"prVt"), lambda chunks: png_with(chunks, b"IEND")),
    "a PNG of profiles": _filled(_profile(), png_with),
    "a PNG of profiles at its end": _filled(_profile(), lambda chunks: png_with(chunks, b"IEND")),
    "a PNG of broken text": _filled(_text(), png_with),
    "a PNG that is animated again and again": _filled(chunk(b"acTL", bytes(8)), png_with),
    "a PNG of text": _filled(chunk(b"tEXt", b"a\0b"), png_with),
    "a GIF of comments": _filled(b"!\xfe\1a\0", _gif_with),
}
