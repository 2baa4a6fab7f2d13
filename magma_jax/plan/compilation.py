"""The real programs of a run, compiled for devices that are not there: shapes go in, no array is made."""

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
        """Sum of all parts."""
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


def compile_decode(program: Program, rows: int, slots: int | None = None) -> Compiled:
    """Compiles one decoding step of ``rows`` rows with ``slots`` places in the cache each (None: the context).

    Raises:
        ConfigError: a family that does not decode token by token.
    """
    family = program.family
    if family.decode_program is None:
        raise ConfigError(f"a {family.name} model does not decode token by token; plan its training (--what train)")
    function, arguments = family.decode_program(program, rows, slots)
    return _compile(function, *arguments)


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
