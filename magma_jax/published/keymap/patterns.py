"""Name patterns: literal text with ``{number}`` and ``{dotted...}`` placeholders.

``{layer}`` matches an integer without leading zeros, ``{rest...}`` one or more names with the separators between them.
Values are strings; dotted ones use "." regardless of the separator in the name.
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
    """Placeholder names of a pattern."""
    return set(_compile(pattern).groupindex)


def match(pattern: str, name: str, separator: str = ".") -> dict[str, str] | None:
    """Placeholder values if ``name`` matches the pattern, else None."""
    found = _compile(pattern).fullmatch(name)
    return found and {key: value.replace(separator, ".") for key, value in found.groupdict().items()}


def fill(pattern: str, values: dict[str, str], separator: str = ".") -> str:
    """Substitutes values for the placeholders."""
    return _PLACEHOLDER.sub(lambda found: values[found[1]].replace(".", separator), pattern)


class Sampler:
    """Generates names that match a pattern, from the numbers and words in the given patterns."""

    def __init__(self, patterns: Iterable[str]):
        literals = _PLACEHOLDER.sub(" ", " ".join(patterns))
        words = sorted(set(re.findall(r"\w+", literals)) | {"sample"})
        self._numbers = sorted(set(re.findall(r"[0-9]+", literals)) | {"0", "1", "98765"})
        self._dotted = words + [f"sample.{word}" for word in words]

    def __call__(self, pattern: str, separator: str = ".") -> Iterable[str]:
        """Yields a name for every combination of values."""
        placeholders = {name: self._dotted if dots else self._numbers for name, dots in _PLACEHOLDER.findall(pattern)}
        for values in itertools.product(*placeholders.values()):
            yield fill(pattern, dict(zip(placeholders, values, strict=True)), separator)
