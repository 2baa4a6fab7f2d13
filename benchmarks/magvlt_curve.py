"""Figures of a MAGVLT run at every checkpoint that it kept, as a table and a chart.

    python train.py --config configs/magvlt_quickstart.py --set keep_checkpoints=20
    python benchmarks/magvlt_curve.py runs/magvlt_quickstart --limit 100 --output docs/magvlt_curve.png

Of each checkpoint the drawings and the texts of ``limit`` held-out drawings are judged, as by eval.py. The time is that
of the training steps alone, without compilation, from ``metrics.jsonl``.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from magma_jax.data.datasets import load_dataset, read_stored_config
from magma_jax.evaluation.drawing_run import read_settings
from magma_jax.evaluation.drawings import DrawingJudge
from magma_jax.evaluation.features import efficientnet_features
from magma_jax.evaluation.tables import text_table
from magma_jax.evaluation.tasks.examples import spaced
from magma_jax.families.magvlt.evaluating.settings import EvaluationSettings, describe, draw
from magma_jax.families.magvlt.generator import Magvlt
from magma_jax.storage.model_folder import read_model_json
from magma_jax.training.checkpoints.checkpoint import CHECKPOINTS
from magma_jax.training.monitor.writers import read_lines

NAMES = ("exact", "concept", "tone", "gender", "captions")
COLOURS = ("#1f63c4", "#1a7f47", "#b3352b", "#8a6100", "#6b3fa0")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 420, 60, 20, 130, 50


def at_step(workdir: Path, step: int, folder: Path) -> Path:
    """A run folder that holds one checkpoint of ``workdir``."""
    folder.mkdir()
    (folder / CHECKPOINTS).mkdir()
    for entry in workdir.iterdir():
        if entry.name != CHECKPOINTS:
            (folder / entry.name).symlink_to(entry.resolve())
    (folder / CHECKPOINTS / str(step)).symlink_to((workdir / CHECKPOINTS / str(step)).resolve())
    return folder


def chart(points: list[dict[str, float]]) -> Image.Image:
    """Percent over minutes of training."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    longest = max(point["minutes"] for point in points)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(minutes: float, percent: float) -> tuple[float, float]:
        return LEFT + width * minutes / longest, TOP + height * (1 - percent / 100)

    for percent in range(0, 101, 20):
        pen.line([place(0, percent), place(longest, percent)], fill="#dfe3e7")
        pen.text((LEFT - 10, place(0, percent)[1]), f"{percent} %", fill="#5b646d", anchor="rm")
    for minutes in np.arange(0, longest + 0.01, 5 if longest > 12 else 1):
        pen.text((place(minutes, 0)[0], HEIGHT - BOTTOM + 8), f"{minutes:.0f}", fill="#5b646d", anchor="mt")
    pen.text((LEFT + width / 2, HEIGHT - 8), "minutes of training", fill="#5b646d", anchor="mb")
    ends = []
    for name, colour in zip(NAMES, COLOURS, strict=True):
        line = [place(0, 0), *(place(point["minutes"], point[name]) for point in points)]
        pen.line(line, fill=colour, width=3, joint="curve")
        ends.append([line[-1][1], name, colour])
    # Names must not lie on each other.
    above = -20.0
    for y, name, colour in sorted(ends):
        above = max(y, above + 16)
        pen.text((LEFT + width + 10, above), name, fill=colour, anchor="lm")
    return image


def main() -> None:
    """Prints the table and writes the chart and its numbers."""
    parser = argparse.ArgumentParser(description="Figures of a MAGVLT run at every checkpoint that it kept.")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--limit", type=int, default=100, help="held-out drawings; default: %(default)s")
    parser.add_argument("--steps", type=int, nargs="*", help="checkpoints; default: all")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the sampler")
    parser.add_argument("--output", type=Path, default=Path("curve.png"), help="default: %(default)s")
    arguments = parser.parse_args()
    dataset = load_dataset(read_stored_config(read_model_json(arguments.workdir)["run"]["data"]))
    images, samples = np.asarray(dataset.images), dataset.evaluation["test"]
    rows = [int(samples[i].image) for i in spaced(len(samples), arguments.limit)]
    texts = [dataset.records[row].caption for row in rows]
    judge = DrawingJudge(dataset.records, images, efficientnet_features)
    lines, _ = read_lines(arguments.workdir / "metrics.jsonl")
    seconds = {line["step"]: line["seconds"] for line in lines if "seconds" in line}
    settings = read_settings(EvaluationSettings(), arguments.set)
    kept = sorted(int(folder.name) for folder in (arguments.workdir / CHECKPOINTS).iterdir() if folder.name.isdigit())
    points: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for step in arguments.steps or kept:
            model = Magvlt.from_checkpoint(at_step(arguments.workdir, step, Path(temporary) / str(step)))
            codes = draw(model, texts, settings)
            drawn = np.stack([np.asarray(image) for image in model.decode(codes)])
            assert model.image_tokenizer is not None  # a run on images has one
            said, _ = describe(model, model.image_tokenizer.encode(images[rows]), settings)
            right = np.mean([a == b for a, b in zip(said, texts, strict=True)])
            shares = judge.judge(drawn, rows).shares() | {"captions": float(right)}
            nearest = max(seconds, key=lambda known: (known <= step, known))
            point = {"step": step, "minutes": seconds[nearest] / 60} | {name: 100 * shares[name] for name in NAMES}
            points.append(point)
            print(json.dumps({name: round(value, 1) for name, value in point.items()}), flush=True)
    points.sort(key=lambda point: point["step"])
    print(text_table([list(points[0]), *([f"{value:.1f}" for value in point.values()] for point in points)]))
    chart(points).save(arguments.output)


if __name__ == "__main__":
    main()
