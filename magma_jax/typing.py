"""Array types and shape letters.

Shape letters: B batch, S sequence (queries), T sequence (keys, the cache), P image positions,
D width, H heads, K head size, F feed-forward, V vocabulary, L layers, C channels. Annotations such as
``Float[Array, "B S D"]`` are documentation in normal use and checked at run time in the tests.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

from jaxtyping import Bool, Float, Int, Key, Shaped, UInt8, UInt32

if TYPE_CHECKING:
    from jax import Array

    PRNGKey: TypeAlias = Key[Array, ""]

PyTree: TypeAlias = object
# Parameters by path, such as "lm/layers/attn/q_proj/weight"; see ``nn.modules``.
Params: TypeAlias = dict[str, Any]

# Label of positions without loss (PyTorch's convention, which the original follows).
IGNORED = -100

__all__ = [
    "IGNORED",
    "Array",
    "Bool",
    "Float",
    "Int",
    "Key",
    "PRNGKey",
    "Params",
    "PyTree",
    "Shaped",
    "UInt8",
    "UInt32",
]


def __getattr__(name: str) -> Any:
    # JAX is imported on first access; scoring prediction files, for one, does not need it.
    if name not in ("Array", "PRNGKey"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import jax

    return jax.Array if name == "Array" else Key[jax.Array, ""]
