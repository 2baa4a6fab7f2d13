"""File names of a dataset folder, and atomic writing of shards."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

from magma_jax.output import full_disk

INFO_FILE, TEXTS_FILE, SKIPPED_FILE = "info.json", "texts.npy", "skipped.jsonl"
# One record per group, for random access; images do not compress.
WRITER_OPTIONS = "group_size:1,uncompressed"


def records_name(number: int) -> str:
    """Name of a shard's records file."""
    return f"records-{number:05d}.array_record"


def texts_name(records: str) -> str:
    """Name of the texts file that belongs to the file ``records`` of records or codes."""
    return f"texts-{records.partition('-')[2]}"


class ShardWriter:
    """Open records file and texts file of a shard."""

    def __init__(self, records: ArrayRecordWriter, texts: ArrayRecordWriter):
        self._records, self._texts = records, texts

    def write(self, content: bytes, text: bytes) -> None:
        """Appends a record, serialised by ``records.pack`` and by ``records.pack_text``."""
        self._records.write(content)
        self._texts.write(text)


@contextlib.contextmanager
def shard_writer(records: Path, temporary_folder: Path) -> Iterator[ShardWriter]:
    """Opens a shard for writing; its two files are renamed to their final names when the block ends without an error.

    Args:
        records: final path of the records file.
        temporary_folder: folder on the same disk, whose files are never read as data.

    Raises:
        OSError: a failure of the file library, such as a full disk (the library itself raises RuntimeError).
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
