"""CM3Leon's image tokenizer: 1,024 codes of an image of 256 pixels, from a codebook of 8,192 (Gafni et al., 2022).

python -m magma_jax.data convert --from folder my_images data/images
python train.py --config configs/vqgan_f8.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "kind": "vqgan",
                "image_size": 256,
                "width": 128,
                "multipliers": (1, 1, 2, 4),
                "blocks": 2,
                "attention_sizes": (32,),
                "latent_channels": 256,
                "code_width": 256,
                "codes": 8192,
                "training": {"discriminator": {"width": 64, "layers": 3}},
            },
            "data": {
                "kind": "folders",
                "folders": {"train": ("data/images",), "validation": ("data/images_val",)},
            },
            "loss": {"l1": 1.0, "codebook_loss": "taming", "beta": 0.25, "gan_weight": 0.8, "gan_start": 10_000},
            # The original: 4.5e-6 for each image of a batch, Adam's moments 0.5 and 0.9, no schedule.
            "optim": {
                "learning_rate": 4.5e-6 * 64,
                "schedule": "constant",
                "b1": 0.5,
                "b2": 0.9,
                "groups": {"discriminator": {"learning_rate": 4.5e-6 * 64}},
            },
            "mesh": {"data": -1},
            "steps": 500_000,
            "batch_size": 64,
            "log_every": 100,
            "checkpoint_every": 5000,
            "validation": {"every": 5000, "samples": 1024},
            "watch": {"samples_every": 5000},
        }
    )
