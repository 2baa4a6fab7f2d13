"""Sizes of MAGVLT's transformer."""

import dataclasses
import math
from typing import Literal

from magma_jax.config import check_dtype, check_sizes
from magma_jax.models.magvlt.parameters import TransformerParam
from magma_jax.models.vision.vqgan import VQGANConfig
from magma_jax.nn.transformer.config import BlockConfig, TrunkConfig

# Standard deviation of fresh weights.
STD = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagvltConfig:
    """The transformer; the defaults are the released base model.

    Attributes:
        layers: number of layers.
        width: width of the residual stream (D).
        heads: attention heads; they divide the width.
        image_rows: codes of the image tokenizer; the first rows of the table and of the head.
        text_rows: text tokens; the rows after ``image_rows``.
        image_positions: codes of an image (I).
        text_positions: text tokens, padding included (T); the longest length that the length head knows.
        attention_dropout: dropout rate of the attention weights in training.
        residual_dropout: dropout rate of the attention and MLP branches in training.
        dtype: dtype of the stored weights.
        caption_vector: whether a projection of the mean of the text's embeddings is added at every code where the text
            comes first; not the original's, for small models.
        context_head: whether the table of tokens also reads a projection of the mean of the embeddings of what comes
            first, text or codes; not the original's. With it a small model learns which words and colours go together
            long before its layers combine them with shapes.
        token_std: standard deviation of fresh rows of the table of tokens. In a narrow model the original's makes them
            so short that tokens of the same places, such as those of two skin tones, become one direction.
        image_patch: side of the square of codes that share one position of the sequence; above 1 is not the original's,
            and makes a small model's pass several times cheaper.
        causal: whether a position sees only those before it, and predicts the next: ARGVLT, the paper's autoregressive
            baseline. It has the same parameters, of which length head and rows of masks have no effect.
        classes: answers to questions about images that a linear classifier on the token after BOT knows, see
            ``MagvltModel.class_logits``; 0 for none.
        tokenizer: the image tokenizer that the model holds, frozen; None for a model of codes alone.
    """

    layers: int = 24
    width: int = 1024
    heads: int = 8
    image_rows: int = 16384
    text_rows: int = 49408
    image_positions: int = 256
    text_positions: int = 64
    attention_dropout: float = 0.1
    residual_dropout: float = 0.1
    dtype: str = "float32"
    caption_vector: bool = False
    context_head: bool = False
    token_std: float = STD
    image_patch: int = 1
    causal: bool = False
    classes: int = 0
    tokenizer: VQGANConfig | None = None
    kind: Literal["magvlt"] = "magvlt"

    def __post_init__(self):
        check_sizes(self, "layers", "width", "heads", "image_rows", "text_rows", "image_positions", "text_positions")
        check_sizes(self, "image_patch")
        check_dtype("model: dtype", self.dtype)
        if self.width % self.heads:
            raise ValueError(f"model: {self.heads} heads do not divide the width {self.width}")
        if self.image_patch > 1 and self.grid[0] % self.image_patch:
            raise ValueError(f"model: image_patch {self.image_patch} does not divide the {self.grid[0]} codes of a row")
        if self.image_patch > 1 and self.causal:
            raise ValueError(f"model: a causal model predicts code by code; set image_patch=1, got {self.image_patch}")
        for name in ("attention_dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model: {name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.token_std <= 0:
            raise ValueError(f"model: token_std must be positive, got {self.token_std}")
        if self.classes < 0:
            raise ValueError(f"model: classes must not be negative, got {self.classes}")
        if self.classes and self.causal:
            raise ValueError("model: a causal model has no classes, since the token after BOT sees no question")
        if self.tokenizer is not None:
            for name, found in (("image_rows", self.tokenizer.codes), ("image_positions", self.tokenizer.tokens)):
                if getattr(self, name) != found:
                    raise ValueError(f"model: {name} is {getattr(self, name)}, but the image tokenizer has {found}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's codes.

        Raises:
            ValueError: the positions are no square.
        """
        side = math.isqrt(self.image_positions)
        if side * side != self.image_positions:
            raise ValueError(f"model: image_positions {self.image_positions} are no square")
        return side, side

    @property
    def image_places(self) -> int:
        """Positions of a sequence that an image takes (P): one for each square of codes."""
        return self.image_positions // self.image_patch**2

    @property
    def dummy_length(self) -> int:
        """Masked tokens of the text beside which a length is predicted: 16 of 64 in the original."""
        return max(1, self.text_positions // 4)

    @property
    def length(self) -> int:
        """Positions of a sequence (S): image, text and four special tokens."""
        return self.image_places + self.text_positions + 4

    def trunk(self) -> TrunkConfig:
        """Pre-norm layers with biases everywhere, exact GELU and no norm after the last."""
        block = BlockConfig(
            width=self.width,
            heads=self.heads,
            feed_forward=4 * self.width,
            activation="gelu",
            attention_dropout=self.attention_dropout,
            residual_dropout=self.residual_dropout,
            param=TransformerParam,
            dtype=self.dtype,
        )
        return TrunkConfig(block=block, layers=self.layers, final_norm=False)


# The released models, magvlt-it2it-base and magvlt-it2it-large.
BASE = MagvltConfig()
LARGE = MagvltConfig(layers=36, width=1280, heads=10)
