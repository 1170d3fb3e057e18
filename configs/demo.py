"""Prunes the bundled sample: 750 images of 15 Caltech-101 classes, a narrow ResNet-18; no network.

python -m dlc_jax.main --config=configs/demo.py

Expected: under a minute on two cores; 75 of 750 samples kept at keep fraction 0.1, 675 at 0.9.
"""

from ml_collections import ConfigDict

from dlc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset.train = "demo:caltech15/train"
    config.dataset.test = "demo:caltech15/test"
    config.encoder.name = "resnet18"
    config.encoder.weights = "demo:resnet18"
    config.encoder.image_size = 64
    config.selection.methods = ("flexrand", "easiest", "hardest", "random")
    config.selection.seeds = (1,)
    return config
