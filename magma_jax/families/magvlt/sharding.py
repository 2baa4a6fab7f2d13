"""How MAGVLT's parameters are split over a mesh, and how they learn."""

from collections.abc import Mapping
from typing import Literal

from magma_jax.family import ShardingRow
from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.models.magvlt.parameters import TransformerParam
from magma_jax.models.vision.vqgan import SHARDINGS as TOKENIZER_SHARDINGS
from magma_jax.nn.modules import HeadParam, TokenizerParam
from magma_jax.training.step.optim import Group

# Together with the shared rows, exactly one matches each parameter.
SHARDINGS: tuple[ShardingRow, ...] = (
    # Split by width, as the table of tokens is.
    (r"(special|image_positions|text_positions|special_positions)/weight", (None, ("fsdp", "model"))),
    # The norm that follows needs the whole width.
    (r"(head|caption|context|join|part)_proj/weight", ("fsdp", "model")),
    (r"(length|class)_head/weight", (None, ("fsdp", "model"))),
    (r"head_bias|class_head/bias|(head|caption|context|join|part)_proj/bias|head_norm/(weight|bias)", ()),
    (r"layers/(ln_[12]/(weight|bias)|attn/out_proj/bias|mlp/c_proj/bias)", ()),
    *TOKENIZER_SHARDINGS,
)


def roles(config: MagvltConfig) -> Mapping[str, Literal["frozen"] | Group]:
    """Roles of the parameters: the transformer learns from scratch, the image tokenizer is frozen."""
    groups: dict[str, Literal["frozen"] | Group] = {TransformerParam.role: Group(), HeadParam.role: Group()}
    if config.tokenizer is not None:
        groups[TokenizerParam.role] = "frozen"
    return groups
