"""Data set folders that ``data.convert`` wrote, opened for random access."""

import json
from pathlib import Path
from typing import Any

import grain
import numpy as np

from magma_jax.data.convert import INFO_FILE, TEXTS_FILE
from magma_jax.data.records import DataError, Record, unpack
from magma_jax.typing import Int


class StoredRecords:
    """The records of a data set folder, by row; a source for Grain.

    Attributes:
        info: the content of ``info.json``.
        texts: number of captions and of questions of every record, int32 (N, 2).
    """

    info: dict[str, Any]
    texts: Int[np.ndarray, "N 2"]

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not (folder / INFO_FILE).is_file():
            raise DataError(f"{folder}: no data set folder (no {INFO_FILE}); make one: python -m magma_jax.data")
        self.info = json.loads((folder / INFO_FILE).read_text())
        missing = [name for name in self.info["files"] if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder}: {missing[0]} is missing ({len(missing)} in all); copy or convert it again")
        self.texts = np.load(folder / TEXTS_FILE)
        self._folder = folder
        self._source = grain.sources.ArrayRecordDataSource(
            [str(folder / name) for name, records in self.info["files"].items() if records]
        )
        if len(self._source) != self.info["records"]:
            raise DataError(f"{folder}: holds {len(self._source)} records, not {self.info['records']}; copy it again")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> Record:
        return unpack(self._source[row])

    def __repr__(self) -> str:
        return f"StoredRecords({self._folder})"
