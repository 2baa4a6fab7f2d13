"""Implementation of ``python -m magma_jax.generate``."""

import argparse
import collections
import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from magma_jax.data.decoders import Decoders
from magma_jax.data.images import ImageInput
from magma_jax.data.time_limit import OWN_SECONDS
from magma_jax.families import open_generator, open_token_generator
from magma_jax.generate import DEFAULT_PROMPT
from magma_jax.generate.questions import Question, read_inputs
from magma_jax.inference.answer_file import answer_file
from magma_jax.inference.answers import Answer, AnswerOptions
from magma_jax.inference.asker import Asker
from magma_jax.inference.attention_maps import attention_maps, check_head
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.generator import Generator
from magma_jax.output import error_line, printable, replace_file
from magma_jax.runtime.compile import enable_compilation_cache


def run(arguments: argparse.Namespace) -> int:
    """Prints or writes the answers; returns 1 if some images could not be read.

    Raises:
        ValueError, OSError, FailedError: one line that says what is wrong.
    """
    enable_compilation_cache(not arguments.no_program_cache)
    options = _options(arguments)
    if arguments.prompt is not None:
        arguments.inputs = [*arguments.inputs, arguments.prompt]
    questions = read_inputs(arguments.inputs, together=arguments.together)
    _check(arguments, questions)
    if arguments.output:
        return _to_file(arguments, questions, options)
    _print_answers(arguments, questions, options)
    return 0


def _check(arguments: argparse.Namespace, questions: list[Question]) -> None:
    """Raises ValueError for incompatible options, before weights are read."""
    one = len(questions) == 1 and arguments.n == 1
    if (arguments.stream or arguments.attention) and (not one or arguments.output):
        raise ValueError("--stream and --attention are for one prompt and one answer, without --output")
    if arguments.stream and (arguments.beams or arguments.choices):
        raise ValueError("--stream shows an answer while it is sampled; leave out --beams and --choices")
    if arguments.head is not None and arguments.layer is None:
        raise ValueError(f"head {arguments.head} of which layer? give layer too")
    if (arguments.layer is not None or arguments.relative) and not arguments.attention:
        raise ValueError("--layer, --head and --relative say what --attention draws; give --attention OUT.png")
    if arguments.attention:
        if arguments.attention.suffix.lower() != ".png":
            raise ValueError(f"--attention {arguments.attention}: give a name that ends in .png")
        images = questions[0].images
        if any(os.path.realpath(image) == os.path.realpath(arguments.attention) for image in images):
            raise ValueError(f"--attention {arguments.attention}: is one of the inputs; give another name")
        if not arguments.attention.absolute().parent.is_dir():
            raise ValueError(f"--attention {arguments.attention}: no such folder; make it first")
        if not images:
            raise ValueError("--attention needs an image to look at")
    if not arguments.output and any(os.path.isdir(text) for text in arguments.inputs if "\0" not in text):
        raise ValueError("a folder needs --output FILE.jsonl")


def _print_answers(arguments: argparse.Namespace, questions: list[Question], options: AnswerOptions) -> None:
    # Before the weights are read, so that a bad image is reported at once.
    with _decoders() as decoders:
        prompts = [question.prompt(decoders) for question in questions]
    if not (arguments.stream or arguments.attention):
        model = _open(arguments)
        answers = model.answers((_asked(model, prompt) for prompt in prompts), options, count=len(prompts))
        for question, found in zip(questions, answers, strict=True):
            for answer in found:
                print(printable(_line(question, answer)))
        return
    model = open_token_generator(arguments.checkpoint, dtype=arguments.dtype)
    check_head(model.lm_config.layers, model.lm_config.heads, arguments.layer, arguments.head)
    with Asker(model, options, prompts[0]) as asker:
        if arguments.stream:
            tokens = _stream(asker, prompts[0])
        else:
            (answer,) = asker.ask(prompts[0])()
            print(printable(_line(questions[0], answer)))
            tokens = answer.tokens
    if arguments.attention:
        seen = attention_maps(model, prompts[0], tokens)
        buffer = io.BytesIO()
        which = {"layer": arguments.layer, "head": arguments.head, "relative": arguments.relative}
        seen.sheet(**which).save(buffer, "PNG")
        replace_file(arguments.attention, buffer.getvalue())
        if seen.grid is not None and seen.grid.note:
            print(printable(f"note: {seen.grid.note}"), file=sys.stderr)


def _open(arguments: argparse.Namespace) -> Generator:
    model = open_generator(arguments.checkpoint, dtype=arguments.dtype)
    if "text" not in model.makes:
        made = ", ".join(sorted(model.makes)) or "nothing that a prompt asks for"
        raise ValueError(
            f"{arguments.checkpoint}: this model makes {made}, no text; give a checkpoint of one that does"
        )
    return model


def _asked(model: Generator, prompt: list[str | ImageInput]) -> list[str | ImageInput]:
    """The prompt, with the default text replaced by the model's own, if it has one; an empty one is left out."""
    own = getattr(model, "default_prompt", DEFAULT_PROMPT)
    if own == DEFAULT_PROMPT or prompt[-1] != DEFAULT_PROMPT:
        return prompt
    return [*prompt[:-1], *([own] if own else [])]


def _decoders() -> Decoders:
    return Decoders(1, seconds=OWN_SECONDS)


def _stream(asker: Asker, prompt: list[str | ImageInput]) -> tuple[int, ...]:
    """Prints an answer while it is generated; returns its tokens."""
    (ticket,) = asker.tickets(prompt)
    begun = False
    for piece in ticket:
        text = piece.text if begun else piece.text.lstrip()
        begun = begun or bool(text)
        # As in a whole answer, white space is normalised, but line breaks are kept.
        print(printable(re.sub(r"[^\S\n]", " ", text)), end="", flush=True)
    print()
    return tuple(ticket.tokens)


def _to_file(arguments: argparse.Namespace, questions: list[Question], options: AnswerOptions) -> int:
    """One JSON line an image; returns 1 if some images could not be read."""
    settings = {"checkpoint": arguments.checkpoint, "dtype": arguments.dtype} | dataclasses.asdict(options)
    failed = 0
    with answer_file(arguments.output, settings | {"prompt": questions[0].text}) as file:
        left = [question for question in questions if question.shown_name not in file.done]
        progress = tqdm(total=len(questions), initial=len(questions) - len(left), unit="image", disable=None)
        # Questions whose images were read but whose line is not written yet, with their error, if any.
        begun: collections.deque[tuple[Question, str | None]] = collections.deque()

        def prompts(decoders: Decoders) -> Iterator[list[str | ImageInput]]:
            for question in left:
                try:
                    prompt = question.prompt(decoders)
                except (ValueError, OSError) as error:
                    begun.append((question, error_line(error)))
                    continue
                begun.append((question, None))
                yield prompt

        def write(question: Question, record: dict[str, Any]) -> None:
            file.write({"picture": question.shown_name, "prompt": question.text} | record)
            progress.update()

        def write_failed() -> int:
            count = 0
            while begun and begun[0][1] is not None:
                question, reason = begun.popleft()
                write(question, {"error": reason})
                count += 1
            return count

        with contextlib.closing(progress), contextlib.ExitStack() as stack:
            if left:
                asked = prompts(stack.enter_context(_decoders()))
                model = _open(arguments)
                asked = (_asked(model, prompt) for prompt in asked)
                for found in model.answers(asked, options, count=len(left)):
                    failed += write_failed()
                    write(begun.popleft()[0], _record(found))
                failed += write_failed()
    if failed:
        print(f"{failed} of {len(left)} images could not be read; their lines say why", file=sys.stderr)
    return 1 if failed else 0


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
    return (text if question.name is None else f"{question.shown_name}: {text}") + share


def _options(arguments: argparse.Namespace) -> AnswerOptions:
    if any(not choice.strip() for choice in arguments.choices):
        raise ValueError("--choices: an empty answer cannot be chosen; leave it out")
    return AnswerOptions(
        max_new_tokens=arguments.max_new_tokens,
        sampling=SamplingConfig(
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            repetition_penalty=arguments.repetition_penalty,
        ),
        seed=arguments.seed,
        n=arguments.n,
        stop=tuple(arguments.stop),
        beams=arguments.beams,
        length_penalty=arguments.length_penalty,
        # Separated from the prompt by a space, like any word.
        choices=tuple(f" {choice.strip()}" for choice in arguments.choices),
        measure=arguments.measure,
    )
