"""Trains a byte-level BPE tokenizer on the user's text files."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from magma_jax.data.format.records import DataError
from magma_jax.data.tokenizers.byte_level import Tokenizer, train_bpe
from magma_jax.foreign import ForeignError, open_regular
from magma_jax.output import whole_output


def train_tokenizer(files: Sequence[Path], out: Path, vocab_size: int) -> Tokenizer:
    """Trains on the lines of ``files`` and writes ``out``, a ``tokenizer.json``; progress goes to standard error.

    Lines are texts without their line ends. The result depends on the lines, not on their order or the machine. The
    file appears when it is complete; its name is reserved before the texts are read.

    Raises:
        DataError: a file that is not UTF-8 text, or texts with too few pairs to merge for ``vocab_size`` entries.
        ValueError: ``vocab_size`` below 258. OutputError, OSError: ``out`` or a file cannot be opened.
    """
    if out.is_dir():
        raise DataError(f"{out}: is a folder; give the file to write, such as {out / 'tokenizer.json'}")
    with contextlib.ExitStack() as stack:
        partial = stack.enter_context(whole_output(out))
        nbytes = sum(file.stat().st_size for file in files)
        # disable=None: no bar in a log file.
        bar = stack.enter_context(
            tqdm(total=nbytes, desc="reading", unit="B", unit_scale=True, disable=None, leave=False, file=sys.stderr)
        )
        tokenizer = train_bpe(_lines(files, bar), vocab_size, progress=sys.stderr.isatty())
        if len(tokenizer) < vocab_size:
            raise DataError(
                f"the texts have pairs for {len(tokenizer)} entries, not {vocab_size}; give more text or "
                f"--vocab-size {len(tokenizer)}"
            )
        partial.write_text(tokenizer.to_json(), encoding="utf-8")
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    return tokenizer


def _lines(files: Sequence[Path], bar: tqdm) -> Iterator[str]:
    for path in files:
        try:
            descriptor = open_regular(path)
        except ForeignError as error:
            raise DataError(f"{path}: {error}") from None
        with open(descriptor, "rb") as file:
            for number, line in enumerate(file, 1):
                bar.update(len(line))
                try:
                    yield line.decode().rstrip("\r\n")
                except UnicodeDecodeError:
                    raise DataError(f"{path}: line {number} is not UTF-8 text; convert the file first") from None
