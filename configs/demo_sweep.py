"""Does pruning help on the bundled sample? Every method at every keep fraction, fine-tuned.

python -m dlc_jax.main --config=configs/demo_sweep.py

111 runs: random, FlexRand, easiest and hardest at nine keep fractions, and the full set, with
three seeds each. Expected: 17 to 21 minutes on two cores; the full set at about 80 % test
accuracy; the table and figure of the README in runs/demo_sweep/report/. Stopped and started again,
it goes on where it was.
"""

from ml_collections import ConfigDict

from dlc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.stages = ("score", "select", "finetune", "report")
    config.dataset.train = "demo:caltech15/train"
    config.dataset.test = "demo:caltech15/test"
    config.encoder.name = "resnet18"
    config.encoder.weights = "demo:resnet18"
    config.encoder.image_size = 64
    config.selection.methods = ("random", "flexrand", "easiest", "hardest")
    config.selection.seeds = (1, 2, 3)
    # a tenth of 750 images would be a single step an epoch in the paper's batches of 128
    config.finetune.epochs = 20
    config.finetune.batch_size = 32
    config.finetune.learning_rate = 0.05
    return config
