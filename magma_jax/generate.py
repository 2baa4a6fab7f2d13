"""Text for pictures, from the command line.

python -m magma_jax.generate --checkpoint runs/quickstart picture.png
python -m magma_jax.generate --checkpoint runs/quickstart picture.png "Q: What skin tone is it? A:"
"""

import argparse
import os
import sys
from collections.abc import Sequence

from magma_jax.data.images import FORMATS, ImageInput, load_image
from magma_jax.inference.api import Magma

DEFAULT_PROMPT = "A picture of"
SUFFIXES = tuple(f".{name.lower()}" for name in (*FORMATS, "JPG"))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line a picture; returns the exit status, 2 for an error, which is one line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        paths, prompt = _pictures_and_prompt(arguments.inputs)
        # Before the weights are read: a wrong picture should not take so long to tell.
        pictures = [ImageInput(load_image(path)) for path in paths]
        model = Magma.from_checkpoint(arguments.checkpoint)
        texts = model.generate(
            model.preprocess_batch([[picture, prompt] for picture in pictures]),
            arguments.max_new_tokens,
            arguments.temperature,
            arguments.top_k,
            arguments.top_p,
            seed=arguments.seed,
        )
    # ImageError, CheckpointError, ConfigError and the like: all say in one line what to do.
    except (ValueError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    for path, text in zip(paths, texts, strict=True):
        line = " ".join(text.split())
        print(line if len(paths) == 1 else f"{path}: {line}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m magma_jax.generate", description="Text for pictures.")
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="PICTURE ... [PROMPT]",
        help=f"picture files, and last the text to continue (default: {DEFAULT_PROMPT!r})",
    )
    parser.add_argument("--checkpoint", required=True, help="run folder, converted model folder or PyTorch checkpoint")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0 for all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from likely tokens of this mass; 1 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: %(default)s")
    return parser


def _pictures_and_prompt(inputs: Sequence[str]) -> tuple[list[str], str]:
    """The last argument is a prompt unless it stands alone, is a file, or is named like a picture."""
    *paths, last = inputs
    if not paths or last.lower().endswith(SUFFIXES) or os.path.isfile(last):
        return [*paths, last], DEFAULT_PROMPT
    if not last.strip():
        raise ValueError(f"the prompt is empty; leave it out for {DEFAULT_PROMPT!r}")
    return paths, last


def _one_line(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename}: no such file"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
