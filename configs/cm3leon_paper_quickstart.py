"""CM3Leon's quick start in the paper's form: the retrieved drawing stands in the sequence, before the text.

Annotations are those of configs/cm3leon_quickstart.py.

    python train.py --config configs/cm3leon_paper_quickstart.py
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("cm3leon_quickstart.py"))
    del config.model.references
    del config.loss
    # Two drawings and their names a document, and room for three spans.
    config.data = ConfigDict(
        {"kind": "openmoji_documents", "length": 576, "retrieved": 1, "annotation": "data/openmoji_by_name"}
    )
    config.optim.learning_rate = 2e-3
    return config
