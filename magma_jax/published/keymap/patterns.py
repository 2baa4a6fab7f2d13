"""Patterns of names: literal text with ``{number}`` and ``{dotted...}`` placeholders.

``{layer}`` matches a whole number without leading zeros, ``{rest...}`` one or more names and the separators
between them. Values are kept as strings, dotted ones with "." whatever separator they were read with.
"""

import itertools
import re
from collections.abc import Iterable
from functools import cache

_PLACEHOLDER = re.compile(r"\{(\w+)(\.\.\.)?\}")


@cache
def _compile(pattern: str) -> re.Pattern:
    parts, end = [], 0
    for placeholder in _PLACEHOLDER.finditer(pattern):
        name, dotted = placeholder.groups()
        parts.append(re.escape(pattern[end : placeholder.start()]))
        parts.append(f"(?P<{name}>.+)" if dotted else f"(?P<{name}>0|[1-9][0-9]{{0,9}})")
        end = placeholder.end()
    parts.append(re.escape(pattern[end:]))
    if "{" in _PLACEHOLDER.sub("", pattern):
        raise ValueError(f"{pattern!r}: a placeholder is {{name}} or {{name...}}")
    return re.compile("".join(parts))


def names(pattern: str) -> set[str]:
    """The names of the placeholders."""
    return set(_compile(pattern).groupindex)


def match(pattern: str, name: str, separator: str = ".") -> dict[str, str] | None:
    """The placeholders' values if ``name`` fits the pattern, else None."""
    found = _compile(pattern).fullmatch(name)
    return found and {key: value.replace(separator, ".") for key, value in found.groupdict().items()}


def fill(pattern: str, values: dict[str, str], separator: str = ".") -> str:
    """The name that the pattern gives with these values."""
    return _PLACEHOLDER.sub(lambda found: values[found[1]].replace(".", separator), pattern)


class Sampler:
    """Makes up names that fit a pattern, using the numbers and words that the given patterns spell out."""

    def __init__(self, patterns: Iterable[str]):
        literals = _PLACEHOLDER.sub(" ", " ".join(patterns))
        words = sorted(set(re.findall(r"\w+", literals)) | {"sample"})
        self._numbers = sorted(set(re.findall(r"[0-9]+", literals)) | {"0", "1", "98765"})
        self._dotted = words + [f"sample.{word}" for word in words]

    def __call__(self, pattern: str, separator: str = ".") -> Iterable[str]:
        """Names for every combination of values."""
        placeholders = {name: self._dotted if dots else self._numbers for name, dots in _PLACEHOLDER.findall(pattern)}
        for values in itertools.product(*placeholders.values()):
            yield fill(pattern, dict(zip(placeholders, values, strict=True)), separator)
