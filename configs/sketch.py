"""Prunes Sketch (TU-Berlin: 250 classes of objects drawn by hand) with an ImageNet ResNet-18.

python -m dlc_jax.main --config=configs/sketch.py

Needs: the PNG archive sketches_png.zip unpacked so that data/sketch has one folder per class, and
network once for the encoder, which comes from the Hugging Face hub.
Data: Eitz et al. 2012, "How Do Humans Sketch Objects?",
https://cybertron.cg.tu-berlin.de/eitz/projects/classifysketch/.
Licence: CC BY 4.0.
Classes: 250, with 80 sketches each, 20,000 in all.
Splits: the archive has none, so they are made here, 60/20/20 % of every class with seed 0: train
12,000 + validation 4,000 + test 4,000. Train and validation are scored together, 16,000 sketches,
as in the paper; test is only tested on. The paper's code reads folders train, val and test that it
does not come with, so its own split is not known and its numbers are not to be met exactly; if you
have such folders:
--config.dataset.train=folder:data/Sketch/train+val --config.dataset.test=folder:data/Sketch/test.
Selects: every split gamma of the paper's grid, so that one can be chosen.
Expected: 1,500 of 16,000 sketches kept at keep fraction 0.1. Not run yet: no other numbers.
"""

from ml_collections import ConfigDict

from dlc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset.train = "split:60/20/20:train+validation:folder:data/sketch"
    config.dataset.test = "split:60/20/20:test:folder:data/sketch"
    config.encoder.name = "resnet18"
    config.encoder.weights = "timm/resnet18.tv_in1k"
    config.selection.methods = ("flexrand", "random")
    config.selection.splits = tuple(round(0.05 * i, 2) for i in range(1, 20))
    config.selection.seeds = (1, 2, 3)
    # probe.*: the defaults are the paper's
    return config
