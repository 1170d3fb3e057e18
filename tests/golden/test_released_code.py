"""Against recorded outputs of the released PyTorch code on real images and real weights.

Recorded: 750 images of the sample at 64 px, a ResNet-18 pre-trained on Tiny-ImageNet, the
geometric schedule of 50 probes, seed 1. `data/selections.npz` holds its scores and kept sets (as
bits over the samples); inputs, weights and losses are part of the development data.
"""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import require_shared
from scipy.stats import spearmanr

import dlc_jax as dlc
from dlc_jax.masking import PathSpec, exact_thresholds, prunable_paths, removal_steps
from dlc_jax.masking.thresholds import Thresholds, masked
from dlc_jax.types import by_path

SELECTIONS = np.load(Path(__file__).parent / "data" / "selections.npz")
CELLS = [name for name in SELECTIONS if "/" in name]


def kept_set(scores: np.ndarray, cell: str) -> np.ndarray:
    """Returns what we keep in one recorded cell, `e|h|s<split in %>/keep_<fraction>`."""
    kind, keep = cell.split("/")
    arguments = {"keep_fraction": float(keep.removeprefix("keep_")), "mode": "official"}
    if kind in ("e", "h"):
        arguments["method"] = {"e": "easiest", "h": "hardest"}[kind]
    else:
        arguments |= {"split": int(kind[1:]) / 100, "seed": 1}
    return dlc.select(scores, SELECTIONS["labels"], **arguments).indices


@pytest.mark.parametrize("cell", CELLS)
def test_kept_sets_are_identical_given_the_recorded_scores(cell):
    recorded = np.flatnonzero(np.unpackbits(SELECTIONS[cell])[:750])
    np.testing.assert_array_equal(kept_set(SELECTIONS["scores"], cell), recorded)


def test_all_cells_are_recorded():
    assert len(CELLS) == (19 + 2) * 9


@pytest.fixture(scope="module")
def golden():
    return require_shared("golden")


@pytest.fixture(scope="module")
def encoder():
    return dlc.load_encoder("resnet18", str(require_shared("encoders/resnet18_tin64")))


@pytest.fixture(scope="module")
def recorded(golden):
    return dict(np.load(golden / "resnet18-caltech15_outputs.npz"))


# Of the 50 recorded probes; all of them take two minutes, and were compared when they were new.
PLACES = np.arange(2, 50, 5)


@pytest.fixture(scope="module")
def probes(encoder, sample):
    return dlc.probe(
        encoder,
        sample,
        image_size=64,
        mode="official",
        num_probes=len(PLACES),
        path=dlc.PathSpec(placement="midpoint"),
        compute=dlc.Compute(batch_size=250),
    )


def test_images_are_the_recorded_ones(golden, sample):
    from dlc_jax.preprocess.images import load_images

    inputs = np.load(golden / "resnet18-caltech15_inputs.npz")
    np.testing.assert_array_equal(load_images(sample, 64).pixels, inputs["images"])
    np.testing.assert_array_equal(sample.labels, inputs["labels"])
    np.testing.assert_array_equal(sample.ids, inputs["ids"])


@pytest.mark.slow
def test_features_and_prototypes(encoder, sample, recorded, probes):
    features = dlc.features(encoder, sample, image_size=64, mode="official")
    for ours, theirs in (
        (features, recorded["features"]),
        (probes.prototypes, recorded["prototypes"]),
    ):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.slow
def test_losses_scores_and_kept_sets_end_to_end(recorded, probes):
    theirs = recorded["losses"][PLACES]
    assert np.abs(probes.losses - theirs).max() <= 2e-6
    scores = dlc.score(probes)
    assert spearmanr(scores, theirs.mean(axis=0)).statistic >= 0.99999
    np.testing.assert_allclose(recorded["losses"].mean(axis=0), recorded["scores"], atol=1e-6)
    shared, total = 0, 0
    for cell in CELLS:
        ours, recorded_set = kept_set(scores, cell), kept_set(theirs.mean(axis=0), cell)
        shared, total = shared + len(np.intersect1d(ours, recorded_set)), total + len(recorded_set)
    assert shared / total >= 0.99


@pytest.mark.slow
def test_masks_have_the_recorded_hashes_and_counts(golden, encoder, recorded):
    """The recorded hash is of packed bits, 1 = kept, in torch's layout and module order."""
    prunable = prunable_paths(encoder.params, encoder.is_prunable)
    leaves = by_path(encoder.params)
    num_weights = sum(leaves[path].size for path in prunable)
    counts = PathSpec(schedule="geometric").counts(num_weights).chosen
    np.testing.assert_array_equal(counts, recorded["mask_zeros"][:50])
    ones = {path: jax.numpy.ones(leaves[path].shape) for path in prunable}
    meta = json.loads((golden / "resnet18-caltech15_meta.json").read_text())
    for importance in (None, removal_steps(encoder.params, prunable, counts)):
        thresholds = exact_thresholds(encoder.params, prunable, importance, counts)
        if importance is None:
            importance = {p: np.abs(np.asarray(leaves[p])).view(np.int32) for p in prunable}
        for step, expected in meta["mask_sha256_after_step"].items():
            threshold = Thresholds(*(part[int(step)] for part in thresholds))
            masks = masked(ones, tuple(ones), importance, threshold)
            bits = np.concatenate(
                [np.asarray(masks[p]).transpose(3, 2, 0, 1).ravel() for p in prunable]
            )
            packed = np.packbits(bits.astype(bool)).tobytes()
            assert hashlib.sha256(packed).hexdigest() == expected, step


@pytest.mark.long
@pytest.mark.long
def test_random_masking_agrees_in_distribution(golden, encoder, sample):
    """torch's draws cannot be replayed: two paths of ours differ as much as ours and theirs."""
    theirs = np.load(golden / "resnet18-caltech15_random_outputs.npz")["losses"][[0, 2]]
    ours = [
        dlc.probe(
            encoder,
            sample,
            image_size=64,
            mode="official",
            masking="random",
            num_probes=3,
            seed=seed,
            compute=dlc.Compute(batch_size=250),
        ).losses[[0, 2]]
        for seed in (1, 2)
    ]
    assert np.abs(ours[0][0] - theirs[0]).max() <= 2e-6
    between = np.abs(ours[0].mean(1) - ours[1].mean(1))
    assert np.all(np.abs(ours[0].mean(1) - theirs.mean(1)) <= 5 * between.max() + 1e-3)
