"""Parquet files, read row by row as JSON values."""

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from magma_jax.data.format.records import DataError
from magma_jax.data.readers.common import check_file
from magma_jax.output import error_line

# Rows that are held at a time; with embedded images some hundred megabytes.
_ROWS = 1024


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file as JSON values; dates, times, durations and decimals become text.

    Raises:
        DataError: not a complete parquet file, or duplicate column names.
    """
    for row in raw_parquet_rows(path):
        yield json.loads(json.dumps(row, default=str))


def raw_parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file as Python values, bytes included; errors as of ``parquet_rows``."""
    check_file(path)
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if twice := {name for name in names if names.count(name) > 1}:
            raise DataError(f"{path}: two columns are called {min(twice)}; rename one")
        with file:
            for batch in file.iter_batches(_ROWS):
                columns = [_values(column) for column in batch.columns]
                yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a whole parquet file ({error_line(error)}); fetch it again") from None


def _values(array: pyarrow.Array) -> list[Any]:
    """Python values, nested ones included; text for types that Python lacks, such as nanoseconds."""
    kind = array.type
    if isinstance(array, pyarrow.ExtensionArray):
        return _values(array.storage)
    if isinstance(array, pyarrow.DictionaryArray):
        return _values(array.dictionary_decode())
    if pyarrow.types.is_struct(kind):
        fields = [_values(column) for column in array.flatten()]
        names = [field.name for field in kind]
        there = array.is_valid().to_pylist()
        return [{n: f[i] for n, f in zip(names, fields, strict=True)} if there[i] else None for i in range(len(array))]
    if pyarrow.types.is_map(kind):
        kind = pyarrow.list_(pyarrow.struct([("key", kind.key_type), ("value", kind.item_type)]))
        return _values(array.cast(kind))
    if isinstance(array, pyarrow.ListArray | pyarrow.LargeListArray | pyarrow.FixedSizeListArray):
        inner = iter(_values(array.flatten()))
        lengths = array.value_lengths().to_pylist()
        return [None if length is None else [next(inner) for _ in range(length)] for length in lengths]
    if pyarrow.types.is_duration(kind):
        return [None if count is None else _duration(count, kind.unit) for count in array.cast("int64").to_pylist()]
    if pyarrow.types.is_timestamp(kind) and kind.tz:
        naive = array.cast(pyarrow.timestamp(kind.unit))  # UTC, independent of the machine's time zone data
        return [None if text is None else f"{text}Z" for text in _values(naive)]
    if pyarrow.types.is_temporal(kind) and not pyarrow.types.is_interval(kind):
        return array.cast("string").to_pylist()
    return array.to_pylist()


def _duration(count: int, unit: str) -> str:
    """Formats a duration like ``timedelta``, with nine decimals if needed."""
    billionths = count * {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}[unit]
    millionths, rest = divmod(billionths, 1000)
    try:
        text = str(datetime.timedelta(microseconds=millionths))
    except OverflowError:  # beyond three million years
        return f"{count} {unit}"
    return f"{text if '.' in text else text + '.000000'}{rest:03d}" if rest else text
