"""The quick start: a frozen language model learns to describe unseen drawings.

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
                    "heads": 8,
                    "rotary_dim": 16,
                    "feed_forward": 1024,
                    "vocab_rows": 2049,
                    "head_rows": 2049,
                    "context_length": 128,
                },
                "encoder": {
                    "kind": "efficientnet_lite",
                    "image_size": 128,
                    # The last layer encodes objects, early ones colours; skin tones need both.
                    "taps": (4, 10, "head"),
                    "statistics": ("stem", 0, 2),
                },
                "prefix": {"dropout": 0.0, "standardize": True},
                "mlp_adapter": {"downsample_factor": 4, "init": "zero_up"},
                "attn_adapter": {"downsample_factor": 4, "init": "zero_up"},
            },
            "data": {"kind": "openmoji", "length": 32, "image_size": 128},
            "optim": {
                "learning_rate": 3e-3,
                "schedule": "cosine",
                "warmup_steps": 30,
                "steps": None,
                "b2": 0.95,
                "clip_norm": 1.0,
                # The encoder is frozen, so its features are computed once.
                "groups": {"encoder": "frozen"},
            },
            "weights": {"lm": "quickstart_lm", "image_prefix/encoder": "efficientnet_lite0"},
            "steps": 600,
            "batch_size": 64,
            "watch": {"samples_every": 200},
            "evaluate": True,
        }
    )
