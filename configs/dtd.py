"""Prunes DTD (47 classes of textures) with an ImageNet ResNet-18, in the paper's settings.

python -m dlc_jax.main --config=configs/dtd.py

Needs network once: pip install -e '.[tfds]' lets tfds prepare the data (600 MB), and the
encoder comes from the Hugging Face hub. Train and validation split are scored together, 3,760
images, as in the paper; every split gamma of its grid is selected, so that one can be chosen.
"""

from ml_collections import ConfigDict

from dlc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset.train = "tfds:dtd/train+validation"
    config.dataset.test = "tfds:dtd/test"
    config.encoder.name = "resnet18"
    config.encoder.weights = "timm/resnet18.tv_in1k"
    config.encoder.image_size = 224
    config.probe.schedule = "linear"
    config.probe.step = 0.02
    config.probe.num_probes = 50
    config.selection.methods = ("flexrand", "random")
    config.selection.splits = tuple(round(0.05 * i, 2) for i in range(1, 20))
    config.selection.seeds = (1, 2, 3)
    return config
