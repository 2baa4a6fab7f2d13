"""Key tables of the published MAGMA checkpoints and of CLIP, for both directions.

DeepSpeed's ``module`` holds the language model under ``lm.``, its layers again under ``transformer.N``, the embedding
table again as ``word_embedding``, the encoder under ``image_prefix.enc``, and the original's registered buffers.
Adapters change the keys of the modules they wrap:

    normal      mlp.0.* and mlp.1.adapter.*        attn.attn_block.attention.* and attn.adapter.*
    parallel    mlp.module.* and mlp.adapter.*     attn.module.attention.*     and attn.adapter.*

An adapter is the sequence (LayerNorm,) linear, activation, linear; indices refer to this sequence.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.models.magma import MagmaConfig
from magma_jax.models.vision.catalog import EncoderConfig
from magma_jax.models.vision.clip_resnet import CLIPResNetConfig
from magma_jax.models.vision.clip_vit import CLIPViTConfig
from magma_jax.models.vision.nf_resnet import NFResNetConfig
from magma_jax.nn.adapters import AdapterConfig
from magma_jax.published.keymap.engine import Alias, Ignored, Rule

Entry = Rule | Alias | Ignored

H = "lm.transformer.h.{layer}."


def magma_table(config: MagmaConfig, buffers: Mapping[str, np.ndarray] | None = None) -> list[Entry]:
    """Complete key table of a MAGMA model in the published layout.

    ``buffers`` are the attention buffers to write, by the names of ``BUFFERS``; they are ignored on reading.
    """
    _language_model(config)
    if config.lora is not None:
        raise ValueError("LoRA does not exist in the published layout of MAGMA; merge it first (convert merge-lora)")
    if config.prefix.mapping != "linear" or config.prefix.shuffle > 1:
        raise ValueError("a prefix that is not linear does not exist in the published layout of MAGMA")
    blocks = list(_blocks(config, buffers or {}))
    mirrored = [Alias(_mirror(entry.theirs), entry.theirs) for entry in blocks]
    return [
        _rule("lm.transformer.wte.weight", "lm/wte/weight"),
        Alias("word_embedding.weight", "lm.transformer.wte.weight"),
        *blocks,
        *mirrored,
        *_pair("lm.transformer.ln_f", "lm/ln_f"),
        *_pair("lm.lm_head", "lm/lm_head"),
        *encoder_table(config.encoder, "image_prefix.enc.", "image_prefix/encoder/"),
        *_pair("image_prefix.proj", "image_prefix/proj"),
        *(_pair("image_prefix.ln", "image_prefix/ln") if config.prefix.layernorm else ()),
        *(_pair("class_head", "class_head") if config.classes else ()),
    ]


def _language_model(config: MagmaConfig) -> GPTJConfig:
    if not isinstance(config.lm, GPTJConfig):
        raise ValueError(f"a language model of kind {config.lm.kind} does not exist in the published layout of MAGMA")
    return config.lm


def encoder_table(config: EncoderConfig, theirs: str = "", ours: str = "") -> list[Entry]:
    """Key table of an encoder, alone or inside MAGMA with key prefixes ``theirs`` and ``ours``."""
    tables: dict[type, Callable[[Any, str, str], Iterator[Entry]]] = {
        CLIPResNetConfig: _clip_resnet,
        CLIPViTConfig: _clip_vit,
        NFResNetConfig: _nf_resnet,
    }
    if type(config) not in tables:
        raise ValueError(f"an encoder of kind {config.kind} does not exist in the published layout of MAGMA")
    return list(tables[type(config)](config, theirs, ours))


def _rule(theirs: str, ours: str) -> Rule:
    """Rule that stacks over ``{layer}`` from 0, or over ``{block}`` from 1 (block 0 is ``first``)."""
    if "{layer}" in theirs:
        return Rule(theirs, ours, stack="layer")
    return Rule(theirs, ours, stack="block", start=1) if "{block}" in theirs else Rule(theirs, ours)


def _pair(theirs: str, ours: str) -> list[Rule]:
    return [_rule(f"{theirs}.{name}", f"{ours}/{name}") for name in ("weight", "bias")]


def _mirror(pattern: str) -> str:
    return pattern.replace("lm.transformer.h.", "transformer.", 1)


def _blocks(config: MagmaConfig, buffers: Mapping[str, np.ndarray]) -> Iterator[Rule | Ignored]:
    attn = H + {None: "attn.", "normal": "attn.attn_block."}.get(_kind(config.attn_adapter), "attn.module.")
    attn += "attention."
    mlp = H + {None: "mlp.", "normal": "mlp.0."}.get(_kind(config.mlp_adapter), "mlp.module.")
    yield from _pair(H + "ln_1", "lm/layers/ln_1")
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield _rule(f"{attn}{name}.weight", f"lm/layers/attn/{name}/weight")
    for name in ("c_fc", "c_proj"):
        yield from _pair(mlp + name, f"lm/layers/mlp/{name}")
    if config.attn_adapter:
        yield from _adapter(config.attn_adapter, H + "attn.adapter", "lm/layers/attn_adapter")
    if config.mlp_adapter:
        nested = "mlp.1.adapter" if config.mlp_adapter.kind == "normal" else "mlp.adapter"
        yield from _adapter(config.mlp_adapter, H + nested, "lm/layers/mlp_adapter")
    for name in BUFFERS:
        # Bound as a default argument, since it is called after the loop.
        recompute = (lambda layer, array=buffers[name]: array) if name in buffers else None
        yield Ignored(attn + name, recompute, beside=attn + "q_proj.weight" if recompute else None)


def _kind(adapter: AdapterConfig | None) -> str | None:
    return adapter and adapter.kind


def _adapter(config: AdapterConfig, theirs: str, ours: str) -> Iterator[Rule]:
    first = 0
    if config.layernorm:
        yield from _pair(f"{theirs}.0", f"{ours}/ln")
        first = 1
    yield from _pair(f"{theirs}.{first}", f"{ours}/down")
    yield from _pair(f"{theirs}.{first + 2}", f"{ours}/up")
    if config.kind == "scaled_parallel":
        yield _rule(f"{theirs.removesuffix('.adapter')}.adapter_scale", f"{ours}/scale")


def _clip_resnet(config: CLIPResNetConfig, theirs: str, ours: str) -> Iterator[Rule]:
    for i in (1, 2, 3):
        yield _rule(f"{theirs}conv{i}.weight", f"{ours}conv{i}/weight")
        yield from _batch_norm(f"{theirs}bn{i}", f"{ours}bn{i}")
    for stage, blocks in enumerate(config.blocks, 1):
        for theirs_block, ours_block in _stacked(f"{theirs}layer{stage}.", f"{ours}layer{stage}/", blocks):
            for i in (1, 2, 3):
                yield _rule(f"{theirs_block}conv{i}.weight", f"{ours_block}conv{i}/weight")
                yield from _batch_norm(f"{theirs_block}bn{i}", f"{ours_block}bn{i}")
            if ours_block.endswith("first/"):
                yield _rule(f"{theirs_block}downsample.0.weight", f"{ours_block}downsample_conv/weight")
                yield from _batch_norm(f"{theirs_block}downsample.1", f"{ours_block}downsample_bn")
    if config.attention_pool:
        yield _rule(f"{theirs}attnpool.positional_embedding", f"{ours}attnpool/positional_embedding")
        for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
            yield from _pair(f"{theirs}attnpool.{name}", f"{ours}attnpool/{name}")


def _stacked(theirs: str, ours: str, blocks: int) -> Iterator[tuple[str, str]]:
    """Block 0 is ``first``; blocks 1, 2, ... are the stack ``rest``."""
    yield f"{theirs}0.", f"{ours}first/"
    if blocks > 1:
        yield f"{theirs}{{block}}.", f"{ours}rest/"


def _batch_norm(theirs: str, ours: str) -> Iterator[Rule]:
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        yield _rule(f"{theirs}.{name}", f"{ours}/{name}")


def _clip_vit(config: CLIPViTConfig, theirs: str, ours: str) -> Iterator[Rule | Ignored]:
    for name in ("class_embedding", "positional_embedding"):
        yield _rule(f"{theirs}{name}", f"{ours}{name}")
    # CLIP's files hold the projection of the class token, which the grid output does not use.
    yield _rule(f"{theirs}proj", f"{ours}proj") if config.output == "pooled" else Ignored(f"{theirs}proj")
    yield _rule(f"{theirs}conv1.weight", f"{ours}conv1/weight")
    for name in ("ln_pre", "ln_post"):
        yield from _pair(theirs + name, ours + name)
    block, stack = theirs + "transformer.resblocks.{layer}.", f"{ours}blocks/"
    for name in ("weight", "bias"):
        yield _rule(f"{block}attn.in_proj_{name}", f"{stack}attn/in_proj/{name}")
    yield from _pair(f"{block}attn.out_proj", f"{stack}attn/out_proj")
    for name in ("c_fc", "c_proj"):
        yield from _pair(f"{block}mlp.{name}", f"{stack}{name}")
    for name in ("ln_1", "ln_2"):
        yield from _pair(block + name, stack + name)
    if config.layer_scale:
        yield from (_rule(f"{block}ls_{i}.gamma", f"{stack}scale_{i}") for i in (1, 2))


def _nf_resnet(config: NFResNetConfig, theirs: str, ours: str) -> Iterator[Rule]:
    """timm's ``nf_resnet50`` in the original's two nested sequences: stem 0.0, stages 0.1."""
    parts = ("weight", "bias", "gain")
    yield from (_rule(f"{theirs}0.0.conv.{part}", f"{ours}stem_conv/{part}") for part in parts)
    for stage, blocks in enumerate(config.blocks):
        for theirs_block, ours_block in _stacked(f"{theirs}0.1.{stage}.", f"{ours}stage{stage + 1}/", blocks):
            for conv, part in itertools.product(("conv1", "conv2", "conv3"), parts):
                yield _rule(f"{theirs_block}{conv}.{part}", f"{ours_block}{conv}/{part}")
            if ours_block.endswith("first/"):
                for part in parts:
                    yield _rule(f"{theirs_block}downsample.conv.{part}", f"{ours_block}downsample/{part}")


# Buffers of every attention layer: masks, constants, and rotary tables. They are recomputed, since an fp16 checkpoint
# rounds the tables (1.3e-3 in the logits).
BUFFERS = ("bias", "masked_bias", "scale_attn", "sin", "cos")


def is_magma(keys: Collection[str]) -> bool:
    """Whether tensors of these names are a MAGMA checkpoint in the published layout."""
    return any(key.startswith("image_prefix.") for key in keys) and any(key.startswith("lm.") for key in keys)


def is_weight(key: str) -> bool:
    """Whether a key of the published layout is neither an alias nor a recomputable buffer."""
    second_name = re.match(r"transformer\.\d+\.", key) or key == "word_embedding.weight"
    return not second_name and not (".attention." in key and key.rsplit(".", 1)[-1] in BUFFERS)


def attention_buffers(config: MagmaConfig, dtype: np.dtype, names: Collection[str] = BUFFERS) -> dict[str, np.ndarray]:
    """Attention buffers as registered by the original, floating ones in ``dtype``."""
    lm = _language_model(config)
    context = lm.context_length
    inverse = 1.0 / lm.rotary_base ** (np.arange(0, lm.rotary_dim, 2, dtype=np.float32) / np.float32(lm.rotary_dim))
    angles = np.arange(context, dtype=np.float32)[:, None] * inverse[None].astype(np.float32)
    with np.errstate(over="ignore"):  # -1e9 becomes -inf in fp16, as in the published checkpoint
        make = {
            "bias": lambda: np.tril(np.ones((1, 1, context, context), bool)),
            "masked_bias": lambda: np.array(-1e9, np.float32).astype(dtype),
            "scale_attn": lambda: np.sqrt(np.array(lm.width // lm.heads, np.float32)).astype(dtype),
            "sin": lambda: np.sin(angles.astype(np.float64)).astype(np.float32).astype(dtype),
            "cos": lambda: np.cos(angles.astype(np.float64)).astype(np.float32).astype(dtype),
        }
        return {name: np.asarray(make[name]()) for name in names}
