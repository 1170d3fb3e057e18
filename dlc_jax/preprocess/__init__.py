"""Images as torchvision would hand them to a network, as uint8."""

from dlc_jax.preprocess.cache import ImageCache
from dlc_jax.preprocess.decode import RandomCrops, decode, resize_and_crop
from dlc_jax.preprocess.images import (
    ON_CORRUPT,
    Images,
    Reader,
    check_dataset,
    filled,
    in_batches,
    in_order,
    load_images,
)
