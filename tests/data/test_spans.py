"""CM3 objective: spans, streams and blocks equal those of metaseq's functions; draws have their statistics."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest

from magma_jax.data.documents.spans import (
    SpanConfig,
    clip_spans,
    cm3_block,
    draw_spans,
    move_spans,
    segments,
    split_streams,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures/golden/cm3leon/cm3_spans.json").read_text())
BREAK, EOSS = GOLDEN["break"], GOLDEN["eoss"]
SENTINELS = range(GOLDEN["first_sentinel"], GOLDEN["first_sentinel"] + 512)
IDS = {"brk": BREAK, "eoss": EOSS, "sentinels": SENTINELS}


@pytest.mark.parametrize("case", GOLDEN["boundaries"])
def test_segments_equal_the_authors(case):
    assert segments(np.array(case["tokens"]), BREAK) == [tuple(part) for part in case["segments"]]


@pytest.mark.parametrize("case", GOLDEN["given_spans"])
def test_clipped_spans_streams_and_blocks_equal_the_authors(case):
    tokens = np.array(case["tokens"], np.int32)
    spans = clip_spans([tuple(span) for span in case["raw_spans"]], segments(tokens, BREAK))
    assert spans == sorted(tuple(span) for span in case["clipped_spans"])
    kept, moved = split_streams(tokens, spans, SENTINELS, EOSS)
    assert (kept.tolist(), moved.tolist()) == (case["kept_stream"], case["moved_stream"])
    block = move_spans(tokens, spans, SENTINELS, EOSS, length=len(tokens))
    assert block.tolist() == case["block"]
    assert block.dtype == tokens.dtype


@pytest.mark.parametrize("rotation", GOLDEN["sampler_statistics"])
def test_draws_have_the_authors_statistics(rotation):
    case = GOLDEN["sampler_statistics"][rotation]
    parts, rng = [tuple(part) for part in case["segments"]], np.random.default_rng(0)
    counts, moved, whole = collections.Counter(), 0, 0
    for _ in range(case["draws"]):
        spans = draw_spans(case["length"], parts, rng, SpanConfig(rotation=float(rotation)), most=511)
        counts[len(spans)] += 1
        moved += sum(stop - start for start, stop in spans)
        whole += any(span in parts for span in spans)
    # The share of one of 20,000 draws has a standard error of at most 0.35 %, and so has the authors'.
    for count in range(8):
        expected = case["span_count_hist"].get(str(count), 0) / case["draws"]
        assert counts[count] / case["draws"] == pytest.approx(expected, abs=0.012)
    assert moved / case["draws"] == pytest.approx(case["mean_tokens_moved"], rel=0.03)
    assert whole / case["draws"] == pytest.approx(case["share_with_a_whole_segment"], abs=0.012)


def _document(rng, length):
    """Random tokens with breaks; every token but the special ones occurs once, so that it can be found again."""
    tokens = np.arange(1000, 1000 + length, dtype=np.int32)
    tokens[rng.integers(1, length, max(1, length // 12))] = BREAK
    return tokens


def restore(block, length):
    """Puts moved spans back; None if the cut took a sentinel away."""
    places = [place for place, token in enumerate(block) if token == SENTINELS[0]]
    first = places[-1] if places else len(block)
    kept, rest, spans = list(block[:first]), list(block[first:]), {}
    while rest:
        end = rest.index(EOSS)
        spans[rest[0]], rest = rest[1:end], rest[end + 1 :]
    if any(sentinel not in kept for sentinel in spans):
        return None
    # No break is ever moved.
    assert all(BREAK not in span for span in spans.values())
    return [token for place in kept for token in spans.get(place, [place])][:length]


@pytest.mark.parametrize("rotation", [0.0, 1.0])
def test_blocks_hold_their_tokens_and_breaks_stay(rotation):
    rng, untouched, restored = np.random.default_rng(1), 0, 0
    for _ in range(500):
        length = int(rng.integers(2, 80))
        tokens = _document(rng, length)
        room = length + int(rng.integers(0, 8))
        block = cm3_block(tokens, rng, SpanConfig(mean=2.0, rotation=rotation), length=room, **IDS)
        assert len(block) <= room
        assert len(block) >= length
        assert block[0] == tokens[0]
        spans = np.isin(block, SENTINELS)
        untouched += not spans.any()
        if spans.any():
            assert block[-1] == EOSS
        original = restore(block.tolist(), length)
        if original is not None:
            restored += 1
            assert original == tokens.tolist()[: len(original)]
    assert 0 < untouched < 400
    assert restored > 200


def test_no_span_fills_a_block():
    """Sentinel and end of a span that is all but the first token would not fit."""
    tokens, blocks = np.array([2, 11, 12, 13], np.int32), set()
    for seed in range(200):
        block = cm3_block(tokens, np.random.default_rng(seed), SpanConfig(mean=1.0), length=4, **IDS)
        assert len(block) == 4
        assert block[0] == 2
        blocks.add(tuple(block.tolist()))
    assert blocks == {(2, 11, 12, 13), *((2, 100, token, EOSS) for token in (11, 12, 13))}
    assert len(draw_spans(2, [(1, 2)], np.random.default_rng(0), SpanConfig(mean=100.0), most=3)) <= 1


def test_options_out_of_range_are_refused():
    for options, message in [
        ({"mean": -1.0}, "spans.mean must be 0 or more"),
        ({"rotation": 1.5}, "spans.rotation is a"),
    ]:
        with pytest.raises(ValueError, match=message):
            SpanConfig(**options)
