"""Time, memory and compile time of one training step of a mid-size MAGMA, as JSON.

    python benchmarks/train_step.py                      # without and with rematerialisation
    python benchmarks/train_step.py --torch              # compared with the same step in PyTorch, taking turns
    python benchmarks/train_step.py --against ../before  # compared with another checkout of this repository

The model: GPT-J with 6 layers of width 1024 and 16 heads (rotary over all 64 features of a head, feed-forward 4096, the
published vocabulary of 50,258 and 50,400 rows), an RN50 encoder at 224 pixels (49 positions), adapters after every
MLP with a quarter of the width, batch 4, 256 positions (49 of the image, 207 of text), fp32. The language model is
frozen; encoder, prefix and adapters learn, with gradient clipping and Adam. All pixels and tokens are random.

Every variant runs in its own process, so that peak memory is measured separately. They take turns, one step each, so
that other load on the machine slows them equally; the minimum is the least disturbed figure. ``cpu_seconds`` is the
time of all threads. The first step after compilation is not counted.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import turns

LAYERS, WIDTH, HEADS, FEED_FORWARD = 6, 1024, 16, 4096
VOCAB_ROWS, HEAD_ROWS = 50258, 50400
BATCH, POSITIONS, IMAGE_SIZE, IMAGE_POSITIONS = 4, 256, 224, 49
ENCODER_RATE, RATE, CLIP_NORM = 2e-6, 8e-4, 1.0


def main() -> None:
    """Reads the command line, runs the variants and prints JSON."""
    parser = argparse.ArgumentParser(description="Time, memory and compile time of a mid-size training step, as JSON.")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed (default %(default)s)")
    parser.add_argument("--remat", nargs="*", default=["none", "full"], choices=["none", "dots", "full"])
    parser.add_argument("--batch-norm", default="batch", choices=["batch", "frozen"])
    parser.add_argument("--torch", action="store_true", help="also time PyTorch (needs torch and transformers)")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="also time that of another checkout")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="PyTorch's (default: all, as XLA uses)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments)
        return
    results: dict[str, Any] = {"model": (__doc__ or "").split("\n\n")[2].replace("\n", " ")}
    for remat in arguments.remat:
        names = [f"jax-{remat}"] + [f"torch-{remat}"] * arguments.torch
        names += [f"against-{remat}"] * (arguments.against is not None)
        results |= _take_turns(names, arguments)
        if arguments.against:
            now, then = (results[f"{who}-{remat}"]["seconds_min"] for who in ("jax", "against"))
            results[f"ratio-against-{remat}"] = round(now / then, 3)
        if arguments.torch:
            ours, theirs = (results[name]["seconds_min"] for name in names)
            results[f"ratio-{remat}"] = round(ours / theirs, 3)
    print(json.dumps(results, indent=2))


def _take_turns(names: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    options = ["--batch-norm", arguments.batch_norm, "--threads", str(arguments.threads)]
    workers, results = {}, {}
    for name in names:  # sequentially, so that compile times are undisturbed
        checkout = arguments.against if name.startswith("against") else None
        workers[name] = turns.start(__file__, name.replace("against", "jax"), options, checkout)
        results[name] = turns.ask(workers[name], "prepare")
    steps = [{name: turns.ask(worker, "step") for name, worker in workers.items()} for _ in range(arguments.steps)]
    for name, worker in workers.items():
        seconds = [step[name]["seconds"] for step in steps]
        results[name] |= {
            "seconds_median": round(statistics.median(seconds), 3),
            "seconds_min": round(min(seconds), 3),
            "cpu_seconds": round(statistics.median(step[name]["cpu_seconds"] for step in steps), 3),
            "losses": [step[name]["loss"] for step in steps],
            "peak_gigabytes": turns.end(worker),
        }
    return results


def _work(arguments: argparse.Namespace) -> None:
    framework, remat = arguments.worker.split("-")
    step: Callable[[], float]  # set by prepare

    def prepare() -> dict[str, Any]:
        nonlocal step
        if framework == "jax":
            step, answer = _jax_step(remat, arguments.batch_norm)
        else:
            import torch_reference

            step, answer = torch_reference.make_step(remat, arguments.batch_norm, arguments.threads)
        step()
        return answer

    def timed_step() -> dict[str, float]:
        start, cpu = time.perf_counter(), time.process_time()
        loss = step()
        return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "loss": loss}

    turns.answer({"prepare": prepare, "step": timed_step})


def _jax_step(remat: str, batch_norm: str) -> tuple[Callable[[], float], dict[str, Any]]:
    import functools

    import jax
    import numpy as np
    from flax import nnx

    from magma_jax.config import from_dict
    from magma_jax.families.magma import MAGMA
    from magma_jax.families.magma.loss import caption_loss
    from magma_jax.models.language.gptj import GPTJConfig
    from magma_jax.models.magma import MagmaConfig, MagmaModel
    from magma_jax.models.vision.clip_resnet import CLIP_RESNETS
    from magma_jax.nn.adapters import AdapterConfig
    from magma_jax.nn.modules import abstract, split
    from magma_jax.runtime.compile import compiler_options, trim_after_compile
    from magma_jax.training.step.optim import (
        Group,
        OptimConfig,
        label_parameters,
        make_optimizer,
        partition,
        with_groups,
    )
    from magma_jax.training.step.options import LossOptions
    from magma_jax.training.step.train_step import init_state, make_train_step

    lm = GPTJConfig(LAYERS, WIDTH, HEADS, WIDTH // HEADS, FEED_FORWARD, VOCAB_ROWS, HEAD_ROWS)
    config = MagmaConfig(lm, CLIP_RESNETS["RN50"], mlp_adapter=AdapterConfig(downsample_factor=4))
    groups: dict[str, Group | Literal["frozen"]] = {"encoder": Group(learning_rate=ENCODER_RATE)}
    optim = OptimConfig(learning_rate=RATE, schedule="constant", b2=0.95, clip_norm=CLIP_NORM, groups=groups)
    optim = with_groups(optim, MAGMA.roles(config))

    def create():
        return MagmaModel(config, rngs=nnx.Rngs(0))

    graphdef, _, types = abstract(create)
    labels = label_parameters(types, optim.groups)
    optimizer = make_optimizer(optim, labels)  # no weight decay, so no paths to exempt
    trainable, frozen, averages = partition(jax.jit(lambda: split(create())[1])(), labels)
    state = jax.jit(functools.partial(init_state, optimizer=optimizer))(trainable, averages)
    del trainable, averages  # the step donates the state, so nothing else may hold its arrays
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB_ROWS, (BATCH, POSITIONS - IMAGE_POSITIONS + 1), np.int32)
    images = rng.standard_normal((BATCH, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    batch = {"tokens": tokens, "labels": tokens, "images": images}
    key = jax.random.key(0)

    loss = functools.partial(caption_loss, options=from_dict(LossOptions, {"batch_norm": batch_norm, "remat": remat}))
    options = compiler_options(jax.default_backend())
    function = jax.jit(make_train_step(graphdef, loss, optimizer), donate_argnums=0, compiler_options=options)
    trim_after_compile()  # as the training loop does
    start = time.perf_counter()
    compiled = function.lower(state, frozen, batch, key).compile()
    compile_seconds = round(time.perf_counter() - start, 1)

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, frozen, batch, key)
        return float(metrics["loss"])

    return step, {"compile_seconds": compile_seconds}


if __name__ == "__main__":
    main()
