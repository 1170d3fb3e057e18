"""What scoring images and fine-tuning on them compute, decode and read."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Int64

from dlc_jax.config import Config
from dlc_jax.distributed import Team, one_device
from dlc_jax.encoders import Encoder
from dlc_jax.planning.costs import Cost, kept_by_run, planned_stages
from dlc_jax.planning.image_memory import (
    ImageFinetuning,
    ImageScoring,
    images_of,
    shapes,
)
from dlc_jax.planning.machine import MeshSize
from dlc_jax.planning.programs import count_flops
from dlc_jax.probes.images import Layout
from dlc_jax.probes.kernel import Forward, features_of_batch
from dlc_jax.selection import DEFAULT_SPLIT, has_split
from dlc_jax.training.images import Recorder
from dlc_jax.types import Dataset

_BYTES_OF_PIXEL = 4  # of a decoded image that is kept: see `DecodedImages`
_GIB = 1 << 30


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
        program = functools.partial(features_of_batch, Forward.of(self.encoder, "float32"))
        images = images_of(1, self.config.encoder.image_size)
        return count_flops(program, shapes(self.encoder.params), images)

    @functools.cached_property
    def training_flops(self) -> int:
        """Operations for an image in a training step."""
        settings = dataclasses.replace(self.config.finetune, batch_size=1)
        job = ImageFinetuning(
            self.encoder, self._size, self.dataset.num_classes, settings, num_devices=1
        )
        return count_flops(job.program(), *job.arguments())

    def scoring(self) -> ImageScoring:
        """Returns the job of one device."""
        probe = self.config.probe
        chunk = min(probe.probes_per_call(int(probe.num_probes)), self._probes_each)
        return ImageScoring(
            self.encoder,
            self._size,
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
        return ImageFinetuning(self.encoder, self._size, num_classes, settings, devices)

    @property
    def is_cached(self) -> bool:
        """Whether evaluation crops are decoded once and kept, each process those of its part."""
        return self.config.cache.takes(self.num_each, self._size) and not self.config.probe.augment

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
        names = self.config.need.measured
        return costs + [seen(name, 1, decodes=each_time) for name in names]

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
            config.images(self.dataset),
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
    def _size(self) -> int:
        return self.config.encoder.image_size

    @property
    def _batch_size(self) -> int:
        return self.config.probe.images_per_call(self._size)

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
