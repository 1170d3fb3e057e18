"""Prunes the bundled sample: 750 images of 15 Caltech-101 classes, a narrow ResNet-18; no network.

python -m dlc_jax.main --config=configs/demo.py

Expected: under a minute on two cores; 75 of 750 samples kept at keep fraction 0.1, 675 at 0.9.
With --config.stages="('score','select','finetune','report')" also 37 fine-tuning runs, six minutes;
the full set at about 80 % test accuracy.
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
    # the paper's rate and batches of 128 move next to nothing on 750 images
    config.finetune.epochs = 20
    config.finetune.batch_size = 32
    config.finetune.learning_rate = 0.05
    return config
