"""The converter as an Apache Beam pipeline, for datasets that are too large for one machine.

One worker reads the annotations and cuts them into shards; any worker writes a shard with the same function as the
local converter, reading the images in place. So images never pass through the pipeline, the result is identical byte
for byte, and an interrupted conversion can be resumed. The images and the output folder must be on a disk that all
workers share.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from magma_jax.data.format.records import DataError, Record, Skipped
from magma_jax.data.write.conversion import ConvertOptions, chunks, write_folder
from magma_jax.data.write.prepare import PrepareOptions
from magma_jax.data.write.resumable_shards import read_report, written_shard
from magma_jax.output import replace_file

Shard = tuple[int, list[Record | Skipped]]


def convert_with_beam(
    read: Callable[[], Iterable[Record | Skipped]],
    out: str | Path,
    options: ConvertOptions = ConvertOptions(),
    *,
    source: Mapping[str, Any] | None = None,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """``data.write.conversion.convert`` on Beam's workers.

    Args:
        read: returns the records; runs on a worker.
        out: the dataset folder to write.
        options: see ``ConvertOptions``; ``workers`` is ignored.
        source: stored in ``info.json``.
        beam_options: ``KEY=VALUE``, such as ``runner=FlinkRunner``; default: Beam's local runner.

    Raises:
        DataError: Beam is not installed, or as of ``convert``.
    """
    return write_folder(
        Path(out).absolute(),
        options,
        dict(source or {}),
        functools.partial(_run_pipeline, read=read, options=options, beam_options=beam_options),
    )


def _run_pipeline(
    work: Path,
    read: Callable[[], Iterable[Record | Skipped]],
    options: ConvertOptions,
    beam_options: Sequence[str],
) -> list[dict[str, Any]]:
    try:
        # An optional dependency, usually absent where types are checked.
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError("--runner beam needs Apache Beam: pip install 'magma_jax[beam]'") from None
    flags = [f"--{option}" for option in beam_options]
    count_file = work / "state" / "shards"
    try:
        with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
            shards = pipeline | beam.Create([read]) | beam.FlatMap(_shards, size=options.shard_records)
            # Without a reshuffle the reading worker would write all shards.
            written = shards | beam.Reshuffle() | beam.Map(_write, work=work, options=options.prepare)
            _ = written | beam.combiners.Count.Globally() | beam.Map(_write_count, path=count_file)
    except Exception as error:  # each runner wraps worker exceptions differently
        raise _in_one_line(error) from None
    return [read_report(work, number) for number in range(int(count_file.read_text()))]


def _shards(read: Callable[[], Iterable[Record | Skipped]], size: int) -> Iterator[Shard]:
    return enumerate(chunks(read(), size))


def _write(shard: Shard, work: Path, options: PrepareOptions) -> int:
    number, chunk = shard
    written_shard(work, number, chunk, options)
    return number


def _write_count(count: int, path: Path) -> None:
    replace_file(path, str(count).encode())


def _in_one_line(error: BaseException) -> DataError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DataError):
            return DataError(str(cause).partition(" [while running")[0])
        cause = cause.__cause__ or cause.__context__
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # The last line of a worker's traceback is its error.
    return DataError(f"the Beam pipeline failed ({lines[-1]:.300}); run the same command again to continue")
