"""Entries of a key map table, and their matching to names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from magma_jax.published.keymap import patterns as patterns
from magma_jax.published.keymap.report import Report
from magma_jax.storage.deferred import Tensor


@dataclass(frozen=True)
class Rule:
    """Maps tensors named ``theirs`` to our parameter ``ours``.

    ``stack`` names the placeholder that ``ours`` lacks: its values ``start``, ``start + 1``, ... become the rows of our
    array. The rule does not match smaller numbers (``start=1`` leaves block 0 to another rule). ``to_ours`` and
    ``to_theirs`` transform one tensor (one row) where the shapes differ; both or neither. They are applied to a dummy
    array to infer the new shape, so they may only reshape and transpose.
    """

    theirs: str
    ours: str
    stack: str | None = None
    start: int = 0
    to_ours: Callable[[np.ndarray], np.ndarray] | None = None
    to_theirs: Callable[[np.ndarray], np.ndarray] | None = None

    def __post_init__(self) -> None:
        missing = patterns.names(self.theirs) ^ patterns.names(self.ours)
        if missing != ({self.stack} - {None}) or missing & patterns.names(self.ours):
            raise ValueError(f"{self.theirs!r} and {self.ours!r} must have the same placeholders, except for `stack`")
        if (self.to_ours is None) != (self.to_theirs is None):
            raise ValueError(f"{self.theirs!r}: give both to_ours and to_theirs, or neither")


@dataclass(frozen=True)
class Alias:
    """Alias: ``theirs`` is the same tensor as ``canonical``, which another entry of the table covers.

    Checked on reading (same storage, or equal bits) and written as a second name of the same storage.
    """

    theirs: str
    canonical: str

    def __post_init__(self) -> None:
        if patterns.names(self.theirs) != patterns.names(self.canonical):
            raise ValueError(f"{self.theirs!r} and {self.canonical!r} must have the same placeholders")


@dataclass(frozen=True)
class Ignored:
    """Tensor without a parameter of ours (a mask, a counter, a rotary table), skipped on reading.

    With ``recompute`` it is written again: for every written key that matches ``beside``, ``recompute(**values)``
    returns the array (or ``Deferred``), where ``values`` are the placeholder values.
    """

    theirs: str
    recompute: Callable[..., Tensor] | None = None
    beside: str | None = None

    def __post_init__(self) -> None:
        if (self.recompute is None) != (self.beside is None):
            raise ValueError(f"{self.theirs!r}: give both recompute and beside, or neither")
        if self.beside is not None and patterns.names(self.theirs) != patterns.names(self.beside):
            raise ValueError(f"{self.theirs!r} and {self.beside!r} must have the same placeholders")


Table = Sequence[Rule | Alias | Ignored]


def check_table(table: Table) -> None:
    """Raises KeyMapError if two entries match the same key, or two rules the same path.

    Tests names generated from the patterns with the numbers and words of the table, which finds likely mistakes
    without a checkpoint; ``to_ours`` and ``to_theirs`` check every actual name.
    """
    report = Report()
    samples = patterns.Sampler(entry.theirs for entry in table)
    for entry in table:
        for key in samples(entry.theirs):
            matches = [other for other in table if match_theirs(other, key) is not None]
            if len(matches) > 1 and entry in matches:
                report.add("keys that several entries match", f"{key}  {[other.theirs for other in matches]}")
                break
        if not isinstance(entry, Rule):
            continue
        for path in samples(entry.ours, "/"):
            matches = [rule for rule, _ in rules_for(table, path)]
            if len(matches) > 1:
                report.add("parameters that several rules match", f"{path}  {[r.ours for r in matches]}")
                break
    report.raise_if_any()


def match_theirs(entry: Rule | Alias | Ignored, key: str) -> dict[str, str] | None:
    """Placeholder values if the entry matches the foreign key, else None."""
    values = patterns.match(entry.theirs, key)
    if values and isinstance(entry, Rule) and entry.stack and int(values[entry.stack]) < entry.start:
        return None
    return values


def rules_for(table: Table, path: str) -> list[tuple[Rule, dict[str, str]]]:
    """Rules that produce one of our paths, with the placeholder values."""
    rules = [entry for entry in table if isinstance(entry, Rule)]
    return [(rule, values) for rule in rules if (values := patterns.match(rule.ours, path, "/")) is not None]
