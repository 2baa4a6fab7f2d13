"""The real programs of a run, compiled for devices that are not there: shapes go in, no array is made."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from magma_jax.config import ConfigError
from magma_jax.inference.decoding.decode import DecodeState, advance
from magma_jax.inference.decoding.sampling import SamplingRows
from magma_jax.nn.modules import merge
from magma_jax.nn.transformer.cache import KVCache
from magma_jax.runtime.sharding import BATCH_AXES, batch_sharding, replicated
from magma_jax.storage.model_folder import in_dtype
from magma_jax.training.run.program import Program


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
        arguments: what the program is given.
        outputs: what it returns, less what takes the place of arguments.
        temporaries: what it needs while it runs.
        code: the program itself.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
        memory: None if the compiler found no room for it.
        refusal: what the compiler said in that case.
        text: the program, empty in that case.
        seconds: wall time of tracing, lowering and compiling.
        cpu_seconds: time of all threads.
    """

    memory: Memory | None
    refusal: str
    text: str
    seconds: float
    cpu_seconds: float


def compile_step(program: Program) -> Compiled:
    """Compiles the training step that the loop runs."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(program.mesh))
    return _compile(program.step, program.state, program.frozen, batch_structs(program), key)


def compile_decode(program: Program, rows: int, slots: int) -> Compiled:
    """Compiles one decoding step of ``rows`` rows with ``slots`` places in the cache each.

    Rows lie over ``data`` and ``fsdp``, the cache's heads over ``model``.
    """
    config, mesh = program.config.model, program.mesh
    lm = program.family.language_model(config)
    by_rows = batch_sharding(mesh)
    by_heads = jax.NamedSharding(mesh, jax.P(None, BATCH_AXES, "model"))

    def row(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows,), dtype, sharding=by_rows)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    cache = (lm.layers, rows, lm.heads, slots, lm.width // lm.heads)
    state = DecodeState(
        cache=KVCache(*[jax.ShapeDtypeStruct(cache, _activations(config), sharding=by_heads)] * 2),
        token=row(jnp.int32),
        position=row(jnp.int32),
        count=row(jnp.int32),
        limit=row(jnp.int32),
        done=row(jnp.bool_),
        keys=jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=by_rows),
        sampling=SamplingRows(
            **{name: row(jnp.int32 if name == "top_k" else jnp.float32) for name in SamplingRows._fields}
        ),
        seen=None,
    )

    def decode(params, rows):
        model = merge(program.graphdef, params)
        return advance(program.family.language_model(model), rows, eos_id=lm.vocab_rows - 1)[0]

    out_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    params = in_dtype(program.params, _activations(config))  # as models are loaded for use
    return _compile(jax.jit(decode, donate_argnums=1, out_shardings=out_shardings), params, state)


def batch_structs(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """The longest batch of a run, on its devices."""
    sharding = batch_sharding(program.mesh)
    shapes = program.family.batch_shapes(program)
    return {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in shapes.items()}


def _compile(function: Any, *arguments: Any) -> Compiled:
    start, cpu = time.perf_counter(), time.process_time()
    memory, refusal, text = None, "", ""
    try:
        compiled = function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise ConfigError(f"the TPU compiler failed: {str(error).splitlines()[0]}") from None
        refusal = next((line.strip() for line in str(error).splitlines() if "Used" in line), str(error).splitlines()[0])
    else:
        stats = compiled.memory_analysis()
        outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
        code = stats.generated_code_size_in_bytes
        memory = Memory(stats.argument_size_in_bytes, outputs, stats.temp_size_in_bytes, code)
        text = compiled.as_text()
    return Compiled(memory, refusal, text, time.perf_counter() - start, time.process_time() - cpu)


def _activations(config: Any) -> Any:
    return jnp.dtype(config.dtype)
