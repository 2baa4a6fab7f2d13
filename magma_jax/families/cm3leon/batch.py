"""Continuous batching: drawings of many callers join and leave a running batch, each equal to the same one alone.

Between two bursts of codes, waiting requests take free slots, one for each of their streams, all or none. The beginning
of a prompt that another slot's cache holds is copied instead of run: that of another image of the same text, of the
same retrieved documents, or of the stream that holds the documents alone.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.families.cm3leon import slots as programs
from magma_jax.families.cm3leon.decoding import PROMPTS, Request, Result, check_request, given_places, stream_rows
from magma_jax.inference.decoding.sampling import sampling_rows, seed_key
from magma_jax.inference.decoding.streams import STREAMS, Place, StreamRules
from magma_jax.inference.pending import EngineError
from magma_jax.models.cm3leon import CM3LeonConfig
from magma_jax.models.references import Places, References
from magma_jax.nn.modules import Definition
from magma_jax.typing import Int, Params

# Fewest common positions to reuse: copying them takes a program of its own.
MIN_REUSED = 16
# Codes of a burst, between which requests join and leave.
STEPS = 16
# Slots of a request, at most.
WIDEST = max(STREAMS.values())


@dataclasses.dataclass(eq=False)
class _Job:
    """A caller's requests, and what is done with their results.

    Attributes:
        key: what the caller knows it by.
        finish: makes its result of those of all requests.
        results: those so far, by number of the request.
        count: number of requests.
    """

    key: Any
    finish: Callable[[list[Result]], Any]
    count: int
    results: dict[int, Result] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class _Running:
    """A request in its slots; its tokens so far."""

    job: _Job
    number: int
    request: Request
    slots: tuple[int, ...]
    ids: list[int] = dataclasses.field(default_factory=list)
    logprob: float = 0.0


@dataclasses.dataclass(eq=False)
class _Held:
    """A prompt that a slot's cache holds, and what stood beside it."""

    ids: Int[np.ndarray, " S"]
    salt: bytes


class StreamBatch:
    """Slots, and the requests in them. Not thread-safe.

    Args:
        config: of the model.
        graphdef: its definition.
        params: its weights.
        count: number of slots, at least three.
        context: positions of a slot.
        steps: codes of a burst.

    Attributes:
        reused: prompt positions that a cache held already, since the start.
        computed: prompt positions that were run.

    Raises:
        ValueError: fewer slots than a request may take, or another context than 2 positions to the model's.
    """

    def __init__(
        self,
        config: CM3LeonConfig,
        graphdef: Definition,
        params: Params,
        *,
        count: int,
        context: int | None = None,
        steps: int = STEPS,
    ):
        if count < WIDEST:
            raise ValueError(f"{count} slots are fewer than the {WIDEST} of an edit; give at least as many")
        if context is not None and not 1 < context <= config.context_length:
            raise ValueError(
                f"a context of {context} was asked for, but the model has {config.context_length} positions"
            )
        self._config, self._fixed, self._steps = config, (graphdef, params), steps
        self.count, self.context = count, context or config.context_length
        self._rules = StreamRules(config.vocabulary, config.image_tokens, "edit")
        self.reused = self.computed = 0
        self.reset()

    def reset(self) -> None:
        """Forgets all requests, at the start and after a failure."""
        self._waiting: collections.deque[tuple[_Job, int, Request]] = collections.deque()
        self._running: list[_Running] = []
        self._held: list[_Held | None] = [None] * self.count
        self._state = programs.empty_slots(
            *self._fixed, self._rows([]), self._references([], self.count), count=self.count, context=self.context
        )

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        return bool(self._waiting or self._running)

    @property
    def room(self) -> bool:
        """Whether further requests would not only wait."""
        return not self._waiting and len(self._free()) > 0

    def begin(self, key: Any, requests: Sequence[Request], finish: Callable[[list[Result]], Any]) -> None:
        """Accepts a caller's requests; when all have ended, ``step`` gives the ``key`` and ``finish`` of their results.

        Raises:
            ValueError: a request that the context has no room for.
        """
        for request in requests:
            check_request(request, self.context)
        job = _Job(key, finish, len(requests))
        self._waiting.extend((job, number, request) for number, request in enumerate(requests))

    def cancel(self, key: Any) -> None:
        """Forgets a caller's requests."""
        self._waiting = collections.deque(item for item in self._waiting if item[0].key is not key)
        gone = [one for one in self._running if one.job.key is key]
        self._leave(gone)

    def step(self) -> list[tuple[Any, Callable[[], Any]]]:
        """Admits what there is room for and draws a burst; keys of callers whose requests ended, and their results.

        Raises:
            EngineError: the streams of a request differ.
        """
        self._admit()
        if not self._running:
            return []
        before = [len(one.ids) for one in self._running]
        self._state, ids, logprobs = programs.burst(*self._fixed, self._state, rules=self._rules, steps=self._steps)
        walk, ids, logprobs = jax.device_get((self._state.walk, ids, logprobs))
        done = []
        for one, old in zip(self._running, before, strict=True):
            new = int(walk.count[one.slots[0]]) - old
            for slot in one.slots:
                if walk.count[slot] != walk.count[one.slots[0]] or (ids[slot, :new] != ids[one.slots[0], :new]).any():
                    raise EngineError("a request lost one of its streams; nothing was drawn with what was left")
            one.ids += ids[one.slots[0], :new].tolist()
            one.logprob += float(logprobs[one.slots[0], :new].sum())
            if walk.done[one.slots[0]]:
                done.append(one)
        finished = []
        for one in done:
            ended = bool(walk.ended[one.slots[0]])
            tokens = np.array(one.ids[: len(one.ids) - ended], np.int32)
            one.job.results[one.number] = Result(tokens, ended, one.logprob)
            if len(one.job.results) == one.job.count:
                finished.append(one.job)
        self._running = [one for one in self._running if one not in done]
        return [
            (job.key, functools.partial(job.finish, [job.results[i] for i in range(job.count)])) for job in finished
        ]

    def _free(self) -> list[int]:
        taken = {slot for one in self._running for slot in one.slots}
        return [slot for slot in range(self.count) if slot not in taken]

    def _leave(self, gone: Sequence[_Running]) -> None:
        if gone:
            which = np.zeros(self.count, bool)
            which[[slot for one in gone for slot in one.slots]] = True
            self._state = programs.release(self._state, which)
            self._running = [one for one in self._running if one not in gone]

    def _admit(self) -> None:
        """Runs the prompts of the first waiting requests that fit, in groups."""
        group: list[tuple[_Running, int, int, int]] = []  # request, stream, slot, start
        while self._waiting:
            job, number, request = self._waiting[0]
            free = self._free()
            if len(request.streams) > len(free):
                break
            chosen: list[tuple[int, int, int]] = []
            for stream in range(len(request.streams)):
                # The slots of its own other streams are not run yet.
                own = [slot for _, slot, _ in chosen]
                slot, start, source = self._choose(request, stream, free, own)
                if source is not None and any(entry[2] == source for entry in group):
                    self._run(group)
                    group = []
                if source is not None:
                    self._state = programs.copy_cache(self._state, np.int32(source), np.int32(slot))
                free.remove(slot)
                self._held[slot] = _Held(request.streams[stream], _salt(request, stream))
                chosen.append((stream, slot, start))
            self._waiting.popleft()
            one = _Running(job, number, request, tuple(slot for _, slot, _ in chosen))
            self._running.append(one)
            group += [(one, *entry) for entry in chosen]
        if group:
            self._run(group)

    def _choose(
        self, request: Request, stream: int, free: Sequence[int], own: Sequence[int]
    ) -> tuple[int, int, int | None]:
        """A slot, how much of the prompt its cache will hold, and the slot to copy that from, if another."""
        prompt, salt = request.streams[stream], _salt(request, stream)
        common = [0 if slot in own else _common(held, prompt, salt) for slot, held in enumerate(self._held)]
        best = int(np.argmax(common))
        if common[best] < MIN_REUSED:
            emptiest = min(free, key=lambda slot: common[slot] if self._held[slot] else -1)
            return emptiest, 0, None
        if best in free:
            return best, common[best], None
        return min(free, key=lambda slot: common[slot]), common[best], best

    def _run(self, group: Sequence[tuple[_Running, int, int, int]]) -> None:
        """Runs the rest of prompts; their number is padded to a power of two."""
        size = 1 << (len(group) - 1).bit_length()
        rest = [one.request.streams[stream][start:] for one, stream, _, start in group]
        length = PROMPTS.fit(max(map(len, rest)))
        tokens = np.full((size, length), self._rules.layout.pad, np.int32)
        read, drawn = np.full((size, length), -1, np.int32), np.full((size, length), -1, np.int32)
        slot, begin, lengths = np.full(size, self.count, np.int32), np.zeros(size, np.int32), np.ones(size, np.int32)
        for row, ((one, stream, where, start), ids) in enumerate(zip(group, rest, strict=True)):
            slot[row], begin[row], lengths[row], tokens[row, : len(ids)] = where, start, len(ids), ids
            if one.request.given:
                places = given_places(one.request, stream, self._rules)
                read[row, : len(ids)], drawn[row, : len(ids)] = (part[start:] for part in places)
        admission = programs.Admission(
            slot=jnp.asarray(slot),
            start=jnp.asarray(begin),
            length=jnp.asarray(lengths),
            tokens=jnp.asarray(tokens),
            places=Places(jnp.asarray(read), jnp.asarray(drawn)),
            rows=self._rows([(one.request, one.slots) for one, *_ in group], size),
            references=self._references([(one.request, stream) for one, stream, *_ in group], size),
        )
        self._state = programs.admit(*self._fixed, self._state, admission, rules=self._rules)
        self.computed += int(lengths[: len(group)].sum())
        self.reused += int(begin.sum())

    def _rows(self, asked: Sequence[tuple[Request, tuple[int, ...]]], size: int = 0) -> programs.SlotRows:
        """What requests in their slots ask for, padded with requests of no tokens."""
        size = size or self.count
        nothing = Request(streams=(), limit=0, end=0, place=Place.TEXT)
        padded = [*(request for request, _ in asked), *[nothing] * (size - len(asked))]
        streams = np.zeros((size, WIDEST), np.int32)
        for row, (_, where) in enumerate(asked):
            streams[row] = [*where, *[where[-1]] * (WIDEST - len(where))]
        keys = jnp.stack([seed_key(request.seed) for request in padded])
        return programs.SlotRows(
            keys=jax.random.key_data(keys),
            sampling=sampling_rows([request.sampling for request in padded]),
            asked=stream_rows(padded),
            streams=jnp.asarray(streams),
        )

    def _references(self, asked: Sequence[tuple[Request, int]], size: int) -> References | None:
        config = self._config.references
        if config is None and not self._config.grid_positions:
            return None
        images, words = (0, 0) if config is None else (config.images, config.caption_words)
        codes = np.zeros((size, images, self._config.image_tokens), np.int32)
        captions = np.zeros((size, images + 1, words), np.int32)
        for row, (request, stream) in enumerate(asked):
            codes[row], captions[row] = request.given[stream].codes, request.given[stream].captions
        return References(jnp.asarray(codes), jnp.asarray(captions))


def _common(held: _Held | None, prompt: Int[np.ndarray, " S"], salt: bytes) -> int:
    """Common positions of a prompt with one in a cache, without the last of either.

    A prompt's last position must be run, since the first token is drawn from its logits. In an idle slot it may be
    overwritten.
    """
    if held is None or held.salt != salt:
        return 0
    size = min(len(held.ids), len(prompt)) - 1
    different = np.flatnonzero(held.ids[:size] != prompt[:size])
    return int(different[0]) if len(different) else max(size, 0)


def _salt(request: Request, stream: int) -> bytes:
    """What else the cache of a prompt depends on: images beside it. Its places follow from its ids."""
    if not request.given:
        return b""
    return hashlib.sha256(b"".join(part.tobytes() for part in request.given[stream][:2])).digest()
