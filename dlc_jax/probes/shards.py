"""Work on a data set shard by shard: what is there is kept, and the rest is divided and computed.

Whoever computes a shard, in whatever company, gets the same bits. So a run that was stopped goes on
from the shards that it left behind, also with another number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Int64
from tqdm import tqdm

from dlc_jax import expect, signals
from dlc_jax.distributed import Run, Team, fetch, processes
from dlc_jax.files import array_files
from dlc_jax.workspace import artefacts
from dlc_jax.workspace.artefacts import key_of, machine

Arrays = dict[str, np.ndarray]
Item = TypeVar("Item")


class ShardBatch(NamedTuple):
    """Samples of one shard.

    Attributes:
      shard: Its number.
      positions: [r] in the data set.
      items: What the program takes, [r]; then what it gave for them.
    """

    shard: int
    positions: Int64[np.ndarray, " r"]
    items: Any


Start = Callable[[list[ShardBatch]], Any]  # starts a program on a group of batches: arrays


def shards_done(
    shards: Sequence[int],
    groups: Iterable[list[ShardBatch]],
    start: Start,
    values_of: Callable[[Any, int, int], Any],
    bar: tqdm,
    *,
    ahead: int,
    bar_step: int = 1,
) -> Iterator[list[ShardBatch]]:
    """Yields the batches of every shard with their results as items, in order, as they finish.

    Args:
      shards: Numbers; one without a batch has no results.
      groups: Batches, in the order of the shards, by program call.
      start: Starts the program on a group.
      values_of: What a call gave, place of a batch in its group and number of samples -> theirs.
      bar: Shown meanwhile.
      ahead: Program calls that are started before the results of one are waited for.
      bar_step: How far a sample moves the bar.
    """

    def results() -> Iterator[ShardBatch]:
        for arrays, group in _ahead(((start(group), group) for group in groups), ahead):
            signals.poll()
            values = jax.tree.map(fetch, arrays)
            for place, batch in enumerate(group):
                num = len(batch.positions)
                bar.update(num * bar_step)
                yield batch._replace(items=values_of(values, place, num))

    with bar:
        by_shard = groupby(results(), key=lambda batch: batch.shard)
        number, found = next(by_shard, (None, iter(())))
        for shard in shards:
            yield list(found) if shard == number else []
            if shard == number:
                number, found = next(by_shard, (None, iter(())))


def _ahead(started: Iterable[Item], num: int) -> Iterator[Item]:
    """Yields a call only after the next ones were started: the device is never idle."""
    waiting: list[Item] = []
    for call in started:
        waiting.append(call)
        if len(waiting) > num:
            yield waiting.pop(0)
    yield from waiting


class Parts:
    """Arrays by the name of the part.

    Args:
      folder: Where they are kept, for later runs too; None: in memory.
      writes: Whether this process writes there; another that computed the same does where not.
    """

    def __init__(self, folder: Path | None = None, *, writes: bool = True):
        self.folder, self._writes = folder, writes
        self._in_memory: dict[str, Arrays] = {}
        if folder is not None:  # what others wrote, where processes do not share a file system
            artefacts.pull(folder)

    @classmethod
    def of(cls, kind: str, run: Run, team: Team, inputs: Callable[[], list[Any]]) -> Parts:
        """Returns where that is kept which these inputs and this machine give.

        Raises:
          ValueError: processes without a folder to share.
        """
        if run.path is not None:
            writes = not team.mesh.is_multi_process or processes.is_first()
            return cls(run.path / key_of(kind, [machine(), *inputs()])[:16], writes=writes)
        if team.num_teams > 1:
            raise expect.InputError(
                "folder: missing; processes that share the work need one that all of them see."
            )
        return cls()

    def complete(
        self,
        names: Sequence[str],
        mine: Sequence[int],
        computed: Callable[[list[int]], Iterator[Arrays]],
    ) -> Iterator[Arrays]:
        """Returns all parts in order, after those that were missing have been computed.

        Args:
          names: Names of all parts.
          mine: Numbers of those that this process's team does.
          computed: Gives the arrays of these parts, one after the other.
        Raises:
          ValueError: a part is not there then: the processes do not share a folder.
        """
        missing = [number for number in mine if not self.has(names[number])]
        for number, arrays in zip(missing, computed(missing), strict=True):
            self._write(names[number], **arrays)
        if self.folder is not None and processes.count() > 1:
            processes.wait_for_all()
            artefacts.pull(self.folder)
            if lost := [name for name in names if not self._path(name).is_file()]:
                raise expect.InputError(
                    f"{self.folder}: {len(lost)} parts that other processes wrote are not there, "
                    f"such as {lost[0]}; expected a folder that all {processes.count()} processes "
                    "share, or one in a bucket."
                )
        return map(self._take, names)

    def has(self, name: str) -> bool:
        """Whether a part is there, whole."""
        return bool(self._read(name))

    def _write(self, name: str, **arrays: np.ndarray) -> None:
        """Keeps a part, whole or not at all."""
        if self.folder is None:
            self._in_memory[name] = arrays
        elif self._writes:
            with artefacts.atomic(self._path(name)) as file:
                np.savez(file, allow_pickle=False, **arrays)

    def _take(self, name: str) -> Arrays:
        """Returns a part that was written; one in memory is not kept any longer."""
        found = self._in_memory.pop(name, None) or self._read(name)
        if not found:
            raise expect.InputError(
                f"{self._path(name)}: cannot be read any more; the same call computes it again."
            )
        return found

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.npz"

    def _read(self, name: str) -> Arrays:
        """Returns the arrays of a part; none if it is not there or cannot be read."""
        if self.folder is None:
            return self._in_memory.get(name, {})
        try:
            path = self._path(name)
            return array_files.load_npz(path, array_files.npz_headers(path))
        except expect.InputError:
            return {}
