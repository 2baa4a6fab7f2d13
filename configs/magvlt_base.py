"""MAGVLT base (Kim et al. 2023): 40,000 steps of batch 4,096 on image-text pairs.

    python -m magma_jax.data encode data/cc3m codes/cc3m --tokenizer models/vqgan_imagenet_f16_16384.ckpt
    python train.py --config configs/magvlt_base.py --set mesh.fsdp=16

The first command encodes a dataset folder (docs/data.md), one for each of data.folders.

Sizes, losses and their weights are those of the released config and the paper. Neither states an optimizer; this one is
that of the DALL-E models.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "kind": "magvlt",
                "layers": 24,
                "width": 1024,
                "heads": 8,
                "image_rows": 16384,
                "text_rows": 49408,
                "image_positions": 256,
                "text_positions": 64,
                "tokenizer": {"kind": "vqgan"},
            },
            "data": {
                "kind": "code_pairs",
                # The paper's 17 million pairs.
                "folders": {
                    "train": ("codes/cc3m", "codes/cc12m", "codes/sbu", "codes/visual_genome"),
                    "validation": ("codes/coco_val",),
                },
                "bpe_dropout": 0.1,
            },
            "loss": {"activations": "bfloat16", "remat": "full"},
            "optim": {
                "learning_rate": 4.5e-4,
                "schedule": "cosine",
                "warmup_steps": 2000,
                "final_fraction": 0.0,
                "b2": 0.96,
                "weight_decay": 0.045,
                "clip_norm": 1.0,
            },
            # taming-transformers' vqgan_imagenet_f16_16384.
            "weights": {"image_tokenizer": "models/vqgan_imagenet_f16_16384.ckpt"},
            "steps": 40_000,
            "batch_size": 4096,
            "accumulate": 4,
        }
    )
