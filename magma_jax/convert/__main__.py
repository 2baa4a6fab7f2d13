"""Command line of the conversion.

    python -m magma_jax.convert from-torch CKPT OUT [--model-config FILE.json] [--tokenizer FILE.json]
    python -m magma_jax.convert to-torch FOLDER CKPT.pt
    python -m magma_jax.convert to-safetensors FOLDER CKPT.safetensors
    python -m magma_jax.convert to-hf FOLDER OUT
    python -m magma_jax.convert export RUN OUT [--to params]
    python -m magma_jax.convert export RUN FILE.safetensors --trained
    python -m magma_jax.convert put-on FILE.safetensors BASE OUT
    python -m magma_jax.convert merge-lora|remove-lora|to-peft FOLDER OUT
    python -m magma_jax.convert from-peft FOLDER ADAPTER OUT
    python -m magma_jax.convert compose --lm LM [--encoder ENCODER] --config CONFIG.py OUT [--set KEY=VALUE ...]
    python -m magma_jax.convert verify A B [--tolerance X] [--json]
    python -m magma_jax.convert verify CKPT --golden FILE.npz [--model-config FILE.json] [--json]
    python -m magma_jax.convert verify FOLDER --checksums [--json]
    python -m magma_jax.convert add-checksums FOLDER

Files and folders may be gs:// or s3:// addresses; vocabularies, configs and golden files are local, and so is what
add-checksums changes.

Exit status: 0 success, 1 the checkpoints differ or files have changed, 2 unusable input (one message on standard
error). See docs/conversion.md and docs/sources.md.
"""

import argparse
import sys
from collections.abc import Sequence

from magma_jax import commands
from magma_jax.config import QUANTIZED
from magma_jax.published.model_config_keys import MODEL_CONFIG_KEYS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, see ``commands``."""
    arguments = _parser().parse_args(argv)

    def work() -> int:
        from magma_jax.convert.command import RUN

        return RUN[arguments.run](arguments)

    return commands.run("magma_jax.convert", work)


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser(prog="python -m magma_jax.convert", description="Converts MAGMA checkpoints.")
    subparsers = parser.add_subparsers(required=True)
    known = ", ".join(f"{part} ({', '.join(names)})" for part, names in MODEL_CONFIG_KEYS.items())
    config_help = f"JSON with what tensors cannot tell: {known}"

    command = subparsers.add_parser("from-torch", help="checkpoint with the published keys to model folder")
    command.add_argument(
        "checkpoint", type=commands.source, help="PyTorch or safetensors file, folder of shards, or an address"
    )
    command.add_argument("out", type=commands.source, help="model folder to write; must not exist")
    command.add_argument("--model-config", help=config_help)
    command.add_argument("--tokenizer", help="tokenizer.json or a folder with one; default: the file's own, or GPT-2's")
    command.set_defaults(run="from-torch")

    for name, kind in (
        ("to-torch", "PyTorch file"),
        ("to-safetensors", "safetensors file"),
        ("to-hf", "Hugging Face folder of the language model alone"),
    ):
        command = subparsers.add_parser(name, help=f"model folder to {kind}")
        command.add_argument("folder", type=commands.source, help="model folder or run folder")
        command.add_argument("out", type=commands.source, help=f"{kind} to write; must not exist")
        command.set_defaults(run=name)

    for name, result in (
        ("merge-lora", "model folder with the LoRA added to the language model's matrices"),
        ("remove-lora", "model folder without the LoRA"),
        ("to-peft", "folder of the LoRA in PEFT's layout"),
    ):
        command = subparsers.add_parser(name, help=f"model folder with a LoRA to {result}")
        command.add_argument("folder", type=commands.source, help="model folder or run folder")
        command.add_argument("out", type=commands.source, help="folder to write; must not exist")
        command.set_defaults(run=name)

    command = subparsers.add_parser("from-peft", help="model folder and a LoRA in PEFT's layout to one with the LoRA")
    command.add_argument("folder", type=commands.source, help="model folder or run folder without a LoRA")
    command.add_argument("adapter", type=commands.source, help="folder with adapter_config.json")
    command.add_argument("out", type=commands.source, help="model folder to write; must not exist")
    command.set_defaults(run="from-peft")

    command = subparsers.add_parser("export", help="run or model folder, of any family, to one folder to share")
    command.add_argument("folder", type=commands.source, help="model folder or run folder")
    command.add_argument(
        "out",
        type=commands.source,
        help="folder to write, or file with --trained; must not exist",
    )
    command.add_argument("--trained", action="store_true", help="only what the run trained, as one file for put-on")
    command.add_argument(
        "--to",
        default="safetensors",
        choices=("safetensors", "params"),
        help="one file, or arrays that many processes read in parts; default %(default)s",
    )
    command.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="take a run's moving averages, or its weights; default: as the run was validated",
    )
    command.set_defaults(run="export")

    command = subparsers.add_parser("put-on", help="what a run trained, on the frozen weights of another folder")
    command.add_argument("file", type=commands.source, help="file that export --trained wrote")
    command.add_argument("base", type=commands.source, help="model folder or run folder with the same frozen weights")
    command.add_argument(
        "out", type=commands.source, help="model folder to write, which refers to the base; must not exist"
    )
    command.set_defaults(run="put-on")

    command = subparsers.add_parser("quantize", help="model folder with the language model's matrices in 8 or 4 bits")
    command.add_argument("folder", type=commands.source, help="model folder or run folder")
    command.add_argument("out", type=commands.source, help="model folder to write; must not exist")
    command.add_argument("--to", default="int8", choices=QUANTIZED, help="default %(default)s")
    command.set_defaults(run="quantize")

    command = subparsers.add_parser("compose", help="published language model and encoder to a model folder to train")
    command.add_argument(
        "--lm",
        type=commands.source,
        required=True,
        help="folder, file or address, as hf://EleutherAI/gpt-j-6b; that of another composed folder is shared",
    )
    command.add_argument(
        "--encoder", type=commands.source, help="CLIP or NF-ResNet: file or address; an NF-ResNet may start fresh"
    )
    command.add_argument("--config", required=True, help="Python config of the runs, which is run: configs/magma_v2.py")
    command.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override values of the config")
    command.add_argument("out", type=commands.source, help="model folder to write; must not exist")
    command.set_defaults(run="compose")

    command = subparsers.add_parser(
        "verify", help="compare two checkpoints tensor by tensor, or one with the original's results"
    )
    command.add_argument(
        "checkpoint", type=commands.source, help="weight file, folder of shards, model or run folder, or an address"
    )
    command.add_argument(
        "other", nargs="?", type=commands.source, help="the checkpoint to compare with, of the same or another kind"
    )
    command.add_argument("--tolerance", type=float, default=0.0, help="difference that counts as equal; default 0")
    command.add_argument("--golden", help="instead of another checkpoint: NPZ of inputs and the original's results")
    command.add_argument("--checksums", action="store_true", help="check a folder's files against its checksums")
    command.add_argument("--model-config", help=f"{config_help}; default: the .json beside the golden file")
    command.add_argument("--json", action="store_true", help="machine-readable result on standard output")
    command.set_defaults(run="verify")

    command = subparsers.add_parser("add-checksums", help="add checksums to a folder that was written without them")
    command.add_argument("folder", help="model folder or run folder")
    command.set_defaults(run="add-checksums")
    return parser


if __name__ == "__main__":
    sys.exit(main())
