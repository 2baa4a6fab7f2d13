"""MAGVLT and its autoregressive baseline ARGVLT: passes, images and captions a second, in turns; prints JSON.

    python benchmarks/argvlt.py
    python benchmarks/argvlt.py --checkpoints runs/magvlt_quickstart runs/argvlt_quickstart

Without checkpoints both models are random and of equal size; a text then has as many tokens as there are positions.
With a run of each, of equal data, the figures are of these models, and quality stands beside them: the judge of
OpenMoji drawings (``evaluation.drawings``) on held-out names, and the share of held-out drawings whose caption is the
true one.
Every time is the best of several rounds, and filters of the likeliest tokens are off, since only sorting would be
measured with them.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Steps of the released samplers.
IMAGE_STEPS, TEXT_STEPS = 10, 12


def main() -> None:
    """Reads the command line, times both models in turns, prints JSON."""
    parser = argparse.ArgumentParser(description="MAGVLT beside ARGVLT: passes, images and captions a second, as JSON.")
    parser.add_argument("--batch", type=int, default=8, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--layers", type=int, default=6, help="of the random models; default %(default)s")
    parser.add_argument("--width", type=int, default=256, help="of the random models; default %(default)s")
    parser.add_argument("--text-positions", type=int, default=64, help="of the random models; default %(default)s")
    parser.add_argument("--checkpoints", nargs=2, metavar=("MAGVLT", "ARGVLT"), help="a run of each")
    parser.add_argument("--samples", type=int, default=64, help="held-out drawings for quality; default %(default)s")
    arguments = parser.parse_args()
    models = _opened(arguments)
    tasks = {
        (name, task): _task(model, task, arguments.batch)
        for name, model in models.items()
        for task in ("image", "text")
    }
    for task in tasks.values():
        task()  # compiles
    best = dict.fromkeys(tasks, float("inf"))
    for _ in range(arguments.rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            best[name] = min(best[name], time.perf_counter() - start)
    results: dict[str, Any] = {"batch": arguments.batch, "rounds": arguments.rounds}
    for name, model in models.items():
        config, causal = model.config, model.config.causal
        results[name] = {
            "parameters": sum(leaf.size for leaf in model.model.params.values()),
            "passes_per_image": config.image_positions if causal else IMAGE_STEPS,
            # Of these one predicts the length.
            "passes_per_caption": config.text_positions if causal else TEXT_STEPS + 1,
            "images_per_second": round(arguments.batch / best[name, "image"], 3),
            "captions_per_second": round(arguments.batch / best[name, "text"], 3),
        }
        if arguments.checkpoints:
            results[name] |= _quality(model, arguments.checkpoints[0], arguments.samples)
    for kind in ("images", "captions"):
        rates = [results[name][f"{kind}_per_second"] for name in ("magvlt", "argvlt")]
        results[f"ratio_{kind}"] = round(rates[0] / rates[1], 2)
    print(json.dumps(results, indent=2))


def _opened(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both models, by name."""
    from magma_jax import Magvlt

    if arguments.checkpoints:
        models: dict[str, Any] = {}
        for name, path in zip(("magvlt", "argvlt"), arguments.checkpoints, strict=True):
            models[name] = Magvlt.from_checkpoint(path)
            if models[name].config.causal != (name == "argvlt"):
                raise SystemExit(f"--checkpoints: {path} is no run of {name}")
        return models
    import jax
    from flax import nnx

    from magma_jax.data.tokenizers.clip_bpe import clip_bpe
    from magma_jax.models.magvlt.config import MagvltConfig
    from magma_jax.models.magvlt.model import MagvltModel
    from magma_jax.nn.modules import split

    sizes = {"layers": arguments.layers, "width": arguments.width, "heads": max(1, arguments.width // 64)}
    found = {}
    for name in ("magvlt", "argvlt"):
        config = MagvltConfig(**sizes, text_positions=arguments.text_positions, causal=name == "argvlt")
        params = jax.jit(lambda config=config: split(MagvltModel(config, rngs=nnx.Rngs(0)))[1])()
        found[name] = Magvlt(config, params, clip_bpe())
    return found


def _task(model: Any, task: str, batch: int) -> Callable[[], Any]:
    """A function that draws images of texts, or describes images; both are random."""
    import jax
    import numpy as np

    from magma_jax.families.magvlt.decoding.image import text_to_image
    from magma_jax.families.magvlt.decoding.next_token import draw_codes, write_texts
    from magma_jax.families.magvlt.decoding.text import image_to_text
    from magma_jax.inference.decoding.config import SamplingConfig
    from magma_jax.inference.decoding.sampling import sampling_rows

    config, rng, keys = model.config, np.random.default_rng(0), jax.random.split(jax.random.key(0), batch)
    sampling = sampling_rows([SamplingConfig(temperature=1.0)] * batch)
    image = rng.integers(0, config.image_rows, (batch, config.image_positions))
    text = rng.integers(0, config.text_rows - 2, (batch, config.text_positions))
    lengths = np.full(batch, config.text_positions)
    if task == "image":
        draw = draw_codes if config.causal else text_to_image
        return lambda: np.asarray(draw(model.model, text, lengths, keys).tokens)
    if config.causal:
        return lambda: np.asarray(write_texts(model.model, image, keys, sampling).tokens)
    return lambda: np.asarray(image_to_text(model.model, image, keys, sampling)[0].tokens)


def _quality(model: Any, run: str, count: int) -> dict[str, Any]:
    """Held-out drawings and captions, each the first; in per cent."""
    import numpy as np
    from PIL import Image

    from magma_jax import ImageInput
    from magma_jax.data.datasets import load_dataset, read_stored_config
    from magma_jax.evaluation.drawings import DrawingJudge
    from magma_jax.evaluation.features import efficientnet_features
    from magma_jax.evaluation.tasks.examples import spaced
    from magma_jax.inference.answers import ImageOptions
    from magma_jax.storage.model_folder import read_model_json

    dataset = load_dataset(read_stored_config(read_model_json(Path(run))["run"]["data"]))
    assert isinstance(dataset.images, np.ndarray)  # of OpenMoji, in memory
    judge = DrawingJudge(dataset.records, dataset.images, efficientnet_features)
    held_out = dataset.evaluation["test"]
    samples = [held_out[row] for row in spaced(len(held_out), count)]
    truths, rows = [sample.answer.strip() for sample in samples], [int(sample.image) for sample in samples]
    drawn = [model.draw([truth], ImageOptions()).images[0] for truth in truths]
    verdict = judge.judge(np.stack([np.asarray(image) for image in drawn]), rows)
    said = [model.caption(ImageInput(Image.fromarray(dataset.images[row])))[0] for row in rows]
    shares = {"exact": verdict.exact, "concept": verdict.concept, "tone": verdict.tone}
    shares["caption_exact"] = np.array([found.strip() == truth for found, truth in zip(said, truths, strict=True)])
    return {"samples": count} | {name: round(100 * float(share.mean()), 1) for name, share in shares.items()}


if __name__ == "__main__":
    main()
