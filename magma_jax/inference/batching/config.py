"""Sizes of an engine."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine; all memory is allocated at the start.

    Attributes:
        slots: requests that decode together.
        context: positions per request, prompt and answer; None for the model's context.
        images: size of the table of encoded images; also the maximum per prompt.
        steps: tokens decoded between two checks of the queue.
        queue: maximum number of waiting requests.
        queue_bytes: maximum size of the images (at the encoder's size) and grammars of waiting requests.
        reuse: whether prompts reuse the cache of a common prefix, and equal images are encoded once.
    """

    slots: int = 8
    context: int | None = None
    images: int = 64
    steps: int = 8
    queue: int = 256
    queue_bytes: int = 256 * 2**20
    reuse: bool = True

    def __post_init__(self):
        for name in ("slots", "images", "steps", "queue", "queue_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.context is not None and self.context < 2:
            raise ValueError(f"context must be at least 2, a prompt and its answer, got {self.context}")
