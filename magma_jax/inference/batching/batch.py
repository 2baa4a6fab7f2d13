"""The running batch of an engine: slots on the device, the contents of their caches, and encoded images.

Prompt prefixes that a slot's cache still holds are reused: the same image with another question, or the same few-shot
examples before another image.
"""

import collections
import functools
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import jax
import numpy as np

from magma_jax.inference.batching import slots
from magma_jax.inference.batching.requests import MAX_TOP_LOGPROBS, RequestOptions
from magma_jax.inference.buckets import SEQUENCES
from magma_jax.inference.decoding.config import seed_words
from magma_jax.inference.decoding.decode import SampledTokens
from magma_jax.inference.decoding.sampling import sampling_rows
from magma_jax.inference.generator import TokenGenerator
from magma_jax.inference.prompts import WORD, PromptLayout, lay_out_tokens
from magma_jax.inference.structured.constraints import installed
from magma_jax.inference.structured.grammars import Guide, everything
from magma_jax.typing import Array, Int, UInt32

# Fewest common positions to reuse: continuing from a cached prefix takes a separate program.
MIN_REUSED = 16

# Sizes of groups of prompts that are run together, and the most positions of a group: beyond these the matmuls are
# compute-bound, and grouping saves nothing.
GROUPS = (8, 4, 1)
GROUP_POSITIONS = 256


class Place(NamedTuple):
    """The slot of a request.

    Attributes:
        slot: index of the slot.
        start: number of prompt positions that the slot's cache already holds.
    """

    slot: int
    start: int


class Entry(NamedTuple):
    """A request that is being admitted to its slot."""

    place: Place
    prompt: PromptLayout
    options: RequestOptions
    guide: Guide | None = None

    @property
    def length(self) -> int:
        """Number of positions to run."""
        return len(self.prompt) - self.place.start


class _Held:
    """Contents of a slot's cache: the first ``length`` rows of ``PromptLayout.identity``, and their salt."""

    def __init__(self, context: int):
        self.rows, self.length, self.salt = np.zeros((context, 3), np.int64), 0, b""

    def take(self, prompt: PromptLayout) -> None:
        self.length, self.salt = len(prompt), prompt.salt
        self.rows[: self.length] = prompt.identity

    def add(self, tokens: Sequence[int]) -> None:
        end = self.length + len(tokens)
        self.rows[self.length : end] = 0
        self.rows[self.length : end, 0] = tokens
        self.length = end

    def common(self, prompt: PromptLayout, length: int) -> int:
        """Length of the common prefix with a prompt, within the first ``length`` positions."""
        if prompt.salt != self.salt:
            return 0
        size = min(length, len(prompt))
        different = np.flatnonzero((self.rows[:size] != prompt.identity[:size]).any(axis=1))
        return int(different[0]) if len(different) else size


class SlotBatch:
    """Slots on one device or mesh, each assigned to one request at a time. Not thread-safe.

    Calls do not wait for the device: the returned arrays are asynchronous.

    Args:
        model: any autoregressive text model.
        count: number of slots.
        context: positions per slot.
        images: size of the table of encoded images; also the maximum per prompt.
        steps: tokens per decoding burst.
        reuse: whether prompts reuse the cache of an earlier one with a common prefix.
    """

    def __init__(self, model: TokenGenerator, *, count: int, context: int, images: int, steps: int, reuse: bool):
        self.model, self.count, self.images, self.steps, self.reuse = model, count, images, steps, reuse
        self.buckets = SEQUENCES.up_to(context)
        self.encoded = 0  # images encoded since the start
        self._context = context
        self._fixed = (model.graphdef, model.params)
        self._ends, self._vocabulary = model.tokenizer.end_ids, model.lm_config.head_rows
        self._top = min(MAX_TOP_LOGPROBS, model.lm_config.vocab_rows)
        self.reset()

    def reset(self) -> None:
        """Creates fresh device state, at the start and after a failure that may have destroyed the old one."""
        empty = slots.empty_slots(*self._fixed, self.count, self._context, self.images)
        self._rows, self._table = slots.commit_like(self.model.params, empty)
        self._row_of: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._held = [_Held(self._context) for _ in range(self.count)]

    def place(self, prompt: PromptLayout, free: Set[int], just_placed: Sequence[Entry]) -> Place | None:
        """Assigns a slot, and its cache, to a prompt.

        Returns None if the prompt shares a prefix with one that is placed but not admitted yet: admit those first.
        """
        slot, start, source = self._choose(prompt, free)
        if source is not None:
            if any(entry.place.slot == source for entry in just_placed):
                return None
            self._rows = slots.copy_prompt(self._rows, np.int32(source), np.int32(slot))
        self._held[slot].take(prompt)
        return Place(slot, start)

    def _choose(self, prompt: PromptLayout, free: Set[int]) -> tuple[int, int, int | None]:
        """The slot, the number of reused positions, and the slot to copy them from, if another."""
        emptiest = min(free, key=lambda slot: self._held[slot].length)  # has the least to lose
        if not self.reuse:
            return emptiest, 0, None
        # The newest token of a running request has not been run yet, so the cache does not hold it.
        lengths = [held.length if slot in free else held.length - 1 for slot, held in enumerate(self._held)]
        # At least one position must be run, since the first token is sampled from its logits.
        most = len(prompt) - 1
        common = [min(held.common(prompt, size), most) for held, size in zip(self._held, lengths, strict=True)]
        best = max(range(self.count), key=lambda slot: (common[slot], slot in free))
        if common[best] < MIN_REUSED:
            return emptiest, 0, None
        return (best, common[best], None) if best in free else (emptiest, common[best], best)

    def admit(self, entries: Sequence[Entry]) -> list[tuple[list[Entry], SampledTokens]]:
        """Runs prompts in their slots, in groups where that is faster, and samples the first tokens.

        Returns the groups, each with its first tokens, one row per entry.
        """
        waiting = sorted(entries, key=lambda entry: -entry.length)
        done = []
        while waiting:
            bucket = self.buckets.fit(waiting[0].length)
            size = next(size for size in self._groups(bucket) if size == 1 or self._fit(waiting, size))
            group, waiting = waiting[:size], waiting[size:]
            admission = self._admission(group, bucket)  # adds to the table
            self._rows, sampled = self._run(slots.admit, self._table, admission, top=self._top)
            done.append((group, sampled))
        return done

    def _fit(self, entries: Sequence[Entry], size: int) -> bool:
        """Whether there are ``size`` entries whose images fit in the table together."""
        images = sum(len(entry.prompt.pixels) for entry in entries[:size])
        return len(entries) >= size and images <= self.images

    def _groups(self, bucket: int) -> list[int]:
        """Group sizes for prompts of a padded length."""
        return [size for size in GROUPS if size == 1 or (size <= self.count and size * bucket <= GROUP_POSITIONS)]

    def _admission(self, entries: Sequence[Entry], bucket: int) -> slots.Admission[np.ndarray]:
        tokens = np.zeros((len(entries), bucket), np.int32)
        places = np.full((len(entries), bucket), WORD, np.int32)
        seen = np.zeros((len(entries), self._vocabulary), bool)
        for row, (place, prompt, *_) in enumerate(entries):
            new = len(prompt) - place.start
            tokens[row, :new] = prompt.tokens[place.start :]
            places[row, :new] = prompt.table_places(functools.partial(self._image_row, prompt), place.start)
            seen[row, prompt.tokens[prompt.places == WORD]] = True
        options = [entry.options for entry in entries]

        def numbers(values: Sequence[int | tuple[int, int]], dtype: type = np.int32) -> np.ndarray:
            return np.array(values, dtype)

        return slots.Admission(
            slot=numbers([entry.place.slot for entry in entries]),
            start=numbers([entry.place.start for entry in entries]),
            length=numbers([entry.length for entry in entries]),
            tokens=tokens,
            places=places,
            seen=seen,
            seed=numbers([seed_words(one.seed) for one in options], np.uint32),
            sampling=sampling_rows([one.sampling for one in options]),
            limit=numbers([one.max_new_tokens for one in options]),
            minimum=numbers([one.min_new_tokens for one in options]),
            allowed=self._allowed(len(entries), {row: entry.guide for row, entry in enumerate(entries)}),
        )

    def _allowed(self, rows: int, guides: Mapping[int, Guide | None]) -> UInt32[np.ndarray, "{rows} W"]:
        """Masks of the allowed next tokens, one row each; unconstrained rows allow all."""
        allowed = everything(rows, self._vocabulary)
        for row, guide in guides.items():
            if guide is not None:
                allowed[row] = guide.mask
        return allowed

    def _image_row(self, prompt: PromptLayout, key: bytes) -> int:
        """Row of an image in the table; a missing image is encoded and replaces the least used one."""
        if key in self._row_of:
            self._row_of.move_to_end(key)
            return self._row_of[key]
        if len(self._row_of) < self.images:
            row = len(self._row_of)
        else:
            _, row = self._row_of.popitem(last=False)
        self._add_image(prompt.pixels[key], row)
        self._row_of[key] = row
        self.encoded += 1
        return row

    def _add_image(self, pixels: np.ndarray, row: int) -> None:
        self._table = slots.add_image(*self._fixed, self._table, pixels[None], np.int32(row))

    def decode(
        self, *, top: bool, enough: int | None = None, guides: Mapping[int, Guide] | None = None
    ) -> tuple[SampledTokens, Int[Array, " B"]]:
        """Runs a decoding burst; returns the sampled tokens (slots x steps) and the number of valid ones per slot.

        Args:
            top: whether to return the likeliest tokens too, which takes another program.
            enough: the burst ends when this many requests have finished.
            guides: guides of slots with constrained answers. The burst then has a single step, since the next mask
                depends on the sampled token.
        """
        # More than the number of slots: never reached.
        ended = np.int32(self.count + 1 if enough is None else enough)
        allowed = None if guides is None else self._allowed(self.count, guides)
        options = {"steps": self.steps if allowed is None else 1, "top": self._top if top else 0}
        self._rows, sampled, counts = self._run(slots.decode, ended, allowed, **options)
        return sampled, counts

    def add_tokens(self, slot: int, tokens: Sequence[int]) -> None:
        """Records the tokens that a slot's request has sampled."""
        self._held[slot].add(tokens)

    def end(self, slot: int) -> None:
        """Marks a request as finished; its newest token was never run, so the cache does not hold it."""
        self._held[slot].length = max(self._held[slot].length - 1, 0)

    def release(self, which: Sequence[int]) -> None:
        """Makes slots idle on the device, which otherwise continues to decode them."""
        mask = np.zeros(self.count, bool)
        mask[list(which)] = True
        self._rows = slots.release(self._rows, mask)

    def warm_up(self) -> None:
        """Compiles every program by running it without a slot. No request may be running."""
        size = self.model.images.size
        self._add_image(np.zeros((size, size, 3), np.uint8), 0)
        nowhere = Place(self.count, 0)
        prompt = lay_out_tokens([0], 1)
        for bucket in self.buckets.sizes:
            for size in self._groups(bucket):
                idle = self._admission([Entry(nowhere, prompt, RequestOptions(1))] * size, bucket)
                self._rows, _ = self._run(slots.admit, self._table, idle, top=self._top)
        self.release([])
        self._rows = slots.copy_prompt(self._rows, np.int32(0), np.int32(0))
        for guides in (None, {}) if installed() else (None,):
            for top in (False, True):
                self.decode(top=top, guides=guides)
        jax.block_until_ready(self._rows)
        self._row_of.clear()  # the first row of the table was overwritten

    def _run(self, program, *arguments, **options):
        return program(*self._fixed, self._rows, *arguments, ends=self._ends, **options)
