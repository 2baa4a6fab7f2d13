"""Images from the command line: ``--make image``."""

import argparse
import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from magma_jax.data.images import ImageInput, load_image
from magma_jax.families import open_generator
from magma_jax.generate.questions import read_parts
from magma_jax.inference.answers import ImageOptions
from magma_jax.inference.clip_scores import ClipScorer
from magma_jax.output import replace_file
from magma_jax.retrieval.arguments import with_memory
from magma_jax.runtime.compile import enable_compilation_cache


def draw(arguments: argparse.Namespace) -> int:
    """Draws the images of one prompt and writes them.

    Raises:
        ValueError, OSError: one line that says what is wrong, before anything is written.
    """
    files = output_files(arguments.output, arguments.n)
    parts = read_parts([*arguments.inputs, *([arguments.prompt] if arguments.prompt is not None else [])])
    images = [part for part in parts if isinstance(part, ImageInput)]
    mask = None
    if arguments.mask:
        if len(images) != 1:
            raise ValueError(f"--mask {arguments.mask} marks pixels of one image; {len(images)} are given")
        mask = read_mask(arguments.mask)
    for image in images:
        path = str(image.source)  # of the command line, so a path
        if any(os.path.realpath(path) == os.path.realpath(file) for file in files):
            raise ValueError(f"--output {arguments.output}: is one of the inputs; give another name")
    options = image_options(arguments, mask)
    # Before the weights are read, so that a bad image is reported at once.
    prompt = [ImageInput(part.load()) if isinstance(part, ImageInput) else part for part in parts]
    enable_compilation_cache(not arguments.no_program_cache)
    if arguments.clip:
        options = dataclasses.replace(options, score=ClipScorer(arguments.clip))
    model = with_memory(open_generator(arguments.checkpoint, dtype=arguments.dtype), arguments)
    wanted = "edit" if images else "image"
    if wanted not in model.makes:
        made = ", ".join(sorted(model.makes)) or "nothing that a prompt asks for"
        raise ValueError(
            f"{arguments.checkpoint}: this model makes {made}, no {wanted}; give a checkpoint of one that does"
        )
    (answers,) = model.answers([prompt], options, count=1)
    for file, answer in zip(files, answers, strict=True):
        (image,) = (part for part in answer.parts if isinstance(part, Image.Image))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        replace_file(file, buffer.getvalue())
        print(f"{file}\t{answer.logprob:.2f}")
    return 0


def image_options(arguments: argparse.Namespace, mask: np.ndarray | None) -> ImageOptions:
    """The options of a command line.

    Raises:
        ValueError: an option that is out of range, or that texts alone have.
    """
    for name in ("beams", "choices", "stop", "attention", "stream", "top_k", "min_p"):
        if getattr(arguments, name):
            raise ValueError(f"--{name.replace('_', '-')} is for texts; leave it out with --make image")
    heat = arguments.temperature
    return ImageOptions(
        n=arguments.n,
        seed=arguments.seed,
        candidates=arguments.candidates,
        guidance=arguments.guidance,
        temperature=(heat, heat) if heat else None,
        top_p=arguments.top_p,
        steps=arguments.steps,
        schedule=arguments.schedule,
        places=arguments.places,
        cd_k=arguments.cd_k,
        contrasted=arguments.contrasted,
        mask=mask,
    )


def output_files(output: Path | None, count: int) -> Sequence[Path]:
    """The file of each image: the output itself for one, ``NAME-1.png`` and so on for several.

    Raises:
        ValueError: no output, another format than PNG, or a folder that does not exist.
    """
    if output is None:
        raise ValueError("--make image needs --output FILE.png")
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output {output}: give a name that ends in .png")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: no such folder; make it first")
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(1, count + 1)]


def read_mask(path: str) -> np.ndarray:
    """The pixels (height, width) that a mask marks: transparent ones, or in an image without transparency light ones.

    Raises:
        ImageError, OSError: it cannot be read.
    """
    image = load_image(path)
    if "A" in image.getbands() or "transparency" in image.info:
        return np.asarray(image.convert("RGBA"))[..., 3] < 128
    return np.asarray(image.convert("L")) >= 128
