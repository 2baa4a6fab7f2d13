"""Samples during training: drawings of fixed texts, and texts of fixed images."""

import io

import jax
import numpy as np
from PIL import Image

from magma_jax.config import ConfigError
from magma_jax.data.images import ImageInput
from magma_jax.evaluation.report.cards import Card, Line, draw_cards
from magma_jax.families.magvlt.generator import Magvlt
from magma_jax.inference.answers import AnswerOptions, ImageOptions
from magma_jax.output import replace_file
from magma_jax.training.monitor.writers import append_line, cut_after
from magma_jax.training.run.setup import Run
from magma_jax.typing import Params, UInt8

SAMPLES = "samples"
SAMPLES_FILE = "samples.jsonl"


class Panel:
    """Draws the texts of fixed samples, describes their images, and writes both to the run folder.

    ``samples/000200.png`` shows drawing and image of each sample after step 200, and ``samples.jsonl`` has one line per
    sample: ``step``, ``image`` (its row), ``truth``, ``said``.

    Args:
        run: the run.
        writing: whether this process writes the files.

    Raises:
        ConfigError: the dataset has no images in the split, the model has no image tokenizer, or the run has several
            processes.
    """

    def __init__(self, run: Run, *, writing: bool):
        watch, dataset = run.config.watch, run.dataset
        samples = dataset.evaluation.get(watch.samples_split, [])
        if dataset.images is None or run.config.model.tokenizer is None or not len(samples):
            splits = ", ".join(name for name, members in dataset.evaluation.items() if len(members)) or "none"
            raise ConfigError(
                f"watch.samples_every: no images to describe in split {watch.samples_split!r} (splits: {splits}); set "
                "watch.samples_split, or watch.samples_every=0"
            )
        if jax.process_count() > 1:
            raise ConfigError("watch.samples_every: samples are drawn by runs of one process; set it to 0")
        self._run, self._writing = run, writing
        rows = np.unique(np.linspace(0, len(samples) - 1, watch.samples).astype(int))
        self._samples = [samples[row] for row in rows.tolist()]
        if writing:
            cut_after(run.workdir / SAMPLES_FILE, int(run.state.step))

    def __call__(self, step: int, params: Params) -> UInt8[np.ndarray, "H W 3"]:
        """Draws and describes with ``params`` and returns an image of the results."""
        dataset = self._run.dataset
        assert dataset.images is not None  # only images are sampled
        model = Magvlt(self._run.config.model, dict(params), dataset.tokenizer)
        cards = []
        for sample in self._samples:
            truth, pixels = sample.answer.strip(), np.asarray(dataset.images[int(sample.image)])
            drawn = model.draw([truth], ImageOptions()).images[0]
            (said,) = model.write(ImageInput(Image.fromarray(pixels)), None, AnswerOptions())
            cards += [Card(np.asarray(drawn), [Line(truth, truth, "drawn:")]), Card(pixels, [Line(said.text, truth)])]
            if self._writing:
                line = {"step": step, "image": int(sample.image), "truth": truth, "said": said.text}
                append_line(self._run.workdir / SAMPLES_FILE, line)
        panel = draw_cards(cards)
        if self._writing:
            folder = self._run.workdir / SAMPLES
            folder.mkdir(exist_ok=True)
            file = io.BytesIO()
            Image.fromarray(panel).save(file, "PNG")
            replace_file(folder / f"{step:06d}.png", file.getvalue())
        return panel
