"""Builds a memory bank in parts, so that an interrupted build continues."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from magma_jax.data.documents.bank import BANK_FILE, CODES_FILE, TEXTS_FILE, VECTORS_FILE, Entry
from magma_jax.data.format.records import DataError
from magma_jax.foreign import ForeignError, read_json
from magma_jax.output import replace_file
from magma_jax.retrieval.encoders import Encoder, document_vectors
from magma_jax.retrieval.sources import Documents

# Documents of a part.
PART = 4096
# Documents that are encoded at a time.
BATCH = 256

PARTS, SETTINGS_FILE = "parts", "settings.json"
TRAIN = "train"


def build_bank(
    documents: Documents,
    encoder: Encoder,
    out: str | Path,
    *,
    splits: Collection[str] = (TRAIN,),
    with_evaluation: bool = False,
    progress: bool = True,
) -> int:
    """Writes the documents of some splits and their vectors as a bank; returns their number.

    Args:
        documents: what to remember.
        encoder: what makes the vectors.
        out: folder; an interrupted build of the same documents continues there.
        splits: splits to include.
        with_evaluation: whether splits other than train may be included.
        progress: whether to show a progress bar.

    Raises:
        DataError: splits of evaluation without ``with_evaluation``, no such documents, or a folder with something else.
    """
    out = Path(out)
    if (others := sorted(set(splits) - {TRAIN})) and not with_evaluation:
        raise DataError(
            f"the bank would hold items of {', '.join(others)}, with which nothing can be evaluated; leave them out, "
            "or say --with-evaluation"
        )
    rows = [row for row, entry in enumerate(documents.entries) if entry.split in splits]
    if not rows:
        raise DataError(f"{documents.name} has no documents of {', '.join(sorted(splits))}")
    settings = {"data": documents.name, "encoder": encoder.name, "documents": len(rows), "splits": sorted(splits)}
    if (out / BANK_FILE).exists():
        raise DataError(f"{out}: already holds a bank; choose another folder or remove it first")
    begin(out, settings)
    (out / PARTS).mkdir(exist_ok=True)
    starts = range(0, len(rows), PART)
    for number, start in enumerate(
        tqdm(starts, desc="encoding documents", unit="part", disable=None if progress else True)
    ):
        file = out / PARTS / f"{number:05d}.npz"
        if not file.exists():
            _write_part(file, documents, encoder, rows[start : start + PART])
    _assemble(out, settings, [documents.entries[row] for row in rows], encoder.width)
    return len(rows)


def begin(out: Path, settings: dict[str, Any]) -> None:
    """Creates the folder of a resumable command, or checks that it was begun with the same settings.

    Raises:
        DataError: it holds something else.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / SETTINGS_FILE
    if file.exists():
        try:
            before = read_json(file)
        except (OSError, ForeignError) as error:
            raise DataError(f"{file}: cannot be read ({error}); remove {out} and start again") from None
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            name = changed[0]
            raise DataError(
                f"{out}: was begun with {name} {before.get(name)!r}, not {settings[name]!r}; choose another folder"
            )
    elif any(out.iterdir()):
        raise DataError(f"{out}: is not empty; choose another folder")
    else:
        replace_file(file, json.dumps(settings).encode())


def _write_part(file: Path, documents: Documents, encoder: Encoder, rows: Sequence[int]) -> None:
    vectors, codes = [], []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        texts = encoder.texts([documents.entries[row].text for row in batch])
        pixels = documents.pixels(batch, encoder.image_size)
        vectors.append(document_vectors(texts, None if pixels is None else encoder.images(pixels)))
        if (found := documents.codes(batch)) is not None:
            codes.append(found)
    arrays: dict[str, Any] = {"vectors": np.concatenate(vectors).astype(np.float16)}
    if codes:
        arrays["codes"] = np.concatenate(codes)
    temporary = file.with_name(f".{file.name}.partial")
    with open(temporary, "wb") as stream:
        np.savez(stream, **arrays)
    temporary.replace(file)


def _assemble(out: Path, settings: dict[str, Any], entries: Sequence[Entry], width: int) -> None:
    """Joins the parts; ``bank.json``, which comes last, says that all is there."""
    files = sorted((out / PARTS).glob("[0-9]*.npz"))
    vectors = np.lib.format.open_memmap(out / VECTORS_FILE, mode="w+", dtype=np.float16, shape=(len(entries), width))
    codes = None
    start = 0
    for file in files:
        with np.load(file) as part:
            stop = start + len(part["vectors"])
            vectors[start:stop] = part["vectors"]
            if "codes" in part:
                shape = (len(entries), part["codes"].shape[1])
                if codes is None:
                    codes = np.lib.format.open_memmap(
                        out / CODES_FILE, mode="w+", dtype=part["codes"].dtype, shape=shape
                    )
                codes[start:stop] = part["codes"]
        start = stop
    vectors.flush()
    if codes is not None:
        codes.flush()
    lines = [json.dumps({name: value for name, value in vars(one).items() if value}) for one in entries]
    replace_file(out / TEXTS_FILE, "".join(f"{line}\n" for line in lines).encode())
    replace_file(out / BANK_FILE, json.dumps(settings | {"width": width}, indent=2).encode())
    for file in files:
        file.unlink()
    (out / PARTS).rmdir()
