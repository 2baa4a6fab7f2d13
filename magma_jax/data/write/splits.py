"""Splits of one's own data, by the content of the images: copies of an image are in one split."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from magma_jax.data.format.records import DataError, Record, Skipped
from magma_jax.data.write.conversion import ConvertOptions, convert


def parse_split(pairs: Sequence[str]) -> dict[str, float]:
    """Shares by name, from ``["train=0.9", "validation=0.1"]``.

    Raises:
        DataError: no share, a name twice or with a slash, or shares that do not add up to 1.
    """
    shares: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not name or "/" in name or name in (".", "..") or not 0 < share <= 1:
            raise DataError(f"--split {pair}: expected NAME=SHARE with a share above 0 and at most 1")
        if name in shares:
            raise DataError(f"--split: {name} comes twice")
        shares[name] = share
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise DataError(f"--split: the shares add up to {sum(shares.values()):g}, not to 1")
    return shares


def convert_splits(
    entries: Callable[[], Iterable[Record | Skipped]],
    out: Path,
    shares: Mapping[str, float],
    options: ConvertOptions = ConvertOptions(),
    *,
    source: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Writes a dataset folder ``out/NAME`` for every split; returns their ``info.json`` by name.

    The split of an image depends only on its bytes and on the shares, so an image stays in its split when others are
    added. The source is read once for each split; splits that are there already are kept.

    Args:
        entries: the records, the same ones in the same order at every call.
        out: folder of the splits.
        shares: share of the images by name of the split.
        options: as of ``convert``.
        source: as of ``convert``.

    Raises:
        DataError: as of ``convert``, or all splits are there already.
    """
    if all((out / name).exists() for name in shares):
        raise DataError(f"{out}: {', '.join(shares)} already exist; choose another name or remove them first")
    names = list(shares)
    infos = {}
    for name in names:
        if (out / name).exists():
            continue
        about = {**(source or {}), "split": name, "shares": dict(shares)}
        infos[name] = convert(_of_split(entries(), name, names, shares), out / name, options, source=about)
    return infos


def split_of(image: bytes, shares: Mapping[str, float]) -> str:
    """The split of an image."""
    place = int.from_bytes(hashlib.sha256(image).digest()[:8], "big") / 2**64
    for name, share in shares.items():
        place -= share
        if place < 0:
            return name
    return list(shares)[-1]  # the shares may add up to a little less than 1


def _of_split(
    entries: Iterable[Record | Skipped], name: str, names: Sequence[str], shares: Mapping[str, float]
) -> Iterator[Record | Skipped]:
    """Entries of a split; those that a reader skipped belong to the first one."""
    for entry in entries:
        if isinstance(entry, Skipped):
            if name == names[0]:
                yield entry
            continue
        try:
            content = entry.image_bytes()
        except OSError:
            content = entry.id.encode()  # the conversion reports it
        if split_of(content, shares) == name:
            yield entry
