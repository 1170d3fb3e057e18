"""Encoders as files: the same values, no torch, refusals."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_files import stored
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import dlc_jax as dlc
from dlc_jax.encoders import converted
from dlc_jax.encoders.bundle import bundle_at
from dlc_jax.planning.image_memory import forward_flops
from dlc_jax.probes.kernel import cast

SIZE, BATCH = 16, 4


def small(**changes):
    """Returns a converted network with batch norm, as a timm module would be."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 6, 2), nn.Flatten()
    )
    module[1].running_mean.uniform_(-0.5, 0.5)

    def run(module, images):
        return module(images)

    size = SIZE
    built = converted.Built(module, run, run, size, False, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3), "x")
    encoder = converted.converted_encoder("timm:small", built)
    return dataclasses.replace(encoder, **changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "small.safetensors"
    dlc.save_encoder(small(), path, batch_size=BATCH)
    return path


@pytest.fixture
def bundle(saved, tmp_path):
    return Path(shutil.copy(saved, tmp_path))


def images_of(num, size=SIZE, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(num, size, size, 3)), jnp.float32)


@pytest.mark.parametrize("num", [1, BATCH, 2 * BATCH + 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_images_gives_the_same_features(bundle, num, dtype):
    encoder, loaded = small(), dlc.load_encoder(None, bundle)
    images = images_of(num).astype(dtype)
    for role in ("apply", "apply_head"):
        expected, found = (
            np.asarray(jax.jit(getattr(one, role))(cast(one.params, dtype), images), np.float32)
            for one in (encoder, loaded)
        )
        assert found.shape == (num, 54)
        np.testing.assert_allclose(found, expected, atol=1e-6 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("num", [3, BATCH])
def test_training_is_that_of_the_encoder(bundle, num):
    """Features, statistics over the real images, and gradients."""
    encoder, loaded = small(), dlc.load_encoder(None, bundle)
    images, real = images_of(num), jnp.ones(num).at[0].set(0)

    def loss(params, one):
        features, moved = one.apply_training(params, images, real)
        return (features**3 * real[:, None]).sum(), moved

    gradient = jax.value_and_grad(loss, has_aux=True, allow_int=True)
    (expected, moved), gradients = gradient(encoder.params, encoder)
    (found, own_moved), own_gradients = gradient(loaded.params, loaded)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for name in ("1.running_mean", "1.running_var"):
        assert abs(moved[name] - encoder.params[name]).max() > 1e-3
        np.testing.assert_allclose(own_moved[name], moved[name], rtol=1e-6, atol=1e-6)
    for name in ("0.weight", "1.bias", "3.weight"):
        size = np.linalg.norm(gradients[name])
        assert size > 1e-3
        assert np.linalg.norm(own_gradients[name] - gradients[name]) < 1e-5 * size


def test_what_an_encoder_holds_is_kept(bundle):
    encoder, loaded = small(), dlc.load_encoder(None, bundle)
    for field in (
        "name",
        "mean",
        "std",
        "normalisation",
        "pooling",
        "head",
        "image_size",
        "prefix",
    ):
        assert getattr(loaded, field) == getattr(encoder, field), field
    assert loaded.statistics == encoder.statistics
    assert [path for path in loaded.params if loaded.is_prunable(path)] == ["0.weight", "3.weight"]
    assert str(loaded.transform) == "resize 18, centre crop 16"
    for name, value in encoder.params.items():
        assert loaded.params[name].dtype == value.dtype
        np.testing.assert_array_equal(loaded.params[name], value)
    assert loaded.fingerprint != encoder.fingerprint
    for name in ("timm:small", "timm:small.a_tag"):
        assert loaded.fingerprint == dlc.load_encoder(name, bundle).fingerprint


def test_the_same_encoder_gives_the_same_file_without_paths(bundle, tmp_path):
    dlc.save_encoder(small(), tmp_path / "again" / "small.safetensors", batch_size=BATCH)
    again = (tmp_path / "again" / "small.safetensors").read_bytes()
    assert bundle.read_bytes() == again
    assert b"test_bundle" not in again


def test_other_normalisation_and_preparation(bundle):
    loaded = dlc.load_encoder(None, bundle, mean=(0.1,) * 3, std=(1.0,) * 3, transform="paper")
    assert (loaded.mean, loaded.normalisation) == ((0.1,) * 3, "explicit")
    assert loaded.transform == dlc.Transform(size=SIZE, scaled=18)
    assert dlc.load_encoder(None, bundle, pooling="own").pooling == "own"


def test_a_preparation_that_was_asked_for_stays_so(tmp_path):
    path = tmp_path / "small.safetensors"
    asked = dlc.Transform(size=SIZE, scaled=18, interpolation="bicubic")
    dlc.save_encoder(small(transform=asked), path, batch_size=1)
    with pytest.raises(dlc.InputError, match="mode 'official' prepares images as the paper does"):
        dlc.load_encoder(None, path).for_mode("official")
    assert dlc.load_encoder(None, path, transform="paper").for_mode("official")


def test_the_preparation_of_a_checkpoint_may_be_like_the_papers(tmp_path):
    path = tmp_path / "small.safetensors"
    own = dlc.Transform(size=SIZE, scaled=18, crop_fraction=0.875, is_asked_for=False)
    dlc.save_encoder(small(transform=own), path, batch_size=1)
    assert dlc.load_encoder(None, path, transform="model").transform == own


def probed(encoder):
    dataset = dlc.load_dataset("demo:caltech15/train").subset(np.arange(0, 750, 25))
    return dlc.probe(encoder, dataset, image_size=SIZE, num_probes=3)


def test_losses_are_those_of_the_encoder(bundle):
    found, expected = probed(dlc.load_encoder(None, bundle)), probed(small())
    np.testing.assert_allclose(found.losses, expected.losses, rtol=2e-6, atol=1e-7)


def test_probes_run_one_after_another_in_batches_of_the_bundle(bundle):
    compute = dlc.Compute(chunk=3).for_encoder(dlc.load_encoder(None, bundle))
    assert (compute.chunk, compute.batch_size) == (1, BATCH)
    assert dlc.Compute(batch_size=9).for_encoder(dlc.load_encoder(None, bundle)).batch_size == 9
    assert dlc.Compute(chunk=3).for_encoder(small()) == dlc.Compute(chunk=3)


def test_fine_tuning_is_that_of_the_encoder(bundle):
    dataset = dlc.load_dataset("demo:caltech15/train").subset(np.arange(0, 750, 50))
    settings = dlc.FinetuneConfig(epochs=2, batch_size=BATCH, learning_rate=0.05)
    results = [
        dlc.finetune(one, dlc.Images(dataset, size=SIZE), settings=settings)
        for one in (small(), dlc.load_encoder(None, bundle))
    ]
    losses = [[epoch["train_loss"] for epoch in result.history] for result in results]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_operations_are_counted(bundle):
    loaded = forward_flops(dlc.load_encoder(None, bundle), SIZE)
    expected = BATCH * forward_flops(small(), SIZE)  # a whole batch
    assert expected <= loaded < 3 * expected  # averages and tanh count too


def test_a_bundle_that_gives_something_else_is_not_written(bundle):
    traces, before, encoder = iter(range(100)), bundle.read_bytes(), small()

    def changing(params, images):  # another one whenever it is traced
        return encoder.apply(params, images) * (1 + 1e-3 * next(traces))

    what = r"encoder timm:small: in float32, apply of the bundle is \d.*; expected at most 1e-05"
    with pytest.raises(dlc.InputError, match=what):
        dlc.save_encoder(small(apply=changing), bundle, batch_size=BATCH)
    assert bundle.read_bytes() == before
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_what_cannot_be_saved(tmp_path, bundle):
    encoder = small()
    path = tmp_path / "other.safetensors"
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        dlc.save_encoder(encoder, tmp_path / "small.bin")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"folder\.safetensors' is a folder; expected a file"):
        dlc.save_encoder(encoder, tmp_path / "folder.safetensors")
    with pytest.raises(ValueError, match="lies below something that is no folder"):
        dlc.save_encoder(encoder, bundle / "under.safetensors")
    with pytest.raises(ValueError, match="takes images of 16 px only"):
        dlc.save_encoder(encoder, path, image_size=32)
    with pytest.raises(ValueError, match="batch_size: must be >= 1"):
        dlc.save_encoder(encoder, path, batch_size=0)
    with pytest.raises(ValueError, match="a bundle already"):
        dlc.save_encoder(dlc.load_encoder(None, bundle), path)
    with pytest.raises(ValueError, match="has drop_path 0.1 and dropout 0.0, and a bundle trains"):
        dlc.save_encoder(small(drop_path=0.1), path)
    by_hand = dlc.load_encoder("resnet18", "demo:resnet18")
    with pytest.raises(ValueError, match="encoder resnet18: needs no torch; expected one of timm:"):
        dlc.save_encoder(by_hand, path)

    def calls_back(params, images):
        shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
        return jax.pure_callback(lambda x: x, shape, images)

    with pytest.raises(ValueError, match="encoder timm:small: cannot be exported for cpu, cuda"):
        dlc.save_encoder(small(apply=calls_back), path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"name": "resnet18"},
            r"encoder\.name: .*small\.safetensors is a bundle .* with 'timm:small'",
        ),
        ({"image_size": 32}, r"encoder\.image_size: .* was saved with 16, got 32"),
        ({"prunable": "layer*"}, r"encoder\.prunable: .* with None, got 'layer\*'"),
        ({"dropout": 0.5}, r"encoder\.dropout: .* was saved with 0\.0, got 0\.5; .* checkpoint"),
        ({"transform": "model"}, r"encoder\.transform: 'model', and .* as in the paper"),
        ({"pooling": "cls"}, r"encoder\.pooling of timm:small"),
    ],
)
def test_what_was_decided_when_it_was_saved_stays(bundle, given, says):
    with pytest.raises(dlc.InputError, match=says):
        dlc.load_encoder(**{"name": None, "weights": bundle, **given})


def test_images_and_batches_that_it_does_not_take(bundle):
    loaded = dlc.load_encoder(None, bundle)
    with pytest.raises(ValueError, match=r"expected encoder\.image_size=16, or another bundle"):
        loaded.check_image_size(32)
    with pytest.raises(ValueError, match=r"trains on 4 images at a time, got 5; expected finetune"):
        loaded.apply_training(loaded.params, images_of(5), jnp.ones(5))
    with pytest.raises(ValueError, match="computes in float32 or bfloat16, got images in float16"):
        loaded.apply(loaded.params, images_of(1).astype(jnp.float16))


def rewritten(path, change):
    """Changes metadata and tensors of a bundle."""
    with safe_open(path, framework="numpy") as file:
        metadata = json.loads(file.metadata()["dlc_jax.encoder"])
    tensors = load_file(path)
    change(metadata, tensors)
    save_file(tensors, path, metadata={"dlc_jax.encoder": json.dumps(metadata)})


def damaged(metadata, tensors):
    name = next(name for name in tensors if name.startswith("program:"))
    tensors[name] = tensors[name][:100]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda metadata, _: metadata.update(version=2), "version 2, expected 1; write it again"),
        (lambda metadata, _: metadata.pop("mean"), "mean is missing"),
        (lambda metadata, _: metadata.update(head=3), "head is 3, expected text"),
        (lambda metadata, _: metadata["transform"].update(speed=1), "transform: TypeError"),
        (damaged, r"jax .* cannot read its programs, which jax .* wrote"),
    ],
)
def test_damaged_bundles_are_refused(bundle, change, says):
    rewritten(bundle, change)
    with pytest.raises(dlc.InputError, match=rf"small\.safetensors: .*{says}"):
        dlc.load_encoder(None, bundle)


def test_a_backend_that_it_is_not_for(bundle, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(dlc.InputError, match="for cpu and cuda, and JAX runs on tpu here"):
        dlc.load_encoder(None, bundle)


def test_other_weights_are_no_bundles(tmp_path, bundle):
    assert bundle_at("") is bundle_at("demo:resnet18") is bundle_at(str(tmp_path)) is None
    assert bundle_at(str(bundle)) == bundle
    bundle.rename(tmp_path / "model.safetensors")
    assert bundle_at(str(tmp_path)) == tmp_path / "model.safetensors"


WITHOUT_TORCH = """
import json, sys

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchax", "torchvision", "timm", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Lacking())
import numpy as np
import dlc_jax as dlc

dataset = dlc.load_dataset("demo:caltech15/train").subset(np.arange(0, 750, 5))
encoder = dlc.load_encoder(None, sys.argv[1])
probes = dlc.probe(encoder, dataset, image_size=32, num_probes=3)
kept = dlc.select(dlc.score(probes), probes.labels, keep_fraction=0.5, ids=probes.ids)
np.savez(sys.argv[2], losses=probes.losses, ids=kept.ids)
"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("timm:vit_small_patch16_224", marks=pytest.mark.slow),
        pytest.param("demo:efficientnet_lite0", marks=pytest.mark.long),
    ],
)
def test_a_process_without_torch_gives_the_same_losses_and_kept_set(timm, tmp_path, name):
    """A converted network, by the file alone.

    Random weights of a convolutional network would not do: images have nearly the same features
    then, and inverse distances magnify what is rounded.
    """
    if name.startswith("timm:"):
        tokens = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
        stored(tmp_path, timm, name.removeprefix("timm:"), tokens)
        encoder = dlc.load_encoder(name, tmp_path, image_size=32)
    else:
        encoder = dlc.load_encoder(None, name)
    path, found = tmp_path / "bundle.safetensors", tmp_path / "found.npz"
    dlc.save_encoder(encoder, path, image_size=32, batch_size=16)
    command = [sys.executable, "-c", WITHOUT_TORCH, str(path), str(found)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    dataset = dlc.load_dataset("demo:caltech15/train").subset(np.arange(0, 750, 5))
    probes = dlc.probe(encoder, dataset, image_size=32, num_probes=3)
    kept = dlc.select(dlc.score(probes), probes.labels, keep_fraction=0.5, ids=probes.ids)
    with np.load(found) as arrays:
        np.testing.assert_allclose(arrays["losses"], probes.losses, rtol=2e-6, atol=2e-6)
        assert arrays["ids"].tolist() == kept.ids.tolist()
