"""MAGMA base (paper, section 4.3 and appendix A): 15,000 steps of batch 256 on the mixed dataset.

    python -m magma_jax.convert compose --lm hf://EleutherAI/gpt-j-6b --encoder RN50x16.pt \\
        --config configs/magma_base.py models/magma
    python train.py --config configs/magma_base.py --set mesh.fsdp=16

The first command puts GPT-J, CLIP and fresh adapters together; magma_v2 and magma_long start from the same folder.
Datasets come from `python -m magma_jax.data` (docs/data.md). mesh.fsdp is the number of chips to shard the weights
over: `python -m magma_jax.plan --config configs/magma_base.py --topology v5e:4x4` reports what fits.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "kind": "magma",
                # Frozen weights are bf16, trained ones fp32; matmuls run in bf16.
                "lm": {"kind": "gptj", "dtype": "bfloat16"},
                "encoder": {"kind": "clip_resnet", "blocks": (6, 8, 18, 8), "width": 96, "image_size": 384},
                "prefix": {"mapping": "linear", "dropout": 0.1, "layernorm": True},
                "mlp_adapter": {"kind": "normal", "downsample_factor": 8},
                "attn_adapter": {"kind": "normal", "downsample_factor": 8},
                "dtype": "bfloat16",
            },
            "data": {
                "kind": "folders",
                # Paper, section 3.3. It states no mixing weights; samples are uniform, as in the original.
                "folders": {
                    "train": (
                        "data/laion",
                        "data/wit",
                        "data/cc3m",
                        "data/visual_genome",
                        "data/localized_narratives",
                        "data/vqa_train",
                        "data/gqa_train",
                        "data/okvqa_train",
                        "data/vizwiz_train",
                        {
                            "path": "data/hateful_memes",
                            "question_prompt": "Q: Is this meme hateful, which says: {}? A:",
                            "words": {"0": "no", "1": "yes"},
                        },
                        "data/coco_train",
                    ),
                    "validation": ("data/coco_val",),
                },
                # 256 positions, with 144 of the image and the last token not run.
                "length": 113,
                "overlong": "truncate",
            },
            # Appendix A; it states no betas, so these are Adam's defaults.
            "optim": {
                "learning_rate": 8e-4,
                "schedule": "cosine",
                "final_fraction": 0.1,
                "weight_decay": 0.0,
                "groups": {"encoder": {"learning_rate": 2e-6}},
            },
            "loss": {"remat": "full", "encoder_remat": "full"},
            "base": "models/magma",
            "steps": 15_000,
            "batch_size": 256,
            "validation": {"every": 250},
            "watch": {"samples_every": 1000},
        }
    )
