"""Samples during training: drawings beside their reconstructions."""

import io
from typing import Any

import jax
import numpy as np
from PIL import Image

from magma_jax.config import ConfigError
from magma_jax.models.vision.vqgan import from_pixels, to_pixels
from magma_jax.nn.modules import Definition, merge
from magma_jax.output import replace_file
from magma_jax.runtime.sharding import batch_shards, local_rows, place_batch, replicated
from magma_jax.training.run.setup import Run
from magma_jax.typing import Params, UInt8

SAMPLES = "samples"
# Pixels between images, white.
MARGIN, WHITE = 4, 255
# Images of a row of the panel; each has its reconstruction on the right.
COLUMNS = 4


class Panel:
    """Decodes fixed images of a run from their codes, and writes them beside the originals to the run folder.

    ``samples/000200.png`` shows the images after step 200.

    Args:
        run: the run.
        writing: whether this process writes the files.

    Raises:
        ConfigError: the dataset has no images in the split.
    """

    def __init__(self, run: Run, *, writing: bool):
        watch, dataset = run.config.watch, run.dataset
        samples = dataset.evaluation.get(watch.samples_split, [])
        if dataset.images is None or not len(samples):
            splits = ", ".join(name for name, members in dataset.evaluation.items() if len(members)) or "none"
            raise ConfigError(
                f"watch.samples_every: the dataset has no images in a split {watch.samples_split!r} "
                f"(its splits: {splits}); set watch.samples_split, or watch.samples_every=0"
            )
        self._run, self._writing = run, writing
        spaced = np.unique(np.linspace(0, len(samples) - 1, 8 * watch.samples).astype(int))
        rows = sorted({int(samples[i].image) for i in spaced if samples[i].image is not None})
        chosen = np.unique(np.linspace(0, len(rows) - 1, watch.samples).astype(int))
        self._images = np.asarray(dataset.images[np.asarray(rows)[chosen]])

    def __call__(self, step: int, params: Params) -> UInt8[np.ndarray, "H W 3"]:
        """Encodes and decodes with ``params`` and returns an image of the pairs."""
        mesh = self._run.program.mesh
        size = -(-len(self._images) // batch_shards(mesh)) * batch_shards(mesh)
        padded = self._images[np.minimum(np.arange(size), len(self._images) - 1)]
        placed = place_batch({"images": padded[local_rows(mesh, size)]}, mesh, size)["images"]
        program = jax.jit(_decoded, static_argnums=0, out_shardings=replicated(mesh))
        decoded = np.asarray(program(self._run.program.graphdef, params, placed))
        panel = side_by_side(self._images, decoded[: len(self._images)])
        if self._writing:
            folder = self._run.workdir / SAMPLES
            folder.mkdir(exist_ok=True)
            file = io.BytesIO()
            Image.fromarray(panel).save(file, "PNG")
            replace_file(folder / f"{step:06d}.png", file.getvalue())
        return panel


def side_by_side(
    images: UInt8[np.ndarray, "N h w 3"], decoded: UInt8[np.ndarray, "N h w 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Pairs of images in rows of ``COLUMNS``, on white."""
    count, height, width, _ = images.shape
    rows, columns = -(-count // COLUMNS), min(COLUMNS, count)
    step_down, step_right = height + MARGIN, 2 * width + 3 * MARGIN
    panel = np.full((rows * step_down + MARGIN, columns * step_right, 3), WHITE, np.uint8)
    for i, pair in enumerate(zip(images, decoded, strict=True)):
        top, left = MARGIN + i // COLUMNS * step_down, MARGIN + i % COLUMNS * step_right
        for image in pair:
            panel[top : top + height, left : left + width] = image
            left += width + MARGIN
    return panel


def _decoded(graphdef: Definition, params: Params, images: Any) -> Any:
    return to_pixels(merge(graphdef, params)(from_pixels(images)).images)
