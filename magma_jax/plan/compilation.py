"""Ahead-of-time compilation of a run's actual programs, from shapes, without allocating arrays."""

import dataclasses
import time
from typing import Any

import jax

from magma_jax.config import ConfigError
from magma_jax.runtime.sharding import batch_sharding, replicated
from magma_jax.training.run.program import Program


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
        arguments: arguments of the program.
        outputs: its outputs, without those that reuse donated arguments.
        temporaries: its temporaries.
        code: the program itself.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
        memory: its memory; None if it does not fit.
        refusal: the compiler's message if it does not fit.
        text: HLO text of the program; empty if it does not fit.
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


def compile_decode(program: Program, rows: int, slots: int | None = None) -> Compiled:
    """Compiles one decoding step of ``rows`` rows with ``slots`` cache slots each (None: the context).

    Raises:
        ConfigError: the family does not decode, or has no cache that ``slots`` could set.
    """
    family = program.family
    if family.decode_program is None:
        raise ConfigError(f"a {family.name} model does not decode; plan its training (--what train)")
    function, arguments = family.decode_program(program, rows, slots)
    return _compile(function, *arguments)


def batch_structs(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a run's longest batch."""
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
