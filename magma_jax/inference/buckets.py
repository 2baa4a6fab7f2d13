"""Declared sequence lengths to pad to, few of them, so that few programs are compiled."""

import bisect
import dataclasses


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Declared lengths, ascending, and multiples of a step beyond the last one.

    Attributes:
        sizes: the lengths.
        step: spacing beyond the last length; default: the last length.
    """

    sizes: tuple[int, ...]
    step: int | None = None

    def fit(self, length: int) -> int:
        """The shortest bucket that holds ``length`` positions."""
        index = bisect.bisect_left(self.sizes, length)
        if index < len(self.sizes):
            return self.sizes[index]
        step = self.step or self.sizes[-1]
        return -(-length // step) * step

    def up_to(self, limit: int) -> "Buckets":
        """The buckets below ``limit``, and ``limit`` itself as the last."""
        return Buckets((*(size for size in self.sizes if size < limit), limit))


# Lengths of prompts, and of prompts with answers.
SEQUENCES = Buckets((32, 48, 64, 72, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048))
# Lengths of choices.
CHOICES = Buckets((4, 8, 16, 32, 64))
# Lengths of evaluation prompts; finer, since many prompts share each program.
EVALUATION = Buckets((*range(16, 128, 16), *range(128, 513, 32)), step=128)
