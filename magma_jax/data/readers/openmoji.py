"""The quick start's drawings as a reader, to try dataset folders without a download."""

import io
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from magma_jax.data.format.records import DataError, Question, Record, Sample
from magma_jax.data.openmoji import drawings as openmoji

SPLITS = ("train", "validation", "test")


def read_openmoji(
    source: Path,
    images: Path | None = None,
    *,
    kinds: str = "",
    size: int = 128,
    cache_dir: str = "~/.cache/magma_jax",
) -> Iterator[Record]:
    """OpenMoji drawings of a split, each with its caption and balanced questions, see ``data.openmoji.drawings``.

    Args:
        source: the split: ``train``, ``validation`` or ``test``.
        images: not used.
        kinds: kinds of questions, separated by commas; default: all.
        size: pixels per side.
        cache_dir: cache folder of rasterised drawings.
    """
    if source.name not in SPLITS:
        raise DataError(f"--from openmoji takes a split in place of a file: {', '.join(SPLITS)}, not {source}")
    drawings, pixels = openmoji.load(Path(cache_dir).expanduser(), size)
    chosen = [drawing for drawing in drawings if drawing.split == source.name]
    asked: dict[int, list[Sample]] = defaultdict(list)
    for sample in openmoji.questions(chosen, kinds=[kind.strip() for kind in kinds.split(",") if kind.strip()]):
        asked[sample.image].append(sample)
    for drawing in chosen:
        file = io.BytesIO()
        Image.fromarray(pixels[drawing.index]).save(file, "PNG")
        questions = tuple(
            Question(
                f"{drawing.codepoints}/{sample.kind}",
                sample.prompt.removeprefix("Q: ").removesuffix(" A:"),
                (sample.answer.strip(),),
                {"kind": sample.kind},
            )
            for sample in asked[drawing.index]
        )
        yield Record(drawing.codepoints, file.getvalue(), (drawing.caption,), questions, {"name": drawing.name})
