"""Writes a finished run of configs/vqgan_quickstart.py to magma_jax/assets/, the tokenizer that the quick starts use.

python train.py --config configs/vqgan_quickstart.py
python scripts/export_quickstart_vqgan.py runs/vqgan_quickstart
"""

import json
import sys
from pathlib import Path

import numpy as np

from magma_jax.config import to_dict
from magma_jax.families.vqgan.loading import load_image_tokenizer
from magma_jax.published.vqgan_keys import CONFIG_KEY
from magma_jax.storage.safetensors_file import write_safetensors

ASSET = Path(__file__).parent.parent / "magma_jax/assets/quickstart_vqgan.safetensors"


def main(run: Path) -> None:
    """Rounds the weights to float16 and writes them with their config."""
    config, params = load_image_tokenizer(run)
    arrays = {path: np.asarray(leaf).astype(np.float16) for path, leaf in params.items()}
    write_safetensors(ASSET, arrays, {"format": "np", CONFIG_KEY: json.dumps(to_dict(config))})
    ASSET.chmod(0o644)
    print(f"{ASSET}: {ASSET.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
