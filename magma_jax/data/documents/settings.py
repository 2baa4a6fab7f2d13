"""Settings and batches shared by all datasets of documents."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from magma_jax.config import ConfigError
from magma_jax.data.batches.batching import Batch
from magma_jax.data.batches.held_out import spaced_samples
from magma_jax.data.documents.document import MOST_RETRIEVED, RetrievedDocuments
from magma_jax.data.documents.packing import BlockConfig, Blocks
from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.typing import IGNORED


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentsConfig(BlockConfig):
    """Settings shared by all datasets of documents.

    Attributes:
        retrieved: retrieved pairs before every pair, 0 to 3; CM3Leon's code has 2.
        annotation: folder of ``python -m magma_jax.retrieval annotate``, which says what may be retrieved for every
            pair; needed unless ``retrieved`` is 0.
        vocabulary: ids; None for the model's.
        image_tokens: codes of an image; None for the model's.
    """

    retrieved: int = 0
    annotation: str | None = None
    vocabulary: VocabLayout | None = None
    image_tokens: int | None = None

    may_change: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.retrieved <= MOST_RETRIEVED:
            raise ValueError(f"data.retrieved must be 0 to {MOST_RETRIEVED}, got {self.retrieved}")
        if self.retrieved and not self.annotation:
            raise ValueError(
                "data.retrieved: pairs are retrieved beforehand; set data.annotation to a folder of "
                "python -m magma_jax.retrieval annotate"
            )

    def layout(self) -> tuple[VocabLayout, int]:
        """Vocabulary and codes of an image.

        Raises:
            ConfigError: they are not set, which a run does from its model.
        """
        if self.vocabulary is None or self.image_tokens is None:
            raise ConfigError("data.vocabulary and data.image_tokens are the model's; set both to read documents alone")
        return self.vocabulary, self.image_tokens


def block_batches(documents: RetrievedDocuments, config: BlockConfig) -> Callable[[int, int, Sequence[int]], Blocks]:
    """Creates the ``Dataset.batches`` of documents."""

    def batches(batch_size: int, seed: int, rows: Sequence[int]) -> Blocks:
        return Blocks(documents, config, batch_size=batch_size, seed=seed, rows=rows)

    return batches


def held_out_documents(
    splits: Mapping[str, RetrievedDocuments], length: int
) -> Callable[[str, int, int, Sequence[int]], list[Batch]]:
    """Creates the ``Dataset.validation_batches`` of documents in splits: one document per row, without moved spans.

    Of retrieved pairs the same ones are taken every time, and they have no labels. Rows are padded to the longest
    document; one with more than ``length`` + 1 tokens is cut.
    """

    def batches(split: str, limit: int, batch_size: int, rows: Sequence[int]) -> list[Batch]:
        numbers = spaced_samples({name: range(len(one)) for name, one in splits.items()}, split, limit)
        documents = splits[split]
        drawn = [documents.draw_query(number, np.random.default_rng((0, number))) for number in numbers]
        longest = min(max(len(tokens) for tokens, _ in drawn), length + 1)
        size = -(-len(drawn) // batch_size) * batch_size  # the last batch is filled with rows without labels
        tokens = np.full((size, longest), documents.layout.pad, np.int32)
        labels = np.full((size, longest), IGNORED, np.int32)
        for row, (ids, start) in enumerate(drawn):
            end = min(len(ids), longest)
            tokens[row, :end] = ids[:end]
            labels[row, start:end] = ids[start:end]
        parts = [np.arange(first, first + batch_size)[list(rows)] for first in range(0, size, batch_size)]
        return [{"tokens": tokens[part], "labels": labels[part]} for part in parts]

    return batches
