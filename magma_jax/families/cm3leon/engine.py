"""Results of prompts: requests for drawings, edits, texts and gaps, and what stands beside them."""

import functools
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from magma_jax.families.cm3leon.decoding import Request, Result, run_requests
from magma_jax.families.cm3leon.loading import Loaded
from magma_jax.families.cm3leon.media import Item, Media, Pair
from magma_jax.families.cm3leon.options import DrawOptions
from magma_jax.families.cm3leon.prompts import (
    EDIT,
    Codes,
    Gap,
    Infilling,
    Missing,
    Segment,
    beside,
    document_prefix,
    drawing_streams,
    edit_streams,
    edit_streams_beside,
    lay_out_gaps,
)
from magma_jax.inference.answers import ImageOptions
from magma_jax.inference.decoding.config import SEED_BITS, SamplingConfig
from magma_jax.inference.decoding.streams import Combine, Place, StreamRules
from magma_jax.inference.ranking import best_candidates
from magma_jax.typing import Int

T = TypeVar("T")

# Gaps of ``CM3Leon.infill``.
GAP, IMAGE_GAP = Gap("text"), Gap("image")

# Examples per batch.
EXAMPLES = 8


class Plan(NamedTuple):
    """Prompts of drawings or edits.

    Attributes:
        texts: what each asks for, as ``DrawOptions.score`` sees it.
        streams: ids of its streams.
        combine: how their logits are combined.
        documents: segments of the documents of each stream.
    """

    texts: Sequence[str]
    streams: Sequence[tuple[np.ndarray, ...]]
    combine: Combine
    documents: Sequence[Sequence[Sequence[Sequence[Segment]]]]


class Engine:
    """A model's decoding.

    Args:
        loaded: the model.
        media: its tokenizers.
    """

    def __init__(self, loaded: Loaded, media: Media):
        self.config, self.graphdef, self.params, self.tokenizer = loaded[:4]
        self.media, self._saw_sentinels = media, loaded.saw_sentinels

    def edited(
        self,
        edits: Sequence[tuple[Any, str]],
        options: DrawOptions,
        template: str = EDIT,
        documents: Sequence[Sequence[Pair]] = (),
        batch: int = EXAMPLES,
    ) -> list[list[Result]]:
        """The best results of every edit."""
        return self.draw(self.plan_edits(edits, options, template, documents), options, batch=batch)

    def plan_edits(
        self,
        edits: Sequence[tuple[Any, str]],
        options: DrawOptions,
        template: str = EDIT,
        documents: Sequence[Sequence[Pair]] = (),
    ) -> Plan:
        """Prompts of edits."""
        media, config = self.media, self.config
        sources = [Codes(media.codes(image)) for image, _ in edits]
        asked = [instruction for _, instruction in edits]
        words, texts = media.encode(template), [media.encode(instruction) for instruction in asked]
        if config.references is None:
            streams = [
                edit_streams(words, source.codes, text, config.vocabulary, config.image_tokens)
                for source, text in zip(sources, texts, strict=True)
            ]
            pairs = [[[], [], []]] * len(edits)
            if any(documents):
                raise ValueError("documents of an edit stand beside the sequence; this model has no references")
        else:
            more = self._documents(documents, len(edits))
            shown = [[[words, source], *found] for source, found in zip(sources, more, strict=True)]
            streams = [
                edit_streams_beside(text, found, config.vocabulary, config.image_tokens)
                for text, found in zip(texts, shown, strict=True)
            ]
            pairs = [[found, found, []] for found in shown]
        if options.cd_k:
            raise ValueError("an edit is guided by image and instruction; leave cd_k out")
        if options.guidance == options.image_guidance == 1:
            return Plan(asked, [one[:1] for one in streams], "conditional", pairs)
        self._warn_unless_sentinels()
        return Plan(asked, streams, "edit", pairs)

    def of_texts(
        self,
        texts: Sequence[str],
        options: DrawOptions,
        documents: Sequence[Sequence[Pair]],
        batch: int = EXAMPLES,
    ) -> list[list[Result]]:
        """The best results of every text."""
        return self.draw(self.plan_texts(texts, options, documents), options, batch=batch)

    def plan_texts(self, texts: Sequence[str], options: DrawOptions, documents: Sequence[Sequence[Pair]] = ()) -> Plan:
        """Prompts of drawings."""
        layout, size = self.config.vocabulary, self.config.image_tokens
        pairs = self._documents(documents, len(texts))
        by_side = self.config.references is not None
        streams = [
            drawing_streams(self.media.encode(text), found, layout, size, null=options.null, beside=by_side)
            for text, found in zip(texts, pairs, strict=True)
        ]
        by_stream = [[found, found] for found in pairs]
        if options.guidance == 1 and not options.cd_k:
            return Plan(texts, [pair[:1] for pair in streams], "conditional", by_stream)
        self._warn_unless_sentinels()
        return Plan(texts, streams, "guide", by_stream)

    def _documents(self, documents: Sequence[Sequence[Pair]], count: int) -> list[list[list[Segment]]]:
        """Segments of the documents of ``count`` prompts."""
        pairs = [self.media.pairs(found) for found in documents] or [[]] * count
        if len(pairs) != count:
            raise ValueError(f"there are documents for {len(pairs)} prompts, but {count} prompts")
        return pairs

    def with_gaps(
        self, segments: Sequence[Segment], pairs: Sequence[Sequence[Segment]] = ()
    ) -> tuple[Int[np.ndarray, " S"], Infilling]:
        """Ids of a document with gaps behind retrieved ones, and the document alone."""
        layout, size = self.config.vocabulary, self.config.image_tokens
        laid = lay_out_gaps(segments, layout, size)
        prefix = document_prefix(pairs, layout, size, beside=self.config.references is not None)
        return np.concatenate([prefix, laid.ids[1:]]).astype(np.int32), laid

    def request(
        self,
        streams: Sequence[Int[np.ndarray, " S"]],
        pairs: Sequence[Sequence[Segment]] | Sequence[Sequence[Sequence[Segment]]],
        gaps: Sequence[Missing] = (),
        *,
        each: bool = False,
        **fields: Any,
    ) -> Request:
        """A request with what stands beside its streams; ``pairs`` are those of ``each`` of them, or of all."""
        by_stream: Any = pairs if each else [pairs] * len(streams)
        found = [
            beside(ids, one, self.config, self.tokenizer.decode, gaps)
            for ids, one in zip(streams, by_stream[: len(streams)], strict=True)
        ]
        return Request(streams=tuple(streams), given=tuple(one for one in found if one is not None), **fields)

    def draw(self, plan: Plan, options: DrawOptions, *, batch: int = EXAMPLES) -> list[list[Result]]:
        """``options.n`` images of every prompt, each the best of its candidates; with ``cd_k`` by CD-K or from both."""
        return self.best(plan, self.run(self.drawings(plan, options), plan.combine, batch=batch), options)

    def drawings(self, plan: Plan, options: DrawOptions) -> list[Request]:
        """Requests for all candidates of all images of every prompt, in order; the last of an image are by CD-K."""
        size = self.config.image_tokens
        sampling = sampling_of(options)
        guided = options.candidates - (options.candidates if options.contrasted is None else options.contrasted)
        return [
            self.request(
                prompt,
                found,
                each=True,
                limit=size,
                end=self.config.vocabulary.eos,
                place=Place.IMAGE,
                left=size,
                seed=options.seed + i,
                sampling=sampling,
                weight=options.guidance,
                image_weight=options.image_guidance,
                interval=options.interval,
                cd_k=options.cd_k if i % options.candidates >= guided else 0,
                cd_alpha=options.cd_alpha,
                amateur_temperature=options.amateur_temperature,
            )
            for prompt, found in zip(plan.streams, plan.documents, strict=True)
            for i in range(options.n * options.candidates)
        ]

    def best(self, plan: Plan, pool: Sequence[Result], options: DrawOptions) -> list[list[Result]]:
        """Of the results of ``drawings`` the best candidate of every image, by prompt."""
        best = best_candidates(
            [result.logprob for result in pool],
            options.candidates,
            [text for text in plan.texts for _ in range(options.n)],
            lambda: self.media.images_of(self.codes_of(pool)),
            options.score,
        )
        return list(batched([pool[place] for place in best], options.n))

    def codes_of(self, results: Sequence[Result]) -> Int[np.ndarray, "N T"]:
        """Codes of drawn images."""
        return np.stack([self.config.vocabulary.to_codes(result.ids) for result in results])

    def captioned(
        self,
        images: Sequence[Any],
        documents: Sequence[Sequence[Pair]],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        batch: int,
    ) -> list[Result]:
        """The texts before images."""
        requests = []
        for image, pairs in zip(images, self._documents(documents, len(images)), strict=True):
            ids, laid = self.with_gaps([GAP, Codes(self.media.codes(image))], pairs)
            ids = np.append(ids, self.config.vocabulary.sentinel(0)).astype(np.int32)
            requests.append(
                self.request(
                    [ids],
                    pairs,
                    laid.gaps,
                    limit=max_new_tokens,
                    end=self.config.vocabulary.eoss,
                    place=Place.TEXT,
                    texts=True,
                    sampling=sampling,
                    seed=seed,
                )
            )
        return self.run(requests, "conditional", batch=batch)

    def fill(
        self, parts: Sequence[Item], max_new_tokens: int, sampling: SamplingConfig, seed: int
    ) -> tuple[list[Segment], float]:
        """The segments of a document with its gaps filled in, and the log-probability of these."""
        layout, size = self.config.vocabulary, self.config.image_tokens
        segments = self.media.segments(parts)
        laid: Infilling = lay_out_gaps(segments, layout, size)
        ids, total = laid.ids, 0.0
        codes = {i: part.codes.copy() for i, part in enumerate(segments) if isinstance(part, Codes)}
        filled = list(segments)
        for number, gap in enumerate(laid.gaps):
            ids = np.append(ids, layout.sentinel(number)).astype(np.int32)
            request = self.request(
                [ids],
                (),
                laid.gaps,
                limit=gap.count or max_new_tokens,
                end=layout.eoss,
                place=Place.TEXT if gap.kind == "text" else Place.IMAGE,
                left=gap.count or 0,
                texts=gap.kind == "text",
                seed=_seed_of_gap(seed, number),
                sampling=sampling,
            )
            result = self.run([request], "conditional")[0]
            total += result.logprob
            if gap.kind == "text":
                filled[gap.segment] = layout.to_text(result.ids)
            else:
                image = codes.setdefault(gap.segment, np.zeros(size, np.int32))
                image[gap.places.start : gap.places.stop] = layout.to_codes(result.ids)
                filled[gap.segment] = Codes(image)
            ids = np.concatenate([ids, result.ids, [layout.eoss]]).astype(np.int32)
        return filled, total

    def run(self, requests: Sequence[Request], combine: Combine, *, batch: int = EXAMPLES) -> list[Result]:
        """Results of requests, in batches."""
        rules = StreamRules(self.config.vocabulary, self.config.image_tokens, combine)
        found: list[Result] = []
        for part in batched(requests, batch):
            found += run_requests(self.graphdef, self.params, part, rules, self.config.context_length)
        return found

    def _warn_unless_sentinels(self) -> None:
        if not self._saw_sentinels:
            _warn_once(
                "this model was trained left to right and never saw an empty prompt, so guidance has nothing to "
                "compare with; use guidance 1, or train it with data.spans"
            )


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to ``size`` items, consumed lazily."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _seed_of_gap(seed: int, number: int) -> int:
    """A seed for every gap of a document, which of the first one is the document's."""
    return seed if number == 0 else int(np.random.SeedSequence((seed % 2**SEED_BITS, number)).generate_state(1)[0])


def sampling_of(options: ImageOptions) -> SamplingConfig:
    """Sampling parameters of a drawing. Raises ValueError for a temperature that changes within it."""
    first, last = options.temperature or (1.0, 1.0)
    if first != last:
        raise ValueError("temperature: a cm3leon model draws with one temperature; give the same value twice")
    return SamplingConfig(temperature=first, top_p=options.top_p)
