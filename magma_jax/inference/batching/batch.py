"""The running batch of an engine: its slots on the device, what their caches hold, and the images encoded so far.

What a slot's cache still holds of an earlier prompt is not computed again: the same image with another question, or
the same few-shot examples before another image.
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

# Below this many common positions a prompt is run anew: looking back costs a program of its own.
MIN_REUSED = 16

# Prompts that are run together: so many, largest first, as long as they have no more positions than this. From there on
# the products take the time, not the weights that are read for them.
GROUPS = (8, 4, 1)
GROUP_POSITIONS = 256


class Place(NamedTuple):
    """Where a request goes.

    Attributes:
        slot: which.
        start: positions of its prompt that the slot's cache holds already.
    """

    slot: int
    start: int


class Entry(NamedTuple):
    """A request on its way to its slot."""

    place: Place
    prompt: PromptLayout
    options: RequestOptions
    guide: Guide | None = None

    @property
    def length(self) -> int:
        """Positions that have to be run."""
        return len(self.prompt) - self.place.start


class _Held:
    """What a slot's cache holds: the first ``length`` rows of ``PromptLayout.identity``, and their salt."""

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
        """How many of the first ``length`` positions are those of a prompt."""
        if prompt.salt != self.salt:
            return 0
        size = min(length, len(prompt))
        different = np.flatnonzero((self.rows[:size] != prompt.identity[:size]).any(axis=1))
        return int(different[0]) if len(different) else size


class SlotBatch:
    """Slots, each of which one request has for a while, on one device or mesh. For a single thread.

    Nothing here waits for the device: what it gives are arrays in the making.

    Args:
        model: any that writes token by token.
        count: slots.
        context: positions of each.
        images: images that are kept encoded; one prompt may have as many.
        steps: tokens of a burst of decoding.
        reuse: whether prompts that begin like an earlier one share its cache.
    """

    def __init__(self, model: TokenGenerator, *, count: int, context: int, images: int, steps: int, reuse: bool):
        self.model, self.count, self.images, self.steps, self.reuse = model, count, images, steps, reuse
        self.buckets = SEQUENCES.up_to(context)
        self.encoded = 0  # images, since the start
        self._context = context
        self._fixed = (model.graphdef, model.params)
        self._eos_id, self._vocabulary = model.tokenizer.eos_id, model.lm_config.head_rows
        self._top = min(MAX_TOP_LOGPROBS, model.lm_config.vocab_rows)
        self.reset()

    def reset(self) -> None:
        """Fresh device state: at the start, and after a failure that may have taken the old one with it."""
        empty = slots.empty_slots(*self._fixed, self.count, self._context, self.images)
        self._rows, self._table = slots.commit_like(self.model.params, empty)
        self._row_of: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._held = [_Held(self._context) for _ in range(self.count)]

    def place(self, prompt: PromptLayout, free: Set[int], just_placed: Sequence[Entry]) -> Place | None:
        """A slot for a prompt; the slot's cache then is the prompt's.

        None if the prompt begins like one that is placed but not admitted yet: admit those first.
        """
        slot, start, source = self._choose(prompt, free)
        if source is not None:
            if any(entry.place.slot == source for entry in just_placed):
                return None
            self._rows = slots.copy_prompt(self._rows, np.int32(source), np.int32(slot))
        self._held[slot].take(prompt)
        return Place(slot, start)

    def _choose(self, prompt: PromptLayout, free: Set[int]) -> tuple[int, int, int | None]:
        """The slot, how much of the prompt its cache will hold, and the slot to copy that from, if another."""
        emptiest = min(free, key=lambda slot: self._held[slot].length)  # has the least to lose
        if not self.reuse:
            return emptiest, 0, None
        # The newest token of a running request was sampled but not run yet: the cache does not hold it.
        lengths = [held.length if slot in free else held.length - 1 for slot, held in enumerate(self._held)]
        # At least one position has to be run: the first token is sampled from its logits.
        most = len(prompt) - 1
        common = [min(held.common(prompt, size), most) for held, size in zip(self._held, lengths, strict=True)]
        best = max(range(self.count), key=lambda slot: (common[slot], slot in free))
        if common[best] < MIN_REUSED:
            return emptiest, 0, None
        return (best, common[best], None) if best in free else (emptiest, common[best], best)

    def admit(self, entries: Sequence[Entry]) -> list[tuple[list[Entry], SampledTokens]]:
        """Runs prompts in the slots they were placed in, together where that is quicker, and draws the first tokens.

        Returns what was run together, each with its first tokens, a row an entry.
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
        """Whether there are so many, and room for the images of all of them at once."""
        images = sum(len(entry.prompt.pixels) for entry in entries[:size])
        return len(entries) >= size and images <= self.images

    def _groups(self, bucket: int) -> list[int]:
        """How many prompts of a padded length are run together."""
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
        """What may come next in each row: all, where nothing guides it."""
        allowed = everything(rows, self._vocabulary)
        for row, guide in guides.items():
            if guide is not None:
                allowed[row] = guide.mask
        return allowed

    def _image_row(self, prompt: PromptLayout, key: bytes) -> int:
        """Where an image stands in the table; it is encoded if it is not there, in place of the least used one."""
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
        """A burst of decoding: what was sampled, a row a slot and a column a step, and how much of it counts.

        Args:
            top: whether somebody wants the likeliest tokens too, which takes another program.
            enough: the burst ends when so many requests have.
            guides: of slots whose answers are constrained. The burst then has one step: what may come after it depends
                on what it draws.
        """
        # More than there are slots never end.
        ended = np.int32(self.count + 1 if enough is None else enough)
        allowed = None if guides is None else self._allowed(self.count, guides)
        options = {"steps": self.steps if allowed is None else 1, "top": self._top if top else 0}
        self._rows, sampled, counts = self._run(slots.decode, ended, allowed, **options)
        return sampled, counts

    def add_tokens(self, slot: int, tokens: Sequence[int]) -> None:
        """Notes what a slot's request has sampled."""
        self._held[slot].add(tokens)

    def end(self, slot: int) -> None:
        """A request has left: its newest token was sampled but never run, so the cache does not hold it."""
        self._held[slot].length = max(self._held[slot].length - 1, 0)

    def release(self, which: Sequence[int]) -> None:
        """The device goes on with a row until it hears that nobody wants it."""
        mask = np.zeros(self.count, bool)
        mask[list(which)] = True
        self._rows = slots.release(self._rows, mask)

    def warm_up(self) -> None:
        """Compiles every program, by running each for no slot at all. Nothing may be running."""
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
        self._row_of.clear()  # the table's first row has changed

    def _run(self, program, *arguments, **options):
        return program(*self._fixed, self._rows, *arguments, eos_id=self._eos_id, **options)
