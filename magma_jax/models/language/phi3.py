"""Phi-3 and Phi-4 (Abdin et al., 2024): Llama's layer with one matrix for queries, keys and values, and one for gate
and input of the MLP."""

import dataclasses
from typing import Literal

from magma_jax.models.language.gated import GatedConfig
from magma_jax.models.language.llama import same_window
from magma_jax.nn.transformer.config import TrunkConfig


@dataclasses.dataclass(frozen=True)
class Phi3Config(GatedConfig):
    """Sizes of a Phi-3, see ``GatedConfig``; the defaults are ``microsoft/Phi-3-mini-4k-instruct``.

    Attributes:
        window: positions that a query sees, itself included; None for all.
    """

    layers: int = 32
    width: int = 3072
    heads: int = 32
    kv_heads: int = 32
    head_size: int = 96
    feed_forward: int = 8192
    vocab_rows: int = 32064
    context_length: int = 4096
    layernorm_eps: float = 1e-5
    window: int | None = 2047
    kind: Literal["phi3"] = "phi3"

    def trunk(self) -> TrunkConfig:
        """Joint matrices, and the window in every layer."""
        return TrunkConfig(
            block=self.block(projections="joint", gate="joint"),
            layers=self.layers,
            windows=same_window(self.window, self.layers),
        )


PHI3_SIZES = {
    "microsoft/Phi-3-mini-4k-instruct": Phi3Config(),
    "microsoft/phi-4": Phi3Config(40, 5120, 40, 10, 128, 17920, 100_352, 16384, rotary_base=250_000.0, window=None),
}
