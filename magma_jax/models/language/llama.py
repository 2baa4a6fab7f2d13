"""Llama 2 and 3 and SmolLM2 (Touvron et al., 2023; Llama team, 2024), Mistral (Jiang et al., 2023), and SmolLM3."""

import dataclasses
from typing import Literal

from magma_jax.models.language.gated import GatedConfig
from magma_jax.nn.rotary import RotaryScaling
from magma_jax.nn.transformer.config import TrunkConfig


@dataclasses.dataclass(frozen=True)
class LlamaConfig(GatedConfig):
    """Sizes of a Llama, see ``GatedConfig``; the defaults are ``HuggingFaceTB/SmolLM2-135M``."""

    layers: int = 30
    width: int = 576
    heads: int = 9
    kv_heads: int = 3
    head_size: int = 64
    feed_forward: int = 1536
    vocab_rows: int = 49152
    context_length: int = 8192
    tied: bool = True
    rotary_base: float = 100_000.0
    layernorm_eps: float = 1e-5
    kind: Literal["llama"] = "llama"


@dataclasses.dataclass(frozen=True)
class MistralConfig(GatedConfig):
    """Sizes of a Mistral, see ``GatedConfig``; the defaults are ``mistralai/Mistral-7B-v0.1``.

    Attributes:
        window: positions that a query sees, itself included; None for all (from version 0.2 on).
    """

    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    feed_forward: int = 14336
    vocab_rows: int = 32000
    context_length: int = 32768
    layernorm_eps: float = 1e-5
    window: int | None = 4096
    kind: Literal["mistral"] = "mistral"

    def trunk(self) -> TrunkConfig:
        """Llama's layers, each with the window."""
        return TrunkConfig(block=self.block(), layers=self.layers, windows=same_window(self.window, self.layers))


@dataclasses.dataclass(frozen=True)
class SmolLM3Config(GatedConfig):
    """Sizes of a SmolLM3, see ``GatedConfig``; the defaults are ``HuggingFaceTB/SmolLM3-3B``.

    Attributes:
        rotary_layers: which layers have rotary embedding, repeated over the layers.
    """

    layers: int = 36
    width: int = 2048
    heads: int = 16
    kv_heads: int = 4
    head_size: int = 128
    feed_forward: int = 11008
    vocab_rows: int = 128256
    context_length: int = 65536
    tied: bool = True
    rotary_base: float = 5_000_000.0
    rotary_layers: tuple[bool, ...] = (True, True, True, False)
    kind: Literal["smollm3"] = "smollm3"

    def __post_init__(self):
        if not self.rotary_layers:
            raise ValueError("language model: rotary_layers names no layer; give (True, True, True, False)")
        super().__post_init__()

    def trunk(self) -> TrunkConfig:
        """Llama's layers, some of them without rotary embedding."""
        turns = (self.rotary_layers[i % len(self.rotary_layers)] for i in range(self.layers))
        rotary = tuple(self.rotary() if turn else None for turn in turns)
        return TrunkConfig(block=self.block(), layers=self.layers, rotary=rotary)


def same_window(window: int | None, layers: int) -> tuple[int, ...] | None:
    """Windows of layers that all have the same; None for none. Raises ValueError for a window below 1."""
    if window is None:
        return None
    if window < 1:
        raise ValueError(f"language model: window must be at least 1, got {window}")
    return (window,) * layers


def _llama3(factor: float) -> RotaryScaling:
    return RotaryScaling(factor=factor, low=1.0, high=4.0, context=8192)


LLAMA_SIZES = {
    "HuggingFaceTB/SmolLM2-135M": LlamaConfig(),
    "HuggingFaceTB/SmolLM2-360M": LlamaConfig(32, 960, 15, 5, 64, 2560),
    "HuggingFaceTB/SmolLM2-1.7B": LlamaConfig(24, 2048, 32, 32, 64, 8192, rotary_base=130_000.0),
    **{
        f"meta-llama/Llama-2-{name}-hf": LlamaConfig(*sizes, 32000, 4096, tied=False, rotary_base=10_000.0)
        for name, sizes in {
            "7b": (32, 4096, 32, 32, 128, 11008),
            "13b": (40, 5120, 40, 40, 128, 13824),
            "70b": (80, 8192, 64, 8, 128, 28672),
        }.items()
    },
    **{
        f"meta-llama/Llama-{name}": LlamaConfig(
            *sizes, 128256, 131_072, tied=tied, rotary_base=500_000.0, rotary_scaling=_llama3(factor)
        )
        for name, sizes, tied, factor in [
            ("3.1-8B", (32, 4096, 32, 8, 128, 14336), False, 8.0),
            ("3.1-70B", (80, 8192, 64, 8, 128, 28672), False, 8.0),
            ("3.2-1B", (16, 2048, 32, 8, 64, 8192), True, 32.0),
            ("3.2-3B", (28, 3072, 24, 8, 128, 8192), True, 32.0),
        ]
    },
}
MISTRAL_SIZES = {
    "mistralai/Mistral-7B-v0.1": MistralConfig(),
    "mistralai/Mistral-7B-v0.3": MistralConfig(vocab_rows=32768, rotary_base=1_000_000.0, window=None),
}
SMOLLM3_SIZES = {"HuggingFaceTB/SmolLM3-3B": SmolLM3Config()}
