"""Writes a random MAGMA checkpoint with the keys, shapes and dtypes of the published one, to try a conversion on.

python scripts/make_full_size_checkpoint.py /data/random.pt                # v2, fp16, 6.4 B parameters, 12.9 GB
python scripts/make_full_size_checkpoint.py /data/small.pt --layers 2      # 2 of 28 layers

No two tensors have equal values, and activations stay finite, so outputs can be compared.
"""

import argparse
import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.models.magma import MagmaConfig
from magma_jax.nn.adapters import AdapterConfig
from magma_jax.published.keymap import engine as keymap
from magma_jax.published.magma_keys import attention_buffers, magma_table
from magma_jax.published.open_magma import model_shapes
from magma_jax.storage.deferred import Deferred, Tensor, alias_key
from magma_jax.storage.model_folder import nbytes_of
from magma_jax.storage.progress import writing
from magma_jax.storage.torch.writer import write_torch_file

# Noise that every tensor takes its values from, each at a different offset.
NOISE_NUMBERS = 2**23


def main(path: Path, layers: int, width: int, seed: int) -> None:
    """Writes the checkpoint; layers of one model are read and written one at a time."""
    config = MagmaConfig(
        GPTJConfig(layers=layers, width=width, heads=max(1, width // 256), feed_forward=4 * width),
        mlp_adapter=AdapterConfig(downsample_factor=8),
        attn_adapter=AdapterConfig(downsample_factor=8),
    )
    normal = np.random.default_rng(seed).standard_normal(NOISE_NUMBERS, np.float32)

    @functools.lru_cache(maxsize=16)  # few kinds of tensors take most of the file
    def noise(spread: float, mean: float) -> np.ndarray:
        """The same numbers twice, so that every offset has enough values after it."""
        return np.tile((normal * np.float32(spread) + np.float32(mean)).astype(np.float16), 2)

    shapes = model_shapes(config)
    params = {name: _random(name, leaf, noise, number) for number, (name, leaf) in enumerate(shapes.items())}
    table = magma_table(config, attention_buffers(config, np.dtype(np.float16)))
    module = dict(sorted(keymap.to_theirs(table, params).items(), key=lambda item: _natural(item[0])))
    with writing(path, nbytes_of({alias_key(tensor): tensor for tensor in module.values()})) as progress:
        write_torch_file(path, {"module": module, "global_steps": 1}, progress)


def _random(path: str, leaf: Tensor, noise: Callable[[float, float], np.ndarray], number: int) -> Deferred:
    """One parameter, with a different offset for each layer."""
    if np.issubdtype(leaf.dtype, np.integer):
        return Deferred(leaf.shape, np.dtype(leaf.dtype), lambda: np.full(leaf.shape, number, leaf.dtype))
    half = np.dtype(np.float16)
    name = path.rsplit("/", 1)[-1]
    stacked = "/layers/" in path or "/rest/" in path
    inner = leaf.shape[1:] if stacked else leaf.shape
    is_scale = (name == "weight" and len(inner) == 1) or name == "running_var"
    fan_in = int(np.prod(inner[1:])) if len(inner) > 1 else 0
    spread = min(0.02 if path.startswith("lm/") else 1.0, fan_in**-0.5) if fan_in else 0.01

    def values(row: int) -> np.ndarray:
        # Odd factors give different offsets to a few thousand rows.
        start = (number * 7919 + row * 104729) % NOISE_NUMBERS
        scaled = noise(spread, float(is_scale))[start : start + NOISE_NUMBERS]
        return np.resize(scaled, inner)

    if not stacked:
        return Deferred(leaf.shape, half, lambda: values(0))
    rows = tuple(Deferred(inner, half, lambda row=row: values(row)) for row in range(leaf.shape[0]))
    return Deferred(leaf.shape, half, lambda: np.stack([row.read() for row in rows]), rows)


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Sorts layer by layer, with 2 before 10."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", key)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.path, options.layers, options.width, options.seed)
