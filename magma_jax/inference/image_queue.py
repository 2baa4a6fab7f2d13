"""A queue of requests for images, drawn by a thread: together if the model can, else one after another."""

import collections
import logging
import threading
from typing import Any, NamedTuple

from magma_jax.data.images import ImageError
from magma_jax.inference.answers import AnswerOptions, Canvas, ImageOptions, Written
from magma_jax.inference.generator import BatchedImageGenerator, ImageBatch, ImageGenerator
from magma_jax.inference.pending import EngineError, Pending, QueueFull, UnfinishedError
from magma_jax.inference.prompts import Prompt

_log = logging.getLogger(__name__)


class ImageTicket(Pending[Any]):
    """An accepted request; its pieces are a ``Canvas`` each, or with ``AnswerOptions`` one that is ``Written``."""

    def __init__(self, prompt: Prompt, options: ImageOptions | AnswerOptions, previews: int):
        super().__init__()
        self.prompt, self.options, self.previews = prompt, options, previews


class ImageQueueStats(NamedTuple):
    """Counters of a queue.

    Attributes:
        waiting: requests that wait.
        running: requests being drawn; at most one if the model draws them one after another.
        finished: requests that have ended.
        images_drawn: images drawn.
    """

    waiting: int
    running: int
    finished: int
    images_drawn: int


class ImageQueue:
    """Draws images for many callers with one model; thread-safe. Use it in a ``with`` block.

    Attributes:
        failure: reason why it has stopped for good; None while it works.

    Args:
        model: model that draws. Requests join and leave the running batch of a ``BatchedImageGenerator``.
        limit: maximum number of waiting requests.
        slots: rows of such a batch.
        context: positions of a row; None for the model's.

    Raises:
        ValueError: as of ``image_batch``.
    """

    def __init__(self, model: ImageGenerator, limit: int = 64, *, slots: int = 8, context: int | None = None):
        self.model, self.limit = model, limit
        self.failure: str | None = None
        self._waiting: collections.deque[ImageTicket] = collections.deque()
        self._running: list[ImageTicket] = []
        self._batch = model.image_batch(slots, context) if isinstance(model, BatchedImageGenerator) else None
        self._changed = threading.Condition()
        self._draining = self._stopping = False
        self._finished = self._images = 0
        self._thread = threading.Thread(target=self._run, name="images", daemon=True)
        self._thread.start()

    def __enter__(self) -> "ImageQueue":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def warmup(self, rows: int) -> None:
        """Compiles the programs for up to ``rows`` images per request now instead of at first use."""
        if self._batch is None:
            self.model.warm_up(rows)
        else:
            self._batch.warm_up()

    def submit(self, prompt: Prompt, options: ImageOptions | AnswerOptions, *, previews: int = 0) -> ImageTicket:
        """Accepts a request.

        Args:
            prompt: text, or an image and a text.
            options: options of the images, or of answers of texts and images.
            previews: number of unfinished canvases to report.

        Raises:
            QueueFull: ``limit`` requests are waiting. EngineError: it is shutting down, or has failed.
        """
        ticket = ImageTicket(prompt, options, previews)
        with self._changed:
            if self.failure is not None:
                raise EngineError(self.failure)
            if self._draining:
                raise EngineError("the server is shutting down; ask another or try later")
            self._drop_cancelled()
            if len(self._waiting) >= self.limit:
                raise QueueFull(f"{self.limit} requests are waiting already; try again later")
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def stats(self) -> ImageQueueStats:
        """Counters for monitoring."""
        with self._changed:
            self._drop_cancelled()
            return ImageQueueStats(len(self._waiting), len(self._running), self._finished, self._images)

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Stops; with ``drain`` pending requests are finished first, otherwise they fail."""
        with self._changed:
            self._draining = True
            if drain:
                self._changed.wait_for(lambda: not (self._waiting or self._running), timeout)
            self._stopping = True
            for ticket in self._running:
                ticket.cancel()
            self._changed.notify_all()
        self._thread.join(timeout)

    def _drop_cancelled(self) -> None:
        """Frees the places of callers that have left."""
        for ticket in [ticket for ticket in self._waiting if ticket.cancelled]:
            self._waiting.remove(ticket)
            self._finished += 1
            ticket.fail(EngineError("cancelled"))

    # The methods below run in the queue's thread only.

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._stopping)
                if self._stopping:
                    left = [*self._running, *self._waiting]
                    self._waiting.clear()
                    self._running = []
                    break
            if self._batch is None:
                self._draw_alone(self._next())
            else:
                self._draw_together(self._batch)
        for ticket in left:
            ticket.fail(EngineError("the server is shutting down"))

    def _next(self) -> ImageTicket | None:
        """The first waiting ticket, which runs from now on."""
        with self._changed:
            self._drop_cancelled()
            if not self._waiting:
                return None
            self._running.append(self._waiting.popleft())
            return self._running[-1]

    def _draw_together(self, batch: ImageBatch) -> None:
        """Lets tickets join and leave the batch, and draws a part of all."""
        for ticket in [ticket for ticket in self._running if ticket.cancelled]:
            batch.cancel(ticket)
            self._finish(ticket, EngineError("cancelled"))
        while batch.room and (ticket := self._next()):
            if isinstance(ticket.options, AnswerOptions) or not batch.takes(ticket.options):
                self._draw_alone(ticket)
                continue
            try:
                batch.begin(ticket, ticket.prompt, ticket.options)
            except (ValueError, ImageError) as error:
                self._finish(ticket, UnfinishedError(str(error)))
            except Exception as error:
                self._finish(ticket, _failed(error))
        try:
            done = batch.step()
        except Exception as error:  # callers must be told of any device error
            for ticket in list(self._running):
                self._finish(ticket, _failed(error))
            batch.reset()
            return
        for ticket, make in done:
            try:
                self._put(ticket, make())
                self._finish(ticket)
            except Exception as error:
                self._finish(ticket, _failed(error))

    def _draw_alone(self, ticket: ImageTicket | None) -> None:
        if ticket is None:
            return
        try:
            self._draw(ticket)
            self._finish(ticket)
        except (ValueError, ImageError) as error:
            self._finish(ticket, UnfinishedError(str(error)))
        except Exception as error:  # callers must be told of any device error
            self._finish(ticket, _failed(error))

    def _finish(self, ticket: ImageTicket, error: EngineError | None = None) -> None:
        if error is not None:
            ticket.fail(error)
        with self._changed:
            self._running.remove(ticket)
            self._finished += 1
            self._changed.notify_all()

    def _put(self, ticket: ImageTicket, canvas: Canvas) -> None:
        if canvas.finish is not None:
            with self._changed:
                self._images += len(canvas.images)
        ticket.put(canvas)

    def _draw(self, ticket: ImageTicket) -> None:
        options = ticket.options
        if ticket.cancelled:
            pass
        elif isinstance(options, AnswerOptions):
            (answers,) = self.model.answers([ticket.prompt], options, count=1)
            ticket.put(Written(answers))
        else:
            for canvas in self.model.canvases(ticket.prompt, options, previews=ticket.previews):
                self._put(ticket, canvas)
                if ticket.cancelled or canvas.finish is not None:
                    break
        if ticket.finish is None:
            ticket.fail(EngineError("cancelled"))


def _failed(error: Exception) -> EngineError:
    _log.error("drawing failed", exc_info=error)
    return EngineError(f"drawing failed ({type(error).__name__}: {error!s:.300})")
