"""Samples that look mislabelled: another class's prototype is nearer, however much is masked."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from dlc_jax import expect
from dlc_jax.types import ProbeLosses

_LEVEL = 0.01  # most likely to count a probe that is no better than chance


@dataclasses.dataclass(frozen=True, eq=False)
class SuspectLabels:
    """Which samples look mislabelled.

    Attributes:
      is_suspect: [n] whether the own class's prototype is nearest under no probe that carries
        information; none is where no probe carries any.
      suggested: [n] class that is nearest under most of these probes, of equal ones that of the
        least sparsity; the own class where no probe carries information.
      num_right: [n] probes, of all m, under which the own class's prototype is nearest.
      scores: [n] mean loss over the probes that carry information, in nats; higher is more suspect;
        NaN where none carries any.
      share_right: [m] share of the samples whose own class's prototype is nearest under each probe.
      is_informative: [m] whether a probe carries information: see `suspect_labels`.
    """

    is_suspect: Bool[np.ndarray, " n"]
    suggested: Int32[np.ndarray, " n"]
    num_right: Int64[np.ndarray, " n"]
    scores: Float32[np.ndarray, " n"]
    share_right: Float64[np.ndarray, " m"]
    is_informative: Bool[np.ndarray, " m"]

    @property
    def ranked(self) -> Int64[np.ndarray, " s"]:
        """Positions of the suspects, the most suspect first."""
        positions = np.flatnonzero(self.is_suspect)
        return positions[np.argsort(-self.scores[positions], kind="stable")]


def suspect_labels(probes: ProbeLosses) -> SuspectLabels:
    """Finds samples whose own class is never the nearest, and the class that is instead.

    Only probes that carry information count: those under which more samples are nearest to their
    own class than by chance (one-sided binomial test, p < 1 %). Chance is the share of the largest
    class: masked far enough, a network gives all images nearly the same features, whose nearest
    prototype is right for one class, and that may be the largest; 1/c would take it for knowledge.
    Prototypes are means of features with these same labels, so that every sample pulls its own
    prototype a little: of a class of few samples less is found.

    A suspect may as well be a hard sample or one that the encoder does not know: read the first.

    Args:
      probes: From `probe`, of images.
    Raises:
      ValueError: it is not known which prototypes are nearest, as of instructions, of losses of
        your own, or of an earlier version.
    Source: the losses are those of Jiang et al. 2025, section 3; the rest is this package's.
    Example:
      >>> dataset = dlc.load_dataset("demo:caltech15/train").subset(np.arange(0, 750, 15))
      >>> encoder = dlc.load_encoder("resnet18", "demo:resnet18")
      >>> path = dlc.PathSpec(num_probes=4, placement="midpoint")
      >>> found = dlc.suspect_labels(dlc.probe(encoder, dataset, image_size=32, path=path))
      >>> found.is_informative.tolist(), len(found.ranked)
      ([True, True, True, True], 7)
    """
    is_informative = informative_probes(probes)
    assert probes.nearest is not None  # it has been checked
    is_right = probes.nearest == probes.labels
    suggested, scores = probes.labels, np.full(len(probes.labels), np.nan, np.float32)
    if is_informative.any():
        suggested = _most_frequent([probes.nearest[k] for k in np.flatnonzero(is_informative)])
        those = is_informative[:, None]
        scores = probes.losses.mean(axis=0, dtype=np.float64, where=those).astype(np.float32)
    return SuspectLabels(
        is_suspect=~is_right[is_informative].any(axis=0) & is_informative.any(),
        suggested=suggested,
        num_right=is_right.sum(axis=0),
        scores=scores,
        share_right=is_right.mean(axis=1),
        is_informative=is_informative,
    )


def informative_probes(probes: ProbeLosses) -> Bool[np.ndarray, " m"]:
    """Returns which probes carry information; argument and errors as for `suspect_labels`."""
    from scipy.special import bdtrc  # which only this needs

    expect.is_a(ProbeLosses, probes=probes)
    if probes.nearest is None:
        raise expect.InputError(
            "probes: have no nearest, the nearest class by probe and sample, as "
            "dlc.probe(encoder, dataset) of this version gives it for images; got None."
        )
    if probes.nearest.shape != probes.losses.shape:
        raise expect.InputError(
            f"probes.nearest: expected {probes.losses.shape}, as the losses have, got "
            f"{probes.nearest.shape}."
        )
    num_right = (probes.nearest == probes.labels).sum(axis=1)
    chance = np.bincount(probes.labels).max() / len(probes.labels)
    return bdtrc(num_right - 1.0, len(probes.labels), chance) < _LEVEL  # as many right, or more


def _most_frequent(nearest: list[Int32[np.ndarray, " n"]]) -> Int32[np.ndarray, " n"]:
    """Returns the class that each sample has most often, of equal ones that of the first row."""
    found, most = nearest[0].copy(), np.zeros(len(nearest[0]), np.int64)
    for row in nearest:
        num = np.zeros_like(most)
        for other in nearest:
            num += row == other
        found = np.where(num > most, row, found)
        most = np.maximum(num, most)
    return found
