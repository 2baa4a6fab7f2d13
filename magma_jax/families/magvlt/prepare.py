"""Batches of the loss from batches of a dataset: codes of images, encoded once, the task, and mixed contexts."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from magma_jax.config import ConfigError
from magma_jax.data.batches.batching import Batch
from magma_jax.data.batches.pairs import PARTNER
from magma_jax.data.dataset import Dataset
from magma_jax.data.tokenizers.text import separator_id
from magma_jax.families.magvlt.mixing import Halves, cropped_halves, mixed
from magma_jax.families.magvlt.options import TEXT_TO_IMAGE, MagvltOptions
from magma_jax.models.vision.vqgan import TOKENIZER, VQGAN, VQGANConfig, from_pixels
from magma_jax.nn.modules import Definition, abstract, merge
from magma_jax.runtime.distributed import is_main
from magma_jax.runtime.sharding import batch_shards, local_rows, place_batch, replicated
from magma_jax.training.run.program import Program
from magma_jax.typing import Int, Params, UInt8

BELOW = f"{TOKENIZER}/"
# Added to the seeds of a batch for those of its second pass.
UNROLL = np.uint32(0x9E3779B9)
# Images that are encoded at a time.
ENCODED = 64


def make_prepare(program: Program, dataset: Dataset, params: Params) -> Callable[[Batch], Batch]:
    """The function of ``Family.prepare``; images in memory are encoded here, once.

    Raises:
        ConfigError: images, but a model without an image tokenizer; codes of another tokenizer; or a classifier whose
            answers have no names.
    """
    config, options = program.config.model, program.config.loss
    if config.classes and not getattr(program.config.data, "classes", ()):
        raise ConfigError(
            f"data.classes does not name the {config.classes} answers of model.classes; "
            "python -m magma_jax.data answers writes those of a dataset"
        )
    tables: _Tables | None = None
    codes = dataset.codes
    if codes is not None and (codes.size, codes.tokens) != (config.image_rows, config.image_positions):
        raise ConfigError(
            f"data.folders hold {codes.tokens} codes an image, of {codes.size}, but the model has "
            f"{config.image_positions} of {config.image_rows}; encode the images with the model's tokenizer"
        )
    if dataset.images is not None:
        if config.tokenizer is None:
            raise ConfigError(
                f"data of kind {program.config.data.kind} has images, but the model has no image tokenizer: set "
                "model.tokenizer and weights.image_tokenizer, or train on codes"
            )
        tables = _Tables(dataset.images, program.mesh, config.tokenizer, params, halves=bool(options.mixsel_weight))
    numbers = {"pad_id": dataset.tokenizer.pad_id, "separator": separator_id(dataset.tokenizer)}
    return functools.partial(_prepared, options=options, tables=tables, grid=config.grid, **numbers)


def encode_images(
    images: UInt8[np.ndarray, "N H W 3"],
    config: VQGANConfig,
    params: Params,
    mesh: Mesh | None = None,
    *,
    quiet: bool = True,
) -> Int[np.ndarray, "N h w"]:
    """Codes of images by the tokenizer in ``params``; a ``mesh`` shares the work among its devices."""
    definition = _tokenizer(config)
    weights = {path.removeprefix(BELOW): leaf for path, leaf in params.items() if path.startswith(BELOW)}
    size = min(ENCODED, len(images)) if mesh is None else -(-ENCODED // batch_shards(mesh)) * batch_shards(mesh)
    rows, out = (list(range(size)), None) if mesh is None else (local_rows(mesh, size), replicated(mesh))
    parts = []
    for start in tqdm(range(0, len(images), size), desc="encoding images", unit="batch", disable=quiet or None):
        # The last batch is padded with its last image, so that one program serves all batches.
        chosen = np.minimum(np.arange(start, start + size), len(images) - 1)
        pixels: Any = {"images": images[chosen[rows]]}
        if mesh is not None:
            pixels = place_batch(pixels, mesh, size)
        parts.append(np.asarray(_encode(definition, weights, pixels["images"], out=out)))
    return np.concatenate(parts)[: len(images)]


class _Tables:
    """Codes of all images, and of their halves."""

    def __init__(self, images: Any, mesh: Mesh, config: Any, params: Params, *, halves: bool):
        encode = functools.partial(encode_images, config=config, params=params, mesh=mesh, quiet=not is_main())
        self.codes = encode(images).reshape(len(images), -1)
        self._halves = None
        if halves:
            side = images.shape[1]
            self._halves = Halves(encode(_resized(images, side // 2, side)), encode(_resized(images, side, side // 2)))

    def halves(self, rows: Int[np.ndarray, " B"]) -> Halves:
        """Halves of some images."""
        assert self._halves is not None  # asked for where they are used
        return Halves(*(codes[rows] for codes in self._halves))


def _prepared(
    batch: Batch,
    *,
    options: MagvltOptions,
    tables: _Tables | None,
    grid: tuple[int, int],
    pad_id: int,
    separator: int,
) -> Batch:
    if "labels" in batch:
        return {name: batch[name] for name in ("codes", "tokens", "lengths", "labels")}
    task = task_of(batch["draws"][0, 0], options)
    if tables is not None:
        batch = batch | {"codes": tables.codes[batch["image_rows"]]}
    found: dict[str, np.ndarray] = {name: batch[name] for name in ("codes", "tokens", "lengths", "seeds")}
    found["task"] = np.full(len(batch["seeds"]), task, np.int32)
    if options.unroll_weight:
        found["unroll_seeds"] = batch["seeds"] + UNROLL
    if options.mixsel_weight:
        halves = None
        if task != TEXT_TO_IMAGE and tables is not None:
            halves = tables.halves(batch["image_rows"]), tables.halves(batch[f"{PARTNER}image_rows"])
        elif task != TEXT_TO_IMAGE:
            halves = cropped_halves(batch["codes"], grid), cropped_halves(batch[f"{PARTNER}codes"], grid)
        stacked = bool(batch["draws"][0, 1] < 0.5)
        found |= mixed(batch, task, halves, stacked=stacked, pad_id=pad_id, separator=separator)
    if options.caption_dropout and task == TEXT_TO_IMAGE:
        # The lowest bit of a seed chooses the order of mixed halves.
        left_out = (batch["seeds"] >> 1) < options.caption_dropout * 2**31
        found["tokens"] = np.where(left_out[:, None], pad_id, found["tokens"]).astype(np.int32)
        found["lengths"] = np.where(left_out, 1, found["lengths"]).astype(np.int32)
    return found


def task_of(draw: float, options: MagvltOptions) -> int:
    """The task of a number from [0, 1)."""
    ends = np.cumsum(options.task_weights) / sum(options.task_weights)
    return options.tasks[int(np.searchsorted(ends[list(options.tasks)][:-1], draw, side="right"))]


def _resized(images: UInt8[np.ndarray, "N H W 3"], width: int, height: int) -> UInt8[np.ndarray, "N h w 3"]:
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images])


@functools.cache
def _tokenizer(config: VQGANConfig) -> Definition:
    return abstract(lambda: VQGAN(config, rngs=nnx.Rngs(0)))[0]


@functools.partial(jax.jit, static_argnames=("definition", "out"))
def _encode(definition: Definition, weights: Mapping[str, Any], images: Any, *, out: Any) -> Any:
    codes = merge(definition, weights).encode(from_pixels(images))
    return codes if out is None else jax.lax.with_sharding_constraint(codes, out)
