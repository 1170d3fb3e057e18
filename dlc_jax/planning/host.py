"""What a run takes of every process's memory, and of disks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from typing import NamedTuple

import jax

from dlc_jax.planning.image_costs import ImageCosts
from dlc_jax.planning.image_memory import num_features
from dlc_jax.planning.machine import is_processor, num_here, resident_bytes
from dlc_jax.planning.memory import Memory, tree_bytes
from dlc_jax.preprocess import ImageCache

_AHEAD_PER_THREAD, _STEPS_AHEAD = 8, 8  # decoded images and training batches that wait
_SORTED = 12  # bytes for each weight while thresholds are found
_CHECKED = 2  # bytes for each loss while they are checked


def scoring_parts(work: ImageCosts) -> list[Memory]:
    """Returns the memory of a process that scores; what the cache has is mapped, not held."""
    dataset, probe = work.dataset, work.config.probe
    num_losses = int(probe.num_probes) * len(dataset)
    image = 3 * work.config.encoder.image_size**2
    threads = (os.cpu_count() or 1) + 1
    waiting = _AHEAD_PER_THREAD * threads + 2 * num_here(local=True) * work.scoring().batch_size
    weights = sum(leaf.size for leaf in jax.tree.leaves(work.encoder.params))
    return [
        *_always(work),
        Memory(
            f"losses [{probe.num_probes}, {len(dataset)}], and their check", 4 * num_losses
        )._replace(num_bytes=(4 + _CHECKED) * num_losses),
        Memory("thresholds: weights sorted", _SORTED * weights),
        Memory("images that wait", waiting * image),
        *_of_devices(work.scoring().plan().num_bytes),
    ]


def finetuning_parts(work: ImageCosts) -> list[Memory]:
    """Returns the memory of a process that fine-tunes."""
    settings, size = work.config.finetune, work.config.encoder.image_size
    image = 3 * size**2
    test = 0 if work.config.cache.takes(work.num_test, size) else work.num_test * image
    kept, fixed = work.kept_image_bytes, 0
    if settings.linear_probe or not settings.augment:
        kept, fixed = 0, work.num_samples * image
    if settings.linear_probe:
        features = num_features(work.encoder, size) * 4
        fixed += work.num_samples * features
    job = work.finetuning()
    return [
        *_always(work),
        Memory("decoded images kept (finetune.image_memory_gib)", kept),
        Memory("evaluation crops to train on", fixed),
        Memory("test images", test),
        Memory("batches that wait", _STEPS_AHEAD * settings.batch_size * image),
        Memory("checkpoint on its way to disk", tree_bytes(job.arguments()[0])),
        *_of_devices(job.plan().num_bytes),
    ]


def _always(work: ImageCosts) -> list[Memory]:
    listing = work.dataset.ids.nbytes + work.dataset.labels.nbytes
    return [
        Memory("programs, libraries, encoder", max(0, resident_bytes() - listing)),
        Memory("ids and labels", listing),
    ]


def _of_devices(num_bytes: int) -> list[Memory]:
    """Devices that are processors have their memory here."""
    return [Memory("what devices hold", num_bytes * num_here(local=True) * is_processor())]


class Disk(NamedTuple):
    """Room for the decoded images of a process.

    Attributes:
      needed: Bytes.
      free: Bytes; what the cache holds makes room.
      is_there: Whether an entry of that size exists, perhaps the same images.
    """

    needed: int
    free: int
    is_there: bool


def cache_disk(cache: ImageCache, num_images: int, image_size: int) -> Disk:
    """Returns what so many images need of the cache's disk; nothing is made there."""
    folder = cache.path
    sizes, is_there = [], False
    for entry in folder.glob("*/entry.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            is_there |= json.loads(entry.read_text())["shape"] == [num_images, image_size]
            sizes.append((entry.parent / "pixels.raw").stat().st_size)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free + sum(sizes)
    return Disk(3 * num_images * image_size**2, free, is_there)
