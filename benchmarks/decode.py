"""Images per second from JPEG files to evaluation crops, against torchvision's DataLoader.

python -m benchmarks.decode [--folder=DIR] [--repeat=1] [--image_size=224] [--json=FILE]

Both read the same folder of JPEGs (one sub-folder per class; photographs of the bundled sample,
enlarged to 500 x 375 or so, where none is given), each linked --repeat times, on all cores, and put
batches of 128 together: several per core are needed. They take turns within one run, after a round
that does not count. torchvision's loader has a worker per core, which stay between rounds; `uint8`
leaves pixels as they are (PILToTensor), `float` is its usual ToTensor. `streamed` decodes as
scoring without the cache does, `cached` reads what the cache has, checksums included.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from absl import app, flags

import dlc_jax as dlc
from benchmarks import peers
from benchmarks.measuring import enlarged_sample, linked, measured, save
from dlc_jax.preprocess.images import in_batches

_FOLDER = flags.DEFINE_string("folder", None, "Images, one sub-folder per class.")
_REPEAT = flags.DEFINE_integer("repeat", 1, "Links per image.")
_SIZE = flags.DEFINE_integer("image_size", 224, "Side of the crops.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds that count.")
_JSON = flags.DEFINE_string("json", None, "Where the rates are written too.")
_BATCH = 128
CORES = os.sched_getaffinity(0)


def ours(folder: Path, cache: dlc.ImageCache | None) -> Callable[[], int]:
    """Returns a pass over all images, which gives their number."""
    dataset = dlc.load_dataset(f"folder:{folder}")

    def run() -> int:
        reader = dlc.Images(dataset, _SIZE.value, cache=cache).evaluation_crops()
        items = reader.readable(np.arange(len(dataset)), None)
        return sum(len(np.stack(pixels)) for _, pixels in in_batches(items, _BATCH))

    return run


def theirs(folder: Path, last: str) -> Callable[[], int]:
    """Returns the same with torchvision's ImageFolder behind torch's DataLoader."""
    from torchvision import datasets, transforms

    side = round(_SIZE.value * 256 / 224)
    steps = [transforms.Resize(side), transforms.CenterCrop(_SIZE.value)]
    dataset = datasets.ImageFolder(
        folder, transforms.Compose([*steps, getattr(transforms, last)()])
    )
    loader = torch.utils.data.DataLoader(
        dataset, _BATCH, num_workers=len(CORES), persistent_workers=True
    )
    return lambda: sum(len(images) for images, _ in loader)


def main(_: list[str]) -> None:
    """Prints the table and a line of JSON."""
    peers.import_timm()  # sets up torchvision
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(_FOLDER.value) if _FOLDER.value else enlarged_sample(Path(scratch) / "jpeg")
        folder = linked(folder, Path(scratch) / "images", _REPEAT.value)
        passes = {
            "streamed": ours(folder, None),
            "torchvision uint8": theirs(folder, "PILToTensor"),
            "torchvision float": theirs(folder, "ToTensor"),
            "cached": ours(folder, dlc.ImageCache(f"{scratch}/cache", max_gib=100)),
        }
        num = sum(1 for path in folder.glob("*/*"))
        result = {"num_images": num, "image_size": _SIZE.value, "cores": len(CORES)}
        for found in measured(
            {name: lambda run=run: run for name, run in passes.items()}, _ROUNDS.value
        ):
            rates = {name: num / some for name, some in found.seconds.items()}
            result |= {"images_per_s": rates, "errors": found.errors}
            save(_JSON.value, result)
    base = rates.get("torchvision uint8", float("nan"))
    for name, rate in rates.items():
        print(f"{name:<20} {rate:8.0f} img/s  ratio {rate / base:.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
