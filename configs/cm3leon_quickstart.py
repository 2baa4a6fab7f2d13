"""CM3Leon learns to draw and name OpenMoji's people and things: 3 million parameters, 256 codes a drawing.

    python train.py --config configs/cm3leon_quickstart.py

The package has the tokenizer's weights; configs/vqgan_quickstart.py trains it. With retrieved drawings in front, the
paper's form (docs/retrieval.md):

    python -m magma_jax.retrieval build data/openmoji_bank --data openmoji
    python -m magma_jax.retrieval annotate data/openmoji_bank data/openmoji_retrieved --data openmoji
    python train.py --config configs/cm3leon_quickstart.py --workdir runs/cm3leon_retrieval \
        --set data.retrieved=1 data.annotation=data/openmoji_retrieved
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    tokenizer = load_config_file(Path(__file__).with_name("vqgan_quickstart.py")).model
    return ConfigDict(
        {
            "model": {
                "kind": "cm3leon",
                "layers": 6,
                "width": 192,
                "heads": 6,
                "feed_forward": 768,
                # The package's tokenizer has 2,048 texts.
                "vocab_rows": 3200,
                "vocabulary": {"text": 2048, "image": tokenizer.codes, "sentinels": 16},
                "context_length": 1024,
                # Wider than the paper's, which is for 1,024 and more entries.
                "embedding_std": 0.02,
                "image_tokens": 256,
                "tokenizer": tokenizer.to_dict(),
            },
            # Two documents a block, and room for three spans.
            "data": {"kind": "openmoji_documents", "length": 576},
            "weights": {"image_tokenizer": "quickstart_vqgan"},
            "optim": {"learning_rate": 2e-3, "warmup_steps": 50, "b2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0},
            "steps": 1500,
            "batch_size": 8,
            "validation": {"every": 250, "samples": 64},
        }
    )
