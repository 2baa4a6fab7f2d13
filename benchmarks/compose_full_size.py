"""Composes a full-size MAGMA v2 from random published files and trains it one step; prints JSON.

python benchmarks/compose_full_size.py --scratch /data/scratch    # 28 GB of disk, 24 GB of memory, some ten minutes
python benchmarks/compose_full_size.py --scratch /data/scratch --image-size 192    # 0.5 GB of memory less
python benchmarks/compose_full_size.py --scratch /tmp/small --layers 2 --width 256

The files are a GPT-J-6B in Hugging Face's layout (fp16, sharded safetensors, 50,400 rows) and a CLIP RN50x16 as an
OpenAI TorchScript archive (fp16; written with PyTorch, read without). Every step runs in its own process; its wall time
and peak resident memory (``ru_maxrss``) are measured. ``--steps`` selects steps. The config is ``configs/magma_v2.py``
with batch 1 and fp32 activations, which are faster on a CPU; frozen weights are bf16.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/magma_v2.py"
STEPS = ("make-lm", "make-encoder", "compose", "compile", "train")
SHARDS = 4
# Text tokens after the 144 positions of an image.
TOKENS = 16


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the steps in order."""
    scratch = options.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    worker = [sys.executable, __file__, "--scratch", scratch, "--layers", options.layers, "--width", options.width]
    worker += ["--image-size", options.image_size] if options.image_size else []
    compose = [sys.executable, "-m", "magma_jax.convert", "compose", "--lm", scratch / "gpt-j"]
    compose += ["--encoder", scratch / "RN50x16.pt", "--config", CONFIG, scratch / "model", "--set", *sizes(options)]
    results = {}
    for step in options.steps:
        print(f"{step} ...", file=sys.stderr, flush=True)
        results[step] = run(compose if step == "compose" else [*worker, "--worker", step], scratch)
        print(json.dumps({step: results[step]}), file=sys.stderr, flush=True)
    if not options.keep:
        shutil.rmtree(scratch)
    return results


def run(command: Sequence[Any], scratch: Path) -> dict[str, Any]:
    """Runs a command; returns its times, peak memory and output."""
    # Freed memory is returned to the system at once, so that the compiler's does not count for the training step.
    settings = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    settings |= {"JAX_COMPILATION_CACHE_DIR": str(scratch / "programs")}
    start = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | settings
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed with status {process.returncode}\n{output}")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "result": json.loads(output) if output.startswith("{") else output.strip(),
    }


def sizes(options: argparse.Namespace) -> list[str]:
    """Overrides for another size of the config's language model."""
    values = {"layers": options.layers, "width": options.width, "feed_forward": 4 * options.width}
    values["rotary_dim"] = 64 * options.width // 4096
    return [f"model.lm.{name}={value}" for name, value in values.items()]


def make_lm(options: argparse.Namespace) -> dict[str, Any]:
    """Writes a random GPT-J in Hugging Face's layout."""
    import dataclasses

    import numpy as np
    from flax import nnx

    from magma_jax.config import apply_overrides, from_dict, load_config_file
    from magma_jax.models.language.decoder import Decoder
    from magma_jax.models.language.gptj import GPTJConfig
    from magma_jax.nn.modules import abstract, parameter_count
    from magma_jax.published.keymap.engine import to_theirs
    from magma_jax.published.language_model_keys import language_model_table
    from magma_jax.storage.deferred import Deferred
    from magma_jax.storage.safetensors_file import write_safetensors

    lm = from_dict(GPTJConfig, apply_overrides(load_config_file(CONFIG), sizes(options)).to_dict()["model"]["lm"])
    lm = dataclasses.replace(lm, vocab_rows=50400, head_rows=50400, dtype="float16")
    folder = options.scratch / "gpt-j"
    folder.mkdir()
    settings = {"model_type": "gptj", "n_layer": lm.layers, "n_embd": lm.width, "n_head": lm.heads}
    settings |= {"rotary_dim": lm.rotary_dim, "n_inner": None, "vocab_size": lm.vocab_rows, "n_positions": 2048}
    settings |= {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(settings))

    noise = (0.02 * np.random.default_rng(0).standard_normal(2**24)).astype(np.float16)

    def random(path: str, shape: tuple[int, ...]) -> Deferred:
        start, mean = len(path), 1 if "ln_" in path and "weight" in path else 0
        return Deferred(shape, noise.dtype, lambda: np.resize(noise[start:], shape) + np.float16(mean))

    shapes = abstract(lambda: Decoder(lm, rngs=nnx.Rngs(0)))[1]
    # Rows are generated one by one, so that no whole stack is in memory.
    params = {
        path: Deferred(
            shape.shape,
            noise.dtype,
            lambda: np.empty(0),
            tuple(random(f"{path}{i}", shape.shape[1:]) for i in range(lm.layers)),
        )
        if path.startswith("layers/")
        else random(path, shape.shape)
        for path, shape in shapes.items()
    }
    tensors = to_theirs(language_model_table(lm), params)
    weight_map = {}
    for i, names in enumerate(np.array_split(sorted(tensors), SHARDS)):
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        write_safetensors(folder / file, {str(name): tensors[name] for name in names})
        weight_map |= {str(name): file for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    nbytes = sum(file.stat().st_size for file in folder.iterdir())
    return {"parameters": parameter_count(shapes), "gb": round(nbytes / 1e9, 2), "tensors": len(tensors)}


def make_encoder(options: argparse.Namespace) -> dict[str, Any]:
    """Writes a random RN50x16 as a TorchScript archive, with CLIP's module names."""
    import dataclasses
    import warnings

    import numpy as np
    import torch
    from flax import nnx

    from magma_jax.models.vision.clip_resnet import CLIP_RESNETS, CLIPResNet
    from magma_jax.nn.modules import abstract
    from magma_jax.published.keymap.engine import to_theirs
    from magma_jax.published.magma_keys import encoder_table

    class Part(torch.nn.Module):
        def forward(self, x):
            return x

    clip = dataclasses.replace(CLIP_RESNETS["RN50x16"], attention_pool=True)
    shapes = abstract(lambda: CLIPResNet(clip, rngs=nnx.Rngs(0)))[1]
    model, generator = Part(), np.random.default_rng(0)
    count = 0
    for key, tensor in to_theirs(encoder_table(clip, "visual."), shapes).items():
        *modules, name = key.split(".")
        part = model
        for module in modules:
            if not hasattr(part, module):
                part.add_module(module, Part())
            part = getattr(part, module)
        if name == "num_batches_tracked":
            part.register_buffer(name, torch.tensor(1))
            continue
        fan_in = max(int(np.prod(tensor.shape[1:])), 1)
        array = generator.standard_normal(tensor.shape, np.float32)
        if len(tensor.shape) == 1:
            # Each block adds little to its input, as in a trained network, so that activations do not explode.
            last = ".bn3." in key and "layer" in key
            centre = {"weight": 0.2 if last else 1.0, "running_var": 1.0}.get(name, 0.0)
            array = centre + 0.05 * array.clip(-3, 3)
        else:
            array = array / np.sqrt(fan_in)
        count += array.size
        value = torch.from_numpy(array).half()
        if name.startswith("running"):
            part.register_buffer(name, value)
        else:
            part.register_parameter(name, torch.nn.Parameter(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, torch.zeros(1)), options.scratch / "RN50x16.pt")
    return {"numbers": count, "gb": round((options.scratch / "RN50x16.pt").stat().st_size / 1e9, 2)}


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Loads the composed folder and runs one optimizer step on one image and a few words."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from magma_jax.config import apply_overrides, load_config_file
    from magma_jax.families import run_config
    from magma_jax.families.magma import MAGMA
    from magma_jax.nn.modules import parameter_count
    from magma_jax.runtime.sharding import make_mesh
    from magma_jax.storage.model_folder import read_params
    from magma_jax.training.run.program import build_program
    from magma_jax.training.step.optim import partition

    # The config's schedule begins with a rate of zero.
    changes = [*sizes(options), "model.dtype=float32", "batch_size=1", "optim.schedule=constant"]
    changes += [f"model.encoder.image_size={options.image_size}"] if options.image_size else []
    config = run_config(apply_overrides(load_config_file(CONFIG), changes))
    program = build_program(MAGMA, config, make_mesh(config.mesh, jax.devices()[:1]))
    generator = np.random.default_rng(0)
    size = config.model.encoder.image_size
    tokens = generator.integers(0, 50257, (1, TOKENS))
    batch = {
        "images": generator.standard_normal((1, size, size, 3), np.float32),
        "tokens": tokens.astype(np.int32),
        "labels": tokens.astype(np.int32),
    }
    start = time.perf_counter()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (batch, jax.random.key(0)))
    step = program.step.lower(program.state, program.frozen, *shapes).compile()
    compiled = time.perf_counter()
    planned = step.memory_analysis()
    result: dict[str, Any] = {
        "compile_seconds": round(compiled - start, 1),
        "arguments_gb": round(planned.argument_size_in_bytes / 1e9, 2),
        "temporaries_gb": round(planned.temp_size_in_bytes / 1e9, 2),
    }
    if options.worker == "compile":
        return result
    params = read_params(options.scratch / "model", program.params)
    _, frozen, _ = partition(params, program.labels)
    state = program.init_state(params)
    del params
    loaded = time.perf_counter()
    peak_loaded = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
    moments = {
        "/".join(str(getattr(part, "key", part)) for part in path[-1:])
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if leaf.ndim
    }
    parts = ("_adapter/", "image_prefix/encoder/", "image_prefix/")
    counts: dict[str, int] = dict.fromkeys(("adapters", "encoder", "prefix"), 0)
    for path in sorted(moments):
        name = next(n for part, n in zip(parts, counts, strict=True) if part in path)
        counts[name] += state.trainable[path].size
    checksum = jax.jit(lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32).sum())
    before = {path: int(checksum(leaf)) for path, leaf in state.trainable.items()}
    state, metrics = step(state, frozen, batch, jax.random.key(0))
    unchanged = [path for path, leaf in state.trainable.items() if int(checksum(leaf)) == before[path]]
    return result | {
        "load_seconds": round(loaded - compiled, 1),
        "peak_loaded_gb": peak_loaded,
        "step_seconds": round(time.perf_counter() - loaded, 1),
        "frozen": {
            "parameters": parameter_count(frozen),
            "dtypes": sorted({leaf.dtype.name for leaf in frozen.values()}),
        },
        "trainable": parameter_count(state.trainable),
        "in_optimizer": counts,
        "moments_gb": round(sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)) / 1e9, 2),
        "language_model_in_optimizer": any(path.startswith("lm/") and "_adapter/" not in path for path in moments),
        "loss": float(metrics["loss"]),
        "grad_norm": float(metrics["grad_norm"]),
        "trainable_tensors": len(state.trainable),
        "of_which_unchanged": unchanged,
        "positions": config.model.encoder.positions + TOKENS - 1,
    }


WORKERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "make-lm": make_lm,
    "make-encoder": make_encoder,
    "compile": train,
    "train": train,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="empty folder; it is deleted in the end")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument(
        "--image-size", type=int, help="pixels of the image of the training step; default: the config's"
    )
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    parser.add_argument("--worker", choices=STEPS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    print(json.dumps(WORKERS[chosen.worker](chosen) if chosen.worker else main(chosen), indent=2))
