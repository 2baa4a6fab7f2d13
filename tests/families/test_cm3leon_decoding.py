"""Decoding of texts and images by coupled streams: the same as the full forward pass, and as single requests."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.data.tokenizers.byte_level import train_bpe
from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.families.cm3leon import engine as engine_module
from magma_jax.families.cm3leon import slots as batch_programs
from magma_jax.families.cm3leon.batch import StreamBatch
from magma_jax.families.cm3leon.decoding import Request, run_requests, stream_rows
from magma_jax.families.cm3leon.engine import Plan
from magma_jax.families.cm3leon.generator import GAP, IMAGE_GAP, CM3Leon, Codes, Hidden
from magma_jax.families.cm3leon.loading import Loaded
from magma_jax.families.cm3leon.options import DrawOptions
from magma_jax.families.cm3leon.prompts import check_sentinels, drawing_streams, edit_streams, lay_out_gaps
from magma_jax.inference.answers import AnswerOptions, ImageOptions
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.guidance import contrast, guide, guide_edit
from magma_jax.inference.decoding.sampling import MASKED
from magma_jax.inference.decoding.streams import Place, StreamRules, Walk, combined
from magma_jax.inference.pending import EngineError
from magma_jax.models.cm3leon import CM3LeonConfig, CM3LeonModel
from magma_jax.nn.modules import abstract, merge, split

GRID, CODES, CONTEXT = 4, 12, 64
WORDS = ("red", "green", "blue", "a cat on the moon", "two dogs", "x", "a house", "the sea at night")
BPE = train_bpe([*WORDS, "Edit first image following the instruction"], 290)
LAYOUT = VocabLayout(text=BPE.vocab_size, image=CODES, sentinels=8)
CONFIG = CM3LeonConfig(
    layers=2,
    width=32,
    heads=2,
    feed_forward=64,
    vocab_rows=LAYOUT.rows,
    vocabulary=LAYOUT,
    context_length=CONTEXT,
    embedding_std=0.4,
    image_tokens=GRID,
)
# Fresh blocks return their input, so these are given other output layers.
OUTPUTS = ("layers/attn/out_proj/weight", "layers/mlp/c_proj/weight")
PICTURE = Codes(np.array([3, 1, 4, 1]))


@pytest.fixture(scope="module")
def model():
    graphdef = abstract(lambda: CM3LeonModel(CONFIG, rngs=nnx.Rngs(0)))[0]
    params = jax.jit(lambda: split(CM3LeonModel(CONFIG, rngs=nnx.Rngs(0)))[1])()
    keys = jax.random.split(jax.random.key(1), 3)
    params |= {
        path: 0.3 * jax.random.normal(key, params[path].shape) for path, key in zip(OUTPUTS, keys[:2], strict=True)
    }
    params["wpe/weight"] = 0.3 * jax.random.normal(keys[2], params["wpe/weight"].shape)
    return CM3Leon(Loaded(CONFIG, graphdef, params, BPE, True))


def ids(text):
    return np.array(BPE.encode(text), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, tokens):
    module = merge(graphdef, params)
    return module.logits(module(module.embed(tokens)).hidden)


def last_logits(model, prompts):
    """Logits after each prompt, without a cache; all in one program."""
    tokens = np.zeros((4, CONTEXT), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    logits = np.asarray(forward(model.graphdef, model.params, tokens))
    return [jnp.asarray(logits[row, len(prompt) - 1 : len(prompt)]) for row, prompt in enumerate(prompts)]


OPTIONS = DrawOptions(guidance=3.0, temperature=(1.0, 1.0), top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def guided(model):
    """A guided batch of eight prompts of different lengths."""
    return model.draw_codes(WORDS, OPTIONS)


def test_a_guided_ragged_batch_equals_single_requests(model, guided):
    assert len({len(ids(text)) for text in WORDS}) > 3
    for text, found in zip(WORDS, guided, strict=True):
        np.testing.assert_array_equal(model.draw_codes([text], OPTIONS)[0], found)
        assert found.shape == (1, GRID)
    assert len({tuple(found[0]) for found in guided}) > 4


def test_several_images_of_a_text_are_those_of_their_seeds(model, guided):
    several = model.draw_codes(WORDS[:1], dataclasses.replace(OPTIONS, n=3))[0]
    np.testing.assert_array_equal(several[0], guided[0][0])
    alone = model.draw_codes(WORDS[:1], dataclasses.replace(OPTIONS, seed=7))[0]
    np.testing.assert_array_equal(several[2], alone[0])
    likeliest = model.draw_codes(WORDS[:1], dataclasses.replace(OPTIONS, candidates=3))[0]
    assert likeliest.shape == (1, GRID)
    assert likeliest[0].tolist() in several.tolist()


def test_a_pool_of_guided_and_contrasted_candidates(model):
    """Candidates have the seeds of single requests of their kind, and the likeliest of all is kept."""
    pool = dataclasses.replace(OPTIONS, candidates=3, cd_k=3, contrasted=2)
    kinds = [{"seed": 5}, {"seed": 6, "cd_k": 3}, {"seed": 7, "cd_k": 3}]
    alone = [model.engine.of_texts(WORDS[:2], dataclasses.replace(OPTIONS, **kind), ()) for kind in kinds]
    for number, (best,) in enumerate(model.engine.of_texts(WORDS[:2], pool, ())):
        likeliest = max((found[number][0] for found in alone), key=lambda one: one.logprob)
        np.testing.assert_array_equal(best.ids, likeliest.ids)
    for options, message in (
        ({"contrasted": 4}, "contrasted 4: give cd_k, and a number up to that of the candidates, 3"),
        ({"cd_k": -1}, "cd_k must be 0 to 64, got -1"),
        ({"cd_alpha": 0.0}, "cd_alpha must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(pool, **options)


def test_contrast_applies_in_its_interval(model):
    """Outside of it codes are drawn from the stream with the text alone."""
    options = dataclasses.replace(OPTIONS, cd_k=2, temperature=(0.0, 0.0))
    plain = model.draw_codes(WORDS, dataclasses.replace(options, cd_k=0, guidance=1.0))
    first = model.draw_codes(WORDS, dataclasses.replace(options, interval=(0.0, 1 / GRID)))
    whole = model.draw_codes(WORDS, options)
    late = model.draw_codes(WORDS, dataclasses.replace(options, interval=(1 - 1 / GRID, 1.0)))
    np.testing.assert_array_equal([codes[0, 0] for codes in first], [codes[0, 0] for codes in whole])
    np.testing.assert_array_equal([codes[0, :-1] for codes in late], [codes[0, :-1] for codes in plain])
    assert any((one != other).any() for one, other in zip(whole, plain, strict=True))


@pytest.mark.parametrize("combine", ["guide", "contrast", "edit"])
def test_every_code_is_the_best_of_the_full_forward_pass(model, combine):
    """Greedy decoding with a cache, step by step compared with uncached logits of all streams."""
    texts = ["red", "a cat on the moon"]
    if combine == "edit":
        streams = [edit_streams(ids("Edit"), PICTURE.codes, ids(text), LAYOUT, GRID) for text in texts]
        options = DrawOptions(guidance=2.0, image_guidance=1.5, temperature=(0.0, 0.0))
        nothing = [[[]] * 3] * len(texts)
        drawn = [
            model.engine.codes_of(found) for found in model.engine.draw(Plan(texts, streams, "edit", nothing), options)
        ]
    else:
        streams = [drawing_streams(ids(text), [], LAYOUT, GRID, null="sentinel") for text in texts]
        by_contrast = combine == "contrast"  # in place of guidance, so whatever its weight is
        options = DrawOptions(guidance=2.0 - by_contrast, temperature=(0.0, 0.0), cd_k=3 * by_contrast)
        drawn = model.draw_codes(texts, options)
    is_image = np.zeros(CONFIG.vocab_rows, bool)
    is_image[LAYOUT.image_ids.start : LAYOUT.image_ids.stop] = True
    for prompts, codes in zip(streams, drawn, strict=True):
        new = LAYOUT.from_codes(codes[0])
        for step in range(GRID):
            parts = last_logits(model, [[*prompt, *new[:step]] for prompt in prompts])
            if combine == "edit":
                scores = guide_edit(parts[2], parts[1], parts[0], image_weight=1.5, text_weight=2.0)
            elif combine == "guide":
                scores = guide(*parts, 2.0)
            else:
                expert, amateur = (jnp.where(is_image, part, MASKED) for part in parts)
                scores = contrast(expert, jnp.where(is_image, amateur / 0.5, MASKED), k=3, alpha=0.5)
            assert int(jnp.argmax(jnp.where(is_image, scores, MASKED)[0])) == new[step]


def test_guidance_of_one_is_the_conditional_stream(model):
    plain = model.draw_codes(WORDS, dataclasses.replace(OPTIONS, guidance=1.0))
    streams = [drawing_streams(ids(text), [], LAYOUT, GRID, null="sentinel") for text in WORDS]
    plan = Plan(WORDS, streams, "guide", [[[]] * 2] * len(WORDS))
    coupled = [
        model.engine.codes_of(one) for one in model.engine.draw(plan, dataclasses.replace(OPTIONS, guidance=1.0))
    ]
    np.testing.assert_array_equal(np.stack(plain), np.stack(coupled))
    # So is guidance outside of its interval, from the first code on.
    late = dataclasses.replace(OPTIONS, interval=(0.999, 1.0))
    late = [model.engine.codes_of(one) for one in model.engine.draw(plan, late)]
    np.testing.assert_array_equal(np.stack(plain), np.stack(late))


def test_combined_logits_are_restricted_after_guidance():
    logits = jax.random.normal(jax.random.key(0), (4, 10))
    allowed = jnp.arange(10) % 2 == jnp.zeros((2, 1))
    asked = [Request(streams=(), limit=GRID, end=0, place=Place.TEXT, weight=weight) for weight in (1.0, 4.0)]
    zeros, no = jnp.zeros(2, jnp.int32), jnp.zeros(2, bool)
    walk = Walk(zeros, zeros, zeros, no, no)
    got = combined([logits[:2], logits[2:]], allowed, walk, stream_rows(asked), StreamRules(LAYOUT, GRID, "guide"))
    np.testing.assert_array_equal(np.asarray(got)[0, ::2], np.asarray(logits)[0, ::2])
    assert (np.asarray(got)[:, 1::2] == MASKED).all()


def test_a_stream_that_is_lost_is_an_error(model):
    stream = np.array([LAYOUT.eos, LAYOUT.brk], np.int32)
    request = Request(streams=(stream,), limit=GRID, end=LAYOUT.eos, place=Place.IMAGE, left=GRID)
    with pytest.raises(ValueError, match="a request has 1 streams, but guide takes 2"):
        run_requests(model.graphdef, model.params, [request], StreamRules(LAYOUT, GRID, "guide"), CONTEXT)


@pytest.fixture(scope="module")
def batch(model):
    """A batch of five slots, few enough for requests to wait."""
    return StreamBatch(CONFIG, model.graphdef, model.params, count=5, steps=3)


def drained(batch, found=()):
    found = dict(found)
    while batch.busy:
        found |= {key: finish() for key, finish in batch.step()}
    return found


def codes_of(model, results):
    return np.stack([LAYOUT.to_codes(result.ids) for result in results])


@pytest.mark.slow
def test_requests_that_join_a_running_batch_equal_single_ones(model, batch):
    """Guided, unguided, contrasted and edits together, of which some join while others are drawn."""
    plain, edit = dataclasses.replace(OPTIONS, guidance=1.0, n=2), dataclasses.replace(OPTIONS, image_guidance=1.5)
    engine = model.engine
    plans = [(engine.plan_texts([text], OPTIONS), OPTIONS) for text in WORDS[:3]]
    plans += [(engine.plan_texts(["two dogs"], plain), plain), (engine.plan_edits([(PICTURE, "red")], edit), edit)]
    pool = dataclasses.replace(OPTIONS, n=2, candidates=2, cd_k=3, contrasted=1)
    plans += [(engine.plan_texts([text], one), one) for text, one in (("a house", pool), (WORDS[-1], OPTIONS))]
    found = {}
    for number, (plan, options) in enumerate(plans):
        batch.begin(number, engine.drawings(plan, options), list)
        found |= {key: finish() for key, finish in batch.step()}
    found = drained(batch, found)
    assert batch.room
    for number, (plan, options) in enumerate(plans):
        alone = engine.run(engine.drawings(plan, options), plan.combine)
        np.testing.assert_array_equal(codes_of(model, found[number]), codes_of(model, alone))
        for one, other in zip(found[number], alone, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


def test_a_common_beginning_is_run_once(model, batch):
    """Images of one text, and the stream that holds its retrieved documents alone."""
    batch.reset()
    options = dataclasses.replace(OPTIONS, n=3, null="documents")
    documents = [[("a cat on the moon", PICTURE), ("the sea at night", PICTURE)]]
    plan = model.engine.plan_texts(["blue"], options, documents)
    expected = codes_of(model, model.engine.draw(plan, options)[0])
    before = batch.computed, batch.reused
    batch.begin("one", model.engine.drawings(plan, options), list)
    np.testing.assert_array_equal(codes_of(model, drained(batch)["one"]), expected)
    total = 3 * sum(map(len, plan.streams[0]))
    assert batch.computed - before[0] + batch.reused - before[1] == total
    # The first image runs both of its prompts, the others no more than what differs from a slot's.
    assert batch.computed - before[0] < total / 2


def test_a_request_is_cancelled_and_a_lost_stream_is_an_error(model, batch):
    batch.reset()
    plan = model.engine.plan_texts(["red"], OPTIONS)
    requests = model.engine.drawings(plan, OPTIONS)
    for key in ("kept", "gone", "waiting"):
        batch.begin(key, requests, list)
    batch.step()
    batch.cancel("gone")
    batch.cancel("waiting")
    assert drained(batch).keys() == {"kept"}
    batch.begin("lost", requests, list)
    batch._admit()
    (running,) = batch._running
    batch._state = batch_programs.release(batch._state, np.arange(5) == running.slots[1])
    with pytest.raises(EngineError, match="a request lost one of its streams"):
        batch.step()
    batch.reset()
    with pytest.raises(ValueError, match="2 slots are fewer than the 3 of an edit"):
        StreamBatch(CONFIG, model.graphdef, model.params, count=2)
    long = dataclasses.replace(requests[0], limit=CONTEXT)
    with pytest.raises(ValueError, match=f"but the context holds {CONTEXT}"):
        batch.begin("long", [long], list)


def test_gaps_are_filled_in_order_and_kept_parts_stay(model):
    mask = np.zeros((2, 2), bool)
    mask[1, 0] = True
    sampling = SamplingConfig(temperature=1.0)
    filled, logprob = model.engine.fill([GAP, " cat", Hidden(PICTURE, mask)], 6, sampling, 3)
    text, rest, image = filled
    assert LAYOUT.from_text(text).tolist()  # a text token
    np.testing.assert_array_equal(rest, ids(" cat"))
    np.testing.assert_array_equal(np.delete(image.codes, 2), np.delete(PICTURE.codes, 2))
    assert logprob < 0
    # The second gap was asked for after the first one had been filled.
    laid = lay_out_gaps([GAP, ids(" cat"), Codes(PICTURE.codes, mask.ravel())], LAYOUT, GRID)
    prompt = [*laid.ids, LAYOUT.sentinel(0), *LAYOUT.from_text(text), LAYOUT.eoss, LAYOUT.sentinel(1)]
    check_sentinels(np.array(prompt), LAYOUT)
    logprobs = jax.nn.log_softmax(last_logits(model, [prompt])[0][0])
    assert logprob < float(logprobs[LAYOUT.from_codes(image.codes[2:3])[0]])
    whole = model.engine.fill(["red", IMAGE_GAP], 6, sampling, 3)[0]
    assert whole[1].codes.shape == (GRID,)


def test_laid_out_prompts():
    eos, brk, first, second = LAYOUT.eos, LAYOUT.brk, LAYOUT.sentinel(0), LAYOUT.sentinel(1)
    codes = LAYOUT.from_codes(PICTURE.codes).tolist()
    laid = lay_out_gaps([GAP, PICTURE], LAYOUT, GRID)
    assert laid.ids.tolist() == [eos, first, brk, *codes, eos]
    words = LAYOUT.from_text(ids("a")).tolist()
    hidden = np.array([True, False, True, True])
    laid = lay_out_gaps([ids("a"), Codes(PICTURE.codes, hidden)], LAYOUT, GRID)
    assert laid.ids.tolist() == [eos, *words, brk, first, codes[1], second, eos]
    assert [gap.count for gap in laid.gaps] == [1, 2]
    text, null = drawing_streams(ids("a"), [[ids("a"), PICTURE]], LAYOUT, GRID, null="documents")
    assert text.tolist() == [eos, *words, brk, *codes, brk, *words, brk]
    assert null.tolist() == [eos, *words, brk, *codes, brk]
    assert drawing_streams(ids("a"), [], LAYOUT, GRID, null="sentinel")[1].tolist() == [eos, first, brk]
    both, image, nothing = edit_streams(ids("a"), PICTURE.codes, ids("a"), LAYOUT, GRID)
    assert both.tolist() == [eos, *words, brk, *codes, brk, *words, brk]
    assert image.tolist() == [eos, *words, brk, *codes, brk, first, brk]
    assert nothing.tolist() == [eos, *words, brk, first, brk, second, brk]


def test_interleaved_answers_have_whole_images(model):
    """An image begins only where all its codes fit: after 1 + 4 tokens and a break, 4 of 14, but not of 13."""
    prompt = np.array([LAYOUT.eos, *LAYOUT.from_text(ids("a")), LAYOUT.brk], np.int32)
    asked = {"end": LAYOUT.eos, "place": Place.BEGIN, "images": True, "sampling": SamplingConfig(temperature=9.0)}
    counts = {}
    for limit in (14, 13):
        found = model.continue_ids([prompt] * 8, [asked | {"limit": limit, "seed": s} for s in range(8)], "conditional")
        for result in found:
            pieces = model.media.split(result.ids)
            assert all(isinstance(piece, Codes) and len(piece.codes) == GRID for piece in pieces)
            counts.setdefault(limit, set()).add(len(pieces))
    assert counts == {14: {1, 2, 3}, 13: {1, 2}}


def test_answers_of_texts_and_images(model):
    options = AnswerOptions(max_new_tokens=6, sampling=SamplingConfig(temperature=1.0), n=2)
    found = list(model.answers([["red"], ["two dogs"]], options))
    assert [len(answers) for answers in found] == [2, 2]
    assert model.makes == {"text"}
    with pytest.raises(ValueError, match="no image tokenizer, which draws images; train it"):
        list(model.answers([["red"]], ImageOptions()))


def test_guidance_without_sentinels_warns_once(model):
    engine_module._warn_once.cache_clear()
    never = CM3Leon(Loaded(CONFIG, model.graphdef, model.params, BPE, False))
    with pytest.warns(UserWarning, match="never saw an empty prompt"):
        never.draw_codes(["red"], OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        never.draw_codes(["red"], OPTIONS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.draw_codes(["red " * 40], OPTIONS), "positions, but the context holds 64; shorten the prompt"),
        (lambda m: m.infill(["red"]), "the prompt has no gap to fill in"),
        (lambda m: m.infill([GAP, Codes(np.arange(5))]), "an image has 5 codes, not the 4 of the tokenizer's grid"),
        (
            lambda m: m.draw_codes(["a"], OPTIONS, documents=[[("b", PICTURE)] * 4]),
            "at most 3 documents are taken, got 4",
        ),
        (lambda m: list(m.answers([[]])), "the prompt is empty"),
        (
            lambda m: m.caption(PICTURE, sampling=SamplingConfig(repetition_penalty=1.2)),
            "repetition_penalty and compat",
        ),
        (lambda m: list(m.answers([["a"]], ImageOptions(steps=4))), "steps are those of a masked model"),
        (lambda m: list(m.answers([[" "]], ImageOptions())), "a drawing needs a text"),
        (lambda m: DrawOptions(interval=(0.5, 0.2)), "interval must be two ascending shares"),
        (lambda m: DrawOptions(cd_alpha=0.0), "cd_alpha must be above 0"),
        (
            lambda m: check_sentinels(np.array([LAYOUT.eos, LAYOUT.sentinel(1)]), LAYOUT),
            r"sentinels are not balanced \(<sentinel:1>\)",
        ),
        (
            lambda m: check_sentinels(np.array([LAYOUT.sentinel(0), LAYOUT.sentinel(0), LAYOUT.sentinel(0)]), LAYOUT),
            "sentinels are not balanced",
        ),
    ],
)
def test_refusals(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
