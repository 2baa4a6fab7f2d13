"""The quick start's model finetuned on unseen questions, with a classification head for yes and no and early stopping.

    for split in train validation test; do
        python -m magma_jax.data convert --from openmoji $split data/openmoji_$split \\
            --option "kinds=is tone,is gender,is what"
    done
    python train.py --config configs/finetune_quickstart.py

Starts from runs/quickstart, which `python train.py` makes. Folders, head and early stopping are those of
configs/finetune_snli_ve.py, at a size for two CPU cores.
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("quickstart.py"))
    config.base = "runs/quickstart"
    del config["weights"]
    config.model.classes = 2
    questions = {"texts": "questions", "question_prompt": "{}"}
    config.data = {
        "kind": "folders",
        "folders": {
            split: ({"path": f"data/openmoji_{split}", **questions},) for split in ("train", "validation", "test")
        },
        "classes": ("yes", "no"),
        "length": 32,
    }
    config.optim.learning_rate = 2e-3
    config.steps = 400
    config.validation = {"every": 40, "samples": 4096, "patience": 3}
    config.watch.samples_every = 0
    config.evaluate = False
    return config
