"""The plan of a run that prunes images: what hosts and disks hold, and all that `Plan` prints."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from typing import NamedTuple

import jax

from dlc_jax.planning.costs import Cost, Speeds, num_kept, planned_stages
from dlc_jax.planning.image_costs import ImageCosts
from dlc_jax.planning.image_memory import num_features
from dlc_jax.planning.machine import num_here, resident_bytes
from dlc_jax.planning.memory import (
    DeviceJob,
    Memory,
    MemoryPlan,
    held_by_devices,
    tree_bytes,
    ways_of_host,
)
from dlc_jax.planning.plan import Host, Plan, Work, amount, gib
from dlc_jax.planning.speed import Decoding, scoring_speed
from dlc_jax.preprocess.cache import ImageCache

_GIB = 1 << 30
_AHEAD_PER_THREAD, _STEPS_AHEAD = 8, 8  # decoded images and training batches that wait
_SORTED = 12  # bytes for each weight while thresholds are found
_CHECKED = 2  # bytes for each loss while they are checked


def plan_of_images(title: str, costs: ImageCosts, decoding: Decoding) -> Plan:
    """Returns the plan.

    Args:
      title: What is planned, in words.
      costs: What is computed.
      decoding: Speed of decoding, measured here.
    """
    config = costs.config
    jobs: dict[str, DeviceJob] = {"score": costs.scoring(), "finetune": costs.finetuning()}
    hosts = {"score": scoring_host(costs), "finetune": finetuning_host(costs)}
    lines, problems = _bytes_in_words(costs, decoding)

    def measure(limit: int) -> tuple[list[str], Speeds] | None:
        job = costs.scoring()
        if job.plan().num_bytes > limit:
            return None
        rate, what = scoring_speed(job)
        decoded = (
            f"{1 / decoding.seconds:,.0f} images decoded a second, "
            f"{1 / decoding.crop_seconds:,.0f} random crops, on all cores of this host"
        )
        seconds = decoding.seconds, decoding.crop_seconds
        return [what, decoded], Speeds.of(costs.mesh, rate, *seconds)

    least = config.selection.min_per_class
    flops = costs.training_flops
    work = Work(
        costs.costs(),
        Cost(
            "finetune",
            "a sample",
            passes=1,
            num_samples=1,
            flops=flops,
            device_flops=flops // costs.mesh.num_devices,
            crops=int(config.finetune.augment),
        ),
        costs.num_samples,
        {f: num_kept(costs.counts, f, least) for f in config.selection.keep_fractions},
        config.finetune.epochs,
        hosts,
        lines,
        measure,
        problems,
    )
    stages = planned_stages(config)
    return Plan(title, costs.mesh.num_devices, {stage: jobs[stage] for stage in stages}, work)


def _bytes_in_words(costs: ImageCosts, decoding: Decoding) -> tuple[list[str], list[str]]:
    """Returns what is read, decoded and kept, and what has no room on disk."""
    size, n = costs.config.encoder.image_size, costs.num_samples
    scoring = [cost for cost in costs.costs() if cost.stage == "score"]
    times = sum(cost.decodes for cost in scoring) // n
    unreadable = decoding.num_unreadable
    lines = [
        f"images on disk: about {amount(n * decoding.num_bytes)} ({decoding.num_read} looked at), "
        f"read {_often(times + 1)}: content hash, and every time they are decoded"
        + (f"; {unreadable} are unreadable" if unreadable else ""),
        f"decoded: {n:,} x {size} x {size} x 3 = {amount(3 * n * size**2)}, {_often(times)} for "
        "scoring",
    ]
    if seen := sum(cost.decodes for cost in costs.costs() if cost.is_training and cost.crops):
        lines.append(
            f"decoded at full size to be cropped anew in every epoch: {seen:,} images, "
            f"{amount(3 * seen * decoding.pixels)}; {gib(costs.kept_image_bytes)} kept"
        )
    if not scoring:
        return lines, []
    cache = costs.config.cache
    disk = cache_disk(cache, costs.num_each, size)
    needed, free = amount(disk.needed), amount(disk.free)
    if not costs.is_cached:
        why = f"cache.max_gib={-(-disk.needed // _GIB)} would keep {needed} per host"
        if costs.config.probe.augment:
            why = "probe.augment: crops differ"
        return [*lines, f"cache: not used ({why})"], []
    num_passes = sum(cost.name != "decode into the cache" for cost in scoring)
    lines.append(
        f"cache: {needed} per host in {cache.path}, written once, read {num_passes + 1} times "
        f"(checked, then {num_passes} passes); {free} are free"
    )
    if disk.is_there or disk.needed <= disk.free:
        return lines, []
    return lines, [
        f"decoded images take {needed} of {cache.path}, where {free} are free; try "
        "cache.max_gib=0, which decodes twice, or another cache.folder"
    ]


def _often(times: int) -> str:
    return {1: "once", 2: "twice"}.get(times, f"{times} times")


def scoring_host(costs: ImageCosts) -> Host:
    """Returns the memory of a process that scores; what the cache has is mapped, not held."""
    job, n = costs.scoring(), costs.num_samples
    num_probes = int(costs.config.probe.num_probes)
    threads = (os.cpu_count() or 1) + 1
    waiting = _AHEAD_PER_THREAD * threads + 2 * num_here(local=True) * job.batch_size
    weights = sum(leaf.size for leaf in jax.tree.leaves(costs.encoder.params))

    def way(excess: int) -> str:
        left = num_probes - -(-excess // ((4 + _CHECKED) * n))
        if left >= 1:
            return f"try probe.num_probes={left} with probe.placement=midpoint"
        return ways_of_host(job, "no single setting helps; score parts of the data set", excess)

    memory = MemoryPlan.of(
        *_always(costs),
        Memory(f"losses [{num_probes}, {n}], and their check", (4 + _CHECKED) * num_probes * n),
        Memory("thresholds: weights sorted", _SORTED * weights),
        Memory("images that wait", waiting * 3 * costs.config.encoder.image_size**2),
        held_by_devices(job),
    )
    return Host(memory, way)


def finetuning_host(costs: ImageCosts) -> Host:
    """Returns the memory of a process that fine-tunes."""
    settings, size = costs.config.finetune, costs.config.encoder.image_size
    job, image = costs.finetuning(), 3 * size**2
    test = 0 if costs.config.cache.takes(costs.num_test, size) else costs.num_test * image
    kept, fixed = costs.kept_image_bytes, 0
    if settings.linear_probe or not settings.augment:
        kept, fixed = 0, costs.num_samples * image
    if settings.linear_probe:
        fixed += costs.num_samples * num_features(costs.encoder, size) * 4

    def way(excess: int) -> str:
        left = (costs.kept_image_bytes - excess) / _GIB
        if settings.augment and not settings.linear_probe and left >= 0:
            return f"try finetune.image_memory_gib={int(left * 1e4) / 1e4:g}"
        otherwise = "try finetune.image_memory_gib=0, or a host with more memory"
        return ways_of_host(job, otherwise, excess)

    memory = MemoryPlan.of(
        *_always(costs),
        Memory("decoded images kept (finetune.image_memory_gib)", kept),
        Memory("evaluation crops to train on", fixed),
        Memory("test images", test),
        Memory("batches that wait", _STEPS_AHEAD * settings.batch_size * image),
        Memory("checkpoint on its way to disk", tree_bytes(job.arguments()[0])),
        held_by_devices(job),
    )
    return Host(memory, way)


def _always(costs: ImageCosts) -> list[Memory]:
    listing = costs.dataset.ids.nbytes + costs.dataset.labels.nbytes
    return [
        Memory("programs, libraries, encoder", max(0, resident_bytes() - listing)),
        Memory("ids and labels", listing),
    ]


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
