"""Writes a finished run of configs/quickstart_lm.py to magma_jax/assets/, the weights that the quick start uses.

python train.py --config configs/quickstart_lm.py
python scripts/export_quickstart_lm.py runs/quickstart_lm
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from magma_jax.config import from_dict
from magma_jax.models.language.decoder import Decoder
from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.nn.modules import abstract
from magma_jax.storage.model_folder import read_model_json
from magma_jax.training.checkpoints.checkpoint import RunCheckpoints

ASSETS = Path(__file__).parent.parent / "magma_jax/assets"


def main(run: Path) -> None:
    """Rounds the weights to float16 (finer than bfloat16 in their range) and writes them beside the vocabulary."""
    config = from_dict(GPTJConfig, read_model_json(run)["model"], "model.json: model")
    shapes = abstract(lambda: Decoder(config, rngs=nnx.Rngs(0)))[1]
    with RunCheckpoints(run) as checkpoints:
        params = checkpoints.restore_params(shapes, {})
    arrays = {path: np.asarray(leaf).astype(np.float16) for path, leaf in params.items()}
    ASSETS.mkdir(exist_ok=True)
    temporary = ASSETS / "quickstart_lm.safetensors.partial"
    save_file(arrays, temporary)
    temporary.chmod(0o644)
    temporary.replace(ASSETS / "quickstart_lm.safetensors")
    shutil.copyfile(run / "tokenizer/tokenizer.json", ASSETS / "tokenizer.json")
    print(f"{ASSETS}: {sum(file.stat().st_size for file in ASSETS.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
