"""Texts and images for images and texts, from the command line.

    python -m magma_jax.generate --checkpoint RUN image.png
    python -m magma_jax.generate --checkpoint RUN image.png "Q: What skin tone is it? A:" --stream
    python -m magma_jax.generate --checkpoint RUN a.png "Q: Hair? A: red" b.png "Q: Hair? A:"
    python -m magma_jax.generate --checkpoint RUN images/ "A picture of" --output answers.jsonl
    python -m magma_jax.generate --checkpoint RUN image.png "Q: Who? A:" --choices "a man" "a woman"
    python -m magma_jax.generate --checkpoint RUN image.png --attention attention.png
    python -m magma_jax.generate --checkpoint RUN --make image --prompt "a red car" --output out.png
    python -m magma_jax.generate --checkpoint RUN car.png "a red car" --make image --mask mask.png --output out.png

Inputs are images, folders of images, and texts. Images followed by at most one text are separate prompts with that
text; inputs in any other order form a single prompt.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from magma_jax import commands
from magma_jax.retrieval.arguments import add_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the answers; returns the exit status, see ``commands``; 1 if some images could not be answered."""
    arguments = _parser().parse_args(argv)

    def work() -> int:
        if arguments.make == "image":
            from magma_jax.generate.images import draw

            return draw(arguments)
        from magma_jax.generate.command import run

        return run(arguments)

    resumable = bool(arguments.output) and arguments.make == "text"
    return commands.run("magma_jax.generate", work, resumable=resumable)


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser(
        "python -m magma_jax.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="image, folder or text (no text: the model's default)")
    add("--make", choices=["text", "image"], default="text", help="what is made; default: %(default)s")
    add("--prompt", metavar="TEXT", help="a text, as among the inputs")
    add(
        "--checkpoint",
        required=True,
        type=commands.source,
        help="run folder, converted model folder or PyTorch checkpoint, also gs://, s3:// and hf:// addresses",
    )
    add("--dtype", help="dtype of weights and activations, such as bfloat16")
    add("--no-program-cache", action="store_true", help="compile anew instead of using the compilation cache")
    add("--together", action="store_true", help="all inputs form one prompt, even several images and one text")
    add("--max-new-tokens", type=int, default=32, help="default: %(default)s")
    add("--stream", action="store_true", help="print the answer while it is generated")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="texts: FILE.jsonl, one line an image, an interrupted run is continued; images: FILE.png, and with --n "
        "FILE-1.png, FILE-2.png, ...",
    )
    drawing = parser.add_argument_group("drawing")
    add = drawing.add_argument
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    add("--top-k", type=int, default=0, help="sample from the k likeliest tokens; 0 for all (default)")
    add("--top-p", type=float, default=1.0, help="sample from likely tokens of this mass; 1 for all (default)")
    add("--min-p", type=float, default=0.0, help="drop tokens below this share of the likeliest; 0 for none (default)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less; default: %(default)s")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be given several times")
    add("--seed", type=int, default=0, help="seed of the first answer, +1 for each further one; default: %(default)s")
    add("--n", type=int, default=1, help="answers to every prompt; default: %(default)s")
    images = parser.add_argument_group("images")
    add = images.add_argument
    add("--mask", metavar="MASK.png", help="draw anew only its transparent (or, without transparency, light) pixels")
    add("--steps", type=int, help="steps of a masked model; default: the model's")
    add("--guidance", type=float, default=1.0, help="s of u + s (c - u), with and without the prompt; default: 1, none")
    add("--candidates", type=int, default=1, help="images drawn for each one; the likeliest is kept; default: 1")
    add("--cd-k", type=int, default=0, help="draw by CD-K with this k in place of guidance; CM3Leon; default: 0, none")
    add("--contrasted", type=int, metavar="N", help="of the candidates those that are drawn by CD-K; default: all")
    add("--clip", metavar="FILE", help="a CLIP of OpenAI's or open_clip's; of the candidates its best one is kept")
    add("--schedule", default="cosine", help="cosine, linear or arccos; default: %(default)s")
    add(
        "--places",
        default="multinomial-maskgit",
        help="which places a step reveals: multinomial-maskgit (default), maskgit, multinomial, random or halton",
    )
    add_memory(parser)
    whole = parser.add_argument_group("comparing whole answers")
    add = whole.add_argument
    add("--beams", type=int, default=0, help="width of a beam search; 0 for none (default)")
    add("--length-penalty", type=float, default=1.0, help="beam search: 0 prefers short answers; default: %(default)s")
    add("--choices", nargs="+", default=[], metavar="ANSWER", help="choose among these and print their probabilities")
    add("--measure", choices=["sum", "mean"], default="sum", help="compare choices by total or mean log-probability")
    seen = parser.add_argument_group("attention")
    add = seen.add_argument
    add("--attention", type=Path, metavar="OUT.png", help="draw an attention map for each word")
    add("--layer", type=int, help="one layer, from 0; default: rollout through all")
    add("--head", type=int, help="one head of that layer, from 0; default: their mean")
    add("--relative", action="store_true", help="relative to the mean over the answer's words")
    return parser


if __name__ == "__main__":
    sys.exit(main())
