"""Image routes: from a request to a prompt with a mask, from the prompt to a ticket, from the ticket to a response."""

import asyncio
import base64
import dataclasses
import functools
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import anyio
import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image

from magma_jax.data.decoders import DecoderBusy, DecoderError
from magma_jax.data.images import ImageError, ImageInput
from magma_jax.inference.answers import Canvas
from magma_jax.inference.image_queue import ImageQueue, ImageQueueStats, ImageTicket
from magma_jax.inference.pending import EngineError, QueueFull
from magma_jax.inference.prompts import Prompt
from magma_jax.serve.arrivals import Arrivals
from magma_jax.serve.config import ServerConfig
from magma_jax.serve.errors import QUEUE_FULL, RequestError, busy, error_body
from magma_jax.serve.interleaved import chat
from magma_jax.serve.network.body import read_body, receive
from magma_jax.serve.network.form import read_form
from magma_jax.serve.prometheus import ServerMetrics
from magma_jax.serve.prompts.images import decoders_of
from magma_jax.serve.reply import cancel, follow, left
from magma_jax.serve.requests.images import EditRequest, ImageRequest, OutputFormat, fields_of_form
from magma_jax.serve.requests.schema import MAX_CHOICES, parse
from magma_jax.typing import Bool

# Files of an edit.
_FILES = ("image", "mask")


class ImageService:
    """Shared state and handlers of the image routes."""

    page, counters = "draw.html", ImageQueueStats._fields

    def __init__(self, queue: ImageQueue, config: ServerConfig, metrics: ServerMetrics):
        self.queue, self.config, self.metrics = queue, config, metrics
        self.arrivals = Arrivals(config, queue.limit, lambda: queue.stats().waiting)
        self.decoders = decoders_of(config.images, config.decoders, queue.limit)
        self.threads = ThreadPoolExecutor(config.decoders, "edits")

    def routes(self) -> dict[str, Callable[[Request], Awaitable[Response]]]:
        """Handlers by route."""
        found: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/images/generations": self.generate,
            "/v1/images/edits": self.edit,
        }
        if "text" in self.queue.model.makes:
            found["/v1/chat/completions"] = functools.partial(chat, self)
        return found

    def warm_up(self) -> None:
        """Compiles every program."""
        self.queue.warmup(MAX_CHOICES)

    def start(self) -> None:
        """Starts the decoders before the first request."""
        self.decoders.start()

    def close(self) -> None:
        """Ends the threads and the decoders; waiting requests fail."""
        self.decoders.close()
        self.threads.shutdown(wait=False, cancel_futures=True)

    async def generate(self, request: Request) -> Response:
        """Handles ``POST /v1/images/generations``."""
        started = time.perf_counter()
        with self.arrivals.arrival() as hold:
            wanted = await read_body(request, ImageRequest, self.config, hold)
            reply = self._submit([wanted.prompt], wanted, None, "generation", started)
        return await reply.response(request)

    async def edit(self, request: Request) -> Response:
        """Handles ``POST /v1/images/edits``."""
        started = time.perf_counter()
        with self.arrivals.arrival() as hold:
            body = await receive(request, self.config, hold)
            wanted, files = await anyio.to_thread.run_sync(_read, body, request.headers["content-type"])
            del body
            image, mask = await self.arrivals.in_thread(self.threads, lambda: self._decode(files, started), started)
            reply = self._submit([ImageInput(image), wanted.prompt], wanted, mask, "edit", started)
        return await reply.response(request)

    def _decode(
        self, files: dict[str, bytes], started: float
    ) -> tuple[Image.Image, Bool[np.ndarray, "height width"] | None]:
        """The image to edit, and the mask of the pixels to draw anew."""
        deadline = time.monotonic() + started + self.config.timeout - time.perf_counter()
        decoded = {}
        for name, content in files.items():
            try:
                if len(content) > self.config.images.max_bytes:
                    raise ImageError(f"more than {self.config.images.max_bytes} bytes; send a smaller one")
                decoded[name] = self.decoders.image(content, deadline)
            except ImageError as error:
                raise RequestError(f"{name}: {error}", param=name) from None
            except DecoderBusy as error:
                raise busy(str(error)) from None
            except DecoderError as error:
                raise RequestError(str(error), 503) from None
        image = decoded["image"]
        mask = transparent(decoded.get("mask", image))
        if "mask" in decoded:
            if decoded["mask"].size != image.size:
                sizes = ["x".join(map(str, one.size)) for one in (decoded["mask"], image)]
                raise RequestError(f"mask: {sizes[0]} pixels, the image has {sizes[1]}", param="mask")
            if mask is None:
                says = "mask: no pixel is transparent, so everything is kept; make those transparent that change"
                raise RequestError(says, param="mask")
        return image.convert("RGB"), mask

    def _submit(
        self,
        prompt: Prompt,
        wanted: ImageRequest,
        mask: Bool[np.ndarray, "height width"] | None,
        name: Literal["generation", "edit"],
        started: float,
    ) -> "ImageReply":
        model = self.queue.model
        self.arrivals.check_model(wanted.model)
        wanted.check_size(model.image_size)
        if name == "edit" and "edit" not in model.makes:
            raise RequestError("this model draws images, but edits none", 404)
        try:
            options = dataclasses.replace(wanted.options(), mask=mask)
            ticket = self.queue.submit(prompt, options, previews=wanted.partial_images if wanted.stream else 0)
        except QueueFull as error:
            raise RequestError(str(error), 429, code=QUEUE_FULL) from None
        except EngineError as error:
            raise RequestError(str(error), 503) from None
        except ValueError as error:
            raise RequestError(str(error)) from None
        text = model.text_tokens(wanted.prompt)
        before = model.image_tokens if name == "edit" else 0
        counts = {"input_tokens": text + before, "output_tokens": wanted.n * model.image_tokens}
        details = {"input_tokens_details": {"text_tokens": text, "image_tokens": before}}
        return ImageReply(
            ticket=ticket,
            name=f"image_{name}",
            format=wanted.output_format,
            compression=wanted.output_compression,
            size=f"{model.image_size}x{model.image_size}",
            usage=counts | {"total_tokens": sum(counts.values())} | details,
            stream=wanted.stream,
            metrics=self.metrics,
            started=started,
            timeout=self.config.timeout,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageReply:
    """Images being drawn.

    Attributes:
        ticket: request in the queue.
        name: prefix of the events' types.
        format: file format of the images.
        compression: quality of JPEG and WebP, 0 to 100.
        size: size of the images.
        usage: numbers of tokens.
        stream: whether to stream events.
        metrics: metrics that record the latency.
        started: arrival of the request, by ``time.perf_counter``.
        timeout: seconds for the request.
    """

    ticket: ImageTicket
    name: str
    format: OutputFormat
    compression: int
    size: str
    usage: dict[str, Any]
    stream: bool
    metrics: ServerMetrics
    started: float
    timeout: float

    async def response(self, request: Request) -> Response:
        """Response to ``request``; drawing is cancelled if the client disconnects.

        Raises:
            RequestError: timeout, or drawing failed; only for a complete response.
        """
        if self.stream:
            headers = {"Cache-Control": "no-store"}
            return StreamingResponse(self._events(), media_type="text/event-stream", headers=headers)
        leaver, canvas = asyncio.create_task(left(request)), Canvas(())
        try:
            async for _, piece in follow([self.ticket], self.started, self.timeout, leaver):
                canvas = piece
        finally:
            leaver.cancel()
            cancel([[self.ticket]])
        if canvas.finish is None:
            return Response(status_code=499)
        self.metrics.duration.observe(time.perf_counter() - self.started)
        data = [{"b64_json": content} for content in await self._encode(canvas.images)]
        return JSONResponse({"created": int(time.time()), "data": data, "usage": self.usage} | self._about())

    async def _events(self) -> AsyncIterator[str]:
        created, count = int(time.time()), 0
        try:
            async for _, canvas in follow([self.ticket], self.started, self.timeout):
                for index, content in enumerate(await self._encode(canvas.images)):
                    fields: dict[str, Any] = {"b64_json": content, "created_at": created, "index": index}
                    if canvas.finish is None:
                        kind, more = "partial_image", {"partial_image_index": count}
                    else:
                        kind, more = "completed", {"usage": self.usage}
                    yield _event(f"{self.name}.{kind}", fields | more | self._about())
                count += 1
            self.metrics.duration.observe(time.perf_counter() - self.started)
        except RequestError as error:
            yield _event("error", error_body(error))
        finally:
            # Also reached when the client disconnects, which closes the generator.
            cancel([[self.ticket]])

    def _about(self) -> dict[str, Any]:
        return {"background": "opaque", "output_format": self.format, "quality": "auto", "size": self.size}

    async def _encode(self, images: Sequence[Image.Image]) -> list[str]:
        return await anyio.to_thread.run_sync(
            lambda: [encode(image, self.format, self.compression) for image in images]
        )


def encode(image: Image.Image, kind: OutputFormat, compression: int) -> str:
    """An encoded image in base64; JPEG and WebP with a quality of ``compression``, WebP without loss at 100."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {}
    if kind != "png":
        options = {"quality": compression, "lossless": kind == "webp" and compression == 100}
    image.convert("RGB").save(buffer, kind.upper(), **options)
    return base64.b64encode(buffer.getvalue()).decode()


def transparent(image: Image.Image) -> Bool[np.ndarray, "height width"] | None:
    """Mask of the fully transparent pixels; None if there are none."""
    if not image.has_transparency_data:
        return None
    found = np.asarray(image.convert("RGBA"))[..., 3] == 0
    return found if found.any() else None


def _read(body: bytearray, content_type: str) -> tuple[EditRequest, dict[str, bytes]]:
    """Fields and files of an edit.

    Raises:
        RequestError: a damaged form, or one without an image.
    """
    form = read_form(body, content_type)
    files: dict[str, bytes] = {}
    for name in _FILES:
        contents = form.pop(name, [])
        if len(contents) > 1:
            raise RequestError(f"{name}: one is taken, {len(contents)} were sent", param=name)
        for content in contents:
            if isinstance(content, str):
                raise RequestError(f"{name}: send it as a file of the form", param=name)
            files[name] = content
    if "image" not in files:
        raise RequestError("image: missing", param="image")
    fields: dict[str, list[str]] = {}
    for name, values in form.items():
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) < len(values):
            raise RequestError(f"{name:.40}: no file belongs here", param=name[:40])
        fields[name] = texts
    return parse(fields_of_form(fields), EditRequest), files


def _event(kind: str, fields: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | fields)}\n\n"
