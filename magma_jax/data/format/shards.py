"""The files of a dataset folder: what they are called, and a shard written whole or not at all."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

from magma_jax.output import full_disk

INFO_FILE, TEXTS_FILE, SKIPPED_FILE = "info.json", "texts.npy", "skipped.jsonl"
# One record a group, for random access; images do not compress.
WRITER_OPTIONS = "group_size:1,uncompressed"


def records_name(number: int) -> str:
    """File of the records of a shard."""
    return f"records-{number:05d}.array_record"


def texts_name(records: str) -> str:
    """File of the texts of a shard whose records are in the file ``records``."""
    return records.replace("records-", "texts-", 1)


class ShardWriter:
    """Two open files for records and their texts."""

    def __init__(self, records: ArrayRecordWriter, texts: ArrayRecordWriter):
        self._records, self._texts = records, texts

    def write(self, content: bytes, text: bytes) -> None:
        """Appends a record as ``records.pack`` and as ``records.pack_text`` give it."""
        self._records.write(content)
        self._texts.write(text)


@contextlib.contextmanager
def shard_writer(records: Path, temporary_folder: Path) -> Iterator[ShardWriter]:
    """Opens a shard for writing; its two files get their names when the block ends, and not if it raises.

    Args:
        records: the file of the records to be.
        temporary_folder: on the same disk; what a killed process leaves there is never taken for data.

    Raises:
        OSError: whatever the file library met (it raises RuntimeErrors itself), such as a full disk.
    """
    names = {records.name: records, texts_name(records.name): records.with_name(texts_name(records.name))}
    temporary = {temporary_folder / f"{name}.{os.getpid()}.tmp": path for name, path in names.items()}
    try:
        with contextlib.ExitStack() as stack:
            yield ShardWriter(*[stack.enter_context(_open(path)) for path in temporary])
        for partial, path in temporary.items():
            os.replace(partial, path)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise OSError(full_disk(error) or errno.EIO, reason[:200]) from None
    finally:
        for partial in temporary:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[ArrayRecordWriter]:
    writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
    try:
        yield writer
    finally:
        writer.close()
