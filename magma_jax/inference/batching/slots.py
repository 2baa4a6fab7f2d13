"""The jitted programs of continuous batching over a fixed number of slots; a slot is a row, assigned to one request.

All shapes are fixed: the slots and their cache, a table of encoded images, prompts padded to one of a few lengths. The
programs are therefore few, and all of them can be compiled before the first request.
"""

from typing import Any, Generic, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from magma_jax.inference.decoding.decode import DecodeState, SampledTokens, run, sample_tokens
from magma_jax.inference.decoding.sampling import SamplingRows
from magma_jax.inference.prompts import WORD
from magma_jax.nn.modules import Definition, merge
from magma_jax.runtime.compile import platform_jit
from magma_jax.typing import Array, Bool, Float, Int, Params, PRNGKey, UInt8, UInt32

T = TypeVar("T")
# Type of the arrays: NumPy's outside a program, JAX's inside.
A = TypeVar("A", Array, np.ndarray)


class Admission(NamedTuple, Generic[A]):
    """Inputs of A slots: the part of each prompt that the slot's cache does not hold yet, and the request's options.

    Attributes:
        slot: (A,) slot indices; entries with a nonexistent slot are ignored.
        start: (A,) positions that the slot's cache already holds.
        length: (A,) new positions, without padding.
        tokens: (A, S) ids, padded; arbitrary at image positions.
        places: (A, S) as in ``PromptLayout``, with the row in the image table instead of the image's index.
        seen: (A, V) tokens of the whole prompts.
        seed: (A, 2) ``seed_words`` of the requests, uint32.
        sampling: sampling parameters of the requests.
        limit: (A,) maximum number of tokens.
        minimum: (A,) minimum number of tokens.
        allowed: (A, W) mask of the allowed first tokens, one bit per id.
    """

    slot: A
    start: A
    length: A
    tokens: A
    places: A
    seen: A
    seed: A
    sampling: SamplingRows
    limit: A
    minimum: A
    allowed: A


@platform_jit(static_argnames=("graphdef", "slots", "context", "images"))
def empty_slots(
    graphdef: Definition, params: Params, slots: int, context: int, images: int
) -> tuple[DecodeState, Float[Array, "C P D"]]:
    """Idle rows of ``context`` positions each, and an empty table of images."""
    model = merge(graphdef, params)
    zeros = jnp.zeros(slots, jnp.int32)
    ones = jnp.ones(slots, jnp.float32)
    sampling = SamplingRows(temperature=0 * ones, top_k=zeros, top_p=ones, min_p=0 * ones, repetition_penalty=ones)
    keys = jax.random.split(jax.random.key(0), slots)
    seen = jnp.zeros((slots, model.lm.config.head_rows), bool)
    cache = model.lm.init_cache(slots, context, model.dtype)
    rows = DecodeState(
        cache=cache,
        token=zeros,
        position=zeros,
        count=zeros,
        limit=zeros,
        done=jnp.ones(slots, bool),
        keys=keys,
        sampling=sampling,
        seen=seen,
        minimum=zeros,
    )
    return rows, jnp.zeros((images, model.image_positions, model.lm.config.width), model.dtype)


@overload
def commit_like(params: Params, arrays: np.ndarray) -> Array: ...
@overload
def commit_like(params: Params, arrays: T) -> T: ...
def commit_like(params: Params, arrays: Any) -> Any:
    """Arrays committed to the devices of the weights.

    Committed and uncommitted inputs compile separately. Program outputs are committed, so without this the second call
    would compile again.
    """
    sharding = next(iter(params.values())).sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.device_put(arrays, sharding)


@platform_jit(static_argnames=("graphdef",), donate_argnames=("table",))
def add_image(
    graphdef: Definition,
    params: Params,
    table: Float[Array, "C P D"],
    pixels: UInt8[Array, "1 h w 3"],
    row: Int[Array, ""],
) -> Float[Array, "C P D"]:
    """Encodes an image into a row of the table."""
    model = merge(graphdef, params)
    embedded = model.embed_features(model.encode_pixels(pixels))
    return table.at[row].set(embedded[0].astype(table.dtype))


@platform_jit(static_argnames=("graphdef", "ends", "top"), donate_argnames=("rows",))
def admit(
    graphdef: Definition,
    params: Params,
    rows: DecodeState,
    table: Float[Array, "C P D"],
    admission: Admission[Array],
    *,
    ends: tuple[int, ...],
    top: int,
) -> tuple[DecodeState, SampledTokens]:
    """Runs prompts (images and words) in the caches of their slots, and samples the first tokens."""
    model = merge(graphdef, params)
    slot, start, length = admission.slot, admission.start, admission.length
    embeddings = embed(model, table, admission.tokens, admission.places)
    positions = start[:, None] + jnp.arange(admission.tokens.shape[1])
    output = model.lm(embeddings, positions=positions, cache=rows.cache, cache_rows=slot)
    logits = model.logits(jnp.take_along_axis(output.hidden, (length - 1)[:, None, None], axis=1)[:, 0])
    zeros = jnp.zeros_like(slot)
    new = DecodeState(
        cache=output.cache,
        token=zeros,
        position=start + length - 1,
        count=zeros,
        limit=admission.limit,
        done=admission.limit < 1,
        keys=jax.vmap(request_key)(admission.seed),
        sampling=admission.sampling,
        seen=admission.seen,
        minimum=admission.minimum,
    )
    new, sampled = sample_tokens(model.lm, new, logits, ends, top=top, allowed=admission.allowed)
    others = jax.tree.map(
        lambda all_, one: all_.at[slot].set(one, mode="drop"), rows._replace(cache=None), new._replace(cache=None)
    )
    return others._replace(cache=output.cache), sampled._replace(logits=None)


def embed(
    model: Any, table: Float[Array, "C P D"], tokens: Int[Array, "A S"], places: Int[Array, "A S"]
) -> Float[Array, "A S D"]:
    """Embeddings of sequences of words and image positions, as in ``Admission``."""
    words = model.embed_tokens(tokens)
    positions = table.reshape(-1, table.shape[-1])[jnp.maximum(places, 0)]
    return jnp.where((places == WORD)[:, :, None], words, positions)


@platform_jit(static_argnames=("graphdef", "steps", "ends", "top"), donate_argnames=("rows",))
def decode(
    graphdef: Definition,
    params: Params,
    rows: DecodeState,
    enough: Int[Array, ""],
    allowed: UInt32[Array, "B W"] | None = None,
    *,
    steps: int,
    ends: tuple[int, ...],
    top: int,
) -> tuple[DecodeState, SampledTokens, Int[Array, " B"]]:
    """Decodes up to ``steps`` tokens per slot, see ``inference.decoding.decode.run``; also returns their number."""
    lm = merge(graphdef, params).lm
    after, sampled = run(lm, rows, steps, ends=ends, top=top, enough=enough, allowed=allowed)
    return after, sampled, after.count - rows.count


@platform_jit(donate_argnames=("rows",))
def release(rows: DecodeState, which: Bool[Array, " B"]) -> DecodeState:
    """Makes slots idle."""
    return rows._replace(done=rows.done | which)


@platform_jit(donate_argnames=("rows",))
def copy_prompt(rows: DecodeState, source: Int[Array, ""], target: Int[Array, ""]) -> DecodeState:
    """Copies the cache of one slot to another, for prompts with a common prefix."""
    return rows._replace(
        cache=jax.tree.map(lambda all_: all_.at[..., target, :, :, :].set(all_[..., source, :, :, :]), rows.cache)
    )


def request_key(words: Array) -> PRNGKey:
    """The key that ``generate_tokens`` gives a row with its own seed; ``words`` (2,), see ``seed_words``."""
    key = jax.random.key(words[0])
    key = jnp.where(words[1] == 0, key, jax.random.fold_in(key, words[1]))
    return jax.random.fold_in(key, 0)
