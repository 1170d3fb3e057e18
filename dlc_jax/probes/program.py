"""The compiled programs with what their calls share, on the devices that run them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float32, Int32, Int64, Shaped, UInt8

from dlc_jax.distributed import DATA, PROBE, Team, replicated
from dlc_jax.encoders import Encoder
from dlc_jax.masking import Importance, Thresholds
from dlc_jax.preprocess import RandomCrops, filled
from dlc_jax.probes.kernel import Forward, features_of_batches, losses_of_batches
from dlc_jax.probes.path import LearningPath
from dlc_jax.probes.shards import ShardBatch
from dlc_jax.types import Params


class Masks(NamedTuple):
    """The masked networks, on the devices that compute them.

    Attributes:
      prunable: Paths of the leaves that are masked.
      importance: Importance of their weights.
      thresholds: Thresholds of every probe; or of one at a time, where each sees another crop.
      chunk: Probes side by side.
      steps: [m] which steps of the path they are.
    """

    prunable: tuple[str, ...]
    importance: Importance
    thresholds: list[Thresholds]
    chunk: int
    steps: Int64[np.ndarray, " m"]

    @classmethod
    def on(cls, team: Team, path: LearningPath, chunk: int, one_by_one: bool) -> Masks:
        spread = NamedSharding(team.mesh, PartitionSpec(PROBE))
        num_parts = team.mesh.shape[PROBE]
        chunk = min(chunk, -(-len(path) // num_parts))
        thresholds = [path.padded_to(chunk * num_parts)]
        if one_by_one:
            thresholds, chunk = [path.repeated(k, num_parts) for k in range(len(path))], 1
        return cls(
            path.prunable,
            replicated(team.mesh, path.importance),
            [jax.device_put(some, spread) for some in thresholds],
            chunk,
            path.steps,
        )


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

    @classmethod
    def on(cls, team: Team, encoder: Encoder, dtype: str, batch_size: int) -> Program:
        params = replicated(team.mesh, encoder.params)
        return cls(Forward.of(encoder, dtype), team, params, batch_size)

    def features_of(self, batches: list[ShardBatch]) -> jax.Array:
        """Starts on the unmasked features of some batches: [k, b, d]."""
        pixels = self._side_by_side([np.stack(batch.items) for batch in batches])
        return features_of_batches(self.forward, self.team.mesh, self.params, pixels)

    def losses_of(
        self,
        masks: Masks,
        prototypes: Float32[np.ndarray, "c d"],
        labels: Int32[np.ndarray, " n"],
        batches: list[ShardBatch],
    ) -> jax.Array:
        """Starts on the losses of some batches under every probe: [k, m, b]."""
        pixels = [np.stack(batch.items) for batch in batches]
        return self._losses(masks, masks.thresholds[0], prototypes, labels, batches, pixels)

    def losses_under_crops(
        self,
        masks: Masks,
        prototypes: Float32[np.ndarray, "c d"],
        labels: Int32[np.ndarray, " n"],
        crops: RandomCrops,
        batches: list[ShardBatch],
    ) -> jax.Array:
        """The same for decoded images, of which every probe sees another crop."""
        rows = []
        for step, threshold in zip(masks.steps.tolist(), masks.thresholds, strict=True):
            pixels = [crops.cut(batch.items, batch.positions, draw=step + 1) for batch in batches]
            losses = self._losses(masks, threshold, prototypes, labels, batches, pixels)
            rows.append(losses[:, :1])  # every part of the probe axis has computed the same
        return jnp.concatenate(rows, axis=1)

    def _losses(
        self,
        masks: Masks,
        thresholds: Thresholds,
        prototypes: Float32[np.ndarray, "c d"],
        labels: Int32[np.ndarray, " n"],
        batches: list[ShardBatch],
        pixels: list[UInt8[np.ndarray, "_ s s 3"]],
    ) -> jax.Array:
        return losses_of_batches(
            self.forward,
            masks.prunable,
            masks.chunk,
            self.team.mesh,
            self.params,
            masks.importance,
            thresholds,
            prototypes,
            self._side_by_side(pixels),
            self._side_by_side([labels[batch.positions] for batch in batches]),
        )

    def _side_by_side(self, rows: list[Shaped[np.ndarray, "_ ..."]]) -> jax.Array:
        """Returns one batch for every part of the data axis; missing ones repeat the first."""
        full = [filled(some, self.batch_size) for some in rows]
        full += full[:1] * (self.team.mesh.shape[DATA] - len(full))
        return jax.device_put(np.stack(full), NamedSharding(self.team.mesh, PartitionSpec(DATA)))
