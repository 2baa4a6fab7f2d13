"""Constrained answers of the engine: always of their form, whoever the neighbours are, which notice nothing."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from flax import nnx

from magma_jax import Magma
from magma_jax.inference.batching import batch
from magma_jax.inference.batching.engine import Engine, EngineConfig
from magma_jax.inference.batching.requests import RequestOptions
from magma_jax.inference.buckets import Buckets
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.decode import _bits
from magma_jax.inference.pending import EngineError, UnfinishedError
from magma_jax.inference.structured import grammars
from magma_jax.inference.structured.constraints import Constraint, ConstraintError
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import split
from tests import tiny
from tests.compilations import count_compilations

# Room for a JSON text, and few sizes, so that few programs are compiled.
LM = dataclasses.replace(tiny.MODEL.lm, context_length=128)
CONFIG = dataclasses.replace(tiny.MODEL, lm=LM)
SIZES = EngineConfig(slots=4, context=128, images=1, steps=4)

PERSON = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["colour", "count", "words"],
}
SCHEMAS = [
    PERSON,
    {"type": "array", "items": {"type": ["boolean", "null"]}, "minItems": 2, "maxItems": 3},
    {"type": "object", "properties": {"a": {"type": "string", "pattern": "^[a-z]{2}$"}, "b": {"const": [1, "x"]}}},
    {"anyOf": [{"type": "integer", "minimum": -9, "maximum": 9}, {"type": "string", "format": "date"}]},
]
HOT = SamplingConfig(temperature=3.0)
# A row of the model that the vocabulary has no word for.
SECOND_END = LM.vocab_rows - 1
PROMPT = ["Q: What colour is it? A:"]


@pytest.fixture(scope="module")
def model():
    params = jax.device_put(split(MagmaModel(CONFIG, rngs=nnx.Rngs(0)))[1], jax.devices()[0])
    words = tiny.with_ends(tiny.dataset().tokenizer, SECOND_END)
    return Magma(CONFIG, {k: 4 * v if v.ndim > 1 else v for k, v in params.items()}, words)


@pytest.fixture(scope="module")
def engine(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "SEQUENCES", Buckets((32,)))  # fewer programs
        engine = Engine(model, SIZES)
    with engine:
        engine.warmup()
        yield engine


def ask(engine, constraint, count=90, sampling=HOT, seed=0, **options):
    return engine.submit(PROMPT, RequestOptions(count, sampling, seed, constraint=constraint, **options))


def test_nothing_is_compiled_for_constraints(engine):
    # First of all tests: another one would compile what the warm-up has left out.
    with count_compilations() as compiled:
        plain = engine.submit(["a red"], RequestOptions(30, HOT))
        for options in ({}, {"top_logprobs": 2}, {"sampling": SamplingConfig(0.5, 5, 0.9, 0.1, 1.2)}):
            ask(engine, Constraint.json_schema(PERSON), **options).text()
        plain.text()
    assert compiled.count == 0


@pytest.mark.parametrize("schema", SCHEMAS)
def test_random_weights_give_what_the_schema_says(engine, schema):
    grammar = engine.compile(Constraint.json_schema(schema))
    samplings = [SamplingConfig(), SamplingConfig(1.0, top_p=0.9), HOT, SamplingConfig(repetition_penalty=1.5)]
    tickets = [ask(engine, grammar, sampling=sampling, seed=seed) for seed in range(4) for sampling in samplings]
    for ticket in tickets:
        text = ticket.text()
        assert ticket.finish == "stop"
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


def test_neighbours_notice_nothing(engine):
    def plain(seed):
        return engine.submit(["a red"], RequestOptions(25, HOT, seed, top_logprobs=1))

    alone = [plain(seed) for seed in range(3)]
    answers = [(ticket.text(), ticket.pieces()) for ticket in alone]
    constrained = [ask(engine, Constraint.json_schema(PERSON), seed=seed) for seed in range(2)]
    expected = [ask(engine, Constraint.json_schema(PERSON), seed=seed).text() for seed in range(2)]
    mixed = [ask(engine, Constraint.json_schema(PERSON), seed=0), *(plain(seed) for seed in range(3))]
    mixed.append(ask(engine, Constraint.json_schema(PERSON), seed=1))
    assert [constrained[0].text(), constrained[1].text()] == expected
    assert [mixed[0].text(), mixed[-1].text()] == expected
    for ticket, (text, pieces) in zip(mixed[1:-1], answers, strict=True):
        assert ticket.text() == text
        for field in ("tokens", "logprobs", "top"):
            found, wanted = (
                [one for piece in some for one in getattr(piece, field)] for some in (ticket.pieces(), pieces)
            )
            if field == "tokens":
                assert found == wanted
            else:
                np.testing.assert_allclose(np.array(found).ravel(), np.array(wanted).ravel(), atol=1e-5)


def test_choices_and_expressions(engine):
    seen = set()
    for seed in range(12):
        ticket = ask(engine, Constraint.choice(["red", "dark green", "blue"]), seed=seed)
        seen.add(ticket.text())
        assert ticket.finish == "stop"
        number = ask(engine, Constraint.regex("[1-9][0-9]{0,2}( kg)?"), seed=seed)
        assert re.fullmatch("[1-9][0-9]{0,2}( kg)?", number.text())
    assert seen == {"red", "dark green", "blue"}


def test_either_end_of_text_ends_an_answer(engine, model, monkeypatch):
    drawn, ends = [], model.tokenizer.end_ids
    deliver = engine._deliver

    def recorded(slot, work, new):
        drawn.extend(new.tokens)
        return deliver(slot, work, new)

    monkeypatch.setattr(engine, "_deliver", recorded)
    for seed in range(12):
        ticket = ask(engine, Constraint.regex("(a|b)*"), seed=seed)
        assert set(ticket.text()) <= set("ab ")
        assert ticket.finish == "stop"
        assert not {*ends} & {*ticket.tokens}
    assert {*ends} <= {*drawn}


def test_a_space_is_drawn_and_not_shown(engine, model):
    spaced = [ask(engine, Constraint.choice(["red", "green"]), seed=seed) for seed in range(12)]
    texts = [(ticket.text(), model.tokenizer.decode(ticket.tokens)) for ticket in spaced]
    assert {shown for shown, _ in texts} == {"red", "green"}
    assert {sampled for _, sampled in texts} == {"red", "green", " red", " green"}
    assert {ask(engine, Constraint.choice([" red"]), seed=seed).text() for seed in range(3)} == {" red"}


def test_an_answer_that_is_cut_and_one_that_just_fits(engine):
    whole = ask(engine, Constraint.json_schema(PERSON))
    text, size = whole.text(), len(whole.tokens)
    exactly = ask(engine, Constraint.json_schema(PERSON), size)
    assert (exactly.text(), exactly.finish) == (text, "stop")
    cut = ask(engine, Constraint.json_schema(PERSON), size - 1)
    assert text.startswith(cut.text())
    assert cut.finish == "length"
    assert cut.text() != text


def test_stop_texts_least_tokens_and_pieces(engine):
    whole = ask(engine, Constraint.json_schema(PERSON))
    pieces = list(whole)
    assert len(pieces) == len(whole.tokens)
    assert sum(len(piece.logprobs) for piece in pieces) == len(whole.tokens)
    stopped = ask(engine, Constraint.json_schema(PERSON), stop=('"count"',))
    assert stopped.text() == whole.text().partition('"count"')[0]
    assert stopped.finish == "stop"
    # The end of text is not sampled early, where there is a choice; a text that is complete ends all the same.
    numbers = [ask(engine, Constraint.regex("[0-9]*"), seed=seed, min_new_tokens=8) for seed in range(6)]
    assert all(len(ticket.tokens) >= 8 and ticket.text().isdigit() for ticket in numbers if ticket.text())
    assert ask(engine, Constraint.choice(["red"]), min_new_tokens=20).text() == "red"


def test_what_cannot_be_kept_to_is_refused_or_fails_alone(engine, monkeypatch):
    with pytest.raises(ConstraintError, match="Invalid type"):
        ask(engine, Constraint.json_schema({"type": "colour"}))
    neighbour = engine.submit(["a red"], RequestOptions(25, HOT))
    advance = grammars.Guide.advance

    def broken(guide, tokens):
        if guide.marked:
            raise grammars.GuideError("too many states")
        advance(guide, tokens)

    monkeypatch.setattr(grammars.Guide, "advance", broken)
    monkeypatch.setattr(grammars.Guide, "marked", True, raising=False)
    failing = ask(engine, Constraint.choice(["red"]))
    with pytest.raises(UnfinishedError, match="too many states"):
        failing.text()
    monkeypatch.setattr(grammars.Guide, "marked", False, raising=False)
    assert neighbour.text() is not None
    assert ask(engine, Constraint.choice(["red"])).text() == "red"
    assert engine.stats()[:2] == (0, 0)


def test_bursts_have_one_step_while_an_answer_is_constrained_and_all_of_them_otherwise(engine, monkeypatch):
    steps = []
    decode = batch.slots.decode

    def counted(*arguments, **options):
        steps.append(options["steps"])
        return decode(*arguments, **options)

    monkeypatch.setattr(batch.slots, "decode", counted)
    engine.submit(["a red"], RequestOptions(9, HOT)).text()
    assert set(steps) == {SIZES.steps}
    steps.clear()
    ask(engine, Constraint.json_schema(PERSON)).text()
    assert set(steps) == {1}


def test_grammars_of_those_who_wait_count_as_what_they_hold(model):
    engine = Engine(model, dataclasses.replace(SIZES, queue_bytes=100))
    grammar = engine.compile(Constraint.json_object())
    grammar.nbytes = 60
    with engine.paused():
        engine.submit(PROMPT, RequestOptions(1, constraint=grammar))
        with pytest.raises(EngineError, match="all the room"):
            engine.submit(PROMPT, RequestOptions(1, constraint=grammar))
    engine.close(drain=True)


def test_without_the_library_nothing_is_compiled_for_it(model, monkeypatch):
    decoded = []
    decode = batch.SlotBatch.decode
    monkeypatch.setattr(batch, "SEQUENCES", Buckets((SIZES.context,)))
    monkeypatch.setattr(batch, "installed", lambda: False)
    monkeypatch.setattr(
        batch.SlotBatch, "decode", lambda self, **options: decoded.append(options) or decode(self, **options)
    )
    with Engine(model, SIZES) as engine:
        engine.warmup()
    assert [options["guides"] for options in decoded] == [None, None]


def test_bits_of_a_mask():
    words = np.random.default_rng(0).integers(0, 2**32, (3, 5), dtype=np.uint32)
    expected = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :133]
    np.testing.assert_array_equal(_bits(jnp.asarray(words), 133), expected)
