"""MAGVLT's transformer: embedding with three position tables, trunk, token head and length head."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx

from magma_jax.models.magvlt.config import STD, MagvltConfig
from magma_jax.models.magvlt.layout import MASK_IMAGE, MASK_TEXT, SPECIAL_ROWS, Order, attention_mask, layout_of
from magma_jax.models.magvlt.parameters import TransformerParam
from magma_jax.models.vision.vqgan import VQGAN
from magma_jax.nn.activations import ACTIVATIONS
from magma_jax.nn.layers import Embedding, Initializer, LayerNorm, Linear, dropout, normal, product
from magma_jax.nn.modules import HeadParam
from magma_jax.nn.stack import Remat
from magma_jax.nn.transformer.trunk import Trunk
from magma_jax.runtime.sharding import split_rows
from magma_jax.typing import Array, Bool, Float, Int, PRNGKey

Modality = Literal["image", "text"]


class Canvas(NamedTuple):
    """Image codes and text of a batch, and which of them are masked.

    ``text_lengths`` count the end token. ``selectors`` are special tokens that replace BOG; None for BOG.
    """

    image: Any  # (B, I), below image_rows
    text: Any  # (B, T), below text_rows
    text_lengths: Any  # (B,)
    image_masked: Any  # (B, I)
    text_masked: Any  # (B, T)
    selectors: Any = None  # (B,)


class Hidden(NamedTuple):
    """Hidden states after the last layer, which no norm follows, at the positions that predict the tokens.

    A token is predicted at its own position; in a causal model at the one before. States of the second modality are
    those of ``beside``: E = D, with a context head 2 D.
    """

    image: Array  # (B, I, E), one for each code
    text: Array  # (B, T, E)
    bot: Array  # (B, D); the length head reads it, in the order image_first


class MagvltModel(Trunk):
    """The transformer.

    Beside the members of ``Trunk`` it has the table ``wte`` (codes, then text tokens), which is also the head; the
    table ``special``; the position tables ``image_positions``, ``text_positions`` and ``special_positions``; the head's
    transform ``head_proj``, ``head_norm`` and bias ``head_bias``; ``length_head``; and, if the config has them,
    ``caption_proj``, ``context_proj``, ``class_head`` and the ``image_tokenizer``, which is frozen and not part of the
    forward pass.
    """

    def __init__(self, config: MagvltConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.width, jnp.dtype(config.dtype)

        def table(rows: int, std: float = STD) -> Embedding:
            return Embedding(rows, width, param=TransformerParam, weight_init=normal(std), dtype=dtype, rngs=rngs)

        self.wte = table(config.image_rows + config.text_rows, config.token_std)
        self.special = table(SPECIAL_ROWS)
        self.image_positions = table(config.image_places)
        self.text_positions = table(config.text_positions)
        # As many rows as positions, of which only the first ``image_places`` (or four) are used.
        self.special_positions = table(config.length)
        super().__init__(config.trunk(), rngs=rngs)
        self.head_proj = Linear(
            width, width, param=TransformerParam, weight_init=normal(STD), dtype=config.dtype, rngs=rngs
        )
        self.head_norm = LayerNorm(width, param=TransformerParam, dtype=dtype)
        self.head_bias = TransformerParam(jnp.zeros(config.image_rows + config.text_rows, dtype), decay=False)
        self.length_head = Linear(
            width,
            config.text_positions,
            param=HeadParam,
            use_bias=False,
            weight_init=normal(STD),
            dtype=config.dtype,
            rngs=rngs,
        )
        self.class_head = Linear(width, config.classes, param=HeadParam, rngs=rngs) if config.classes else None

        def linear(inputs: int, outputs: int, init: Initializer) -> Linear:
            return Linear(inputs, outputs, param=TransformerParam, weight_init=init, dtype=config.dtype, rngs=rngs)

        self.caption_proj = linear(width, width, normal(STD)) if config.caption_vector else None
        # The mean of embeddings is short; the vector that it is added to has a norm.
        self.context_proj = linear(width, width, normal(1.0)) if config.context_head else None
        codes = config.image_patch**2
        self.join_proj = linear(codes * width, width, _mean_of(codes)) if codes > 1 else None
        self.part_proj = linear(width, codes * width, _copies_to(codes)) if codes > 1 else None
        self.image_tokenizer = None if config.tokenizer is None else VQGAN(config.tokenizer, rngs=rngs)

    def embed(self, order: Order, canvas: Canvas, dtype: Any = jnp.float32) -> Float[Array, "B S D"]:
        """Embeddings of a batch in the given order.

        A position adds the row of its modality's position table, masked or not. A special *or masked* one also adds
        the row of ``special_positions``: a masked code at i adds ``image_positions[i] + special_positions[i]``.
        """
        config, layout = self.config, layout_of(self.config, order)
        special, positions = self.special.weight[...], self.special_positions.weight[...]
        codes = self.wte.weight[...][canvas.image]
        if self.join_proj is None:
            masked = special[MASK_IMAGE] + positions[: config.image_positions]
            image = jnp.where(canvas.image_masked[..., None], masked, codes)
        else:
            # Codes of one position have a matrix each, which knows their places.
            codes = jnp.where(canvas.image_masked[..., None], special[MASK_IMAGE], codes)
            image = self.join_proj(joined(config, codes))
        text = jnp.where(
            canvas.text_masked[..., None],
            special[MASK_TEXT] + positions[: config.text_positions],
            self.wte.weight[...][config.image_rows + canvas.text],
        )
        if self.caption_proj is not None and order == "text_first":
            # Not where the image comes first: BOT would see the text by way of the image.
            image = image + self._caption_vector(canvas)
        image = image + self.image_positions.weight[...]
        text = text + self.text_positions.weight[...]
        first, second = (image, text) if order == "image_first" else (text, image)
        ids = jnp.broadcast_to(jnp.array(layout.specials), (canvas.image.shape[0], 4))
        if canvas.selectors is not None:
            ids = ids.at[:, 2].set(canvas.selectors)
        four = special[ids] + positions[:4]
        return jnp.concatenate([four[:, :2], first, four[:, 2:], second], axis=1).astype(dtype)

    def embed_next(
        self, order: Order, tokens: Int[Array, " B"], index: Int[Array, ""], canvas: Canvas, dtype: Any = jnp.float32
    ) -> Float[Array, "B 1 D"]:
        """Embeddings of the second modality's tokens of one index, as in ``embed``; ``canvas`` holds the first's."""
        if order == "image_first":
            x = self.wte.weight[...][self.config.image_rows + tokens][:, None] + self.text_positions.weight[...][index]
            return x.astype(dtype)
        x = self.wte.weight[...][tokens][:, None]
        if self.caption_proj is not None:
            x = x + self._caption_vector(canvas)
        return (x + self.image_positions.weight[...][index]).astype(dtype)

    def _caption_vector(self, canvas: Canvas) -> Float[Array, "B 1 D"]:
        """Projection of the mean of a text's embeddings."""
        assert self.caption_proj is not None  # the config has it
        return self.caption_proj(self._mean(canvas, "text"))[:, None]

    def _mean(self, canvas: Canvas, modality: Modality) -> Float[Array, "B D"]:
        """Mean of the embeddings of what is visible."""
        seen = ~canvas.image_masked
        if modality == "text":
            seen = (jnp.arange(self.config.text_positions) < canvas.text_lengths[:, None]) & ~canvas.text_masked
        rows = self.wte.weight[...][self.columns(modality)[0] + getattr(canvas, modality)]
        return jnp.where(seen[..., None], rows, 0).sum(1) / jnp.maximum(seen.sum(1), 1)[:, None]

    def context(self, order: Order, canvas: Canvas, dtype: Any = jnp.float32) -> Float[Array, "B 1 D"] | None:
        """Vector of what comes first, for ``beside``; None without a context head."""
        if self.context_proj is None:
            return None
        mean = self._mean(canvas, "text" if order == "text_first" else "image")
        return self.context_proj(mean.astype(dtype))[:, None]

    def hidden(
        self,
        order: Order,
        canvas: Canvas,
        *,
        dtype: Any = jnp.float32,
        dropout_key: PRNGKey | None = None,
        remat: Remat = "none",
    ) -> Hidden:
        """Hidden states of codes, text and BOT.

        Args:
            order: which modality comes first; see ``layout``.
            canvas: codes, text and masks.
            dtype: dtype of the activations.
            dropout_key: None for no dropout.
            remat: remat policy of the backward pass, see ``nn.stack``.
        """
        config, layout = self.config, layout_of(self.config, order)
        x = self(
            split_rows(self.embed(order, canvas, dtype)),
            mask=attention_mask(config, order, canvas.text_lengths),
            dropout_key=dropout_key,
            remat=remat,
        ).hidden
        start, text = layout.image - config.causal, layout.text - config.causal
        image = x[:, start : start + config.image_places]
        if self.part_proj is not None:
            image = parted(config, self.part_proj(image))
        words = x[:, text : text + config.text_positions]
        context = self.context(order, canvas, x.dtype)
        if order == "text_first":
            image = beside(image, context)
        else:
            words = beside(words, context)
        return Hidden(image=image, text=words, bot=x[:, layout.bot])

    def logits(self, hidden: Float[Array, "... E"], modality: Modality) -> Float[Array, "... V"]:
        """fp32 logits over the tokens of one modality; the other half of the vocabulary is not computed."""
        first, stop = self.columns(modality)
        states, context = jnp.split(hidden, [self.config.width], axis=-1)
        x = self.head_norm(ACTIVATIONS["gelu"].function(self.head_proj(states)))
        if context.shape[-1]:
            x = x + context
        table = self.wte.weight[...][first:stop].astype(x.dtype)
        bias = self.head_bias[...][first:stop].astype(jnp.float32)
        return product(x, table, preferred_element_type=jnp.float32) + bias

    def columns(self, modality: Modality) -> tuple[int, int]:
        """First and last + 1 row of a modality in the table."""
        codes = self.config.image_rows
        return (0, codes) if modality == "image" else (codes, codes + self.config.text_rows)

    def length_logits(self, bot: Float[Array, "... D"]) -> Float[Array, "... T"]:
        """fp32 logits of the text's length from the hidden state at BOT; class c is a length of c + 1."""
        return self.length_head(bot, jnp.float32)

    def class_logits(self, first: Float[Array, "... E"], dropout_key: PRNGKey | None = None) -> Float[Array, "... C"]:
        """fp32 logits of the answers from the hidden state of a question's first token, in the order image_first.

        ``dropout_key``, None for none, drops with the rate of the branches.

        Raises:
            ValueError: the model has no classifier.
        """
        if self.class_head is None:
            raise ValueError("this model has no classifier of answers; build it with MagvltConfig(classes=...)")
        first = first[..., : self.config.width]
        return self.class_head(dropout(first, self.config.residual_dropout, dropout_key), jnp.float32)


def _mean_of(codes: int) -> Initializer:
    """Weights of the mean of a position's codes, and noise.

    What concerns all codes alike, such as the colour of a drawing, is then learned once and not by each code's matrix.
    """

    def init(key: PRNGKey, shape: tuple[int, ...], dtype: Any) -> Array:
        return normal(STD)(key, shape, dtype) + jnp.tile(jnp.eye(shape[0], dtype=dtype), (1, codes)) / codes

    return init


def _copies_to(codes: int) -> Initializer:
    """Weights that give every code of a position the position's vector, and noise; see ``_mean_of``."""

    def init(key: PRNGKey, shape: tuple[int, ...], dtype: Any) -> Array:
        return normal(STD)(key, shape, dtype) + jnp.tile(jnp.eye(shape[1], dtype=dtype), (codes, 1))

    return init


def beside(states: Float[Array, "B S D"], context: Float[Array, "B 1 D"] | None) -> Float[Array, "B S E"]:
    """States of the second modality, each with the row's context vector beside it, if there is one.

    They stand together, so that whoever chooses some states for ``logits`` chooses both.
    """
    return states if context is None else jnp.concatenate([states, jnp.broadcast_to(context, states.shape)], -1)


def joined(config: MagvltConfig, codes: Float[Array, "B I D"]) -> Float[Array, "B P E"]:
    """Vectors of the codes that share a position, side by side: E = D image_patch^2, in the order of rows."""
    side, patch = config.grid[0] // config.image_patch, config.image_patch
    x = codes.reshape(len(codes), side, patch, side, patch, -1).swapaxes(2, 3)
    return x.reshape(len(codes), side * side, -1)


def parted(config: MagvltConfig, places: Float[Array, "B P E"]) -> Float[Array, "B I D"]:
    """The inverse of ``joined``."""
    side, patch = config.grid[0] // config.image_patch, config.image_patch
    x = places.reshape(len(places), side, side, patch, patch, -1).swapaxes(2, 3)
    return x.reshape(len(places), config.image_positions, -1)


def canvas_of(
    image: Int[Array, "B I"],
    text: Int[Array, "B T"],
    text_lengths: Int[Array, " B"],
    *,
    image_masked: Bool[Array, "B I"] | None = None,
    text_masked: Bool[Array, "B T"] | None = None,
    selectors: Int[Array, " B"] | None = None,
) -> Canvas:
    """A canvas in which nothing is masked unless it is said."""
    return Canvas(
        image,
        text,
        text_lengths,
        jnp.zeros(image.shape, bool) if image_masked is None else image_masked,
        jnp.zeros(text.shape, bool) if text_masked is None else text_masked,
        selectors,
    )


def untold(
    config: MagvltConfig, image: Int[Array, "B I"], image_masked: Bool[Array, "B I"], lengths: Int[Array, " B"]
) -> Canvas:
    """Images with texts of these lengths that are masked as a whole."""
    masked = jnp.arange(config.text_positions) < lengths[:, None]
    return Canvas(image, jnp.zeros(masked.shape, jnp.int32), lengths, image_masked, masked)
