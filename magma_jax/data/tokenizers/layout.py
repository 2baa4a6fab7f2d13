"""One vocabulary for text and images: which ids are special, sentinels, text tokens and image codes."""

import dataclasses

import numpy as np

from magma_jax.config import check_sizes
from magma_jax.typing import Int, Shaped

# Special tokens; their ids are their positions here. The first four are those of a metaseq dictionary.
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<break>", "<eoss>")

# A number of rows that tiles of every accelerator and meshes of up to 128 devices divide.
ROWS_MULTIPLE = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabLayout:
    """Ranges of ids, in this order: special tokens, sentinels, text tokens, image codes, and unused rows.

    The defaults are the sizes of CM3Leon (Yu et al. 2023, section 2.1) with metaseq's 512 sentinels.

    Attributes:
        text: number of text tokens, ``len`` of the tokenizer.
        image: number of image codes, the size of the image tokenizer's codebook.
        sentinels: number of sentinels, which mark the places of moved spans.

    Raises:
        ValueError: a size below 1.
    """

    text: int = 56_320
    image: int = 8_192
    sentinels: int = 512

    pad = SPECIAL.index("<pad>")
    bos = SPECIAL.index("<bos>")
    eos = SPECIAL.index("<eos>")
    unk = SPECIAL.index("<unk>")
    brk = SPECIAL.index("<break>")
    eoss = SPECIAL.index("<eoss>")

    def __post_init__(self):
        check_sizes(self, "text", "image", "sentinels")

    @property
    def sentinel_ids(self) -> range:
        """Ids of the sentinels."""
        return range(len(SPECIAL), len(SPECIAL) + self.sentinels)

    @property
    def text_ids(self) -> range:
        """Ids of the text tokens."""
        return range(self.sentinel_ids.stop, self.sentinel_ids.stop + self.text)

    @property
    def image_ids(self) -> range:
        """Ids of the image codes."""
        return range(self.text_ids.stop, self.text_ids.stop + self.image)

    @property
    def rows(self) -> int:
        """Rows of an embedding table: all ids, rounded up to a multiple of ``ROWS_MULTIPLE``."""
        return -(-self.image_ids.stop // ROWS_MULTIPLE) * ROWS_MULTIPLE

    def sentinel(self, number: int) -> int:
        """Id of a sentinel. Raises ValueError if there is no such sentinel."""
        return int(_shift(np.array([number]), range(self.sentinels), self.sentinel_ids, "sentinel", "sentinels")[0])

    def from_text(self, tokens: Shaped[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """Ids of a tokenizer's tokens. Raises ValueError if one is not below ``text``."""
        return _shift(tokens, range(self.text), self.text_ids, "text token", "tokens of the tokenizer")

    def to_text(self, ids: Shaped[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """Inverse of ``from_text``. Raises ValueError if an id is not a text token."""
        return _shift(ids, self.text_ids, range(self.text), "id", "text ids")

    def from_codes(self, codes: Shaped[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """Ids of an image tokenizer's codes. Raises ValueError if one is not below ``image``."""
        return _shift(codes, range(self.image), self.image_ids, "image code", "codes of the codebook")

    def to_codes(self, ids: Shaped[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """Inverse of ``from_codes``. Raises ValueError if an id is not an image code."""
        return _shift(ids, self.image_ids, range(self.image), "id", "image ids")

    def is_text(self, ids: Shaped[np.ndarray, "*shape"]) -> np.ndarray:
        """Mask of the text tokens among ``ids``."""
        return (ids >= self.text_ids.start) & (ids < self.text_ids.stop)

    def is_image(self, ids: Shaped[np.ndarray, "*shape"]) -> np.ndarray:
        """Mask of the image codes among ``ids``."""
        return (ids >= self.image_ids.start) & (ids < self.image_ids.stop)

    def name(self, token: int) -> str:
        """Readable form of an id, such as ``<eos>``, ``<sentinel:3>``, ``text 17`` or ``image 5``.

        Raises:
            ValueError: an id beyond ``rows``.
        """
        if not 0 <= token < self.rows:
            raise ValueError(f"id {token} is not one of the {self.rows} rows of the vocabulary")
        if token < len(SPECIAL):
            return SPECIAL[token]
        if token in self.sentinel_ids:
            return f"<sentinel:{token - self.sentinel_ids.start}>"
        if token in self.text_ids:
            return f"text {token - self.text_ids.start}"
        return f"image {token - self.image_ids.start}" if token in self.image_ids else f"unused {token}"


def _shift(
    values: Shaped[np.ndarray, "*shape"], of: range, to: range, what: str, known: str
) -> Int[np.ndarray, "*shape"]:
    """Values of one range as int32 values of another."""
    if values.dtype.kind not in "iu":
        raise ValueError(f"{what}s are integers, not {values.dtype}")
    values = values.astype(np.int64)  # codes are stored in few bits
    outside = (values < of.start) | (values >= of.stop)
    if outside.any():
        raise ValueError(
            f"{what} {int(values[outside].flat[0])} is not one of the {known}, {of.start} to {of.stop - 1}"
        )
    return (values + (to.start - of.start)).astype(np.int32)
