"""MAGVLT's quick start: it learns to draw and to describe OpenMoji's drawings, in minutes on a CPU.

python train.py --config configs/magvlt_quickstart.py
python -m magma_jax.generate --checkpoint runs/magvlt_quickstart --make image --prompt "a woman cook" --output out.png
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "kind": "magvlt",
                "layers": 3,
                "width": 128,
                "heads": 2,
                "image_rows": 1024,
                "text_rows": 2048,
                "image_positions": 256,
                "text_positions": 24,
                "attention_dropout": 0.0,
                "residual_dropout": 0.0,
                # None of these is the original's, see docs/magvlt.md. With 8 x 8 codes on a position a matrix for each
                # code learns the shapes, and a step is many times cheaper; without the caption vector and the context
                # head so small a model learns much later which words go with which shapes and colours; and short rows
                # of tokens become alike before anything tells them apart.
                "image_patch": 8,
                "caption_vector": True,
                "context_head": True,
                "token_std": 0.1,
                # That of configs/vqgan_quickstart.py.
                "tokenizer": {
                    "kind": "vqgan",
                    "image_size": 64,
                    "patch": 4,
                    "width": 64,
                    "multipliers": (1,),
                    "blocks": 1,
                    "attention_sizes": (),
                    "latent_channels": 64,
                    "code_width": 48,
                    "codes": 1024,
                },
            },
            # The quick starts' 2,048 tokens make the head much cheaper than CLIP's 49,408 would.
            "data": {"kind": "openmoji_pairs", "tokenizer": "quickstart", "weights": (0.95, 0.05)},
            # Helper losses cost a pass each; captions are left out at times, so that guidance works.
            "loss": {
                "task_weights": (12.0, 7.0, 1.0),
                "unroll_weight": 0.0,
                "mixsel_weight": 0.0,
                "length_weight": 0.2,
                "length_text": "dummy",
                "label_smoothing": 0.0,
                # Neither is the original's: half of the images are masked as a whole, so that the text alone says what
                # to draw; and the head, which takes much of a step, sees 64 codes of an image.
                "blank_images": 0.5,
                "image_targets": 64,
                "caption_dropout": 0.1,
            },
            "optim": {
                "learning_rate": 2e-3,
                "schedule": "cosine",
                "warmup_steps": 200,
                "b2": 0.98,
                "weight_decay": 0.02,
                "clip_norm": 1.0,
            },
            "ema": {"decay": 0.999},
            # Part of the package, made by configs/vqgan_quickstart.py.
            "weights": {"image_tokenizer": "quickstart_vqgan"},
            "steps": 25_000,
            "batch_size": 8,
            "log_every": 100,
            "checkpoint_every": 1000,
            "validation": {"every": 0, "ema": True},
            "watch": {"samples_every": 0},
            "evaluate": True,
        }
    )
