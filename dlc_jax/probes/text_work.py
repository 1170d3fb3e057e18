"""Rows of instructions dealt out among processes, and what a program gave for each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from dlc_jax import distributed, expect
from dlc_jax.distributed import Run, Team
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.preprocess.token_batches import BatchPlan, make_rows, placed, plan_batches
from dlc_jax.preprocess.tokens import Tokenised
from dlc_jax.probes.shards import Arrays, Parts, ShardBatch, shards_done

# enough to deal out, and not too many files
_FEWEST_PARTS, _MOST_BATCHES, _MOST_PARTS = 64, 16, 4096


class TextWork(NamedTuple):
    """Batches dealt out among processes, in parts that are kept as they are finished.

    Attributes:
      model, data: Language model and tokenised instructions.
      shards: All batches, neighbouring ones together.
      at_once: How many batches a program call takes side by side.
      parts: Where what is found of each shard is kept.
      team: Who does which part.
      progress: Whether to show a bar.
    """

    model: LanguageModel
    data: Tokenised
    shards: list[list[BatchPlan]]
    at_once: int
    parts: Parts
    team: Team
    progress: bool

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        data: Tokenised,
        tokens_per_batch: int,
        decisive: list[Any],
        run: Run,
    ) -> TextWork:
        expect.at_least("tokens_per_batch", tokens_per_batch, 1)
        model.check_tokens(data.named)
        plans = plan_batches(data, tokens_per_batch)
        num = len(plans)
        size = max(min(-(-num // _FEWEST_PARTS), _MOST_BATCHES), -(-num // _MOST_PARTS))
        shards = [plans[start : start + size] for start in range(0, num, size)]
        mesh = distributed.mesh_of(model.params)
        team = Team.alone(mesh) if run.mesh is None else Team.of(run.mesh)

        def inputs() -> list[Any]:
            return [model.fingerprint, data.fingerprint, tokens_per_batch, *decisive]

        parts = Parts.of("response losses", run, team, inputs)
        at_once = 1 if mesh is None else mesh.shape[distributed.DATA]
        return cls(model, data, shards, at_once, parts, team, run.progress)

    @property
    def most_in_row(self) -> int:
        """A power of two that is at least the number of samples of any row."""
        most = max(len(row) for plans in self.shards for plan in plans for row in plan.rows)
        return 1 << (most - 1).bit_length()

    def measured(
        self, of_rows: Callable[..., Any], num_probes: int, suffix: str = ""
    ) -> Float32[np.ndarray, "m n"]:
        """Returns the losses of all samples; parts are kept under names with this suffix."""

        def read(plan: BatchPlan, of_token: np.ndarray) -> Arrays:
            return {"losses": mean_losses(self.of_responses(plan, of_token))}

        losses = np.empty((num_probes, len(self.data)), np.float32)
        for positions, found in self.done(of_rows, read, suffix):
            losses[:, positions] = found["losses"]
        return losses

    def done(
        self,
        of_rows: Callable[..., Any],
        read: Callable[[BatchPlan, Any], Arrays],
        suffix: str = "",
    ) -> Iterator[tuple[list[int], Arrays]]:
        """Yields positions of samples and what was found for them, part by part.

        Args:
          of_rows: Starts a program on the arrays of `make_rows`; gives arrays [m, b, ...].
          read: Returns arrays [..., r] of the samples of a batch, of what was given for its rows.
          suffix: End of the names under which parts are kept.
        """
        names = [f"batches{suffix}-{number:06}" for number in range(len(self.shards))]
        mine = range(self.team.number, len(names), self.team.num_teams)  # the long ones come last

        def started(group: list[ShardBatch]) -> Any:
            """Starts on a group: arrays [m, k b, ...]."""
            params = self.model.params
            num_rows = group[0].items.num_rows * self.at_once
            num_rows = distributed.whole_rows(params, num_rows) // self.at_once
            batches = [
                make_rows(self.data, batch.items.rows, num_rows, batch.items.length)
                for batch in group
            ]
            batches += batches[:1] * (self.at_once - len(batches))
            rows = [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]
            return of_rows(*distributed.over_devices(params, rows))

        def values_of(found: Any, place: int, _: int) -> Any:
            def own(array: np.ndarray) -> np.ndarray:
                num_rows = array.shape[1] // self.at_once
                return array[:, place * num_rows : (place + 1) * num_rows]

            return jax.tree.map(own, found)

        def computed(missing: list[int]) -> Iterator[Arrays]:
            total, left = (len(self._positions(numbers)) for numbers in (mine, missing))
            bar = tqdm(
                total=total,
                initial=total - left,
                desc="responses",
                unit="row",
                disable=distributed.hides_bar(self.progress),
            )
            # none ahead: two calls would take twice the memory
            groups = self._groups(missing)
            shards = shards_done(missing, groups, started, values_of, bar, ahead=0)
            for number, batches in zip(missing, shards, strict=True):
                pairs = zip(self.shards[number], batches, strict=True)
                found = [read(plan, batch.items) for plan, batch in pairs]
                yield {
                    name: np.concatenate([arrays[name] for arrays in found], axis=-1)
                    for name in found[0]
                }

        for number, arrays in enumerate(self.parts.complete(names, mine, computed)):
            yield self._positions([number]), arrays

    def of_responses(
        self, plan: BatchPlan, of_token: Float32[np.ndarray, "m b s"]
    ) -> list[Float32[np.ndarray, "m _"]]:
        """Returns the losses of the tokens of each response that have one before them."""
        return [
            of_token[:, row, tokens.start : tokens.stop - 1][:, self.data.counts(position)[1:]]
            for row, _, tokens, position in placed(self.data, plan.rows)
        ]

    def _positions(self, numbers: Sequence[int]) -> list[int]:
        """Returns the positions of the samples of some shards."""
        return [i for number in numbers for plan in self.shards[number] for i in plan.positions]

    def _groups(self, numbers: list[int]) -> Iterator[list[ShardBatch]]:
        """Yields batches of one shape and shard that go side by side."""
        for number in numbers:
            for _, some in groupby(self.shards[number], lambda plan: (plan.num_rows, plan.length)):
                batches = [ShardBatch(number, np.array(plan.positions), plan) for plan in some]
                for start in range(0, len(batches), self.at_once):
                    yield batches[start : start + self.at_once]


def mean_losses(of_responses: list[Float32[np.ndarray, "m _"]]) -> Float32[np.ndarray, "m r"]:
    """Returns means over tokens; no number where there is no token."""
    with np.errstate(invalid="ignore"):
        means = [found.sum(axis=1) / np.float32(found.shape[1]) for found in of_responses]
    return np.stack(means, axis=1)
