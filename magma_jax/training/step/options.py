"""Options of the training loss."""

import dataclasses
from typing import ClassVar

from magma_jax.nn.convolution import BatchNormMode
from magma_jax.nn.stack import Remat


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Options of the forward pass in training.

    A family with other options defines a dataclass with three members of this one: ``may_change``, the names of fields
    that affect results only by rounding; ``adds_up``; ``for_validation``.

    Attributes:
        batch_norm: ``frozen`` statistics, or statistics of the ``batch`` with running averages as in the original.
        remat: remat policy of the language model, see ``nn.stack``.
        encoder_remat: remat policy of the image encoder.
    """

    batch_norm: BatchNormMode = "frozen"
    remat: Remat = "none"
    encoder_remat: Remat = "none"

    may_change: ClassVar[tuple[str, ...]] = ("remat", "encoder_remat")

    @property
    def adds_up(self) -> bool:
        """Whether accumulated parts of a batch are equivalent to the whole batch; false with batch statistics."""
        return self.batch_norm == "frozen"

    def for_validation(self) -> "LossOptions":
        """The options for validation: running statistics are not updated."""
        return dataclasses.replace(self, batch_norm="frozen")
