"""Identical layers as one: created with ``vmap``, run with ``lax.scan``, so that 28 layers compile like one."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx

from magma_jax.nn.modules import Statistic, merge, split

Remat = Literal["none", "dots", "full"]

# none: keep every activation; dots: keep the results of weight matmuls, recompute the rest; full: recompute all.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stack(create: Callable[[nnx.Rngs], nnx.Module], length: int, rngs: nnx.Rngs) -> Any:
    """Creates ``length`` layers as one module whose every array has a leading axis of that length."""
    definition = None

    def one(key):
        nonlocal definition
        definition, params = split(create(nnx.Rngs(key)))
        return params

    params = jax.vmap(one)(jax.random.split(rngs.params(), length))
    return merge(definition, params)


def scan(
    layers: Any, body: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, xs: Any = None, *, remat: Remat
) -> tuple[Any, Any]:
    """Runs ``carry, y = body(layer, carry, x)`` over stacked layers; returns the last carry and the stacked ys.

    Running statistics that the layers update are written back to ``layers``.
    """
    definition, params = split(layers)

    def step(carry, inputs):
        params, x = inputs
        layer = merge(definition, params)
        carry, y = body(layer, carry, x)
        return carry, (y, _statistics(layer))

    if remat != "none":
        # The loop itself keeps XLA from merging the recomputation with the forward pass.
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=False)
    carry, (ys, statistics) = jax.lax.scan(step, carry, (params, xs))
    for path, variable in nnx.to_flat_state(nnx.state(layers, Statistic)):
        variable[...] = statistics["/".join(path)]
    return carry, ys


def _statistics(layer: nnx.Module) -> dict[str, Any]:
    state = nnx.to_flat_state(nnx.state(layer, Statistic))
    return {"/".join(path): variable.get_value() for path, variable in state}
