"""From JPEG files to kept indices: this package, the released code's procedure, and good torch.

python -m benchmarks.prune_end_to_end [--folder=DIR] [--num_images=200] [--repeat=1]
    [--encoders=resnet18,vit_small_patch16_224] [--by=dlc_jax 50,...] [--rounds=1] [--json=FILE]

FOLDER has one sub-folder of images per class, or is another source (the bundled photographs,
enlarged, where none is given), and --repeat links every image so many times. Every contender is a
process of its own; they take turns. Seconds are from listing the files to the indices, without the
start of Python and its imports, which are in `process`.

released       as score-wot.py does it, written anew: torch.nn.utils.prune masks all convolutions
               and linear layers globally, 2 % of what is left each time; for the features and every
               probe, a DataLoader with a worker per core reads and decodes all images; float32,
               NCHW; classes are cut in Python
good torch     images are decoded once and kept as uint8; masks are thresholds; channels_last under
               bfloat16 autocast (float32 where --good_float32)
dlc_jax M      M probes, or auto; `cold` with nothing compiled or decoded, `warm` with both on disk
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

_FOLDER = flags.DEFINE_string("folder", None, "Images, one sub-folder per class, or parquet:...")
_NUM = flags.DEFINE_integer("num_images", 200, "Of the folder, evenly over its classes.")
_REPEAT = flags.DEFINE_integer("repeat", 1, "How often every image is there.")
_ENCODERS = flags.DEFINE_list("encoders", ["resnet18", "vit_small_patch16_224"], "timm's names.")
_SIZE = flags.DEFINE_integer("image_size", 224, "Pixels.")
_BATCH = flags.DEFINE_integer("batch_size", 32, "Images per batch, of all.")
_BY = flags.DEFINE_list("by", ["released", "good torch", "dlc_jax 50", "dlc_jax auto"], "Who.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Type that dlc_jax computes in.")
_GOOD_FLOAT32 = flags.DEFINE_boolean("good_float32", False, "Good torch without autocast.")
_ROUNDS = flags.DEFINE_integer("rounds", 1, "Medians are of so many.")
_JSON = flags.DEFINE_string("json", None, "Where the rows are written too.")
_RUN = flags.DEFINE_string("run", None, "Of a contender's own process: its name.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Of a contender's own process.")

_KEEP, _SPLIT, _STEP, _PROBES = 0.3, 0.5, 0.02, 50


def main(_: list[str]) -> None:
    if _RUN.value:
        print(json.dumps(_contend(_RUN.value)))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        images = _linked_images(Path(folder))
        print("| encoder | by | | probes | seconds | process | times as fast as released |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for encoder in _ENCODERS.value:
            found = _all_of(encoder, images, Path(folder), rows)
            rows += _rows(encoder, found)
            base = _median(found.get(("released", "warm"), []), "seconds")
            for (by, state), runs in found.items():
                seconds = _median(runs, "seconds")
                print(
                    f"| {encoder} | {by} | {state} | {_median(runs, 'num_probes'):g} | "
                    f"{seconds:.1f} | {_median(runs, 'process'):.1f} | {base / seconds:.2f} |",
                    flush=True,
                )


def _median(runs: list[dict[str, float]], name: str) -> float:
    return statistics.median([run[name] for run in runs] or [float("nan")])


def _linked_images(folder: Path) -> Path:
    """Returns a folder of as many images as asked for, evenly over the classes."""
    from benchmarks.measuring import enlarged_sample, linked

    if _FOLDER.value is None:
        source = enlarged_sample(folder / "source")
    elif ":" in _FOLDER.value:
        source = _written(_FOLDER.value, folder / "source")
    else:
        source = Path(_FOLDER.value)
    num_classes = sum(path.is_dir() for path in source.iterdir())
    each = -(-_NUM.value // num_classes)
    return linked(source, folder / "images", _REPEAT.value, each)


def _written(source: str, folder: Path) -> Path:
    """Writes the encoded images of a source as files; returns their folder."""
    import dlc_jax as dlc

    dataset = dlc.load_dataset(source)
    for position in range(len(dataset)):
        of_class = folder / dataset.class_names[int(dataset.labels[position])]
        of_class.mkdir(parents=True, exist_ok=True)
        (of_class / f"{position:06}.jpg").write_bytes(dataset[position].image)
    return folder


Runs = dict[tuple[str, str], list[dict[str, float]]]  # by contender and state


def _rows(encoder: str, found: Runs) -> list[dict[str, Any]]:
    return [
        {"encoder": encoder, "by": by, "state": state}
        | {name: [run[name] for run in runs] for name in runs[0]}
        for (by, state), runs in found.items()
    ]


def _all_of(encoder: str, images: Path, folder: Path, before: list[dict[str, Any]]) -> Runs:
    """Returns probes, seconds, and seconds of the process; writes them after every run."""
    from benchmarks.measuring import save  # and with it JAX, which torch's processes do not load

    checkpoint = folder / f"{encoder}.safetensors"
    if not checkpoint.exists():
        from safetensors.torch import save_file

        from benchmarks import peers

        save_file(peers.torch_model(encoder).cpu().state_dict(), checkpoint)
    found: Runs = {}
    for number in range(_ROUNDS.value):
        for by in _BY.value:
            # torch has nothing to find again; of the others the first time is the cold one
            states = ["cold", "warm"] if by.startswith("dlc_jax") and not number else ["warm"]
            for state in states:
                try:
                    run = _run(by, images, checkpoint, folder)
                except subprocess.CalledProcessError as error:  # the others can be measured
                    why = f"ended with {error.returncode}"
                    print(f"{by}, {state}, is left out: {why}", flush=True)
                    before.append({"encoder": encoder, "by": by, "state": state, "error": why})
                else:
                    found.setdefault((by, state), []).append(run)
                save(_JSON.value, before + _rows(encoder, found))
    return found


def _run(by: str, images: Path, checkpoint: Path, folder: Path) -> dict[str, float]:
    own = folder / f"{checkpoint.stem}-{by.replace(' ', '-')}"
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": f"{own}/programs",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": f"{own}/images",
    }
    command = [sys.executable, "-m", "benchmarks.prune_end_to_end", f"--run={by}"]
    command += [f"--folder={images}", f"--checkpoint={checkpoint}", f"--dtype={_DTYPE.value}"]
    command += [f"--image_size={_SIZE.value}", f"--batch_size={_BATCH.value}"]
    command += [f"--good_float32={_GOOD_FLOAT32.value}"]
    start = time.perf_counter()
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    process = time.perf_counter() - start
    return json.loads(done.stdout.splitlines()[-1]) | {"process": process}


def _contend(by: str) -> dict[str, float]:
    """Returns the probes taken, and the seconds from listing the files to the kept indices."""
    name = Path(_CHECKPOINT.value).stem
    if by.startswith("dlc_jax"):
        import dlc_jax as dlc
        from dlc_jax.distributed import use_all_cores

        use_all_cores()
        start = time.perf_counter()
        mesh = dlc.make_mesh()
        num_probes = by.split()[1]
        dataset = dlc.load_dataset(f"folder:{_FOLDER.value}")
        probes = dlc.probe(
            dlc.load_encoder(name, _CHECKPOINT.value),
            dlc.Images(dataset, cache=dlc.ImageCache()),
            num_probes=num_probes if num_probes == "auto" else int(num_probes),
            image_size=_SIZE.value,
            compute=dlc.Compute(batch_size=max(1, _BATCH.value // mesh.size), dtype=_DTYPE.value),
            run=dlc.Run(mesh=mesh),
        )
        dlc.select(dlc.score(probes), probes.labels, keep_fraction=_KEEP, split=_SPLIT)
        return {"seconds": time.perf_counter() - start, "num_probes": len(probes.losses)}
    from benchmarks import peers

    peers.import_timm()
    model = peers.torch_model(name, _CHECKPOINT.value)
    start = time.perf_counter()
    if by == "released":
        losses, labels = _released(model)
    else:
        losses, labels = _good_torch(model)
    _flexrand(losses.mean(axis=0), labels)
    return {"seconds": time.perf_counter() - start, "num_probes": len(losses)}


def _flexrand(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    kept = []
    for label in np.unique(labels):
        ranked = np.flatnonzero(labels == label)
        ranked = ranked[np.argsort(scores[ranked])]
        half = round(len(ranked) * _SPLIT)
        num = round(len(ranked) * _KEEP / 2)
        kept += [np.random.permutation(part)[:num] for part in (ranked[:half], ranked[half:])]
    return np.sort(np.concatenate(kept))


class _Files:
    """Images of a folder as torch's data sets give them: decoded, cut, perhaps normalised."""

    def __init__(self, normalised: bool):
        classes = sorted(Path(_FOLDER.value).iterdir())
        self.items = [(str(p), k) for k, c in enumerate(classes) for p in sorted(c.iterdir())]
        self.labels = np.array([label for _, label in self.items])
        self.normalised = normalised

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        import torch
        from PIL import Image

        size = _SIZE.value
        with Image.open(self.items[index][0]) as image:
            scale = round(size * 256 / 224) / min(image.size)
            resized = image.convert("RGB").resize(
                (round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR
            )
        left, top = (resized.width - size) // 2, (resized.height - size) // 2
        pixels = torch.from_numpy(np.array(resized)[top : top + size, left : left + size])
        return _normalised(pixels[None])[0] if self.normalised else pixels


def _normalised(pixels: Any) -> Any:
    import torch

    mean = torch.tensor([0.485, 0.456, 0.406], device=pixels.device)
    std = torch.tensor([0.229, 0.224, 0.225], device=pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def _loader(files: _Files) -> Any:
    import torch

    workers = len(os.sched_getaffinity(0))
    return torch.utils.data.DataLoader(files, batch_size=_BATCH.value, num_workers=workers)


def _pooled(output: Any) -> Any:
    return output.flatten(2).mean(2) if output.ndim == 4 else output.mean(1)


def _prototypes(features: Any, labels: Any) -> Any:
    import torch

    return torch.stack([features[labels == k].mean(0) for k in range(int(labels.max()) + 1)])


def _losses(features: Any, prototypes: Any, labels: Any) -> Any:
    import torch

    logits = 1 / torch.cdist(features.float(), prototypes)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def _released(model: Any) -> tuple[np.ndarray, np.ndarray]:
    import torch
    from torch.nn.utils import prune

    from benchmarks import peers

    files, where = _Files(normalised=True), peers.device()
    labels = torch.from_numpy(files.labels).to(where)
    layers = [(layer, "weight") for layer in peers.prunable_layers(model)]

    def features() -> Any:
        with torch.no_grad():
            return torch.cat([_pooled(model(batch.to(where))) for batch in _loader(files)])

    prototypes = _prototypes(features(), labels)
    rows = []
    for k in range(_PROBES):
        if k:
            prune.global_unstructured(layers, prune.L1Unstructured, amount=_STEP)
        rows.append(_losses(features(), prototypes, labels).cpu().numpy())
    return np.stack(rows), files.labels


def _good_torch(model: Any) -> tuple[np.ndarray, np.ndarray]:
    import torch

    from benchmarks import peers

    files, where = _Files(normalised=False), peers.device()
    labels = torch.from_numpy(files.labels).to(where)
    pixels = torch.cat(list(_loader(files)))
    how = peers.CHANNELS_LAST if _GOOD_FLOAT32.value else peers.GOOD
    layout = torch.channels_last
    model = model.to(memory_format=layout)
    batches = range(0, len(pixels), _BATCH.value)

    def images(first: int) -> Any:
        some = pixels[first : first + _BATCH.value].to(where)
        return _normalised(some).contiguous(memory_format=layout)

    def features(batch: Any) -> Any:
        with torch.autocast(where, torch.bfloat16, enabled=how.bfloat16):
            return _pooled(model(batch).float())

    with torch.inference_mode():
        prototypes = _prototypes(torch.cat([features(images(k)) for k in batches]), labels)
        weights = peers.masked_weights(model, _STEP, _PROBES)
        losses = np.empty((_PROBES, len(pixels)), np.float32)
        for first in batches:
            batch, of = images(first), slice(first, first + _BATCH.value)
            for k, masked in enumerate(weights):
                for layer, weight in zip(peers.prunable_layers(model), masked, strict=True):
                    layer.weight.data = weight
                losses[k, of] = _losses(features(batch), prototypes, labels[of]).cpu().numpy()
    return losses, files.labels


if __name__ == "__main__":
    app.run(main)
