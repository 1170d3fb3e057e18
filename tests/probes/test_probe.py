import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import narrow, random_images, subset
from flax import nnx

import dlc_jax as dlc
from dlc_jax.distributed import one_device
from dlc_jax.masking import PathSpec, Thresholds, exact_thresholds, masked, prunable_paths
from dlc_jax.probes.kernel import Forward, losses_of_batches
from dlc_jax.probes.path import learning_path
from dlc_jax.types import Conventions


@pytest.fixture(scope="module")
def reference(sample_encoder, small_sample):
    return dlc.probe(
        sample_encoder,
        small_sample,
        image_size=64,
        num_probes=7,
        compute=dlc.Compute(batch_size=60),
    )


def released_procedure(
    timm, dataset: dlc.Dataset, num_probes: int, step: float = 0.02
) -> np.ndarray:
    """Losses [m, n] computed with torch and timm on the bundled weights, step after step."""
    import torch
    from safetensors.torch import load_file
    from torch.nn.utils import prune

    from dlc_jax.preprocess.images import load_images

    model = timm.create_model("resnet18", pretrained=False, num_classes=200)
    narrow(model)
    from importlib import resources

    weights = resources.files("dlc_jax.datasets") / "sample" / "model.safetensors"
    model.load_state_dict({k: v.float() for k, v in load_file(str(weights)).items()})
    model.eval()
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    pixels = load_images(dataset, 64).pixels / np.float32(255)
    images = torch.from_numpy(((pixels - mean) / std).transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(dataset.labels).long()
    convs = [(m, "weight") for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    losses = []
    for k in range(num_probes):
        if k:
            prune.global_unstructured(convs, prune.L1Unstructured, amount=step)
        with torch.no_grad():
            features = model.forward_features(images).mean((2, 3))
        if k == 0:
            prototypes = torch.stack([features[labels == j].mean(0) for j in range(15)])
        logits = 1 / torch.cdist(features, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    return torch.stack(losses).numpy()


@pytest.mark.parametrize(
    ("step", "num_probes"), [(0.02, 12), pytest.param(0.01, 80, marks=pytest.mark.slow)]
)
def test_official_losses_are_those_of_torch(timm, sample_encoder, small_sample, step, num_probes):
    theirs = released_procedure(timm, small_sample, num_probes, step)
    path = {"step": step, "num_probes": num_probes, "mode": "official"}
    ours = dlc.probe(sample_encoder, small_sample, image_size=64, **path)
    assert np.abs(ours.losses - theirs).max() <= 2e-6
    assert np.abs(theirs[0] - theirs[-1]).max() > 1e-4  # masks do change the losses


@pytest.mark.parametrize(
    "compute",
    [
        pytest.param(dlc.Compute(batch_size=7), marks=pytest.mark.slow),
        pytest.param(dlc.Compute(batch_size=1000), marks=pytest.mark.slow),
        dlc.Compute(chunk=3),
        pytest.param(dlc.Compute(chunk=7), marks=pytest.mark.slow),
        pytest.param(dlc.Compute(chunk=100), marks=pytest.mark.slow),
        pytest.param(dlc.Compute(chunk=4, batch_size=32), marks=pytest.mark.slow),
    ],
)
def test_batch_size_and_chunk_do_not_change_the_losses(
    sample_encoder, small_sample, reference, compute
):
    probes = dlc.probe(sample_encoder, small_sample, image_size=64, num_probes=7, compute=compute)
    assert probes.losses.shape == (7, 60)
    assert np.abs(probes.losses - reference.losses).max() <= 2e-6


def test_reruns_are_equal_to_the_bit(sample_encoder, small_sample, reference):
    again = dlc.probe(
        sample_encoder,
        small_sample,
        image_size=64,
        num_probes=7,
        compute=dlc.Compute(batch_size=60),
    )
    np.testing.assert_array_equal(again.losses, reference.losses)
    np.testing.assert_array_equal(again.prototypes, reference.prototypes)


def test_what_comes_back(reference, small_sample):
    np.testing.assert_allclose(reference.sparsity, 0.02 * np.arange(7), atol=1e-6)
    np.testing.assert_array_equal(reference.labels, small_sample.labels)
    np.testing.assert_array_equal(reference.ids, small_sample.ids)
    assert reference.losses.dtype == np.float32
    assert reference.prototypes.shape == (15, 128)
    assert np.all(np.abs(reference.losses - np.log(15)) < 0.5)


def test_features_are_what_prototypes_average(sample_encoder, small_sample, reference):
    features = dlc.features(sample_encoder, small_sample, image_size=64)
    means = [features[small_sample.labels == j].mean(0) for j in range(15)]
    np.testing.assert_allclose(reference.prototypes, means, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 8])
def test_each_program_is_traced_once(sample_encoder, sample, chunk):
    traces = []

    def apply(params, images):
        traces.append(images.shape)
        return sample_encoder.apply(params, images)

    counted = dataclasses.replace(sample_encoder, apply=apply)
    few = subset(sample, np.arange(0, 750, 5))
    dlc.probe(
        counted, few, image_size=32, num_probes=50, compute=dlc.Compute(batch_size=64, chunk=chunk)
    )
    # features, and all 50 probes over three batches, the last one short
    assert traces == [(64, 32, 32, 3)] * 2


def memory_of_program(encoder: dlc.Encoder, num_probes: int):
    prunable = prunable_paths(encoder.params, encoder.is_prunable)
    counts = PathSpec("linear", num_probes=num_probes).counts(694_736).chosen
    thresholds = exact_thresholds(encoder.params, prunable, None, counts)
    lowered = losses_of_batches.lower(
        Forward.of(encoder, "float32"),
        prunable,
        1,
        one_device(),
        encoder.params,
        None,
        jax.device_put(thresholds),
        jnp.zeros((15, 128)),
        jnp.zeros((1, 16, 64, 64, 3), jnp.uint8),
        jnp.zeros((1, 16), jnp.int32),
    )
    return lowered.compile().memory_analysis()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_probes(sample_encoder):
    few, many = (memory_of_program(sample_encoder, num) for num in (5, 50))
    # the thresholds (20 leaves), the losses and the nearest classes, a few bytes per probe each
    per_probe = 4 * (1 + 20) + 2 * 4 * 16
    assert many.temp_size_in_bytes - few.temp_size_in_bytes <= 45 * per_probe
    grown = many.argument_size_in_bytes + many.output_size_in_bytes
    grown -= few.argument_size_in_bytes + few.output_size_in_bytes
    assert grown <= 45 * per_probe + 4096
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(sample_encoder.params))
    assert 45 * per_probe < weights / 100


def test_chunk_keeps_within_its_limit_and_wastes_little():
    assert dlc.Compute().probes_per_call(50) == 1
    assert dlc.Compute(chunk=8).probes_per_call(50) == 5
    assert dlc.Compute(chunk=1).probes_per_call(50) == 1
    assert dlc.Compute(chunk=100).probes_per_call(7) == 7
    for most in range(1, 60):
        chunk = dlc.Compute(chunk=most).probes_per_call(47)
        assert chunk <= most
        assert -47 % chunk <= most / 2
    for bad in (0, -1, True, "many"):
        with pytest.raises(ValueError, match=r"probe\.chunk"):
            dlc.Compute(chunk=bad).check()


@pytest.mark.slow
def test_midpoint_probes_are_probes_of_the_grid(sample_encoder, small_sample):
    options = {"image_size": 32, "step": 0.05}
    grid = dlc.probe(sample_encoder, small_sample, num_probes=20, **options)
    few = dlc.probe(
        sample_encoder,
        small_sample,
        num_probes=4,
        **options,
        path=dlc.PathSpec(placement="midpoint"),
    )
    np.testing.assert_allclose(few.losses, grid.losses[[2, 7, 12, 17]], atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "geometric"])
def test_official_midpoint_probes_are_official_probes_of_the_grid(sample_encoder, schedule):
    """The weights are half precision: which of the equal ones go depends on every step before."""

    def masks(**more):
        spec = PathSpec(schedule=schedule, step=0.1, **more)
        path = learning_path(sample_encoder, spec, 0, Conventions.of("official"))
        params = sample_encoder.params
        return [
            jax.tree.map(
                np.asarray,
                masked(
                    params,
                    path.prunable,
                    path.importance,
                    Thresholds(*(p[k] for p in path.thresholds)),
                ),
            )
            for k in range(len(path))
        ]

    whole = 10 if schedule == "linear" else 50
    grid = masks(num_probes=whole)
    few = masks(num_probes=3, placement="midpoint")
    for j, found in enumerate(few):
        jax.tree.map(np.testing.assert_array_equal, found, grid[int((j + 0.5) * whole / 3)])


def test_random_masking_depends_on_the_seed(sample_encoder, small_sample):
    losses = [
        dlc.probe(
            sample_encoder, small_sample, image_size=64, num_probes=3, masking="random", seed=seed
        ).losses
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(losses[0], losses[1])
    np.testing.assert_allclose(losses[0][0], losses[2][0], atol=2e-6)  # unmasked
    assert np.abs(losses[0][2] - losses[2][2]).max() > 1e-5


@pytest.mark.slow
def test_bfloat16_ranks_nearly_the_same(sample_encoder, small_sample, reference):
    from scipy.stats import spearmanr

    half = dlc.probe(
        sample_encoder,
        small_sample,
        image_size=64,
        num_probes=7,
        compute=dlc.Compute(dtype="bfloat16"),
    )
    assert half.losses.dtype == np.float32
    assert np.abs(half.losses - reference.losses).max() > 0
    assert spearmanr(half.losses.mean(0), reference.losses.mean(0)).statistic > 0.99


@pytest.mark.slow
def test_augment_draws_fresh_crops_for_every_probe(sample_encoder, small_sample):
    path = dlc.PathSpec(num_probes=3, step=1e-6, augment=True)
    options = {"image_size": 64, "path": path}
    first = dlc.probe(sample_encoder, small_sample, **options)
    again = dlc.probe(sample_encoder, small_sample, **options, compute=dlc.Compute(batch_size=16))
    other = dlc.probe(sample_encoder, small_sample, seed=1, **options)
    np.testing.assert_allclose(first.losses, again.losses, atol=2e-6)
    # next to nothing is masked, so that the probes differ by their crops
    assert np.abs(first.losses[0] - first.losses[1]).mean() > 1e-3
    assert np.abs(first.losses - other.losses).mean() > 1e-3


class TinyNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(3, 8, rngs=rngs)
        self.out = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, images):
        return self.out(nnx.relu(self.hidden(images.mean((1, 2)))))


def test_own_networks_as_module_or_as_function():
    module = TinyNet(nnx.Rngs(0))
    images = random_images(30)
    dataset = dlc.array_dataset(images, np.arange(30) % 3)
    from_module = dlc.Encoder.from_module(module, lambda path: path.endswith("kernel"))
    assert (from_module.name, from_module.head, from_module.image_size) == ("custom", "mean", None)
    other = dlc.Encoder.from_module(
        module, lambda _: True, name="tiny", mean=(0.5,) * 3, head="cls"
    )
    assert (other.name, other.mean, other.head) == ("tiny", (0.5, 0.5, 0.5), "cls")

    def apply(params, x):
        hidden = jnp.maximum(x.mean((1, 2)) @ params["a"] + params["c"], 0)
        return hidden @ params["b"] + params["d"]

    params = {
        "a": module.hidden.kernel[...],
        "b": module.out.kernel[...],
        "c": module.hidden.bias[...],
        "d": module.out.bias[...],
    }
    from_function = dlc.Encoder(params, apply, lambda path: path in "ab")
    losses = [
        dlc.probe(encoder, dataset, image_size=32, step=0.1, num_probes=10).losses
        for encoder in (from_module, from_function)
    ]
    np.testing.assert_allclose(losses[0], losses[1], atol=2e-6)
    assert np.abs(losses[0][0] - losses[0][5]).max() > 1e-3


def test_official_mode_pools_vit_tokens_to_one_scalar():
    def tokens(params, images):
        patches = images.reshape(len(images), 4, -1, 3).mean(2)
        return patches @ params["kernel"]

    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)}
    encoder = dlc.Encoder(params, tokens, lambda path: True)
    dataset = dlc.array_dataset(random_images(8), [0, 1] * 4)
    for mode, size in (("default", 5), ("official", 1)):
        probes = dlc.probe(encoder, dataset, image_size=32, num_probes=2, mode=mode)
        assert probes.prototypes.shape == (2, size)
    chosen = dataclasses.replace(encoder, pooling="cls")
    probes = dlc.probe(chosen, dataset, image_size=32, num_probes=2, mode="official")
    assert probes.prototypes.shape == (2, 5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schedule": "cubic"}, "probe.schedule"),
        ({"masking": "l2"}, "probe.masking"),
        ({"compute": dlc.Compute(dtype="float16")}, "probe.dtype"),
        ({"mode": "offical"}, "Did you mean 'official'"),
        ({"compute": dlc.Compute(batch_size=0)}, "probe.batch_size"),
        ({"path": dlc.PathSpec(placement="ends")}, "probe.placement"),
        ({"path": dlc.PathSpec(agreement=0.0)}, "probe.agreement"),
        ({"path": dlc.PathSpec(schedule="cubic")}, "probe.schedule"),
        ({"image_size": 4}, "encoder.image_size"),
        ({"num_probes": 51}, "full sparsity"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_are_refused(sample_encoder, small_sample, changes, says):
    with pytest.raises(ValueError, match=says):
        dlc.probe(sample_encoder, small_sample, **{"image_size": 64, **changes})


def test_an_empty_class_is_named(sample_encoder, small_sample):
    without = subset(small_sample, np.flatnonzero(small_sample.labels != 3))
    with pytest.raises(ValueError, match=r"1 of 15 classes have no sample: 'electric_guitar'"):
        dlc.probe(sample_encoder, without, image_size=64)


def test_a_single_class_is_refused():
    dataset = dlc.array_dataset(random_images(4), [0] * 4)
    encoder = dlc.Encoder({"w": jnp.ones((3, 2))}, lambda p, x: x.mean((1, 2)), lambda path: True)
    with pytest.raises(ValueError, match="one class only"):
        dlc.probe(encoder, dataset, image_size=32)


@pytest.mark.parametrize("shape", [(1, 3), (3,), (2, 2, 2, 2, 3)])
def test_own_networks_of_the_wrong_output_are_refused(shape):
    dataset = dlc.array_dataset(random_images(6), [0, 1] * 3)
    encoder = dlc.Encoder({"w": jnp.ones(3)}, lambda p, x: jnp.ones(shape), lambda path: True)
    with pytest.raises(ValueError, match="apply gave an array of shape"):
        dlc.probe(encoder, dataset, image_size=32)
    pair = dataclasses.replace(encoder, apply=lambda p, x: (x, x))
    with pytest.raises(ValueError, match="apply gave a tuple"):
        dlc.probe(pair, dataset, image_size=32)


def test_image_size_a_vit_does_not_take(sample_encoder, small_sample):
    fixed = dataclasses.replace(sample_encoder, image_size=224)
    with pytest.raises(ValueError, match="224 px only, got 64"):
        dlc.probe(fixed, small_sample, image_size=64)


def test_losses_that_are_not_finite_name_sample_and_probe(small_sample):
    encoder = dlc.Encoder(
        {"w": jnp.ones((3, 2))},
        lambda params, images: jnp.log(images.mean((1, 2)) @ params["w"] - 100),
        lambda path: True,
    )
    with pytest.raises(ValueError, match=r"losses are not finite, first for sample bonsai/"):
        dlc.probe(encoder, small_sample, image_size=64, num_probes=2)
