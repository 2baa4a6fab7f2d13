"""MAGMA: a frozen language model that sees (Eichenberg et al., 2021).

Encoder and prefix turn an image into a sequence of word-like vectors; these and word embeddings form one sequence that
the language model, with its adapters, continues. Training is next-token prediction on the words.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.config import check_dtype
from magma_jax.family import ShardingRow
from magma_jax.models.language.catalog import LanguageModelConfig
from magma_jax.models.language.decoder import Decoder
from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.models.prefix import ImagePrefix, PrefixConfig
from magma_jax.models.vision.catalog import EncoderConfig, build_encoder, normalize_for
from magma_jax.models.vision.clip_resnet import CLIPResNetConfig
from magma_jax.nn.adapters import AdapterConfig
from magma_jax.nn.convolution import BatchNormMode
from magma_jax.nn.layers import Linear
from magma_jax.nn.lora import LoraConfig
from magma_jax.nn.masks import Mask
from magma_jax.nn.modules import HeadParam
from magma_jax.nn.stack import Remat
from magma_jax.nn.transformer.cache import KVCache
from magma_jax.nn.transformer.trunk import TrunkOutput
from magma_jax.typing import Array, Float, Int, PRNGKey, UInt8

# Shardings of encoder and prefix.
SHARDINGS: tuple[ShardingRow, ...] = (
    (r"image_prefix/encoder/.*(conv\w*|downsample)/weight", ("fsdp", None, None, None)),
    (r"image_prefix/.*(proj|proj_in|qkv|c_fc|c_gate)/weight", ("fsdp", None)),
    (r"image_prefix/(queries|encoder/position_table)", (None, "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class MagmaConfig:
    """A MAGMA model.

    Attributes:
        lm: the language model, one of the kinds of ``models.language``.
        encoder: the image encoder, one of the kinds of ``models.vision``.
        prefix: the map from the encoder's features to word-like vectors.
        mlp_adapter: adapter after (or parallel to) every MLP; None for none.
        attn_adapter: adapter of every attention; None for none.
        lora: LoRA of the language model, alone or beside adapters; None for none.
        classes: outputs of a classification head on the last text token (paper, 4.1.3); 0 for none.
        begin: id of the token that the language model's tokenizer puts before every sequence; None for none.
        dtype: dtype of activations; LayerNorm, softmax, rotary angles, logits and loss are fp32 regardless.
    """

    lm: LanguageModelConfig = GPTJConfig()
    encoder: EncoderConfig = CLIPResNetConfig()
    prefix: PrefixConfig = PrefixConfig()
    mlp_adapter: AdapterConfig | None = None
    attn_adapter: AdapterConfig | None = None
    lora: LoraConfig | None = None
    classes: int = 0
    begin: int | None = None
    dtype: str = "float32"
    kind: Literal["magma"] = "magma"

    def __post_init__(self):
        check_dtype("dtype", self.dtype)
        if not 0 <= self.classes < 2**31:
            raise ValueError(f"classes must not be negative, got {self.classes}")
        self.prefix.positions(self.encoder.positions)  # raises for an encoder that does not fit
        if self.begin is not None and not 0 <= self.begin < self.lm.vocab_rows:
            raise ValueError(f"begin {self.begin} is none of the {self.lm.vocab_rows} ids of the language model")


class MagmaModel(nnx.Module):
    """Encoder, prefix, language model with adapters, and optionally a classification head."""

    def __init__(self, config: MagmaConfig, *, rngs: nnx.Rngs):
        self.config = config
        encoder = build_encoder(config.encoder, rngs=rngs)
        self.image_prefix = ImagePrefix(encoder, config.lm.width, config.prefix, rngs=rngs)
        self.lm = Decoder(
            config.lm, mlp_adapter=config.mlp_adapter, attn_adapter=config.attn_adapter, lora=config.lora, rngs=rngs
        )
        self.class_head = (
            Linear(config.lm.width, config.classes, param=HeadParam, rngs=rngs) if config.classes else None
        )

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of activations."""
        return jnp.dtype(self.config.dtype)

    @property
    def image_positions(self) -> int:
        """Positions of one image in a sequence."""
        return self.image_prefix.positions

    def encode_images(
        self, images: Float[Array, "B h w 3"], *, batch_norm: BatchNormMode = "frozen", remat: Remat = "none"
    ) -> Float[Array, "B ..."]:
        """Features of normalised images: a grid (B, P, C), or (B, C) from a pooled encoder."""
        return self.image_prefix.encoder(images.astype(self.dtype), batch_norm=batch_norm, remat=remat)

    def encode_pixels(
        self, pixels: UInt8[Array, "B h w 3"], *, batch_norm: BatchNormMode = "frozen", remat: Remat = "none"
    ) -> Float[Array, "B ..."]:
        """Features of stored images (pixels of 0 to 255); see ``encode_images``."""
        return self.encode_images(normalize_for(self.config.encoder, pixels), batch_norm=batch_norm, remat=remat)

    def embed_features(
        self, features: Float[Array, "B ..."], *, dropout_key: PRNGKey | None = None
    ) -> Float[Array, "B P D"]:
        """Features to word-like vectors; ``dropout_key=None`` means no dropout."""
        return self.image_prefix(features.astype(self.dtype), dropout_key=dropout_key)

    def embed_images(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B P D"]:
        """Normalised images to word-like vectors, in inference mode."""
        return self.embed_features(self.encode_images(images))

    def embed_tokens(self, ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Word embeddings."""
        return self.lm.embed(ids, self.dtype)

    def __call__(
        self,
        embeddings: Float[Array, "B S D"],
        *,
        positions: Int[Array, "B S"] | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        collect: tuple[str, ...] = (),
        dropout_key: PRNGKey | None = None,
        remat: Remat = "none",
    ) -> TrunkOutput:
        """Runs the language model with its adapters over any mixture of prefixes and word embeddings.

        ``dropout_key`` is that of the LoRA's dropout; None for no dropout.
        """
        drops = self.config.lora is not None and self.config.lora.dropout > 0
        return self.lm(
            embeddings,
            positions=positions,
            mask=mask,
            cache=cache,
            collect=collect,
            dropout_key=dropout_key if drops else None,
            remat=remat,
        )

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """fp32 logits of the final hidden states."""
        return self.lm.logits(hidden)

    def caption_hidden(
        self,
        features: Float[Array, "B ..."],
        tokens: Int[Array, "B S"],
        *,
        dropout_key: PRNGKey | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "B S D"]:
        """Final hidden states, from which ``logits`` predicts each of ``tokens`` given the image and earlier tokens.

        The first token is predicted from the last position of the image. Right padding does not affect the tokens
        before it, so S is any length that holds the batch.
        """
        prefix = self._opening(features, dropout_key)
        # The last token's prediction is not needed, so it is not run.
        embeddings = jnp.concatenate([prefix, self.embed_tokens(tokens[:, :-1])], axis=1)
        hidden = self(embeddings, dropout_key=_other(dropout_key), remat=remat).hidden
        return hidden[:, prefix.shape[1] - 1 :]

    def packed_hidden(
        self,
        features: Float[Array, "B N ..."],
        tokens: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        *,
        dropout_key: PRNGKey | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "B S D"]:
        """``caption_hidden`` of rows that hold up to N samples each, see ``data.batches.batching``.

        A row holds its N images, then its tokens. Each position sees itself and the earlier ones of its own sample. For
        two samples of one image position p and two words w each, and one padding token:

            p1 p2 w1 w1 w2 w2 --
             1  .  .  .  .  .  .
             .  1  .  .  .  .  .
             1  .  1  .  .  .  .
             1  .  1  1  .  .  .
             .  1  .  .  1  .  .
             .  1  .  .  1  1  .
             .  .  .  .  .  .  1
        """
        batch, slots, *shape = features.shape
        prefix = self._opening(features.reshape(batch * slots, *shape), dropout_key)
        size = prefix.shape[1]
        embeddings = jnp.concatenate([prefix.reshape(batch, slots * size, -1), self.embed_tokens(tokens)], axis=1)

        slot, place = jnp.divmod(jnp.arange(slots * size), size)
        owner = _behind(slot + 1, segments)
        all_positions = _behind(place, size + positions)
        # Images precede words, so the order within a row is also the order within each sample.
        mask = Mask("causal", segments=owner)
        forward = {"dropout_key": _other(dropout_key), "remat": remat}
        hidden = self(embeddings, positions=all_positions, mask=mask, **forward).hidden

        # A token is predicted from the one before it, the first of a sample from the last position of its image.
        end_of_image = segments * size - 1
        before = slots * size - 1 + jnp.arange(tokens.shape[1])
        predictor = jnp.where((positions == 0) & (segments > 0), end_of_image, before)
        return jnp.take_along_axis(hidden, predictor[:, :, None], axis=1)

    def _opening(self, features: Float[Array, "B ..."], dropout_key: PRNGKey | None) -> Float[Array, "B P D"]:
        """What stands before the words of a sample: the begin of text, if there is one, and the image."""
        image = self.embed_features(features, dropout_key=dropout_key)
        if self.config.begin is None:
            return image
        begin = self.embed_tokens(jnp.full((image.shape[0], 1), self.config.begin))
        return jnp.concatenate([begin, image], axis=1)

    def class_logits(self, embeddings: Float[Array, "B S D"], lengths: Int[Array, " B"]) -> Float[Array, "B classes"]:
        """fp32 class scores from the last-layer embedding of each row's last token (position ``lengths`` - 1)."""
        hidden = self(embeddings).hidden
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.class_logits_of(last)

    def class_logits_of(self, hidden: Float[Array, "... D"]) -> Float[Array, "... classes"]:
        """fp32 class scores of final hidden states."""
        if self.class_head is None:
            raise ValueError("this model has no classification head; build it with MagmaConfig(classes=...)")
        return self.class_head(hidden).astype(jnp.float32)

    def remove_adapters(self) -> None:
        """Removes every adapter, which restores the logits of the unadapted language model bit for bit."""
        self.lm.remove_adapters()


def _other(key: PRNGKey | None) -> PRNGKey | None:
    """A key for the language model, other than the prefix's."""
    return None if key is None else jax.random.fold_in(key, 1)


def _behind(images: Int[Array, " P"], words: Int[Array, "B S"]) -> Int[Array, "B T"]:
    """Joins values of the image positions, equal in every row, with per-row values of the words."""
    return jnp.concatenate([jnp.broadcast_to(images, (words.shape[0], images.shape[0])), words], axis=1)
