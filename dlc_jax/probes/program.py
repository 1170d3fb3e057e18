"""The compiled programs with what their calls share, on the devices that run them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float32, Int32, Shaped

from dlc_jax.distributed import DATA, PROBE, Team, replicated
from dlc_jax.preprocess import RandomCrops, filled
from dlc_jax.probes.kernel import Forward, features_of_batches, losses_of_batches
from dlc_jax.probes.path import LearningPath
from dlc_jax.probes.shards import ShardBatch, Start
from dlc_jax.types import Params


class Program(NamedTuple):
    """The two compiled programs with everything that their calls share.

    Attributes:
      forward: The network.
      team: Processes whose devices run it.
      params: Weights, on all of these.
      batch_size: Images per device and call.
    """

    forward: Forward
    team: Team
    params: Params
    batch_size: int

    def features_of(self, batches: list[ShardBatch]) -> jax.Array:
        """Starts on the unmasked features of some batches: [k, b, d]."""
        pixels = self._side_by_side([np.stack(batch.items) for batch in batches])
        return features_of_batches(self.forward, self.team.mesh, self.params, pixels)

    def losses_under(
        self,
        path: LearningPath,
        chunk: int,
        prototypes: Float32[np.ndarray, "c d"],
        labels: Int32[np.ndarray, " n"],
        crops: RandomCrops | None,
    ) -> Start:
        """Returns what starts on the losses of some batches under every probe: [k, m, b].

        Args:
          path: The probes, whose masks are put on the devices.
          chunk: Most probes side by side.
          prototypes: Class means of the unmasked features.
          labels: Class ids of the whole data set.
          crops: Cut from items that are decoded images, another one for every probe; None: items
            are pixels, and all probes see the same.
        """
        mesh, num_probes = self.team.mesh, len(path)
        num_parts = mesh.shape[PROBE]
        if crops is None:  # the last probe is repeated until the parts are equal
            chunk = min(chunk, -(-num_probes // num_parts))
            at_once = chunk * num_parts
            num_places = -(-num_probes // at_once) * at_once
            calls = [np.minimum(np.arange(num_places), num_probes - 1)]
        else:  # one at a time
            chunk, calls = 1, [np.full(num_parts, k) for k in range(num_probes)]
        spread = NamedSharding(mesh, PartitionSpec(PROBE))
        thresholds = [jax.device_put(path.thresholds_at(places), spread) for places in calls]
        importance = replicated(mesh, path.importance)
        program = functools.partial(
            losses_of_batches, self.forward, path.prunable, chunk, mesh, self.params, importance
        )

        def under_all(batches: list[ShardBatch]) -> jax.Array:
            pixels = self._side_by_side([np.stack(batch.items) for batch in batches])
            return program(thresholds[0], prototypes, pixels, labels_of(batches))

        def under_each(batches: list[ShardBatch]) -> jax.Array:
            assert crops is not None
            own, rows = labels_of(batches), []
            for step, threshold in zip(path.steps.tolist(), thresholds, strict=True):
                cut = [crops.cut(batch.items, batch.positions, draw=step + 1) for batch in batches]
                losses = program(threshold, prototypes, self._side_by_side(cut), own)
                rows.append(losses[:, :1])  # every part of the probe axis has computed the same
            return jnp.concatenate(rows, axis=1)

        def labels_of(batches: list[ShardBatch]) -> jax.Array:
            return self._side_by_side([labels[batch.positions] for batch in batches])

        return under_all if crops is None else under_each

    def _side_by_side(self, rows: list[Shaped[np.ndarray, "_ ..."]]) -> jax.Array:
        """Returns one batch for every part of the data axis; missing ones repeat the first."""
        full = [filled(some, self.batch_size) for some in rows]
        full += full[:1] * (self.team.mesh.shape[DATA] - len(full))
        return jax.device_put(np.stack(full), NamedSharding(self.team.mesh, PartitionSpec(DATA)))
