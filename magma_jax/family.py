"""Interface of a model family: a record of plain functions.

Training, inference and evaluation receive this record and know no family by name. The records are in
``magma_jax.families``, the only package that may import all of these packages.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

# Row of a sharding table (``runtime.sharding``): a path pattern, and a mesh axis for each trailing dimension.
ShardingRow = tuple[str, tuple[Any, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Functions and config classes of a model family.

    Attributes:
        name: name in messages.
        configs: model config dataclasses, discriminated by ``kind``.
        data: data config dataclasses, discriminated by ``kind``, see ``data.datasets``.
        options: dataclass of the loss options, see ``training.step.options``.
        recognises: whether tensors of these names are a published checkpoint of the family.
        build: ``(config, rngs)`` to the model, an ``nnx.Module``.
        roles: model config to the model's parameter roles (``nn.modules``), each with its default optimizer group, see
            ``training.step.optim``.
        complete: run config to the run config with fields derived from the model filled in; ValueError on a misfit.
        loss: ``(model, batch, key, *, options)`` to the loss terms, see ``training.step.terms``; ``key=None`` disables
            dropout.
        shardings: sharding rows of the family's own parameters, in addition to the shared ones.
        vocab_rows: model config to the number of token ids that the model embeds.
        batch_shapes: ``(program)`` to names, shapes and dtypes of the longest batch of a run.
        count: ``(batch, pad_id)`` to the samples and tokens of a host batch.
        flops: ``(config, shapes, labels, batch, options)`` to the operations of a step
            (``training.step.flops.StepFlops``); ``batch`` holds the shape of every array of the global batch,
            ``options`` are those of the loss.
        prepare: ``(program, dataset, params)`` to a function from a dataset's batch to the loss's batch.
        first_values: ``(program, dataset, params)`` to parameters computed from data before the first step.
        fresh: path pattern of parameters that published weights of a part lack, such as adapters.
        base_may_differ: config of a run's starting model, as nested dicts, to the dotted names of the fields in which
            the run's own config may differ.
        parts: path prefix to a loader of published weights for the parameters below it: ``(path, config)`` to a
            context of arrays by path and the files they are read from.
        open: ``(path, *, dtype, mesh, ema)`` to a model ready for inference (``inference.generator.Generator``).
        decode_program: ``(program, rows, slots)`` to a jitted decoding step and its argument shapes, for plans;
            ``slots=None`` means the context length. None for a family that does not decode.
        decodes: what a decoding step yields for each row.
        token_generator: whether ``open`` returns a ``TokenGenerator``, if the model decodes token by token.
        panel: ``(run, writing)`` to the sample display of a training run, or None.
        evaluate: ``(workdir, split, limit, settings, *, ema)``: evaluates a run with figures of the family's own,
            prints them and writes their files. None for those of ``evaluation.own_split``.
    """

    name: str
    configs: tuple[type, ...]
    data: tuple[type, ...]
    options: type
    recognises: Callable[[Collection[str]], bool]
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
    token_generator: bool = True
    decodes: str = "tokens"
    evaluate: Callable[..., Any] | None = None
