"""Prunes FGVC-Aircraft (100 classes: variants of aircraft) with an ImageNet ResNet-18.

python -m dlc_jax.main --config=configs/fgvc_aircraft.py

Needs: the official archive fgvc-aircraft-2013b.tar.gz (2.75 GB) unpacked in data/, and network once
for the encoder, which comes from the Hugging Face hub.
Data: Maji et al. 2013, arXiv 1306.5151, https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/.
Licence: none named; images "for non-commercial research purposes only", copyright of the
photographers.
Classes: 100 variants, with 100 images each, 10,000 in all.
Splits: the official ones, train 3,334 + val 3,333 + test 3,333. Train and val are scored together,
6,667 images, as in the paper; test is only tested on. The strip with the photographer's name at
the foot of every image stays in, as in the paper's code.
Selects: every split gamma of the paper's grid, so that one can be chosen.
Expected: not run yet, no numbers.
"""

from ml_collections import ConfigDict

from dlc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset.train = "fgvc_aircraft:data/fgvc-aircraft-2013b/train+val"
    config.dataset.test = "fgvc_aircraft:data/fgvc-aircraft-2013b/test"
    config.encoder.name = "resnet18"
    config.encoder.weights = "timm/resnet18.tv_in1k"
    config.selection.methods = ("flexrand", "random")
    config.selection.splits = tuple(round(0.05 * i, 2) for i in range(1, 20))
    config.selection.seeds = (1, 2, 3)
    # probe.*: the defaults are the paper's
    return config
