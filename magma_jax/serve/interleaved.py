"""Chat answers of models that draw: texts with images, in the order in which they were written."""

import asyncio
import functools
import secrets
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import anyio
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from PIL import Image

from magma_jax.data.decoders import DecoderBusy, DecoderError, Decoders
from magma_jax.data.images import ImageError, ImageInput
from magma_jax.inference.answers import Answer, AnswerOptions, Written
from magma_jax.inference.decoding.config import SEED_BITS, SamplingConfig
from magma_jax.inference.generator import ImageGenerator
from magma_jax.inference.image_queue import ImageQueue
from magma_jax.inference.pending import EngineError, QueueFull
from magma_jax.inference.prompts import Prompt
from magma_jax.serve.arrivals import Arrivals
from magma_jax.serve.config import ServerConfig
from magma_jax.serve.errors import QUEUE_FULL, RequestError, busy
from magma_jax.serve.network.body import read_body
from magma_jax.serve.prometheus import ServerMetrics
from magma_jax.serve.prompts.fetch import FetchError
from magma_jax.serve.prompts.images import RequestImage, data_uri
from magma_jax.serve.reply import cancel, follow, left
from magma_jax.serve.requests.schema import ChatRequest, ImagePart

# New tokens of an answer's text where a request does not say; a text prompt leaves room for one image more.
TEXT_TOKENS = 64


class Host(Protocol):
    """What the route needs of the image service."""

    queue: ImageQueue
    config: ServerConfig
    metrics: ServerMetrics
    arrivals: Arrivals
    decoders: Decoders
    threads: ThreadPoolExecutor


async def chat(service: Host, request: Request) -> Response:
    """Handles ``POST /v1/chat/completions``: continues one message of texts and images.

    The message of a choice holds its text as ``content``, and if it has images, also these as ``images``, and texts
    and images in order as ``parts``.
    """
    started = time.perf_counter()
    with service.arrivals.arrival() as hold:
        wanted = await read_body(request, ChatRequest, service.config, hold)
        service.arrivals.check_model(wanted.model)
        _check(wanted)
        work = functools.partial(_prompt, service, wanted, started)
        prompt = await service.arrivals.in_thread(service.threads, work, started)
        model = service.queue.model
        options = _options(wanted, 0 if any(isinstance(part, ImageInput) for part in prompt) else model.image_tokens)
        try:
            ticket = service.queue.submit(prompt, options)
        except QueueFull as error:
            raise RequestError(str(error), 429, code=QUEUE_FULL) from None
        except EngineError as error:
            raise RequestError(str(error), 503) from None
    leaver, written = asyncio.create_task(left(request)), None
    try:
        async for _, piece in follow([ticket], started, service.config.timeout, leaver):
            written = piece
    finally:
        leaver.cancel()
        cancel([[ticket]])
    if not isinstance(written, Written):
        return Response(status_code=499)
    service.metrics.duration.observe(time.perf_counter() - started)
    choices = await anyio.to_thread.run_sync(lambda: [_choice(i, one) for i, one in enumerate(written.answers)])
    body = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time())}
    return JSONResponse(
        body | {"model": service.config.model, "choices": choices, "usage": _usage(model, prompt, written.answers)}
    )


def _check(wanted: ChatRequest) -> None:
    """Raises RequestError for what these models do not do."""
    if len(wanted.messages) != 1 or wanted.messages[0].role != "user":
        raise RequestError("this model continues one document: send one message, of the user", param="messages")
    for name, given in (
        ("stream", wanted.stream),
        ("stop", wanted.stop),
        ("logprobs", wanted.logprobs),
        ("min_tokens", wanted.min_tokens),
        ("ignore_eos", wanted.ignore_eos),
        ("template", wanted.template),
        ("return_token_ids", wanted.return_token_ids),
        ("response_format", wanted.forms),
    ):
        if given:
            raise RequestError(f"{name}: answers of this model may hold images; leave it out", param=name)


def _prompt(service: Host, wanted: ChatRequest, started: float) -> Prompt:
    """The message's texts and decoded images."""
    rules, parts = service.config.images, wanted.messages[0].parts
    images = sum(isinstance(part, ImagePart) for part in parts)
    if images > rules.max_images:
        says = f"the request has {images} images, at most {rules.max_images} are taken"
        raise RequestError(says, param="messages")
    deadline = time.monotonic() + started + service.config.timeout - time.perf_counter()
    try:
        return [
            ImageInput(RequestImage(part.image_url.url, rules, service.decoders, deadline).load().convert("RGB"))
            if isinstance(part, ImagePart)
            else part.text
            for part in parts
        ]
    except DecoderBusy as error:
        raise busy(str(error)) from None
    except DecoderError as error:
        raise RequestError(str(error), 503) from None
    except (ImageError, FetchError) as error:
        raise RequestError(str(error), param="messages") from None


def _options(wanted: ChatRequest, image_tokens: int) -> AnswerOptions:
    sampling = SamplingConfig(
        wanted.temperature, max(wanted.top_k, 0), wanted.top_p, wanted.min_p, wanted.repetition_penalty
    )
    try:
        return AnswerOptions(
            max_new_tokens=wanted.limit or image_tokens + TEXT_TOKENS,
            sampling=sampling,
            seed=secrets.randbits(SEED_BITS - 1) if wanted.seed is None else wanted.seed,
            n=wanted.n,
        )
    except ValueError as error:
        raise RequestError(str(error)) from None


def _choice(index: int, answer: Answer) -> dict[str, Any]:
    parts = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_uri(part)}}
        for part in answer.parts
    ]
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if images := [part for part in parts if part["type"] == "image_url"]:
        message |= {"images": images, "parts": parts}
    return {"index": index, "message": message, "finish_reason": answer.finish, "logprobs": None}


def _usage(model: ImageGenerator, prompt: Prompt, answers: Sequence[Answer]) -> dict[str, int]:
    before = sum(model.text_tokens(part) if isinstance(part, str) else model.image_tokens for part in prompt)
    after = sum(
        len(answer.tokens) + model.image_tokens * sum(isinstance(part, Image.Image) for part in answer.parts)
        for answer in answers
    )
    return {"prompt_tokens": before, "completion_tokens": after, "total_tokens": before + after}
