"""Constraints without a model: what they allow, how they are split into tokens, and what hostile ones cost."""

import json
import random
import re
import time

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from magma_jax.data.tokenizers.byte_level import Tokenizer, gpt2_tokenizer, train_bpe
from magma_jax.inference.structured import grammars as grammars_module
from magma_jax.inference.structured.constraints import MAX_LENGTH, Constraint, ConstraintError
from magma_jax.inference.structured.grammars import Grammars, GuideError
from tests.hostile_schemas import SCHEMAS as SCHEMAS_OF_HARM

TOKENIZER = train_bpe(["a red square, a green circle", '{"colour": "red", "size": 10}'], 300)


@pytest.fixture(scope="module")
def grammars():
    made = Grammars(TOKENIZER, table_rows=len(TOKENIZER), ids=len(TOKENIZER) + 13)
    yield made
    made.close()


def bits(guide):
    return np.flatnonzero(np.unpackbits(guide.mask.view(np.uint8), bitorder="little"))


def accepts(grammar, text):
    """Whether a text, split in the tokenizer's way, is a whole answer."""
    guide = grammar.start()
    for token in TOKENIZER.encode(text):
        if token not in bits(guide) and guide.complete:
            return False
        try:
            guide.advance([token])
        except GuideError:
            return False
    return guide.complete or TOKENIZER.eos_id in bits(guide)


def sampled(grammar, seed, limit=400):
    """A random answer as it is shown; None if it has not ended within ``limit`` tokens."""
    chance, guide, tokens = random.Random(seed), grammar.start(), []
    while not guide.complete and len(tokens) < limit:
        token = chance.choice(bits(guide).tolist())
        if token == TOKENIZER.eos_id:
            break
        tokens.append(token)
        guide.advance([token])
    else:
        if not guide.complete:
            return None
    return guide.shown(TOKENIZER.decode(tokens))


SCHEMAS = {
    "object": {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "gr\u00fcn", 'a "quoted" one']},
            "size": {"type": "integer", "minimum": -5, "maximum": 120},
            "sure": {"type": "boolean"},
            "share": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        },
        "required": ["colour", "size", "sure", "share"],
    },
    "arrays": {"type": "array", "minItems": 1, "maxItems": 4, "items": {"type": "string", "maxLength": 6}},
    "optional keys": {
        "type": "object",
        "properties": {name: {"type": "string", "pattern": "^[a-c]{1,3}$"} for name in "xyz"},
    },
    "references": {
        "$defs": {"node": {"type": "object", "properties": {"v": {"type": "null"}, "next": {"$ref": "#/$defs/node"}}}},
        "$ref": "#/$defs/node",
    },
    "unions": {
        "anyOf": [
            {"type": "object", "properties": {"kind": {"const": "a"}, "n": {"type": "integer"}}, "required": ["kind"]},
            {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"]},
            {"type": "string", "format": "date"},
        ]
    },
    "intersection": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ],
    },
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_answers_match_the_schema(grammars, name):
    grammar, ended = grammars.compile(Constraint.json_schema(SCHEMAS[name])), 0
    for seed in range(60):
        text = sampled(grammar, seed)
        if text is not None:
            ended += 1
            jsonschema.validate(json.loads(text), SCHEMAS[name])
            assert "\n" not in text
    assert ended > 10


def test_names_that_the_schema_does_not_give_are_not_made_up(grammars):
    described = {"type": "object", "properties": {"a": {"type": "integer"}}}
    cases = [
        (described, False),
        ({**described, "additionalProperties": True}, True),
        ({**described, "additionalProperties": {"type": "integer"}}, True),
        ({**described, "required": ["b"]}, True),
        ({**described, "required": ["a"], "minProperties": 2}, True),
        ({"properties": {"properties": described}, "$defs": {"allOf": {}}}, None),
        ({"$defs": {"x": described}, "allOf": [{"$ref": "#/$defs/x"}]}, True),
        ({"$defs": {"x": described}, "$ref": "#/$defs/x", "required": ["b"]}, True),
        ({"$defs": {"x": described}, "$ref": "#/$defs/x", "description": "x"}, False),
    ]
    for schema, taken in cases:
        grammar = grammars.compile(Constraint.json_schema(schema))
        if taken is not None:
            assert accepts(grammar, '{"a": 1, "b": 2}') is taken, schema
        else:
            assert accepts(grammar, '{"properties": {"a": 1}}')
            assert not accepts(grammar, '{"properties": {"a": 1, "b": 2}}')


def test_a_space_before_the_answer_is_allowed_and_not_shown(grammars):
    for constraint, text in (
        (Constraint.choice(["red", "green"]), "red"),
        (Constraint.regex("[a-z]{3}|x"), "red"),
        (Constraint.json_object(), '{"a": 1}'),
    ):
        grammar = grammars.compile(constraint)
        assert accepts(grammar, text)
        assert accepts(grammar, f" {text}")
        assert not accepts(grammar, f"  {text}")
        assert grammar.start().shown(f" {text}") == text
    for constraint in (Constraint.choice([" red", "green"]), Constraint.regex(" ?red")):
        grammar = grammars.compile(constraint)
        assert accepts(grammar, " red")
        assert grammar.start().shown(" red") == " red"
    guide = grammars.compile(Constraint.choice(["a b"])).start()
    assert [guide.shown(piece) for piece in ("", " a", " b")] == ["", "a", " b"]


ODD = [
    'say "red"',
    "back\\slash",
    "line\nbreak",
    "/slash/",
    "# hash",
    "\u00e9\U0001f600",
    "\x00\x7f",
    "\u2028",
    "<|endoftext|>",
]


def test_choices_are_taken_as_they_stand(grammars):
    grammar = grammars.compile(Constraint.choice([*ODD, *ODD]))
    for text in ODD:
        assert accepts(grammar, text)
        assert not accepts(grammar, text + "x")
    assert {sampled(grammar, seed) for seed in range(200)} == set(ODD)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("[0-9]{3}", "123"),
        ("^(yes|no)$", "no"),
        ("(?i)red", "rEd"),
        (r"a/b\\c", "a/b\\c"),
        ("a\nb", "a\nb"),
        (r"\p{L}+", "\u00e9"),
        ("", ""),
    ],
)
def test_expressions_match_the_whole_answer(grammars, pattern, text):
    grammar = grammars.compile(Constraint.regex(pattern))
    assert accepts(grammar, text)
    assert not accepts(grammar, text + "!")
    for seed in range(20):
        answer = sampled(grammar, seed)
        assert answer is None or pattern.startswith((r"\p", "(?i)")) or re.fullmatch(pattern, answer)


def test_what_must_come_is_split_as_the_tokenizer_splits_it(grammars):
    text = "a red square, a green circle" * 40
    guide, tokens = grammars.compile(Constraint.json_schema({"const": text})).start(), []
    while not guide.complete:
        token = bits(guide)[-1 if not tokens else 0]  # a quote after a space, or without
        tokens.append(int(token))
        guide.advance([token])
    assert json.loads(TOKENIZER.decode(tokens)) == text
    assert len(tokens) < len(TOKENIZER.encode(text)) * 1.1


@pytest.mark.parametrize("name", SCHEMAS_OF_HARM)
def test_hostile_schemas_are_refused_in_one_line_and_bounded_time(grammars, name):
    schema, says = SCHEMAS_OF_HARM[name]
    started = time.process_time()
    with pytest.raises(ConstraintError) as refused:
        grammars.compile(Constraint.json_schema(schema))
    # In this process: the trial in the other one has ended before anything was compiled here.
    assert time.process_time() - started < 1
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
    assert accepts(grammars.compile(Constraint.choice(["red"])), "red")


@pytest.mark.parametrize("pattern", ["(a", "(?=a)b", r"(a)\1", r"\bred\b", "(" * 1000 + "a" + ")" * 1000, r"[^\s\S]"])
def test_expressions_that_cannot_be_kept_to(grammars, pattern):
    with pytest.raises(ConstraintError) as refused:
        grammars.compile(Constraint.regex(pattern))
    assert "\n" not in str(refused.value)


def test_grammars_that_grow_while_they_are_used_end_the_answer(grammars):
    grammar = grammars.compile(Constraint.regex("(.|b)*a(.|b){500}c"))
    assert grammar.nbytes < 100 * 2**20
    outcomes = []
    for seed in range(4):
        try:
            outcomes.append(sampled(grammar, seed, limit=3000))
        except GuideError as error:
            outcomes.append(str(error))
    assert any(outcome and "under its constraint (lexer error: too many" in outcome for outcome in outcomes)
    assert all("\n" not in outcome for outcome in outcomes if outcome and outcome.startswith("the answer"))


@pytest.mark.parametrize(
    ("make", "value", "says"),
    [
        (Constraint.json_schema, "x" * (MAX_LENGTH + 1), "65537 characters, at most 65536"),
        (Constraint.json_schema, {"enum": ["x" * MAX_LENGTH]}, "at most 65536 are taken"),
        (Constraint.choice, ["x" * 100] * 3 + [str(i) * 9 for i in range(9999)], "at most 65536"),
        (Constraint.regex, "a" * MAX_LENGTH + "b", "at most 65536"),
        (Constraint.json_schema, "{", "is no JSON"),
        (Constraint.json_schema, "[" * 50_000, "is no JSON"),
        (Constraint.json_schema, [1], r"a schema is an object, not \[1\]"),
        (Constraint.json_schema, "3", "a schema is an object, not 3"),
        (Constraint.json_schema, {"const": float("nan")}, "no JSON"),
        (Constraint.choice, [], "none of them empty"),
        (Constraint.choice, ["a", ""], "none of them empty"),
        (Constraint.choice, "red", "give a list"),
    ],
)
def test_what_is_no_constraint(make, value, says):
    with pytest.raises(ConstraintError, match=says):
        make(value)


def test_a_trial_that_dies_says_nothing_about_its_grammar(grammars):
    assert accepts(grammars.compile(Constraint.choice(["one"])), "one")
    grammars.trial.process.kill()
    grammars.trial.process.wait()
    assert accepts(grammars.compile(Constraint.choice(["two"])), "two")
    process = grammars.trial.process
    grammars.close()
    assert process.poll() is not None
    assert accepts(grammars.compile(Constraint.choice(["two"])), "two")  # remembered: no process is needed
    assert grammars.trial.process is None


def test_without_the_library_or_bytes(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(grammars_module, "installed", lambda: False)
        with pytest.raises(ConstraintError, match="pip install llguidance"):
            Grammars(TOKENIZER, table_rows=300, ids=300).compile(Constraint.json_object())
    words = Tokenizer(Backend(models.WordLevel({"red": 0, "\u0120red": 1, "<|endoftext|>": 2}, unk_token="red")))
    with pytest.raises(ConstraintError, match="does not spell bytes"):
        Grammars(words, table_rows=len(words), ids=len(words)).compile(Constraint.json_object())


def test_special_tokens_are_no_text():
    backend = Backend.from_str(gpt2_tokenizer().to_json())
    backend.add_special_tokens(["<|padding|>"])
    backend.add_tokens(["   "])
    tokenizer = Tokenizer(backend)
    padding, spaces = backend.token_to_id("<|padding|>"), backend.token_to_id("   ")
    assert tokenizer.special_ids == {tokenizer.eos_id, tokenizer.image_id, padding}
    assert (tokenizer.token_bytes(padding), tokenizer.token_bytes(spaces)) == (b"", b"   ")
    assert tokenizer.decode([padding]) == ""
    grammars = Grammars(tokenizer, table_rows=len(tokenizer), ids=len(tokenizer))
    allowed = bits(grammars.compile(Constraint.regex(r"(.|\n)*")).start()).tolist()
    grammars.close()
    assert spaces in allowed
    assert tokenizer.eos_id in allowed
    assert not {padding, tokenizer.image_id} & set(allowed)
