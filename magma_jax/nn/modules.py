"""Modules as plain data: the types of variables, and a module as (definition, flat dict of arrays).

The type of a parameter names its ``role``, which decides how it learns (``training.step.optim``). A family with
parameters of another role defines its own type for them. Weight decay skips variables created with ``decay=False``,
such as biases and norm weights.

Everything outside ``nn`` and ``models`` handles parameters as one flat dict ``{path: array}`` with paths such as
``"lm/layers/attn/q_proj/weight"``. Such a dict is an ordinary pytree for ``jax.grad``, ``optax`` and Orbax, and the
tables of sharding, optimizer and conversion match on its keys.

``merge`` rebuilds a module, inside or outside a trace. Modules are never mutated across a trace: to read running
averages that a forward pass updated, split the merged module again (see ``training.step.train_step``).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from magma_jax.typing import Params


class LanguageParam(nnx.Param):
    """Weight of the language model; frozen unless a config trains the language model itself."""

    role = "language"


class EncoderParam(nnx.Param):
    """Weight of the image encoder (the paper trains it at its own, lower rate)."""

    role = "encoder"


class PrefixParam(nnx.Param):
    """Weight of the image prefix."""

    role = "prefix"


class AdapterParam(nnx.Param):
    """Weight of an adapter in the language model."""

    role = "adapter"


class HeadParam(nnx.Param):
    """Weight of a classification head."""

    role = "head"


class TokenizerParam(nnx.Param):
    """Weight of an image tokenizer, such as a VQ-GAN; frozen in the models that read its codes."""

    role = "tokenizer"


class DiscriminatorParam(nnx.Param):
    """Weight of a discriminator, which only training uses."""

    role = "discriminator"


class PerceptualParam(nnx.Param):
    """Weight of a network whose features a loss compares; always frozen."""

    role = "perceptual"


class Statistic(nnx.BatchStat):
    """Running average of a BatchNorm: no gradient, updated by the forward pass in batch mode."""


class Definition:
    """A module without its arrays, as a static argument of ``jax.jit``.

    The hash is cached; ``nnx.GraphDef`` computes its own at every call, which takes milliseconds.
    """

    def __init__(self, graphdef: nnx.GraphDef):
        self.graphdef = graphdef

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.graphdef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Definition) and hash(self) == hash(other) and self.graphdef == other.graphdef


def split(module: nnx.Module) -> tuple[Definition, Params]:
    """Splits a module into its definition and a flat dict of its arrays.

    Also accepts modules created under ``nnx.eval_shape``; the leaves are then ``jax.ShapeDtypeStruct``.
    """
    graphdef, state = nnx.split(module)
    return Definition(graphdef), {path: variable.get_value() for path, variable in _variables(state)}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from a flat dict keyed by path."""
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested


def merge(definition: Definition, *params: Mapping[str, Any]) -> Any:
    """Rebuilds a module that was ``split``, from flat dicts that together hold every path."""
    flat = {path: value for part in params for path, value in part.items()}
    return nnx.merge(definition.graphdef, _with_numbers(nest(flat)))


def _with_numbers(nested: Mapping[str, Any]) -> dict[str | int, Any]:
    """Members of lists under their numbers: Flax takes leaves in the order of their keys, where "10" is before "2"."""
    return {
        int(name) if name.isdecimal() else name: _with_numbers(value) if isinstance(value, Mapping) else value
        for name, value in nested.items()
    }


def variable_types(module: nnx.Module) -> dict[str, type[nnx.Variable]]:
    """Returns the variable type of every path of ``split``."""
    return {path: type(variable) for path, variable in _variables(nnx.state(module))}


def roles_of(kind: type) -> set[str]:
    """Roles of a variable type: its own, or those of its bases."""
    if "role" in vars(kind):
        return {vars(kind)["role"]}
    return set().union(*(roles_of(base) for base in kind.__bases__))


def spared_by_decay(module: nnx.Module) -> frozenset[str]:
    """Paths of the variables that weight decay skips."""
    return frozenset(
        path for path, variable in _variables(nnx.state(module)) if not variable.get_metadata("decay", True)
    )


def abstract(create: Callable[[], nnx.Module]) -> tuple[Definition, Params, dict[str, type[nnx.Variable]]]:
    """Definition, shapes and dtypes by path, and variable types by path of a module; allocates no arrays."""
    module = nnx.eval_shape(create)
    definition, shapes = split(module)
    return definition, shapes, variable_types(module)


def parameter_count(params: Mapping[str, Any]) -> int:
    """Number of scalars in a flat dict of arrays or shapes."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(dict(params)))


def _variables(state: Any) -> list[tuple[str, nnx.Variable]]:
    return [("/".join(map(str, path)), variable) for path, variable in nnx.to_flat_state(state)]
