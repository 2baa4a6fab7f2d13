"""Samples during training: the model's captions and answers for a fixed set of images."""

import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from magma_jax.config import ConfigError
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.evaluation.report.cards import Card, Line, draw_cards
from magma_jax.evaluation.results.results import CAPTION, question_of
from magma_jax.evaluation.tasks.batched_generate import answer_batch
from magma_jax.families.magma.image_features import features_are_fixed
from magma_jax.families.magma.images import image_spec
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.image_features import encode_all
from magma_jax.inference.prompts import lay_out, pad_layouts
from magma_jax.output import replace_file
from magma_jax.runtime.sharding import batch_shards
from magma_jax.training.monitor.writers import append_line, cut_after
from magma_jax.training.run.setup import Run
from magma_jax.typing import Params, UInt8

SAMPLES = "samples"
SAMPLES_FILE = "samples.jsonl"
LOOKED_THROUGH = 4096


class Sampler:
    """Generates answers for fixed samples of a run, and writes them to the run folder as an image and as text.

    ``samples/000200.png`` shows the answers after step 200, and ``samples.jsonl`` has one line per answer: ``step``,
    ``image`` (its row), ``kind``, ``prompt``, ``truth``, ``said``.

    Args:
        run: the run that is sampled from.
        writing: whether this process writes the files.

    Raises:
        ConfigError: the dataset has no such split or no images, or answers might not fit the model's context.
    """

    def __init__(self, run: Run, *, writing: bool):
        watch, dataset, model = run.config.watch, run.dataset, run.config.model
        samples = dataset.evaluation.get(watch.samples_split, [])
        if dataset.images is None or not samples:
            splits = ", ".join(name for name, members in dataset.evaluation.items() if members) or "none"
            raise ConfigError(
                f"watch.samples_every: the dataset has no images in a split {watch.samples_split!r} "
                f"(its splits: {splits}); set watch.samples_split, or watch.samples_every=0"
            )
        self._run, self._writing = run, writing
        self._features: np.ndarray | None = None
        self._samples = choose(samples, watch.samples)
        self._rows = sorted({int(sample.image) for sample in self._samples})
        positions = image_spec(model).positions
        # The rows are sharded over devices, so the last one is repeated until they divide evenly.
        self._asked = self._samples + self._samples[-1:] * (-len(self._samples) % batch_shards(run.program.mesh))
        assert isinstance(dataset.tokenizer, Tokenizer)  # of a language model
        prompts = [lay_out((int(s.image), s.prompt), dataset.tokenizer, positions) for s in self._asked]
        longest = max(len(prompt) for prompt in prompts)
        if longest + watch.samples_tokens > model.lm.context_length:
            raise ConfigError(
                f"watch.samples_tokens: image, prompt and {watch.samples_tokens} new tokens take "
                f"{longest + watch.samples_tokens} positions, but the context holds {model.lm.context_length}; lower it"
            )
        self._prompts = pad_layouts(prompts, longest) | {"numbers": np.arange(len(prompts), dtype=np.int32)}
        if writing:
            cut_after(run.workdir / SAMPLES_FILE, int(run.state.step))

    def __call__(self, step: int, params: Params) -> UInt8[np.ndarray, "H W 3"]:
        """Generates answers with ``params`` and returns an image of them."""
        run = self._run
        assert run.dataset.images is not None  # only image datasets are sampled
        tokenizer, images = run.dataset.tokenizer, run.dataset.images[self._rows]
        assert isinstance(tokenizer, Tokenizer)  # pairs alone have others
        features = self._features
        if features is None:
            # A frozen encoder's features come from the program that encoded the training images.
            fixed = features_are_fixed(run.program)
            sizes = {} if fixed else {"batch_size": len(images)}
            features = encode_all(images, run.program.graphdef, params, run.program.mesh, **sizes, progress=False)
            self._features = features if fixed else None
        shown = features[[self._rows.index(int(sample.image)) for sample in self._asked]]
        tokens, lengths = answer_batch(
            run.program.graphdef,
            params,
            self._prompts | {"features": shown[:, None]},
            np.uint32(0),  # seed; unused by greedy decoding
            None,
            sampling=SamplingConfig(),
            max_new_tokens=run.config.watch.samples_tokens,
            ends=tokenizer.end_ids,
            mesh=run.program.mesh,
        )
        said = [
            tokenizer.decode(row[:length].tolist()).strip()
            for row, length in zip(np.asarray(tokens), np.asarray(lengths), strict=True)
        ][: len(self._samples)]
        image = draw_cards(self._cards(said))
        if self._writing:
            self._write(step, image, said)
        return image

    def _cards(self, said: Sequence[str]) -> list[Card]:
        lines: dict[int, list[Line]] = defaultdict(list)
        for sample, text in zip(self._samples, said, strict=True):
            lines[int(sample.image)].append(Line(text, sample.answer.strip(), question_of(sample)))
        shown = self._run.dataset.images
        assert shown is not None  # only image datasets are sampled
        return [Card(shown[row], members) for row, members in lines.items()]

    def _write(self, step: int, image: UInt8[np.ndarray, "H W 3"], said: Sequence[str]) -> None:
        folder = self._run.workdir / SAMPLES
        folder.mkdir(exist_ok=True)
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        replace_file(folder / f"{step:06d}.png", file.getvalue())
        for sample, text in zip(self._samples, said, strict=True):
            line = {"step": step, "picture": int(sample.image), "kind": sample.kind, "prompt": sample.prompt}
            append_line(self._run.workdir / SAMPLES_FILE, line | {"truth": sample.answer.strip(), "said": text})


def choose(samples: Sequence[Any], images: int) -> list[Any]:
    """A caption and a question for up to ``images`` evenly spaced images.

    Questions of an image are taken in rotation, so that all kinds occur.
    """
    captions: dict[int, Any] = {}
    questions: dict[int, list[Any]] = defaultdict(list)
    # A large split is subsampled to some thousands: choosing samples should not read all of it.
    step = max(1, len(samples) // LOOKED_THROUGH)
    for sample in (samples[row] for row in range(0, len(samples), step)):
        if sample.image is None:
            continue
        if sample.kind == CAPTION:
            captions.setdefault(int(sample.image), sample)
        else:
            questions[int(sample.image)].append(sample)
    rows = sorted(set(captions) | set(questions))
    count = min(images, len(rows))
    chosen = []
    for i in range(count):
        row = rows[i * len(rows) // count]
        chosen += [captions[row]] if row in captions else []
        chosen += [questions[row][i % len(questions[row])]] if row in questions else []
    return chosen
