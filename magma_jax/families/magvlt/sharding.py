"""How MAGVLT's parameters are split over a mesh, and how they learn."""

from collections.abc import Mapping

from magma_jax.family import ShardingRow
from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.models.magvlt.parameters import TransformerParam
from magma_jax.nn.modules import HeadParam
from magma_jax.training.step.optim import Group

# Together with the shared rows, exactly one matches each parameter.
SHARDINGS: tuple[ShardingRow, ...] = (
    # Split by width, as the table of tokens is.
    (r"(special|image_positions|text_positions|special_positions)/weight", (None, ("fsdp", "model"))),
    # The norm that follows needs the whole width.
    (r"head_proj/weight", ("fsdp", "model")),
    (r"length_head/weight", (None, ("fsdp", "model"))),
    (r"head_bias|head_proj/bias|head_norm/(weight|bias)", ()),
    (r"layers/(ln_[12]/(weight|bias)|attn/out_proj/bias|mlp/c_proj/bias)", ()),
)


def roles(config: MagvltConfig) -> Mapping[str, Group]:
    """Roles of the parameters: all of them learn, from scratch."""
    return {TransformerParam.role: Group(), HeadParam.role: Group()}
