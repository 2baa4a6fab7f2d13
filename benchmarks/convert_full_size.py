"""Converts a full-size random checkpoint to a model folder and back, loads it and runs it; prints JSON.

python benchmarks/convert_full_size.py --scratch /data/scratch         # 40 GB of disk, 20 GB of memory, some 20 minutes
python benchmarks/convert_full_size.py --scratch /tmp/small --layers 2 --width 1024

Every step runs in its own process, with wall time, processor time and peak resident memory (``ru_maxrss``, which
includes mapped files). Write times include ``sync``. ``--steps`` selects steps.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STEPS = ("make", "cp", "from-torch", "to-torch", "verify", "load", "reference")


def run(command: Sequence[str | Path]) -> dict[str, Any]:
    """Runs a command and waits for the disk (``sync``); raises SystemExit if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed with status {process.returncode}\n{output}")
    finished = time.perf_counter()
    os.sync()
    return {
        "seconds": round(finished - start, 1),
        "seconds_with_sync": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "output": output,
    }


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the steps in order."""
    scratch = options.scratch.absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    source, copy, folder, back = (scratch / name for name in ("source.pt", "copy.pt", "model", "back.pt"))
    convert = [sys.executable, "-m", "magma_jax.convert"]
    worker = [sys.executable, __file__]
    size = ["--layers", str(options.layers), "--width", str(options.width)]
    commands = {
        "make": [sys.executable, ROOT / "scripts/make_full_size_checkpoint.py", source, *size],
        "cp": ["cp", source, copy],
        "from-torch": [*convert, "from-torch", source, folder],
        "to-torch": [*convert, "to-torch", folder, back],
        "verify": [*convert, "verify", source, back, "--json"],
        "load": [*worker, "--worker", "load", "--scratch", scratch],
        "reference": [*worker, "--worker", "reference", "--scratch", scratch],
    }
    results: dict[str, Any] = {}
    for step in options.steps:
        print(f"{step} ...", file=sys.stderr, flush=True)
        result = run(commands[step])
        output = result.pop("output")
        if step in ("load", "reference"):
            result |= json.loads(output)
        if step == "verify":
            compared = json.loads(output)
            modules = compared["modules"].values()
            result["tensors"] = sum(module["tensors"] for module in modules)
            result["unequal_bits"] = sum(module["unequal"] for module in modules)
            result["problems"] = len(compared["problems"])
        if step == "cp":
            copy.unlink()
        results[step] = result
        print(json.dumps({step: result}), file=sys.stderr, flush=True)
    if source.exists():
        results["source_gb"] = round(source.stat().st_size / 1e9, 2)
    for step in ("from-torch", "to-torch"):
        if step in results and "cp" in results:
            ratio = results[step]["seconds_with_sync"] / results["cp"]["seconds_with_sync"]
            results[step]["times_cp"] = round(ratio, 2)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
        for file in (source, back):
            file.unlink(missing_ok=True)
    return results


def load(folder: Path) -> dict[str, Any]:
    """Loads the model in bf16, runs an image and a prompt, and generates three tokens."""
    import jax
    import numpy as np
    from PIL import Image

    from magma_jax import ImageInput, Magma

    def peak() -> float:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9

    def timed(function):
        start = time.perf_counter()
        value = jax.block_until_ready(function())
        return value, round(time.perf_counter() - start, 1)

    before = peak()
    model, load_seconds = timed(lambda: Magma.from_checkpoint(folder, dtype="bfloat16"))
    model_gb = sum(leaf.nbytes for leaf in model.params.values()) / 1e9
    loaded = peak()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 500, 3), np.uint8))
    embeddings, image_seconds = timed(lambda: model.preprocess_inputs([ImageInput(image), "A picture of"]))
    output, forward_seconds = timed(lambda: model(embeddings))
    after_forward = peak()
    generated, generate_seconds = timed(lambda: model.generate_tokens(embeddings, max_steps=3))
    return {
        "model_gb": round(model_gb, 2),
        "peak_before_loading_gb": round(before, 2),
        "peak_loaded_gb": round(loaded, 2),
        "peak_over_model": round(loaded / model_gb, 3),
        "peak_after_forward_gb": round(after_forward, 2),
        "load_seconds": load_seconds,
        "image_seconds": image_seconds,
        "forward_seconds": forward_seconds,
        "generate_seconds": generate_seconds,
        "positions": int(embeddings.shape[1]),
        "logits_finite": bool(np.isfinite(np.asarray(output.logits)).all()),
        "tokens": np.asarray(generated.tokens)[0].tolist(),
    }


def reference(folder: Path) -> dict[str, Any]:
    """fp32 logits of the language model's first two layers, here and in transformers' GPT-J with the same weights."""
    import dataclasses

    import jax
    import numpy as np
    import torch
    import transformers
    from flax import nnx

    from magma_jax.convert.open_folder import open_model_folder
    from magma_jax.models.language.decoder import Decoder
    from magma_jax.models.language.gptj import GPTJConfig
    from magma_jax.nn.modules import abstract, merge
    from magma_jax.published.keymap.engine import to_theirs
    from magma_jax.published.language_model_keys import language_model_table
    from magma_jax.storage.deferred import Deferred

    model = open_model_folder(folder)
    config = dataclasses.replace(model.config.lm, layers=2)
    assert isinstance(config, GPTJConfig)
    definition, shapes, _ = abstract(lambda: Decoder(config, rngs=nnx.Rngs(0)))

    def stored(path: str) -> np.ndarray:
        tensor = model.params[f"lm/{path}"]
        if path.startswith("layers/"):
            rows = [row.read() for row in tensor.rows[:2]] if tensor.rows else tensor.read()[:2]
            return np.asarray(rows, np.float32)
        return tensor.read().astype(np.float32)

    params = {path: stored(path) for path in shapes}
    ids = np.random.default_rng(0).integers(0, config.vocab_rows, (1, 32))

    @jax.jit
    def run_ours(params, ids):
        lm = merge(definition, params)
        return lm.logits(lm(lm.embed(ids)).hidden)

    ours = np.asarray(run_ours(params, ids))
    theirs = transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            vocab_size=config.head_rows,
            n_positions=config.context_length,
            n_embd=config.width,
            n_layer=2,
            n_head=config.heads,
            rotary_dim=config.rotary_dim,
            n_inner=config.feed_forward,
            tie_word_embeddings=False,
            attn_implementation="eager",  # pyright: ignore[reportCallIssue]  # accepted by every config, but not in the signature
        )
    ).eval()
    # Rows beyond MAGMA's vocabulary are never looked up.
    table = np.zeros((config.head_rows, config.width), np.float32)
    table[: config.vocab_rows] = params["wte/weight"]
    params["wte/weight"] = table
    promised = {path: Deferred(array.shape, array.dtype, lambda a=array: a) for path, array in params.items()}
    state = to_theirs(language_model_table(dataclasses.replace(config, vocab_rows=config.head_rows)), promised)
    weights = {key: torch.from_numpy(np.array(tensor.read())) for key, tensor in state.items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    return {
        "keys_missing": [key for key in missing if not key.endswith(("bias", "masked_bias", "embed_positions"))],
        "keys_unexpected": list(unexpected),
        "largest_logit": float(np.abs(expected).max()),
        "largest_difference": float(np.abs(ours - expected).max()),
        "same_best_token": float((ours.argmax(-1) == expected.argmax(-1)).mean()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="empty folder on the disk to be measured")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    parser.add_argument("--worker", choices=("load", "reference"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        print(json.dumps({"load": load, "reference": reference}[chosen.worker](chosen.scratch / "model")))
    else:
        print(json.dumps(main(chosen), indent=2))
