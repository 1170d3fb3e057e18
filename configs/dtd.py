"""Prunes DTD (47 classes of textures) with an ImageNet ResNet-18, in the paper's settings.

python -m dlc_jax.main --config=configs/dtd.py

Needs: network once. pip install -e '.[tfds]' lets tfds prepare the data (600 MB), and the encoder
comes from the Hugging Face hub.
Data: Describable Textures Dataset, Cimpoi et al. 2014, https://www.robots.ox.ac.uk/~vgg/data/dtd/.
Licence: none named; "made available to the computer vision community for research purposes".
Classes: 47, with 120 images each, 5,640 in all.
Splits: the official split 1, train 1,880 + validation 1,880 + test 1,880, 40 each per class. Train
and validation are scored together, 3,760 images, as in the paper; test is only tested on.
Selects: every split gamma of the paper's grid, so that one can be chosen.
Expected: 376 of 3,760 images kept at keep fraction 0.1. Not run yet: no other numbers.
"""

from ml_collections import ConfigDict

from dlc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset.train = "tfds:dtd/train+validation"
    config.dataset.test = "tfds:dtd/test"
    config.encoder.name = "resnet18"
    config.encoder.weights = "timm/resnet18.tv_in1k"
    config.selection.methods = ("flexrand", "random")
    config.selection.splits = tuple(round(0.05 * i, 2) for i in range(1, 20))
    config.selection.seeds = (1, 2, 3)
    # probe.*: the defaults are the paper's
    return config
