"""Array types and shape letters.

The same letters everywhere: B batch, S sequence (queries), T sequence (keys, the cache), P image positions,
D width, H heads, K head size, F feed-forward, V vocabulary, L layers, C channels. Annotations such as
``Float[Array, "B S D"]`` are documentation in normal use and are checked at run time in the tests.
"""

from typing import Any, TypeAlias

from jax import Array
from jaxtyping import Bool, Float, Int, Key, Shaped, UInt8

PRNGKey: TypeAlias = Key[Array, ""]
PyTree: TypeAlias = object
# Parameters by path, such as "lm/layers/attn/q_proj/weight"; see ``nn.modules``.
Params: TypeAlias = dict[str, Any]

# Label of positions that carry no loss (PyTorch's convention, which the original's labels follow).
IGNORED = -100

__all__ = ["IGNORED", "Array", "Bool", "Float", "Int", "Key", "PRNGKey", "Params", "PyTree", "Shaped", "UInt8"]
