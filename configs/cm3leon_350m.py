"""CM3Leon-350M (Yu et al. 2023, table 3): texts and images of 1,024 codes, two retrieved pairs before every pair.

    python train.py --config configs/cm3leon_350m.py --set mesh.fsdp=64 accumulate=32

docs/cm3leon.md describes how to prepare its data. What the paper does not state (Adam's betas, weight decay, clipping)
is OPT's; the decay is a cosine to 10 %, OPT's is linear.
"""

from ml_collections import ConfigDict

TOKENS_PER_STEP = 8 * 2**20


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {"kind": "cm3leon"},
            "data": {
                "kind": "documents",
                "folders": {"train": ("data/documents",)},
                "tokenizer": "data/tokenizer.json",
                "length": 4096,
                "retrieved": 2,
                "memory": "data/bank",
                "annotation": "data/retrieved",
            },
            "loss": {"remat": "full", "activations": "bfloat16"},
            "optim": {
                "learning_rate": 6e-4,
                "warmup_steps": 1500,
                "b2": 0.95,
                "weight_decay": 0.1,
                "clip_norm": 1.0,
            },
            "steps": int(1.4e12) // TOKENS_PER_STEP,
            "batch_size": TOKENS_PER_STEP // 4096,
            "accumulate": 1,
        }
    )
