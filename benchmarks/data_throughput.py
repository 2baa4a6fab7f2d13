"""Throughput per core of image loading, compared with plain Pillow and PyTorch's DataLoader, and of conversion.

    python benchmarks/data_throughput.py
    python benchmarks/data_throughput.py --convert 10000
    python benchmarks/data_throughput.py --decoders

Prints JSON. Every contender reads the same JPEGs, resizes the shorter side to --size with Pillow's bicubic filter, and
crops the centre:

    pillow          one process, no batches: open, decode, resize, crop
    torch           a DataLoader with --workers processes and the same transform in its workers
    magma_jax       training batches of a dataset folder, texts included, with --workers processes
    magma_jax_fast  the same with data.decode=fast

They take turns for --rounds rounds. Figures are images per second of processor time over all processes of a contender,
so other load on the machine matters little. ``--decoders`` compares decoding untrusted images in separate processes
with decoding in this one, by the processor time of both. Images are noise with the spectrum of photographs.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from magma_jax.data.batches.stored_images import Decode, StoredImages
from magma_jax.data.decoders import Decoders
from magma_jax.data.folder_dataset import FoldersConfig, open_folders
from magma_jax.data.format.records import FileSlice, Record, pack, pack_text
from magma_jax.data.format.shards import shard_writer
from magma_jax.data.images import load_image, to_uint8
from magma_jax.data.write.conversion import ConvertOptions, convert

BATCH = 32
# Grain's shuffle finds its next index by random probing, which is slow for very few records.
RECORDS = 512
SIZES = {"640x480": (640, 480), "480x640": (480, 640), "640x427": (640, 427), "1600x1200": (1600, 1200)}


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--size", type=int, default=384, help="pixels per side; default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes; default: %(default)s")
    parser.add_argument("--batches", type=int, default=8, help=f"of {BATCH} images, a round; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--distinct", type=int, default=48, help="different images; default: %(default)s")
    parser.add_argument("--convert", type=int, metavar="N", help="measure a conversion of N images instead")
    parser.add_argument("--decoders", action="store_true", help="measure decoding in other processes instead")
    parser.add_argument("--folder", type=Path, help="where files are made; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure = measure_conversion if arguments.convert else measure_batches
        measure = measure_decoders if arguments.decoders else measure
        print(json.dumps({"cores": os.cpu_count(), **measure(Path(folder), arguments)}, indent=2))


def measure_batches(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per second of processor time, every contender, every size of image."""
    results: dict[str, Any] = {"size": arguments.size, "workers": arguments.workers}
    for name, size in SIZES.items():
        files = make_images(folder / name, arguments.distinct, size)
        named = ((i, files[i % len(files)]) for i in range(RECORDS))
        records = (Record(str(i), FileSlice(str(file)), (f"image {i}",)) for i, file in named)
        convert(records, folder / f"{name}.records", ConvertOptions(workers=0))
        decodings: dict[str, Decode] = {"magma_jax": "exact", "magma_jax_fast": "fast"}
        with contextlib.ExitStack() as stack:
            contenders = {
                "pillow": Pillow(files, arguments.size),
                "torch": stack.enter_context(contextlib.closing(Torch(files, arguments.size, arguments.workers))),
                **{
                    contender: stack.enter_context(
                        contextlib.closing(Ours(folder / f"{name}.records", arguments, decode))
                    )
                    for contender, decode in decodings.items()
                },
            }
            rates: dict[str, list[float]] = {contender: [] for contender in contenders}
            # Workers prefetch during other contenders' turns, so their time is counted from end to end of a turn.
            marks: dict[str, float] = {}
            for turn in range(arguments.rounds + 1):
                for contender, runner in contenders.items():
                    started = time.process_time()
                    images = runner.run(arguments.batches)
                    seconds, mark = time.process_time() - started, sum(map(cpu_of, runner.worker_ids()))
                    if turn:
                        rates[contender].append(images / (seconds + mark - marks[contender]))
                    marks[contender] = mark
        results[name] = {
            "bytes_a_image": round(statistics.mean(file.stat().st_size for file in files)),
            "images_per_core_second": {name: round(statistics.median(found), 1) for name, found in rates.items()},
            # Ratios within a round, so that a slow moment of the machine affects both sides.
            "ratio_to_pillow": ratios(rates, "pillow"),
            "ratio_to_torch": ratios(rates, "torch"),
        }
    return results


def ratios(rates: dict[str, list[float]], base: str) -> dict[str, float]:
    """Median over the rounds of each contender's rate divided by that of ``base``."""
    return {
        name: round(statistics.median(a / b for a, b in zip(found, rates[base], strict=True)), 3)
        for name, found in rates.items()
        if name.startswith("magma_jax")
    }


def transform(content: bytes, size: int) -> np.ndarray:
    """The original's transform in Pillow, up to the pixels."""
    image = Image.open(io.BytesIO(content))
    width, height = image.size
    scale = size / min(width, height)
    width, height = max(size, int(width * scale)), max(size, int(height * scale))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.array(image.crop((left, top, left + size, top + size)).convert("RGB"))


class Pillow:
    """Decoding and resizing alone, in this process."""

    def __init__(self, files: list[Path], size: int):
        self._files, self._size, self._next = files, size, 0

    def run(self, batches: int) -> int:
        for _ in range(batches * BATCH):
            transform(self._files[self._next % len(self._files)].read_bytes(), self._size)
            self._next += 1
        return batches * BATCH

    def worker_ids(self) -> list[int]:
        return []


class Files:
    """The files as a PyTorch dataset."""

    def __init__(self, files: list[Path], size: int):
        self._files, self._size = files, size

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, row: int) -> tuple[Any, str]:
        import torch

        pixels = transform(self._files[row % len(self._files)].read_bytes(), self._size)
        return torch.from_numpy(pixels), f"image {row}"


class Torch:
    """A DataLoader."""

    def __init__(self, files: list[Path], size: int, workers: int):
        import torch

        # Otherwise each worker starts threads for all cores.
        torch.set_num_threads(1)
        loader = torch.utils.data.DataLoader(
            Files(files, size),  # pyright: ignore[reportArgumentType]  # its base would import torch for every contender
            BATCH,
            shuffle=True,
            num_workers=workers,
            multiprocessing_context="forkserver",
        )
        self._iterator: Any = iter(loader)  # its workers are private

    def run(self, batches: int) -> int:
        for _ in range(batches):
            next(self._iterator)
        return batches * BATCH

    def worker_ids(self) -> list[int]:
        return [worker.pid for worker in self._iterator._workers]

    def close(self) -> None:
        self._iterator._shutdown_workers()


class Ours:
    """Training batches of a dataset folder."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, decode: Decode):
        config = FoldersConfig(
            folders={"train": (str(folder),)},
            image_size=arguments.size,
            workers=arguments.workers,
            decode=decode,
        )
        self._dataset = open_folders(config)
        self._iterator = iter(self._dataset.batches(BATCH, 0, range(BATCH)))

    def run(self, batches: int) -> int:
        for _ in range(batches):
            next(self._iterator)
        return batches * BATCH

    def worker_ids(self) -> list[int]:
        assert isinstance(self._dataset.images, StoredImages)
        return self._dataset.images.worker_ids()

    def close(self) -> None:
        self._iterator.close()


def measure_conversion(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A conversion, and its parts separately: decoding, writing finished records, copying files."""
    files = make_images(folder / "images", arguments.distinct, SIZES["640x480"])
    count = arguments.convert

    def records() -> Iterator[Record]:
        for i in range(count):
            yield Record(str(i), FileSlice(str(files[i % len(files)])), (f"image {i}",))

    def write() -> None:
        contents = [(pack(record), pack_text(record)) for record in list(records())[: len(files)]]
        with shard_writer(folder / "records-00000.array_record", folder) as writer:
            for i in range(count):
                writer.write(*contents[i % len(contents)])

    def decode() -> None:
        for record in records():
            load_image(record.image_bytes(), draft=64)

    def copy() -> None:
        with open(folder / "copy", "wb") as file:
            for record in records():
                file.write(record.image_bytes())
            file.flush()
            os.fsync(file.fileno())
        (folder / "copy").unlink()

    parts = {
        "conversion": lambda: convert(records(), folder / "out", ConvertOptions(workers=0)),
        "decoding_alone": decode,
        "writing_alone": write,
        "copying_alone": copy,
    }
    results: dict[str, Any] = {
        "images": count,
        "bytes": sum(files[i % len(files)].stat().st_size for i in range(count)),
    }
    for name, part in parts.items():
        results[name] = timed(part)
    parallel = lambda: convert(records(), folder / "parallel", ConvertOptions(workers=arguments.workers))  # noqa: E731
    results[f"conversion_in_{arguments.workers}_processes"] = {"seconds": timed(parallel)["seconds"]}
    results["writing_share_of_cpu"] = round(results["writing_alone"]["cpu"] / results["conversion"]["cpu"], 3)
    return results


def measure_decoders(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of processor time per image in this process, and the ratio with ``Decoders``."""
    results: dict[str, Any] = {"size": arguments.size}
    with Decoders(1) as decoders:
        for name, size in (SIZES | {"4000x3000": (4000, 3000)}).items():
            (file,) = make_images(folder / name, 1, size)
            buffer = io.BytesIO()
            Image.open(file).save(buffer, "PNG")
            for kind, content in {"JPEG": file.read_bytes(), "PNG": buffer.getvalue()}.items():
                here = lambda content=content: to_uint8(load_image(content), arguments.size)  # noqa: E731
                there = lambda content=content: decoders.square(content, arguments.size)  # noqa: E731
                assert np.array_equal(here(), there())
                count = max(1, 10_000_000 // (size[0] * size[1]))
                rounds = [(cost(here, count, []), cost(there, count, decoders.process_ids())) for _ in range(7)]
                results[f"{name} {kind}"] = {
                    "milliseconds": round(1000 * statistics.median(a for a, _ in rounds), 2),
                    "ratio": round(statistics.median(b / a for a, b in rounds), 3),
                }
    return results


def cost(function: Callable[[], Any], count: int, others: list[int]) -> float:
    """Processor seconds of a call, in this process and others."""
    started = time.process_time() + sum(map(cpu_of, others))
    for _ in range(count):
        function()
    return (time.process_time() + sum(map(cpu_of, others)) - started) / count


def timed(function: Callable[[], Any]) -> dict[str, float]:
    """Wall and processor seconds of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return {"seconds": round(time.perf_counter() - wall, 2), "cpu": round(time.process_time() - cpu, 2)}


def make_images(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """JPEGs of noise whose amplitude falls with the frequency, as in photographs."""
    folder.mkdir()
    width, height = size
    y, x = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    falling = 1 / (np.hypot(x, y) + 1 / max(size)) ** 1.1
    files = []
    for i in range(count):
        rng = np.random.default_rng(i)
        grey, channels = rng.normal(size=(height, width)), []
        for _ in range(3):
            values = np.fft.ifft2(np.fft.fft2(0.8 * grey + 0.3 * rng.normal(size=(height, width))) * falling).real
            channels.append(np.clip(values / values.std() * 50 + 120, 0, 255))
        files.append(folder / f"{i}.jpg")
        Image.fromarray(np.stack(channels, -1).astype(np.uint8)).save(files[-1], quality=90)
    return files


def cpu_of(pid: int) -> float:
    """Processor seconds of a process, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
