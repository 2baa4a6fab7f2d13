"""Programs of continuous batching: slots whose rows are the streams of requests that came at different times.

A request takes as many slots as it has streams: one, two with guidance, three for an edit. All of its slots hold the
same new tokens, drawn from the logits of all of them, and move on together. They are codes: no text is written here,
for which a model may need ``models.references.Seen``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from magma_jax.inference.decoding.sampling import SamplingRows, sample
from magma_jax.inference.decoding.streams import (
    Given,
    ModelBeside,
    StreamRows,
    StreamRules,
    Walk,
    activations_of,
    allowed_ids,
    combined,
    read_place,
    walked,
)
from magma_jax.models.references import Places, References
from magma_jax.nn.modules import Definition, merge
from magma_jax.nn.transformer.cache import KVCache
from magma_jax.runtime.compile import platform_jit
from magma_jax.typing import Array, Float, Int, Params


class SlotRows(NamedTuple):
    """What is asked for in slots, (R, ...) each; all slots of a request have the same.

    Attributes:
        keys: (R, 2) data of the random keys.
        sampling: sampling parameters.
        asked: see ``StreamRows``.
        streams: (R, 3) slots of the request's streams; the last one again where there are fewer.
    """

    keys: Array
    sampling: SamplingRows
    asked: StreamRows
    streams: Array


class Slots(NamedTuple):
    """State of all slots.

    Attributes:
        cache: their cache.
        logits: (R, V) of the next token, fp32.
        position: (R,) of the newest token.
        walk: how far they are.
        rows: what is asked for.
        references: retrieved images beside them, for a model that takes these.
    """

    cache: KVCache
    logits: Array
    position: Array
    walk: Walk
    rows: SlotRows
    references: References | None


class Admission(NamedTuple):
    """Prompts of A slots, without the part that their caches hold; a slot that does not exist is ignored.

    Attributes:
        slot: (A,) slots.
        start: (A,) positions that the cache holds.
        length: (A,) new positions.
        tokens: (A, S) ids, right-padded.
        places: of the tokens, for a model that reads them.
        rows: what is asked for.
        references: beside them.
    """

    slot: Array
    start: Array
    length: Array
    tokens: Array
    places: Places
    rows: SlotRows
    references: References | None


@platform_jit(static_argnames=("graphdef", "count", "context"))
def empty_slots(
    graphdef: Definition, params: Params, rows: SlotRows, references: References | None, *, count: int, context: int
) -> Slots:
    """Idle slots of ``context`` positions; ``rows`` and ``references`` are zeros."""
    lm = merge(graphdef, params)
    zeros = jnp.zeros(count, jnp.int32)
    return Slots(
        cache=lm.init_cache(count, context, activations_of(lm)),
        logits=jnp.zeros((count, lm.wte.weight[...].shape[0]), jnp.float32),
        position=zeros,
        walk=Walk(zeros, zeros, zeros, jnp.zeros(count, bool), jnp.ones(count, bool)),
        rows=rows,
        references=references,
    )


@platform_jit(static_argnames=("graphdef", "rules"), donate_argnames=("slots",))
def admit(graphdef: Definition, params: Params, slots: Slots, new: Admission, *, rules: StreamRules) -> Slots:
    """Runs prompts in the caches of their slots."""
    lm = merge(graphdef, params)
    model = ModelBeside(lm, Given(new.references, new.places), rules.image_tokens, activations_of(lm))
    positions = new.start[:, None] + jnp.arange(new.tokens.shape[1])
    embedded = model.embed(new.tokens, new.places)
    output = lm(embedded, positions=positions, cache=slots.cache, cache_rows=new.slot)
    last = jnp.take_along_axis(output.hidden, (new.length - 1)[:, None, None], axis=1)[:, 0]
    asked, zeros = new.rows.asked, jnp.zeros_like(new.slot)
    mine = slots._replace(
        cache=None,
        logits=model.logits(model.after(asked.place, asked.left), last).astype(jnp.float32),
        position=new.start + new.length - 1,
        walk=Walk(asked.place, asked.left, zeros, jnp.zeros_like(new.slot, bool), asked.limit < 1),
        rows=new.rows,
        references=new.references,
    )
    others = jax.tree.map(lambda all_, one: all_.at[new.slot].set(one, mode="drop"), slots._replace(cache=None), mine)
    return others._replace(cache=output.cache)


@platform_jit(static_argnames=("graphdef", "rules", "steps"), donate_argnames=("slots",))
def burst(
    graphdef: Definition, params: Params, slots: Slots, *, rules: StreamRules, steps: int
) -> tuple[Slots, Int[Array, "R N"], Float[Array, "R N"]]:
    """Draws up to ``steps`` tokens in every slot; also their ids and log-probabilities under the first stream.

    The burst ends early when all are done. A slot's first tokens are valid, as many as its ``walk.count`` grew by.
    """
    lm = merge(graphdef, params)
    count = slots.position.shape[0]
    drawn = jnp.zeros((count, steps), jnp.int32), jnp.zeros((count, steps))

    def going(carry):
        step, slots, _ = carry
        return (step < steps) & ~slots.walk.done.all()

    def body(carry):
        step, slots, (ids, logprobs) = carry
        walk, asked = slots.walk, slots.rows.asked
        token, logprob = _draw(slots, rules)
        ids, logprobs = ids.at[:, step].set(token), logprobs.at[:, step].set(logprob)
        after = walked(walk, token, asked, rules)
        position = jnp.where(walk.done, slots.position, slots.position + 1)
        read = read_place(token, after.left, rules)
        model = ModelBeside(lm, Given(slots.references, Places(read, read)), rules.image_tokens, activations_of(lm))
        next_ = model.after(after.place, after.left)
        embedded = model.embed(token[:, None], Places(read[:, None], next_[:, None]))
        output = lm(embedded, positions=position[:, None], cache=slots.cache)
        logits = model.logits(next_, output.hidden[:, 0]).astype(jnp.float32)
        slots = slots._replace(cache=output.cache, logits=logits, position=position, walk=after)
        return step + 1, slots, (ids, logprobs)

    _, slots, (ids, logprobs) = jax.lax.while_loop(going, body, (jnp.int32(0), slots, drawn))
    return slots, ids, logprobs


def _draw(slots: Slots, rules: StreamRules) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """The next token of every slot, the same in all slots of a request, and its log-probability.

    Guidance by a prompt alone is that of an edit whose last two streams are the same.
    """
    walk, rows = slots.walk, slots.rows
    parts = [slots.logits[rows.streams[:, i]] for i in range(3)]
    allowed = allowed_ids(rules, rows.asked, walk.place, walk.count, slots.logits.shape[-1])
    drawable = combined(parts, allowed, walk, rows.asked, rules)
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rows.keys), walk.count)
    token = sample(drawable, keys, rows.sampling).astype(jnp.int32)
    token = token[rows.streams[:, 0]]
    return token, jnp.take_along_axis(jax.nn.log_softmax(parts[0]), token[:, None], axis=1)[:, 0]


@platform_jit(donate_argnames=("slots",))
def copy_cache(slots: Slots, source: Int[Array, ""], target: Int[Array, ""]) -> Slots:
    """Copies the cache of one slot to another, for prompts with a common beginning."""

    def copied(leaf: Array) -> Array:
        return leaf.at[..., target, :, :, :].set(leaf[..., source, :, :, :])

    return slots._replace(cache=jax.tree.map(copied, slots.cache))


@platform_jit(donate_argnames=("slots",))
def release(slots: Slots, which: Array) -> Slots:
    """Makes slots idle."""
    return slots._replace(walk=slots.walk._replace(done=slots.walk.done | which))
