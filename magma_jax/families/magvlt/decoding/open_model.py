"""A model that samplers draw from."""

import dataclasses
from typing import Any

from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.nn.modules import Definition
from magma_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model to draw from: its config, what ``nn.modules.split`` made of it, and the token past a text's end."""

    config: MagvltConfig
    definition: Definition
    params: Params
    pad_id: int


def activations(params: Params) -> Any:
    """Dtype of the activations: that of the weights."""
    return params["wte/weight"].dtype
