"""A tiny config of every kind of language model of today, with everything that its layers vary."""

from magma_jax.models.language.gemma import Gemma2Config, Gemma3Config
from magma_jax.models.language.llama import LlamaConfig, MistralConfig, SmolLM3Config
from magma_jax.models.language.olmo2 import Olmo2Config
from magma_jax.models.language.opt import OPTConfig
from magma_jax.models.language.phi3 import Phi3Config
from magma_jax.models.language.qwen import Qwen2Config, Qwen3Config
from magma_jax.nn.rotary import RotaryScaling

# Layers, width, heads, kv_heads, head_size, feed_forward, vocab_rows, context_length: heads of 12 fill a width of 48.
SIZES = (2, 48, 4, 2, 12, 40, 97, 64)
# Heads that do not.
WIDE = (2, 48, 3, 1, 10, 40, 97, 64)
SCALED = {"rotary_base": 500.0, "rotary_scaling": RotaryScaling(factor=8.0, low=1.0, high=4.0, context=16)}
LINEAR = {"rotary_base": 500.0, "rotary_scaling": RotaryScaling(factor=4.0, method="linear")}

LANGUAGE_MODELS = {
    "llama": LlamaConfig(*SIZES, tied=False, **SCALED),
    "llama linear, tied": LlamaConfig(*SIZES, tied=True, **LINEAR),
    "mistral": MistralConfig(*WIDE, window=5),
    "smollm3": SmolLM3Config(*SIZES, rotary_base=500.0, rotary_layers=(True, False)),
    "qwen2": Qwen2Config(*SIZES, tied=False),
    "qwen3": Qwen3Config(*WIDE),
    "gemma2": Gemma2Config(*WIDE, window=5, score_scale=9, score_cap=2.0, logit_cap=3.0),
    "gemma3": Gemma3Config(*WIDE, window=5, score_scale=9, attention=("local", "global"), **LINEAR),
    "olmo2": Olmo2Config(*SIZES),
    "phi3": Phi3Config(*SIZES, window=7),
    "opt": OPTConfig(2, 48, 4, 40, 97, 64),
}
