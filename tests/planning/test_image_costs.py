"""Passes, operations and decoded images of a run, exactly."""

import dataclasses

import numpy as np
import pytest
from conftest import random_images

import dlc_jax as dlc
from dlc_jax.config import Config, default_config
from dlc_jax.planning.costs import num_kept
from dlc_jax.planning.image_plan import ImageCosts, cache_disk, finetuning_host, scoring_host
from dlc_jax.planning.machine import MeshSize
from dlc_jax.preprocess.cache import ImageCache

N, M, SIZE = 90, 6, 32
ONE = MeshSize(1, 1, 1)


@pytest.fixture(scope="module")
def dataset():
    return dlc.array_dataset(random_images(N, 40), np.arange(N) % 3)


def configured(**settings) -> Config:
    """Returns a configuration; keys are `section.name` with a double underscore."""
    config = default_config()
    config.stages = ("plan",)
    config.dataset.train = "made in the test"
    config.encoder.weights, config.encoder.image_size = "demo:resnet18", SIZE
    config.probe.num_probes, config.probe.batch_size = M, 16
    config.selection.keep_fractions = (0.1, 0.5)
    config.finetune.epochs, config.finetune.batch_size = 4, 32
    for key, value in settings.items():
        section, name = key.split("__")
        config[section][name] = value
    return Config.of(config)


@pytest.fixture
def made(dataset, sample_encoder):
    def make(mesh=ONE, num_test=30, **settings) -> ImageCosts:
        encoder = sample_encoder.for_mode("default")
        return ImageCosts(configured(**settings), encoder, dataset, mesh, num_test, 1600.0)

    return make


def by_name(work):
    return {cost.name: cost for cost in work.costs()}


def test_scoring_with_the_cache(made):
    work = made()
    costs, flops = by_name(work), work.forward_flops
    assert costs["decode into the cache"].decodes == N
    assert costs["prototypes"][2:] == (1, N, N * flops, 6 * 16 * flops, 0, 0, False)
    assert costs[f"losses of {M} probes"][2:] == (
        M,
        M * N,
        M * N * flops,
        M * 96 * flops,
        0,
        0,
        False,
    )
    assert sum(cost.decodes for cost in work.costs() if cost.stage == "score") == N


def test_a_record_is_planned_at_the_size_of_the_images(dataset, sample_encoder):
    """An encoder may take images of one size alone."""
    encoder = dataclasses.replace(sample_encoder.for_mode("default"), image_size=SIZE)
    config = configured(selection__methods=("el2n",), selection__splits=(0.5,))
    work = ImageCosts(config, encoder, dataset, ONE, 30, 1600.0)
    assert "training record" in by_name(work)


def test_scoring_without_the_cache(made):
    work = made(cache__max_gib=0.0)
    costs = by_name(work)
    assert "decode into the cache" not in costs
    assert costs["prototypes"].decodes == costs[f"losses of {M} probes"].decodes == N


def test_crops_that_every_probe_sees(made):
    costs = by_name(made(probe__augment=True))
    assert (costs["prototypes"].decodes, costs["prototypes"].crops) == (N, N)
    assert costs[f"losses of {M} probes"].crops == M * N


def test_devices_share_samples_and_probes(made):
    flops = made().forward_flops
    over = by_name(made(MeshSize(2, 1, 1)))  # six batches
    assert over["prototypes"].device_flops == 3 * 16 * flops
    over = by_name(made(MeshSize(2, 2, 1)))
    assert over[f"losses of {M} probes"].device_flops == 3 * 16 * 3 * flops
    # probes that do not divide are repeated
    over = by_name(made(MeshSize(1, 4, 1)))
    assert over[f"losses of {M} probes"].device_flops == 96 * 2 * flops
    assert over[f"losses of {M} probes"].flops == M * N * flops


def test_the_sweep(made):
    work = made()
    costs = by_name(work)
    runs = costs["fine-tuning, 3 runs"]  # everything, a tenth and a half, by classes of 30
    assert runs.passes == 3 * 4
    assert runs.num_samples == 4 * (90 + 9 + 45) == runs.crops
    assert runs.flops == runs.num_samples * work.training_flops
    assert runs.device_flops == 4 * (3 + 1 + 2) * 32 * work.training_flops
    assert runs.decodes == N
    tests = costs["tests, 30 images"]
    assert (tests.num_samples, tests.decodes) == (3 * 30, 30)
    assert 2.7 < work.training_flops / work.forward_flops < 3.1


def test_images_that_are_not_kept_are_decoded_in_every_epoch(made):
    everything = N * 1600 * 4
    half = made(finetune__image_memory_gib=everything / 2 / 2**30)
    seen = 4 * (90 + 9 + 45)
    assert by_name(half)["fine-tuning, 3 runs"].decodes == N // 2 + seen // 2
    assert made(finetune__augment=False).costs()[-2].decodes == N


def test_what_methods_go_by(made):
    assert "features" not in by_name(made())
    costs = by_name(made(selection__methods=("herding",)))
    assert costs["features"].num_samples == N
    work = made(selection__methods=("entropy",))
    costs = by_name(work)
    record = costs["training record"]  # four epochs, and one in two more runs
    assert (record.passes, record.num_samples) == (6, 6 * N)
    assert record.flops == 6 * N * work.training_flops
    assert costs["outputs for the record"].passes == 4


def test_trials_of_tuning(made):
    settings = {"selection__methods": ("auto",), "tuning__by": "finetune"}
    work = made(tuning__methods=("easiest",), tuning__num_repeats=5, **settings)
    config = dataclasses.replace(work.config, stages=("plan", "score"))
    trials = by_name(dataclasses.replace(work, config=config))["trials of tuning"]
    kept = (
        72 + 2 * 7 + 2 * 36
    )  # of four fifths: all; a tenth and a half of them, random and easiest
    assert trials.num_samples == 5 * 4 * kept


def test_only_what_is_asked_for(made):
    work = made()
    config = dataclasses.replace(work.config, stages=("plan", "score", "select"))
    assert {t.stage for t in dataclasses.replace(work, config=config).costs()} == {"score"}


def test_memory_of_hosts(made):
    parts = {part.name: part.num_bytes for part in scoring_host(made()).memory.parts}
    assert parts[f"losses and nearest classes [{M}, {N}]"] == 10 * M * N
    work = made()
    assert parts["ids and labels"] == work.dataset.ids.nbytes + 4 * N
    parts = {part.name: part.num_bytes for part in finetuning_host(work).memory.parts}
    assert parts["decoded images kept (finetune.image_memory_gib)"] == N * 1600 * 4
    assert "test images" not in parts  # mapped
    parts = {p.name: p.num_bytes for p in finetuning_host(made(cache__max_gib=0.0)).memory.parts}
    assert parts["test images"] == 30 * SIZE * SIZE * 3


def test_the_caches_disk(tmp_path):
    cache = ImageCache(folder=str(tmp_path / "not" / "there"))
    disk = cache_disk(cache, N, SIZE)
    assert disk.needed == N * SIZE * SIZE * 3
    assert disk.free > 0
    assert not disk.is_there
    assert not (tmp_path / "not").exists()


def test_kept_numbers_are_those_of_selections():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 200)
    scores = rng.normal(size=200)
    counts = np.bincount(labels)
    for keep_fraction in (0.1, 0.25, 0.5):
        kept = dlc.select(scores, labels, method="easiest", keep_fraction=keep_fraction, seed=0)
        assert num_kept(counts, keep_fraction) == len(kept.indices)
    assert num_kept(np.array([1, 10]), 0.1) == 2  # a class of one keeps it
    assert num_kept(np.array([3, 10]), 0.1, least=5) == 8
