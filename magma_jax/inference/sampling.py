"""From logits to the next token: pure functions on fp32 logits, all jittable.

The order is the common one: temperature, top-k, top-p, draw. Each filter sees what the one before it left, so
top-p counts its mass on the tempered, top-k-filtered distribution. Dropped tokens get the finite ``MASKED``,
never -inf, and have probability zero.

``SamplingConfig(compat="upstream")`` draws as the original does: top-k, its top-p rule, temperature last.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.typing import Array, Bool, Float, Int, Key, PRNGKey

# Low enough for a softmax to give exactly 0 beside any logit, high enough to survive fp32 arithmetic.
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to choose the next token. Hashable: pass it as a static argument.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token (the lowest id among equals) and ignores
            the rest of this class.
        top_k: how many of the likeliest tokens stay; 0 keeps all.
        top_p: the smallest set of likeliest tokens with at least this mass stays; 1 (or 0, as in the
            original) keeps all.
        compat: None, or "upstream" for the original's rules and order.

    Raises:
        ValueError: a value outside its range, NaN included.
    """

    temperature: float | int = 0.0
    top_k: int = 0
    top_p: float | int = 1.0
    compat: Literal["upstream"] | None = None

    def __post_init__(self):
        # NaN fails every comparison, so each condition states what is allowed.
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or positive and finite, got {self.temperature}")
        if not (isinstance(self.top_k, int) and self.top_k >= 0):
            raise ValueError(f"top_k must be a whole number, 0 or positive, got {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must lie between 0 and 1, got {self.top_p}")
        if self.compat not in (None, "upstream"):
            raise ValueError(f"compat must be None or 'upstream', got {self.compat!r}")


def row_keys(key: PRNGKey, rows: int) -> Key[Array, "{rows}"]:
    """One key a row, ``fold_in(key, row)``: the same for row 3 whether the batch has 4 rows or 400."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def step_keys(keys: Key[Array, " B"], step: int | Int[Array, ""]) -> Key[Array, " B"]:
    """The rows' keys for one decoding step, ``fold_in(row key, step)``."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"] | None,
    config: SamplingConfig,
    table_rows: int | None = None,
) -> Int[Array, " B"]:
    """Draws one token a row. A row's draw depends on its own logits and key, not on its neighbours.

    Args:
        logits: any float dtype; everything is computed in fp32.
        keys: one key a row (``row_keys``); may be None when ``config.temperature`` is 0.
        config: static under jit.
        table_rows: ids from here on have no embedding and are never drawn.

    Raises:
        ValueError: keys missing where something is drawn.
    """
    logits = logits.astype(jnp.float32)
    if table_rows is not None:
        logits = mask_missing_ids(logits, table_rows)
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    if keys is None:
        raise ValueError(f"temperature {config.temperature} draws at random: pass one key a row")
    return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, config))


def filter_logits(logits: Float[Array, "B V"], config: SamplingConfig) -> Float[Array, "B V"]:
    """The logits that ``sample`` draws from: tempered and filtered in the order ``config`` names.

    ``softmax`` of the result is the distribution. Not for temperature 0, which draws nothing.
    """
    if config.compat == "upstream":
        if config.top_k:
            logits = top_k(logits, config.top_k, ties="last")
        if config.top_p:
            logits = top_p_upstream(logits, config.top_p)
        return apply_temperature(logits, config.temperature)
    logits = apply_temperature(logits, config.temperature)
    if config.top_k:
        logits = top_k(logits, config.top_k)
    if 0 < config.top_p < 1:
        logits = top_p(logits, config.top_p)
    return logits


def apply_temperature(logits: Float[Array, "B V"], temperature: float | int) -> Float[Array, "B V"]:
    """``logits / temperature``, where dropped tokens stay dropped at any temperature above 0."""
    return jnp.where(logits <= MASKED, MASKED, logits / temperature)


def top_k(logits: Float[Array, "B V"], k: int, ties: Literal["first", "last"] = "first") -> Float[Array, "B V"]:
    """Keeps exactly ``k`` tokens a row (all, if there are fewer) and masks the rest.

    Among equal logits the lowest ids stay, as in argmax. The original's choice among equals follows no rule
    (its sort is not stable); ``ties="last"``, the highest ids, is what it did in the recorded case.
    """
    k = min(k, logits.shape[-1])
    ordered = logits[:, ::-1] if ties == "last" else logits
    _, kept = jax.lax.top_k(ordered, k)
    keep = jax.vmap(lambda row: jnp.zeros(logits.shape[-1], bool).at[row].set(True))(kept)
    return _keep(logits, keep[:, ::-1] if ties == "last" else keep)


def top_p(logits: Float[Array, "B V"], p: float | int) -> Float[Array, "B V"]:
    """Keeps the smallest set of likeliest tokens whose mass is at least ``p`` (Holtzman et al. 2020).

    At least one token stays. Among equal logits the lowest ids stay. The original's first release equals
    ``top_p(logits, 1 - p)``. At p = 1 fp32 rounding may drop a tail of mass below 1e-6.
    """
    order, before = _mass_before(logits)
    return _keep(logits, _unsort((before < p).at[:, 0].set(True), order))


def top_p_upstream(logits: Float[Array, "B V"], p: float | int) -> Float[Array, "B V"]:
    """The original's rule, for comparison: keeps the likeliest token and the unlikely tail.

    Dropped are the likely tokens after the first, as long as the mass before them is below ``1 - p``.
    """
    order, before = _mass_before(logits)
    return _keep(logits, _unsort((before >= 1 - p).at[:, 0].set(True), order))


def mask_missing_ids(logits: Float[Array, "B V"], table_rows: int) -> Float[Array, "B V"]:
    """Masks the ids that the embedding table lacks: a head may have more rows than the table.

    JAX would clamp such an id to the table's last row without a word.
    """
    return _keep(logits, jnp.arange(logits.shape[-1]) < table_rows)


def remove_after_eos(
    sequence: Iterable[int] | Int[Array | np.ndarray, " S"],
    eos: int,
    image: int,
    compat: Literal["upstream"] | None = None,
) -> list[int]:
    """The tokens before the first ``eos``, without image placeholders.

    The original overlooks an ``eos`` in first place if it is the only one: ``[eos, a, b]`` gives ``[a, b]``.
    Here it gives ``[]``, unless ``compat="upstream"``.
    """
    tokens = [int(token) for token in sequence]
    ends = [i for i, token in enumerate(tokens) if token == eos]
    if ends and not (compat == "upstream" and ends == [0]):
        tokens = tokens[: ends[0]]
    return [token for token in tokens if token not in (eos, image)]


def _keep(logits: Float[Array, "B V"], keep: Bool[Array, "*B V"]) -> Float[Array, "B V"]:
    return jnp.where(keep, logits, jnp.asarray(MASKED, logits.dtype))


def _mass_before(logits: Float[Array, "B V"]) -> tuple[Int[Array, "B V"], Float[Array, "B V"]]:
    """Ids from likely to unlikely (equals by id), and for each the probability of all before it."""
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    return order, jnp.pad(jnp.cumsum(probabilities[:, :-1], axis=-1), ((0, 0), (1, 0)))


def _unsort(values: Bool[Array, "B V"], order: Int[Array, "B V"]) -> Bool[Array, "B V"]:
    return jnp.put_along_axis(jnp.zeros_like(values), order, values, axis=-1, inplace=False)
