"""Images scored per second, by number of batches queued ahead on the device.

python -m benchmarks.overlap [--folder=DIR] [--repeat=1] [--ahead=0,1,2,3] [--dtype=bfloat16]
    [--json=FILE]

FOLDER has one sub-folder of images per class (the bundled photographs, enlarged, where none is
given), each linked --repeat times. Images come from the cache; random weights. The numbers take
turns within one process; medians of the rounds. 0 waits for a batch before it sends the next one.
Needs enough images and probes for a pass to take seconds: finding the thresholds takes one, too.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import jax
from absl import app, flags

import dlc_jax as dlc
from benchmarks.measuring import enlarged_sample, linked, measured, random_encoder, save
from dlc_jax.probes import images as probe_images

_FOLDER = flags.DEFINE_string("folder", None, "Images, one sub-folder per class.")
_REPEAT = flags.DEFINE_integer("repeat", 1, "Links per image.")
_ENCODER = flags.DEFINE_string("encoder", "resnet18", "timm's name.")
_SIZE = flags.DEFINE_integer("image_size", 224, "Pixels.")
_BATCH = flags.DEFINE_integer("batch_size", 128, "Images.")
_PROBES = flags.DEFINE_integer("num_probes", 5, "Probes.")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Type that the network computes in.")
_AHEAD = flags.DEFINE_list("ahead", ["0", "1", "2", "3"], "Batches.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Medians are of so many.")
_JSON = flags.DEFINE_string("json", None, "Where the rates are written too.")


def main(_: list[str]) -> None:
    encoder = random_encoder(_ENCODER.value)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(_FOLDER.value) if _FOLDER.value else enlarged_sample(Path(scratch) / "jpeg")
        images = linked(folder, Path(scratch) / "images", _REPEAT.value)
        dataset = dlc.load_dataset(f"folder:{images}")
        cache = dlc.ImageCache(f"{scratch}/cache", max_gib=100)

        def scored(ahead: int) -> None:
            probe_images.AHEAD = ahead
            dlc.probe(
                encoder,
                dlc.Images(dataset, cache=cache),
                image_size=_SIZE.value,
                num_probes=_PROBES.value,
                compute=dlc.Compute(batch_size=_BATCH.value, dtype=_DTYPE.value),
            )

        calls = {n: lambda n=n: functools.partial(scored, int(n)) for n in _AHEAD.value}
        for found in measured(calls, _ROUNDS.value):
            num = len(dataset) * _PROBES.value
            rates = {ahead: num / some for ahead, some in found.seconds.items()}
            result = {"device": jax.devices()[0].device_kind, "rates": rates}
            save(_JSON.value, result | {"num_images": len(dataset), "errors": found.errors})
    print("| ahead | img x probe / s |\n|---|---|")
    for ahead, rate in rates.items():
        print(f"| {ahead} | {rate:.1f} |")


if __name__ == "__main__":
    app.run(main)
