"""CM3Leon learns to draw and to name OpenMoji's people and things from retrieved drawings: 2 million parameters.

    python -m magma_jax.retrieval build data/openmoji_bank --data openmoji --encoder names
    python -m magma_jax.retrieval annotate data/openmoji_bank data/openmoji_by_name --data openmoji --encoder names \\
        --documents 4 --by-image "" --max-similarity 1 --dropout 0 --decay 0.5
    python -m magma_jax.retrieval annotate data/openmoji_bank data/openmoji_by_image --data openmoji --encoder names \\
        --documents 4 --images-only --max-similarity 1 --dropout 0
    python train.py --config configs/cm3leon_quickstart.py
    python eval.py --workdir runs/cm3leon_quickstart

Retrieved drawings stand beside the sequence (``models/references.py``), which is not the paper's form; that is
configs/cm3leon_paper_quickstart.py. The package has the image tokenizer's weights, which configs/vqgan_quickstart.py
trains.
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    tokenizer = load_config_file(Path(__file__).with_name("vqgan_quickstart.py")).model
    return ConfigDict(
        {
            "model": {
                "kind": "cm3leon",
                "layers": 4,
                "width": 128,
                "heads": 2,
                "feed_forward": 512,
                # The package's tokenizer has 2,048 texts.
                "vocab_rows": 3200,
                "vocabulary": {"text": 2048, "image": tokenizer.codes, "sentinels": 16},
                "context_length": 1024,
                # Not the paper's: codes of two retrieved drawings at the same places, vectors of captions, a copy gate,
                # which is closed for half of the rows, and the mean codes of an image's left and right halves for the
                # text behind it.
                "references": {"images": 2, "copy_dropout": 0.5, "strips": 2},
                # Wider than the paper's, which is for 1,024 and more entries.
                "embedding_std": 0.02,
                "image_tokens": 256,
                "tokenizer": tokenizer.to_dict(),
            },
            "data": {
                "kind": "openmoji_documents",
                "length": 320,
                "annotation": "data/openmoji_by_name",
                "spans": {"mean": 0.2, "rotation": 1.0},
                "beside": {
                    "images": 2,
                    "by_image": "data/openmoji_by_image",
                    "captions": 0.35,
                    "weights": (0.85, 0.15),
                },
            },
            "loss": {"ranges": True, "text_weight": 4.0},
            "weights": {"image_tokenizer": "quickstart_vqgan"},
            "optim": {"learning_rate": 3e-3, "warmup_steps": 50, "b2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0},
            "steps": 3000,
            "batch_size": 8,
            "validation": {"every": 500, "samples": 64},
        }
    )
