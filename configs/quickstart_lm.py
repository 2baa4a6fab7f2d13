"""The quick start's language model: a small GPT-J and its vocabulary, from text about drawings.

    python train.py --config configs/quickstart_lm.py --workdir runs/quickstart_lm

The result is committed as magma_jax/assets/; scripts/export_quickstart_lm.py writes it there.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "kind": "gptj",
                "layers": 4,
                "width": 256,
                "heads": 4,
                "rotary_dim": 32,
                "feed_forward": 1024,
                "vocab_rows": 2049,
                "head_rows": 2049,
                "context_length": 128,
            },
            "data": {"name": "openmoji_text", "length": 64, "lines": 100_000, "vocab_size": 2048},
            "optim": {
                "learning_rate": 2e-3,
                "schedule": "cosine",
                "warmup_steps": 50,
                "final_fraction": 0.05,
                "b2": 0.98,
                "weight_decay": 0.05,
                "clip_norm": 1.0,
                # Here, and only here, the language model learns.
                "groups": {"language": "rest"},
            },
            "steps": 400,
            "batch_size": 32,
        }
    )
