"""Prompts as ids: documents with gaps, and the streams of guidance.

text to image     <eos> text <break>                               then the codes
image to text     <eos> <sentinel:0> <break> codes <eos> <sentinel:0>   then the text, up to <eoss>
edit              <eos> template <break> codes <break> instruction <break>   then the codes
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from magma_jax.data.documents.beside import caption_rows
from magma_jax.data.documents.places import image_places
from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.models.cm3leon import CM3LeonConfig
from magma_jax.typing import Int

# Template of InstructPix2Pix (table 5).
EDIT = "Edit first image following the instruction"


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """Codes of an image; those of ``hidden`` places (T,) are a gap, None for none."""

    codes: Int[np.ndarray, " T"]
    hidden: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Gap:
    """What is missing: a text, or a whole image."""

    kind: Literal["text", "image"] = "text"


# A part of a document: tokens of a text, codes of an image, or a gap. Neighbouring texts and text gaps are one text.
Segment: TypeAlias = Int[np.ndarray, " S"] | Codes | Gap


@dataclasses.dataclass(frozen=True)
class Missing:
    """A gap of a laid out prompt.

    Attributes:
        kind: text, or image codes.
        count: number of codes; None for a text, whose length is open.
        segment: index of the segment with the gap.
        places: of codes within their image; empty for a text.
    """

    kind: Literal["text", "image"]
    count: int | None
    segment: int
    places: range = range(0)


@dataclasses.dataclass(frozen=True)
class Infilling:
    """A document with a sentinel in place of every gap; ids, and the gaps in order."""

    ids: Int[np.ndarray, " S"]
    gaps: tuple[Missing, ...]


def lay_out_gaps(segments: Sequence[Segment], layout: VocabLayout, image_tokens: int) -> Infilling:
    """The ids of a document with gaps, from ``<eos>`` to ``<eos>``; neighbouring segments are parted by ``<break>``.

    Raises:
        ValueError: no gap, more gaps than sentinels, or an image of another number of codes.
    """
    pieces: list[Sequence[int]] = [[layout.eos]]
    gaps: list[Missing] = []
    in_text = False
    for number, segment in enumerate(segments):
        is_text = isinstance(segment, np.ndarray) or segment == Gap("text")
        if number and not (is_text and in_text):
            pieces.append([layout.brk])
        in_text = is_text
        if isinstance(segment, np.ndarray):
            pieces.append(layout.from_text(segment).tolist())
        elif isinstance(segment, Gap):
            places = range(0) if segment.kind == "text" else range(image_tokens)
            pieces.append([layout.sentinel(len(gaps))])
            gaps.append(Missing(segment.kind, len(places) or None, number, places))
        else:
            check_codes(segment.codes, image_tokens)
            ids, end = layout.from_codes(segment.codes), 0
            for places in _runs(segment.hidden):
                pieces += [ids[end : places.start].tolist(), [layout.sentinel(len(gaps))]]
                gaps.append(Missing("image", len(places), number, places))
                end = places.stop
            pieces.append(ids[end:].tolist())
    if not gaps:
        raise ValueError("the prompt has no gap to fill in")
    pieces.append([layout.eos])
    return Infilling(np.array([one for piece in pieces for one in piece], np.int32), tuple(gaps))


class Beside(NamedTuple):
    """What a model reads beside a prompt's tokens: the places (S,) of codes in their grids, -1 for other tokens, and
    retrieved images, see ``models.references``: their codes (K, T) and the captions (K + 1, L); none for K = 0."""

    codes: Int[np.ndarray, "K T"]
    captions: Int[np.ndarray, "K1 L"]
    places: Int[np.ndarray, " S"]


def beside(
    ids: Int[np.ndarray, " S"],
    pairs: Sequence[Sequence[Segment]],
    config: CM3LeonConfig,
    decode: Callable[[list[int]], str],
    gaps: Sequence[Missing] = (),
) -> Beside | None:
    """What stands beside a prompt that begins with ``document_prefix``; None for a model that reads tokens alone.

    Raises:
        ValueError: more retrieved images than the model takes.
    """
    if config.references is None and not config.grid_positions:
        return None
    layout = config.vocabulary
    sizes = {layout.sentinel(number): len(gap.places) for number, gap in enumerate(gaps)}
    places = image_places(ids, layout, sizes)
    if config.references is None:
        nothing = np.zeros((0, config.image_tokens), np.int32), np.zeros((1, 0), np.int32)
        return Beside(*nothing, places)
    images = config.references.images
    if len(pairs) > images:
        raise ValueError(f"this model takes {images} retrieved documents, got {len(pairs)}")
    start = len(document_prefix(pairs, layout, config.image_tokens, beside=True))
    codes = np.full((images, config.image_tokens), layout.pad, np.int32)
    captions = []
    for row, pair in enumerate(pairs):
        words, image = pair
        if not isinstance(image, Codes) or not isinstance(words, np.ndarray):
            raise ValueError("a retrieved document is a text and its image")
        codes[row] = _segment_ids(image, layout, config.image_tokens)
        captions.append(decode(words.tolist()))
    kept = ids[start : _moved_from(ids, layout)]
    own = decode(layout.to_text(kept[layout.is_text(kept)]).tolist())
    rows = caption_rows([own, *captions], images, config.references.caption_words, config.references.word_rows)
    return Beside(codes, rows, places)


def _moved_from(ids: Int[np.ndarray, " S"], layout: VocabLayout) -> int:
    """Where the contents of the first gap begin: at the first sentinel that is repeated."""
    seen = set()
    for place, one in enumerate(ids.tolist()):
        if one in seen:
            return place
        if one in layout.sentinel_ids:
            seen.add(one)
    return len(ids)


def document_prefix(
    pairs: Sequence[Sequence[Segment]], layout: VocabLayout, image_tokens: int, *, beside: bool = False
) -> list[int]:
    """``<eos>``, and every part of retrieved documents with the ``<break>`` after it; without images ``beside`` it."""
    ids = [layout.eos]
    for part in (part for pair in pairs for part in pair if not (beside and isinstance(part, Codes))):
        ids += [*_segment_ids(part, layout, image_tokens), layout.brk]
    return ids


def drawing_streams(
    text: Int[np.ndarray, " S"],
    pairs: Sequence[Sequence[Segment]],
    layout: VocabLayout,
    image_tokens: int,
    *,
    null: Literal["sentinel", "documents"],
    beside: bool = False,
) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " T"]]:
    """The prompt of a drawing with its text, and without it; ``null`` as in ``options``.

    Documents with images ``beside`` the prompt stay in the one without its text.
    """
    prefix = document_prefix(pairs, layout, image_tokens, beside=beside)
    with_text = [*prefix, *layout.from_text(text).tolist(), layout.brk]
    without = prefix if null == "documents" else [layout.eos, layout.sentinel(0), layout.brk]
    if beside:
        without = [*prefix, layout.sentinel(0), layout.brk]
    return np.array(with_text, np.int32), np.array(without, np.int32)


def edit_streams(
    template: Int[np.ndarray, " S"],
    image: Int[np.ndarray, " T"],
    instruction: Int[np.ndarray, " I"],
    layout: VocabLayout,
    image_tokens: int,
) -> tuple[Int[np.ndarray, " A"], Int[np.ndarray, " B"], Int[np.ndarray, " C"]]:
    """The prompt of an edit with image and instruction, with the image alone, and with neither."""
    check_codes(image, image_tokens)
    first = [layout.eos, *layout.from_text(template).tolist(), layout.brk]
    codes, words = layout.from_codes(image).tolist(), layout.from_text(instruction).tolist()
    missing = [layout.sentinel(0)], [layout.sentinel(1)]
    both = [*first, *codes, layout.brk, *words, layout.brk]
    alone = [*first, *codes, layout.brk, *missing[0], layout.brk]
    neither = [*first, *missing[0], layout.brk, *missing[1], layout.brk]
    return np.array(both, np.int32), np.array(alone, np.int32), np.array(neither, np.int32)


def edit_streams_beside(
    instruction: Int[np.ndarray, " I"], pairs: Sequence[Sequence[Segment]], layout: VocabLayout, image_tokens: int
) -> tuple[Int[np.ndarray, " A"], Int[np.ndarray, " B"], Int[np.ndarray, " C"]]:
    """As ``edit_streams``, with the image beside the prompts: that of the first pair, whose text is the template."""
    first = document_prefix(pairs, layout, image_tokens, beside=True)
    both = [*first, *layout.from_text(instruction).tolist(), layout.brk]
    alone = [*first, layout.sentinel(0), layout.brk]
    neither = [layout.eos, layout.sentinel(0), layout.brk]
    return np.array(both, np.int32), np.array(alone, np.int32), np.array(neither, np.int32)


def check_codes(codes: Int[np.ndarray, " T"], image_tokens: int) -> None:
    """Raises ValueError for another number of codes than the grid has."""
    if len(codes) != image_tokens:
        raise ValueError(f"an image has {len(codes)} codes, not the {image_tokens} of the tokenizer's grid")


def check_sentinels(ids: Int[np.ndarray, " S"], layout: VocabLayout) -> None:
    """Raises ValueError unless every sentinel of a prompt marks one gap and is then asked for in order.

    The first occurrence of a sentinel marks a gap, the second begins its contents, which ``<eoss>`` ends.
    """
    found = [int(one) - layout.sentinel_ids.start for one in ids if int(one) in layout.sentinel_ids]
    gaps = list(dict.fromkeys(found))
    filled = found[len(gaps) :]
    if gaps != list(range(len(gaps))) or found[: len(gaps)] != gaps or filled != gaps[: len(filled)]:
        names = ", ".join(f"<sentinel:{one}>" for one in found)
        raise ValueError(
            f"the prompt's sentinels are not balanced ({names}): each marks one gap, in order from 0, and may then be "
            "repeated in that order, with what belongs there"
        )
    ends = int(np.sum(ids == layout.eoss))
    if ends not in (len(filled), len(filled) - 1) and filled:
        raise ValueError(f"the prompt fills {len(filled)} gaps, but has {ends} <eoss>; one ends each of them")


def _segment_ids(segment: Segment, layout: VocabLayout, image_tokens: int) -> list[int]:
    if isinstance(segment, Gap):
        raise ValueError("a retrieved document has no gaps")
    if isinstance(segment, Codes):
        check_codes(segment.codes, image_tokens)
        return layout.from_codes(segment.codes).tolist()
    return layout.from_text(segment).tolist()


def _runs(hidden: np.ndarray | None) -> list[range]:
    """Runs of true values."""
    if hidden is None:
        return []
    edges = np.flatnonzero(np.diff(np.concatenate([[0], hidden.astype(np.int8), [0]])))
    return [range(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
