"""Documents of text and images as tokens of one vocabulary, with retrieved pairs before the pair to learn.

    <eos> T1 <break> I1 <break> T2 <break> I2 <eos>

Texts T and images I alternate freely; between two of them is a ``<break>`` (Yu et al. 2023, figure 9).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from magma_jax.data.format.records import DataError
from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.typing import Int, Shaped

# Retrieved pairs per document; with three, pairs of 1,024 codes exceed 4,097 tokens.
MOST_RETRIEVED = 3


class Text(NamedTuple):
    """Tokens of a text, as its tokenizer counts them."""

    tokens: Shaped[np.ndarray, " N"]


class Image(NamedTuple):
    """Codes of an image, row by row, as its tokenizer counts them."""

    codes: Shaped[np.ndarray, " N"]


Part: TypeAlias = Text | Image

# What belongs together: a caption and its image, or any other sequence of texts and images.
Parts: TypeAlias = tuple[Part, ...]


class Document(NamedTuple):
    """A document's tokens, and where its images are.

    ``images`` holds start and stop of every image's codes in ``tokens``, in order.
    """

    tokens: Int[np.ndarray, " S"]
    images: tuple[tuple[int, int], ...]


def make_document(parts: Sequence[Part], layout: VocabLayout, *, image_tokens: int) -> Document:
    """A document of ``parts`` in their order.

    Args:
        image_tokens: codes of every image, the size of the image tokenizer's grid (1,024 in the paper).

    Raises:
        ValueError: no parts, an image of another size, or a token or code that the layout lacks.
    """
    if not parts:
        raise ValueError("a document has no text and no image")
    pieces, images, end = [np.array([layout.eos])], [], 1
    for number, part in enumerate(parts):
        if number:
            pieces.append(np.array([layout.brk]))
            end += 1
        if isinstance(part, Image):
            if len(part.codes) != image_tokens:
                raise ValueError(f"an image has {len(part.codes)} codes, not the {image_tokens} of the grid")
            ids = layout.from_codes(part.codes)
            images.append((end, end + len(ids)))
        else:
            ids = layout.from_text(part.tokens)
        pieces.append(ids)
        end += len(ids)
    return Document(np.concatenate([*pieces, [layout.eos]]).astype(np.int32), tuple(images))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievedDocuments:
    """Documents of retrieved pairs and a query, which is the last; both are ``Parts``, usually text and image.

    Retrieval is offline: ``neighbours`` holds its results. Which of them a document shows, and in which order, is drawn
    anew each time (CM3Leon pools the pairs found by text and by image and takes the first of a shuffle).

    Attributes:
        queries: what is to be learned.
        layout: vocabulary.
        image_tokens: codes of every image.
        retrieved: retrieved pairs per document, 0 to 3; the authors' code has 2, the paper 3.
        memory: what may be retrieved.
        neighbours: for every query, the rows of ``memory`` found for it; more than ``retrieved`` gives variety.

    Raises:
        ValueError: ``retrieved`` out of range, or neighbours of another number of queries.
    """

    queries: Sequence[Parts]
    layout: VocabLayout
    image_tokens: int
    retrieved: int = 2
    memory: Sequence[Parts] = ()
    neighbours: Any = ()  # sequence of sequences of rows, or an array (N, K)

    def __post_init__(self):
        if not 0 <= self.retrieved <= MOST_RETRIEVED:
            raise ValueError(f"retrieved must be 0 to {MOST_RETRIEVED}, got {self.retrieved}")
        if self.retrieved and len(self.neighbours) != len(self.queries):
            raise ValueError(
                f"there are neighbours of {len(self.neighbours)} samples, but {len(self.queries)} samples; search the "
                "memory for all of them, or set retrieved to 0"
            )

    def __len__(self) -> int:
        return len(self.queries)

    def draw(self, number: int, rng: np.random.Generator) -> Document:
        """The document of a query, with retrieved pairs drawn by ``rng``.

        Raises:
            DataError: fewer neighbours than ``retrieved``, one that the memory lacks, or unusable tokens; the message
                names the sample.
        """
        return self._document(number, [*self._retrieve(number, rng), self.queries[number]])

    def draw_query(self, number: int, rng: np.random.Generator) -> tuple[Int[np.ndarray, " S"], int]:
        """The tokens of ``draw``, and where those of the query begin; errors as there."""
        pairs = self._retrieve(number, rng)
        tokens = self._document(number, [*pairs, self.queries[number]]).tokens
        # Without retrieved pairs the query begins after <eos>; else where they would end, with <break> for <eos>.
        return tokens, len(self._document(number, pairs).tokens) if pairs else 1

    def _retrieve(self, number: int, rng: np.random.Generator) -> list[Parts]:
        if not self.retrieved:
            return []
        found = np.asarray(self.neighbours[number])
        if len(found) < self.retrieved:
            raise DataError(
                f"sample {number} has {len(found)} retrieved documents, not {self.retrieved}; search again with a "
                "larger number, or lower retrieved"
            )
        rows = rng.permutation(found)[: self.retrieved]
        for row in rows:
            if not 0 <= row < len(self.memory):
                raise DataError(
                    f"sample {number} names document {row}, but the memory has {len(self.memory)}; search again "
                    "with this memory"
                )
        return [self.memory[int(row)] for row in rows]

    def _document(self, number: int, pairs: Sequence[Parts]) -> Document:
        try:
            return make_document([part for pair in pairs for part in pair], self.layout, image_tokens=self.image_tokens)
        except ValueError as error:
            raise DataError(f"sample {number} or a document retrieved for it: {error}") from None
