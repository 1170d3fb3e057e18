import jax
import numpy as np
import pytest
from conftest import narrow
from hypothesis import given, settings
from hypothesis import strategies as st

import dlc_jax as dlc
from dlc_jax.encoders import vit
from dlc_jax.masking import (
    PathSpec,
    Thresholds,
    exact_thresholds,
    masked,
    prunable_paths,
    removal_steps,
    weight_importance,
)
from dlc_jax.masking.torch_ties import smallest
from dlc_jax.types import by_path


def masks_of_path(params, prunable, importance, counts):
    """Returns a list of {path: bool mask}, one per probe, from the traced code."""
    thresholds = exact_thresholds(params, prunable, importance, counts)
    if importance is None:  # compared by their bits, as the mask of real weights is
        leaves = {path: np.asarray(by_path(params)[path], np.float32) for path in prunable}
        importance = {path: np.abs(leaf).view(np.int32) for path, leaf in leaves.items()}
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


@pytest.mark.slow
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
    counts = PathSpec(schedule=schedule).counts(num_weights).chosen
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


@pytest.mark.slow
def test_half_precision_ties_exact_counts_nested_and_by_position(sample_encoder):
    params = sample_encoder.params
    prunable = prunable_paths(params, sample_encoder.is_prunable)
    leaves = by_path(params)

    def flattened(by_path):
        return np.concatenate([by_path[path].transpose(3, 2, 0, 1).ravel() for path in prunable])

    flat = np.abs(flattened(leaves))
    counts = PathSpec("linear", num_probes=25).counts(len(flat)).chosen
    ascending = np.sort(flat)
    num_tied = [np.count_nonzero(flat == ascending[count]) for count in counts[1:]]
    assert np.mean(num_tied) > 20  # the case this test is about
    order = np.argsort(flat, kind="stable")
    previous = np.ones(len(flat), bool)
    for count, masks in zip(counts, masks_of_path(params, prunable, None, counts), strict=True):
        mask = flattened(masks)
        expected = np.ones(len(flat), bool)
        expected[order[:count]] = False
        np.testing.assert_array_equal(mask, expected)
        assert not np.any(mask & ~previous)
        previous = mask


def half_precision_vit() -> dict:
    """Two narrow ViT blocks under the paths that the encoder gives them."""
    generator = np.random.default_rng(0)
    shapes = {
        "attn": {"qkv": (32, 96), "proj": (32, 32)},
        "mlp": {"fc1": (32, 128), "fc2": (128, 32)},
    }

    def layer(shape):
        return {"kernel": jax.numpy.asarray(generator.normal(size=shape).astype(np.float16), "f4")}

    block = {part: {n: layer(s) for n, s in group.items()} for part, group in shapes.items()}
    again = {part: {n: layer(s) for n, s in group.items()} for part, group in shapes.items()}
    return {"blocks": {0: block, 1: again}}


@pytest.mark.parametrize(
    ("network", "step", "num_probes"),
    [
        ("resnet", 0.02, 12),
        ("resnet", 0.01, 5),
        pytest.param("resnet", 0.01, 80, marks=pytest.mark.slow),
        ("vit", 0.02, 12),
    ],
)
def test_official_ties_are_torchs(sample_encoder, network, step, num_probes):
    """Half-precision weights: every threshold cuts through a group of equal weights.

    Below a step of 1/64 torch.topk chooses with a heap.
    """
    import torch
    from torch.nn.utils import prune

    params = sample_encoder.params if network == "resnet" else half_precision_vit()
    order = vit.module_order if network == "vit" else None
    prunable = prunable_paths(params, lambda path: path.endswith("kernel"), order)
    if network == "vit":
        assert prunable[0] == "blocks/0/attn/qkv/kernel"
    leaves = by_path(params)
    convs = {}
    for path in prunable:
        weight = np.array(leaves[path])
        weight = weight.transpose(3, 2, 0, 1) if weight.ndim == 4 else weight.T
        convs[path] = torch.nn.Conv2d(1, 1, 1)
        convs[path].weight = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    num_weights = sum(leaves[path].size for path in prunable)
    path = PathSpec(schedule="geometric", step=step, num_probes=num_probes)
    counts = path.counts(num_weights).chosen
    theirs = torch_masks_of_path(convs, counts, prune.L1Unstructured)
    importance = removal_steps(params, prunable, counts)
    ours = masks_of_path(params, prunable, importance, counts)
    by_position = masks_of_path(params, prunable, None, counts)
    num_differing = 0
    for k in range(len(counts)):
        for path in prunable:
            axes = (3, 2, 0, 1) if leaves[path].ndim == 4 else (1, 0)
            expected = theirs[k][path]
            np.testing.assert_array_equal(ours[k][path].transpose(axes), expected)
            num_differing += np.count_nonzero(by_position[k][path].transpose(axes) != expected)
    assert num_differing > 0  # the order among equals is what is tested


@settings(deadline=None, max_examples=60)
@given(
    num=st.integers(4, 3000) | st.integers(20_000, 60_000),
    share=st.floats(0.02, 0.98) | st.floats(0.0, 1 / 60),
    levels=st.sampled_from([2, 10, 300, 100_000]),
    seed=st.integers(0, 10**6),
)
def test_smallest_picks_torchs_ties(num, share, levels, seed):
    import torch

    values = np.random.default_rng(seed).integers(0, levels, num).astype(np.float32)
    k = max(int(num * share), 1)
    found = smallest(values, k)
    assert sorted(values[found]) == sorted(values)[:k]
    expected = torch.topk(torch.from_numpy(values), k, largest=False).indices.numpy()
    assert set(found) == set(expected)


@pytest.mark.parametrize("num", [64, 200, 1000, 2000])
def test_smallest_picks_torchs_ties_where_nth_element_gives_up(num, monkeypatch):
    """Musser's sequence makes every pivot a bad one; nth_element then goes on with a heap."""
    import torch

    from dlc_jax.masking import torch_ties

    half = num // 2
    odd = [i if i % 2 else half + i - 1 for i in range(1, half + 1)]
    values = np.array([*odd, *range(2, num + 1, 2)], np.float32) // 2
    heaps = []
    left_in_heap = torch_ties._left_in_heap
    monkeypatch.setattr(
        torch_ties, "_left_in_heap", lambda *of: heaps.append(of) or left_in_heap(*of)
    )
    expected = torch.topk(torch.from_numpy(values), num // 4, largest=False).indices.numpy()
    assert set(smallest(values, num // 4)) == set(expected)
    assert heaps  # the case this test is about


@settings(deadline=None, max_examples=12)  # each example is a compilation
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


def test_counts_are_exact_among_denormal_weights():
    generator = np.random.default_rng(0)
    values = generator.permutation(np.arange(1, 2001).astype(np.float32) * 2e-42)
    params = {"w": jax.numpy.asarray(values)}
    counts = np.array([0, 300, 500, 900])
    thresholds = exact_thresholds(params, ("w",), None, counts)
    ones = {"w": jax.numpy.ones(2000)}
    bits = {"w": values.view(np.int32)}
    for k, count in enumerate(counts):
        threshold = Thresholds(*(part[k] for part in thresholds))
        kept = np.asarray(jax.jit(lambda t: masked(ones, ("w",), bits, t))(threshold)["w"])
        assert np.count_nonzero(kept == 0) == count
        direct = masked(params, ("w",), None, threshold)["w"]
        assert np.count_nonzero(np.asarray(direct).view(np.int32) == 0) == count


def test_random_importance_is_fixed_by_the_seed_and_ignores_the_weights(sample_encoder):
    prunable = prunable_paths(sample_encoder.params, sample_encoder.is_prunable)
    first = weight_importance(sample_encoder.params, prunable, "random", 1)
    again = weight_importance(sample_encoder.params, prunable, "random", 1)
    other = weight_importance(sample_encoder.params, prunable, "random", 2)
    for path in prunable:
        np.testing.assert_array_equal(first[path], again[path])
        assert np.any(first[path] != other[path])
    counts = (
        PathSpec("linear", num_probes=3).counts(sum(first[path].size for path in prunable)).chosen
    )
    masks = masks_of_path(sample_encoder.params, prunable, first, counts)
    assert [sum((~m).sum() for m in mask.values()) for mask in masks] == counts.tolist()


@pytest.mark.slow
def test_masked_leaves_other_parameters_alone(sample_encoder):
    params = sample_encoder.params
    prunable = prunable_paths(params, sample_encoder.is_prunable)
    assert len(prunable) == 20  # convolutions, stem and down-sampling included
    counts = PathSpec("linear", num_probes=2).counts(694_736).chosen
    thresholds = exact_thresholds(params, prunable, None, counts)
    result = by_path(masked(params, prunable, None, Thresholds(*(p[1] for p in thresholds))))
    for path, leaf in by_path(params).items():
        if path not in prunable:
            np.testing.assert_array_equal(result[path], leaf)
        else:
            there = np.asarray(result[path])
            np.testing.assert_array_equal(there, np.where(there == 0, 0, leaf))


def test_an_encoder_without_prunable_parameters_is_refused(sample_encoder):
    with pytest.raises(ValueError, match="is_prunable accepts none"):
        prunable_paths(sample_encoder.params, lambda path: False)


@pytest.mark.parametrize(
    ("dtype", "masking"),
    [
        ("float32", "l1"),
        pytest.param("float32", "random", marks=pytest.mark.slow),
        pytest.param("float32", "steps", marks=pytest.mark.slow),
        pytest.param("bfloat16", "l1", marks=pytest.mark.slow),
        pytest.param("bfloat16", "random", marks=pytest.mark.slow),
        pytest.param("bfloat16", "steps", marks=pytest.mark.slow),
        pytest.param("float16", "l1", marks=pytest.mark.slow),
        pytest.param("float16", "random", marks=pytest.mark.slow),
        pytest.param("float16", "steps", marks=pytest.mark.slow),
    ],
)
@given(num_values=st.integers(1, 30), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_counting_finds_the_masks_that_sorting_finds(dtype, masking, num_values, seed):
    """Few values, denormal ones and zeros among them, so that most thresholds fall on ties."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=num_values) * 10.0 ** generator.integers(-44, 3, num_values)
    values[0] = 0
    shapes = {"a": (1, 3), "b": (7, 3), "c": (40, 3)}  # always the same: each is compiled
    params = {
        path: jax.numpy.asarray(generator.choice(values, shape), dtype)
        for path, shape in shapes.items()
    }
    prunable, num = tuple(params), sum(leaf.size for leaf in params.values())
    counts = np.sort(generator.integers(0, num, 4))
    importance = None if masking == "l1" else weight_importance(params, prunable, "random", 0)
    if masking == "steps":
        importance = {path: (9 * part).astype(np.int32) for path, part in importance.items()}
    sorted_out = masks_of_path(params, prunable, importance, counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlc_jax.masking.thresholds.TOO_MANY_TO_SORT", 0)
        counted = masks_of_path(params, prunable, importance, counts)
    for count, ours, theirs in zip(counts, counted, sorted_out, strict=True):
        assert sum((~mask).sum() for mask in ours.values()) == count
        for path in prunable:
            np.testing.assert_array_equal(ours[path], theirs[path])
