"""Prunes ten classes of DTD: 800 real photographs of textures at 224 px, without network.

python -m dlc_jax.main --config=configs/dtd10.py

The data are the first ten of DTD's 47 classes (banded to crystalline), 120 images each, as Parquet
files train, validation and test of 400 images, in ../shared/dtd10; another place is given with
--config.dataset.train=parquet:<folder>/train+validation.parquet. They are not part of this
repository: DTD is for research purposes (https://www.robots.ox.ac.uk/~vgg/data/dtd/). The encoder
is a ResNet-18 that was trained on small images, in ../shared/encoders/resnet18_tin64; with network,
--config.encoder.weights=timm/resnet18.tv_in1k is a better one.

Train and validation are scored together, as in the paper; 8 probes spread over the path stand for
its 50. Expected: five minutes on two cores; 24 of 80 images of every class kept at 0.3.
"""

from ml_collections import ConfigDict

from dlc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset.train = "parquet:../shared/dtd10/train+validation.parquet"
    config.dataset.test = "parquet:../shared/dtd10/test.parquet"
    config.encoder.name = "resnet18"
    config.encoder.weights = "../shared/encoders/resnet18_tin64"
    config.encoder.image_size = 224
    config.probe.num_probes = 8
    config.probe.placement = "midpoint"
    config.selection.methods = ("flexrand", "easiest", "hardest", "random")
    config.selection.keep_fractions = (0.1, 0.3, 0.5)
    config.selection.seeds = (1,)
    return config
