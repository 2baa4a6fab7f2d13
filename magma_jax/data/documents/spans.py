"""The CM3 objective (Aghajanyan et al. 2022): spans of a block are moved to its end, behind sentinels.

A model that predicts the next token of such blocks learns to fill a gap from both sides, and therefore to caption: the
moved span may be the text before an image.

    <eos> a red cat <break> 7 3 3 9 <eos>      the text "red cat" is moved
    <eos> a <sentinel:0> <break> 7 <sentinel:0> red cat <eoss>

All functions work on one block, on the host. The rules are those of metaseq's CM3 branches, by the authors of RA-CM3
and CM3Leon, with two differences: spans are never empty, and never fill a block so far that nothing else remains.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from magma_jax.typing import Int

# Start and stop of consecutive tokens.
Span: TypeAlias = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanConfig:
    """How spans are drawn.

    Attributes:
        mean: mean of the Poisson distribution of the number of spans; at 1, 37 % of the blocks have none.
        rotation: probability that a block's spans are whole segments, that is complete texts and images, instead of
            random parts.
    """

    mean: float = 1.0
    rotation: float = 0.0

    def __post_init__(self):
        if not self.mean >= 0:
            raise ValueError(f"data.spans.mean must be 0 or more, got {self.mean}")
        if not 0 <= self.rotation <= 1:
            raise ValueError(f"data.spans.rotation is a probability between 0 and 1, got {self.rotation}")


def segments(tokens: Int[np.ndarray, " S"], brk: int) -> list[Span]:
    """Texts and images of a block: the runs between ``brk`` tokens, without the block's first token.

    Ends of documents do not separate: the last segment of one and the first of the next are one.
    """
    breaks = [int(place) for place in np.flatnonzero(tokens[1:] == brk) + 1]
    return list(zip([1, *(place + 1 for place in breaks)], [*breaks, len(tokens)], strict=True))


def draw_spans(
    length: int, parts: Sequence[Span], rng: np.random.Generator, config: SpanConfig, *, most: int
) -> list[Span]:
    """Draws disjoint, non-empty spans of a block of ``length`` tokens whose segments are ``parts``.

    A number k of spans is drawn first. k = 1: a uniform span. k > 1: k^2 uniform spans, of which each is kept that
    meets none kept before, up to k. With ``config.rotation``, k different segments, if there are more than k.

    Args:
        most: largest number of spans, the number of sentinels.
    """
    count = min(int(rng.poisson(config.mean)), most)
    if count == 0:
        return []
    whole = [part for part in parts if part[0] < part[1]]
    if config.rotation and rng.random() < config.rotation and count < len(whole):
        return [whole[i] for i in rng.choice(len(whole), count, replace=False)]
    kept: list[Span] = []
    for low, high in np.sort(rng.random((count * count if count > 1 else 1, 2)), axis=1):
        start, stop = max(1, int(low * length)), int(high * length + 0.5)
        if start < stop and all(stop <= other[0] or start >= other[1] for other in kept):
            kept.append((start, stop))
        if len(kept) == count:
            break
    return kept


def clip_spans(spans: Sequence[Span], parts: Sequence[Span]) -> list[Span]:
    """Clips every span to the segment that it overlaps most, the first of equals; ``brk`` tokens are never moved.

    Spans that overlap none are left out. Returns them by start.
    """
    clipped = []
    for start, stop in spans:
        overlaps = [(max(start, first), min(stop, last)) for first, last in parts]
        best = max(overlaps, key=lambda span: span[1] - span[0], default=(0, 0))
        if best[0] < best[1]:
            clipped.append(best)
    return sorted(clipped)


def split_streams(
    tokens: Int[np.ndarray, " S"], spans: Sequence[Span], sentinels: Sequence[int], eoss: int
) -> tuple[Int[np.ndarray, " K"], Int[np.ndarray, " M"]]:
    """The kept tokens with a sentinel in place of each span, and ``sentinel, span, eoss`` of each span in turn.

    Args:
        spans: disjoint, by start; span i has sentinel i.
        sentinels: ids of the sentinels.
        eoss: id of the end of a moved span.
    """
    kept, moved, end = [], [tokens[:0]], 0
    for (start, stop), sentinel in zip(spans, sentinels, strict=False):
        kept += [tokens[end:start], [sentinel]]
        moved += [[sentinel], tokens[start:stop], [eoss]]
        end = stop
    kept.append(tokens[end:])
    return np.concatenate(kept).astype(tokens.dtype), np.concatenate(moved).astype(tokens.dtype)


def move_spans(
    tokens: Int[np.ndarray, " S"], spans: Sequence[Span], sentinels: Sequence[int], eoss: int, *, length: int
) -> Int[np.ndarray, " T"]:
    """The kept stream, then the moved one. Every span adds three tokens, of which ``length`` leaves none too many: the
    excess is cut from the end of the kept stream, so that moved spans are always complete.
    """
    kept, moved = split_streams(tokens, spans, sentinels, eoss)
    return np.concatenate([kept[: max(length - len(moved), 0)], moved])


def cm3_block(
    tokens: Int[np.ndarray, " S"],
    rng: np.random.Generator,
    config: SpanConfig,
    *,
    brk: int,
    eoss: int,
    sentinels: Sequence[int],
    length: int,
) -> Int[np.ndarray, " T"]:
    """Draws spans and moves them to the end.

    The result has at least as many tokens as ``tokens`` and at most ``length``.

    Args:
        tokens: a block without its padding.
    """
    parts = segments(tokens, brk)
    spans = clip_spans(draw_spans(len(tokens), parts, rng, config, most=len(sentinels)), parts)
    # At least the first token is kept.
    while spans and 1 + sum(stop - start + 2 for start, stop in spans) > length:
        spans.pop()
    return move_spans(tokens, spans, sentinels, eoss, length=length)
