"""Requests of any lengths as batches of ``inference.decoding.streams``."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.families.cm3leon.prompts import Beside
from magma_jax.inference.buckets import SEQUENCES
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.sampling import SamplingRows, sampling_rows, seed_key
from magma_jax.inference.decoding.streams import (
    STREAMS,
    Given,
    Place,
    StreamRows,
    StreamRules,
    StreamTokens,
    decode_streams,
)
from magma_jax.models.references import Places, References
from magma_jax.nn.modules import Definition, merge
from magma_jax.runtime.compile import platform_jit
from magma_jax.typing import Array, Int, Params

# Prompts are padded to these lengths, so that few programs are compiled.
PROMPTS = SEQUENCES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What an example asks for.

    Attributes:
        streams: ids of its prompts, one for each stream.
        given: what stands beside each of them, for a model with ``references``; empty for nothing.
        limit: maximum number of new tokens.
        end: id that ends the answer.
        place: where the first new token stands.
        left: codes until the image is complete, in an image.
        images: whether images may begin.
        texts: whether texts may go on or begin.
        seed: seed of the draws.
        sampling: sampling parameters.
        weight: weight of guidance by the prompt.
        image_weight: weight of guidance by the image.
        interval: share of an image, from and to, in which guidance or CD-K applies.
        cd_k: k of CD-K in place of guidance; 0 for guidance.
        cd_alpha: its alpha.
        amateur_temperature: temperature of the stream that it subtracts.
    """

    streams: tuple[Int[np.ndarray, " S"], ...]
    given: tuple[Beside, ...] = ()
    limit: int
    end: int
    place: Place
    left: int = 0
    images: bool = False
    texts: bool = False
    seed: int = 0
    sampling: SamplingConfig = SamplingConfig()
    weight: float = 1.0
    image_weight: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    cd_k: int = 0
    cd_alpha: float = 0.5
    amateur_temperature: float = 0.5


@dataclasses.dataclass(frozen=True)
class Result:
    """New ids, without the end; whether that was drawn; and the log-probability of all new tokens."""

    ids: Int[np.ndarray, " N"]
    ended: bool
    logprob: float


def run_requests(
    graphdef: Definition, params: Params, requests: Sequence[Request], rules: StreamRules, context: int
) -> list[Result]:
    """Runs requests as one batch; each result is that of the request alone.

    Raises:
        ValueError: a request with another number of streams than ``rules.combine`` takes, or more tokens than the
            context has positions.
    """
    streams = STREAMS[rules.combine]
    for request in requests:
        if len(request.streams) != streams:
            raise ValueError(f"a request has {len(request.streams)} streams, but {rules.combine} takes {streams}")
        check_request(request, context)
    # A power of two, with rows that are already done.
    size = 1 << (len(requests) - 1).bit_length()
    padded = [*requests, *[dataclasses.replace(requests[-1], limit=0)] * (size - len(requests))]
    length = PROMPTS.fit(max(len(stream) for request in requests for stream in request.streams))
    tokens = np.full((streams * size, length), rules.layout.pad, np.int32)
    lengths = np.zeros(streams * size, np.int32)
    for row, (number, request) in enumerate((s, one) for s in range(streams) for one in padded):
        stream = request.streams[number]
        tokens[row, : len(stream)], lengths[row] = stream, len(stream)

    given = _given(padded, streams, length, rules) if requests[0].given else None
    limit = max(request.limit for request in requests)
    found = _decode(
        graphdef,
        params,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        jnp.stack([seed_key(request.seed) for request in padded]),
        sampling_rows([request.sampling for request in padded]),
        stream_rows(padded),
        given,
        rules=rules,
        steps=limit if limit == rules.image_tokens else PROMPTS.fit(limit),
    )
    ids, counts, ended, logprobs = map(np.asarray, found)
    return [
        Result(ids[i, : counts[i] - ended[i]], bool(ended[i]), float(logprobs[i].sum())) for i in range(len(requests))
    ]


def check_request(request: Request, context: int) -> None:
    """Raises ValueError for more tokens than the ``context`` has positions, or sampling that these models lack."""
    if request.sampling.repetition_penalty != 1 or request.sampling.compat is not None:
        raise ValueError("repetition_penalty and compat are not for models of texts and images; leave them out")
    total = max(map(len, request.streams)) + request.limit
    if total > context:
        raise ValueError(
            f"the prompt and {request.limit} new tokens take {total} positions, but the context "
            f"holds {context}; shorten the prompt, give fewer documents or ask for fewer tokens"
        )


def stream_rows(requests: Sequence[Request]) -> StreamRows:
    """What requests ask for, as arrays."""

    def column(name: str, dtype: type) -> Array:
        return jnp.asarray(np.array([getattr(request, name) for request in requests], dtype))

    return StreamRows(
        place=column("place", np.int32),
        left=column("left", np.int32),
        images=column("images", bool),
        texts=column("texts", bool),
        end=column("end", np.int32),
        limit=column("limit", np.int32),
        weight=column("weight", np.float32),
        image_weight=column("image_weight", np.float32),
        first=jnp.asarray(np.array([request.interval[0] for request in requests], np.float32)),
        last=jnp.asarray(np.array([request.interval[1] for request in requests], np.float32)),
        cd_k=column("cd_k", np.int32),
        cd_alpha=column("cd_alpha", np.float32),
        amateur_temperature=column("amateur_temperature", np.float32),
    )


def given_places(request: Request, stream: int, rules: StreamRules) -> tuple[np.ndarray, np.ndarray]:
    """Places (S,) of a prompt's tokens in the grid of their image, and of the tokens after them, see ``Places``."""
    read = request.given[stream].places
    after = rules.image_tokens - request.left if request.place == Place.IMAGE else -1
    return read, np.append(read[1:], after).astype(np.int32)


@platform_jit(static_argnames=("graphdef", "rules", "steps"))
def _decode(
    graphdef: Definition,
    params: Params,
    tokens: Array,
    lengths: Array,
    keys: jax.Array,
    sampling: SamplingRows,
    rows: StreamRows,
    given: Given | None,
    *,
    rules: StreamRules,
    steps: int,
) -> StreamTokens:
    model = merge(graphdef, params)
    return decode_streams(model, tokens, lengths, keys, sampling, rows, rules, steps=steps, given=given)


def _given(requests: Sequence[Request], streams: int, length: int, rules: StreamRules) -> Given:
    """What stands beside the prompts, padded to ``length``; after a prompt comes the first drawn one."""
    read = np.full((streams * len(requests), length), -1, np.int32)
    drawn = read.copy()
    asked = [(request, number) for number in range(streams) for request in requests]
    for row, (request, number) in enumerate(asked):
        places = given_places(request, number, rules)
        read[row, : len(places[0])], drawn[row, : len(places[1])] = places
    beside = [request.given[number] for request, number in asked]
    references = References(*(jnp.asarray(np.stack([one[part] for one in beside])) for part in (0, 1)))
    return Given(references, Places(jnp.asarray(read), jnp.asarray(drawn)))
