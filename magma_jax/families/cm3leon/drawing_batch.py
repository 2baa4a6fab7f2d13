"""Drawings and edits of many callers in one running batch, for the server's queue."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from magma_jax.families.cm3leon.batch import StreamBatch
from magma_jax.inference.answers import Canvas, ImageOptions
from magma_jax.inference.prompts import Prompt

if TYPE_CHECKING:
    from magma_jax.families.cm3leon.generator import CM3Leon


class DrawingBatch:
    """See ``inference.generator.ImageBatch``.

    Args:
        model: what draws.
        slots: streams that are drawn together: a guided drawing is two, a guided edit three.
        context: positions of a slot; None for the model's context.

    Raises:
        ValueError: fewer slots than an edit takes, or more positions than the model has.
    """

    def __init__(self, model: "CM3Leon", slots: int, context: int | None = None):
        self._model = model
        self._streams = StreamBatch(model.config, model.graphdef, model.params, count=slots, context=context)

    @property
    def room(self) -> bool:
        return self._streams.room

    @property
    def busy(self) -> bool:
        return self._streams.busy

    def takes(self, options: ImageOptions) -> bool:
        return options.mask is None

    def begin(self, key: Any, prompt: Prompt, options: ImageOptions) -> None:
        model = self._model
        plan, wanted = model.plan_drawing(prompt, options)
        requests = model.engine.drawings(plan, wanted)

        def finish(results: list[Any]) -> Canvas:
            best = model.engine.best(plan, results, wanted)[0]
            return Canvas(model.media.images_of(model.engine.codes_of(best)), "stop")

        self._streams.begin(key, requests, finish)

    def step(self) -> list[tuple[Any, Callable[[], Canvas]]]:
        return self._streams.step()

    def cancel(self, key: Any) -> None:
        self._streams.cancel(key)

    def reset(self) -> None:
        self._streams.reset()

    def warm_up(self) -> None:
        for guidance in (1.0, 2.0):
            self.begin(None, ["a"], ImageOptions(guidance=guidance))
            while self.busy:
                for _, finish in self.step():
                    finish()
