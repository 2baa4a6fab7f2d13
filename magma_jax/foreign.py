"""Reads foreign files at a bounded cost: regular files only, with limits on size, depth and number of values."""

import json
import os
import stat
from collections.abc import Mapping
from typing import Any

from magma_jax.output import printable

# The largest published vocabularies and shard indexes take about 20 MB.
MAX_TEXT_NBYTES = 64 * 2**20
# Values in a tree. A shard index holds a name and a file for each of a few thousand tensors.
MAX_VALUES = 1_000_000
MAX_DEPTH = 100


class ForeignError(ValueError):
    """Error in foreign data, in one line without the file's name."""


def open_regular(path: str | os.PathLike) -> int:
    """Opens a regular file, or a link to one, for reading and returns its descriptor.

    Raises:
        ForeignError: a folder, pipe, device or socket, whose reads may block or never end. OSError: no such file.
    """
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ForeignError("is not a regular file; give a file that holds data, or copy it here")
    return descriptor


def read_text(path: str | os.PathLike, limit: int = MAX_TEXT_NBYTES) -> str:
    """Reads a UTF-8 text file.

    Raises:
        ForeignError: not a regular file, not UTF-8, or more than ``limit`` bytes. OSError: no such file.
    """
    with open(open_regular(path), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ForeignError(f"is larger than {limit} bytes, which no such file needs")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ForeignError(f"is not UTF-8 text (byte {error.start})") from None


def read_json(path: str | os.PathLike, limit: int = MAX_TEXT_NBYTES) -> Any:
    """Reads a JSON file. Raises as ``read_text`` and ``parse_json``."""
    return parse_json(read_text(path, limit))


def parse_json(text: str) -> Any:
    """Parses JSON text.

    Raises:
        ForeignError: not JSON, or more values or levels than ``check_tree`` allows.
    """
    # Checked before parsing: a value takes up to a hundred times the memory of its text.
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
    """Raises ForeignError if nested dicts, lists and tuples hold too many values or levels to traverse.

    A list referenced twice counts twice: forty nested lists, each holding the next one twice, have 2**40 leaves.
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
    """Formats a foreign value for an error message: no control characters, at most ``length`` characters."""
    text = repr(value if not isinstance(value, str | bytes) else value[: length + 1])
    return printable(text if len(text) <= length else f"{text[:length]}...").replace("\n", "\\n")
