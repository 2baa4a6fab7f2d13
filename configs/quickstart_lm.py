"""The quick start's language model: a small GPT-J and its vocabulary, from text about drawings.

    python train.py --config configs/quickstart_lm.py --workdir runs/quickstart_lm

The result is part of the package (magma_jax/assets/); scripts/export_quickstart_lm.py writes it there.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "kind": "gptj",
                "layers": 4,
                "width": 256,
                "heads": 8,
                "rotary_dim": 16,
                "feed_forward": 1024,
                "vocab_rows": 2049,
                "head_rows": 2049,
                "context_length": 128,
                # The scale of a prefix after its LayerNorm, so that image and word vectors have similar norms.
                "embedding_std": 0.5,
            },
            "data": {"kind": "openmoji_text", "length": 64, "lines": 120_000, "vocab_size": 2048},
            "optim": {
                "learning_rate": 2e-3,
                "schedule": "cosine",
                "warmup_steps": 50,
                "final_fraction": 0.03,
                "b2": 0.98,
                "weight_decay": 0.05,
                "clip_norm": 1.0,
            },
            "steps": 2000,
            "batch_size": 32,
        }
    )
