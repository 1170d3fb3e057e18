"""Run by a test in its own process with eight devices: image programs on some and on one."""

import json
import sys
from collections.abc import Iterable

import conftest
import jax
import numpy as np
from jax.sharding import Mesh

import dlc_jax as dlc
from dlc_jax.encoders import resnet
from dlc_jax.training.images.finetuner import Finetuner
from dlc_jax.training.images.settings import FinetuneConfig
from dlc_jax.training.loop import train
from dlc_jax.types import Conventions, by_path

MESHES = {  # data, probe
    "four": (4, 1),
    "eight": (8, 1),
    "probe 4": (2, 4),
    "probe 8": (1, 8),
}
FEW = ("eight", "probe 4")  # of them, for fewer samples than devices
BATCH, NUM_STEPS = 32, 20


def main(out: str) -> None:
    sample = dlc.load_dataset("demo:caltech15/train")
    encoder = dlc.load_encoder("resnet18", weights="demo:resnet18")
    odd = conftest.subset(sample, np.arange(0, 750, 12)[:61])
    found = {
        "odd": _losses(encoder, odd, MESHES),
        "few": _losses(encoder, _three(sample), FEW),
        "others": _other_losses(encoder, odd),
        "linear": _heads(),
        "features": _features(encoder, odd),
        "finetune": _finetuned(encoder, conftest.subset(sample, np.arange(0, 640))),
    }
    with open(out, "w") as file:
        json.dump(found, file)


def _three(sample: dlc.Dataset) -> dlc.Dataset:
    """Three samples of two classes."""
    images = [sample[position].image for position in (0, 1, 70)]
    return dlc.Dataset(images, np.array([0, 0, 1]), np.array(list("abc")), ("a", "b"))


def mesh_of(data: int, probe: int = 1) -> Mesh:
    return dlc.make_mesh(data, probe, devices=jax.devices()[: data * probe])


def _losses(encoder: dlc.Encoder, dataset: dlc.Dataset, meshes: Iterable[str]) -> dict[str, list]:
    options = {"image_size": 32, "num_probes": 5, "compute": dlc.Compute(batch_size=8)}
    found = {"one": dlc.probe(encoder, dataset, **options)}
    for name in meshes:
        found[name] = dlc.probe(
            encoder, dataset, **options, run=dlc.Run(mesh=mesh_of(*MESHES[name]))
        )
    return {name: [p.losses.tolist(), p.nearest.tolist()] for name, p in found.items()}


def _other_losses(encoder: dlc.Encoder, dataset: dlc.Dataset) -> dict[str, list]:
    """Probes side by side, and fresh crops."""
    found = {}
    options = {"image_size": 32, "num_probes": 5, "compute": dlc.Compute(batch_size=8, chunk=2)}
    found["chunks"] = dlc.probe(encoder, dataset, **options)
    found["chunks on two"] = dlc.probe(encoder, dataset, **options, run=dlc.Run(mesh=mesh_of(1, 2)))
    path = dlc.PathSpec(num_probes=2, augment=True)
    options = {"image_size": 32, "path": path, "compute": dlc.Compute(batch_size=8)}
    found["crops"] = dlc.probe(encoder, dataset, **options)
    found["crops on four"] = dlc.probe(encoder, dataset, **options, run=dlc.Run(mesh=mesh_of(2, 2)))
    return {name: [p.losses.tolist(), p.nearest.tolist()] for name, p in found.items()}


def _features(encoder: dlc.Encoder, dataset: dlc.Dataset) -> dict[str, list]:
    options = {"image_size": 32, "compute": dlc.Compute(batch_size=8)}
    one = dlc.features(encoder, dataset, **options)
    return {
        "one": one.tolist(),
        "four": dlc.features(encoder, dataset, **options, run=dlc.Run(mesh=mesh_of(4))).tolist(),
    }


def _heads() -> dict[str, list]:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(90, 7)).astype(np.float32)
    labels = generator.integers(0, 3, 90)
    kept = [np.arange(number + 3) for number in range(11)]  # no multiple of anything
    arguments = (features[:60], labels[:60], kept)
    held_out = {"val_features": features[60:], "val_labels": labels[60:]}
    settings = dlc.LinearProbeConfig(epochs=3, batch_size=4)
    one = dlc.linear_probes(*arguments, **held_out, settings=settings)
    four = dlc.linear_probes(*arguments, **held_out, settings=settings, mesh=mesh_of(4))
    return {
        name: [probes.heads["kernel"].tolist(), probes.correct.tolist()]
        for name, probes in (("one", one), ("four", four))
    }


def _finetuned(encoder: dlc.Encoder, dataset: dlc.Dataset) -> dict[str, dict]:
    """Returns how far two devices, and two without a common batch norm, are from one."""
    settings = FinetuneConfig(
        epochs=1, batch_size=BATCH, learning_rate=0.02, milestones=(), augment=False
    )

    images, conventions = dlc.Images(dataset, size=48), Conventions.of("default")

    def run(mesh: Mesh | None) -> dict[str, np.ndarray]:
        tuner = Finetuner(encoder, images, None, settings, conventions, dlc.Run(mesh=mesh))
        weights = train(tuner, np.arange(BATCH * NUM_STEPS), seed=0).weights
        return {path: np.asarray(leaf) for path, leaf in by_path(weights).items()}

    one, two = run(None), run(mesh_of(2))
    resnet.BatchNorm.__call__ = _of_halves
    jax.clear_caches()
    apart = run(None)
    start = {f"encoder/{path}": np.asarray(leaf) for path, leaf in by_path(encoder.params).items()}
    statistics = {f"encoder/{path}" for path in encoder.statistics}
    found = {}
    for name, other in (("two", two), ("apart", apart)):
        differences = {"updates": {}, "statistics": {}}
        for path, first in start.items():
            if path in statistics:
                size = np.linalg.norm(one[path])
                kind = "statistics"
            else:
                size = np.linalg.norm(one[path] - first)
                kind = "updates"
            differences[kind][path] = float(np.linalg.norm(other[path] - one[path]) / size)
        found[name] = differences
    return found


_whole = resnet.BatchNorm.__call__


def _of_halves(self: resnet.BatchNorm, x: jax.Array, **_: object) -> jax.Array:
    """What two devices would compute if each normalised its own half of the batch."""
    if self.use_running_average:
        return _whole(self, x)
    mask, half = self.sample_mask, len(x) // 2
    before = self.mean[...], self.var[...]
    parts, moved = [], []
    for some in (slice(0, half), slice(half, None)):
        self.mean[...], self.var[...] = before
        self.sample_mask = None if mask is None else mask[some]
        parts.append(_whole(self, x[some]))
        moved.append((self.mean[...], self.var[...]))
    self.sample_mask = mask
    self.mean[...], self.var[...] = ((a + b) / 2 for a, b in zip(*moved, strict=True))
    return jax.numpy.concatenate(parts)


if __name__ == "__main__":
    main(*sys.argv[1:])
