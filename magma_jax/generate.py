"""Text for images, from the command line.

    python -m magma_jax.generate --checkpoint RUN image.png
    python -m magma_jax.generate --checkpoint RUN image.png "Q: What skin tone is it? A:" --stream
    python -m magma_jax.generate --checkpoint RUN a.png "Q: Hair? A: red" b.png "Q: Hair? A:"
    python -m magma_jax.generate --checkpoint RUN images/ "A picture of" --output answers.jsonl
    python -m magma_jax.generate --checkpoint RUN image.png "Q: Who? A:" --choices "a man" "a woman"
    python -m magma_jax.generate --checkpoint RUN image.png --attention attention.png

Inputs are images, folders of images, and texts. Images with at most one text behind them are asked one by one;
in any other order the inputs are one prompt, as they follow each other.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from magma_jax.data.decoders import DecoderError, Decoders
from magma_jax.data.format.records import Skipped
from magma_jax.data.images import FORMATS, ImageInput
from magma_jax.data.readers.common import files_below
from magma_jax.data.time_limit import OWN_SECONDS
from magma_jax.inference.answer_file import answer_file
from magma_jax.inference.answers import AHEAD, Answer, Asker, AskOptions
from magma_jax.inference.api import Magma
from magma_jax.inference.attention_maps import attention_maps, check_head
from magma_jax.inference.batching.requests import EngineError
from magma_jax.inference.decoding.sampling import SamplingConfig
from magma_jax.output import error_line, printable, replace_file
from magma_jax.runtime.compile import enable_compilation_cache

# For the images of a prompt, on a disk that may be far away.
READ_SECONDS = 120.0
DEFAULT_PROMPT = "A picture of"
SUFFIXES = tuple(f".{name.lower()}" for name in (*FORMATS, "JPG"))


class Question(NamedTuple):
    """A prompt, and the image it is named after if there are several."""

    name: str | None
    parts: list[str | ImageInput]

    def prompt(self, decoders: Decoders) -> list[str | ImageInput]:
        """With its images read."""
        deadline = time.monotonic() + READ_SECONDS
        return [
            part if isinstance(part, str) else ImageInput(decoders.image(part.source, deadline)) for part in self.parts
        ]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the answers; returns the exit status.

    1 means that some images could not be answered for; 2 an error, which is one line on stderr; 130 an interruption.
    """
    arguments = _parser().parse_args(argv)
    enable_compilation_cache(not arguments.no_program_cache)
    try:
        options = _options(arguments)
        questions = read_inputs(arguments.inputs, together=arguments.together)
        _check(arguments, questions)
        if arguments.output:
            return _to_file(arguments, questions, options)
        _print_answers(arguments, questions, options)
    # ImageError, CheckpointError, ConfigError and the like: all say in one line what to do.
    except (ValueError, OSError, EngineError, DecoderError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted" + ("; the same command goes on" if arguments.output else ""), file=sys.stderr)
        return 130
    return 0


def read_inputs(inputs: Sequence[str], *, together: bool = False) -> list[Question]:
    """The questions that the inputs of a command line ask.

    Args:
        inputs: images, folders of images, texts.
        together: one prompt whatever the order.

    Raises:
        ValueError: an empty text, or a folder without images or among texts.
    """
    parts = [_part(text) for text in inputs]
    texts = [part for part in parts if isinstance(part, str)]
    if any(not text.strip() for text in texts):
        raise ValueError(f"the prompt is empty; leave it out for {DEFAULT_PROMPT!r}")
    if not texts:
        parts.append(DEFAULT_PROMPT)
    *images, last = parts
    one_by_one = images and isinstance(last, str) and all(isinstance(part, ImageInput) for part in images)
    folders = any(isinstance(part, ImageInput) and os.path.isdir(part.source) for part in parts)
    if together or not one_by_one:
        if folders:
            raise ValueError("a folder stands for images that are asked one by one; put it first, one text behind it")
        return [Question(None, parts)]
    found = [file for part in images for file in (_images_in(part.source))]
    several = len(found) > 1 or folders
    return [Question(file if several else None, [ImageInput(file), last]) for file in found]


def _part(text: str) -> str | ImageInput:
    """An image (or a folder of them) if it is there, or is named like one; otherwise text."""
    try:
        is_image = text.lower().endswith(SUFFIXES) or os.path.exists(text)
    except ValueError:  # null bytes
        is_image = False
    return ImageInput(text) if text and is_image else text


def _images_in(path: str) -> list[str]:
    """The images below a folder, in order, without hidden files; of a file, itself."""
    if not os.path.isdir(path):
        return [path]
    ignored: list[Skipped] = []
    found = sorted(map(str, map(Path, filter(os.path.isfile, files_below(Path(path), SUFFIXES, ignored)))))
    if ignored:
        print(printable(f"note: {path}: {len(ignored)} hidden files are left out"), file=sys.stderr)
    if not found:
        raise ValueError(f"{path}: no images in it ({', '.join(SUFFIXES)})")
    return found


def _check(arguments: argparse.Namespace, questions: list[Question]) -> None:
    """Raises ValueError for options that do not go together, before the weights are read."""
    one = len(questions) == 1 and arguments.n == 1
    if (arguments.stream or arguments.attention) and (not one or arguments.output):
        raise ValueError("--stream and --attention are for one prompt and one answer, without --output")
    if arguments.stream and (arguments.beams or arguments.choices):
        raise ValueError("--stream shows an answer while it is drawn; leave out --beams and --choices")
    if arguments.attention:
        if arguments.attention.suffix.lower() != ".png":
            raise ValueError(f"--attention {arguments.attention}: give a name that ends in .png")
        images = [part.source for part in questions[0].parts if isinstance(part, ImageInput)]
        if any(os.path.realpath(image) == os.path.realpath(arguments.attention) for image in images):
            raise ValueError(f"--attention {arguments.attention}: is one of the inputs; give another name")
        if not arguments.attention.absolute().parent.is_dir():
            raise ValueError(f"--attention {arguments.attention}: no such folder; make it first")
        if not images:
            raise ValueError("--attention needs an image to look at")
    if not arguments.output and any(os.path.isdir(text) for text in arguments.inputs if "\0" not in text):
        raise ValueError("a folder needs --output FILE.jsonl")


def _print_answers(arguments: argparse.Namespace, questions: list[Question], options: AskOptions) -> None:
    # Before the weights are read: a wrong image should not take so long to tell.
    with _decoders() as decoders:
        prompts = [question.prompt(decoders) for question in questions]
    model = Magma.from_checkpoint(arguments.checkpoint, dtype=arguments.dtype)
    check_head(model.config.lm.layers, model.config.lm.heads, arguments.layer, arguments.head)
    with Asker(model, options, prompts[0], len(prompts)) as asker:
        if arguments.stream:
            tokens = _stream(asker, prompts[0])
        else:
            asked = ((question, asker.ask(prompt)) for question, prompt in zip(questions, prompts, strict=True))
            for question, wait in _ahead(asked):
                answers = wait()
                tokens = answers[0].tokens
                for answer in answers:
                    print(printable(_line(question, answer)))
    if arguments.attention:
        seen = attention_maps(model, prompts[0], tokens)
        buffer = io.BytesIO()
        which = {"layer": arguments.layer, "head": arguments.head, "relative": arguments.relative}
        seen.sheet(**which).save(buffer, "PNG")
        replace_file(arguments.attention, buffer.getvalue())
        if seen.grid.note:
            print(printable(f"note: {seen.grid.note}"), file=sys.stderr)


def _decoders() -> Decoders:
    return Decoders(1, seconds=OWN_SECONDS)


def _stream(asker: Asker, prompt: list[str | ImageInput]) -> tuple[int, ...]:
    """Prints an answer while it is drawn; returns its tokens."""
    (ticket,) = asker.tickets(prompt)
    begun = False
    for piece in ticket:
        text = piece.text if begun else piece.text.lstrip()
        begun = begun or bool(text)
        # As in a whole answer, any kind of space is one; but lines stay.
        print(printable(re.sub(r"[^\S\n]", " ", text)), end="", flush=True)
    print()
    return tuple(ticket.tokens)


def _to_file(arguments: argparse.Namespace, questions: list[Question], options: AskOptions) -> int:
    """One JSON line an image; returns 1 if some images could not be read."""
    settings = {"checkpoint": arguments.checkpoint, "dtype": arguments.dtype} | dataclasses.asdict(options)
    failed = 0
    with answer_file(arguments.output, settings | {"prompt": _text(questions[0])}) as file:
        left = [question for question in questions if _name(question) not in file.done]
        progress = tqdm(total=len(questions), initial=len(questions) - len(left), unit="image", disable=None)
        model = Magma.from_checkpoint(arguments.checkpoint, dtype=arguments.dtype) if left else None

        def begin(stack: contextlib.ExitStack) -> Iterator:
            asker, decoders = None, stack.enter_context(_decoders())
            for question in left:
                try:
                    prompt = question.prompt(decoders)
                except (ValueError, OSError) as error:
                    yield question, _one_line(error)
                    continue
                # All prompts have the size of the first: one image and the same text.
                asker = asker or stack.enter_context(Asker(model, options, prompt, len(left)))
                yield question, asker.ask(prompt)

        with contextlib.closing(progress), contextlib.ExitStack() as stack:
            for question, wait in _ahead(begin(stack)):
                record = {"picture": _name(question), "prompt": _text(question)}
                if isinstance(wait, str):
                    failed += 1
                    file.write(record | {"error": wait})
                else:
                    file.write(record | _record(wait()))
                progress.update()
    if failed:
        print(f"{failed} of {len(left)} images could not be read; their lines say why", file=sys.stderr)
    return 1 if failed else 0


def _ahead(items: Iterator, count: int = AHEAD - 1) -> Iterator:
    """The same items, of which some have been begun before they are wanted."""
    begun = collections.deque()
    for item in items:
        begun.append(item)
        if len(begun) > count:
            yield begun.popleft()
    yield from begun


def _record(answers: list[Answer]) -> dict:
    records = [
        {"text": " ".join(answer.text.split()), "logprob": answer.logprob, "finish_reason": answer.finish}
        | ({} if answer.probability is None else {"probability": answer.probability})
        for answer in answers
    ]
    return records[0] | ({"answers": records} if len(records) > 1 else {})


def _line(question: Question, answer: Answer) -> str:
    text = " ".join(answer.text.split())
    share = "" if answer.probability is None else f"\t{answer.probability:.4f}"
    return (text if question.name is None else f"{_name(question)}: {text}") + share


def _name(question: Question) -> str:
    images = (part.source for part in question.parts if isinstance(part, ImageInput))
    return _readable(question.name or " ".join(images))


def _readable(name: str) -> str:
    r"""A file name as text: bytes that are not UTF-8 become ``\xff``, which any terminal and file takes."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _text(question: Question) -> str:
    return "".join(part for part in question.parts if isinstance(part, str))


def _options(arguments: argparse.Namespace) -> AskOptions:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    if any(not choice.strip() for choice in arguments.choices):
        raise ValueError("--choices: an empty answer cannot be chosen; leave it out")
    return AskOptions(
        arguments.max_new_tokens,
        SamplingConfig(*(getattr(arguments, name) for name in names)),
        arguments.seed,
        arguments.n,
        tuple(arguments.stop),
        arguments.beams,
        arguments.length_penalty,
        # Set off from the prompt like any word.
        tuple(f" {choice.strip()}" for choice in arguments.choices),
        arguments.measure,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m magma_jax.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help=f"image, folder or text (no text: {DEFAULT_PROMPT!r})")
    add("--checkpoint", required=True, help="run folder, converted model folder or PyTorch checkpoint")
    add("--dtype", help="of weights and activations, such as bfloat16")
    add("--no-program-cache", action="store_true", help="compile anew, whatever earlier runs have kept")
    add("--together", action="store_true", help="all inputs are one prompt, also several images and one text")
    add("--max-new-tokens", type=int, default=32, help="default: %(default)s")
    add("--stream", action="store_true", help="show the answer while it is drawn")
    add("--output", type=Path, metavar="FILE.jsonl", help="one JSON line an image; an interrupted run is continued")
    drawing = parser.add_argument_group("drawing")
    add = drawing.add_argument
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    add("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0 for all (default)")
    add("--top-p", type=float, default=1.0, help="draw from likely tokens of this mass; 1 for all (default)")
    add("--min-p", type=float, default=0.0, help="drop tokens below this share of the likeliest; 0 for none (default)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: say less twice; default: %(default)s")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be given several times")
    add("--seed", type=int, default=0, help="of the first answer, the next ones have the next; default: %(default)s")
    add("--n", type=int, default=1, help="answers to every prompt; default: %(default)s")
    whole = parser.add_argument_group("comparing whole answers")
    add = whole.add_argument
    add("--beams", type=int, default=0, help="search the likeliest answer with so many beginnings")
    add("--length-penalty", type=float, default=1.0, help="of beams: 0 prefers short answers; default: %(default)s")
    add("--choices", nargs="+", default=[], metavar="ANSWER", help="choose among these and print their shares")
    add("--measure", choices=["sum", "mean"], default="sum", help="of choices: whole probability, or mean per token")
    seen = parser.add_argument_group("attention")
    add = seen.add_argument
    add("--attention", type=Path, metavar="OUT.png", help="draw where each word looked")
    add("--layer", type=int, help="one layer, from 0; default: rollout through all")
    add("--head", type=int, help="one head of that layer, from 0; default: their mean")
    add("--relative", action="store_true", help="compared with the other words of the answer")
    return parser


def _one_line(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        error = ValueError(f"{error.filename}: no such file")
    return error_line(error)


if __name__ == "__main__":
    sys.exit(main())
