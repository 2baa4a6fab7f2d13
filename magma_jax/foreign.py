"""What somebody else wrote, read at a bounded cost: regular files only, of bounded size, depth and number of values."""

import json
import os
import stat
from collections.abc import Mapping
from typing import Any

from magma_jax.output import printable

# The largest small files that are published, vocabularies and indexes of shards, take some 20 MB.
MAX_TEXT_NBYTES = 64 * 2**20
# Values in a tree. An index of a model has a name and a file for each of some thousand tensors.
MAX_VALUES = 1_000_000
MAX_DEPTH = 100


class ForeignError(ValueError):
    """What is wrong with foreign data, in one line that does not know the file's name."""


def open_regular(path: str | os.PathLike) -> int:
    """Descriptor of a regular file, or of a link to one, open for reading.

    Raises:
        ForeignError: a folder, pipe, device or socket, which may never end or never answer. OSError: no such file.
    """
    # Without O_NONBLOCK opening a pipe would wait for somebody to write into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ForeignError("is no regular file; give a file that holds data, or copy it here")
    return descriptor


def read_text(path: str | os.PathLike, limit: int = MAX_TEXT_NBYTES) -> str:
    """A file of UTF-8 text.

    Raises:
        ForeignError: no regular file, no text, or more than ``limit`` bytes. OSError: no such file.
    """
    with open(open_regular(path), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ForeignError(f"is larger than {limit} bytes, which no such file needs")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ForeignError(f"is no text in UTF-8 (byte {error.start})") from None


def read_json(path: str | os.PathLike, limit: int = MAX_TEXT_NBYTES) -> Any:
    """The value in a JSON file. Raises as ``read_text`` and ``parse_json`` do."""
    return parse_json(read_text(path, limit))


def parse_json(text: str) -> Any:
    """The value that JSON text stands for.

    Raises:
        ForeignError: no JSON, or more values or levels than ``check_tree`` allows.
    """
    # Before parsing: a value takes up to a hundred times the memory of its text.
    if sum(map(text.count, ",[{")) > MAX_VALUES:
        raise ForeignError(f"holds more than {MAX_VALUES} values")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ForeignError(f"is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise ForeignError(f"not valid JSON ({error})") from None
    check_tree(value)
    return value


def check_tree(tree: Any) -> None:
    """Raises ForeignError if dicts, lists and tuples hold too much for anybody who walks through them.

    A list that stands in two places counts twice: of one that holds another twice, forty times over, no walk ends.
    """
    waiting = [(tree, 0)]
    seen = 0
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, Mapping):
            children = value.values()
        elif isinstance(value, list | tuple | set):
            children = value
        else:
            continue
        seen += len(children)
        if seen > MAX_VALUES:
            raise ForeignError(f"holds more than {MAX_VALUES} values")
        if depth >= MAX_DEPTH:
            raise ForeignError(f"is nested more than {MAX_DEPTH} deep")
        waiting += [(child, depth + 1) for child in children if isinstance(child, Mapping | list | tuple | set)]


def shown(value: object, length: int = 100) -> str:
    """A value from a file for a message: no control characters, and no more of it than a line takes."""
    text = repr(value if not isinstance(value, str | bytes) else value[: length + 1])
    return printable(text if len(text) <= length else f"{text[:length]}...").replace("\n", "\\n")
