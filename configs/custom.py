"""A template for your own data and model: copy it and change what is marked.

python -m dlc_jax.main --config=configs/custom.py --config.dataset.train=folder:/data/flowers
"""

from ml_collections import ConfigDict

from dlc_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    # Your data: folder:<root> has one sub-folder of images per class; parquet:<file, folder or
    # glob> follows the Hugging Face image convention; tfds:<name>/<split> is a prepared data set.
    config.dataset.train = "folder:data/train"
    # "error" stops at an unreadable image and names it; "skip" leaves it out and lists it.
    config.dataset.on_corrupt = "error"

    # What to test on after fine-tuning; the stages score and select do not read it.
    config.dataset.test = None  # "folder:data/test"
    # Add "finetune" and "report" to train on every kept set, and to see whether it helped; that
    # takes "random" among the methods below, and three seeds.
    config.stages = ("score", "select")

    # Your model: resnet18, resnet34, resnet50, vit_small_patch16_224 or vit_base_patch16_224 with
    # a timm checkpoint: a hub id, a .safetensors file, or a folder with model.safetensors and
    # config.json. (A network of your own goes through the Python API: dlc_jax.Encoder.)
    config.encoder.name = "resnet50"
    config.encoder.weights = "timm/resnet50.tv_in1k"
    config.encoder.image_size = 224

    # How thorough: 50 probes are the paper's; 8 rank nearly the same, six times faster, but only
    # with placement "midpoint", which spreads them over the whole path.
    config.probe.num_probes = 50
    config.probe.placement = "grid"

    # What to keep: every combination is written, none costs another scoring pass. A single value
    # still needs its comma: (0.3,).
    config.selection.methods = ("flexrand",)
    config.selection.keep_fractions = (0.1, 0.3, 0.5)
    # The share of a class that counts as easy; half of what is kept is drawn from either side
    # while that side is large enough.
    config.selection.splits = (0.5,)
    config.selection.seeds = (1,)

    # How to fine-tune; these are the paper's values.
    config.finetune.epochs = 50
    config.finetune.batch_size = 128
    config.finetune.learning_rate = 1e-3
    return config
