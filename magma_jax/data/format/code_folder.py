"""Random access to folders of codes and texts written by ``data.write.encoding``.

A record is the bytes of its codes, (views, tokens), in ``code_dtype``; view 0 is the centre crop.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magma_jax.data.format.record_folder import StoredRecords
from magma_jax.data.format.records import DataError
from magma_jax.typing import Int

FORMAT = "magma_jax codes"


def codes_name(number: int) -> str:
    """Name of a shard's file of codes."""
    return f"codes-{number:05d}.array_record"


def code_dtype(size: int) -> np.dtype:
    """Stored dtype of codes from a codebook of ``size``."""
    return np.dtype("<u2" if size <= 2**16 else "<u4")


class StoredCodes(StoredRecords):
    """Codes and texts of a folder by row.

    Attributes:
        size: number of codes of the codebook.
        tokens: codes of an image.
        views: views of an image.
        tokenizer: identity of the tokenizer's weights.
    """

    format = FORMAT
    remedy = "write it from a dataset folder with python -m magma_jax.data encode"

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        try:
            self.size, self.tokens, self.views = (int(self.info[name]) for name in ("size", "tokens", "views"))
            self.tokenizer = str(self.info["tokenizer"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder}: its info lacks {error}; encode it again") from None

    def __getitem__(self, row: int) -> Any:
        """Codes of a record, int32 (views, tokens).

        Raises:
            DataError: a damaged record.
        """
        content = self._source[row]
        codes = np.frombuffer(content, code_dtype(self.size))
        if codes.size != self.views * self.tokens or codes.max(initial=0) >= self.size:
            raise DataError(f"{self._folder}: the codes of row {row} are damaged; encode it again")
        return codes.reshape(self.views, self.tokens).astype(np.int32)


class Codes:
    """Codes of several folders, numbered consecutively in folder order.

    Raises:
        DataError: folders of different tokenizers.
    """

    def __init__(self, folders: Sequence[StoredCodes]):
        first = folders[0]
        for other in folders[1:]:
            if (other.size, other.tokens, other.tokenizer) != (first.size, first.tokens, first.tokenizer):
                raise DataError(
                    f"{other} and {first} hold codes of different tokenizers; encode both with the same one"
                )
        self.folders = tuple(folders)
        self.size, self.tokens, self.tokenizer = first.size, first.tokens, first.tokenizer
        self.starts = np.cumsum([0, *map(len, folders)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def of(
        self, rows: Int[np.ndarray, "*batch"], draws: Int[np.ndarray, "*batch"] | None = None
    ) -> Int[np.ndarray, "*batch L"]:
        """Codes of rows: of the view that a draw chooses, or the first one."""
        found = []
        for place, row in enumerate(rows.ravel()):
            number = int(np.searchsorted(self.starts, row, side="right")) - 1
            folder = self.folders[number]
            view = 0 if draws is None else int(draws.ravel()[place]) % folder.views
            found.append(folder[int(row - self.starts[number])][view])
        return np.stack(found).reshape(*rows.shape, self.tokens)
