"""Does pruning help, and by which method? Linear heads over many splits of real photographs.

python -m benchmarks.evidence --workdir=runs/evidence [--cases=sample-small,sample-lite0]

For each case, a data set and an encoder: all photographs are split anew, class by class, into a
training and a test part; DLC is measured on the training part, every method keeps some of it at
nine keep fractions, a linear head is trained on that and tested. `auto` is tuned on the training
part of each split (--auto of them, 0: none). Prints Markdown and writes it to <case>.md in the work
directory; what is there already is not computed again. The cases named sample-* need nothing else,
dtd10-* the folder of --shared, the others their data and a model hub.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Float64, Int64
from scipy import stats

import dlc_jax as dlc
from dlc_jax.files.whole_files import atomic
from dlc_jax.masking import Thresholds, masked
from dlc_jax.probes.kernel import prototype_loss
from dlc_jax.probes.path import learning_path
from dlc_jax.reports.table import markdown
from dlc_jax.selection import AUTO, SELECTORS, Candidates
from dlc_jax.tuning.gaps import holm, over_splits, two_sided
from dlc_jax.tuning.tune import CAN_BE_TRIED
from dlc_jax.types import KEEP_FRACTIONS, Conventions, Gap

_PATH = dlc.PathSpec(num_probes=10, placement="midpoint")
_HEADS = dlc.LinearProbeConfig(epochs=20, learning_rate=0.02)
_RECORD = dlc.FinetuneConfig(epochs=20, batch_size=32, learning_rate=0.02, linear_probe=True)
_TRAINED = ("forgetting", "el2n", "grand", "entropy")  # scores of training, compared with DLC
_REPEATS, _SPLITS = 10, (0.25, 0.5, 0.75)  # of `auto`
_IS_LOW = np.array(KEEP_FRACTIONS) <= 0.5


class Case(NamedTuple):
    """A data set and an encoder.

    Attributes:
      sources: Sources of the data set, split anew all together. `{shared}` is a folder.
      encoder: Name and weights.
      size: Side of the images in pixels.
      test_share: Share of the photographs that is tested on.
      other: Case of the same data, on whose features heads are trained as well.
    """

    sources: tuple[str, ...]
    encoder: tuple[str | None, str]
    size: int
    test_share: float
    other: str | None = None


_SAMPLE, _SHARE = ("demo:caltech15/train", "demo:caltech15/test"), 300 / 1050
_DTD10 = ("parquet:{shared}/dtd10/train+validation+test.parquet",)
_TIN64 = ("resnet18", "{shared}/encoders/resnet18_tin64")
_LITE0, _HUB = (None, "demo:efficientnet_lite0"), ("resnet18", "timm/resnet18.tv_in1k")
_AIRCRAFT = "fgvc_aircraft:{shared}/fgvc-aircraft-2013b/train+val+test"
CASES = {
    "sample-small": Case(_SAMPLE, ("resnet18", "demo:resnet18"), 64, _SHARE, "sample-lite0"),
    "sample-lite0": Case(_SAMPLE, _LITE0, 128, _SHARE, "sample-small"),
    "dtd10-tin64": Case(_DTD10, _TIN64, 128, 1 / 3, "dtd10-lite0"),
    "dtd10-lite0": Case(_DTD10, _LITE0, 224, 1 / 3, "dtd10-tin64"),
    "dtd": Case(("tfds:dtd/train+validation", "tfds:dtd/test"), _HUB, 224, 1 / 3),
    "aircraft": Case((_AIRCRAFT,), _HUB, 224, 1 / 3),
    "weeds": Case(("tfds:deep_weeds/train",), _HUB, 224, 0.2),
}
Way = tuple[str, float | None]  # method and split
_RANDOM: Way = ("random", None)
WAYS = [
    _RANDOM,
    *(
        (name, split)
        for name in CAN_BE_TRIED
        for split in (_SPLITS if SELECTORS[name].has_split else (None,))
        if name != "random"
    ),
]
CELLS = [(*way, keep) for way in WAYS for keep in KEEP_FRACTIONS]


class Measured(NamedTuple):
    """Photographs of a case.

    Attributes:
      labels: [n] class ids.
      features: [n, d] of the encoder.
      along_path: [m, n, d] of its masked copies.
      sparsity: [m] share of the weights that each has lost.
      trained: [s, k] `_TRAINED`, of the first source alone.
    """

    labels: Int64[np.ndarray, " n"]
    features: Float32[np.ndarray, "n d"]
    along_path: Float32[np.ndarray, "m n d"]
    sparsity: Float32[np.ndarray, " m"]
    trained: Float32[np.ndarray, "s k"]

    def losses(self, some: Int64[np.ndarray, " k"]) -> Float64[np.ndarray, "m1 k"]:
        """Returns losses of some samples against their own prototypes, first of the encoder."""
        means, places = self._prototypes(some)
        found = [
            prototype_loss(*map(jnp.asarray, (copy[some], places, means)))
            for copy in (self.features, *self.along_path)
        ]
        return np.stack(found).astype(np.float64)

    def right(self, some: Int64[np.ndarray, " k"]) -> Float64[np.ndarray, " m1"]:
        """Returns for which percentage the own prototype is the nearest, first by the encoder."""
        means, places = self._prototypes(some)
        found = []
        for copy in (self.features, *self.along_path):
            away = np.square(copy[some]).sum(axis=1)[:, None] - 2 * copy[some] @ means.T
            found.append(100 * ((away + np.square(means).sum(axis=1)).argmin(axis=1) == places))
        return np.stack(found).mean(axis=1)

    def _prototypes(
        self, some: Int64[np.ndarray, " k"]
    ) -> tuple[Float32[np.ndarray, "c d"], Int64[np.ndarray, " k"]]:
        classes, places = np.unique(self.labels[some], return_inverse=True)
        rows = self.features[some]
        return np.stack([rows[places == j].mean(axis=0) for j in range(len(classes))]), places


class Split(NamedTuple):
    """A case split into training and test part."""

    data: Measured
    train: Int64[np.ndarray, " k"]
    test: Int64[np.ndarray, " t"]
    number: int

    @classmethod
    def of(cls, data: Measured, test_share: float, number: int) -> Split:
        """Returns one of many splits, class by class."""
        generator, is_test = np.random.default_rng([number, 27]), np.zeros(len(data.labels), bool)
        for label in np.unique(data.labels):
            members = generator.permutation(np.flatnonzero(data.labels == label))
            is_test[members[: round(len(members) * test_share)]] = True
        return cls(data, np.flatnonzero(~is_test), np.flatnonzero(is_test), number)

    def accuracy(
        self, kept: Sequence[np.ndarray], features: Float32[np.ndarray, "n d"]
    ) -> Float64[np.ndarray, " c"]:
        """Returns the test accuracy in percent of a head trained on each part of the training."""
        labels = self.data.labels
        found = dlc.linear_probes(
            features[self.train],
            labels[self.train],
            kept,
            val_features=features[self.test],
            val_labels=labels[self.test],
            seeds=[self.number] * len(kept),
            settings=_HEADS,
        )
        return found.accuracy

    def by_method(self, other: Measured | None) -> dict[str, np.ndarray]:
        """Returns what every method comes to.

        Keys: `accuracy` [cells + 1], in percent, the full set last; `transferred`, the same by
        heads on another encoder's features; `shift` [cells], squared MMD of what is kept to all.
        """
        rows, labels = self.data.features[self.train], self.data.labels[self.train]
        scores = self.data.losses(self.train)[1:].mean(axis=0)
        pool = Candidates(scores, labels, features=rows)
        kept = [
            pool.select(method=method, split=split, keep_fraction=keep, seed=self.number).indices
            for method, split, keep in CELLS
        ]
        everything = [*kept, np.arange(len(labels))]
        found = {
            "accuracy": self.accuracy(everything, self.data.features),
            "shift": shifts(rows.astype(np.float64), kept),
        }
        if other is not None:
            found["transferred"] = self.accuracy(everything, other.features)
        return found

    def by_auto(self) -> dict[str, np.ndarray]:
        """Returns what `auto` stands for on the training part, and its test accuracy.

        Keys: `accuracy` [keep fractions] in percent; `chosen`, the labels of what it stands for.
        """
        rows, labels = self.data.features[self.train], self.data.labels[self.train]
        scores = self.data.losses(self.train)[1:].mean(axis=0)
        tuning = dlc.tune(
            scores,
            labels,
            features=rows,
            trials=_HEADS,
            splits=_SPLITS,
            num_repeats=_REPEATS,
            seed=self.number,
        )
        pool = Candidates(scores, labels, features=rows)
        kept = [
            pool.select(method=AUTO, keep_fraction=keep, seed=self.number, tuning=tuning)
            for keep in KEEP_FRACTIONS
        ]
        found = self.accuracy([one.indices for one in kept], self.data.features)
        return {"accuracy": found, "chosen": np.array([one.chosen.label for one in kept])}


def measured(case: Case, shared: str) -> Measured:
    """Returns the features of all photographs of a case."""
    name, weights = case.encoder
    encoder = dlc.load_encoder(name, weights.format(shared=shared), image_size=case.size)
    encoder = encoder.for_mode("default")
    walk = learning_path(encoder, _PATH.for_mode("default"), 0, Conventions.of("default"))
    parts = [dlc.load_dataset(source.format(shared=shared)) for source in case.sources]
    names = sorted({name for part in parts for name in part.class_names})
    labels = [np.array([names.index(n) for n in part.class_names])[part.labels] for part in parts]

    def features(params: Any) -> Float32[np.ndarray, "n d"]:
        copy = dataclasses.replace(encoder, params=params)
        return np.concatenate([dlc.features(copy, part, image_size=case.size) for part in parts])

    thresholds = [
        Thresholds(*(part[place] for part in walk.thresholds)) for place in range(len(walk))
    ]
    along_path = [
        features(masked(encoder.params, walk.prunable, walk.importance, threshold))
        for threshold in thresholds
    ]
    record = dlc.record_training(encoder, parts[0], image_size=case.size, settings=_RECORD)
    return Measured(
        np.concatenate(labels),
        features(encoder.params),
        np.stack(along_path),
        walk.sparsity,
        np.stack([dlc.score(record, method=name) for name in _TRAINED]),
    )


def shifts(
    rows: Float64[np.ndarray, "n d"], kept: Sequence[Int64[np.ndarray, " _"]]
) -> Float64[np.ndarray, " c"]:
    """Returns the squared maximum mean discrepancy of each part to all rows.

    Gaussian kernel, its width the median distance; 0 for all rows.

    Source: Gretton et al. 2012, A kernel two-sample test.
    """
    norms = np.square(rows).sum(axis=1)
    squares = np.maximum(norms[:, None] + norms - 2 * rows @ rows.T, 0)
    kernel = np.exp(-squares / (2 * np.median(squares[np.triu_indices(len(rows), 1)])))
    to_all, within_all = kernel.mean(axis=1), kernel.mean()
    return np.array([kernel[np.ix_(k, k)].mean() - 2 * to_all[k].mean() + within_all for k in kept])


def once(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, np.ndarray]:
    """Returns arrays from a file, once they are computed."""
    if not path.exists():
        with atomic(path) as file:
            np.savez(file, **compute())
    with np.load(path) as file:
        return dict(file)


def gap_table(
    accuracy: Float[np.ndarray, "s c"], ways: Sequence[str], test_to_train: float
) -> tuple[str, list[list[Gap]]]:
    """Returns a line per way of choosing: its gaps to the first, by keep fraction and on average.

    Args:
      accuracy: In percent, by split; the ways' cells one after the other.
      ways: Their names.
      test_to_train: Ratio of the numbers of samples in the two parts of a split.
    Returns:
      Markdown, in which * marks gaps beyond chance for all of the table together (Holm), and the
      gaps.
    """
    by_way = accuracy.reshape(len(accuracy), len(ways), -1)
    means = [by_way[:, :, of].mean(axis=2) for of in (_IS_LOW, ~_IS_LOW)]
    by_way = np.concatenate([by_way, np.stack(means, axis=2)], axis=2)
    test = functools.partial(over_splits, test_to_train=test_to_train)
    columns = [list((by_way[:, k] - by_way[:, 0]).T) for k in range(1, len(ways))]
    gaps = [[test(column) for column in row] for row in columns]
    sure = iter(holm([two_sided(column, test) for row in columns for column in row]))
    rows = [[ways[0], *(f"{value:.1f} %" for value in by_way[:, 0].mean(axis=0))]]
    for name, row in zip(ways[1:], gaps, strict=True):
        shown = [f"{gap.mean:+.1f} ± {gap.half_width:.1f}" for gap in row]
        rows.append([name, *(f"{x} *" if next(sure) <= 0.05 else x for x in shown)])
    header = [*(f"keep {keep:g}" for keep in KEEP_FRACTIONS), "mean to 0.5", "above"]
    return markdown(("", *header), rows), gaps


def name_of(way: Way) -> str:
    """Returns how tables name a way of choosing."""
    return way[0] if way[1] is None else f"{way[0]} (split {way[1]:g})"


def report(case: Case, data: Measured, splits: list[dict], autos: list[dict]) -> str:
    """Returns the tables of a case as Markdown."""
    some = Split.of(data, case.test_share, 0)
    ratio = len(some.test) / len(some.train)
    accuracy = np.stack([found["accuracy"] for found in splits])
    names = [name_of(way) for way in WAYS]
    table, _ = gap_table(accuracy[:, :-1], names, ratio)
    losses, right = data.losses(some.train), data.right(some.train)
    classes = [np.flatnonzero(data.labels[some.train] == j) for j in np.unique(data.labels)]

    def agreement(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([stats.spearmanr(a[c], b[c]).statistic for c in classes]))

    first = np.arange(data.trained.shape[1])
    dlc_of_first = data.losses(first)[1:].mean(axis=0)
    by_class = [np.flatnonzero(data.labels[first] == j) for j in np.unique(data.labels[first])]
    trained = [
        np.nanmean([stats.spearmanr(dlc_of_first[c], row[c]).statistic for c in by_class])
        for row in data.trained
    ]
    parts = [
        f"{len(data.labels):,} photographs, {len(some.train)} of them trained on and "
        f"{len(some.test)} tested on; {len(splits)} splits. Full set "
        f"{accuracy[:, -1].mean():.1f} %.",
        "Own prototype nearest, of the training part: the encoder "
        + f"{right[0]:.0f} %; "
        + ", ".join(
            f"{r:.0f} % at sparsity {s:.2f}" for r, s in zip(right[1:], data.sparsity, strict=True)
        ),
        f"Spearman's correlation of DLC within classes: with the unmasked loss "
        f"{agreement(losses[1:].mean(axis=0), losses[0]):.3f}; with scores of training "
        + ", ".join(f"{name} {value:.2f}" for name, value in zip(_TRAINED, trained, strict=True)),
        table,
    ]
    if autos:
        at = {way: k for k, way in enumerate(WAYS)}
        shape = (len(splits), len(WAYS), len(KEEP_FRACTIONS))
        of_ways = accuracy[: len(autos), :-1].reshape(-1, *shape[1:])
        auto = np.stack([found["accuracy"] for found in autos])
        both = [of_ways[:, at[_RANDOM]], auto, of_ways[:, at["herding", None]]]
        table, (gaps, of_herding) = gap_table(
            np.concatenate(both, axis=1), ["random", AUTO, "herding"], ratio
        )
        chosen = [np.unique([f["chosen"][k] for f in autos], return_counts=True) for k in range(9)]
        counts = [", ".join(f"{n} {c}" for n, c in zip(*some, strict=True)) for some in chosen]
        down = [over_splits(column, ratio) for column in (both[0] - both[1]).T]
        worse = holm([gap.p_value for gap in down])
        parts += [
            f"`auto` on {len(autos)} splits: mean gain at keep fractions to 0.5 "
            f"{gaps[-2].mean:+.2f} points, herding {of_herding[-2].mean:+.2f}; smallest p for "
            f"being worse than random, Holm, {min(worse):.2f}",
            table,
            "It stood for: "
            + "; ".join(f"keep {k:g}: {c}" for k, c in zip(KEEP_FRACTIONS, counts, strict=True)),
        ]
    if "transferred" in splits[0]:
        table, _ = gap_table(
            np.stack([found["transferred"][:-1] for found in splits]), names, ratio
        )
        parts += [f"Selected by this encoder, heads on the features of {case.other}:", table]
    shift = np.mean([found["shift"] for found in splits], axis=0).reshape(len(WAYS), -1)
    rows = [
        [name, *(f"{1000 * x:.2f}" for x in row)] for name, row in zip(names, shift, strict=True)
    ]
    header = ("", *(f"keep {keep:g}" for keep in KEEP_FRACTIONS))
    parts += ["Shift of what is kept, squared MMD x 1000:", markdown(header, rows)]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="where results are kept")
    parser.add_argument("--cases", default="sample-small", help=f"of {', '.join(CASES)}")
    parser.add_argument("--shared", default="../shared", help="folder of data sets and encoders")
    parser.add_argument("--splits", type=int, default=20, help="splits of the photographs")
    parser.add_argument("--auto", type=int, default=10, help="splits on which auto is tuned")
    asked = parser.parse_args()
    asked.workdir.mkdir(parents=True, exist_ok=True)

    def data_of(name: str) -> Measured:
        path = asked.workdir / f"{name}-features.npz"
        return Measured(**once(path, lambda: measured(CASES[name], asked.shared)._asdict()))

    for name in asked.cases.split(","):
        case, data = CASES[name], data_of(name)
        other = None if case.other is None else data_of(case.other)
        own = [Split.of(data, case.test_share, number) for number in range(asked.splits)]
        splits = [
            once(
                asked.workdir / f"{name}-{one.number}.npz", functools.partial(one.by_method, other)
            )
            for one in own
        ]
        autos = [
            once(asked.workdir / f"{name}-{one.number}-auto.npz", one.by_auto)
            for one in own[: asked.auto]
        ]
        text = f"## {name}\n\n{report(case, data, splits, autos)}\n"
        with atomic(asked.workdir / f"{name}.md", "w") as file:
            file.write(text)
        print(text)


if __name__ == "__main__":
    main()
