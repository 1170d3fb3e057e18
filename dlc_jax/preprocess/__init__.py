"""Images as torchvision would hand them to a network, as uint8."""

from dlc_jax.preprocess.batches import filled, in_batches
from dlc_jax.preprocess.cache import ImageCache
from dlc_jax.preprocess.crops import RandomCrops
from dlc_jax.preprocess.decode import decode, resize_and_crop
from dlc_jax.preprocess.images import ON_CORRUPT, Images, check_dataset, load_images
from dlc_jax.preprocess.load import Reader
from dlc_jax.preprocess.threads import in_order

__all__ = [
    "ON_CORRUPT",
    "ImageCache",
    "Images",
    "RandomCrops",
    "Reader",
    "check_dataset",
    "decode",
    "filled",
    "in_batches",
    "in_order",
    "load_images",
    "resize_and_crop",
]
