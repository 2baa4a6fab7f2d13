"""The interface for users: text to images, images to text, and both filled in where they are masked.

    model = Magvlt.from_checkpoint("runs/magvlt_quickstart")
    images = model.generate_image("a red car", n=4)
    texts = model.caption(ImageInput("car.png"))
    images = model.inpaint(ImageInput("car.png"), mask, "a blue car")

A causal model (ARGVLT) draws and describes, token by token; it does not in-paint, fill in texts or make pairs.

Calls change no state, so the same call gives the same answer; the seed of the i-th result is ``seed`` + i.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from magma_jax.data.images import ImageInput
from magma_jax.data.tokenizers.captions import CLEAN_UPS
from magma_jax.data.tokenizers.text import TextTokenizer, TooLong
from magma_jax.families.magvlt.classifying import class_logits
from magma_jax.families.magvlt.decoding.image import ImageRun, blank, canvases, inpaint
from magma_jax.families.magvlt.decoding.likelihood import likelihood
from magma_jax.families.magvlt.decoding.next_token import CodeRun, draw_codes, write_texts
from magma_jax.families.magvlt.decoding.open_model import OpenModel
from magma_jax.families.magvlt.decoding.pairs import draw_pairs, pair_length_logits
from magma_jax.families.magvlt.decoding.text import TextRun, image_to_text, infill_text, length_logits
from magma_jax.families.magvlt.loading import load_magvlt, read_class_names
from magma_jax.families.magvlt.prompts import encode_texts, masked_words, parts_of, places_of_mask
from magma_jax.families.magvlt.rows import ROWS, best, in_parts, keys_of, repeated
from magma_jax.families.vqgan.generator import ImageTokenizer
from magma_jax.inference.answers import Answer, AnswerOptions, Canvas, ImageOptions, Score
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.masked import ImageRule, ImageSteps, Trace
from magma_jax.inference.decoding.sampling import sampling_rows
from magma_jax.inference.generator import Makes
from magma_jax.inference.prompts import Prompt
from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.models.magvlt.model import MagvltModel
from magma_jax.models.vision.vqgan import TOKENIZER
from magma_jax.nn.modules import abstract
from magma_jax.runtime.compile import trim_after_compile
from magma_jax.typing import Array, Params

# The original's text sampler: temperature of its sampling config, and likeliest tokens that are drawn from.
SAMPLING = SamplingConfig(temperature=0.1, top_k=32)
# Likeliest codes that a causal model draws from, as in the original's helpers.
CODES_TOP_K = 256
# Colour of what is not drawn yet.
GREY = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """Images of a prompt, each the best of its candidates.

    Attributes:
        images: the images.
        codes: (N, I) their codes.
        scores: by ``ImageOptions.score``; without one the log-probability of the prompt given each image, all of its
            tokens masked at once.
        trace: places, tokens and probabilities of every step, (steps, N, I) each, if asked for.
    """

    images: list[Image.Image]
    codes: np.ndarray
    scores: np.ndarray
    trace: Trace | None


class Magvlt:
    """A MAGVLT model with its weights, image tokenizer and text tokenizer.

    Attributes:
        makes: what its answers are; without an image tokenizer nothing, since it knows codes alone.
        image_size: pixels per side of its images.
        image_tokens: codes of an image.
        classes: the number of answers that its classifier knows; such a model answers questions about images.
    """

    # Images are described without a text.
    default_prompt = ""

    def __init__(self, config: MagvltConfig, params: Params, tokenizer: TextTokenizer, class_names: Sequence[str] = ()):
        trim_after_compile()
        below = f"{TOKENIZER}/"
        self.config, self.tokenizer = config, tokenizer
        held = {path.removeprefix(below): leaf for path, leaf in params.items() if path.startswith(below)}
        self.image_tokenizer = None if config.tokenizer is None else ImageTokenizer(config.tokenizer, held)
        inner = dataclasses.replace(config, tokenizer=None)
        definition = abstract(lambda: MagvltModel(inner, rngs=nnx.Rngs(0)))[0]
        rest = {path: leaf for path, leaf in params.items() if not path.startswith(below)}
        self.model = OpenModel(inner, definition, rest, tokenizer.pad_id)
        makes: tuple[Makes, ...] = ("text", "image") if config.causal else ("text", "image", "edit")
        self.makes: frozenset[Makes] = frozenset(makes if config.tokenizer is not None else ())
        self.image_size = 0 if config.tokenizer is None else config.tokenizer.image_size
        self.image_tokens = config.image_positions
        self.classes, self.class_names = len(class_names), tuple(class_names)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, *, dtype: str | None = None, mesh: Mesh | None = None, ema: bool | None = None
    ) -> "Magvlt":
        """Loads a run folder, a model folder or a file in the published layout; arguments as for ``Family.open``."""
        config, params, tokenizer = load_magvlt(path, dtype, mesh, ema)
        return cls(config, params, tokenizer, read_class_names(path, config))

    def generate_image(self, text: str, n: int = 1, **options: Any) -> list[Image.Image]:
        """Images of a text; ``options`` are those of ``ImageOptions``.

        Raises:
            ValueError: an empty text, one of too many tokens, or an option out of range.
        """
        return self.draw([text], ImageOptions(n=n, **options)).images

    def inpaint(self, image: ImageInput, mask: np.ndarray, text: str, n: int = 1, **options: Any) -> list[Image.Image]:
        """Images of a text that keep the codes of an image where ``mask`` (height, width) marks none of their pixels.

        Codes are kept bit for bit; their pixels change where the tokenizer's decoder sees drawn ones.

        Raises:
            ValueError: as ``generate_image``; or a mask of another size, or one that keeps everything.
        """
        return self.draw([image, text], ImageOptions(n=n, mask=mask, **options)).images

    def draw(self, prompt: Prompt, options: ImageOptions = ImageOptions(), *, trace: int = 0) -> Drawn:
        """Images of a prompt, a text or an image and a text, with their scores.

        Args:
            prompt: see above; without a mask an image is drawn anew as a whole.
            options: see ``ImageOptions``.
            trace: maximum number of steps to return; another number compiles another program.

        Raises:
            ValueError: a prompt or options that the model does not support. ImageError: a bad image.
        """
        codes, places, tokens, lengths = self._arguments(prompt, options)
        if self.config.causal and trace:
            raise ValueError("a causal model draws code by code, so there is no trace of steps; leave it out")
        run = dataclasses.replace(_image_run(options), record=trace)
        count = options.n * options.candidates

        def part(rows: slice, keys: Array) -> tuple[Any, ...]:
            image, editable, text, ends = (repeated(array, len(keys)) for array in (codes, places, tokens, lengths))
            if self.config.causal:
                filled = draw_codes(self.model, text, ends, keys, _code_run(options))
            else:
                filled = inpaint(self.model, image, editable, text, ends, keys, run)
            return filled.tokens, self._scores(prompt, options, filled.tokens, text, ends), filled.trace

        found, scores, traces = in_parts(part, options.seed, count)
        chosen = best(scores, options.candidates)
        kept = None if traces is None else Trace(*(np.asarray(array)[:, chosen] for array in traces))
        return Drawn(images=self.decode(found[chosen]), codes=found[chosen], scores=scores[chosen], trace=kept)

    def canvases(self, prompt: Prompt, options: ImageOptions, *, previews: int = 0) -> Iterator[Canvas]:
        """The images of a prompt while they are drawn: at most ``previews`` unfinished canvases, and the images.

        What is not drawn yet is grey. A causal model shows no unfinished canvas.

        Raises:
            ValueError, ImageError: as ``draw``.
        """
        codes, places, tokens, lengths = self._arguments(prompt, options)
        count = options.n * options.candidates
        run = _image_run(options)
        steps = int(run.settings.steps)
        shown = set(np.linspace(0, steps, previews + 2).astype(int)[1:-1].tolist()) - {0}
        if not shown or count > ROWS.sizes[-1] or self.config.causal:
            yield Canvas(self.draw(prompt, options).images, "stop")
            return
        every = ROWS.fit(count)
        image, editable, text, ends = (repeated(array, every) for array in (codes, places, tokens, lengths))
        keys = keys_of(options.seed, 0, every)
        found = codes
        for step, canvas in enumerate(canvases(self.model, image, editable, text, ends, keys, run), start=1):
            found = np.asarray(canvas.tokens)
            if step in shown and step < steps:
                rows = np.arange(options.n) * options.candidates
                yield Canvas(self.unfinished(found[rows], np.asarray(canvas.masked)[rows]))
        scores = self._scores(prompt, options, found, text, ends)[:count]
        yield Canvas(self.decode(found[best(scores, options.candidates)]), "stop")

    def caption(
        self,
        image: ImageInput,
        n: int = 1,
        *,
        candidates: int = 1,
        lengths: int = 1,
        seed: int = 0,
        sampling: SamplingConfig = SAMPLING,
        run: TextRun = TextRun(),
        clean_up: str = "none",
        score: Score | None = None,
    ) -> list[str]:
        """Texts of an image.

        Args:
            image: the image.
            n: number of texts.
            candidates: texts drawn for each; the best by the original's score, the sum of log-probabilities, is kept.
            lengths: candidates take the likeliest lengths in turn, this many of them.
            seed: seed of the first candidate of the first text.
            sampling: temperature and filters.
            run: steps, and which tokens are masked again.
            clean_up: see ``data.tokenizers.captions``.
            score: keeps the best candidate by this score instead, such as a ``ClipScorer``.

        Raises:
            ValueError: an option out of range. ImageError: a bad image.
        """
        options = AnswerOptions(n=n, seed=seed, sampling=sampling)
        found = self.write(image, None, options, candidates=candidates, lengths=lengths, run=run, score=score)
        return [CLEAN_UPS[clean_up](answer.text) for answer in found]

    def infill_text(
        self, image: ImageInput, text: str, n: int = 1, *, seed: int = 0, sampling: SamplingConfig = SAMPLING
    ) -> list[str]:
        """Texts in which every word ``[MASK]`` of ``text`` is one new token; all others are kept.

        Raises:
            ValueError: a text without ``[MASK]``, or of too many tokens.
        """
        options = AnswerOptions(n=n, seed=seed, sampling=sampling)
        return [answer.text for answer in self.write(image, text, options)]

    def answer(self, image: ImageInput, question: str, n: int = 1) -> list[tuple[str, float]]:
        """The likeliest answers to a question about an image, each with its log-probability.

        Raises:
            ValueError: a model without a classifier of answers, an empty question, or one of too many tokens.
            ImageError: a bad image.
        """
        if not self.classes:
            raise ValueError("this model has no classifier of answers; finetune it on questions")
        tokens, lengths = self._encode_texts([question], "error")
        logits = class_logits(self.model, self.encode([image]), tokens, lengths)[0].astype(np.float64)
        log_probs = logits - np.logaddexp.reduce(logits)
        order = np.argsort(-log_probs, kind="stable")[:n]
        return [(self.class_names[number], float(log_probs[number])) for number in order]

    def generate_pair(self, seed: int = 0, n: int = 1, **options: Any) -> list[tuple[Image.Image, str]]:
        """Images and texts drawn together, from nothing; ``options`` are those of ``ImageOptions``."""
        if self.config.causal:
            raise ValueError("a causal model draws images of texts; it has no pairs from nothing")
        wanted = ImageOptions(n=n, seed=seed, **options)
        run = _image_run(wanted)

        def part(rows: slice, keys: Array) -> tuple[Any, ...]:
            logits = pair_length_logits(self.model, len(keys))
            drawn = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, 1), row))(keys, logits)
            lengths = np.asarray(drawn) + 1
            sampling = sampling_rows([SAMPLING] * len(keys))
            image, text = draw_pairs(self.model, lengths, keys, sampling, run)
            return image.tokens, text.tokens, None

        codes, tokens, _ = in_parts(part, seed, n)
        return list(zip(self.decode(codes), [self.text(row) for row in tokens], strict=True))

    def write(
        self,
        image: ImageInput,
        text: str | None,
        options: AnswerOptions,
        *,
        candidates: int = 1,
        lengths: int = 1,
        run: TextRun = TextRun(),
        score: Score | None = None,
    ) -> list[Answer]:
        """Texts of an image, see ``caption``; with a ``text`` they fill in its words ``[MASK]``.

        Raises:
            ValueError: options of models that write token by token, or as ``caption`` and ``infill_text``.
        """
        if options.beams or options.choices or options.stop:
            raise ValueError("this model writes all tokens at once: leave out beams, choices and stop")
        if candidates < 1 or not 1 <= lengths <= self.config.text_positions:
            raise ValueError(
                f"candidates must be at least 1, and lengths 1 to {self.config.text_positions}; got {candidates} and "
                f"{lengths}"
            )
        if self.config.causal and (text is not None or lengths != 1 or run != TextRun()):
            raise ValueError("a causal model writes from the first token to the end: leave out [MASK], lengths and run")
        code = self.encode([image])
        sampling = SAMPLING if options.sampling == SamplingConfig() else options.sampling
        count = options.n * candidates
        if self.config.causal:
            every, words = np.ones(candidates, int), None
        elif text is None:
            order = np.argsort(-np.asarray(length_logits(self.model, code))[0], kind="stable")[:lengths] + 1
            every = np.resize(order, candidates)
            words = None
        else:
            words = masked_words(text, self.tokenizer, self.config.text_positions)
            every = np.full(candidates, words[2])

        def part(rows: slice, keys: Array) -> tuple[Any, ...]:
            images, setting = np.repeat(code, len(keys), 0), sampling_rows([sampling] * len(keys))
            wanted = every[np.minimum(np.arange(rows.start, rows.start + len(keys)), count - 1) % candidates]
            if self.config.causal:
                filled = write_texts(self.model, images, keys, setting)
            elif words is None:
                filled, _ = image_to_text(self.model, images, keys, setting, run, lengths=wanted)
            else:
                given, masked = (repeated(array[None], len(keys)) for array in words[:2])
                filled, _ = infill_text(self.model, images, given, masked, wanted, keys, setting, run)
            return filled.tokens, filled.log_probs.sum(-1), None

        tokens, scores, _ = in_parts(part, options.seed, count)
        if score is not None:
            scores = np.asarray(score([image.load()] * count, [self.text(row) for row in tokens]))
        return [self._answer(tokens[row], float(scores[row])) for row in best(scores, candidates)]

    def answers(
        self,
        prompts: Iterable[Prompt],
        options: AnswerOptions | ImageOptions = AnswerOptions(),
        *,
        count: int | None = None,
    ) -> Iterator[list[Answer]]:
        """The answers to every prompt, see ``inference.generator.Generator``.

        ``ImageOptions`` ask for images of a text, or of an image and a text; ``AnswerOptions`` for texts of an image,
        which with a text fill in its words ``[MASK]``, or of a model with classes are the likeliest answers to it.
        """
        for prompt in prompts:
            if isinstance(options, ImageOptions):
                drawn = self.draw(prompt, options)
                yield [
                    Answer(parts=(image,), tokens=(), logprob=float(score), finish="stop")
                    for image, score in zip(drawn.images, drawn.scores, strict=True)
                ]
                continue
            parts = parts_of(prompt)
            if parts.image is None:
                raise ValueError("the prompt has no image to describe; give one, or ask for an image")
            if self.classes and parts.text is not None:
                found = self.answer(parts.image, parts.text, options.n)
                yield [Answer(parts=(name,), tokens=(), logprob=score, finish="stop") for name, score in found]
                continue
            yield self.write(parts.image, parts.text, options)

    def text_tokens(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(self.tokenizer.encode(text))

    def sampler(self, options: ImageOptions) -> dict[str, Any]:
        """The settings that images are drawn with, see ``inference.generator.ImageGenerator``."""
        found: dict[str, Any] = {"top_p": options.top_p, "guidance": f"u + s (c - u), s = {options.guidance:g}"}
        if self.config.causal:
            run = _code_run(options)
            steps = {"steps": self.image_tokens, "temperature": list(run.temperature), "top_k": run.top_k}
            return {"sampler": "code by code"} | steps | found
        settings = _image_run(options).settings
        steps = {name: getattr(settings, name) for name in ("steps", "temperature", "noise")}
        return {"sampler": options.places, "schedule": options.schedule} | steps | found

    def warm_up(self, rows: int) -> None:
        """Compiles the programs for up to ``rows`` images per prompt."""
        steps = None if self.config.causal else 2
        for size in ROWS.sizes:
            if size <= ROWS.fit(min(rows, ROWS.sizes[-1])):
                list(self.canvases(["a"], ImageOptions(n=size, steps=steps), previews=1))

    def encode(self, images: Sequence[ImageInput]) -> np.ndarray:
        """Codes (N, I) of images.

        Raises:
            ValueError: the model has no image tokenizer. ImageError: a bad image.
        """
        tokenizer = self._tokenizer()
        return tokenizer.encode(np.stack([image.pixels(self.image_size) for image in images]))

    def decode(self, codes: np.ndarray) -> list[Image.Image]:
        """Images of codes (N, I)."""
        return [Image.fromarray(pixels) for pixels in self._tokenizer().decode(np.asarray(codes))]

    def _tokenizer(self) -> ImageTokenizer:
        if self.image_tokenizer is None:
            raise ValueError("this model has no image tokenizer, so it knows codes but no images")
        return self.image_tokenizer

    def _arguments(self, prompt: Prompt, options: ImageOptions) -> tuple[np.ndarray, ...]:
        """Codes, editable places, tokens and lengths of a prompt, one row each."""
        self._tokenizer()
        if options.cd_k:
            raise ValueError("this model is guided by guidance alone: leave out cd_k")
        parts = parts_of(prompt)
        if parts.text is None:
            raise ValueError("the prompt has no text; say what the image shows")
        tokens, lengths = self._encode_texts([parts.text], "error")
        codes, places = blank(self.config, 1)
        if self.config.causal:
            _check_causal(options)
        if parts.image is None and options.mask is not None:
            raise ValueError("a mask marks the pixels of an image; give the image too")
        if parts.image is not None and options.mask is not None:
            places = places_of_mask(options.mask, parts.image.load(), self.image_size, self.config.grid)[None]
            codes = self.encode([parts.image])
        return codes, places, tokens, lengths

    def _scores(
        self, prompt: Prompt, options: ImageOptions, codes: Any, text: np.ndarray, ends: np.ndarray
    ) -> np.ndarray:
        """Scores of the candidates ``codes`` (N, I), see ``Drawn``."""
        if options.score is None:
            return likelihood(self.model, np.asarray(codes), text, ends, of="text")
        return np.asarray(options.score(self.decode(codes), [str(parts_of(prompt).text)] * len(codes)))

    def _encode_texts(self, texts: Sequence[str], too_long: TooLong) -> tuple[np.ndarray, np.ndarray]:
        return encode_texts(texts, self.tokenizer, self.config.text_positions, too_long)

    def _answer(self, tokens: np.ndarray, score: float) -> Answer:
        ended = np.flatnonzero(tokens == self.tokenizer.pad_id)
        ids = tokens[: ended[0]] if len(ended) else tokens
        return Answer(
            parts=(self.text(tokens),),
            tokens=tuple(map(int, ids)),
            logprob=score,
            finish="stop" if len(ended) else "length",
        )

    def text(self, tokens: np.ndarray) -> str:
        """The text of tokens (T,), up to its end."""
        ended = np.flatnonzero(tokens == self.tokenizer.pad_id)
        return self.tokenizer.decode((tokens[: ended[0]] if len(ended) else tokens).tolist())

    def unfinished(self, codes: np.ndarray, masked: np.ndarray) -> list[Image.Image]:
        """Images of codes (N, I), grey where they are masked."""
        rows, columns = self.config.grid
        pixels = self._tokenizer().decode(codes)
        hidden = masked.reshape(-1, rows, columns).repeat(self.image_size // rows, 1)
        hidden = hidden.repeat(self.image_size // columns, 2)
        return [Image.fromarray(image) for image in np.where(hidden[..., None], np.uint8(GREY), pixels)]


def _image_run(options: ImageOptions) -> ImageRun:
    default = ImageSteps()
    settings = ImageSteps(
        steps=default.steps if options.steps is None else options.steps,
        temperature=default.temperature if options.temperature is None else options.temperature,
        top_p=options.top_p,
    )
    rule = ImageRule(options.places, options.schedule)
    return ImageRun(settings=settings, guidance=options.guidance, rule=rule)


def _check_causal(options: ImageOptions) -> None:
    """Raises ValueError for options of models that draw in steps, or that keep parts of an image."""
    names = [name for name in ("steps", "mask") if getattr(options, name) is not None]
    names += [name for name in ("schedule", "places") if getattr(options, name) != getattr(ImageOptions, name)]
    if names:
        raise ValueError(f"this model is causal and draws code by code, from the first: leave out {', '.join(names)}")


def _code_run(options: ImageOptions) -> CodeRun:
    heat = CodeRun().temperature if options.temperature is None else options.temperature
    return CodeRun(temperature=heat, top_k=CODES_TOP_K, top_p=options.top_p, guidance=options.guidance)
