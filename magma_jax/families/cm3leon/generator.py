"""The interface for users: images and texts in, images and texts out.

    model = CM3Leon.from_checkpoint("runs/cm3leon_quickstart")
    model.generate_image("a red car", n=4)[0].save("car.png")
    model.caption(ImageInput("cat.png"))
    model.edit(ImageInput("woman.png"), "make the skin tone dark")[0]
    model.infill(["a woman", GAP, ImageInput("woman.png")])

Calls change no state, so the same call gives the same answer.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from magma_jax.data.images import ImageInput
from magma_jax.families.cm3leon.decoding import Result
from magma_jax.families.cm3leon.drawing_batch import DrawingBatch
from magma_jax.families.cm3leon.engine import EXAMPLES, GAP, IMAGE_GAP, Engine, Plan, batched, sampling_of
from magma_jax.families.cm3leon.image_codes import tokenizer_params
from magma_jax.families.cm3leon.loading import Loaded, load_cm3leon
from magma_jax.families.cm3leon.media import Hidden, Item, Media, Pair
from magma_jax.families.cm3leon.options import DrawOptions
from magma_jax.families.cm3leon.prompts import (
    EDIT,
    Codes,
    Missing,
    check_sentinels,
    document_prefix,
    lay_out_gaps,
)
from magma_jax.families.vqgan.generator import ImageTokenizer
from magma_jax.inference.answers import Answer, AnswerOptions, Canvas, ImageOptions
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.streams import Combine, Place
from magma_jax.inference.generator import Makes
from magma_jax.inference.prompts import Prompt, check_prompt
from magma_jax.runtime.compile import trim_after_compile
from magma_jax.typing import Int

# What callers of ``infill`` need too.
__all__ = ["GAP", "IMAGE_GAP", "CM3Leon", "Codes", "Hidden"]


class CM3Leon:
    """A CM3Leon model with its weights and tokenizers."""

    # It answers by writing, not by a classifier.
    classes = 0

    def __init__(self, loaded: Loaded):
        trim_after_compile()
        self._find: Callable[[str], Sequence[Pair]] | None = None
        self.config, self.graphdef, self.params, self.tokenizer = loaded[:4]
        self.image_tokens = self.config.image_tokens
        self.image_size = 0 if self.config.tokenizer is None else self.config.tokenizer.image_size
        self.images: ImageTokenizer | None = None
        if self.config.tokenizer is not None:
            self.images = ImageTokenizer(self.config.tokenizer, tokenizer_params(self.params))
        self.media = Media(self.config, self.tokenizer, self.images)
        self.engine = Engine(loaded, self.media)
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
            documents: retrieved pairs of text and image to put before the text, at most 3; none for those of the
                memory, see ``with_memory``.
            options: further fields of ``options.DrawOptions``.

        Raises:
            ValueError: a value out of range, a model without image tokenizer, or no room in the context.
        """
        wanted = DrawOptions(
            n=n, guidance=guidance, temperature=(temperature, temperature), top_p=top_p, seed=seed, **options
        )
        shown = [documents] if documents else self._found([text])
        return self.media.images_of(self.draw_codes([text], wanted, documents=shown)[0])

    def caption(
        self,
        image: ImageInput | Image.Image | Codes,
        *,
        documents: Sequence[Pair] = (),
        max_new_tokens: int = 64,
        sampling: SamplingConfig = SamplingConfig(),
        seed: int = 0,
    ) -> str:
        """Describes an image: its text is the gap before it. ``documents`` are retrieved by the image."""
        return self.captions(
            [image], documents=[documents], max_new_tokens=max_new_tokens, sampling=sampling, seed=seed
        )[0]

    def captions(
        self,
        images: Sequence[ImageInput | Image.Image | Codes],
        *,
        documents: Sequence[Sequence[Pair]] = (),
        max_new_tokens: int = 64,
        sampling: SamplingConfig = SamplingConfig(),
        seed: int = 0,
        batch: int = EXAMPLES,
    ) -> list[str]:
        """Describes many images in batches, as ``caption``."""
        found = self.engine.captioned(
            images, documents, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, batch=batch
        )
        layout = self.config.vocabulary
        return [self.tokenizer.decode(layout.to_text(one.ids).tolist()) for one in found]

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
        return self.media.images_of(
            self.engine.codes_of(self.engine.edited([(image, instruction)], wanted, template)[0])
        )

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
        return self.media.join(self.engine.fill(parts, max_new_tokens, sampling, seed)[0])

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
        for batch in batched(prompts, EXAMPLES):
            checked = [check_prompt(prompt) for prompt in batch]
            if isinstance(options, ImageOptions):
                yield from self._drawn(checked, options)
            else:
                yield from self._written(checked, options)

    def draw_codes(
        self,
        texts: Sequence[str],
        options: DrawOptions,
        *,
        documents: Sequence[Sequence[Pair]] = (),
        batch: int = EXAMPLES,
    ) -> list[Int[np.ndarray, "N T"]]:
        """Codes of the images of every text; ``documents`` are the retrieved pairs of each. As ``generate_image``."""
        return [self.engine.codes_of(found) for found in self.engine.of_texts(texts, options, documents, batch)]

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
        made = [self.engine.request([prompt], (), **one) for prompt, one in zip(prompts, requests, strict=True)]
        return self.engine.run(made, combine, **rules)

    def canvases(self, prompt: Prompt, options: ImageOptions, *, previews: int = 0) -> Iterator[Canvas]:
        """The finished images of a prompt, as ``answers``; there are no unfinished ones to show."""
        (answers,) = self.answers([prompt], options)
        yield Canvas([part for answer in answers for part in answer.parts if isinstance(part, Image.Image)], "stop")

    def text_tokens(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(self.tokenizer.encode(text))

    def sampler(self, options: ImageOptions) -> dict[str, Any]:
        """The settings that images are drawn with, see ``inference.generator.ImageGenerator``."""
        drawn = sampling_of(options)
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

    def edit_codes(
        self,
        edits: Sequence[tuple[Any, str]],
        options: DrawOptions,
        *,
        template: str = EDIT,
        documents: Sequence[Sequence[Pair]] = (),
        batch: int = EXAMPLES,
    ) -> list[Int[np.ndarray, "N T"]]:
        """Codes of the changed images of many pairs of image and instruction, in batches.

        ``documents`` are further retrieved images of each, for a model with ``references``; the rest is as ``edit``.
        """
        return [self.engine.codes_of(found) for found in self.engine.edited(edits, options, template, documents, batch)]

    def image_batch(self, slots: int, context: int | None = None) -> DrawingBatch:
        """A running batch of drawings and edits, see ``inference.generator.BatchedImageGenerator``."""
        return DrawingBatch(self, slots, context)

    def plan_drawing(self, prompt: Prompt, options: ImageOptions) -> tuple[Plan, DrawOptions]:
        """The streams of a drawing or, if the prompt has an image, of an edit; errors as of ``answers``."""
        wanted, (text, images) = _wanted(options), _checked(check_prompt(prompt))
        if images:
            return self.engine.plan_edits([(images[0], text)], wanted), wanted
        return self.engine.plan_texts([text], wanted, self._found([text])), wanted

    def with_memory(self, find: Callable[[str], Sequence[Pair]]) -> "CM3Leon":
        """The same model, whose ``answers`` draw texts behind the documents that ``find`` gives for each.

        See ``retrieval.memory.open_memory``.
        """
        model = copy.copy(self)
        model._find = find
        return model

    def _found(self, texts: Sequence[str]) -> list[Sequence[Pair]]:
        """Documents of the memory for texts."""
        return [] if self._find is None else [self._find(text) for text in texts]

    def _drawn(self, prompts: Sequence[list[Any]], options: ImageOptions) -> list[list[Answer]]:
        wanted = _wanted(options)
        if wanted.mask is not None:
            return [self._completed(prompt, wanted) for prompt in prompts]
        texts, images = zip(*(_checked(prompt) for prompt in prompts), strict=True)
        plain = [i for i, found in enumerate(images) if not found]
        edits = [i for i, found in enumerate(images) if found]
        results: dict[int, list[Result]] = {}
        if plain:
            asked = [texts[i] for i in plain]
            results |= dict(zip(plain, self.engine.of_texts(asked, wanted, self._found(asked)), strict=True))
        if edits:
            results |= dict(
                zip(edits, self.engine.edited([(images[i][0], texts[i]) for i in edits], wanted), strict=True)
            )
        answers = []
        for i in range(len(prompts)):
            drawn = self.media.images_of(self.engine.codes_of(results[i]))
            answers.append(
                [
                    Answer(parts=(image,), tokens=(), logprob=result.logprob, finish="stop")
                    for image, result in zip(drawn, results[i], strict=True)
                ]
            )
        return answers

    def _completed(self, prompt: list[Any], options: DrawOptions) -> list[Answer]:
        if options.mask is None or not any(not isinstance(item, str) for item in prompt):
            raise ValueError("mask hides a part of the prompt's image, but the prompt has none")
        if options.guidance != 1 or options.cd_k or options.candidates > 1:
            raise ValueError("mask: a hidden part is drawn without guidance and candidates; set guidance to 1")
        parts = [item if isinstance(item, str) else Hidden(item, options.mask) for item in prompt]
        parts = sorted(parts, key=lambda part: not isinstance(part, str))  # the text comes first, as in training
        answers = []
        for i in range(options.n):
            filled, logprob = self.engine.fill(parts, 0, sampling_of(options), options.seed + i)
            images = tuple(part for part in self.media.join(filled) if not isinstance(part, str))
            answers.append(Answer(parts=images, tokens=(), logprob=logprob, finish="stop"))
        return answers

    def _written(self, prompts: Sequence[list[Any]], options: AnswerOptions) -> list[list[Answer]]:
        if options.beams or options.choices or options.stop:
            raise ValueError("a cm3leon model answers by sampling; leave out beams, choices and stop")
        layout, requests = self.config.vocabulary, []
        for prompt in prompts:
            gaps: Sequence[Missing] = ()
            if not prompt or not any(item if isinstance(item, str) else True for item in prompt):
                raise ValueError("the prompt is empty: give at least one image or one word")
            images = sum(not isinstance(item, str) for item in prompt)
            more = False
            if images == 1:
                words = _texts(prompt)
                image = next(item for item in prompt if not isinstance(item, str))
                laid = lay_out_gaps(
                    [*([self.media.encode(words)] if words else []), GAP, Codes(self.media.codes(image))],
                    layout,
                    self.config.image_tokens,
                )
                ids, end, place, gaps = np.append(laid.ids, layout.sentinel(0)), layout.eoss, Place.TEXT, laid.gaps
            else:
                segments = self.media.segments(prompt)
                prefix = document_prefix([segments], layout, self.config.image_tokens)
                # After a text it goes on; after an image something new begins.
                goes_on = isinstance(segments[-1], np.ndarray)
                ids = np.array(prefix[:-1] if goes_on else prefix, np.int32)
                end, place, more = layout.eos, Place.TEXT if goes_on else Place.BEGIN, self.images is not None
            requests += [
                self.engine.request(
                    [ids],
                    (),
                    gaps,
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
        answers = [self._answer(result) for result in self.engine.run(requests, "conditional")]
        return list(batched(answers, options.n))

    def _answer(self, result: Result) -> Answer:
        parts = self.media.join(self.media.split(result.ids))
        words = tuple(self.tokenizer.encode("".join(part for part in parts if isinstance(part, str))))
        finish = "stop" if result.ended else "length"
        return Answer(parts=tuple(parts), tokens=words, logprob=result.logprob, finish=finish)


def _wanted(options: ImageOptions) -> DrawOptions:
    """Options with the family's own."""
    if options.steps is not None:
        raise ValueError("steps are those of a masked model; this one draws code by code: leave it out")
    return options if isinstance(options, DrawOptions) else DrawOptions(**vars(options))


def _checked(prompt: Sequence[Any]) -> tuple[str, list[Any]]:
    """The text of a drawing's prompt, and its image, if there is one."""
    text, images = _texts(prompt), [item for item in prompt if not isinstance(item, str)]
    if len(images) > 1:
        raise ValueError(f"a drawing takes a text, or one image and an instruction, not {len(images)} images")
    if not text.strip():
        raise ValueError("a drawing needs a text that says what to draw, or what to change")
    return text, images


def _texts(prompt: Sequence[Any]) -> str:
    return "".join(item for item in prompt if isinstance(item, str))
