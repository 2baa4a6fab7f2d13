"""The attention route: attention maps of an answer's words over the images."""

from typing import Annotated, Any

import numpy as np
from pydantic import Discriminator, Field, Tag

from magma_jax.inference.attention_maps import ALL_HEADS, ImageAttention, attend, check_head, split_words
from magma_jax.inference.batching.engine import Engine
from magma_jax.inference.prompts import WORD, PromptLayout
from magma_jax.serve.errors import RequestError
from magma_jax.serve.requests.schema import MessagesRequest, Token

# Layer number that stands for none: only the rollout is computed.
_NO_LAYER = -1


Index = Annotated[int, Field(ge=-(2**31), lt=2**31)]


class AttentionRequest(MessagesRequest):
    """Body of ``POST /v1/attention``: a prompt as for chat completions, and its answer as text or ``token_ids``."""

    answer: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[Token], Field(max_length=100_000, fail_fast=True), Tag("tokens")],
        Discriminator(lambda answer: "text" if isinstance(answer, str) else "tokens"),
    ]
    layer: Index | None = None
    head: Index | None = None
    relative: bool = False


def attention(engine: Engine, prompt: PromptLayout, wanted: AttentionRequest) -> dict[str, Any]:
    """Attention maps of every word, with each image's cells in row-major order.

    Raises:
        RequestError: no image, no answer, no such layer or head, or more positions than the context.
    """
    model = engine.model
    try:
        check_head(model.lm_config.layers, model.lm_config.heads, wanted.layer, wanted.head)
    except ValueError as error:
        raise RequestError(str(error)) from None
    if len(wanted.answer) > engine.context * model.tokenizer.longest:  # before the slow tokenisation
        raise RequestError(f"the answer is longer than the context of {engine.context} tokens holds", param="answer")
    tokens = model.tokenizer.encode(wanted.answer) if isinstance(wanted.answer, str) else wanted.answer
    if any(token >= model.lm_config.vocab_rows for token in tokens):
        raise RequestError("answer: no such token", param="answer")
    total = len(prompt) + len(tokens)
    if total > engine.context:
        raise RequestError(f"prompt and answer have {total} positions, the context holds {engine.context}")
    layer = _NO_LAYER if wanted.layer is None else wanted.layer
    head = ALL_HEADS if wanted.head is None else wanted.head
    try:
        rollout, weights = _attend(engine, prompt, tokens, layer, head)
    except ValueError as error:
        raise RequestError(str(error)) from None
    seen = ImageAttention(
        tokens=tuple(tokens),
        words=tuple(split_words(model.tokenizer, tokens)),
        weights=weights[None],
        rollout=rollout if wanted.layer is None else weights[0],
        images=(),
        grid=model.images.grid,
    )
    words = [
        {"text": word.text, "share": round(seen.share(i), 4), "maps": _maps(seen, i, wanted.relative)}
        for i, word in enumerate(seen.words)
    ]
    grid = None if seen.grid is None else {"rows": seen.grid.rows, "columns": seen.grid.columns}
    return {
        "object": "attention",
        "words": words,
        "grid": grid,
        "note": "this model's image positions are no places" if seen.grid is None else seen.grid.note,
        "layers": model.lm_config.layers,
        "heads": model.lm_config.heads,
    }


def warm_up(engine: Engine) -> None:
    """Compiles the programs of ``attention`` for all prompt lengths."""
    spec = engine.model.images
    key, pixels = bytes(16), np.zeros((spec.size, spec.size, 3), np.uint8)
    prompt = PromptLayout(
        tokens=np.zeros(spec.positions + 1, np.int32),
        places=np.array([*range(spec.positions), WORD], np.int32),
        images=(key,),
        positions=spec.positions,
        pixels={key: pixels},
    )
    for length in engine.buckets.sizes:
        if length > spec.positions:
            _attend(engine, prompt, [0], _NO_LAYER, ALL_HEADS, length)


def _attend(engine: Engine, prompt: PromptLayout, tokens: list[int], layer: int, head: int, length: int | None = None):
    length = length or engine.buckets.fit(len(prompt) + len(tokens))
    options = {"length": length, "images": engine.config.images}
    return attend(engine.model, prompt, tokens, np.array([[layer, head]]), **options)


def _maps(seen: ImageAttention, word: int, relative: bool) -> list[list[float]]:
    if seen.grid is None:
        return []
    count = seen.rollout.shape[1]
    maps = [seen.map(word, image=image, relative=relative) for image in range(count)]
    return [[round(float(value), 5) for value in found.ravel()] for found in maps]
