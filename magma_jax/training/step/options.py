"""How the forward pass of training runs."""

import dataclasses
from typing import ClassVar

from magma_jax.nn.convolution import BatchNormMode
from magma_jax.nn.stack import Remat


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """How the forward pass of training runs.

    A family with other options has a dataclass of its own that shares three members: ``may_change``, names of fields
    that leave the result as it is but for rounding; ``adds_up``; ``for_validation``.

    Attributes:
        batch_norm: ``frozen`` statistics, or statistics of the ``batch`` with running averages as the original.
        remat: what the backward pass recomputes of the language model, see ``nn.stack``.
        encoder_remat: the same of the image encoder.
    """

    batch_norm: BatchNormMode = "frozen"
    remat: Remat = "none"
    encoder_remat: Remat = "none"

    may_change: ClassVar[tuple[str, ...]] = ("remat", "encoder_remat")

    @property
    def adds_up(self) -> bool:
        """Whether the parts of a batch give the step of the whole: with statistics of the batch they do not."""
        return self.batch_norm == "frozen"

    def for_validation(self) -> "LossOptions":
        """The options of a loss that nothing is learned from: running statistics stay as they are."""
        return dataclasses.replace(self, batch_norm="frozen")
