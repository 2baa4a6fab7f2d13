"""Texts and images of a document as tokens and codes, and back."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from magma_jax.data.documents.document import MOST_RETRIEVED
from magma_jax.data.images import ImageInput
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.families.cm3leon.prompts import Codes, Gap, Segment
from magma_jax.families.vqgan.generator import ImageTokenizer
from magma_jax.models.cm3leon import CM3LeonConfig
from magma_jax.typing import Int

# A retrieved document: a text and its image.
Pair: TypeAlias = tuple[str, "ImageInput | Image.Image | Codes"]


class Hidden:
    """An image of which a part is missing, for ``CM3Leon.infill``.

    Args:
        image: the image.
        mask: (height, width), True where it is missing; a code is missing if any of its pixels is.
    """

    def __init__(self, image: ImageInput | Image.Image, mask: np.ndarray):
        self.image, self.mask = image, np.asarray(mask, bool)


Item: TypeAlias = "str | Gap | ImageInput | Image.Image | Hidden | Codes"


class Media:
    """The tokenizers of a model.

    Args:
        config: the model's config.
        tokenizer: of its texts.
        images: of its images; None for a model that reads and writes codes alone.
    """

    def __init__(self, config: CM3LeonConfig, tokenizer: Tokenizer, images: ImageTokenizer | None):
        self._config, self._text, self._images = config, tokenizer, images

    def pairs(self, documents: Sequence[Pair]) -> list[list[Segment]]:
        """Segments of retrieved documents. Raises ValueError for too many."""
        if len(documents) > MOST_RETRIEVED:
            raise ValueError(f"at most {MOST_RETRIEVED} documents are taken, got {len(documents)}")
        return [self.segments(pair) for pair in documents]

    def encode(self, text: str) -> Int[np.ndarray, " S"]:
        """Tokens of a text."""
        return np.array(self._text.encode(text), np.int32)

    def codes(self, image: Any) -> Int[np.ndarray, " T"]:
        """Codes of an image, or of its codes (T,) themselves."""
        if isinstance(image, Codes):
            return image.codes
        if isinstance(image, np.ndarray):
            return image
        codes, config = self._image_tokenizer("reads images"), self._config.tokenizer
        assert config is not None  # the model has a tokenizer
        source = image if isinstance(image, ImageInput) else ImageInput(image)
        return codes.encode(source.pixels(config.image_size)[None])[0]

    def images_of(self, codes: Int[np.ndarray, "N T"]) -> list[Image.Image]:
        """Images of codes. Raises ValueError if the model has no image tokenizer."""
        return [Image.fromarray(pixels) for pixels in self._image_tokenizer("draws images").decode(codes)]

    def hidden(self, mask: np.ndarray) -> np.ndarray:
        """Which codes have a pixel of a mask."""
        if mask.ndim != 2 or not mask.any():
            raise ValueError("mask has the image's height and width, and is True where it is drawn anew")
        config = self._config.tokenizer
        side = round(self._config.image_tokens**0.5) if config is None else config.image_size // config.factor
        rows = np.minimum(np.arange(mask.shape[0]) * side // mask.shape[0], side - 1)
        columns = np.minimum(np.arange(mask.shape[1]) * side // mask.shape[1], side - 1)
        hidden = np.zeros((side, side), bool)
        np.logical_or.at(hidden, (rows[:, None], columns[None, :]), mask)
        return hidden.ravel()

    def segments(self, parts: Sequence[Item]) -> list[Segment]:
        """Tokens and codes of a document; neighbouring texts are one."""
        segments: list[Segment] = []
        for part in parts:
            if isinstance(part, str):
                words = self.encode(part)
                if segments and isinstance(segments[-1], np.ndarray):
                    segments[-1] = np.concatenate([segments[-1], words])
                else:
                    segments.append(words)
            elif isinstance(part, Gap):
                segments.append(part)
            elif isinstance(part, Hidden):
                segments.append(Codes(self.codes(part.image), self.hidden(part.mask)))
            elif isinstance(part, Codes):
                segments.append(part)
            else:
                segments.append(Codes(self.codes(part)))
        return segments

    def split(self, ids: Int[np.ndarray, " S"]) -> list[Segment]:
        """The texts and images of drawn ids."""
        layout = self._config.vocabulary
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

    def join(self, segments: Sequence[Segment]) -> list[str | Image.Image]:
        """Texts and images; neighbouring texts are one."""
        parts: list[str | Image.Image] = []
        words: list[int] = []
        for segment in [*segments, None]:
            if isinstance(segment, np.ndarray):
                words += segment.tolist()
                continue
            if words or (segment is None and not parts):
                parts.append(self._text.decode(words))
                words = []
            if isinstance(segment, Codes):
                parts += self.images_of(segment.codes[None])
        return parts

    def _image_tokenizer(self, what: str) -> ImageTokenizer:
        if self._images is None:
            raise ValueError(f"this model has no image tokenizer, which {what}; train it with model.tokenizer")
        return self._images
