"""Inference interfaces of a family: prompts in, answers out, of any modality.

``Family.open`` returns a ``Generator``. A family of autoregressive text models returns a ``TokenGenerator``, which the
engine, beam search, choices, attention maps and evaluation need; one that draws returns an ``ImageGenerator``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.inference.answers import Answer, AnswerOptions, Canvas, ImageOptions
from magma_jax.inference.prompts import ImageSpec, Prompt, PromptBatch, PromptLayout
from magma_jax.models.language.catalog import LanguageModelConfig
from magma_jax.nn.modules import Definition
from magma_jax.typing import Params

# edit: an image from an image and an instruction.
Makes: TypeAlias = Literal["text", "image", "edit"]


class Generator(Protocol):
    """A model that is ready for inference.

    Attributes:
        makes: modalities of its answers.
    """

    makes: frozenset[Makes]

    def answers(
        self,
        prompts: Iterable[Prompt],
        options: AnswerOptions | ImageOptions = AnswerOptions(),
        *,
        count: int | None = None,
    ) -> Iterator[list[Answer]]:
        """The answers to every prompt, in order; prompts are consumed lazily.

        ``options`` say what is asked for: ``AnswerOptions`` texts, ``ImageOptions`` images. ``count`` is the number of
        prompts, if known.

        Raises:
            ValueError: a prompt or options that the model does not support. ImageError: a bad image.
        """
        ...


@runtime_checkable
class TokenGenerator(Generator, Protocol):
    """An autoregressive text model.

    Attributes:
        lm_config: config of its language model.
        dtype: dtype of activations.
        images: its image input.
        classes: outputs of its classification head; 0 without one.
        graphdef: definition of a module with ``lm``, ``embed_tokens``, ``embed_images``, ``encode_images``,
            ``embed_features`` and ``logits``.
        params: its weights, by path.
        tokenizer: its tokenizer.
    """

    lm_config: LanguageModelConfig
    dtype: str
    images: ImageSpec
    classes: int
    graphdef: Definition
    params: Params
    tokenizer: Tokenizer

    def layout(self, prompt: Prompt, *, max_images: int | None = None, salt: bytes = b"") -> PromptLayout:
        """The layout of a prompt, see ``prompts.lay_out_prompt``."""
        ...

    def preprocess_batch(self, prompts: Sequence[Prompt]) -> PromptBatch:
        """Embeddings of several prompts."""
        ...

    def remove_adapters(self) -> "TokenGenerator":
        """The same model without the adapters in its language model."""
        ...


@runtime_checkable
class ImageGenerator(Generator, Protocol):
    """A model that draws.

    Attributes:
        image_size: pixels per side of its images.
        image_tokens: tokens of an image.
        tokenizer: its tokenizer of texts.
        classes: answers that its classifier of questions about images knows; 0 without one.
    """

    classes: int
    image_size: int
    image_tokens: int
    tokenizer: Any

    def text_tokens(self, text: str) -> int:
        """Number of tokens of a text."""
        ...

    def canvases(self, prompt: Prompt, options: ImageOptions, *, previews: int = 0) -> Iterator[Canvas]:
        """The images that are drawn for one prompt: at most ``previews`` times unfinished, and then finished.

        The prompt is a text, or an image and a text. An unfinished image has one colour where nothing is drawn yet.

        Raises:
            ValueError: a prompt or options that the model does not support. ImageError: a bad image.
        """
        ...

    def sampler(self, options: ImageOptions) -> dict[str, Any]:
        """The settings that images are drawn with, the family's own where options leave them open; JSON values."""
        ...

    def warm_up(self, rows: int) -> None:
        """Compiles the programs for up to ``rows`` images per prompt."""
        ...


class ImageBatch(Protocol):
    """A running batch of drawings that requests join and leave; each is drawn as it is alone. Not thread-safe.

    Attributes:
        room: whether another request would be drawn and not only wait.
        busy: whether there is something to draw.
    """

    @property
    def room(self) -> bool: ...

    @property
    def busy(self) -> bool: ...

    def takes(self, options: ImageOptions) -> bool:
        """Whether requests with these options may join; others are drawn alone by ``canvases``."""
        ...

    def begin(self, key: Any, prompt: Prompt, options: ImageOptions) -> None:
        """Accepts a request; errors as of ``ImageGenerator.canvases``."""
        ...

    def step(self) -> list[tuple[Any, Callable[[], Canvas]]]:
        """Draws some tokens; the keys of requests that ended, and what makes their images."""
        ...

    def cancel(self, key: Any) -> None:
        """Ends a request."""
        ...

    def reset(self) -> None:
        """Ends all requests and begins anew, after a failure that may have destroyed the batch's state."""
        ...

    def warm_up(self) -> None:
        """Compiles the most frequent programs. No request may be running."""
        ...


@runtime_checkable
class BatchedImageGenerator(ImageGenerator, Protocol):
    """A model that draws requests of many callers together."""

    def image_batch(self, slots: int, context: int | None = None) -> ImageBatch:
        """A batch of ``slots`` rows of ``context`` positions; None for the model's context.

        Raises:
            ValueError: too few slots, or too many positions.
        """
        ...


@runtime_checkable
class ReadsDocuments(Protocol):
    """A model that reads documents, each a text with an image, which were retrieved for a prompt.

    Attributes:
        image_size: pixels per side of their images.
    """

    image_size: int

    def with_memory(self, find: Callable[[str], Sequence[tuple[str, Any]]]) -> Any:
        """The same model, which reads what ``find`` gives for the text of a drawing."""
        ...
