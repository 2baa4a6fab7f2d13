"""A model family, as far as the rest of the house must know one: a record of plain functions.

Training, inference and evaluation know no family by name; they are given its record. The records stand in
``magma_jax.families``, the only package that may import all of these rooms.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

# A row of a sharding table, see ``runtime.sharding``: a pattern of paths, and an axis for each of the last dimensions.
ShardingRow = tuple[str, tuple[Any, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What the house asks of a family.

    Attributes:
        name: in messages.
        configs: dataclasses of its models, told apart by their ``kind``.
        data: dataclasses of the data that it learns from, told apart by their ``kind``, see ``data.datasets``.
        options: dataclass of the options of its loss, see ``training.step.options``.
        build: ``(config, rngs)`` to the model, an ``nnx.Module``.
        roles: config to the roles of the model's parameters (``nn.modules``), and the group in which each learns where
            a run names none, see ``training.step.optim``.
        complete: run config to the run config with what follows from the model; ValueError where they do not fit.
        loss: ``(model, batch, key, *, options)`` to the terms of the loss, see ``training.step.terms``; ``key=None``
            means no dropout.
        shardings: rows for its own parameters, beside those that all families share.
        vocab_rows: config to the number of token ids that the model embeds.
        batch_shapes: ``(program)`` to names, shapes and dtypes of the longest batch of a run.
        count: ``(batch, pad_id)`` to the samples and tokens of a batch on the host.
        flops: ``(config, shapes, labels, batch)`` to the operations of a step (``training.step.flops.StepFlops``);
            ``batch`` has the shape of every array of the whole batch.
        prepare: ``(program, dataset, params)`` to a function that fits a batch of the dataset to the loss.
        first_values: ``(program, dataset, params)`` to parameters that are computed from data before the first step.
        fresh: pattern of the paths that published weights of a part do not hold, such as those of adapters.
        base_may_differ: config of the model that a run starts from, as nested dicts, to the dotted names of the fields
            that may be otherwise in the run's own.
        parts: path prefix to what opens published weights for the parameters below it: ``(path, config)`` to a
            context of their arrays by path and the files these are read from.
        open: ``(path, *, dtype, mesh, ema)`` to a model that is ready for use (``inference.generator.Generator``).
        decode_program: ``(program, rows, slots)`` to one step of decoding, jitted, and the shapes of its arguments, for
            plans; ``slots=None`` for the context. None for a family that does not decode token by token.
        panel: ``(run, writing)`` to what shows samples while the run learns; None where there is nothing to show.
    """

    name: str
    configs: tuple[type, ...]
    data: tuple[type, ...]
    options: type
    build: Callable[[Any, Any], Any]
    roles: Callable[[Any], Mapping[str, Any]]
    complete: Callable[[Any], Any]
    loss: Callable[..., Mapping[str, Any]]
    shardings: tuple[ShardingRow, ...]
    vocab_rows: Callable[[Any], int]
    batch_shapes: Callable[[Any], dict[str, tuple[tuple[int, ...], Any]]]
    count: Callable[[Mapping[str, Any], int], tuple[int, int]]
    flops: Callable[..., Any]
    prepare: Callable[..., Callable[[dict[str, Any]], dict[str, Any]]]
    first_values: Callable[..., dict[str, Any]]
    fresh: str
    base_may_differ: Callable[[Mapping[str, Any]], Sequence[str]]
    parts: Mapping[str, Callable[[Any, Any], AbstractContextManager[tuple[Mapping[str, Any], tuple[Any, ...]]]]]
    open: Callable[..., Any]
    decode_program: Callable[[Any, int, int | None], tuple[Any, tuple[Any, ...]]] | None
    panel: Callable[..., Any] | None
