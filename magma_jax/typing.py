"""Array types and shape letters.

The same letters everywhere: B batch, S sequence (queries), T sequence (keys, the cache), P image positions,
D width, H heads, K head size, F feed-forward, V vocabulary, L layers, C channels. Annotations such as
``Float[Array, "B S D"]`` are documentation in normal use and are checked at run time in the tests.
"""

from typing import TypeAlias

from jax import Array
from jaxtyping import Bool, Float, Int, Key, Shaped, UInt8, UInt32

PRNGKey: TypeAlias = Key[Array, ""]
PyTree: TypeAlias = object

__all__ = ["Array", "Bool", "Float", "Int", "Key", "PRNGKey", "PyTree", "Shaped", "UInt8", "UInt32"]
