"""One table, both directions, and every way in which names and tensors can fail to fit."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from magma_jax.published.keymap.engine import Alias, Ignored, KeyMapError, Rule, check_table, to_ours, to_theirs
from magma_jax.storage.deferred import Deferred

# A small language model, a residual network whose first block is apart, and what the published layout repeats.
TABLE = [
    Rule("lm.wte.weight", "lm/wte/weight"),
    Rule("lm.h.{layer}.ln.weight", "lm/layers/ln/weight", stack="layer"),
    Rule("lm.h.{layer}.scale", "lm/layers/scale", stack="layer", to_ours=np.squeeze, to_theirs=np.atleast_1d),
    Rule("enc.{stage}.0.conv{i}.weight", "enc/{stage}/first/conv{i}/weight"),
    Rule("enc.{stage}.{block}.conv{i}.weight", "enc/{stage}/rest/conv{i}/weight", stack="block", start=1),
    Rule("enc.proj", "enc/proj", to_ours=np.transpose, to_theirs=np.transpose),
    Rule("head.{rest...}", "head/{rest...}"),
    Rule("steps", "steps"),
    Ignored("lm.h.{layer}.mask", lambda layer: np.full((1, 2), layer, bool), beside="lm.h.{layer}.ln.weight"),
    Ignored("lm.rotary"),
    Alias("word_embedding.weight", "lm.wte.weight"),
    Alias("transformer.{layer}.{rest...}", "lm.h.{layer}.{rest...}"),
]


def array(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def their_tensors():
    tensors = {
        "lm.wte.weight": array(5, 4),
        "enc.2.0.conv1.weight": array(3, 3, seed=1),
        "enc.2.1.conv1.weight": array(3, 3, seed=2),
        "enc.2.2.conv1.weight": array(3, 3, seed=3),
        "enc.proj": array(2, 3, seed=4),
        "head.ln.bias": array(4, seed=5),
        "steps": np.array(7),
    }
    for layer in range(12):  # more than 10, so that text order is not number order
        tensors[f"lm.h.{layer}.ln.weight"] = array(4, seed=10 + layer)
        tensors[f"lm.h.{layer}.scale"] = array(1, seed=30 + layer)
        tensors[f"lm.h.{layer}.mask"] = np.full((1, 2), layer, bool)
        for name in ("ln.weight", "scale", "mask"):
            tensors[f"transformer.{layer}.{name}"] = tensors[f"lm.h.{layer}.{name}"]
    return tensors | {"word_embedding.weight": tensors["lm.wte.weight"]}


def struct(*shape, dtype=np.float32):
    return SimpleNamespace(shape=shape, dtype=np.dtype(dtype))


TARGET = {
    "lm/wte/weight": struct(5, 4),
    "lm/layers/ln/weight": struct(12, 4),
    "lm/layers/scale": struct(12),
    "enc/2/first/conv1/weight": struct(3, 3),
    "enc/2/rest/conv1/weight": struct(2, 3, 3),
    "enc/proj": struct(3, 2),
    "head/ln/bias": struct(4),
    "steps": struct(dtype=np.int32),
}


def fails(lines, foreign=None, target=TARGET, table=TABLE, **options):
    """All the lines are in one error; ``foreign`` replaces tensors, None removes one."""
    tensors = {key: tensor for key, tensor in (their_tensors() | (foreign or {})).items() if tensor is not None}
    with pytest.raises(KeyMapError) as error:
        to_ours(table, tensors, target, **options)
    for line in lines:
        assert line in str(error.value)
    assert str(error.value).count("\n  ") == len(lines), str(error.value)


def test_both_directions():
    check_table(TABLE)
    theirs = their_tensors()
    ours = {path: tensor.read() for path, tensor in to_ours(TABLE, theirs, TARGET).items()}
    assert {path: (value.shape, value.dtype) for path, value in ours.items()} == {
        path: (value.shape, value.dtype) for path, value in TARGET.items()
    }
    np.testing.assert_array_equal(ours["lm/layers/ln/weight"][11], theirs["lm.h.11.ln.weight"])
    np.testing.assert_array_equal(ours["lm/layers/scale"][3], theirs["lm.h.3.scale"][0])
    np.testing.assert_array_equal(ours["enc/2/rest/conv1/weight"][0], theirs["enc.2.1.conv1.weight"])
    np.testing.assert_array_equal(ours["enc/proj"], theirs["enc.proj"].T)

    back = to_theirs(TABLE, ours)
    assert set(back) == set(theirs)
    for key, tensor in back.items():
        written = tensor.read()
        assert (written.shape, written.dtype) == (tensor.shape, tensor.dtype) == (theirs[key].shape, theirs[key].dtype)
        assert written.tobytes() == theirs[key].tobytes(), key
    assert back["word_embedding.weight"] is back["lm.wte.weight"]
    assert back["transformer.3.mask"] is back["lm.h.3.mask"]


def test_nothing_is_read_while_planning():
    def fail():
        raise AssertionError("read too early")

    aliased = ("transformer", "word_embedding")
    tensors = {
        key: Deferred(tensor.shape, tensor.dtype, fail)
        for key, tensor in their_tensors().items()
        if not key.startswith(aliased)
    }
    tensors["word_embedding.weight"] = tensors["lm.wte.weight"]
    planned = to_ours(TABLE, tensors, TARGET)
    written = to_theirs(TABLE, planned)
    assert written["lm.h.2.ln.weight"].shape == (4,)
    with pytest.raises(AssertionError, match="too early"):
        written["lm.h.2.ln.weight"].read()


def test_ignored_keys_may_be_absent_or_present():
    tensors = {key: tensor for key, tensor in their_tensors().items() if "mask" not in key}
    to_ours(TABLE, tensors | {"lm.rotary": np.ones(3)}, TARGET)


def test_lists_everything_at_once():
    fails(
        [
            "\n  lm.unheard.of  float32[2]",
            "\n  lm/wte/weight  float32[5,4]  <- lm.wte.weight",
            "\n  enc.proj  float32[9,9]  -> enc/proj  [3, 2]",
            "\n  enc/2/rest/conv1/weight  enc.{stage}.{block}.conv{i}.weight  2 from 1 on are needed, missing [1]",
            "\n  head.new.bias  float32[1]  -> head/new/bias",
        ],
        {
            "lm.unheard.of": array(2),
            "lm.wte.weight": None,
            "word_embedding.weight": None,
            "enc.proj": array(9, 9),
            "enc.2.1.conv1.weight": None,
            "head.new.bias": array(1),
        },
    )


def test_wrong_number_of_layers():
    fails(
        ["too many [10, 11]", "too many [10, 11]"],
        target=TARGET | {"lm/layers/ln/weight": struct(10, 4), "lm/layers/scale": struct(10)},
    )
    fails(["missing [12]"], target=TARGET | {"lm/layers/ln/weight": struct(13, 4)})


def test_a_stack_of_no_layers_needs_no_tensors():
    planned = to_ours(TABLE, their_tensors(), TARGET | {"enc/3/rest/conv1/weight": struct(0, 3, 3)})
    assert planned["enc/3/rest/conv1/weight"].read().shape == (0, 3, 3)
    assert not [key for key in to_theirs(TABLE, planned) if key.startswith("enc.3")]


def test_shapes_that_cannot_be_transformed():
    table = [Rule("a", "a", to_ours=lambda a: a.reshape(()), to_theirs=lambda a: a.reshape(1))]
    with pytest.raises(KeyMapError, match=r"a  float32\[2\]  -> a  \[\]"):
        to_ours(table, {"a": array(2)}, {"a": struct()})
    with pytest.raises(KeyMapError, match="cannot transform"):
        to_theirs(table, {"a": array(2)})


def test_several_entries_for_one_key():
    table = [Rule("a.{i}", "a/{i}"), Ignored("{rest...}")]
    with pytest.raises(KeyMapError, match=r"a.1  \['a.{i}', '{rest...}'\]"):
        to_ours(table, {"a.1": array(2)}, {})


def test_two_keys_for_one_parameter():
    table = [Rule("a.{i}", "x/{i}"), Rule("b.{i}", "x/{i}")]
    with pytest.raises(KeyMapError, match=r"two keys for one parameter(.|\n)*x/1  a.1  b.1"):
        to_ours(table, {"a.1": array(2), "b.1": array(2)}, {"x/1": struct(2)})
    with pytest.raises(KeyMapError, match="several rules match"):
        to_theirs(table, {"x/1": array(2)})


def test_aliases_are_checked():
    same = array(5, 4)
    to_ours(TABLE, their_tensors() | {"word_embedding.weight": same.copy()}, TARGET)
    fails(["word_embedding.weight  float32[5,4]  = lm.wte.weight"], {"word_embedding.weight": same + 1})
    fails(["word_embedding.weight  float16[5,4]"], {"word_embedding.weight": same.astype(np.float16)})
    # A second name stands for a first one that is not there.
    tensors = {key: tensor for key, tensor in their_tensors().items() if key != "lm.wte.weight"}
    found = to_ours(TABLE, tensors | {"word_embedding.weight": same}, TARGET)
    np.testing.assert_array_equal(found["lm/wte/weight"].read(), same)
    fails(["too many [99]"], {"transformer.99.scale": array(1)})
    nan = np.full((5, 4), np.nan, np.float32)
    to_ours(TABLE, their_tensors() | {"word_embedding.weight": nan, "lm.wte.weight": nan.copy()}, TARGET)


def test_writing_finds_parameters_without_a_rule():
    with pytest.raises(KeyMapError, match=r"(?s)no rule knows.*new  float32\[2\].*should be a stack"):
        to_theirs(TABLE, {"new": array(2), "lm/layers/scale": array()})
    with pytest.raises(KeyMapError, match="several entries write"):
        to_theirs([Rule("a.0", "x"), Rule("a.{i}", "y", stack="i")], {"x": array(1), "y": array(1, 1)})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_floats_become_the_targets_floats(dtype):
    tensors = {"head.w": array(3, dtype=np.float16)}
    planned = to_ours(TABLE, tensors, {"head/w": struct(3, dtype=dtype)})
    np.testing.assert_array_equal(planned["head/w"].read(), tensors["head.w"].astype(dtype))
    back = to_theirs(TABLE, {"head/w": planned["head/w"].read()}, dtype=np.float32)
    assert back["head.w"].dtype == back["head.w"].read().dtype == np.float32


def test_no_cast_between_kinds_or_without_permission():
    fails(["head.ln.bias  int64[4]  -> head/ln/bias  float32"], {"head.ln.bias": np.arange(4)})
    fails(["steps  bool[]  -> steps  int32"], {"steps": np.array(True)})
    fails(["steps  int64[]  -> steps  int32"], allow_cast=False)


def test_a_cast_that_loses_a_value_is_an_error():
    planned = to_theirs(TABLE, {"head/w": np.array([1, 7e4], np.float32)}, dtype=np.float16)
    with pytest.raises(KeyMapError, match=r"head.w: float16 cannot hold"):
        planned["head.w"].read()
    infinite = to_theirs(TABLE, {"head/w": np.array([np.inf, np.nan], ml_dtypes.bfloat16)}, dtype=np.float16)
    np.testing.assert_array_equal(infinite["head.w"].read(), np.array([np.inf, np.nan], np.float16))
    planned = to_ours(TABLE, {"steps": np.array(2**40)}, {"steps": struct(dtype=np.int32)})
    with pytest.raises(KeyMapError, match="steps: int32 cannot hold"):
        planned["steps"].read()


@pytest.mark.parametrize(
    "table",
    [
        [Rule("a.{i}", "a/{i}"), Rule("a.{i}", "b/{i}")],
        [Rule("a.{i}", "x/{i}"), Rule("b.{i}", "x/{i}")],
        [Rule("a.{i}.0", "a/{i}"), Rule("a.3.{i}", "b/{i}")],
        [Rule("a.{rest...}", "a/{rest...}"), Ignored("{rest...}.mask")],
        [Rule("a.{i}", "a", stack="i"), Rule("a.0", "first")],
        [Rule("a", "a"), Alias("a", "b")],
    ],
)
def test_check_table_finds_ambiguity(table):
    for order in (table, table[::-1]):
        with pytest.raises(KeyMapError, match="exclude each other"):
            check_table(order)


def test_a_stack_that_starts_later_leaves_the_first_to_another_rule():
    check_table([Rule("a.{i}", "rest", stack="i", start=1), Rule("a.0", "first")])


@pytest.mark.parametrize(
    "entry",
    [
        lambda: Rule("a.{i}", "a"),
        lambda: Rule("a.{i}", "a/{i}", stack="i"),
        lambda: Rule("a.{i}", "a", stack="j"),
        lambda: Rule("a", "a/{i}", stack="i"),
        lambda: Rule("a", "a", to_ours=np.squeeze),
        lambda: Rule("a.{i", "a"),
        lambda: Alias("a.{i}", "b"),
        lambda: Ignored("a", recompute=np.ones),
        lambda: Ignored("a.{i}", recompute=np.ones, beside="b"),
    ],
)
def test_entries_that_cannot_work(entry):
    with pytest.raises(ValueError, match=r"placeholder|both"):
        entry()


def test_numbers_and_literals_are_exact():
    for key in ("h.01.w", "h.-1.w", "h.x.w", "hX1.w", "h.1.w.more", "h.\u0661.w"):
        with pytest.raises(KeyMapError, match="no rule knows"):
            to_ours([Rule("h.{i}.w", "h/{i}")], {key: array(1)}, {})
