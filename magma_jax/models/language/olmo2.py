"""OLMo 2 (OLMo team, 2024): norms after attention and MLP instead of before, and over all queries and all keys."""

import dataclasses
from typing import Literal

from magma_jax.models.language.gated import GatedConfig
from magma_jax.nn.transformer.config import TrunkConfig


@dataclasses.dataclass(frozen=True)
class Olmo2Config(GatedConfig):
    """Sizes of an OLMo 2, see ``GatedConfig``; the defaults are ``allenai/OLMo-2-0425-1B``."""

    layers: int = 16
    width: int = 2048
    heads: int = 16
    kv_heads: int = 16
    head_size: int = 128
    feed_forward: int = 8192
    vocab_rows: int = 100_352
    context_length: int = 4096
    rotary_base: float = 500_000.0
    kind: Literal["olmo2"] = "olmo2"

    def trunk(self) -> TrunkConfig:
        """Norms after attention and MLP, and of queries and keys before they are split into heads."""
        return TrunkConfig(block=self.block(residual="post", qk_norm="all"), layers=self.layers)


OLMO2_SIZES = {
    "allenai/OLMo-2-0425-1B": Olmo2Config(),
    "allenai/OLMo-2-1124-7B": Olmo2Config(32, 4096, 32, 32, 128, 11008),
    "allenai/OLMo-2-1124-13B": Olmo2Config(40, 5120, 40, 40, 128, 13824),
}
