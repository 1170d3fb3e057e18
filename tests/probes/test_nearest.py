"""The nearest prototype of every probe and sample, against distances of NumPy."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import slow_but, subset

import dlc_jax as dlc
from dlc_jax.masking import prunable_paths
from dlc_jax.types import by_path, path_name


def masked_by_hand(encoder: dlc.Encoder, sparsity: float) -> dlc.Encoder:
    """Zeroes the smallest of all prunable weights together."""
    paths = prunable_paths(encoder.params, encoder.is_prunable)
    leaves = by_path(encoder.params)
    sizes = np.sort(np.concatenate([np.abs(np.asarray(leaves[p])).ravel() for p in paths]))
    num = round(float(sparsity) * len(sizes))
    limit = sizes[num - 1] if num else -1.0

    def masked(path, leaf):
        return np.where(np.abs(leaf) > limit, leaf, 0) if path_name(path) in paths else leaf

    params = jax.tree_util.tree_map_with_path(masked, jax.tree.map(np.asarray, encoder.params))
    return dataclasses.replace(encoder, params=params)


@pytest.mark.parametrize("num_probes", slow_but(["auto"], [4, "auto"]))
def test_nearest_is_that_of_numpy(sample_encoder, sample, num_probes):
    few = subset(sample, np.arange(0, 750, 25))
    path = dlc.PathSpec(num_probes=num_probes, placement="midpoint", step=0.2, agreement=1.0)
    probes = dlc.probe(sample_encoder, few, image_size=32, path=path)
    assert probes.nearest.dtype == np.int32
    assert probes.nearest.shape == probes.losses.shape
    encoder, num_clear = sample_encoder.for_mode("default"), 0
    for sparsity, nearest in zip(probes.sparsity, probes.nearest, strict=True):
        features = dlc.features(masked_by_hand(encoder, sparsity), few, image_size=32)
        gaps = features[:, None].astype(np.float64) - probes.prototypes[None]
        distances = np.linalg.norm(gaps, axis=-1)
        in_order = np.sort(distances, axis=1)
        is_clear = in_order[:, 1] - in_order[:, 0] > 1e-4 * in_order[:, 0]  # beyond rounding
        np.testing.assert_array_equal(nearest[is_clear], distances.argmin(axis=1)[is_clear])
        num_clear += is_clear.sum()
    assert num_clear > 0.95 * probes.nearest.size


def test_parts_of_a_stopped_run_keep_it(sample_encoder, sample, tmp_path):
    few = subset(sample, np.arange(0, 750, 25))
    options = {"image_size": 32, "num_probes": 2, "compute": dlc.Compute(batch_size=8)}
    first = dlc.probe(sample_encoder, few, **options, run=dlc.Run(folder=tmp_path))
    parts = sorted(tmp_path.rglob("losses-*.npz"))
    assert len(parts) == 4
    parts[2].unlink()
    again = dlc.probe(sample_encoder, few, **options, run=dlc.Run(folder=tmp_path))
    np.testing.assert_array_equal(again.nearest, first.nearest)
    np.testing.assert_array_equal(
        np.concatenate([np.load(part)["nearest"] for part in parts], axis=1), first.nearest
    )
