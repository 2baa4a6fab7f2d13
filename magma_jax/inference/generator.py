"""What a family gives for use: prompts in, answers out, whatever they are made of.

``Family.open`` returns a ``Generator``. A family that writes text token by token gives a ``TokenGenerator``, which the
engine, beam search, choices, attention maps and evaluation work with.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.inference.answers import Answer, AnswerOptions
from magma_jax.inference.prompts import ImageSpec, Prompt, PromptBatch, PromptLayout
from magma_jax.models.language.catalog import LanguageModelConfig
from magma_jax.nn.modules import Definition
from magma_jax.typing import Params

# edit: an image from an image and words that say what to change.
Makes: TypeAlias = Literal["text", "image", "edit"]


class Generator(Protocol):
    """A model that is ready for use.

    Attributes:
        makes: what its answers may hold.
    """

    makes: frozenset[Makes]

    def answers(
        self, prompts: Iterable[Prompt], options: AnswerOptions = AnswerOptions(), *, count: int | None = None
    ) -> Iterator[list[Answer]]:
        """The answers to every prompt, in the order of the prompts, which are taken as they are needed.

        ``count`` says how many prompts there are, if that is known.

        Raises:
            ValueError: a prompt or options that the model cannot follow. ImageError: a bad image.
        """
        ...


@runtime_checkable
class TokenGenerator(Generator, Protocol):
    """A model that writes text token by token.

    Attributes:
        lm_config: sizes of its language model.
        dtype: of activations.
        images: how it takes images.
        classes: of its classification head; 0 without one.
        graphdef: with ``params`` a module that has ``lm``, ``embed_tokens``, ``embed_images``, ``encode_images``,
            ``embed_features`` and ``logits``.
        params: its weights, by path.
        tokenizer: its vocabulary.
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
        """The same model without what was added to its language model."""
        ...
