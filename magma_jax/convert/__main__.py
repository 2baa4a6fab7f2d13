"""Command line of the conversion.

    python -m magma_jax.convert from-torch CKPT.pt OUT [--model-config FILE.json]
    python -m magma_jax.convert to-torch FOLDER CKPT.pt
    python -m magma_jax.convert verify CKPT.pt --golden FILE.npz [--model-config FILE.json] [--json]

Exit status: 0 done, 1 a quantity is past its tolerance, 2 unusable input (one message on standard error).
"""

import argparse
import json
import sys
from collections.abc import Sequence

from magma_jax.convert.hub import local_path
from magma_jax.convert.magma import from_torch, to_torch
from magma_jax.convert.verify import read_model_config, verify

# The package's own errors are ValueErrors; each says what is wrong with which file.
ERRORS = (ValueError, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except ERRORS as error:
        # The system's own messages name the file behind the reason; ours begin with it.
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"error: {message}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m magma_jax.convert", description="Converts MAGMA checkpoints.")
    commands = parser.add_subparsers(required=True)
    config_help = "JSON with what tensors cannot tell: lm (n_heads, rotary_dim, seq_len), encoder (res, heads)"

    command = commands.add_parser("from-torch", help="PyTorch checkpoint to model folder")
    command.add_argument("checkpoint", help="PyTorch file in the published layout, or its hf:// address")
    command.add_argument("out", help="model folder to write; must not exist")
    command.add_argument("--model-config", help=config_help)
    command.set_defaults(run=_from_torch)

    command = commands.add_parser("to-torch", help="model folder to PyTorch checkpoint")
    command.add_argument("folder", help="model folder")
    command.add_argument("checkpoint", help="PyTorch file to write; must not exist")
    command.set_defaults(run=_to_torch)

    command = commands.add_parser("verify", help="compare a checkpoint with what the original computed")
    command.add_argument("checkpoint", help="PyTorch file or its hf:// address, model folder or run folder")
    command.add_argument("--golden", required=True, help="NPZ of inputs and the original's results")
    command.add_argument("--model-config", help=f"{config_help}; default: the .json beside the golden file")
    command.add_argument("--json", action="store_true", help="machine-readable result on standard output")
    command.set_defaults(run=_verify)
    return parser


def _from_torch(options: argparse.Namespace) -> int:
    model_config = read_model_config(options.model_config) if options.model_config else None
    config = from_torch(local_path(options.checkpoint), options.out, model_config)
    lm = config.lm
    print(f"{options.out}: {lm.layers} layers of width {lm.width}, {config.encoder.kind}, vocabulary {lm.vocab_rows}")
    return 0


def _to_torch(options: argparse.Namespace) -> int:
    to_torch(options.folder, options.checkpoint)
    print(f"{options.checkpoint}: written")
    return 0


def _verify(options: argparse.Namespace) -> int:
    model_config = read_model_config(options.model_config) if options.model_config else None
    result = verify(local_path(options.checkpoint), options.golden, model_config)
    print(json.dumps(result.as_json(), indent=2) if options.json else result.as_table())
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
