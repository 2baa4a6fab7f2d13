"""One transformer layer: attention and MLP, with norms, adapters and dropout as its config says."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.nn.activations import ACTIVATIONS
from magma_jax.nn.adapters import Adapter
from magma_jax.nn.attention import dot_product_attention
from magma_jax.nn.layers import LayerNorm, Linear, RMSNorm, dropout
from magma_jax.nn.lora import LoraLinear, apply_linear
from magma_jax.nn.masks import Mask
from magma_jax.nn.quantized import float_dtype
from magma_jax.nn.rotary import apply_rotary
from magma_jax.nn.transformer.cache import CachedLayer, KVCache
from magma_jax.nn.transformer.config import BlockConfig, Place
from magma_jax.typing import Array, Float, PRNGKey

# Separates the dropout of LoRA from that of attention weights.
_LORA = 1


class AttentionOutput(NamedTuple):
    """Result of ``Attention``."""

    out: Array  # (B, S, D)
    weights: Array | None  # (B, H, S, T), fp32, if requested
    key: Array  # (B, S, G, K) after rotary
    value: Array  # (B, S, G, K)
    cache: KVCache | None  # with the new keys and values


class BlockOutput(NamedTuple):
    """Intermediate results of a block; the compiler removes those that are not read."""

    ln_1: Array  # (B, S, D) input of attention
    attn_inner: Array  # (B, S, D) attention before its adapter
    attn: Array  # (B, S, D) attention branch, after adapter, norm and dropout
    mlp_inner: Array  # (B, S, D) MLP before its adapter
    mlp: Array  # (B, S, D) MLP branch, after adapter, norm and dropout
    out: Array  # (B, S, D)
    attentions: Array | None  # (B, H, S, T) attention weights, fp32, if requested
    key: Array  # (B, S, G, K) after rotary
    value: Array  # (B, S, G, K)
    cache: KVCache | None  # of all layers, with this one's new keys and values


class Attention(nnx.Module):
    """Multi-head attention; several query heads may share a key/value head."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.config = config
        queries, keys = config.heads * config.size, config.key_heads * config.size
        if config.projections == "separate":
            self.q_proj, self.k_proj, self.v_proj = (
                linear(config, name, config.width, features, "qkv", rngs=rngs)
                for name, features in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys))
            )
        else:
            self.qkv_proj = linear(config, "qkv_proj", config.width, queries + 2 * keys, "qkv", rngs=rngs)
        self.out_proj = linear(config, "out_proj", queries, config.width, "attention_out", rngs=rngs)
        by_head = config.qk_norm == "head"
        self.ln_q = norm(config, config.size if by_head else queries) if config.qk_norm else None
        self.ln_k = norm(config, config.size if by_head else keys) if config.qk_norm else None

    def project(self, x: Float[Array, "B S D"], lora_key: PRNGKey | None = None) -> tuple[Array, Array, Array]:
        """Queries (B, S, H, K), keys and values (B, S, G, K), before rotary embedding."""
        config = self.config
        if config.projections == "joint_by_head":
            joint = apply_linear(self.qkv_proj, x, _key(lora_key, 0))
            q, k, v = jnp.split(joint.reshape(*x.shape[:2], config.heads, -1), 3, axis=-1)
            return q, k, v
        if config.projections == "joint":
            queries, keys = config.heads * config.size, config.key_heads * config.size
            joint = apply_linear(self.qkv_proj, x, _key(lora_key, 0))
            parts = jnp.split(joint, (queries, queries + keys), axis=-1)
        else:
            layers = (self.q_proj, self.k_proj, self.v_proj)
            parts = [apply_linear(layer, x, _key(lora_key, i)) for i, layer in enumerate(layers)]
        if config.qk_norm == "all" and self.ln_q is not None and self.ln_k is not None:
            parts = [self.ln_q(parts[0]), self.ln_k(parts[1]), parts[2]]
        q, k, v = (part.reshape(*x.shape[:2], -1, config.size) for part in parts)
        return q, k, v

    def heads_of(
        self, x: Float[Array, "B S D"], rotary: tuple[Array, Array] | None, lora_key: PRNGKey | None = None
    ) -> tuple[Float[Array, "B S H K"], Float[Array, "B S G K"], Float[Array, "B S G K"]]:
        """Queries, keys and values, after query/key norm and rotary embedding."""
        q, k, v = self.project(x, lora_key)
        if self.config.qk_norm == "head" and self.ln_q is not None and self.ln_k is not None:
            q, k = self.ln_q(q), self.ln_k(k)
        if rotary is not None and self.config.rotary is not None:
            interleaved = self.config.rotary.interleaved
            q, k = (apply_rotary(part, *rotary, interleaved=interleaved) for part in (q, k))
        return q, k, v

    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: Mask,
        rotary: tuple[Array, Array] | None,
        cached: CachedLayer | None,
        *,
        weights: bool,
        dropout_key: PRNGKey | None = None,
    ) -> AttentionOutput:
        config = self.config
        lora_key = _key(dropout_key, _LORA)
        q, k, v = self.heads_of(x, rotary, lora_key)
        if cached is None:
            cache, keys, values = None, k.swapaxes(1, 2), v.swapaxes(1, 2)
        else:
            cache, keys, values = cached.extend(k, v)
        out, found = dot_product_attention(
            q,
            keys,
            values,
            mask,
            score_divisor=config.score_divisor,
            score_cap=config.score_cap,
            dropout_rate=config.attention_dropout,
            dropout_key=dropout_key,
            weights=weights,
        )
        out = apply_linear(self.out_proj, out.reshape(*x.shape[:2], -1), _key(lora_key, 3))
        return AttentionOutput(out, found, k, v, cache)


class MLP(nnx.Module):
    """Two linear layers with an activation between them: ``W_2 f(W_1 x)``, gated ``W_2 (f(W_g x) * W_1 x)``.

    With a joint gate, ``c_fc`` holds ``W_g`` and below it ``W_1``.
    """

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.activation = config.activation
        gated = ACTIVATIONS[config.activation].gated
        self.joint = gated and config.gate == "joint"
        inner = config.feed_forward * (2 if self.joint else 1)
        self.c_fc = linear(config, "c_fc", config.width, inner, "mlp_in", rngs=rngs)
        self.c_proj = linear(config, "c_proj", config.feed_forward, config.width, "mlp_out", rngs=rngs)
        separate = gated and not self.joint
        gate = linear(config, "c_gate", config.width, config.feed_forward, "mlp_in", rngs=rngs) if separate else None
        self.c_gate = gate

    def __call__(self, x: Float[Array, "B S D"], lora_key: PRNGKey | None = None) -> Float[Array, "B S D"]:
        activation = ACTIVATIONS[self.activation].function
        inner = apply_linear(self.c_fc, x, _key(lora_key, 0))
        if self.joint:
            gate, up = jnp.split(inner, 2, axis=-1)
            inner = activation(gate) * up
        elif self.c_gate is None:
            inner = activation(inner)
        else:
            inner = activation(apply_linear(self.c_gate, x, _key(lora_key, 1))) * inner
        return apply_linear(self.c_proj, inner, _key(lora_key, 2))


class Block(nnx.Module):
    """One layer; attention and MLP are each followed by their adapter, if any (MAGMA, section 3.1)."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.config = config
        before, behind = config.residual != "post", config.residual in ("post", "sandwich")
        self.ln_1 = norm(config) if before else None
        self.attn = Attention(config, rngs=rngs)
        self.ln_1_out = norm(config) if behind else None
        self.ln_2 = norm(config) if before and config.residual != "shared" else None
        self.mlp = MLP(config, rngs=rngs)
        self.ln_2_out = norm(config) if behind else None
        self.mlp_adapter = config.mlp_adapter and Adapter(config.width, config.mlp_adapter, rngs=rngs)
        self.attn_adapter = config.attn_adapter and Adapter(config.width, config.attn_adapter, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: Mask,
        rotary: tuple[Array, Array] | None,
        cached: CachedLayer | None,
        *,
        weights: bool,
        dropout_key: PRNGKey | None = None,
    ) -> BlockOutput:
        rate, residual = self.config.residual_dropout, self.config.residual
        keys = (None, None, None) if dropout_key is None else jax.random.split(dropout_key, 3)

        h = _applied(self.ln_1, x)
        attention = self.attn(h, mask, rotary, cached, weights=weights, dropout_key=keys[0])
        attn = attention.out if self.attn_adapter is None else self.attn_adapter(h, attention.out)
        attn = dropout(_applied(self.ln_1_out, attn), rate, keys[1])

        m = h if residual == "shared" else _applied(self.ln_2, x if residual == "parallel" else x + attn)
        mlp_inner = self.mlp(m, _key(dropout_key, _LORA))
        mlp = mlp_inner if self.mlp_adapter is None else self.mlp_adapter(m, mlp_inner)
        mlp = dropout(_applied(self.ln_2_out, mlp), rate, keys[2])

        return BlockOutput(
            ln_1=h,
            attn_inner=attention.out,
            attn=attn,
            mlp_inner=mlp_inner,
            mlp=mlp,
            out=x + attn + mlp,
            attentions=attention.weights,
            key=attention.key,
            value=attention.value,
            cache=attention.cache,
        )


def _applied(module: nnx.Module | None, x: Array) -> Array:
    return x if module is None else module(x)


def _key(key: PRNGKey | None, number: int) -> PRNGKey | None:
    return None if key is None else jax.random.fold_in(key, number)


def linear(
    config: BlockConfig, name: str, in_features: int, out_features: int, place: Place, *, rngs: nnx.Rngs
) -> Linear:
    """A linear layer of a block, with a LoRA if its name is among the targets."""
    options: dict[str, Any] = {
        "param": config.param,
        "use_bias": place in config.biases,
        "weight_init": config.init.weights(output=place in ("attention_out", "mlp_out")),
        "dtype": config.dtype,
        "rngs": rngs,
    }
    if config.lora is not None and name in config.lora.targets:
        return LoraLinear(in_features, out_features, lora=config.lora, **options)
    return Linear(in_features, out_features, **options)


def norm(config: BlockConfig, width: int | None = None) -> nnx.Module:
    """A norm of the config's kind; ``width`` defaults to that of the residual stream."""
    width, kind = width or config.width, config.norm.kind
    options = {"param": config.param, "eps": config.norm.eps, "dtype": float_dtype(config.dtype)}
    if kind == "rms":
        return RMSNorm(width, offset=config.norm.offset, **options)
    return LayerNorm(width, affine=kind == "layernorm", **options)
