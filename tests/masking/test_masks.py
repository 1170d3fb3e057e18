import jax
import numpy as np
import pytest
from conftest import narrow
from hypothesis import given, settings
from hypothesis import strategies as st

import dlc_jax as dlc
from dlc_jax.masking import (
    Thresholds,
    exact_thresholds,
    masked,
    prunable_paths,
    removal_steps,
    weight_importance,
    zero_counts,
)
from dlc_jax.masking.torch_ties import smallest
from dlc_jax.types import by_path


def masks_of_path(params, prunable, importance, counts):
    """Returns a list of {path: bool mask}, one per probe, from the traced code."""
    thresholds = exact_thresholds(params, prunable, importance, counts)
    if importance is None:
        importance = {path: np.abs(np.asarray(by_path(params)[path])) for path in prunable}
    ones = {path: jax.numpy.ones(importance[path].shape) for path in prunable}
    apply = jax.jit(lambda t: masked(ones, prunable, importance, t))
    found = [apply(Thresholds(*(part[k] for part in thresholds))) for k in range(len(counts))]
    return [{path: np.asarray(mask) > 0 for path, mask in masks.items()} for masks in found]


def torch_masks_of_path(modules, counts, method):
    """Returns {name: mask} after each pruning step, as torch.nn.utils.prune makes them."""
    from torch.nn.utils import prune

    path = []
    for removed in np.diff(counts, prepend=0):
        if removed:
            prune.global_unstructured(
                [(module, "weight") for module in modules.values()], method, amount=int(removed)
            )
        ones = {name: np.ones(tuple(module.weight.shape)) for name, module in modules.items()}
        path.append(
            {
                name: np.asarray(getattr(module, "weight_mask", ones[name])).astype(bool)
                for name, module in modules.items()
            }
        )
    return path


@pytest.mark.parametrize("schedule", ["linear", "geometric"])
def test_masks_are_torchs_at_every_step(timm, tmp_path, schedule):
    import torch
    from safetensors.torch import save_file
    from torch.nn.utils import prune

    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=2, pretrained=False)
    narrow(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = dlc.load_encoder("resnet18", str(tmp_path / "model.safetensors"))
    prunable = prunable_paths(encoder.params, encoder.is_prunable)
    convs = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    num_weights = sum(module.weight.numel() for module in convs.values())
    counts = zero_counts(num_weights, schedule=schedule)
    flat = np.sort(
        np.concatenate([m.weight.detach().abs().numpy().ravel() for m in convs.values()])
    )
    weights = {name: module.weight.detach().abs().numpy() for name, module in convs.items()}
    theirs = torch_masks_of_path(convs, counts, prune.L1Unstructured)
    ours = masks_of_path(encoder.params, prunable, None, counts)
    for k, count in enumerate(counts):
        assert sum((~mask).sum() for mask in ours[k].values()) == count
        tied = flat[count] if count and flat[count] == flat[count - 1] else np.nan
        for path, name in zip(prunable, convs, strict=True):
            mask = ours[k][path].transpose(3, 2, 0, 1)
            differs = mask != theirs[k][name]
            assert np.all(weights[name][differs] == tied), (k, name)


def test_half_precision_ties_exact_counts_nested_and_by_position(sample_encoder):
    params = sample_encoder.params
    prunable = prunable_paths(params, sample_encoder.is_prunable)
    leaves = by_path(params)
    flat = np.concatenate([np.abs(leaves[path]).ravel() for path in prunable])
    counts = zero_counts(len(flat), num_probes=25)
    ascending = np.sort(flat)
    num_tied = [np.count_nonzero(flat == ascending[count]) for count in counts[1:]]
    assert np.mean(num_tied) > 20  # the case this test is about
    order = np.argsort(flat, kind="stable")
    previous = np.ones(len(flat), bool)
    for count, masks in zip(counts, masks_of_path(params, prunable, None, counts), strict=True):
        mask = np.concatenate([masks[path].ravel() for path in prunable])
        expected = np.ones(len(flat), bool)
        expected[order[:count]] = False
        np.testing.assert_array_equal(mask, expected)
        assert not np.any(mask & ~previous)
        previous = mask


def test_official_ties_are_torchs(timm, sample_encoder):
    """Half-precision weights: every threshold cuts through a group of equal weights."""
    import torch
    from torch.nn.utils import prune

    prunable = prunable_paths(sample_encoder.params, sample_encoder.is_prunable)
    leaves = by_path(sample_encoder.params)
    convs = {}
    for path in prunable:
        weight = torch.from_numpy(np.array(leaves[path]).transpose(3, 2, 0, 1).copy())
        convs[path] = torch.nn.Conv2d(1, 1, 1)
        convs[path].weight = torch.nn.Parameter(weight)
    num_weights = sum(leaves[path].size for path in prunable)
    counts = zero_counts(num_weights, schedule="geometric", num_probes=12)
    theirs = torch_masks_of_path(convs, counts, prune.L1Unstructured)
    importance = removal_steps(sample_encoder.params, prunable, counts)
    ours = masks_of_path(sample_encoder.params, prunable, importance, counts)
    for k in range(len(counts)):
        for path in prunable:
            np.testing.assert_array_equal(
                ours[k][path].transpose(3, 2, 0, 1), theirs[k][path], err_msg=f"{k} {path}"
            )


@settings(deadline=None, max_examples=60)
@given(
    num=st.integers(4, 3000),
    share=st.floats(0.02, 0.98),
    levels=st.sampled_from([2, 10, 300, 100_000]),
    seed=st.integers(0, 10**6),
)
def test_smallest_picks_torchs_ties(num, share, levels, seed):
    import torch

    values = np.random.default_rng(seed).integers(0, levels, num).astype(np.float32)
    k = max(int(num * share), 1)
    found = smallest(values, k)
    assert sorted(values[found]) == sorted(values)[:k]
    if k * 64 > num:
        expected = torch.topk(torch.from_numpy(values), k, largest=False).indices.numpy()
        assert set(found) == set(expected)


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    levels=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)
def test_counts_are_exact_whatever_the_ties(sizes, levels, seed):
    generator = np.random.default_rng(seed)
    params = {
        f"w{i}": generator.integers(-levels, levels + 1, n) * 0.5 for i, n in enumerate(sizes)
    }
    params = {name: jax.numpy.asarray(values, np.float32) for name, values in params.items()}
    total = sum(sizes)
    counts = np.sort(generator.integers(0, total, 4))
    for count, masks in zip(
        counts, masks_of_path(params, tuple(params), None, counts), strict=True
    ):
        assert sum((~mask).sum() for mask in masks.values()) == count
        kept = [np.abs(params[n])[mask] for n, mask in masks.items()]
        gone = [np.abs(params[n])[~mask] for n, mask in masks.items()]
        assert min(map(min, filter(len, kept))) >= max([0, *map(max, filter(len, gone))])


def test_random_importance_is_fixed_by_the_seed_and_ignores_the_weights(sample_encoder):
    prunable = prunable_paths(sample_encoder.params, sample_encoder.is_prunable)
    first = weight_importance(sample_encoder.params, prunable, "random", 1)
    again = weight_importance(sample_encoder.params, prunable, "random", 1)
    other = weight_importance(sample_encoder.params, prunable, "random", 2)
    for path in prunable:
        np.testing.assert_array_equal(first[path], again[path])
        assert np.any(first[path] != other[path])
    counts = zero_counts(sum(first[path].size for path in prunable), num_probes=3)
    masks = masks_of_path(sample_encoder.params, prunable, first, counts)
    assert [sum((~m).sum() for m in mask.values()) for mask in masks] == counts.tolist()


def test_masked_leaves_other_parameters_alone(sample_encoder):
    params = sample_encoder.params
    prunable = prunable_paths(params, sample_encoder.is_prunable)
    assert len(prunable) == 20  # convolutions, stem and down-sampling included
    counts = zero_counts(694_736, num_probes=2)
    thresholds = exact_thresholds(params, prunable, None, counts)
    result = by_path(masked(params, prunable, None, Thresholds(*(p[1] for p in thresholds))))
    for path, leaf in by_path(params).items():
        if path not in prunable:
            np.testing.assert_array_equal(result[path], leaf)
        else:
            zeroed = np.asarray(result[path]) == 0
            np.testing.assert_array_equal(np.asarray(result[path])[~zeroed], leaf[~zeroed])


def test_an_encoder_without_prunable_parameters_is_refused(sample_encoder):
    with pytest.raises(ValueError, match="is_prunable accepts none"):
        prunable_paths(sample_encoder.params, lambda path: False)
