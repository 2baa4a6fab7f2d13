"""Continuous batching: requests join and leave a running batch, each giving what it gives alone.

One thread owns the device. Between two short bursts of decoding it looks at the queue: a waiting request takes a free
slot (its pictures are encoded, its prompt is run), a request that has ended or was cancelled leaves its slot. What a
slot's cache still holds of an earlier prompt is not computed again: the same picture with another question, or the same
few-shot examples before another picture.

    with Engine(Magma.from_checkpoint("runs/quickstart")) as engine:
        ticket = engine.submit([ImageInput("cat.png"), "A picture of"])
        for piece in ticket:
            print(piece.text, end="")
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from magma_jax.data.images import ImageInput
from magma_jax.inference import slots
from magma_jax.inference.api import LENGTH_BUCKETS, Magma
from magma_jax.inference.decode import Drawn, TopTokens
from magma_jax.inference.prompts import WORD, Encoded, Prompt, encode_prompt, picture_positions
from magma_jax.inference.requests import (
    MAX_TOP_LOGPROBS,
    Alternatives,
    Answer,
    EngineError,
    Progress,
    RequestOptions,
    Ticket,
)
from magma_jax.inference.sampling import sampling_rows
from magma_jax.models.encoders import ENCODERS
from magma_jax.typing import Int

# Below this many common positions a prompt is run anew: looking back costs a program of its own.
MIN_REUSED = 16


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine; all memory is taken at the start.

    Attributes:
        slots: requests that decode together.
        context: positions of one request, prompt and answer; None for the model's context.
        pictures: pictures that are kept encoded; also the most that one prompt may have.
        steps: tokens that are decoded between two looks at the queue.
        queue: requests that may wait.
        reuse: whether prompts that begin like an earlier one share its cache.
    """

    slots: int = 8
    context: int | None = None
    pictures: int = 32
    steps: int = 8
    queue: int = 256
    reuse: bool = True

    def __post_init__(self):
        for name in ("slots", "pictures", "steps", "queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class QueueFull(EngineError):
    """Too many requests are waiting; try again later."""


class EngineStats(NamedTuple):
    """Counters since the start, and what is going on now."""

    waiting: int
    running: int
    finished: int
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    pictures_encoded: int


@dataclasses.dataclass
class _Work:
    ticket: Ticket
    prompt: Encoded
    answer: Answer
    new: int = 0


class Engine:
    """Runs requests of many callers on one model; safe to use from many threads. Use it in a ``with`` block."""

    def __init__(self, model: Magma, config: EngineConfig = EngineConfig()):
        self.model, self.config = model, config
        limit = model.config.lm.context_length
        self.context = min(config.context or limit, limit)
        self.buckets = (*(bucket for bucket in LENGTH_BUCKETS if bucket < self.context), self.context)
        self._graphdef, self._params = model.graphdef, model.params
        self._top = min(MAX_TOP_LOGPROBS, model.config.lm.vocab_rows)
        self._picture_positions = picture_positions(model.config)
        self._waiting: collections.deque[_Work] = collections.deque()
        self._running: dict[int, _Work] = {}
        self._changed = threading.Condition()
        self._stopping = self._draining = False
        self._finished = self._prompt_tokens = self._reused = self._new = self._encoded = 0
        self._reset()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Stops; with ``drain`` after what is waiting and running has ended, without it that fails."""
        with self._changed:
            self._draining = True
            if drain:
                self._changed.wait_for(lambda: not (self._waiting or self._running), timeout)
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def encode(self, prompt: Prompt) -> Encoded:
        """Tokens and pixels of a prompt; may run in any thread, before ``submit``.

        Raises:
            ValueError: an empty prompt, an item that is neither text nor picture, too many pictures, or more text than
                the context can hold. ImageError.
        """
        config, tokenizer = self.model.config, self.model.tokenizer
        size = sum(len(item) for item in prompt if isinstance(item, str))
        if size > self.context * tokenizer.longest:  # before it is split, which takes long
            raise ValueError(f"the prompt has {size} characters, more than the context of {self.context} tokens holds")
        return encode_prompt(prompt, config, tokenizer, max_pictures=self.config.pictures)

    def submit(self, prompt: Prompt | Encoded, options: RequestOptions = RequestOptions()) -> Ticket:
        """Takes a request and returns at once.

        Raises:
            QueueFull: as many as may wait are waiting.
            ValueError: prompt and answer do not fit the context; and what ``encode`` raises.
            EngineError: the engine is shutting down.
        """
        encoded = prompt if isinstance(prompt, Encoded) else self.encode(prompt)
        length = len(encoded.tokens)
        if length + options.max_new_tokens > self.context:
            raise ValueError(
                f"the prompt has {length} positions and {options.max_new_tokens} new tokens were asked for, but the "
                f"context holds {self.context}; shorten the prompt or lower max_new_tokens"
            )
        ticket = Ticket(length, options)
        with self._changed:
            if self._draining:
                raise EngineError("the engine is shutting down; ask another or try later")
            if len(self._waiting) >= self.config.queue:
                raise QueueFull(f"{self.config.queue} requests are waiting already; try again later")
            self._waiting.append(_Work(ticket, encoded, Answer(self.model.tokenizer, options.stop)))
            self._changed.notify_all()
        return ticket

    def stats(self) -> EngineStats:
        """Counters for whoever watches."""
        with self._changed:
            return EngineStats(
                len(self._waiting),
                len(self._running),
                self._finished,
                self._prompt_tokens,
                self._reused,
                self._new,
                self._encoded,
            )

    def warmup(self) -> float:
        """Compiles every program now instead of at the first requests that need it; returns the seconds it took."""
        started = time.perf_counter()
        picture = np.zeros((self.model.config.encoder.image_size,) * 2 + (3,), np.uint8)
        for bucket in self.buckets:
            # As long a prompt as the bucket holds beside one new token, of which none repeats another.
            length = min(bucket, self.context - 1)
            ids = np.arange(bucket, bucket + length, dtype=np.int32) % self.model.config.lm.vocab_rows
            places = np.full(length, WORD, np.int32)
            warm = Encoded(ids, places, [None] * length, {}, -(2**62) - ids.astype(np.int64) - bucket * 2**20)
            self.submit(warm, RequestOptions(max_new_tokens=1)).text()
        if self._picture_positions + 1 < self.context:
            self.submit([ImageInput(Image.fromarray(picture))], RequestOptions(max_new_tokens=1)).text()
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._running))
            self._warm_programs()
        return time.perf_counter() - started

    # What follows runs in the engine's thread alone.

    def _reset(self) -> None:
        """Fresh device state: at the start, and after a failure that may have taken the old one with it."""
        sizes = (self.config.slots, self.context, self.config.pictures)
        empty = slots.empty_slots(self._graphdef, self._params, *sizes)
        self._rows, self._table = slots.beside(self._params, empty)
        self._pictures: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._histories = [np.zeros(0, np.int64) for _ in range(self.config.slots)]

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._stopping)
                if self._stopping:
                    break
            try:
                self._drop_cancelled()
                self._admit_waiting()
                if self._running:
                    self._decode()
            except Exception as error:  # whatever the device raised, the callers must hear of it
                self._fail_all(EngineError(f"generation failed ({type(error).__name__}: {error!s:.300})"))
                self._reset()
        self._fail_all(EngineError("the engine was shut down"), waiting=True)

    def _fail_all(self, error: EngineError, *, waiting: bool = False) -> None:
        with self._changed:
            lost = list(self._running.values())
            self._running.clear()
            if waiting:
                lost += self._waiting
                self._waiting.clear()
            self._changed.notify_all()
        for work in lost:
            work.ticket.fail(error)

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [work for work in self._waiting if work.ticket.cancelled]
            for work in gone:
                self._waiting.remove(work)
            left = [slot for slot, work in self._running.items() if work.ticket.cancelled]
        for work in gone:
            self._finished += 1
            work.ticket.put(Progress("", finish="cancelled"))
        for slot in left:
            self._end(slot, Progress("", finish="cancelled"))
        if left:
            self._release(left)

    def _admit_waiting(self) -> None:
        # No more than there are slots: requests that end with their first token would keep the others waiting for ever.
        for _ in range(self.config.slots):
            with self._changed:
                free = [slot for slot in range(self.config.slots) if slot not in self._running]
                if not free or not self._waiting:
                    return
                work = self._waiting.popleft()
                slot, start, source = self._choose(work.prompt, free)
                self._running[slot] = work
            if source is not None:
                self._rows = slots.copy_prompt(self._rows, jnp.int32(source), jnp.int32(slot))
            self._admit(slot, start, work)

    def _choose(self, prompt: Encoded, free: list[int]) -> tuple[int, int, int | None]:
        """The slot to take, how much of the prompt its cache will hold, and the slot to copy that from, if another."""
        if not self.config.reuse:
            return free[0], 0, None
        # The newest token of a running request was drawn but not run yet: the cache does not hold it.
        held = [history[: -1 if slot in self._running else None] for slot, history in enumerate(self._histories)]
        common = [_common_prefix(history, prompt.identity) for history in held]
        # At least one position has to be run: the first token is drawn from its logits.
        common = [min(size, len(prompt.tokens) - 1) for size in common]
        best = max(range(len(common)), key=lambda slot: (common[slot], slot in free))
        if common[best] < MIN_REUSED:
            # The slot with the least to lose.
            return min(free, key=lambda slot: len(self._histories[slot])), 0, None
        if best in free:
            return best, common[best], None
        target = min(free, key=lambda slot: len(self._histories[slot]))
        return target, common[best], best

    def _admit(self, slot: int, start: int, work: _Work) -> None:
        prompt, options = work.prompt, work.ticket.options
        length = len(prompt.tokens) - start
        bucket = next(b for b in self.buckets if b >= length)
        tokens, pictures = np.zeros(bucket, np.int32), np.full(bucket, WORD, np.int32)
        tokens[:length] = prompt.tokens[start:]
        for i in range(length):
            owner = prompt.owners[start + i]
            if owner is not None:
                row = self._picture_row(owner, prompt.pixels[owner])
                pictures[i] = row * self._picture_positions + prompt.places[start + i]
        seen = np.zeros(self.model.config.lm.head_rows, bool)
        seen[prompt.tokens[prompt.places == WORD]] = True
        admission = slots.Admission(
            jnp.int32(slot),
            jnp.int32(start),
            jnp.int32(length),
            jnp.asarray(tokens),
            jnp.asarray(pictures),
            jnp.asarray(seen),
            slots.request_key(options.seed),
            sampling_rows([options.sampling]),
            jnp.int32(options.max_new_tokens),
        )
        eos_id = self.model.tokenizer.eos_id
        self._rows, first = slots.admit(
            self._graphdef, self._params, self._rows, self._table, admission, eos_id=eos_id, top=self._top
        )
        self._histories[slot] = prompt.identity
        work.ticket.reused_tokens = start
        self._prompt_tokens += len(prompt.tokens)
        self._reused += start
        top = [_alternatives(first.top, options.top_logprobs, 0)] if options.top_logprobs else []
        self._deliver({slot: ([int(first.token[0])], [float(first.logprob[0])], top)})

    def _picture_row(self, key: bytes, pixels: np.ndarray) -> int:
        """Where a picture stands in the table; it is encoded if it is not there, in place of the least used one."""
        if key in self._pictures:
            self._pictures.move_to_end(key)
            return self._pictures[key]
        if len(self._pictures) < self.config.pictures:
            row = len(self._pictures)
        else:
            _, row = self._pictures.popitem(last=False)
        entry = ENCODERS[self.model.config.encoder.kind]
        self._table = slots.add_picture(
            self._graphdef, self._params, self._table, pixels[None], jnp.int32(row), mean=entry.mean, std=entry.std
        )
        self._pictures[key] = row
        self._encoded += 1
        return row

    def _decode(self) -> None:
        before = np.asarray(self._rows.count)
        wanted = {slot: work.ticket.options.top_logprobs for slot, work in self._running.items()}
        drawn = self._burst(self._top if any(wanted.values()) else 0)
        tokens, logprobs, after = np.asarray(drawn.token), np.asarray(drawn.logprob), np.asarray(self._rows.count)
        top = jax.tree.map(np.asarray, drawn.top)  # once for all rows
        self._deliver(
            {
                slot: (
                    tokens[slot, :count].tolist(),
                    logprobs[slot, :count].tolist(),
                    [_alternatives(top, size, (slot, step)) for step in range(count)] if size else [],
                )
                for slot, size in wanted.items()
                if (count := int(after[slot] - before[slot]))
            }
        )

    def _burst(self, top: int) -> Drawn:
        """A burst of decoding; with ``top`` likeliest tokens where somebody wants them, which takes another program."""
        eos_id, steps = self.model.tokenizer.eos_id, self.config.steps
        self._rows, drawn = slots.decode(self._graphdef, self._params, self._rows, steps=steps, eos_id=eos_id, top=top)
        return drawn

    def _deliver(self, new: dict[int, tuple[list[int], list[float], list[Alternatives]]]) -> None:
        """Gives every request its new tokens, and ends those that are through."""
        stopped = []
        for slot, (tokens, logprobs, top) in new.items():
            work = self._running[slot]
            eos_id = self.model.tokenizer.eos_id
            ended = eos_id in tokens
            tokens = tokens[: tokens.index(eos_id)] if ended else tokens
            work.new += len(tokens)
            self._new += len(tokens)
            at_limit = work.new >= work.ticket.options.max_new_tokens
            text, found = work.answer.add(tokens, last=ended or at_limit)
            self._histories[slot] = np.concatenate([self._histories[slot], np.array(tokens, np.int64)])
            finish = "stop" if ended or found is not None else "length" if at_limit else None
            used = len(tokens) if found is None else found
            piece = Progress(text, tuple(tokens[:used]), tuple(logprobs[:used]), tuple(top[:used]), finish)
            if finish is None:
                work.ticket.put(piece)
            else:
                self._end(slot, piece)
                if found is not None:
                    stopped.append(slot)
        if stopped:
            self._release(stopped)

    def _end(self, slot: int, last: Progress) -> None:
        # The newest token was drawn but never run: the cache does not hold it.
        self._histories[slot] = self._histories[slot][:-1]
        with self._changed:
            work = self._running.pop(slot)
            self._finished += 1
            self._changed.notify_all()
        work.ticket.put(last)

    def _release(self, which: Sequence[int]) -> None:
        """The device goes on with a row until it hears that nobody wants it."""
        mask = np.zeros(self.config.slots, bool)
        mask[list(which)] = True
        self._rows = slots.release(self._rows, mask)

    def _warm_programs(self) -> None:
        """Programs that requests of a warm-up do not reach."""
        self._release([])
        self._rows = slots.copy_prompt(self._rows, jnp.int32(0), jnp.int32(0))
        for top in (0, self._top):
            self._burst(top)
        jax.block_until_ready(self._rows)
        self._histories = [np.zeros(0, np.int64) for _ in range(self.config.slots)]


def _alternatives(top: TopTokens, count: int, where: int | tuple[int, int]) -> Alternatives:
    tokens, logprobs = (np.asarray(array)[where][:count].tolist() for array in top)
    return tuple(zip(tokens, logprobs, strict=True))


def _common_prefix(one: Int[np.ndarray, " A"], two: Int[np.ndarray, " B"]) -> int:
    size = min(len(one), len(two))
    different = np.flatnonzero(one[:size] != two[:size])
    return int(different[0]) if len(different) else size
