"""The quick start: a frozen language model learns to describe drawings that it was never shown.

python train.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({})
