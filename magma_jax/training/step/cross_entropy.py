"""Next-token cross-entropy that never holds the logits of a whole batch.

With V = 50,400 the fp32 logits of 256 rows of 112 positions are 5.8 GB, and a plain backward pass holds them twice.
Here a loop over chunks of the sequence computes logits, loss and the gradient with respect to the hidden states
together, and keeps only the gradient, which is as large as the hidden states. The head is multiplied as often as in the
plain form: the backward pass recomputes nothing.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from magma_jax.typing import IGNORED, Array, Float, Int

# Limit of fp32 logits per device at a time. Each chunk reads the head's weights again, and gathers them if they are
# sharded over fsdp. On a v5e reading them takes as long as computing with 240 positions; 128 MiB are 665 positions of
# GPT-J's vocabulary. On a CPU 32 MiB, 128 MiB and no chunking take equally long.
LOGIT_BYTES = 128 * 2**20

# Hidden states to fp32 logits; values it closes over may be differentiated.
Project = Callable[[Float[Array, "B S D"]], Float[Array, "B S V"]]


def cross_entropy(
    project: Project,
    hidden: Float[Array, "B S D"],
    labels: Int[Array, "B S"],
    *,
    label_smoothing: float = 0.0,
    logit_bytes: int = LOGIT_BYTES,
) -> tuple[Float[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """Sum of the loss over the labels that are not ``IGNORED``, their number, and how many of them are predicted.

    Sums let devices and accumulation steps form one token-weighted mean instead of a mean of means. A label counts as
    predicted if no token is more likely. Derivatives are first-order and reverse-mode, with respect to ``hidden`` and
    to the differentiated variables of ``project``: a frozen head gets no gradient and costs none.

    Args:
        project: hidden states to fp32 logits, of any chunk of the sequence.
        hidden: final hidden states.
        labels: the token to predict from each of them.
        label_smoothing: share of the target probability that is spread evenly over all tokens, the label included.
        logit_bytes: limit of the logits per device at a time; a chunk has at least one position of each row.
    """
    loss, count, predicted, _ = _by_chunks(project, hidden, labels, label_smoothing, logit_bytes, each=False)
    return loss, count, predicted


def cross_entropy_of_each(
    project: Project,
    hidden: Float[Array, "B S D"],
    labels: Int[Array, "B S"],
    *,
    logit_bytes: int = LOGIT_BYTES,
) -> tuple[Float[Array, ""], Int[Array, ""], Int[Array, ""], Float[Array, "B S"]]:
    """The results of ``cross_entropy``, and the loss of every label, 0 for those that are ``IGNORED``.

    Only the sum has derivatives; the losses of labels are for sums over parts of them that are logged.
    """
    loss, count, predicted, losses = _by_chunks(project, hidden, labels, 0.0, logit_bytes, each=True)
    return loss, count, predicted, jax.lax.stop_gradient(losses)


def stretches_of(project: Project, hidden: Float[Array, "B S D"], logit_bytes: int = LOGIT_BYTES) -> tuple[int, int]:
    """Number and positions of the chunks whose logits keep within ``logit_bytes`` per device."""
    batch, length, _ = hidden.shape
    size = jax.eval_shape(project, hidden).shape[-1] * batch * 4 / _devices(hidden)
    stretches = -(-length // max(1, int(logit_bytes / size)))
    return stretches, -(-length // stretches)


def _by_chunks(
    project: Project, hidden: Array, labels: Array, smoothing: float, logit_bytes: int, *, each: bool
) -> tuple[Any, ...]:
    batch, length, width = hidden.shape
    stretches, stretch = stretches_of(project, hidden, logit_bytes)
    padding = stretches * stretch - length
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    padded = jnp.pad(labels, ((0, 0), (0, padding)), constant_values=IGNORED)
    # Every chunk keeps all rows, which are sharded over devices.
    hidden = hidden.reshape(batch, stretches, stretch, width).swapaxes(0, 1)
    padded = padded.reshape(batch, stretches, stretch).swapaxes(0, 1)
    converted: Any = jax.closure_convert(project, hidden[0])
    project, weights = converted
    # The decorator hides the return type.
    loss, predicted, losses = cast(
        tuple[Array, Array, Array | None], _summed(project, smoothing, each, hidden, padded, *weights)
    )
    if losses is not None:
        losses = losses.swapaxes(0, 1).reshape(batch, -1)[:, :length]
    return loss, jnp.sum(labels != IGNORED), predicted, losses


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _summed(project, smoothing, each, hidden, labels, *weights):
    """Loss and number of predicted labels, summed over chunks (N, B, S, D), and with ``each`` the losses (N, B, S)."""

    def body(sums, inputs):
        hidden, labels = inputs
        losses, predicted, _ = _losses(project(hidden, *weights), labels, smoothing)
        return (sums[0] + losses.sum(), sums[1] + predicted), losses if each else None

    start = (jnp.zeros(()), jnp.zeros((), jnp.int32))
    (loss, predicted), losses = jax.lax.scan(body, start, (hidden, labels))
    return loss, predicted, losses


def _forward(project, smoothing, each, hidden, labels, *weights):
    values = dict(enumerate(weight.value for weight in weights))
    learned = {i: values[i] for i, weight in enumerate(weights) if weight.perturbed}

    def body(carry, inputs):
        loss, predicted, gradients = carry
        hidden, labels = inputs
        logits, pullback = jax.vjp(lambda h, w: project(h, *(values | w).values()), hidden, learned)
        losses, new_predicted, logits_gradient = _losses(logits, labels, smoothing)
        hidden_gradient, new = pullback(logits_gradient)
        gradients = jax.tree.map(jnp.add, gradients, new)
        carry = loss + losses.sum(), predicted + new_predicted, gradients
        return carry, (hidden_gradient, losses if each else None)

    start = (jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, learned))
    (loss, predicted, gradients), (hidden_gradient, losses) = jax.lax.scan(body, start, (hidden.value, labels.value))
    return (loss, predicted, losses), (hidden_gradient, [gradients.get(i) for i in values])


def _backward(project, smoothing, each, gradients, cotangents):
    del project, smoothing, each
    scale, _, _ = cotangents  # the number of predicted labels and the losses of labels have no derivative
    hidden, weights = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)
    return hidden, None, *weights


_summed.defvjp(_forward, _backward, symbolic_zeros=True)


def _losses(logits, labels, smoothing):
    """Losses of labels, number of predicted ones, and the gradient of the losses' sum with respect to the logits."""
    counted = labels != IGNORED
    labels = jnp.where(counted, labels, 0)[..., None]
    largest = logits.max(-1)
    log_total = largest + jnp.log(jnp.exp(logits - largest[..., None]).sum(-1))
    label_logit = jnp.take_along_axis(logits, labels, -1)[..., 0]
    target_logit = label_logit
    if smoothing:
        target_logit = (1 - smoothing) * label_logit + smoothing * logits.mean(-1)
    losses = jnp.where(counted, log_total - target_logit, 0)
    # Recomputed, since keeping the exponentials above would take as much memory as the logits.
    probability = jnp.exp(logits - log_total[..., None])
    target = jnp.arange(logits.shape[-1]) == labels
    if smoothing:
        target = (1 - smoothing) * target + smoothing / logits.shape[-1]
    gradient = jnp.where(counted[..., None], probability - target, 0)
    return losses, jnp.sum(counted & (label_logit >= largest)), gradient


def _devices(array: Array) -> int:
    """Number of devices of an array's mesh inside ``jax.jit``, taken from its type; 1 without a mesh."""
    return jax.typeof(array).sharding.mesh.size or 1
