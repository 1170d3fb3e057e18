"""Linear heads on fixed features, one for each of many kept subsets, trained in one program.

The subsets are index sets into the same features, padded to one length; the program maps over
them. Each head ends as that of `finetune` does, with `linear_probe`, on its subset alone: same
start, data order, optimiser and schedule.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Float64, Int, Int64, Integer

from dlc_jax import expect
from dlc_jax.distributed import by_rows, one_device, place, replicated, whole_on
from dlc_jax.encoders.encoder import precision_of
from dlc_jax.training.images.settings import FinetuneConfig
from dlc_jax.training.images.step import Network, Sgd, TrainState, initial_head, train_step
from dlc_jax.training.optimiser import epoch_order, learning_rates
from dlc_jax.types import Conventions, Selection, as_tuple, labels_fingerprint, setting

_Samples = tuple[Array | np.ndarray, Array | np.ndarray]  # features [n, d] and labels [n]


@dataclasses.dataclass(frozen=True)
class LinearProbeConfig:
    """How every head is trained.

    Attributes:
      epochs, batch_size, learning_rate, milestones, weight_decay, momentum, nesterov: See
        `FinetuneConfig`.
      chunk: Heads side by side, 1 or more; changes speed only.
      memory_mib: Heads trained in one call, in MiB, above 0; more are trained in several calls.
    """

    epochs: int = setting(FinetuneConfig.epochs, "passes over each subset")
    batch_size: int = setting(32, "samples per step; the last, short batch counts as it is")
    learning_rate: float = setting(0.01, "before the first milestone")
    milestones: tuple[float, ...] = setting(
        FinetuneConfig.milestones, "fractions of the epochs; rate / 10 each"
    )
    weight_decay: float = setting(FinetuneConfig.weight_decay, "L2 in the gradient")
    momentum: float = setting(FinetuneConfig.momentum, "of SGD")
    nesterov: bool = setting(FinetuneConfig.nesterov, "Nesterov momentum, as torch defines it")
    chunk: int = setting(1, "heads side by side; the others of a call follow")
    memory_mib: float = setting(256.0, "of heads trained in one call; more are trained in several")

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", as_tuple(self.milestones))

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides how heads end: all but how many are trained at once."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in values if name not in ("chunk", "memory_mib")}

    def check(self) -> None:
        """Raises ValueError unless all values are in range."""
        expect.optimiser("linear_probe", self)
        expect.integer("linear_probe.chunk", self.chunk, 1)
        expect.at_least("linear_probe.memory_mib", self.memory_mib, 0, exclusive=True)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearProbes:
    """What the heads do on the validation samples.

    Attributes:
      correct: [k, v], whether head k is right about validation sample v.
      heads: `kernel` [k, d, c] and `bias` [k, c] after the last epoch, float32.
      num_kept: [k] samples each was trained on.
      seconds: Time of everything, compilation included.
    """

    correct: Bool[np.ndarray, "k v"]
    heads: dict[str, Float32[np.ndarray, "k ..."]]
    num_kept: Int64[np.ndarray, " k"]
    seconds: float

    @property
    def accuracy(self) -> Float64[np.ndarray, " k"]:
        """In percent, over the validation samples."""
        return 100 * self.correct.mean(axis=1, dtype=np.float64)


def linear_probes(
    features: np.ndarray,
    labels: np.ndarray,
    kept: Sequence[Selection | np.ndarray],
    *,
    val_features: np.ndarray,
    val_labels: np.ndarray,
    seeds: Sequence[int] | None = None,
    settings: LinearProbeConfig = LinearProbeConfig(),
    head: str = "mean",
    mode: str = "default",
    mesh: Mesh | None = None,
) -> LinearProbes:
    """Trains a linear head on each kept subset, and tests all of them.

    Args:
      features: [n, d] features of a frozen encoder, as from `features`.
      labels: [n] class ids, non-negative.
      kept: k subsets: selections, or positions in `features`.
      val_features, val_labels: [v, d] and [v]; what the heads are tested on, never trained on.
      seeds: Seed of each head's start and data order; None takes those of the selections, or 0.
      settings: Optimiser and schedule.
      head: How heads start, `mean` or `cls`: see `Encoder`.
      mode: `default`, or `official` for the released code's decay (Q6).
      mesh: Devices of this process, from `make_mesh`; the heads are divided among them, which
        changes nothing but the time. None: the default device.
    Returns:
      Which validation samples each head gets right, and the heads.
    Raises:
      ValueError: shapes that do not fit, features that are not finite, no subset or an empty one,
        positions out of range or repeated, a selection from other labels, settings out of range.
    Example:
      >>> labels = np.repeat([0, 1], 10)
      >>> features = np.eye(2, dtype=np.float32)[labels]
      >>> kept = [np.array([0, 19]), np.arange(10)]  # the second is of class 0 only
      >>> heads = dlc.linear_probes(
      ...     features, labels, kept, val_features=features, val_labels=labels
      ... )
      >>> heads.accuracy.tolist()
      [100.0, 50.0]
    """
    start = time.perf_counter()
    expect.is_a(LinearProbeConfig, settings=settings)
    settings.check()
    expect.features_fit_labels("features", features, labels)
    expect.features_fit_labels("val_features", val_features, val_labels)
    if features.shape[1] != val_features.shape[1]:
        raise expect.InputError(
            f"val_features: expected {features.shape[1]} columns, as features have, got "
            f"{val_features.shape[1]}."
        )
    subsets, seeds = _subsets(kept, seeds, np.asarray(labels))
    num_features, num_heads = features.shape[1], len(subsets)
    num_classes = 1 + max(int(labels.max()), int(val_labels.max()))
    num_steps = -(-max(map(len, subsets)) // settings.batch_size)
    rates = learning_rates(settings, Conventions.of(mode))
    mesh = mesh or one_device()
    known, held_out = (
        replicated(mesh, (np.asarray(some, np.float32), np.asarray(classes, np.int32)))
        for some, classes in ((features, labels), (val_features, val_labels))
    )

    # kernel, momentum and gradient, new and old; and the order of an epoch
    each = 6 * 4 * (num_features + 1) * num_classes + 4 * num_steps * settings.batch_size
    at_most = max(int(settings.memory_mib * 2**20 / each), 1) * mesh.size
    num_calls = -(-num_heads // at_most)
    # all calls take as many heads, so that there is one program; the last repeats its own
    num_at_once = -(-num_heads // (num_calls * mesh.size)) * mesh.size
    parts = []
    for first in range(0, num_heads, num_at_once):
        places = [min(place, num_heads - 1) for place in range(first, first + num_at_once)]
        cells = [(subsets[place], seeds[place]) for place in places]
        starts = [initial_head(num_features, num_classes, head, seed) for _, seed in cells]
        trained = _train(mesh, known, cells, starts, rates, num_steps, settings)
        correct = _is_correct(mesh, trained, held_out)
        parts.append(jax.tree.map(np.asarray, (correct, trained)))
    correct, heads = jax.tree.map(lambda *some: np.concatenate(some)[:num_heads], *parts)
    num_kept = np.array([len(subset) for subset in subsets], np.int64)
    return LinearProbes(correct, heads, num_kept, time.perf_counter() - start)


def _subsets(
    kept: Sequence[Selection | np.ndarray],
    seeds: Sequence[int] | None,
    labels: Integer[np.ndarray, " n"],
) -> tuple[list[Int64[np.ndarray, " _"]], list[int]]:
    """Returns ascending positions and a seed for each subset, checked."""
    if len(kept) == 0:
        raise expect.InputError("kept: expected one or more subsets, got none.")
    subsets, fingerprint = [], labels_fingerprint(labels)
    for number, one in enumerate(kept):
        positions = np.asarray(one.indices if isinstance(one, Selection) else one)
        expect.positions(f"kept[{number}]", positions, len(labels))
        made_from = one.labels_fingerprint if isinstance(one, Selection) else None
        if made_from not in (None, fingerprint):
            raise expect.InputError(
                f"kept[{number}]: selected from other labels than these; expected a selection "
                "from these labels, in their order."
            )
        subsets.append(np.sort(positions).astype(np.int64))
    if seeds is None:
        seeds = [one.seed if isinstance(one, Selection) else 0 for one in kept]
    if len(seeds) != len(kept):
        raise expect.InputError(
            f"seeds: expected one per subset, got {len(seeds)} for {len(kept)}."
        )
    for seed in seeds:
        expect.seed(seed, "seeds")
    return subsets, [int(seed) for seed in seeds]


def _train(
    mesh: Mesh,
    known: _Samples,
    cells: list[tuple[Int64[np.ndarray, " _"], int]],
    starts: list[dict[str, np.ndarray]],
    rates: list[float],
    num_steps: int,
    settings: LinearProbeConfig,
) -> dict[str, Array]:
    """Returns heads, each trained on the subset of a cell in the order of its seed."""
    sgd, size, chunk = Sgd.of(settings), settings.batch_size, settings.chunk
    heads = jax.tree.map(lambda *leaves: place(np.stack(leaves), by_rows(mesh)), *starts)
    states = jax.vmap(lambda head: TrainState.start({}, frozenset(), head, sgd))(heads)
    num_kept = place(np.array([len(subset) for subset, _ in cells], np.int32), by_rows(mesh))
    for epoch, rate in enumerate(map(jnp.float32, rates), start=1):
        order = np.zeros((len(cells), num_steps * size), np.int32)
        for row, (subset, seed) in zip(order, cells, strict=True):
            row[: len(subset)] = epoch_order(subset, seed, epoch)
        # XLA may say the same place in other words, for which jit would compile again
        states, seen = jax.device_put(states, by_rows(mesh)), place(order, by_rows(mesh))
        states = train_epoch(mesh, sgd, size, chunk, states, seen, num_kept, rate, known)
    heads = states.trained["head"]
    if not jnp.isfinite(heads["kernel"]).all():
        raise expect.InputError(
            "linear_probe: heads have weights that are not finite, at learning rate "
            f"{settings.learning_rate:g}; try a smaller linear_probe.learning_rate."
        )
    return heads


@functools.partial(
    jax.jit, static_argnames=("mesh", "sgd", "batch_size", "chunk"), donate_argnames=("states",)
)
def train_epoch(
    mesh: Mesh,
    sgd: Sgd,
    batch_size: int,
    chunk: int,
    states: TrainState,
    order: Int[Array, "k s"],
    num_kept: Int[Array, " k"],
    learning_rate: Float[Array, ""],
    known: _Samples,
) -> TrainState:
    """Takes all steps of an epoch of every head.

    Args:
      mesh: Devices that the heads are divided among.
      sgd, batch_size: Constants of the optimiser and samples per step, of every head.
      chunk: Heads mapped side by side; 1: one after another.
      states: Where k heads stand.
      order: Positions that each head sees, in this order; padding after its num_kept.
      num_kept: Samples of each subset.
      learning_rate: Learning rate of the epoch.
      known: Features and labels that positions point into.
    """

    def epoch_of_one(
        known: _Samples, state: TrainState, order: Int[Array, " s"], num_kept: Int[Array, ""]
    ) -> TrainState:
        features, labels = known

        def step(number: Int[Array, ""], state: TrainState) -> TrainState:
            start = number * batch_size
            where = jax.lax.dynamic_slice_in_dim(order, start, batch_size)
            real = (start + jnp.arange(batch_size) < num_kept).astype(jnp.float32)
            batch = features[where], labels[where], real
            return train_step(Network(), sgd, state, *batch, learning_rate)[0]

        return jax.lax.fori_loop(0, -(-num_kept // batch_size), step, state)

    return _over_heads(mesh, epoch_of_one, known, (states, order, num_kept), chunk)


def _over_heads(mesh: Mesh, compute: Callable, data: _Samples, cells: tuple, chunk: int = 1) -> Any:
    """Maps over heads, each device over its own.

    Args:
      mesh: Devices.
      compute: Takes the data, and what each cell has of one head.
      data: All of it on every device.
      cells: Arrays of one row per head.
      chunk: Heads side by side.
    """

    def on_one_device(data: _Samples, cells: tuple) -> Any:
        size = chunk if chunk > 1 else None
        return jax.lax.map(lambda cell: compute(data, *cell), cells, batch_size=size)

    whole, split = whole_on(mesh).spec, by_rows(mesh).spec
    on_all = jax.shard_map(
        on_one_device, mesh=mesh, in_specs=(whole, split), out_specs=split, check_vma=False
    )
    with precision_of("float32"):
        return on_all(data, cells)


@functools.partial(jax.jit, static_argnames=("mesh",))
def _is_correct(mesh: Mesh, heads: dict[str, Array], held_out: _Samples) -> Bool[Array, "k v"]:
    """Returns whether each head's highest logit is the label's."""

    def of_one(held_out: _Samples, head: dict[str, Array]) -> Bool[Array, " v"]:
        features, labels = held_out
        return (features @ head["kernel"] + head["bias"]).argmax(axis=1) == labels

    return _over_heads(mesh, of_one, held_out, (heads,))
