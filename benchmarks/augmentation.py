"""Random resized crops: on the host by PIL, as training does, against matmuls on the device.

python -m benchmarks.augmentation

The device form takes uint8 images padded to one size, as a cache on the device would hold them. One
table: images per second of both, of a training step, and the largest difference in pixel values.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from PIL import Image

import dlc_jax as dlc
from dlc_jax.encoders import Encoder
from dlc_jax.preprocess.decode import decode, random_box, resized_crop
from dlc_jax.training.images.data import Batch
from dlc_jax.training.images.step import Network, Sgd, TrainState, initial_head, train_step

BATCH, REPEATS = 64, 5


def axis_weights(start: jax.Array, length: jax.Array, size: int, extent: int) -> jax.Array:
    """Antialiased bilinear weights [size, extent] that scale [start, start + length) to size."""
    scale = length / size
    support = jnp.maximum(scale, 1.0)
    centres = start + (jnp.arange(size) + 0.5) * scale
    places = jnp.arange(extent) + 0.5
    weights = jnp.maximum(0, 1 - jnp.abs(places[None] - centres[:, None]) / support)
    weights *= (places >= start) & (places < start + length)
    return weights / weights.sum(axis=1, keepdims=True)


def device_crop(image: jax.Array, box: jax.Array, flip: jax.Array, size: int) -> jax.Array:
    left, top, right, bottom = box
    rows = axis_weights(top, bottom - top, size, image.shape[0])
    columns = axis_weights(left, right - left, size, image.shape[1])
    columns = jnp.where(flip, columns[::-1], columns)
    mixed = jnp.einsum("th,hwc->twc", rows, image.astype(jnp.float32))
    pixels = jnp.einsum("sw,twc->tsc", columns, mixed)
    return jnp.round(jnp.clip(pixels, 0, 255)).astype(jnp.uint8)


def seconds(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def measure(encoder: Encoder, images: list[Image.Image], size: int, pool: ThreadPoolExecutor):
    generator = np.random.default_rng(0)
    boxes = [random_box(generator, image.height, image.width) for image in images]
    flips = generator.random(len(images)) < 0.5
    extent = [max(side) for side in zip(*(image.size for image in images), strict=True)][::-1]
    padded = np.zeros((len(images), *extent, 3), np.uint8)
    for row, image in zip(padded, images, strict=True):
        row[: image.height, : image.width] = np.asarray(image)

    def host() -> np.ndarray:
        cut = pool.map(resized_crop, images, boxes, flips.tolist(), [size] * len(images))
        return np.stack(list(cut))

    form = jax.jit(jax.vmap(lambda image, box, flip: device_crop(image, box, flip, size)))
    on_device = jax.device_put((padded, np.array(boxes, np.float32), flips))

    def device() -> jax.Array:
        return jax.block_until_ready(form(*on_device))

    width = encoder.params["layer4"][1]["conv2"]["kernel"].shape[-1]
    sgd = Sgd(0.9, 1e-5, True)
    head = initial_head(width, 15, "mean", 0)
    state = TrainState.start(encoder.params, encoder.statistics, head, sgd)
    network = Network.of(encoder, "float32")
    batch = Batch.padded(host(), np.zeros(len(images), np.int32), len(images))

    def step() -> TrainState:
        return jax.block_until_ready(train_step(network, sgd, state, *batch, jnp.float32(0.1))[0])

    difference = np.abs(host().astype(int) - np.asarray(device()).astype(int))
    rates = [len(images) / seconds(run) for run in (host, device, step)]
    return (*rates, difference.max(), (difference > 1).mean())


def main(_: list[str]) -> None:
    dataset = dlc.load_dataset("demo:caltech15/train")
    small = [decode(dataset[i].image, dataset[i].id) for i in range(0, 750, 750 // BATCH)][:BATCH]
    large = [image.resize((image.width * 5, image.height * 5)) for image in small]
    encoder = dlc.load_encoder("resnet18", "demo:resnet18")
    print("size | host img/s | device/host | train step (width 16)/host | max diff | share > 1")
    with ThreadPoolExecutor() as pool:
        for size, images in ((64, small), (224, large)):
            host, device, step, largest, share = measure(encoder, images, size, pool)
            print(
                f"{size:4} | {host:10.0f} | {device / host:11.3f} | {step / host:26.3f} | "
                f"{largest:8} | {share:.4f}"
            )


if __name__ == "__main__":
    app.run(main)
