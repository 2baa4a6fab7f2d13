"""The rows of the paper's Table 1: seven adapter settings, four encoders, and Frozen; 15,000 steps on CC12M.

    python -m magma_jax.convert compose --lm EleutherAI/gpt-j-6b --encoder RN50x16.pt \\
        --config configs/paper_table1.py:adapters-ff4 models/adapters-ff4
    python train.py --config configs/paper_table1.py:adapters-ff4 --set mesh.fsdp=16

    python -m magma_jax.convert compose --lm models/adapters-ff4 --config configs/paper_table1.py:frozen models/frozen

Rows are named after the setting they vary. The first one composed holds the language model; the others take it by its
folder and do not copy it. The encoders of encoder-nf_resnet and frozen start from fresh weights (section 3.2), so
compose takes no --encoder. RN50x4 has 288 pixels, 81 positions; the paper's 49 belong to 224 pixels.
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file

FF4 = {"mlp_adapter": {"kind": "normal", "downsample_factor": 4}, "attn_adapter": None}
VIT_GRID = {"kind": "clip_vit", "output": "grid"}  # ViT-B/32: 7 x 7 positions
RN50X4 = {"kind": "clip_resnet", "blocks": (4, 6, 10, 6), "width": 80, "image_size": 288}
NF_RESNET = {"kind": "nf_resnet"}

# Overrides of MAGMA base's model. Type s is sequential (normal), p parallel, t parallel with a trained scale.
ROWS = {
    "adapters-none": {"mlp_adapter": None, "attn_adapter": None},
    "adapters-ff2": {"mlp_adapter": {"kind": "normal", "downsample_factor": 2}, "attn_adapter": None},
    "adapters-ff4": FF4,
    "adapters-attn8-ff8": {},
    "adapters-attn12-ff6": {
        "mlp_adapter": {"kind": "normal", "downsample_factor": 6},
        "attn_adapter": {"kind": "normal", "downsample_factor": 12},
    },
    "adapters-parallel-ff4": {"mlp_adapter": {"kind": "parallel", "downsample_factor": 4}, "attn_adapter": None},
    "adapters-scaled-attn8-ff8": {
        "mlp_adapter": {"kind": "scaled_parallel", "downsample_factor": 8},
        "attn_adapter": {"kind": "scaled_parallel", "downsample_factor": 8},
    },
    "encoder-nf_resnet": FF4 | {"encoder": NF_RESNET, "prefix": {"image_positions": 2, "dropout": 0.1}},
    "encoder-vit": FF4 | {"encoder": VIT_GRID},
    "encoder-rn50x4": FF4 | {"encoder": RN50X4},
    "encoder-rn50x16": FF4,
    # Tsimpoukelli et al. (2021): no LayerNorm after the prefix.
    "frozen": {
        "encoder": NF_RESNET,
        "prefix": {"image_positions": 2, "layernorm": False, "dropout": 0.0},
        "mlp_adapter": None,
        "attn_adapter": None,
    },
}


def get_config(row: str) -> ConfigDict:
    changes = ROWS[row]
    config = load_config_file(Path(__file__).with_name("magma_base.py"))
    config.model = config.model.to_dict() | changes
    config.data.folders = {"train": ("data/cc12m",), "validation": ("data/coco_val",)}
    config.base = f"models/{row}"
    if row == "frozen":
        # The paper keeps Frozen's own training settings: one constant rate for encoder and prefix.
        config.optim = {
            "learning_rate": 3e-4,
            "schedule": "constant",
            "b1": 0.9,
            "b2": 0.95,
            "groups": {"encoder": {"learning_rate": 3e-4}},
        }
    return config


get_config.__doc__ = f"rows: {', '.join(ROWS)}"
