"""Random access to dataset folders written by ``data.write.conversion``."""

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import grain
import numpy as np

from magma_jax.data.format.records import DataError, Record, unpack
from magma_jax.data.format.shards import INFO_FILE, TEXTS_FILE, texts_name
from magma_jax.foreign import shown
from magma_jax.typing import Int


class StoredRecords:
    """Records of a dataset folder by row; a Grain data source, picklable.

    Attributes:
        info: content of ``info.json``.
        texts: numbers of captions and questions of every record, int32 (N, 2).
    """

    format: ClassVar[str] = "magma_jax records"
    remedy: ClassVar[str] = "make one: python -m magma_jax.data"

    info: dict[str, Any]
    texts: Int[np.ndarray, "N 2"]

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not (folder / INFO_FILE).is_file():
            raise DataError(f"{folder}: no dataset folder (no {INFO_FILE}); {self.remedy}")
        with _opening(folder / INFO_FILE):
            self.info = json.loads((folder / INFO_FILE).read_text())
            found, expected = self.info.get("format", self.format), int(self.info["records"])
            files = [name for name, records in self.info["files"].items() if records]
            if any(Path(name).name != name for name in files):
                raise ValueError("it names files elsewhere")
        if found != self.format:
            raise DataError(f"{folder}: holds {shown(found)}, but {self.format!r} are wanted here; {self.remedy}")
        missing = [name for name in [*files, *map(texts_name, files)] if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder}: {missing[0]} is missing ({len(missing)} in all); copy or convert it again")
        # Memory-mapped: tens of millions of records take a few hundred megabytes, in every worker.
        with _opening(folder / TEXTS_FILE):
            self.texts = np.load(folder / TEXTS_FILE, mmap_mode="r")
        self._folder = folder
        _allow_open_files(2 * len(files))
        with _opening(folder):
            # Grain's annotations lack __len__.
            self._source: Any = grain.sources.ArrayRecordDataSource([str(folder / name) for name in files])
            self._texts: Any = grain.sources.ArrayRecordDataSource([str(folder / texts_name(name)) for name in files])
        for held in (len(self._source), len(self._texts), len(self.texts)):
            if held != expected:
                raise DataError(f"{folder}: holds {held} records, not {expected}; copy or convert it again")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> Record:
        return unpack(self._source[row])

    def text(self, row: int) -> Record:
        """Record with only captions and questions; many times cheaper to read than the whole record."""
        return unpack(self._texts[row])

    def __repr__(self) -> str:
        return f"StoredRecords({self._folder})"


@contextlib.contextmanager
def _opening(path: Path) -> Iterator[None]:
    try:
        yield
    except (AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{path}: is damaged ({reason:.200}); copy or convert it again") from error


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files: random access keeps every shard open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
