"""Configs of a transformer; every published variant is one ``TrunkConfig``."""

import dataclasses
import math
from typing import Literal

from flax import nnx

from magma_jax.config import check_dtype, check_sizes
from magma_jax.nn.activations import ACTIVATIONS, ActivationName
from magma_jax.nn.adapters import AdapterConfig
from magma_jax.nn.layers import Initializer, normal, truncated_normal, zeros
from magma_jax.nn.lora import LoraConfig
from magma_jax.nn.modules import LanguageParam
from magma_jax.nn.quantized import QUANTIZED
from magma_jax.nn.rotary import RotaryConfig

# Placement of norms, and input of the MLP. With N_1 and N_2 before attention and MLP, M_1 and M_2 after them:
#   shared      x + attention(N_1 x) + mlp(N_1 x)                          GPT-J
#   parallel    x + attention(N_1 x) + mlp(N_2 x)                          GPT-NeoX
#   sequential  y + mlp(N_2 y),      y = x + attention(N_1 x)              GPT-2, Llama
#   post        y + M_2 mlp(y),      y = x + M_1 attention(x)              OLMo 2
#   sandwich    y + M_2 mlp(N_2 y),  y = x + M_1 attention(N_1 x)          Gemma 2
Residual = Literal["shared", "parallel", "sequential", "post", "sandwich"]

# Linear layers that may have a bias.
Place = Literal["qkv", "attention_out", "mlp_in", "mlp_out"]
PLACES: tuple[Place, ...] = ("qkv", "attention_out", "mlp_in", "mlp_out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """A normalisation over the width.

    Attributes:
        kind: ``layernorm``; ``plain``, a LayerNorm without weight and bias (CM3Leon); ``rms`` (Llama).
        eps: added to the variance, or to the mean square.
        offset: added to the weight of ``rms``: 1 if it is stored as the difference from one (Gemma).
    """

    kind: Literal["layernorm", "plain", "rms"] = "layernorm"
    eps: float = 1e-5
    offset: float = 0.0

    def __post_init__(self):
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"norm: eps must be 0 or positive and finite, got {self.eps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Fresh weights of linear layers.

    Attributes:
        std: standard deviation of the normal distribution.
        truncate: values beyond this many standard deviations are redrawn; None for no limit.
        zero_outputs: attention's output projection and the MLP's second layer start at zero, so that a fresh block
            returns its input.
    """

    std: float = 0.02
    truncate: float | None = None
    zero_outputs: bool = False

    def weights(self, *, output: bool = False) -> Initializer:
        """The initializer of a layer; ``output`` if its result is added to the residual stream."""
        if output and self.zero_outputs:
            return zeros
        return normal(self.std) if self.truncate is None else truncated_normal(self.std, self.truncate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One layer of a transformer.

    Attributes:
        width: width of the residual stream (D).
        heads: number of query heads (H).
        feed_forward: hidden width of the MLP.
        kv_heads: number of key/value heads (G), each shared by H / G query heads; None for as many as ``heads``.
        head_size: features per head (K); None for width / heads.
        residual: order of norms, attention and MLP, see ``Residual``.
        norm: kind of every norm.
        qk_norm: norm of queries and keys before rotary embedding: per ``head`` (Qwen 3, Gemma 3) or over ``all`` heads
            together (OLMo 2).
        projections: ``separate`` matrices for queries, keys and values; ``joint``, one matrix with the three stacked;
            ``joint_by_head``, one matrix with query, key and value of the first head, then of the second, and so on.
        biases: linear layers with a bias.
        activation: activation of the MLP; a gated one adds a third layer, ``c_gate``.
        gate: whether ``c_gate`` is a matrix of its own (``separate``) or the first half of ``c_fc`` (``joint``, Phi-3).
        rotary: rotary embedding of queries and keys; None for none.
        score_divisor: divisor of the scores; None for sqrt(K).
        score_cap: soft limit of the scores, ``cap * tanh(score / cap)`` (Gemma 2); None for no limit.
        attention_dropout: dropout rate of the attention weights in training.
        residual_dropout: dropout rate of the attention and MLP branches.
        init: initialisation of fresh weights.
        mlp_adapter: adapter of the MLP; None for none.
        attn_adapter: adapter of attention; None for none.
        lora: matrices of low rank beside those of the block; None for none.
        param: variable type of all weights except the adapters'.
        dtype: dtype of the stored weights; int8 and int4 apply to the matrices, see ``nn.quantized``.
    """

    width: int
    heads: int
    feed_forward: int
    kv_heads: int | None = None
    head_size: int | None = None
    residual: Residual = "sequential"
    norm: NormConfig = NormConfig()
    qk_norm: Literal["head", "all"] | None = None
    projections: Literal["separate", "joint", "joint_by_head"] = "separate"
    biases: tuple[Place, ...] = PLACES
    activation: ActivationName = "gelu_tanh"
    gate: Literal["separate", "joint"] = "separate"
    rotary: RotaryConfig | None = None
    score_divisor: float | None = None
    score_cap: float | None = None
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    init: InitConfig = InitConfig()
    mlp_adapter: AdapterConfig | None = None
    attn_adapter: AdapterConfig | None = None
    lora: LoraConfig | None = None
    param: type[nnx.Param] = LanguageParam
    dtype: str = "float32"

    def __post_init__(self):
        check_sizes(self, "width", "heads", "feed_forward")
        check_dtype("block: dtype", self.dtype, QUANTIZED)
        if self.head_size is None and self.width % self.heads:
            raise ValueError(f"block: {self.heads} heads do not divide the width {self.width}; give head_size")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"block: {self.kv_heads} kv_heads do not divide {self.heads} heads")
        if self.projections == "joint_by_head" and self.key_heads != self.heads:
            raise ValueError(f"block: projections joint_by_head need kv_heads {self.heads}, not {self.kv_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"block: activation {self.activation!r} is none of {', '.join(ACTIVATIONS)}")
        if unknown := set(self.biases) - set(PLACES):
            raise ValueError(f"block: biases name {sorted(unknown)[0]!r}, which is none of {', '.join(PLACES)}")
        if self.lora is not None and (missing := set(self.lora.targets) - set(self.matrices)):
            raise ValueError(
                f"lora: the blocks of this model have no {sorted(missing)[0]}, but {', '.join(self.matrices)}"
            )
        for name in ("score_divisor", "score_cap"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"block: {name} must be positive and finite, got {value}")
        if self.rotary is not None and self.rotary.features > self.size:
            raise ValueError(f"block: {self.rotary.features} rotary features do not fit in a head of {self.size}")

    @property
    def size(self) -> int:
        """Features per head (K)."""
        return self.head_size or self.width // self.heads

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the block's matrices."""
        qkv = ("q_proj", "k_proj", "v_proj") if self.projections == "separate" else ("qkv_proj",)
        gate = ("c_gate",) if ACTIVATIONS[self.activation].gated and self.gate == "separate" else ()
        return (*qkv, "out_proj", "c_fc", *gate, "c_proj")

    @property
    def key_heads(self) -> int:
        """Key/value heads (G)."""
        return self.kv_heads or self.heads

    @property
    def query_width(self) -> int:
        """Features of all query heads together (H K)."""
        return self.heads * self.size


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionTable:
    """Learned positions, added to the embeddings.

    Attributes:
        length: number of positions.
        offset: row of position 0; earlier rows are unused (2 in OPT and CM3Leon).
        std: standard deviation of fresh rows.
    """

    length: int
    offset: int = 0
    std: float = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """A stack of identical layers, from embeddings to hidden states.

    Attributes:
        block: config of every layer.
        layers: number of layers.
        positions: table of learned positions; None for none.
        windows: per layer, the number of positions that a query sees, itself included, or None for all; None if no
            layer has a window.
        rotary: per layer, its rotary embedding, or None for none (SmolLM3, Gemma 3); None if all have the block's. They
            rotate as many features as the block's.
        final_norm: whether a norm follows the last layer.
    """

    block: BlockConfig
    layers: int
    positions: PositionTable | None = None
    windows: tuple[int | None, ...] | None = None
    rotary: tuple[RotaryConfig | None, ...] | None = None
    final_norm: bool = True

    def __post_init__(self):
        check_sizes(self, "layers")
        if self.windows is not None and len(self.windows) != self.layers:
            raise ValueError(f"trunk: {len(self.windows)} windows for {self.layers} layers; give one a layer")
        if self.rotary is None:
            return
        if len(self.rotary) != self.layers:
            raise ValueError(f"trunk: {len(self.rotary)} rotary embeddings for {self.layers} layers; give one a layer")
        shapes = {(own.features, own.interleaved) for own in self.rotary if own is not None}
        rotary = self.block.rotary
        if rotary is None or shapes - {(rotary.features, rotary.interleaved)}:
            raise ValueError("trunk: rotary embeddings of layers must rotate the block's features, paired alike")
