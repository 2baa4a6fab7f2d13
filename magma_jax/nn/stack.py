"""Stacks of identical layers: created with ``vmap``, run with ``lax.scan``, so that 28 layers compile as fast as one.

Layers may also be unstacked into separate arrays: a CPU copies each layer out of its stack before it is used, which
halves the speed of decoding.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.nn.modules import Statistic, abstract, merge, split
from magma_jax.typing import Params

Remat = Literal["none", "dots", "full"]

# none: keep all activations; dots: keep the results of weight matmuls, recompute the rest; full: recompute all.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stack(create: Callable[[nnx.Rngs], nnx.Module], length: int, rngs: nnx.Rngs) -> Any:
    """Creates ``length`` layers as one module whose arrays have a leading axis of that length."""
    definition, _, _ = abstract(lambda: create(nnx.Rngs(0)))
    keys = jax.random.split(rngs.params(), length)
    return merge(definition, jax.vmap(lambda key: split(create(nnx.Rngs(key)))[1])(keys))


def unstack(layers: Any, length: int) -> Any:
    """The ``length`` layers of a stack as a list of layers with separate arrays, at ``0/...``, ``1/...`` and so on."""
    definition, params = split(layers)
    return nnx.List([merge(definition, {path: leaf[i] for path, leaf in params.items()}) for i in range(length)])


def stack_params(params: Params, below: str) -> Params:
    """Parameters with the unstacked layers at ``BELOW0/...``, ``BELOW1/...`` and so on stacked, at ``BELOW...``."""
    rows: dict[str, dict[int, Any]] = {}
    others: Params = {}
    for path, leaf in params.items():
        number, slash, rest = path.removeprefix(below).partition("/")
        if path.startswith(below) and slash and number.isdecimal():
            rows.setdefault(f"{below}{rest}", {})[int(number)] = leaf
        else:
            others[path] = leaf
    return others | {path: jnp.stack([layers[i] for i in range(len(layers))]) for path, layers in rows.items()}


def scan(
    layers: Any, body: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, xs: Any = None, *, remat: Remat
) -> tuple[Any, Any]:
    """Runs ``carry, y = body(layer, carry, x)`` over layers; returns the last carry and the stacked ys.

    Running statistics that stacked layers update are written back to ``layers``. Unstacked layers are for inference
    and ignore ``remat``.
    """
    if isinstance(layers, nnx.List):
        ys = []
        for i, layer in enumerate(layers):
            carry, y = body(layer, carry, jax.tree.map(lambda leaf, i=i: leaf[i], xs))
            ys.append(y)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)
    definition, params = split(layers)

    def step(carry, inputs):
        params, x = inputs
        layer = merge(definition, params)
        carry, y = body(layer, carry, x)
        return carry, (y, _statistics(layer))

    if remat != "none":
        # The loop already keeps XLA from merging the recomputation with the forward pass.
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=False)
    carry, (ys, statistics) = jax.lax.scan(step, carry, (params, xs))
    _write_back(layers, statistics)
    return carry, ys


def remat_call(layer: Any, body: Callable[[Any, Any], Any], x: Any, *, remat: Remat) -> Any:
    """Runs ``body(layer, x)`` of a single layer under a remat policy; running statistics are written back."""
    definition, params = split(layer)

    def step(params, x):
        layer = merge(definition, params)
        y = body(layer, x)
        return y, _statistics(layer)

    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat])
    y, statistics = step(params, x)
    _write_back(layer, statistics)
    return y


def _write_back(module: nnx.Module, statistics: dict[str, Any]) -> None:
    for path, variable in nnx.to_flat_state(nnx.state(module, Statistic)):
        variable[...] = statistics["/".join(map(str, path))]


def _statistics(layer: nnx.Module) -> dict[str, Any]:
    state = nnx.to_flat_state(nnx.state(layer, Statistic))
    return {"/".join(map(str, path)): variable.get_value() for path, variable in state}
