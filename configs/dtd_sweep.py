"""The paper's fine-tuning sweep on DTD: 50 epochs of ResNet-18 on every kept set and on all of it.

python -m dlc_jax.main --config=configs/dtd_sweep.py

Needs network once and `pip install -e '.[tfds]'`, see configs/dtd.py. 111 runs at the paper's
settings (SGD, batch 128, learning rate 1e-3, divided by 10 after epochs 25 and 37); meant for a
GPU. FlexRand's split is 0.5 here; the paper chooses one per keep fraction on validation data.
Not run by us yet: no expected numbers.
"""

from ml_collections import ConfigDict

from dlc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.stages = ("score", "select", "finetune", "report")
    config.dataset.train = "tfds:dtd/train+validation"
    config.dataset.test = "tfds:dtd/test"
    config.encoder.name = "resnet18"
    config.encoder.weights = "timm/resnet18.tv_in1k"
    config.encoder.image_size = 224
    config.selection.methods = ("random", "flexrand", "easiest", "hardest")
    config.selection.seeds = (1, 2, 3)
    # finetune.*: the defaults are the paper's
    return config
