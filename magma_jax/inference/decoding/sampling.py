"""Sampling of the next token: pure, jittable functions on fp32 logits.

The order is the usual one: repetition penalty, temperature, top-k, top-p, min-p, sampling. Each filter sees the output
of the one before, so top-p measures its mass on the tempered, top-k-filtered distribution. Dropped tokens get the
finite ``MASKED``, never -inf, and have probability zero.

A request has a ``SamplingConfig``; a compiled program takes ``SamplingRows``, the same parameters as arrays with one
entry per row. Other values therefore need no recompilation, and rows of one batch may have different parameters.

``compat="upstream"`` samples as the original does: top-k, its top-p rule, temperature last.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.inference.decoding.config import Compat, SamplingConfig, seed_words
from magma_jax.typing import Array, Bool, Float, Int, Key, PRNGKey

# Low enough for a softmax to give exactly 0 beside any logit, high enough to survive fp32 arithmetic.
MASKED = -1e30


class SamplingRows(NamedTuple):
    """Parameters of one ``SamplingConfig`` per row, (B,) each."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array


def sampling_rows(configs: Sequence[SamplingConfig]) -> SamplingRows:
    """Arrays of the parameters of one config per row; ``compat`` is left to the caller."""
    kinds = {"top_k": np.int32}
    return SamplingRows(
        **{
            name: jnp.asarray(np.array([getattr(config, name) for config in configs], kinds.get(name, np.float32)))
            for name in SamplingRows._fields
        }
    )


def seed_key(seed: int) -> PRNGKey:
    """The random key of a seed; errors as ``check_seed``.

    The key is made from the lower 32 bits; the upper ones, unless zero, are folded in.
    """
    low, high = (np.uint32(word) for word in seed_words(seed))
    key = jax.random.key(low)
    return jax.random.fold_in(key, high) if high else key


@functools.partial(jax.jit, static_argnames="rows")
def row_keys(key: PRNGKey, rows: int) -> Key[Array, "{rows}"]:
    """One key per row, ``fold_in(key, row)``, independent of the batch size."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    rows: SamplingRows,
    *,
    table_rows: int | None = None,
    seen: Bool[Array, "B V"] | None = None,
    compat: Compat = None,
) -> Int[Array, " B"]:
    """Samples one token per row, which depends only on the row's own logits, parameters and key.

    Args:
        logits: any float dtype; everything is computed in fp32.
        keys: one key per row (``row_keys``); no effect on rows of temperature 0.
        rows: sampling parameters of each row.
        table_rows: ids from here on have no embedding and are never sampled.
        seen: tokens that already occur in each row's prompt or answer, for the repetition penalty.
        compat: static; see ``SamplingConfig``.
    """
    logits = logits.astype(jnp.float32)
    if table_rows is not None:
        logits = mask_missing_ids(logits, table_rows)
    if seen is not None:
        logits = penalize_repetition(logits, seen, rows.repetition_penalty)
    likeliest = jnp.argmax(logits, axis=-1)

    def draw() -> Int[Array, " B"]:
        sampled = jax.vmap(jax.random.categorical)(keys, filter_logits(logits, rows, compat=compat))
        return jnp.where(rows.temperature == 0, likeliest, sampled)

    # Sorting a vocabulary takes as long as a small model's step, so it is skipped if all rows are greedy.
    return jax.lax.cond(jnp.any(rows.temperature > 0), draw, lambda: likeliest)


def filter_logits(logits: Float[Array, "B V"], rows: SamplingRows, *, compat: Compat = None) -> Float[Array, "B V"]:
    """The logits that ``sample`` samples from: tempered and filtered, in the order of this module.

    ``softmax`` of the result is the distribution. Rows of temperature 0, which are greedy, are returned unchanged.
    """
    if compat == "upstream":
        kept = jnp.where((rows.top_k > 0)[:, None], top_k(logits, rows.top_k, ties="last"), logits)
        kept = jnp.where((rows.top_p > 0)[:, None], top_p_upstream(kept, rows.top_p), kept)
        return apply_temperature(kept, rows.temperature)
    logits = apply_temperature(logits, rows.temperature)
    filters = (rows.top_k > 0) | ((rows.top_p > 0) & (rows.top_p < 1)) | (rows.min_p > 0)
    return jax.lax.cond(jnp.any(filters), lambda: _likeliest_prefix(logits, rows), lambda: logits)


def apply_temperature(
    logits: Float[Array, "B V"], temperature: float | int | Float[Array, " B"]
) -> Float[Array, "B V"]:
    """``logits / temperature``; dropped tokens stay dropped, and rows of temperature 0 are unchanged.

    Temperatures are at least 1e-6: smaller ones would push logits below those of dropped tokens.
    """
    divisor = jnp.asarray(temperature, jnp.float32)
    divisor = jnp.where(divisor > 0, jnp.maximum(divisor, 1e-6), 1.0)
    divisor = jnp.broadcast_to(divisor, logits.shape[:1])[:, None]
    return jnp.where(logits <= MASKED, MASKED, logits / divisor)


def penalize_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Makes tokens that were ``seen`` less likely, for penalties above 1."""
    factor = penalty[:, None]
    penalized = jnp.where(logits > 0, logits / factor, logits * factor)
    return jnp.where(seen & (logits > MASKED), penalized, logits)


def top_k(
    logits: Float[Array, "B V"], k: int | Int[Array, " B"], ties: Literal["first", "last"] = "first"
) -> Float[Array, "B V"]:
    """Keeps exactly ``k`` tokens per row (all, if there are fewer) and masks the rest.

    Among equal logits the lowest ids are kept, as in argmax. The original's choice is undefined (its sort is not
    stable); ``ties="last"``, the highest ids, reproduces the recorded case.
    """
    ordered = logits[:, ::-1] if ties == "last" else logits
    rank = _rank(jnp.argsort(ordered, axis=-1, descending=True, stable=True))
    keep = rank < jnp.broadcast_to(k, logits.shape[:1])[:, None]
    return _keep(logits, keep[:, ::-1] if ties == "last" else keep)


def top_p(logits: Float[Array, "B V"], p: float | int | Float[Array, " B"]) -> Float[Array, "B V"]:
    """Keeps the smallest set of likeliest tokens whose mass is at least ``p`` (Holtzman et al. 2020).

    At least one token is kept. Among equal logits the lowest ids are kept. The original's first release equals
    ``top_p(logits, 1 - p)``. At p = 1 fp32 rounding may drop a tail of mass below 1e-6.
    """
    order, before = _mass_before(logits)
    return _keep(logits, _unsort((before < _column(p)).at[:, 0].set(True), order))


def top_p_upstream(logits: Float[Array, "B V"], p: float | int | Float[Array, " B"]) -> Float[Array, "B V"]:
    """The original's rule, for comparison: keeps the likeliest token and the unlikely tail.

    It drops the likely tokens after the first, as long as the mass before them is below ``1 - p``.
    """
    order, before = _mass_before(logits)
    return _keep(logits, _unsort((before >= 1 - _column(p)).at[:, 0].set(True), order))


def mask_missing_ids(logits: Float[Array, "B V"], table_rows: int) -> Float[Array, "B V"]:
    """Masks ids beyond the embedding table: a head may have more rows than the table.

    JAX would silently clamp such an id to the table's last row.
    """
    return _keep(logits, jnp.arange(logits.shape[-1]) < table_rows)


def remove_after_eos(
    sequence: Iterable[int] | Int[Array | np.ndarray, " S"],
    eos: int,
    image: int,
    compat: Literal["upstream"] | None = None,
) -> list[int]:
    """The tokens before the first ``eos``, without image placeholders.

    The original ignores an ``eos`` at index 0 if it is the only one: ``[eos, a, b]`` gives ``[a, b]``. Here it gives
    ``[]``, unless ``compat="upstream"``.
    """
    tokens = [int(token) for token in sequence]
    ends = [i for i, token in enumerate(tokens) if token == eos]
    if ends and not (compat == "upstream" and ends == [0]):
        tokens = tokens[: ends[0]]
    return [token for token in tokens if token not in (eos, image)]


def _keep(logits: Float[Array, "B V"], keep: Bool[Array, "*B V"]) -> Float[Array, "B V"]:
    return jnp.where(keep, logits, jnp.asarray(MASKED, logits.dtype))


def _column(value: float | int | Float[Array, " B"]) -> Float[Array, "..."]:
    return jnp.asarray(value, jnp.float32)[..., None]


def _likeliest_prefix(logits: Float[Array, "B V"], rows: SamplingRows) -> Float[Array, "B V"]:
    """Top-k, top-p and min-p with one sort: each keeps a prefix of the tokens in order of likelihood."""
    vocabulary = logits.shape[-1]
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ordered = jnp.take_along_axis(logits, order, axis=-1)
    count = jnp.where(rows.top_k > 0, rows.top_k, vocabulary)[:, None]
    ordered = jnp.where(jnp.arange(vocabulary) < count, ordered, MASKED)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = _before(probabilities)
    mass = rows.top_p[:, None]
    keep = (ordered > MASKED) & ((before < mass) | (mass <= 0) | (mass >= 1))
    keep &= probabilities >= rows.min_p[:, None] * probabilities[:, :1]
    return _keep(logits, _unsort(keep.at[:, 0].set(True), order))


def _rank(order: Int[Array, "B V"]) -> Int[Array, "B V"]:
    places = jnp.broadcast_to(jnp.arange(order.shape[-1]), order.shape)
    return jnp.put_along_axis(jnp.zeros_like(order), order, places, axis=-1, inplace=False)


def _mass_before(logits: Float[Array, "B V"]) -> tuple[Int[Array, "B V"], Float[Array, "B V"]]:
    """Ids by descending probability (ties by id), and for each the total probability of those before it."""
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    return order, _before(probabilities)


def _before(probabilities: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Exclusive cumulative sum."""
    return jnp.pad(jnp.cumsum(probabilities[:, :-1], axis=-1), ((0, 0), (1, 0)))


def _unsort(values: Bool[Array, "B V"], order: Int[Array, "B V"]) -> Bool[Array, "B V"]:
    return jnp.put_along_axis(jnp.zeros_like(values), order, values, axis=-1, inplace=False)
