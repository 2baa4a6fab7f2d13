"""Continuous batching: whoever the neighbours are, a request gives what it gives alone, and nothing compiles late."""

import dataclasses
import threading

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from magma_jax import Magma
from magma_jax.data.images import ImageInput
from magma_jax.inference import prompts
from magma_jax.inference.batching import slots
from magma_jax.inference.batching.batch import SlotBatch
from magma_jax.inference.batching.engine import Engine, EngineConfig
from magma_jax.inference.batching.requests import RequestOptions, TextAssembler
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.pending import EngineError, QueueFull
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import split
from tests import tiny
from tests.compilations import count_compilations

GREEDY = SamplingConfig()
# Few sizes, so that few programs are compiled.
SIZES = EngineConfig(slots=4, context=64, images=4, steps=4)
ONE = dataclasses.replace(SIZES, slots=1, queue=3)


def square(name):
    return ImageInput(Image.new("RGB", (64, 64), tiny.COLOURS[name]))


PROMPTS = [
    [square("red"), "A picture of"],
    ["a"],
    [square("blue"), "Q: What colour is it? A:"],
    [square("red"), "Q: What colour is it? A:"],
    ["A picture of a red square", square("green"), " and"],
    [square("red"), "A picture of"],
]
OPTIONS = [
    RequestOptions(12, GREEDY, seed=1),
    RequestOptions(3, SamplingConfig(temperature=1.5), seed=2),
    RequestOptions(9, SamplingConfig(temperature=1.0, top_k=20, repetition_penalty=1.5), seed=3),
    RequestOptions(1, GREEDY, seed=4),
    RequestOptions(17, SamplingConfig(temperature=0.9, top_p=0.8), seed=5),
    RequestOptions(12, SamplingConfig(temperature=1.0), seed=6),
]


@pytest.fixture(scope="module")
def model():
    # Placed as a checkpoint's are: programs that take a placed array are others than those that take one of no place.
    params = jax.device_put(split(MagmaModel(tiny.MODEL, rngs=nnx.Rngs(0)))[1], jax.devices()[0])
    # Random weights answer with one token only; larger ones do not.
    return Magma(tiny.MODEL, {k: 4 * v if v.ndim > 1 else v for k, v in params.items()}, tiny.dataset().tokenizer)


@pytest.fixture(scope="module")
def alone(model):
    """What every prompt gives through the interface for single runs."""
    answers = []
    for prompt, options in zip(PROMPTS, OPTIONS, strict=True):
        batch = model.preprocess_batch([prompt])
        result = model.generate_tokens(batch, 17, options.sampling, seed=[options.seed])
        answers.append(np.asarray(result.tokens)[0, : int(result.lengths[0])].tolist()[: options.max_new_tokens])
    return answers


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model, SIZES) as engine:
        engine.warmup()
        yield engine


def test_nothing_is_compiled_after_the_warmup(engine):
    # First of all tests: another one would compile what the warm-up has left out.
    with count_compilations() as compiled:
        for prompt, options in zip(PROMPTS, OPTIONS, strict=True):
            engine.submit(prompt, options).text()
        engine.submit(["other words, other numbers"], RequestOptions(5, SamplingConfig(0.3, 7, 0.6, 0.1, 1.2))).text()
        engine.submit(["a"], RequestOptions(5, top_logprobs=3)).text()
    assert compiled.count == 0


def test_every_request_gives_what_it_gives_alone(engine, alone):
    tickets = [engine.submit(prompt, options) for prompt, options in zip(PROMPTS, OPTIONS, strict=True)]
    for ticket in tickets:
        ticket.text()
    assert [ticket.tokens for ticket in tickets] == alone


def test_many_threads_in_any_order(engine, alone):
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, len(PROMPTS), 24)
    answers = {}

    def ask(i):
        ticket = engine.submit(PROMPTS[chosen[i]], OPTIONS[chosen[i]])
        ticket.text()
        answers[i] = ticket.tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answers[i] == alone[chosen[i]] for i in range(24))


def test_prompts_that_wait_together_are_run_together(model, alone, monkeypatch):
    sizes = []
    admit = slots.admit

    def counted(*arguments, **options):
        sizes.append(len(arguments[4].slot))
        return admit(*arguments, **options)

    monkeypatch.setattr(slots, "admit", counted)
    engine = Engine(model, SIZES)
    with engine.paused():  # all of them wait before the engine looks
        tickets = [engine.submit(prompt, options) for prompt, options in zip(PROMPTS[:4], OPTIONS[:4], strict=True)]
    with engine:
        for ticket in tickets:
            ticket.text()
    assert sizes[0] > 1
    assert sum(sizes) == 4
    assert [ticket.tokens for ticket in tickets] == alone[:4]


def test_the_images_of_a_group_fit_the_table(engine):
    """Four prompts of two images each, and a table of four."""
    colours = [ImageInput(Image.new("RGB", (64, 64), (i, 0, 99))) for i in range(8)]
    prompts = [[colours[2 * i], colours[2 * i + 1], "a"] for i in range(4)]
    expected = [engine.submit(prompt, RequestOptions(5)).text() for prompt in prompts]
    with engine.paused():
        tickets = [engine.submit(["b", *prompt], RequestOptions(5)) for prompt in prompts]
    others = [ticket.text() for ticket in tickets]
    assert others == [engine.submit(["b", *prompt], RequestOptions(5)).text() for prompt in prompts]
    assert [engine.submit(prompt, RequestOptions(5)).text() for prompt in prompts] == expected


def test_an_answer_has_the_tokens_it_must_have(engine):
    def lengths(minimum):
        hot = SamplingConfig(temperature=50.0)
        tickets = [engine.submit(["a"], RequestOptions(40, hot, seed, min_new_tokens=minimum)) for seed in range(12)]
        return [len(ticket.tokens) for ticket in tickets if ticket.text() is not None]

    free, at_least, exactly = lengths(0), lengths(30), lengths(40)
    assert min(free) < 30 <= min(at_least)
    assert all(length == one for length, one in zip(at_least, free, strict=True) if one >= 30)
    assert exactly == [40] * 12


def test_a_compilation_is_counted():
    with count_compilations() as compiled:
        jax.jit(lambda x: x * 3 + 1)(np.arange(7))
    assert compiled.count >= 1


def test_a_prompt_that_begins_like_another_uses_its_cache(model, alone):
    with Engine(model, SIZES) as engine:
        shots = ["one two three four five six seven eight nine ten "]
        first = engine.submit([*shots, square("red"), "a"], RequestOptions(4))
        first.text()
        second = engine.submit([*shots, square("blue"), "a"], RequestOptions(4))
        second.text()
        layout = engine.layout([*shots, square("blue"), "a"])
        assert first.reused_tokens == 0
        assert second.reused_tokens == layout.image_starts[0]
        again = engine.submit([*shots, square("blue"), "a"], RequestOptions(4))
        assert again.text() == second.text()
        # All but the last position, whose logits are wanted.
        assert again.reused_tokens == again.prompt_tokens - 1
        assert engine.stats().images_encoded == 2
    with Engine(model, dataclasses.replace(SIZES, reuse=False)) as plain:
        ticket = plain.submit([*shots, square("blue"), "a"], RequestOptions(4))
        assert ticket.text() == second.text()
        assert ticket.reused_tokens == 0


def test_prompts_of_another_salt_share_nothing(model):
    """What one has asked cannot be told from what another's answer counts, nor from images that need no encoding."""
    prompt = ["one two three four five six seven eight nine ten ", square("blue"), "a"]
    with Engine(model, SIZES) as engine:

        def ask(salt):
            ticket = engine.submit(engine.layout(prompt, salt), RequestOptions(4))
            return ticket.text(), ticket.reused_tokens > 0, engine.stats().images_encoded

        text = ask(b"")[0]
        assert ask(b"") == (text, True, 1)
        assert ask(b"mine") == (text, False, 2)
        assert ask(b"mine") == (text, True, 2)
        assert ask(b"hers") == (text, False, 3)
    with Engine(model, dataclasses.replace(SIZES, reuse=False)) as engine:
        assert [ask(b""), ask(b"")] == [(text, False, 1), (text, False, 2)]


def test_images_with_nearly_one_hash_are_two(model, monkeypatch):
    """All of the hash is compared, and it has a key."""
    prompt = [square("blue"), "one two three four five six seven eight nine ten"]

    def engine_sees(first, second):
        with Engine(model, SIZES) as engine:
            layout = engine.layout(prompt)
            ticket = None
            for key in (first, second):
                pixels = dict.fromkeys([key], *layout.pixels.values())
                hers = dataclasses.replace(layout, images=(key,), pixels=pixels)
                ticket = engine.submit(hers, RequestOptions(2))
                ticket.text()
            return ticket.reused_tokens

    key = bytes(range(16))
    assert engine_sees(key, key) > 0
    for byte in (0, 7, 8, 15):
        other = bytearray(key)
        other[byte] ^= 1
        assert engine_sees(key, bytes(other)) == 0
    (with_this_key,) = model.layout(prompt).pixels
    monkeypatch.setattr(prompts, "HASH_KEY", bytes(32))
    (with_another,) = model.layout(prompt).pixels
    assert len(with_this_key) == 16
    assert with_this_key != with_another


@pytest.mark.parametrize("seed", [2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1, -1, -(2**63)])
def test_seeds_of_64_bits(model, engine, seed):
    sampling = SamplingConfig(temperature=5.0)

    def tokens(seed):
        ticket = engine.submit(["a"], RequestOptions(20, sampling, seed))
        assert ticket.text()
        return ticket.tokens

    result = model.generate_tokens(model.preprocess_batch([["a"]]), 20, sampling, seed=[seed])
    assert tokens(seed) == np.asarray(result.tokens)[0, : int(result.lengths[0])].tolist()
    assert tokens(seed) == tokens(seed % 2**64)
    for half in {seed % 2**32, (seed >> 32) % 2**32} - {seed}:
        assert tokens(seed) != tokens(half)


def test_while_one_runs_its_prompt_is_copied_for_another(model):
    with Engine(model, SIZES) as engine:
        prompt = ["one two three four five six seven eight nine ten "]
        running = engine.submit(prompt, RequestOptions(15, SamplingConfig(temperature=1.0), seed=1))
        next(iter(running))
        copied = engine.submit(prompt, RequestOptions(15, SamplingConfig(temperature=1.0), seed=1))
        assert copied.text() == running.text()
        assert copied.reused_tokens >= copied.prompt_tokens - 1


def test_more_images_than_the_table_holds_are_encoded_again(engine, alone):
    before = engine.stats().images_encoded
    for name in ("red", "green", "blue", "white"):
        engine.submit([square(name), "x" * 3], RequestOptions(2)).text()
    odd = ImageInput(Image.new("RGB", (64, 64), (1, 2, 3)))
    engine.submit([odd, "A"], RequestOptions(2)).text()
    assert engine.stats().images_encoded > before
    ticket = engine.submit(PROMPTS[0], OPTIONS[0])
    ticket.text()
    assert ticket.tokens == alone[0]


def test_an_answer_arrives_in_pieces_that_join_to_the_whole(engine, model, alone):
    ticket = engine.submit(PROMPTS[0], OPTIONS[0])
    pieces = list(ticket)
    assert len(pieces) > 2
    assert "".join(piece.text for piece in pieces) == model.tokenizer.decode(alone[0])
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish in ("stop", "length")
    assert all(len(piece.tokens) == len(piece.logprobs) for piece in pieces)
    assert all(logprob <= 0 for piece in pieces for logprob in piece.logprobs)


def test_the_likeliest_tokens_beside_each_whatever_the_neighbours_want(engine, model):
    greedy, hot = RequestOptions(9, top_logprobs=3), RequestOptions(9, SamplingConfig(2.0), seed=1)
    ticket, neighbour = engine.submit(PROMPTS[0], greedy), engine.submit(PROMPTS[1], hot)
    ticket.text()
    neighbour.text()
    result = model.generate_tokens(model.preprocess_inputs(PROMPTS[0]), 9, return_logits=True, top_logprobs=3)
    logprobs = jax.nn.log_softmax(result.logits[0, :, : tiny.MODEL.lm.vocab_rows])
    expected = np.argsort(-logprobs, axis=-1, kind="stable")[:, :3]
    np.testing.assert_array_equal(result.top.token[0], expected)
    np.testing.assert_allclose(result.top.logprob[0], np.take_along_axis(logprobs, expected, axis=-1), rtol=1e-5)
    found = [alternative for piece in ticket.pieces() for alternative in piece.top]
    assert [[token for token, _ in top] for top in found] == expected[: len(found)].tolist()
    assert [top[0][0] for top in found] == ticket.tokens
    np.testing.assert_allclose([[p for _, p in top] for top in found], result.top.logprob[0, : len(found)], atol=1e-4)
    assert not any(piece.top for piece in neighbour.pieces())


def test_a_cancelled_request_leaves_its_slot(model):
    with Engine(model, ONE) as engine:
        # Sampled, so that it does not happen to end at once.
        long = engine.submit(["a"], RequestOptions(60, SamplingConfig(temperature=5.0), seed=3))
        waiting = engine.submit(["a red"], RequestOptions(2))
        never = engine.submit(["a blue"], RequestOptions(2))
        never.cancel()
        next(iter(long))
        long.cancel()
        waiting.text()
        assert never.text() == ""
        assert long.finish in ("cancelled", "stop")
        assert never.finish == "cancelled"
        assert engine.stats()[:2] == (0, 0)


def test_a_full_queue_and_impossible_requests_are_refused(model):
    with Engine(model, ONE) as engine:
        with pytest.raises(ValueError, match="60 new tokens were asked for, but the context holds 64"):
            engine.submit(["one two three four five six seven"], RequestOptions(60))
        colours = [ImageInput(Image.new("RGB", (64, 64), (i, 0, 0))) for i in range(5)]
        with pytest.raises(ValueError, match="has 5 images, at most 4"):
            engine.submit(colours)
        with pytest.raises(ValueError, match="prompt is empty"):
            engine.submit([""])
        hot = RequestOptions(60, SamplingConfig(temperature=5.0))
        running = engine.submit(["a"], hot)
        next(iter(running))  # it has its slot
        waiting = [engine.submit(["a"], hot) for _ in range(3)]
        with pytest.raises(QueueFull, match="3 requests are waiting"):
            engine.submit(["a"], hot)
        for ticket in (running, *waiting):
            ticket.cancel()
    with pytest.raises(EngineError, match="shutting down"):
        engine.submit(["a"], RequestOptions(1))


def test_a_failure_is_told_to_the_callers_and_survived(model, monkeypatch, alone):
    with Engine(model, SIZES) as engine:
        original = slots.decode

        def broken(*arguments, **options):
            raise MemoryError("no room")

        monkeypatch.setattr(slots, "decode", broken)
        ticket = engine.submit(PROMPTS[0], OPTIONS[0])
        with pytest.raises(EngineError, match=r"generation failed \(MemoryError: no room\)"):
            ticket.text()
        monkeypatch.setattr(slots, "decode", original)
        ticket = engine.submit(PROMPTS[0], OPTIONS[0])
        ticket.text()
        assert ticket.tokens == alone[0]


def test_an_engine_that_cannot_go_on_says_so(model, monkeypatch, caplog):
    engine = Engine(model, ONE)
    monkeypatch.setattr(SlotBatch, "decode", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(SlotBatch, "reset", lambda _: (_ for _ in ()).throw(MemoryError("no room")))
    with engine.paused():
        tickets = [engine.submit(["a"], RequestOptions(2)) for _ in range(2)]
    for ticket in tickets:
        with pytest.raises(EngineError, match=r"division by zero|engine has stopped"):
            ticket.text()
    engine.close()
    assert "MemoryError: no room" in engine.failure
    with pytest.raises(EngineError, match="the engine has stopped"):
        engine.submit(["a"], RequestOptions(2))
    engine.close(drain=True)
    assert "the engine has stopped" in caplog.text


def test_images_of_waiting_requests_take_no_more_than_they_may(model):
    engine = Engine(model, dataclasses.replace(ONE, queue=99, queue_bytes=3 * 64 * 64 * 3))
    with engine.paused():
        tickets = [engine.submit([square("red"), "a"], RequestOptions(1)) for _ in range(3)]
        with pytest.raises(QueueFull, match="images of waiting requests"):
            engine.submit([square("red"), "a"], RequestOptions(1))
        for ticket in tickets:
            ticket.cancel()
    engine.close(drain=True)


def test_a_context_that_the_model_has_not_is_refused(model):
    with pytest.raises(ValueError, match="context of 65 was asked for, but the model has 64 positions"):
        Engine(model, EngineConfig(context=65))
    for context in (0, -3, 1):
        with pytest.raises(ValueError, match="context must be at least 2"):
            EngineConfig(context=context)


def test_draining_finishes_what_was_taken(model):
    engine = Engine(model, ONE)
    tickets = [engine.submit(["a"], RequestOptions(8)) for _ in range(2)]
    engine.close(drain=True)
    assert all(ticket.finish in ("stop", "length") for ticket in tickets)


# Text


@pytest.fixture
def spoken(model):
    """Pieces of text that an answer shows while its tokens come one at a time."""

    def show(text, stop=()):
        tokens = model.tokenizer.encode(text)
        answer = TextAssembler(model.tokenizer, stop)
        pieces = []
        for i, token in enumerate(tokens):
            new, used = answer.add([token], last=i == len(tokens) - 1)
            pieces.append(new)
            if used is not None:
                return pieces, "stopped"
        return pieces, "ended"

    return show


def test_characters_are_shown_whole(spoken):
    pieces, _ = spoken("caf\u00e9 \U0001f600!")
    assert "".join(pieces) == "caf\u00e9 \U0001f600!"
    assert not any("\ufffd" in piece for piece in pieces)


def test_stop_texts_end_the_answer_and_are_not_shown(spoken):
    pieces, how = spoken("red\nQ: next", stop=("\nQ:", "never"))
    assert ("".join(pieces), how) == ("red", "stopped")
    pieces, how = spoken("red\nQuick", stop=("\nQ:",))
    assert ("".join(pieces), how) == ("red\nQuick", "ended")


def test_tokens_behind_a_stop_text_do_not_count(model):
    tokens = model.tokenizer.encode("red square. And more")
    text, used = TextAssembler(model.tokenizer, ["."]).add(tokens, last=True)
    assert text == "red square"
    assert model.tokenizer.decode(tokens[:used]).endswith(".")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"stop": ("",)}, "empty text"),
        ({"top_logprobs": 21}, "top_logprobs must lie between 0 and 20"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "between 0 and max_new_tokens"),
        ({"seed": 2**64}, r"seed must be a whole number from -2\*\*63 to 2\*\*64 - 1, got 18446744073709551616"),
        ({"seed": -(2**63) - 1}, "seed must be a whole number"),
        ({"sampling": SamplingConfig(compat="upstream")}, "compat is for single runs"),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        RequestOptions(**options)
