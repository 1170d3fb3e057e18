"""Prunes DeepWeeds (9 classes of Australian plants) with an ImageNet ResNet-18.

python -m dlc_jax.main --config=configs/deep_weeds.py

Needs: network once. pip install -e '.[tfds]' lets tfds prepare the data (469 MiB), and the encoder
comes from the Hugging Face hub.
Data: Olsen et al. 2019, doi 10.1038/s41598-018-38343-3, https://github.com/AlexOlsen/DeepWeeds.
Licence: CC BY 4.0 for images and annotations.
Classes: 9, eight species of weed and Negative, which is none of them; 17,509 images in all.
Splits: tfds has all images as `train`, so they are split here, 60/20/20 % of every class with seed
0: about 10,505 + 3,502 + 3,502. Train and validation are scored together, as in the paper; test is
only tested on. The paper's code reads folders train, val and test that it does not come with, so
its own split is not known and its numbers are not to be met exactly; if you have such folders:
--config.dataset.train=folder:data/DeepWeeds/train+val
--config.dataset.test=folder:data/DeepWeeds/test.
Selects: every split gamma of the paper's grid, so that one can be chosen.
Expected: not run yet, no numbers.
"""

from ml_collections import ConfigDict

from dlc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset.train = "split:60/20/20:train+validation:tfds:deep_weeds/train"
    config.dataset.test = "split:60/20/20:test:tfds:deep_weeds/train"
    config.encoder.name = "resnet18"
    config.encoder.weights = "timm/resnet18.tv_in1k"
    config.selection.methods = ("flexrand", "random")
    config.selection.splits = tuple(round(0.05 * i, 2) for i in range(1, 20))
    config.selection.seeds = (1, 2, 3)
    # probe.*: the defaults are the paper's
    return config
