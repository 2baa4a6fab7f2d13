"""Sequences of MAGVLT: special tokens, the two layouts, and which positions see which.

The condition comes first, the target second (T = 3 of text, I = 4 of an image):

    text_first     BOC BOT  t t t  BOG BOI  i i i i       text to image
    image_first    BOC BOI  i i i i  BOG BOT  t t t       image to text, and both together

Attention is bidirectional, except around text of length n < T:

- text first: a padded position sees only itself, and is seen by no other;
- image first: a padded position is not seen. BOT sees no text, so that it cannot count the tokens whose number it
  predicts.

In a causal model a position sees those before it; padding is behind a text that comes second, and hidden in one that
comes first.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.nn.masks import Mask
from magma_jax.typing import Array, Int

Order = Literal["text_first", "image_first"]

# Rows of the table of special tokens. A selector takes the place of BOG if the context is made of two halves, and names
# the half to serve.
BOI, BOT, BOC, BOG, MASK_IMAGE, MASK_TEXT, LEFT, RIGHT, TOP, BOTTOM = range(10)
SPECIAL_ROWS = 10


@dataclasses.dataclass(frozen=True)
class Layout:
    """Indices of the parts in a sequence.

    Attributes:
        order: which modality comes first.
        image: index of the first code.
        text: index of the first text token.
        bot: index of BOT.
        specials: the four special tokens, in order; the third is BOG.
    """

    order: Order
    image: int
    text: int
    bot: int
    specials: tuple[int, int, int, int]


def layout_of(config: MagvltConfig, order: Order) -> Layout:
    """The layout of a model's sequences."""
    if order == "text_first":
        return Layout(order, image=config.text_positions + 4, text=2, bot=1, specials=(BOC, BOT, BOG, BOI))
    if order == "image_first":
        middle = config.image_places + 2
        return Layout(order, image=2, text=middle + 2, bot=middle + 1, specials=(BOC, BOI, BOG, BOT))
    raise ValueError(f"order {order!r} is none of text_first, image_first")


def attention_mask(config: MagvltConfig, order: Order, text_lengths: Int[Array, " B"]) -> Mask:
    """Which positions see which, for text of these lengths, end token included."""
    layout = layout_of(config, order)
    if order == "text_first":
        # Each padded position is a segment of its own, so it sees itself: a row without keys has no softmax.
        places = jnp.arange(config.length) - layout.text
        padded = (places >= text_lengths[:, None]) & (places < config.text_positions)
        kind = "causal" if config.causal else "full"
        return Mask(kind, segments=jnp.where(padded, 1 + places, 0).astype(jnp.int32))
    if config.causal:
        return Mask("causal")
    seen = np.ones((1, config.length, config.length), bool)
    seen[0, layout.bot, layout.text :] = False
    return Mask("full", lengths=layout.text + text_lengths, extra=jnp.asarray(seen))
