"""Prunes CXRB10 (10 classes of chest X-rays) with an ImageNet ResNet-18.

python -m dlc_jax.main --config=configs/cxrb10.py

Needs: data/CXRB10/{train,val,test}/<class>/<image>, which you have to make or to ask the paper's
authors for: we found no place to download it from. Network once for the encoder, which comes from
the Hugging Face hub.
Data: "10 balanced categories" out of ChestX-ray14, says the first version of the paper (arXiv
2402.05356v1, section 4.1); that is Wang et al. 2017, arXiv 1705.02315, 112,120 X-rays of 30,805
patients with 14 findings, https://nihcc.app.box.com/v/ChestXray-NIHCC.
Licence: of the selection, none found. The X-rays may be used without restriction if their page is
linked, Wang et al. cited and the NIH Clinical Center named as the provider.
Classes: 10. Which ones is not confirmed, but that Nodule is one of them.
Splits: train, val and test are what the paper's code reads; train and val are scored together, test
is only tested on. Not confirmed: their sizes, what became of images with several findings, and
whether a patient may be in two of them. A set you make yourself has other numbers than the paper's.
Selects: every split gamma of the paper's grid, so that one can be chosen.
Expected: not run, no numbers.
"""

from ml_collections import ConfigDict

from dlc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset.train = "folder:data/CXRB10/train+val"
    config.dataset.test = "folder:data/CXRB10/test"
    config.encoder.name = "resnet18"
    config.encoder.weights = "timm/resnet18.tv_in1k"
    config.selection.methods = ("flexrand", "random")
    config.selection.splits = tuple(round(0.05 * i, 2) for i in range(1, 20))
    config.selection.seeds = (1, 2, 3)
    # probe.*: the defaults are the paper's
    return config
