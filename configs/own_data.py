"""The quick start's model finetuned on captions and questions of your own: docs/day.md.

    python -m magma_jax.data convert --from table my.jsonl data/mine --split train=0.8 validation=0.1 test=0.1
    python train.py --config configs/own_data.py --workdir runs/mine

Starts from runs/quickstart, which `python train.py` makes; `--set base=FOLDER` names another run or model folder.
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("quickstart.py"))
    config.base = "runs/quickstart"
    del config["weights"]
    config.data = {
        "kind": "folders",
        "folders": {
            split: ({"path": f"data/mine/{split}", "caption_prompt": "A picture of"},)
            for split in ("train", "validation", "test")
        },
        "length": 32,
    }
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 10
    config.steps = 300
    config.validation = {"every": 50, "samples": 4096, "patience": 3}
    config.watch.samples_every = 100
    return config
