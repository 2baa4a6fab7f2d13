"""The quick start: a frozen language model learns to describe drawings that it was never shown.

    python train.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "kind": "magma",
                "lm": {
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
                "encoder": {"kind": "efficientnet_lite", "image_size": 128, "taps": ("head",)},
                "prefix": {"dropout": 0.1},
                "mlp_adapter": {"downsample_factor": 4},
                "attn_adapter": {"downsample_factor": 4},
            },
            "data": {"name": "openmoji", "length": 32, "image_size": 128},
            "optim": {
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "warmup_steps": 30,
                "steps": None,
                "b2": 0.95,
                "clip_norm": 1.0,
                # The pretrained encoder stays as it is, so its features are computed once.
                "groups": {"language": "frozen", "encoder": "frozen", "prefix": "rest", "adapter": "rest"},
            },
            "weights": {"lm": "quickstart_lm", "image_prefix/encoder": "efficientnet_lite0"},
            "steps": 400,
            "batch_size": 64,
            "evaluate": True,
        }
    )
