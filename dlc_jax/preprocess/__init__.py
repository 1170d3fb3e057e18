"""Images as torchvision would hand them to a network, as uint8."""

from dlc_jax.preprocess.crops import RandomCrops, resized_crop
from dlc_jax.preprocess.decode import decode, resize_and_crop
from dlc_jax.preprocess.load import LoadedImages, load_images

__all__ = [
    "LoadedImages",
    "RandomCrops",
    "decode",
    "load_images",
    "resize_and_crop",
    "resized_crop",
]
