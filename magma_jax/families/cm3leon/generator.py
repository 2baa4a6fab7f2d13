"""The interface for users: images and texts in, images and texts out.

    model = CM3Leon.from_checkpoint("runs/cm3leon_quickstart")
    model.generate_image("a red car", n=4)[0].save("car.png")
    model.caption(ImageInput("cat.png"))
    model.edit(ImageInput("woman.png"), "make the skin tone dark")[0]
    model.infill(["a woman", GAP, ImageInput("woman.png")])

Calls change no state, so the same call gives the same answer.
"""

import functools
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from magma_jax.data.documents.document import MOST_RETRIEVED
from magma_jax.data.images import ImageInput
from magma_jax.families.cm3leon.decoding import Request, Result, run_requests
from magma_jax.families.cm3leon.image_codes import tokenizer_params
from magma_jax.families.cm3leon.loading import Loaded, load_cm3leon
from magma_jax.families.cm3leon.options import DrawOptions
from magma_jax.families.cm3leon.prompts import (
    EDIT,
    Codes,
    Gap,
    Infilling,
    Segment,
    check_sentinels,
    document_prefix,
    drawing_streams,
    edit_streams,
    lay_out_gaps,
)
from magma_jax.families.vqgan.generator import ImageTokenizer
from magma_jax.inference.answers import Answer, AnswerOptions, Canvas, ImageOptions
from magma_jax.inference.decoding.config import SEED_BITS, SamplingConfig
from magma_jax.inference.decoding.streams import Combine, Place, StreamRules
from magma_jax.inference.generator import Makes
from magma_jax.inference.prompts import Prompt, check_prompt
from magma_jax.runtime.compile import trim_after_compile
from magma_jax.typing import Int

T = TypeVar("T")

# Gaps of ``infill``.
GAP, IMAGE_GAP = Gap("text"), Gap("image")

# A retrieved document: a text and its image.
Pair: TypeAlias = tuple[str, "ImageInput | Image.Image | Codes"]

# Examples per batch.
EXAMPLES = 8


class Hidden:
    """An image of which a part is missing, for ``CM3Leon.infill``.

    Args:
        image: the image.
        mask: (height, width), True where it is missing; a code is missing if any of its pixels is.
    """

    def __init__(self, image: ImageInput | Image.Image, mask: np.ndarray):
        self.image, self.mask = image, np.asarray(mask, bool)


Item: TypeAlias = "str | Gap | ImageInput | Image.Image | Hidden | Codes"


class CM3Leon:
    """A CM3Leon model with its weights and tokenizers."""

    def __init__(self, loaded: Loaded):
        trim_after_compile()
        self.config, self.graphdef, self.params, self.tokenizer = loaded[:4]
        self._saw_sentinels = loaded.saw_sentinels
        self.image_tokens = self.config.image_tokens
        self.image_size = 0 if self.config.tokenizer is None else self.config.tokenizer.image_size
        self.images: ImageTokenizer | None = None
        if self.config.tokenizer is not None:
            self.images = ImageTokenizer(self.config.tokenizer, tokenizer_params(self.params))
        self.makes: frozenset[Makes] = frozenset({"text", "image", "edit"} if self.images else {"text"})

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, *, dtype: str | None = None, mesh: Mesh | None = None, ema: bool | None = None
    ) -> "CM3Leon":
        """Loads a run folder of ``train.py`` or a converted model folder.

        Args:
            path: the folder.
            dtype: dtype of weights and activations, such as ``bfloat16``; default: the config's.
            mesh: devices to shard the weights over; default: one device.
            ema: whether to use a run's moving averages; default: whichever the run was validated with.

        Raises:
            CheckpointError: no such folder, one of another family, or ``ema`` for one that keeps no averages.
        """
        return cls(load_cm3leon(path, dtype, mesh, ema))

    def generate_image(
        self,
        text: str,
        *,
        n: int = 1,
        guidance: float = 3.0,
        temperature: float = 1.0,
        top_p: float = 0.9,
        seed: int = 0,
        documents: Sequence[Pair] = (),
        **options: Any,
    ) -> list[Image.Image]:
        """Draws ``n`` images of a text.

        Args:
            text: what to draw.
            n: number of images; image i has seed ``seed`` + i.
            guidance: weight of guidance by the text; 1 for none.
            temperature: of the draws; 0 takes the likeliest code.
            top_p: draws from the likeliest codes of this mass.
            seed: seed of the first image.
            documents: retrieved pairs of text and image to put before the text, at most 3.
            options: further fields of ``options.DrawOptions``.

        Raises:
            ValueError: a value out of range, a model without image tokenizer, or no room in the context.
        """
        wanted = DrawOptions(
            n=n, guidance=guidance, temperature=(temperature, temperature), top_p=top_p, seed=seed, **options
        )
        return self._images(self.draw_codes([text], wanted, documents=[documents])[0])

    def caption(
        self,
        image: ImageInput | Image.Image | Codes,
        *,
        max_new_tokens: int = 64,
        sampling: SamplingConfig = SamplingConfig(),
        seed: int = 0,
    ) -> str:
        """Describes an image: its text is the gap before it."""
        return str(self.infill([GAP, image], max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)[0])

    def edit(
        self,
        image: ImageInput | Image.Image | Codes,
        instruction: str,
        *,
        n: int = 1,
        guidance: float = 3.0,
        image_guidance: float = 1.5,
        temperature: float = 1.0,
        top_p: float = 0.9,
        seed: int = 0,
        template: str = EDIT,
        **options: Any,
    ) -> list[Image.Image]:
        """Changes an image as an instruction says, with guidance by both (section 4.1).

        Args:
            image: the image.
            instruction: what to change.
            guidance: weight of the instruction.
            image_guidance: weight of the image.
            template: text before the image that the model was tuned with.
            n, temperature, top_p, seed, options: as for ``generate_image``.
        """
        wanted = DrawOptions(
            n=n,
            guidance=guidance,
            image_guidance=image_guidance,
            temperature=(temperature, temperature),
            top_p=top_p,
            seed=seed,
            **options,
        )
        return self._images(self._codes_of(self._edited([(image, instruction)], wanted, template)[0]))

    def infill(
        self,
        parts: Sequence[Item],
        *,
        max_new_tokens: int = 64,
        sampling: SamplingConfig = SamplingConfig(),
        seed: int = 0,
    ) -> list[str | Image.Image]:
        """Fills in the gaps of a document, in order, and returns it complete: each text and each image.

        Args:
            parts: texts, images, ``GAP`` for a missing text or part of a text, ``IMAGE_GAP`` for a missing image, and
                ``Hidden`` images. Neighbouring texts and text gaps are one text; a part of a text after a gap begins
                with its space.
            max_new_tokens: maximum number of new tokens of each text gap.
            sampling: sampling parameters.
            seed: seed of the draws.

        Raises:
            ValueError: no gap, or no room in the context.
        """
        return self._join(self._fill(parts, max_new_tokens, sampling, seed)[0])

    def answers(
        self,
        prompts: Iterable[Prompt],
        options: AnswerOptions | ImageOptions = AnswerOptions(),
        *,
        count: int | None = None,
    ) -> Iterator[list[Answer]]:
        """The answers to every prompt, see ``inference.generator.Generator``.

        ``ImageOptions`` (or ``DrawOptions``): a text is drawn; an image and a text are an edit, or, with
        ``ImageOptions.mask``, the image is completed.

        ``AnswerOptions``: the answer to one image is the end of the text before it, as in "Question: ... Answer:";
        anything else is continued, by images too if the model has a tokenizer and ``max_new_tokens`` leave room.
        """
        for batch in _batched(prompts, EXAMPLES):
            checked = [check_prompt(prompt) for prompt in batch]
            if isinstance(options, ImageOptions):
                yield from self._drawn(checked, options)
            else:
                yield from self._written(checked, options)

    def draw_codes(
        self, texts: Sequence[str], options: DrawOptions, *, documents: Sequence[Sequence[Pair]] = ()
    ) -> list[Int[np.ndarray, "N T"]]:
        """Codes of the images of every text; ``documents`` are the retrieved pairs of each. As ``generate_image``."""
        return [self._codes_of(found) for found in self._of_texts(texts, options, documents)]

    def continue_ids(
        self,
        prompts: Sequence[Int[np.ndarray, " S"]],
        requests: Sequence[dict[str, Any]],
        combine: Combine,
        **rules: Any,
    ) -> list[Result]:
        """Continues prompts that are given as ids, by fields of ``decoding.Request``.

        Raises:
            ValueError: sentinels that are not balanced, or no room in the context.
        """
        for prompt in prompts:
            check_sentinels(prompt, self.config.vocabulary)
        made = [Request(streams=(prompt,), **one) for prompt, one in zip(prompts, requests, strict=True)]
        return self._run(made, combine, **rules)

    def canvases(self, prompt: Prompt, options: ImageOptions, *, previews: int = 0) -> Iterator[Canvas]:
        """The finished images of a prompt, as ``answers``; there are no unfinished ones to show."""
        (answers,) = self.answers([prompt], options)
        yield Canvas([part for answer in answers for part in answer.parts if isinstance(part, Image.Image)], "stop")

    def text_tokens(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(self.tokenizer.encode(text))

    def sampler(self, options: ImageOptions) -> dict[str, Any]:
        """The settings that images are drawn with, see ``inference.generator.ImageGenerator``."""
        drawn = _sampling(options)
        return {
            "sampler": "code by code",
            "steps": self.image_tokens,
            "temperature": drawn.temperature,
            "top_p": drawn.top_p,
            "guidance": f"u + s (c - u), s = {options.guidance:g}",
        }

    def warm_up(self, rows: int) -> None:
        """Compiles the programs for up to ``rows`` images per prompt."""
        size = 1
        while size < 2 * min(rows, EXAMPLES):
            list(self.canvases(["a"], DrawOptions(n=min(size, rows), guidance=2.0)))
            size *= 2

    def _edited(
        self, edits: Sequence[tuple[Any, str]], options: DrawOptions, template: str = EDIT
    ) -> list[list[Result]]:
        """The best results of every edit."""
        streams = [
            edit_streams(
                self._encode(template),
                self._codes(image),
                self._encode(instruction),
                self.config.vocabulary,
                self.config.image_tokens,
            )
            for image, instruction in edits
        ]
        if options.cd_k:
            raise ValueError("an edit is guided by image and instruction; leave cd_k out")
        if options.guidance == options.image_guidance == 1:
            return self._draw([one[:1] for one in streams], options, "conditional")
        self._warn_unless_sentinels()
        return self._draw(streams, options, "edit")

    def _of_texts(
        self, texts: Sequence[str], options: DrawOptions, documents: Sequence[Sequence[Pair]]
    ) -> list[list[Result]]:
        """The best results of every text."""
        layout, size = self.config.vocabulary, self.config.image_tokens
        pairs = [self._pairs(found) for found in documents] or [[]] * len(texts)
        if len(pairs) != len(texts):
            raise ValueError(f"there are documents for {len(pairs)} texts, but {len(texts)} texts")
        streams = [
            drawing_streams(self._encode(text), found, layout, size, null=options.null)
            for text, found in zip(texts, pairs, strict=True)
        ]
        if options.guidance == 1 and not options.cd_k:
            return self._draw([pair[:1] for pair in streams], options, "conditional")
        self._warn_unless_sentinels()
        return self._draw(streams, options, "contrast" if options.cd_k else "guide")

    def _draw(
        self, streams: Sequence[tuple[np.ndarray, ...]], options: DrawOptions, combine: Combine
    ) -> list[list[Result]]:
        """``options.n`` images of every prompt, each the likeliest of its candidates."""
        size, each = self.config.image_tokens, options.n * options.candidates
        sampling = _sampling(options)
        requests = [
            Request(
                streams=prompt,
                limit=size,
                end=self.config.vocabulary.eos,
                place=Place.IMAGE,
                left=size,
                seed=options.seed + i,
                sampling=sampling,
                weight=options.guidance,
                image_weight=options.image_guidance,
                interval=options.interval,
            )
            for prompt in streams
            for i in range(each)
        ]
        found = self._run(
            requests,
            combine,
            k=max(options.cd_k, 1),
            alpha=options.cd_alpha,
            amateur_temperature=options.amateur_temperature,
        )
        best = [max(group, key=lambda result: result.logprob) for group in _batched(found, options.candidates)]
        return list(_batched(best, options.n))

    def _codes_of(self, results: Sequence[Result]) -> Int[np.ndarray, "N T"]:
        return np.stack([self.config.vocabulary.to_codes(result.ids) for result in results])

    def _drawn(self, prompts: Sequence[list[Any]], options: ImageOptions) -> list[list[Answer]]:
        if options.steps is not None:
            raise ValueError("steps are those of a masked model; this one draws code by code: leave it out")
        wanted = options if isinstance(options, DrawOptions) else DrawOptions(**vars(options))
        if wanted.mask is not None:
            return [self._completed(prompt, wanted) for prompt in prompts]
        texts = [_texts(prompt) for prompt in prompts]
        images = [[item for item in prompt if not isinstance(item, str)] for prompt in prompts]
        for text, found in zip(texts, images, strict=True):
            if len(found) > 1:
                raise ValueError(f"a drawing takes a text, or one image and an instruction, not {len(found)} images")
            if not text.strip():
                raise ValueError("a drawing needs a text that says what to draw, or what to change")
        plain = [i for i, found in enumerate(images) if not found]
        edits = [i for i, found in enumerate(images) if found]
        results: dict[int, list[Result]] = {}
        if plain:
            results |= dict(zip(plain, self._of_texts([texts[i] for i in plain], wanted, ()), strict=True))
        if edits:
            results |= dict(zip(edits, self._edited([(images[i][0], texts[i]) for i in edits], wanted), strict=True))
        return [
            [
                Answer(parts=(image,), tokens=(), logprob=result.logprob, finish="stop")
                for image, result in zip(self._images(self._codes_of(results[i])), results[i], strict=True)
            ]
            for i in range(len(prompts))
        ]

    def _completed(self, prompt: list[Any], options: DrawOptions) -> list[Answer]:
        if options.mask is None or not any(not isinstance(item, str) for item in prompt):
            raise ValueError("mask hides a part of the prompt's image, but the prompt has none")
        if options.guidance != 1 or options.cd_k or options.candidates > 1:
            raise ValueError("mask: a hidden part is drawn without guidance and candidates; set guidance to 1")
        parts = [item if isinstance(item, str) else Hidden(item, options.mask) for item in prompt]
        parts = sorted(parts, key=lambda part: not isinstance(part, str))  # the text comes first, as in training
        answers = []
        for i in range(options.n):
            filled, logprob = self._fill(parts, 0, _sampling(options), options.seed + i)
            images = tuple(part for part in self._join(filled) if not isinstance(part, str))
            answers.append(Answer(parts=images, tokens=(), logprob=logprob, finish="stop"))
        return answers

    def _written(self, prompts: Sequence[list[Any]], options: AnswerOptions) -> list[list[Answer]]:
        if options.beams or options.choices or options.stop:
            raise ValueError("a cm3leon model answers by sampling; leave out beams, choices and stop")
        layout, requests = self.config.vocabulary, []
        for prompt in prompts:
            if not prompt or not any(item if isinstance(item, str) else True for item in prompt):
                raise ValueError("the prompt is empty: give at least one image or one word")
            images = sum(not isinstance(item, str) for item in prompt)
            more = False
            if images == 1:
                words = _texts(prompt)
                image = next(item for item in prompt if not isinstance(item, str))
                laid = lay_out_gaps(
                    [*([self._encode(words)] if words else []), GAP, Codes(self._codes(image))],
                    layout,
                    self.config.image_tokens,
                )
                ids, end, place = np.append(laid.ids, layout.sentinel(0)), layout.eoss, Place.TEXT
            else:
                segments = self._segments(prompt)
                prefix = document_prefix([segments], layout, self.config.image_tokens)
                # After a text it goes on; after an image something new begins.
                goes_on = isinstance(segments[-1], np.ndarray)
                ids = np.array(prefix[:-1] if goes_on else prefix, np.int32)
                end, place, more = layout.eos, Place.TEXT if goes_on else Place.BEGIN, self.images is not None
            requests += [
                Request(
                    streams=(ids,),
                    limit=options.max_new_tokens,
                    end=end,
                    place=place,
                    images=more,
                    texts=True,
                    seed=options.seed + i,
                    sampling=options.sampling,
                )
                for i in range(options.n)
            ]
        answers = [self._answer(result) for result in self._run(requests, "conditional")]
        return list(_batched(answers, options.n))

    def _fill(
        self, parts: Sequence[Item], max_new_tokens: int, sampling: SamplingConfig, seed: int
    ) -> tuple[list[Segment], float]:
        """The segments of a document with its gaps filled in, and the log-probability of these."""
        layout, size = self.config.vocabulary, self.config.image_tokens
        segments = self._segments(parts)
        laid: Infilling = lay_out_gaps(segments, layout, size)
        ids, total = laid.ids, 0.0
        codes = {i: part.codes.copy() for i, part in enumerate(segments) if isinstance(part, Codes)}
        filled = list(segments)
        for number, gap in enumerate(laid.gaps):
            ids = np.append(ids, layout.sentinel(number)).astype(np.int32)
            request = Request(
                streams=(ids,),
                limit=gap.count or max_new_tokens,
                end=layout.eoss,
                place=Place.TEXT if gap.kind == "text" else Place.IMAGE,
                left=gap.count or 0,
                texts=gap.kind == "text",
                seed=_seed_of_gap(seed, number),
                sampling=sampling,
            )
            result = self._run([request], "conditional")[0]
            total += result.logprob
            if gap.kind == "text":
                filled[gap.segment] = layout.to_text(result.ids)
            else:
                image = codes.setdefault(gap.segment, np.zeros(size, np.int32))
                image[gap.places.start : gap.places.stop] = layout.to_codes(result.ids)
                filled[gap.segment] = Codes(image)
            ids = np.concatenate([ids, result.ids, [layout.eoss]]).astype(np.int32)
        return filled, total

    def _run(self, requests: Sequence[Request], combine: Combine, **rules: Any) -> list[Result]:
        static = StreamRules(self.config.vocabulary, self.config.image_tokens, combine, **rules)
        found: list[Result] = []
        for batch in _batched(requests, EXAMPLES):
            found += run_requests(self.graphdef, self.params, batch, static, self.config.context_length)
        return found

    def _segments(self, parts: Sequence[Item]) -> list[Segment]:
        """Tokens and codes of a document; neighbouring texts are one."""
        segments: list[Segment] = []
        for part in parts:
            if isinstance(part, str):
                words = self._encode(part)
                if segments and isinstance(segments[-1], np.ndarray):
                    segments[-1] = np.concatenate([segments[-1], words])
                else:
                    segments.append(words)
            elif isinstance(part, Gap):
                segments.append(part)
            elif isinstance(part, Hidden):
                segments.append(Codes(self._codes(part.image), self._hidden(part.mask)))
            elif isinstance(part, Codes):
                segments.append(part)
            else:
                segments.append(Codes(self._codes(part)))
        return segments

    def _split(self, ids: Int[np.ndarray, " S"]) -> list[Segment]:
        """The texts and images of drawn ids."""
        layout = self.config.vocabulary
        breaks = np.flatnonzero(ids == layout.brk)
        pieces = np.split(ids, breaks)
        segments: list[Segment] = []
        for piece in pieces:
            piece = piece[piece != layout.brk]
            if len(piece) and layout.is_image(piece[:1])[0]:
                segments.append(Codes(layout.to_codes(piece)))
            elif len(piece):
                segments.append(layout.to_text(piece))
        return segments

    def _join(self, segments: Sequence[Segment]) -> list[str | Image.Image]:
        """Texts and images; neighbouring texts are one."""
        parts: list[str | Image.Image] = []
        words: list[int] = []
        for segment in [*segments, None]:
            if isinstance(segment, np.ndarray):
                words += segment.tolist()
                continue
            if words or (segment is None and not parts):
                parts.append(self.tokenizer.decode(words))
                words = []
            if isinstance(segment, Codes):
                parts += self._images(segment.codes[None])
        return parts

    def _answer(self, result: Result) -> Answer:
        parts = self._join(self._split(result.ids))
        words = tuple(self.tokenizer.encode("".join(part for part in parts if isinstance(part, str))))
        finish = "stop" if result.ended else "length"
        return Answer(parts=tuple(parts), tokens=words, logprob=result.logprob, finish=finish)

    def _pairs(self, documents: Sequence[Pair]) -> list[list[Segment]]:
        if len(documents) > MOST_RETRIEVED:
            raise ValueError(f"at most {MOST_RETRIEVED} documents are taken, got {len(documents)}")
        return [self._segments(pair) for pair in documents]

    def _encode(self, text: str) -> Int[np.ndarray, " S"]:
        return np.array(self.tokenizer.encode(text), np.int32)

    def _codes(self, image: Any) -> Int[np.ndarray, " T"]:
        if isinstance(image, Codes):
            return image.codes
        codes, config = self._tokenizer("reads images"), self.config.tokenizer
        assert config is not None  # the model has a tokenizer
        source = image if isinstance(image, ImageInput) else ImageInput(image)
        return codes.encode(source.pixels(config.image_size)[None])[0]

    def _images(self, codes: Int[np.ndarray, "N T"]) -> list[Image.Image]:
        return [Image.fromarray(pixels) for pixels in self._tokenizer("draws images").decode(codes)]

    def _hidden(self, mask: np.ndarray) -> np.ndarray:
        """Which codes have a pixel of a mask."""
        if mask.ndim != 2 or not mask.any():
            raise ValueError("mask has the image's height and width, and is True where it is drawn anew")
        config = self.config.tokenizer
        side = round(self.config.image_tokens**0.5) if config is None else config.image_size // config.factor
        rows = np.minimum(np.arange(mask.shape[0]) * side // mask.shape[0], side - 1)
        columns = np.minimum(np.arange(mask.shape[1]) * side // mask.shape[1], side - 1)
        hidden = np.zeros((side, side), bool)
        np.logical_or.at(hidden, (rows[:, None], columns[None, :]), mask)
        return hidden.ravel()

    def _tokenizer(self, what: str) -> ImageTokenizer:
        if self.images is None:
            raise ValueError(f"this model has no image tokenizer, which {what}; train it with model.tokenizer")
        return self.images

    def _warn_unless_sentinels(self) -> None:
        if not self._saw_sentinels:
            _warn_once(
                "this model was trained left to right and never saw an empty prompt, so guidance has nothing to "
                "compare with; use guidance 1, or train it with data.spans"
            )


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
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


def _texts(prompt: Sequence[Any]) -> str:
    return "".join(item for item in prompt if isinstance(item, str))


def _sampling(options: ImageOptions) -> SamplingConfig:
    first, last = options.temperature or (1.0, 1.0)
    if first != last:
        raise ValueError("temperature: a cm3leon model draws with one temperature; give the same value twice")
    return SamplingConfig(temperature=first, top_p=options.top_p)
