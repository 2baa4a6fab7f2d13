"""How the forward pass of training runs."""

import dataclasses

from magma_jax.nn.convolution import BatchNormMode
from magma_jax.nn.stack import Remat


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """How the forward pass of training runs.

    Attributes:
        batch_norm: ``frozen`` statistics, or statistics of the ``batch`` with running averages as the original.
        remat: what the backward pass recomputes of the language model, see ``nn.stack``.
        encoder_remat: the same of the image encoder.
    """

    batch_norm: BatchNormMode = "frozen"
    remat: Remat = "none"
    encoder_remat: Remat = "none"
