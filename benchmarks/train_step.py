"""A training step against PyTorch's, same network, batch and optimiser, in turns in one process.

python -m benchmarks.train_step [--image_size=64] [--batch_size=64]

Needs the test extra. One table: images per second of torch (NCHW, and channels last) and the ratio
of this package to the better of the two.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import dlc_jax as dlc
from dlc_jax.training.batches import Batch
from dlc_jax.training.step import Network, Sgd, TrainState, initial_head, train_step

CLASSES, REPEATS, STEPS = 15, 5, 3


def timm_models(folder: str):
    """Yields name, model and its weights as a safetensors file."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):  # not in every build of torchvision, and timm imports it
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm
    from safetensors.torch import save_file

    for name in ("resnet18", "resnet50"):
        model = timm.create_model(name, num_classes=CLASSES)
        path = os.path.join(folder, f"{name}.safetensors")
        save_file(model.state_dict(), path)
        yield name, model, path


def torch_step(model, images: np.ndarray, labels: np.ndarray, channels_last: bool) -> Callable:
    import torch

    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=layout).train()
    inputs = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    inputs = inputs.contiguous(memory_format=layout)
    targets = torch.from_numpy(labels).long()
    sgd = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, nesterov=True, weight_decay=1e-5)

    def step() -> None:
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        sgd.step()

    return step


def our_step(encoder: dlc.Encoder, images: np.ndarray, labels: np.ndarray) -> Callable:
    sgd, network = Sgd(0.9, 1e-5, True), Network.of(encoder, "float32")
    batch = Batch.padded(images, labels, len(labels))
    num_features = dlc.features(
        encoder, dlc.array_dataset(images[:2], [0, 1]), image_size=images.shape[1]
    ).shape[1]
    head = initial_head(num_features, CLASSES, "mean", 0)
    states = [TrainState.start(encoder.params, encoder.statistics, head, sgd)]

    def step() -> None:
        states[0], _ = train_step(network, sgd, states[0], *batch, jnp.float32(1e-3))
        jax.block_until_ready(states[0])

    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64)
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    shape = (arguments.batch_size, arguments.image_size, arguments.image_size, 3)
    images = generator.integers(0, 256, shape, np.uint8)
    labels = generator.integers(0, CLASSES, arguments.batch_size).astype(np.int32)
    print("network  | torch NCHW img/s | torch channels last img/s | ours / better torch")
    with tempfile.TemporaryDirectory() as folder:
        for name, model, path in timm_models(folder):
            steps = [
                torch_step(copy.deepcopy(model), images, labels, channels_last=False),
                torch_step(copy.deepcopy(model), images, labels, channels_last=True),
                our_step(dlc.load_encoder(name, path), images, labels),
            ]
            times: list[list[float]] = [[], [], []]
            for round_ in range(REPEATS + 1):  # in turns, and the first round only warms up
                for step, mine in zip(steps, times, strict=True):
                    start = time.perf_counter()
                    for _ in range(STEPS):
                        step()
                    if round_:
                        mine.append((time.perf_counter() - start) / STEPS)
            plain, last, ours = (len(labels) / float(np.median(mine)) for mine in times)
            print(f"{name} | {plain:16.1f} | {last:25.1f} | {ours / max(plain, last):.2f}")


if __name__ == "__main__":
    main()
