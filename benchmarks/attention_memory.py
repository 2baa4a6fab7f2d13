"""Temporaries of the training step of one transformer block, with fused and with plain attention, as JSON.

    PYTHONPATH=. python benchmarks/attention_memory.py --topology v5p:1x1x1 --topology v6e:1x1

By default a block of CM3Leon-7B's width, one sequence, bf16, full rematerialisation, compiled ahead of time without the
device. Plain attention stores (H, S, S) scores; the temporaries of the fused forms should grow linearly.
"""

import argparse
import json
import sys
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.nn import attention
from magma_jax.nn.modules import abstract, merge
from magma_jax.nn.transformer.config import BlockConfig, TrunkConfig
from magma_jax.nn.transformer.trunk import Trunk
from magma_jax.plan.chips import open_topology
from magma_jax.runtime.compile import compiler_options
from magma_jax.runtime.sharding import traced_for

GIB = 2**30


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--topology", action="append", help="may be repeated; default: v5p:1x1x1")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens of a sequence")
    parser.add_argument("--width", type=int, default=4096, help="default %(default)s")
    parser.add_argument("--heads", type=int, default=32, help="default %(default)s")
    arguments = parser.parse_args()
    config = BlockConfig(
        width=arguments.width, heads=arguments.heads, feed_forward=4 * arguments.width, dtype="bfloat16"
    )
    for name in arguments.topology or ["v5p:1x1x1"]:
        device = open_topology(name).devices[0]
        for length in arguments.lengths:
            row: dict[str, Any] = {"topology": name, "tokens": length}
            for form in ("plain", "fused"):
                row[f"{form}_temporaries_gib"] = round(_temporaries(config, length, device, form) / GIB, 3)
            print(json.dumps(row), flush=True)
    return 0


def _temporaries(config: BlockConfig, length: int, device: Any, form: str) -> int:
    """Bytes of temporaries for the gradient of one block."""
    graphdef, shapes, _ = abstract(lambda: Trunk(TrunkConfig(block=config, layers=1), rngs=nnx.Rngs(0)))
    on_device = jax.sharding.SingleDeviceSharding(device)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return merge(graphdef, params)(x, remat="full").hidden.astype(jnp.float32).sum()

    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_device)  # noqa: E731
    x = jax.ShapeDtypeStruct((1, length, config.width), jnp.bfloat16, sharding=on_device)
    never = dict.fromkeys(attention.FROM_QUERIES, sys.maxsize)
    with traced_for(device.platform), mock.patch.dict(attention.FROM_QUERIES, never if form == "plain" else {}):
        step = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=compiler_options(device.platform))
        compiled = step.lower(jax.tree.map(place, dict(shapes)), x).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


if __name__ == "__main__":
    sys.exit(main())
