"""Scoring in a stream: stopped runs go on to the same bits, and memory does not grow."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from conftest import encoded, random_images, subset

import dlc_jax as dlc
from dlc_jax.probes import images as probe_images

OPTIONS = {"image_size": 32, "num_probes": 3, "compute": dlc.Compute(batch_size=8)}


class Stopped(Exception):
    """In place of a kill."""


class Failing:
    """Images that stop the program after so many readings."""

    def __init__(self, images, num_readings: int):
        self.images, self.left = images, num_readings

    def __len__(self):
        return len(self.images)

    def __getitem__(self, position):
        self.left -= 1
        if self.left < 0:
            raise Stopped
        return self.images[position]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(probe_images, "_SHARD", 16)


def broken_sample(small_sample) -> dlc.Dataset:
    images = [small_sample[i].image for i in range(60)]
    images[5] = images[40] = b"broken"
    return dataclasses.replace(small_sample, images=images)


@pytest.mark.slow
@pytest.mark.parametrize("augment", [False, True])
def test_stopped_at_any_moment_it_ends_with_the_same_bits(
    sample_encoder, small_sample, tmp_path, augment
):
    dataset = broken_sample(small_sample)
    options = {**OPTIONS, "path": dlc.PathSpec(augment=augment)}
    undisturbed = dlc.probe(sample_encoder, dlc.Images(dataset, on_corrupt="skip"), **options)
    assert dataset.fingerprint
    # the generator decides where; a run begins with what the one before left
    for number, limit in enumerate(np.random.default_rng(0).integers(1, 120, 6)):
        folder = tmp_path / str(number)
        for num_readings in (int(limit), 30, 10_000):
            failing = dataclasses.replace(dataset, images=Failing(dataset.images, num_readings))
            failing.__dict__["fingerprint"] = dataset.fingerprint  # reading for it would count
            try:
                images = dlc.Images(failing, on_corrupt="skip")
                probes = dlc.probe(sample_encoder, images, **options, run=dlc.Run(folder=folder))
            except Stopped:
                continue
        for name in ("losses", "nearest", "prototypes", "ids", "labels", "sparsity"):
            np.testing.assert_array_equal(getattr(probes, name), getattr(undisturbed, name))
        assert probes.skipped == undisturbed.skipped


@pytest.mark.slow
def test_what_is_finished_is_not_read_again(sample_encoder, small_sample, tmp_path):
    dlc.probe(sample_encoder, small_sample, **OPTIONS, run=dlc.Run(folder=tmp_path))
    failing = dataclasses.replace(small_sample, images=Failing(small_sample.images, 0))
    failing.__dict__["fingerprint"] = small_sample.fingerprint
    again = dlc.probe(sample_encoder, failing, **OPTIONS, run=dlc.Run(folder=tmp_path))
    assert again.losses.shape == (3, 60)
    # other settings find nothing of theirs there
    with pytest.raises(Stopped):
        dlc.probe(
            sample_encoder, failing, **{**OPTIONS, "num_probes": 2}, run=dlc.Run(folder=tmp_path)
        )
    with pytest.raises(Stopped):
        dlc.probe(sample_encoder, failing, **OPTIONS, seed=1, run=dlc.Run(folder=tmp_path))


@pytest.mark.slow
def test_a_damaged_part_is_measured_again(sample_encoder, small_sample, tmp_path):
    first = dlc.probe(sample_encoder, small_sample, **OPTIONS, run=dlc.Run(folder=tmp_path))
    parts = sorted(tmp_path.rglob("*.npz"))
    assert [part.name for part in parts[:2]] == ["losses-000000.npz", "losses-000001.npz"]
    parts[1].write_bytes(parts[1].read_bytes()[:100])
    again = dlc.probe(sample_encoder, small_sample, **OPTIONS, run=dlc.Run(folder=tmp_path))
    np.testing.assert_array_equal(again.losses, first.losses)


def test_shards_and_skipped_samples_change_nothing(sample_encoder, small_sample, monkeypatch):
    dataset = broken_sample(small_sample)
    few = dlc.probe(sample_encoder, dlc.Images(dataset, on_corrupt="skip"), **OPTIONS)
    monkeypatch.setattr(probe_images, "_SHARD", 2048)
    one = dlc.probe(sample_encoder, dlc.Images(dataset, on_corrupt="skip"), **OPTIONS)
    np.testing.assert_array_equal(few.losses, one.losses)
    np.testing.assert_array_equal(few.nearest, one.nearest)
    good = np.setdiff1d(np.arange(60), [5, 40])
    alone = dlc.probe(sample_encoder, subset(small_sample, good), **OPTIONS)
    # a sample's place in its batch can move the last bits of its features on some CPUs
    np.testing.assert_allclose(few.prototypes, alone.prototypes, atol=2e-6)
    np.testing.assert_allclose(few.losses, alone.losses, atol=2e-6)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """Ten times the images would take 59 MiB more if they were kept."""
    images = [encoded(pixels, "JPEG") for pixels in random_images(50, 72)]
    for label in ("a", "b"):
        for number in range(2600):
            path = tmp_path / label / f"{number:04}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(images[number % 50])
    program = f"""
        import resource
        import numpy as np, jax.numpy as jnp
        import dlc_jax as dlc
        whole = dlc.load_dataset("folder:{tmp_path}")
        part = whole.subset(np.arange(0, len(whole), 10))
        encoder = dlc.Encoder({{"w": jnp.ones((3, 4)).at[1].set(2)}},
                              lambda p, x: x.mean((1, 2)) @ p["w"], lambda path: True)
        peaks = []
        for dataset in (part, part, whole):
            compute = dlc.Compute(batch_size=64)
            dlc.probe(encoder, dataset, image_size=64, num_probes=2, compute=compute)
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        print(*peaks)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )
    _, small, large = map(float, done.stdout.split())
    assert large - small < 25
    assert large < 1.1 * small
