"""The plan of a run that prunes images: what it computes, decodes, reads and keeps."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int64

from dlc_jax.config import Config
from dlc_jax.distributed import Team, one_device
from dlc_jax.encoders import Encoder
from dlc_jax.planning.costs import Cost, Speeds, kept_by_run, num_kept, planned_stages
from dlc_jax.planning.image_memory import ImageFinetuning, ImageScoring, forward_flops, num_features
from dlc_jax.planning.machine import MeshSize, num_here, resident_bytes
from dlc_jax.planning.memory import DeviceJob, Host, Memory, tree_bytes
from dlc_jax.planning.plan import Plan, Work, amount, gib
from dlc_jax.planning.programs import count_flops
from dlc_jax.planning.speed import Decoding, scoring_speed
from dlc_jax.preprocess.cache import ImageCache
from dlc_jax.probes.images import Compute, Layout
from dlc_jax.selection import DEFAULT_SPLIT, INPUTS, has_split
from dlc_jax.training.images import Recorder
from dlc_jax.types import Dataset

_GIB = 1 << 30
_AHEAD_PER_THREAD, _STEPS_AHEAD = 8, 8  # decoded images and training batches that wait
_SORTED = 12  # bytes for each weight while thresholds are found
_BYTES_OF_PIXEL = 4  # of a decoded image that is kept: see `DecodedImages`
_CHECKED = 2  # bytes for each loss while they are checked


@dataclasses.dataclass(frozen=True, eq=False)
class ImageCosts:
    """All that a run does with images.

    Attributes:
      config: Checked configuration of the run.
      encoder: With what its mode decides filled in.
      dataset: To be pruned; nothing is read of it here.
      mesh: Devices that are planned for.
      num_test: Test samples; 0 where there are none.
      pixels: Average number of pixels of an image as it is stored.
    """

    config: Config
    encoder: Encoder
    dataset: Dataset
    mesh: MeshSize
    num_test: int
    pixels: float

    @property
    def num_samples(self) -> int:
        return len(self.dataset)

    @property
    def counts(self) -> Int64[np.ndarray, " c"]:
        """Samples of each class."""
        return np.bincount(self.dataset.labels, minlength=self.dataset.num_classes)

    @functools.cached_property
    def forward_flops(self) -> int:
        """Operations for an image through the unmasked encoder."""
        return forward_flops(self.encoder, self.size)

    @functools.cached_property
    def training_flops(self) -> int:
        """Operations for an image in a training step."""
        settings = dataclasses.replace(self.config.finetune, batch_size=1)
        job = dataclasses.replace(self.finetuning(), settings=settings, num_devices=1)
        return count_flops(job.program(), *job.arguments())

    def scoring(self) -> ImageScoring:
        """Returns the job of one device."""
        probe = self.config.probe
        chunk = min(self._compute.probes_per_call(int(probe.num_probes)), self._probes_each)
        return ImageScoring(
            self.encoder,
            self.size,
            self.dataset.num_classes,
            num_probes=-(-self._probes_each // chunk) * chunk,
            chunk=chunk,
            dtype=probe.dtype,
            holds_importance=probe.masking != "l1" or self.config.conventions.ties_as_torch,
            batch_size=min(self._batch_size, self.num_samples),
        )

    def finetuning(self) -> ImageFinetuning:
        """Returns the job of one device."""
        num_classes, settings = self.dataset.num_classes, self.config.finetune
        devices = self.mesh.num_devices  # of every axis
        return ImageFinetuning(self.encoder, self.size, num_classes, settings, devices)

    @property
    def is_cached(self) -> bool:
        """Whether evaluation crops are decoded once and kept, each process those of its part."""
        return self.config.cache.takes(self.num_each, self.size) and not self.config.probe.augment

    @property
    def num_each(self) -> int:
        """Samples of the process that has most."""
        return max(len(self._layout.samples_of(team)) for team in self._teams)

    def costs(self) -> list[Cost]:
        """Returns the parts of the run in their order, those of the stages that are planned."""
        costs = [*self._scoring(), *self._record(), *self._trials(), *self._sweep()]
        return [cost for cost in costs if cost.stage in planned_stages(self.config)]

    def _scoring(self) -> list[Cost]:
        n, m = self.num_samples, int(self.config.probe.num_probes)
        rows = max(map(self._rows_of, self._teams))
        seen = functools.partial(self._seen, "score", rows=rows)
        costs = []
        if self.is_cached:
            costs.append(Cost("score", "decode into the cache", 1, n, 0, 0, decodes=n))
        each_time = 0 if self.is_cached else n
        augment = self.config.probe.augment
        costs.append(seen("prototypes", 1, decodes=each_time, crops=n * augment))
        padded = self.scoring().num_probes
        losses = seen(f"losses of {m} probes", m, decodes=each_time, crops=n * m * augment)
        costs.append(losses._replace(device_flops=rows * padded * self.forward_flops))
        # targets, which the others are compared with, are few
        names = [name for name in self.config.need.measured if INPUTS[name].setting != "target"]
        shown = {"second_features": "second_features, as if of the same encoder"}
        return costs + [seen(shown.get(name, name), 1, decodes=each_time) for name in names]

    def _seen(
        self, stage: str, name: str, passes: int, rows: int, num: int | None = None, **work: Any
    ) -> Cost:
        """Images through the unmasked encoder, `rows` of them on the device that has most."""
        seen, flops = passes * (self.num_samples if num is None else num), self.forward_flops
        return Cost(stage, name, passes, seen, seen * flops, rows * flops, **work)

    def _record(self) -> list[Cost]:
        """The record of training, of which scores are made."""
        if not self.config.need.training:
            return []
        config, n = self.config, self.num_samples
        epochs = config.finetune.epochs
        recorder = Recorder(
            self.encoder,
            config.images(self.dataset, self.encoder.transform),
            config.finetune,
            config.record,
            seed=config.seed,
            conventions=config.conventions,
        )
        others, early = len(recorder.seeds) - 1, recorder.early_epoch
        first = self._trained("score", "training record", [n], epochs)
        rest = self._trained("score", "", [n] * others, early)
        looks = others + (1 if early == epochs else 2)
        rows = self._padded_rows(n) * looks
        decodes = 0 if self.is_cached else looks * n
        looked = self._seen("score", "outputs for the record", looks, rows, decodes=decodes)
        return [first.plus(rest), looked]

    def _trials(self) -> list[Cost]:
        """Fine-tuning on parts of the training data, where `auto` is decided so."""
        tuning = self.config.tuning
        if not self.config.need.tuning or tuning.by != "finetune":
            return []
        num_splits = len({*tuning.splits, DEFAULT_SPLIT})
        methods = {"random", *tuning.methods}
        num_ways = sum(num_splits if has_split(method) else 1 for method in methods)
        fractions = [1.0, *sorted(set(self.config.selection.keep_fractions)) * num_ways]
        kept = [round(0.8 * f * self.num_samples) for f in fractions] * tuning.num_repeats
        trained = self._trained("score", "trials of tuning", kept, self.config.finetune.epochs)
        rows = self._padded_rows(self.num_samples) * len(kept)
        return [trained, self._seen("score", "tests of trials", len(kept), rows)]

    def _sweep(self) -> list[Cost]:
        settings, num = self.config.finetune, self.num_test
        kept = kept_by_run(self.config, self.counts)
        runs = self._trained("finetune", f"fine-tuning, {len(kept)} runs", kept, settings.epochs)
        if not num:
            return [runs]
        num_tests = len(kept)
        if settings.test_every:
            num_tests += len(kept) * (max(0, settings.epochs - 1) // settings.test_every)
        rows = num_tests * self._padded_rows(num)
        name = f"tests, {num} images"
        return [runs, self._seen("finetune", name, num_tests, rows, num, decodes=num)]

    def _trained(self, stage: str, name: str, kept: list[int], epochs: int) -> Cost:
        """Runs on so many samples each, that share decoded images."""
        settings, n = self.config.finetune, self.num_samples
        seen, flops = sum(kept) * epochs, self.training_flops
        rows = sum(map(self._padded_rows, kept)) * epochs
        passes, decodes, crops, once = len(kept) * epochs, min(n, sum(kept)), 0, 0
        if settings.linear_probe:  # on features that are computed once
            once = decodes * self.forward_flops
        elif settings.augment:
            share = min(1.0, self.kept_image_bytes / max(1, self._all_image_bytes))
            # every process comes across all of them, if there are epochs enough
            of_all = min(self.mesh.num_hosts * decodes, seen)
            decodes, crops = round(share * of_all + (1 - share) * seen), seen
        work = (seen * flops + once, rows * flops + once, decodes, crops, True)
        return Cost(stage, name, passes, seen, *work)

    @property
    def kept_image_bytes(self) -> int:
        """Decoded images that fine-tuning keeps in memory."""
        most = int(self.config.finetune.image_memory_gib * _GIB)
        return min(most, self._all_image_bytes)

    @property
    def _all_image_bytes(self) -> int:
        return round(self.num_samples * self.pixels * _BYTES_OF_PIXEL)

    def _padded_rows(self, num: int) -> int:
        """Returns what a device computes of so many samples in training batches."""
        batch_size = self.config.finetune.batch_size
        return -(-num // batch_size) * -(-batch_size // self.mesh.num_devices)

    def _rows_of(self, team: Team) -> int:
        """Returns what a device computes of a team's samples in a scoring pass."""
        batch_size = self._batch_size
        mine = self._layout.shards_of(team)
        num_batches = sum(-(-len(self._layout.shards[i]) // batch_size) for i in mine)
        each = max(1, self.mesh.data // len(self._teams))
        return -(-num_batches // each) * min(batch_size, self.num_samples)

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.config.images(self.dataset, self.encoder.transform).side

    @property
    def _batch_size(self) -> int:
        return self._compute.images_per_call(self.size)

    @property
    def _compute(self) -> Compute:
        return self.config.probe.for_encoder(self.encoder)

    @property
    def _probes_each(self) -> int:
        return -(-int(self.config.probe.num_probes) // self.mesh.probe)

    @functools.cached_property
    def _layout(self) -> Layout:
        return Layout.of(self.num_samples, self._batch_size)

    @functools.cached_property
    def _teams(self) -> list[Team]:
        """Processes that share the work: each has whole rows of the mesh."""
        count = min(self.mesh.num_hosts, self.mesh.data)
        return [Team(one_device(), number, count) for number in range(count)]


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

    flops, num_devices = costs.training_flops, costs.mesh.num_devices
    crops = int(config.finetune.augment)
    sample = Cost("finetune", "a sample", 1, 1, flops, flops // num_devices, crops=crops)
    least, fractions = config.selection.min_per_class, config.selection.keep_fractions
    kept = {fraction: num_kept(costs.counts, fraction, least) for fraction in fractions}
    n, epochs = costs.num_samples, config.finetune.epochs
    work = Work(costs.costs(), sample, n, kept, epochs, hosts, lines, measure, problems)
    return Plan(title, num_devices, {stage: jobs[stage] for stage in planned_stages(config)}, work)


def _bytes_in_words(costs: ImageCosts, decoding: Decoding) -> tuple[list[str], list[str]]:
    """Returns what is read, decoded and kept, and what has no room on disk."""
    size, n = costs.size, costs.num_samples
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
    each = 4 + 4 + _CHECKED  # bytes of a loss and of a nearest class
    threads = (os.cpu_count() or 1) + 1
    waiting = _AHEAD_PER_THREAD * threads + 2 * num_here(local=True) * job.batch_size
    weights = sum(leaf.size for leaf in jax.tree.leaves(costs.encoder.params))

    def fewer_probes(excess: int) -> str | None:
        left = num_probes - -(-excess // (each * n))
        return f"try probe.num_probes={left} with probe.placement=midpoint" if left >= 1 else None

    return Host.of(
        job,
        *_always(costs),
        Memory(f"losses and nearest classes [{num_probes}, {n}]", each * num_probes * n),
        Memory("thresholds: weights sorted", _SORTED * weights),
        Memory("images that wait", waiting * 3 * costs.size**2),
        otherwise="no single setting helps; score parts of the data set",
        first=fewer_probes,
    )


def finetuning_host(costs: ImageCosts) -> Host:
    """Returns the memory of a process that fine-tunes."""
    settings, size = costs.config.finetune, costs.size
    job, image = costs.finetuning(), 3 * size**2
    test = 0 if costs.config.cache.takes(costs.num_test, size) else costs.num_test * image
    kept, fixed = costs.kept_image_bytes, 0
    if settings.linear_probe or not settings.augment:
        kept, fixed = 0, costs.num_samples * image
    if settings.linear_probe:
        fixed += costs.num_samples * num_features(costs.encoder, size) * 4

    def fewer_images(excess: int) -> str | None:
        left = (costs.kept_image_bytes - excess) / _GIB
        if settings.augment and not settings.linear_probe and left >= 0:
            return f"try finetune.image_memory_gib={int(left * 1e4) / 1e4:g}"
        return None

    return Host.of(
        job,
        *_always(costs),
        Memory("decoded images kept (finetune.image_memory_gib)", kept),
        Memory("evaluation crops to train on", fixed),
        Memory("test images", test),
        Memory("batches that wait", _STEPS_AHEAD * settings.batch_size * image),
        Memory("checkpoint on its way to disk", tree_bytes(job.arguments()[0])),
        otherwise="try finetune.image_memory_gib=0, or a host with more memory",
        first=fewer_images,
    )


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
