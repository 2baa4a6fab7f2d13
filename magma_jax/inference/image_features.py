"""Features of many images, computed in batches."""

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from magma_jax.models.vision.catalog import normalize_for
from magma_jax.nn.modules import Definition, merge
from magma_jax.runtime.distributed import is_main
from magma_jax.runtime.sharding import batch_shards, local_rows, place_batch, replicated
from magma_jax.storage.deferred import read_array
from magma_jax.typing import Array, Float, Params, UInt8

ENCODER = "image_prefix/encoder/"


@runtime_checkable
class Images(Protocol):
    """Images that need not be in memory; an array is the simplest case."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray:
        """The images of the given rows, uint8 (N, H, W, 3)."""
        ...


def encode_all(
    images: UInt8[np.ndarray, "N H W 3"] | Images,
    graphdef: Definition,
    params: Params,
    mesh: Mesh | None = None,
    batch_size: int = 64,
    *,
    progress: bool = True,
) -> Float[np.ndarray, "N ..."]:
    """Features of every image, with a progress bar; a ``mesh`` shares the work among its devices and processes."""
    encoder = {path: _on_devices(leaf) for path, leaf in params.items() if path.startswith(ENCODER)}
    # The module needs only the shapes of the other parameters.
    rest = tuple((p, jax.ShapeDtypeStruct(x.shape, x.dtype)) for p, x in params.items() if not p.startswith(ENCODER))
    config = merge(graphdef, dict(rest), encoder).config.encoder
    if mesh is None:
        rows, out = list(range(batch_size)), None
    else:
        batch_size = -(-batch_size // batch_shards(mesh)) * batch_shards(mesh)
        rows, out = local_rows(mesh, batch_size), replicated(mesh)
    parts = []
    quiet = None if progress and is_main() else True  # None: a bar on a terminal, nothing elsewhere
    for start in tqdm(range(0, len(images), batch_size), desc="encoding images", unit="batch", disable=quiet):
        # The last batch is padded with its last image, so that one program serves all batches.
        chosen = np.minimum(np.arange(start, start + batch_size), len(images) - 1)
        pixels: dict[str, Any] = {"images": normalize_for(config, images[chosen[rows]])}
        if mesh is not None:
            pixels = place_batch(pixels, mesh, batch_size)
        parts.append(np.asarray(_encode(graphdef, rest, encoder, pixels["images"], out=out)))
    return np.concatenate(parts)[: len(images)]


@functools.partial(jax.jit, static_argnames=("graphdef", "rest", "out"))
def _encode(
    graphdef: Definition,
    rest: tuple[tuple[str, jax.ShapeDtypeStruct], ...],
    encoder: Params,
    images: Float[Array, "B H W 3"],
    *,
    out: NamedSharding | None,
) -> Float[Array, "B ..."]:
    features = merge(graphdef, dict(rest), encoder).encode_images(images)
    return features if out is None else jax.lax.with_sharding_constraint(features, out)


def _on_devices(leaf: Any) -> Array:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(read_array(leaf))
