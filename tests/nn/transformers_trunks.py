"""Trunks of published architectures at tiny sizes, as configs of ours and as PyTorch models of transformers."""

from magma_jax.nn.rotary import RotaryConfig, RotaryScaling
from magma_jax.nn.transformer.config import BlockConfig, NormConfig, PositionTable, TrunkConfig

LAYERS, WIDTH, HEADS, KV_HEADS, INNER, CONTEXT, WINDOW = 3, 32, 4, 2, 48, 32, 5
SIZES = {"width": WIDTH, "heads": HEADS, "feed_forward": INNER}
LLAMA_SCALING = RotaryScaling(factor=8.0, low=1.0, high=4.0, context=16)


def llama_block(**changes):
    settings = {
        "kv_heads": KV_HEADS,
        "norm": NormConfig(kind="rms", eps=1e-5),
        "biases": (),
        "activation": "swiglu",
        "rotary": RotaryConfig(features=8, base=500.0),
    }
    return BlockConfig(**SIZES, **(settings | changes))


TRUNKS = {
    "llama": TrunkConfig(
        block=llama_block(rotary=RotaryConfig(features=8, base=500.0, scaling=LLAMA_SCALING)), layers=LAYERS
    ),
    "qwen2": TrunkConfig(block=llama_block(biases=("qkv",)), layers=LAYERS),
    "qwen3": TrunkConfig(
        block=llama_block(head_size=12, qk_norm="head", rotary=RotaryConfig(features=12, base=500.0)), layers=LAYERS
    ),
    "olmo2": TrunkConfig(block=llama_block(residual="post", qk_norm="all"), layers=LAYERS),
    "gemma2": TrunkConfig(
        block=llama_block(
            head_size=12,
            residual="sandwich",
            norm=NormConfig(kind="rms", eps=1e-5, offset=1.0),
            activation="geglu_tanh",
            rotary=RotaryConfig(features=12, base=500.0),
            score_divisor=9**0.5,
            score_cap=2.0,
        ),
        layers=LAYERS,
        windows=(WINDOW, None, WINDOW),
    ),
    # CM3Leon is OPT without biases and with norms that have no parameters.
    "opt": TrunkConfig(
        block=BlockConfig(**SIZES, norm=NormConfig(kind="plain"), biases=(), activation="relu"),
        layers=LAYERS,
        positions=PositionTable(length=CONTEXT, offset=2),
    ),
}

LLAMA_NAMES = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}
BEHIND = {"post_attention_layernorm": "ln_1_out", "post_feedforward_layernorm": "ln_2_out"}
NAMES = {
    "self_attn.q_proj": "attn/q_proj",
    "self_attn.k_proj": "attn/k_proj",
    "self_attn.v_proj": "attn/v_proj",
    "self_attn.o_proj": "attn/out_proj",
    "self_attn.out_proj": "attn/out_proj",
    "self_attn.q_norm": "attn/ln_q",
    "self_attn.k_norm": "attn/ln_k",
    "mlp.gate_proj": "mlp/c_gate",
    "mlp.up_proj": "mlp/c_fc",
    "mlp.down_proj": "mlp/c_proj",
    "fc1": "mlp/c_fc",
    "fc2": "mlp/c_proj",
}
NORM_NAMES = {
    "llama": LLAMA_NAMES,
    "qwen2": LLAMA_NAMES,
    "qwen3": LLAMA_NAMES,
    "olmo2": BEHIND,
    "gemma2": {"input_layernorm": "ln_1", "pre_feedforward_layernorm": "ln_2", **BEHIND},
    "opt": {},
}


def pytorch_trunk(name, transformers):
    """transformers' model of a trunk, with random weights."""
    sizes = {
        "vocab_size": 7,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }
    if name == "llama":
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        sizes["rope_parameters"] |= {**scaling, "original_max_position_embeddings": 16}
        return transformers.LlamaModel(transformers.LlamaConfig(**sizes))
    if name == "qwen2":
        return transformers.Qwen2Model(transformers.Qwen2Config(**sizes))
    if name == "qwen3":
        return transformers.Qwen3Model(transformers.Qwen3Config(**sizes, head_dim=12))
    if name == "olmo2":
        return transformers.Olmo2Model(transformers.Olmo2Config(**sizes))
    if name == "gemma2":
        own = {"query_pre_attn_scalar": 9, "attn_logit_softcapping": 2.0, "sliding_window": WINDOW, "head_dim": 12}
        return transformers.Gemma2Model(transformers.Gemma2Config(**sizes, **own))
    opt = transformers.OPTConfig(
        vocab_size=7,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        ffn_dim=INNER,
        max_position_embeddings=CONTEXT,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        attn_implementation="eager",
    )
    return transformers.OPTModel(opt)
