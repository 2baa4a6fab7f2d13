"""Command line of the conversion.

    python -m magma_jax.convert from-torch CKPT OUT [--model-config FILE.json] [--tokenizer FILE.json]
    python -m magma_jax.convert to-torch FOLDER CKPT.pt
    python -m magma_jax.convert to-safetensors FOLDER CKPT.safetensors
    python -m magma_jax.convert to-hf FOLDER OUT
    python -m magma_jax.convert compose --lm LM --encoder ENCODER --config CONFIG.py OUT [--set KEY=VALUE ...]
    python -m magma_jax.convert verify A B [--tolerance X] [--json]
    python -m magma_jax.convert verify CKPT --golden FILE.npz [--model-config FILE.json] [--json]
    python -m magma_jax.convert verify FOLDER --checksums [--json]
    python -m magma_jax.convert add-checksums FOLDER

Exit status: 0 done, 1 two sides differ or files have changed, 2 unusable input (one message on standard error). See
docs/conversion.md and docs/sources.md.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence

from magma_jax.config import apply_overrides, load_config_file
from magma_jax.convert.check_folder import add_checksums, check_folder
from magma_jax.convert.compare import compare_checkpoints
from magma_jax.convert.compose import compose
from magma_jax.convert.hf_export import to_hf
from magma_jax.convert.magma_checkpoint import from_torch, to_safetensors, to_torch
from magma_jax.convert.quantize import quantize_folder
from magma_jax.convert.verify import read_model_config, verify
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.families import run_config
from magma_jax.nn.quantized import QUANTIZED
from magma_jax.output import printable
from magma_jax.published.infer_config import MODEL_CONFIG_KEYS
from magma_jax.storage.hub import local_path

# The package's own errors are ValueErrors; each says what is wrong with which file. The last is for sizes that a file
# claims to have.
ERRORS = (ValueError, OSError, MemoryError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except ERRORS as error:
        # The system's own messages name the file behind the reason; ours begin with it.
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        text = printable(str(message) or "not enough memory")
        print(f"error: {text}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m magma_jax.convert", description="Converts MAGMA checkpoints.")
    commands = parser.add_subparsers(required=True)
    known = ", ".join(f"{part} ({', '.join(names)})" for part, names in MODEL_CONFIG_KEYS.items())
    config_help = f"JSON with what tensors cannot tell: {known}"

    command = commands.add_parser("from-torch", help="checkpoint with the published keys to model folder")
    command.add_argument("checkpoint", help="PyTorch or safetensors file, folder of shards, or an hf:// address")
    command.add_argument("out", help="model folder to write; must not exist")
    command.add_argument("--model-config", help=config_help)
    command.add_argument("--tokenizer", help="tokenizer.json or a folder with one; default: the file's own, or GPT-2's")
    command.set_defaults(run=_from_torch)

    for name, kind, function in (
        ("to-torch", "PyTorch file", to_torch),
        ("to-safetensors", "safetensors file", to_safetensors),
        ("to-hf", "Hugging Face folder of the language model alone", to_hf),
    ):
        command = commands.add_parser(name, help=f"model folder to {kind}")
        command.add_argument("folder", help="model folder or run folder")
        command.add_argument("out", help=f"{kind} to write; must not exist")
        command.set_defaults(run=functools.partial(_export, function))

    command = commands.add_parser("quantize", help="model folder with the language model's matrices in 8 or 4 bits")
    command.add_argument("folder", help="model folder or run folder")
    command.add_argument("out", help="model folder to write; must not exist")
    command.add_argument("--to", default="int8", choices=QUANTIZED, help="default %(default)s")
    command.set_defaults(run=_quantize)

    command = commands.add_parser("compose", help="published language model and encoder to a model folder to train")
    command.add_argument("--lm", required=True, help="folder, file or hf:// address, such as hf://EleutherAI/gpt-j-6b")
    command.add_argument("--encoder", required=True, help="CLIP or NF-ResNet: file or hf:// address")
    command.add_argument("--config", required=True, help="Python config of the runs, which is run: configs/magma_v2.py")
    command.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override values of the config")
    command.add_argument("out", help="model folder to write; must not exist")
    command.set_defaults(run=_compose)

    command = commands.add_parser(
        "verify", help="compare two checkpoints tensor by tensor, or one with what the original computed"
    )
    command.add_argument("checkpoint", help="weight file, folder of shards, hf:// address, model or run folder")
    command.add_argument("other", nargs="?", help="the checkpoint to compare with, of the same or another kind")
    command.add_argument("--tolerance", type=float, default=0.0, help="difference that counts as equal; default 0")
    command.add_argument("--golden", help="instead of another checkpoint: NPZ of inputs and the original's results")
    command.add_argument("--checksums", action="store_true", help="whether all files of a folder are as written")
    command.add_argument("--model-config", help=f"{config_help}; default: the .json beside the golden file")
    command.add_argument("--json", action="store_true", help="machine-readable result on standard output")
    command.set_defaults(run=_verify)

    command = commands.add_parser("add-checksums", help="list the sums of a folder that was written without them")
    command.add_argument("folder", help="model folder or run folder")
    command.set_defaults(run=_add_checksums)
    return parser


def _from_torch(options: argparse.Namespace) -> int:
    model_config = read_model_config(options.model_config) if options.model_config else None
    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    config = from_torch(local_path(options.checkpoint), options.out, model_config, tokenizer)
    lm = config.lm
    print(f"{options.out}: {lm.layers} layers of width {lm.width}, {config.encoder.kind}, vocabulary {lm.vocab_rows}")
    return 0


def _compose(options: argparse.Namespace) -> int:
    config = run_config(apply_overrides(load_config_file(options.config), options.set))
    made = compose(config, options.lm, options.encoder, options.out)
    print(f"{options.out}: {made.trainable:,} parameters learn ({made.fresh:,} are fresh), {made.frozen:,} are frozen")
    return 0


def _quantize(options: argparse.Namespace) -> int:
    quantize_folder(options.folder, options.out, options.to)
    print(f"{options.out}: language model in {options.to}")
    return 0


def _export(function: Callable[[str, str], None], options: argparse.Namespace) -> int:
    function(options.folder, options.out)
    print(f"{options.out}: written")
    return 0


def _verify(options: argparse.Namespace) -> int:
    if (options.other is not None) + (options.golden is not None) + options.checksums != 1:
        raise ValueError("verify takes either two checkpoints, or one and --golden FILE.npz, or one and --checksums")
    if options.checksums:
        result = check_folder(options.checkpoint)
    elif options.other is not None:
        result = compare_checkpoints(local_path(options.checkpoint), local_path(options.other), options.tolerance)
    else:
        model_config = read_model_config(options.model_config) if options.model_config else None
        result = verify(local_path(options.checkpoint), options.golden, model_config)
    print(json.dumps(result.as_json(), indent=2) if options.json else result.as_table())
    return 0 if result.ok else 1


def _add_checksums(options: argparse.Namespace) -> int:
    add_checksums(options.folder)
    print(f"{options.folder}: sums written, of its files as they are now")
    return 0


if __name__ == "__main__":
    sys.exit(main())
