"""Images as torchvision would hand them to a network, as uint8."""

from dlc_jax.files.image_files import opened
from dlc_jax.preprocess.batches import filled, in_batches
from dlc_jax.preprocess.cache import ImageCache
from dlc_jax.preprocess.crops import RandomCrops, resized_crop
from dlc_jax.preprocess.decode import decode, resize_and_crop
from dlc_jax.preprocess.images import Images, check_dataset
from dlc_jax.preprocess.load import (
    ON_CORRUPT,
    LoadedImages,
    Reader,
    evaluation_crops,
    is_mid_grey,
    load_images,
    shown,
)
from dlc_jax.preprocess.threads import in_order

__all__ = [
    "ON_CORRUPT",
    "ImageCache",
    "Images",
    "LoadedImages",
    "RandomCrops",
    "Reader",
    "check_dataset",
    "decode",
    "evaluation_crops",
    "filled",
    "in_batches",
    "in_order",
    "is_mid_grey",
    "load_images",
    "opened",
    "resize_and_crop",
    "resized_crop",
    "shown",
]
