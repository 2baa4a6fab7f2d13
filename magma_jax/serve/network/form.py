"""Multipart forms (RFC 7578), as OpenAI's clients send images: bounded, and without temporary files."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from magma_jax.serve.errors import RequestError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

# OpenAI's form has twenty fields.
MAX_PARTS = 64
# Bytes of a field without a file name; a prompt is the longest.
MAX_FIELD_BYTES = 64 * 2**10
# Bytes per call of the parser, between which other threads run.
_CHUNK = 2**16


def read_form(body: bytes | bytearray, content_type: str) -> dict[str, list[str | bytes]]:
    """Values of a form by field name: texts, and the contents of files.

    A client's ``image[]`` is ``image``.

    Raises:
        RequestError: no multipart form, a damaged one, or one above a limit.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise RequestError("the request is no multipart form with a boundary")
    parts = _Parts()
    try:
        parser = MultipartParser(options[b"boundary"], parts.callbacks())
        for start in range(0, len(body), _CHUNK):
            parser.write(bytes(body[start : start + _CHUNK]))
        parser.finalize()
    except FormParserError as error:
        raise RequestError(f"the form is damaged ({error!s:.100})") from None
    if not parts.ended:
        raise RequestError("the form is cut short")
    return parts.values


class _Parts:
    """Collects the parts of a form."""

    def __init__(self):
        self.values: dict[str, list[str | bytes]] = {}
        self.ended = False
        self._count = 0

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._end_of_form,
        }

    def _begin(self) -> None:
        self._count += 1
        if self._count > MAX_PARTS:
            raise RequestError(f"the form has more than {MAX_PARTS} fields")
        self._headers: dict[bytes, bytes] = {}
        self._header, self._value, self._content = bytearray(), bytearray(), bytearray()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._content += data[start:end]

    def _end(self) -> None:
        options = _disposition(self._headers)
        name = options.get(b"name", b"").decode("utf-8", "replace").removesuffix("[]")
        if not name:
            raise RequestError("the form has a field without a name")
        value: str | bytes = bytes(self._content)
        if b"filename" not in options:
            if len(self._content) > MAX_FIELD_BYTES:
                raise RequestError(f"{name:.40}: more than {MAX_FIELD_BYTES} bytes", 413, param=name[:40])
            try:
                value = self._content.decode()
            except UnicodeDecodeError:
                raise RequestError(f"{name:.40}: not UTF-8", param=name[:40]) from None
        self.values.setdefault(name, []).append(value)

    def _end_of_form(self) -> None:
        self.ended = True


def _disposition(headers: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    return parse_options_header(headers.get(b"content-disposition", b""))[1]
