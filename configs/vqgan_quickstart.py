"""A tokenizer of OpenMoji drawings at 64 pixels: 256 codes of 4 x 4 pixels, from a codebook of 1,024.

python train.py --config configs/vqgan_quickstart.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "kind": "vqgan",
                "image_size": 64,
                # All layers work on the 16 x 16 grid of codes, and what they add to is a quantizer of patches.
                "patch": 4,
                "width": 64,
                "multipliers": (1,),
                "blocks": 1,
                "attention_sizes": (),
                "latent_channels": 64,
                "code_width": 48,
                "codes": 1024,
            },
            # Half people and hands, half everything else; the texts are not used.
            "data": {"kind": "openmoji", "image_size": 64, "weights": (0.5, 0.5, 0.0)},
            # Flat colours: absolute differences keep them, and there is no texture for a discriminator to judge.
            "loss": {"l1": 1.0, "l2": 1.0, "restart_below": 0.002},
            "optim": {"learning_rate": 2e-3, "warmup_steps": 20, "b2": 0.99, "clip_norm": 1.0},
            "steps": 500,
            "batch_size": 16,
            "log_every": 20,
            "validation": {"every": 250, "samples": 128},
            "watch": {"samples_every": 250},
        }
    )
