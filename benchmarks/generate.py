"""First-token time and tokens a second of a mid-size MAGMA, as JSON.

    python benchmarks/generate.py            # batch 1 and 8, compared with the machine's read bandwidth
    python benchmarks/generate.py --torch    # also compared with PyTorch, taking turns
    python benchmarks/generate.py --against ../before  # compared with another checkout of this repository

The model is that of ``train_step.py``: 6 layers of width 1024, RN50 at 224 pixels, fp32, random weights. A prompt is an
image (49 positions) and 16 tokens; 64 tokens are generated greedily. ``first_token_seconds`` is the time from pixels to
the first token; ``tokens_per_second`` counts the other 63 of every row.

``weights_per_second`` is the size in gigabytes of the weights that every step must read, divided by its time;
``matvec_per_second`` is the rate of plain matmuls of the same weights with as many rows in the same process, each
weight in a separate array. Every figure is the best of several rounds, with ``--processes`` of several processes, which
start in turns too: where the weights of a process lie in memory moves its figures by some percent.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import train_step as sizes
import turns

PROMPT, NEW_TOKENS, CONTEXT = 16, 64, 256


def main() -> None:
    """Reads the command line, lets the workers take turns, prints JSON."""
    parser = argparse.ArgumentParser(description="First-token time and tokens a second of a mid-size MAGMA, as JSON.")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of a process; default %(default)s")
    parser.add_argument("--processes", type=int, default=1, help="default %(default)s")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--torch", action="store_true", help="also time PyTorch (needs torch and transformers)")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="also time that of another checkout")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="PyTorch's (default: all, as XLA uses)")
    parser.add_argument("--worker", help="for this script itself")
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments.worker, arguments.threads)
        return
    results: dict[str, Any] = {}
    for batch in arguments.batch:
        results[f"batch {batch}"] = result = {}
        names = ["jax"] + ["torch"] * arguments.torch + ["against"] * (arguments.against is not None)
        options = ["--threads", str(arguments.threads)]
        times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(arguments.processes):
            order = names[::-1] if number % 2 else names
            workers = {
                name: turns.start(__file__, f"jax-{batch}", options, arguments.against)
                if name == "against"
                else turns.start(__file__, f"{name}-{batch}", options)
                for name in order
            }
            prepared = {name: turns.ask(workers[name], "prepare") for name in order}
            for _ in range(arguments.rounds):
                for name in order:
                    times[name].append(turns.ask(workers[name], "round"))
            peaks = {name: turns.end(workers[name]) for name in names}
        for name in names:
            best = {key: min(turn[key] for turn in times[name]) for key in times[name][0]}
            decode = best["all"] - best["first"]
            rate = batch * (NEW_TOKENS - 1) / decode
            result[name] = {"first_token_seconds": round(best["first"], 4), "tokens_per_second": round(rate, 1)}
            if name != "torch":
                gigabytes = prepared[name]["gigabytes"]
                read, plain = gigabytes * (NEW_TOKENS - 1) / decode, gigabytes / best["matvec"]
                result[name] |= {"weights_per_second": round(read, 1), "matvec_per_second": round(plain, 1)}
                result[name] |= {"of_matvec": round(read / plain, 3), "compile_seconds": prepared[name]["compile"]}
            result[name]["peak_gigabytes"] = peaks[name]
        if arguments.against:
            now, then = result["jax"], result["against"]
            result["ratio_against"] = round(now["tokens_per_second"] / then["tokens_per_second"], 3)
        if arguments.torch:
            ours, theirs = result["jax"], result["torch"]
            result["ratio_tokens"] = round(ours["tokens_per_second"] / theirs["tokens_per_second"], 2)
            result["ratio_first_token"] = round(ours["first_token_seconds"] / theirs["first_token_seconds"], 2)
    print(json.dumps(results, indent=2))


def _work(name: str, threads: int) -> None:
    framework, batch = name.split("-")
    draw: Callable[[int], Any]  # set by prepare
    read: Callable[[], Any] = int  # placeholder for PyTorch

    def prepare() -> dict[str, float]:
        nonlocal draw, read
        if framework == "torch":
            import torch_reference

            draw = torch_reference.make_generate(int(batch), threads)
            gigabytes = 0.0
        else:
            draw, read, gigabytes = _jax_model(int(batch))
        start = time.perf_counter()
        tokens = draw(NEW_TOKENS)
        assert tokens.shape == (int(batch), NEW_TOKENS), tokens.shape
        draw(1)
        read()
        return {"compile": round(time.perf_counter() - start, 1), "gigabytes": gigabytes}

    def seconds(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def one_round() -> dict[str, float]:
        all_, first = seconds(lambda: draw(NEW_TOKENS)), seconds(lambda: draw(1))
        return {"all": all_, "first": first, "matvec": min(seconds(read) for _ in range(5))}

    turns.answer({"prepare": prepare, "round": one_round})


def _jax_model(batch: int) -> tuple[Callable[[int], Any], Callable[[], Any], float]:
    """A function that generates tokens, one that only multiplies by the weights, and their size in gigabytes."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from magma_jax import Magma
    from magma_jax.data.tokenizers.byte_level import gpt2_tokenizer
    from magma_jax.families.magma.loading import LAYERS, layers_apart
    from magma_jax.inference.decoding.config import SamplingConfig
    from magma_jax.inference.prompts import PromptBatch
    from magma_jax.models.language.gptj import GPTJConfig
    from magma_jax.models.magma import MagmaConfig, MagmaModel
    from magma_jax.models.vision.clip_resnet import CLIP_RESNETS
    from magma_jax.nn.adapters import AdapterConfig
    from magma_jax.nn.layers import product
    from magma_jax.nn.modules import merge, split

    head = sizes.WIDTH // sizes.HEADS
    lm = GPTJConfig(
        sizes.LAYERS, sizes.WIDTH, sizes.HEADS, head, sizes.FEED_FORWARD, sizes.VOCAB_ROWS, sizes.HEAD_ROWS, CONTEXT
    )
    config = MagmaConfig(lm, CLIP_RESNETS["RN50"], mlp_adapter=AdapterConfig(downsample_factor=4))
    params = layers_apart(jax.jit(lambda: split(MagmaModel(config, rngs=nnx.Rngs(0)))[1])())
    model = Magma(config, params, gpt2_tokenizer())
    weights = [
        leaf for path, leaf in params.items() if path.startswith((LAYERS, "lm/lm_head/")) and path.endswith("/weight")
    ]
    weights = [leaf for leaf in weights if leaf.ndim == 2]

    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, sizes.IMAGE_SIZE, sizes.IMAGE_SIZE, 3), np.float32)
    prompt = rng.integers(0, sizes.VOCAB_ROWS, (batch, PROMPT))

    @jax.jit
    def embed(params, images, prompt):
        model_ = merge(model.graphdef, params)
        return jnp.concatenate([model_.embed_images(images), model_.lm.embed(prompt)], axis=1)

    lengths = jnp.full(batch, sizes.IMAGE_POSITIONS + PROMPT, jnp.int32)

    def draw(count: int) -> Any:
        prompts = PromptBatch(embed(params, images, prompt), lengths)
        return np.asarray(model.generate_tokens(prompts, count, SamplingConfig(temperature=0)).tokens)

    rows = {leaf.shape[1]: jnp.asarray(rng.standard_normal((batch, leaf.shape[1]), np.float32)) for leaf in weights}
    multiply = jax.jit(lambda weights: sum(product(rows[leaf.shape[1]], leaf).max() for leaf in weights))
    return draw, lambda: multiply(weights).block_until_ready(), sum(leaf.nbytes for leaf in weights) / 1e9


if __name__ == "__main__":
    main()
