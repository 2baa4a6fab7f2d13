"""A language model: embedding table, trunk and head.

Each kind of language model is a config whose ``trunk`` describes its blocks.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from magma_jax.config import check_dtype, check_sizes
from magma_jax.nn.adapters import AdapterConfig
from magma_jax.nn.layers import Embedding, Initializer, Linear, normal, product
from magma_jax.nn.lora import LoraConfig
from magma_jax.nn.modules import LanguageParam
from magma_jax.nn.quantized import QUANTIZED, float_dtype
from magma_jax.nn.transformer.config import BlockConfig, NormConfig, TrunkConfig
from magma_jax.nn.transformer.trunk import Trunk
from magma_jax.runtime.sharding import split_rows
from magma_jax.typing import Array, Float, Int

# A matrix with or without bias, or weight tying: the embedding table is also the head.
Head = Literal["bias", "no_bias", "tied"]

# Activations in the MLPs of the published models.
Activation = Literal["gelu", "gelu_tanh", "relu"]

# The deepest published model has 126.
MAX_LAYERS = 10_000


class DecoderConfig:
    """Fields of every language model's config; each kind is a frozen dataclass that inherits from this class.

    It is not a protocol, because checking an argument against a protocol at run time reads every member.

    Attributes:
        kind: name of the kind in configs.
        layers: number of blocks.
        width: features of a hidden state.
        heads: number of attention heads.
        feed_forward: hidden features of the MLP.
        layernorm_eps: added to the variance (or mean square) in norms.
        vocab_rows: rows of the embedding table.
        head_rows: rows of the head; ids beyond the embedding table are never sampled.
        context_length: positions the model was trained on, in tokens.
        embedding_std: standard deviation of a fresh embedding table.
        dtype: dtype of the stored weights; int8 and int4 apply to matrices, see ``nn.quantized``.
        embedding_scale: factor of word embeddings (Gemma).
        logit_cap: soft limit of the logits, ``cap * tanh(logit / cap)``; None for no limit (Gemma 2).
    """

    kind: str
    layers: int
    width: int
    heads: int
    feed_forward: int
    vocab_rows: int
    head_rows: int
    context_length: int
    layernorm_eps: float
    embedding_std: float
    dtype: str
    head: Head
    embedding_scale: float = 1.0
    logit_cap: float | None = None

    def trunk(self) -> TrunkConfig:
        """Config of the layers between embeddings and final hidden states, without adapters."""
        raise NotImplementedError

    def embedding_init(self) -> Initializer:
        """Initializer of a fresh embedding table."""
        return normal(self.embedding_std)


class Decoder(Trunk):
    """A language model: ``embed`` before its layers, ``logits`` after them.

    Beside the members of ``Trunk`` it has an embedding table ``wte``, and ``lm_head`` unless the weights are tied.

    Args:
        config: one of ``models.language.catalog``.
        mlp_adapter: adapter of every MLP; None for none.
        attn_adapter: adapter of every attention; None for none.
        lora: LoRA of every layer; None for none.
    """

    lm_head: Linear | None = None

    def __init__(
        self,
        config: DecoderConfig,
        *,
        mlp_adapter: AdapterConfig | None = None,
        attn_adapter: AdapterConfig | None = None,
        lora: LoraConfig | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.wte = Embedding(
            config.vocab_rows,
            config.width,
            param=LanguageParam,
            weight_init=config.embedding_init(),
            dtype=float_dtype(config.dtype),
            rngs=rngs,
        )
        trunk = config.trunk()
        block = dataclasses.replace(trunk.block, mlp_adapter=mlp_adapter, attn_adapter=attn_adapter, lora=lora)
        super().__init__(dataclasses.replace(trunk, block=block), rngs=rngs)
        if config.head != "tied":
            self.lm_head = Linear(
                config.width,
                config.head_rows,
                param=LanguageParam,
                use_bias=config.head == "bias",
                weight_init=normal(0.02),
                dtype=config.dtype,
                rngs=rngs,
            )

    def embed(self, ids: Int[Array, "B S"], dtype: Any = jnp.float32) -> Float[Array, "B S D"]:
        """Word embeddings; ids must be below ``vocab_rows`` (JAX clamps others)."""
        # Two steps: the table is sharded by width, and one reshard cannot turn its slices into rows of whole vectors.
        vectors = split_rows(split_rows(self.wte(ids, dtype), features="model"))
        scale = self.config.embedding_scale
        return vectors if scale == 1 else vectors * jnp.asarray(scale, vectors.dtype)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """fp32 logits of the final hidden states, whatever their dtype."""
        if self.lm_head is not None:
            logits = self.lm_head(hidden, jnp.float32)
        else:
            logits = product(hidden, self.wte.weight[...].astype(hidden.dtype), preferred_element_type=jnp.float32)
        cap = self.config.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def block_config(config: DecoderConfig, **changes: Any) -> BlockConfig:
    """``BlockConfig`` with a config's sizes; ``changes`` override its defaults."""
    return BlockConfig(
        width=config.width,
        heads=config.heads,
        feed_forward=config.feed_forward,
        norm=NormConfig(eps=config.layernorm_eps),
        dtype=config.dtype,
        **changes,
    )


def check_heads(config: DecoderConfig, *, divide: bool = True) -> None:
    """Raises ValueError if there are more than ``MAX_LAYERS`` layers, fewer rows in the head than in the table, or the
    heads do not divide the width.

    With ``divide=False`` they need not.
    """
    check_sizes(config, "layers", "width", "heads", "feed_forward", "vocab_rows", "head_rows", "context_length")
    check_dtype("language model: dtype", config.dtype, QUANTIZED)
    if config.layers > MAX_LAYERS:
        raise ValueError(f"language model: {config.layers} layers are more than {MAX_LAYERS}")
    if config.head_rows < config.vocab_rows:
        raise ValueError(
            f"language model: head_rows {config.head_rows} is below vocab_rows {config.vocab_rows}; "
            "every token that can be read must have a logit"
        )
    if divide and config.width % config.heads:
        raise ValueError(f"language model: {config.heads} heads do not divide the width {config.width}")
