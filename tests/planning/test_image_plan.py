"""The stage `plan` of images: what it says, refuses and leaves behind."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, random_images

import dlc_jax as dlc
from dlc_jax import expect
from dlc_jax.config import Config, default_config
from dlc_jax.planning import image_plan, machine, plan
from dlc_jax.planning.costs import Speeds
from dlc_jax.planning.image_plan import ImageCosts
from dlc_jax.planning.machine import Machine, MeshSize
from dlc_jax.planning.speed import decoding_speed, scoring_speed
from dlc_jax.stages.pipeline import run_plan

MIB, GIB = 1 << 20, 1 << 30


def configured(stages=("plan",), **settings) -> Config:
    """Returns a configuration of the sample; keys are `section.name` with a double underscore."""
    config = default_config()
    config.stages = stages
    config.dataset.train, config.dataset.test = "demo:caltech15/train", "demo:caltech15/test"
    config.encoder.weights, config.encoder.image_size = "demo:resnet18", 64
    for key, value in settings.items():
        section, name = key.split("__")
        config[section][name] = value
    return Config.of(config)


def told(config: Config, **changes: Any) -> str:
    config = dataclasses.replace(config, **changes)
    lines: list[str] = []
    run_plan(config, lines.append)
    return "\n".join(lines)


@pytest.fixture
def measured(monkeypatch):
    """Nothing is compiled: a device of 10 GFLOP/s."""
    monkeypatch.setattr(image_plan, "scoring_speed", lambda job: (1e10, "as told"))


def with_devices_of(monkeypatch, num_bytes: int) -> None:
    small = Machine("1 x small", 1, num_bytes)
    monkeypatch.setattr(plan, "this_machine", lambda num_devices: small)


def refused(config: Config) -> tuple[str, dict[str, str]]:
    """Returns the error, and the settings with values that it names."""
    with pytest.raises(expect.InputError, match="plan: does not fit") as error:
        told(config)
    return str(error.value), dict(re.findall(r"([a-z]+\.[a-z_]+)=([\w.]+)", str(error.value)))


def rows_of(text: str) -> dict[str, list[str]]:
    """Returns the cells of the table of work by what stands in the first two columns."""
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    return {f"{row[0]} {row[1]}": row[2:] for row in rows if len(row) == 6}


@pytest.mark.slow
def test_the_command(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "dlc_jax.main", "--config=configs/demo.py", "--config.stages=('plan',)"),
            "--config.plan_details=True",
            f"--workdir={tmp_path / 'run'}",
        ],
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "750 images of 15 classes" in done.stdout
    rows = rows_of(done.stdout)
    assert rows["score losses of 50 probes"][:2] == ["50", "37,500"]
    assert rows["score decode into the cache"][-1] == "750"
    assert "decoded: 750 x 64 x 64 x 3 = 9.22 MB, once for scoring" in done.stdout
    assert done.stdout.count("break-even: ") == 1
    assert "\n| 0.90 " in done.stdout
    assert "within a factor of 2" in done.stdout
    assert list(tmp_path.iterdir()) == []  # neither a work directory nor a cache


@pytest.mark.slow
def test_break_even_of_known_speeds(measured, monkeypatch):
    decoding = decoding_speed(dlc.load_dataset("demo:caltech15/train"), 64)
    decoding = decoding._replace(seconds=1e-3, crop_seconds=1e-3)
    monkeypatch.setattr("dlc_jax.tasks.images.decoding_speed", lambda *_: decoding)
    config = configured(("plan", "score"), selection__keep_fractions=(0.2,))
    text = told(config)
    encoder = dlc.load_encoder("resnet18", "demo:resnet18").for_mode("default")
    data = dlc.load_dataset("demo:caltech15/train")
    work = ImageCosts(config, encoder, data, MeshSize(1, 1, 1), 300, 1.0)
    pruning = 0.75 + 51 * 768 * work.forward_flops / 1e10
    saved = 600 * (work.training_flops / 1e10 + 1e-3)  # in an epoch
    epochs, runs = re.search(r"\| 0.20 .*\| ([\d.]+) +\| ([\d.]+) +\|", text).groups()
    assert float(epochs) == pytest.approx(pruning / saved, rel=0.01)
    assert float(runs) == pytest.approx(pruning / saved / 50, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "setting", "num_bytes"),
    [("score", "probe.batch_size", 30 * MIB), ("finetune", "finetune.batch_size", 60 * MIB)],
)
def test_what_does_not_fit_a_device_is_refused(measured, monkeypatch, stage, setting, num_bytes):
    with_devices_of(monkeypatch, num_bytes)
    error, settings = refused(configured(("plan", stage)))
    assert f"{stage} takes" in error
    assert "of a device of 1 x small, which has" in error
    value = int(settings[setting])
    key = setting.replace(".", "__")
    assert "does not fit" not in told(configured(("plan", stage), **{key: value}))
    refused(configured(("plan", stage), **{key: 2 * value}))  # no less than it takes


@pytest.mark.slow
def test_weights_that_fit_nowhere(measured, monkeypatch):
    with_devices_of(monkeypatch, MIB)
    error, settings = refused(configured(("plan", "score")))
    assert "no single setting helps" in error
    assert not settings


@pytest.mark.slow
def test_images_that_do_not_fit_a_host(measured, monkeypatch):
    monkeypatch.setattr(image_plan, "resident_bytes", lambda: 0)
    taken = sum(
        part.num_bytes for part in image_plan.finetuning_host(work_of(configured())).memory.parts
    )
    monkeypatch.setattr(plan, "host_memory", lambda: int((taken - 10 * MIB) / 0.9))
    error, settings = refused(configured(("plan", "finetune")))
    assert "finetune takes" in error
    value = float(settings["finetune.image_memory_gib"])
    assert 0 < value < 0.03
    told(configured(("plan", "finetune"), finetune__image_memory_gib=value))


def work_of(config: Config) -> ImageCosts:
    encoder = dlc.load_encoder("resnet18", "demo:resnet18").for_mode("default")
    data = dlc.load_dataset("demo:caltech15/train")
    pixels = decoding_speed(data, 64).pixels
    return ImageCosts(config, encoder, data, MeshSize(1, 1, 1), 300, pixels)


@pytest.mark.slow
def test_losses_that_do_not_fit_a_host(measured, monkeypatch):
    config = configured(("plan", "score"))
    monkeypatch.setattr(image_plan, "resident_bytes", lambda: 0)
    taken = sum(part.num_bytes for part in image_plan.scoring_host(work_of(config)).memory.parts)
    excess = (4 + 4 + 2) * 750 * 10  # loss, nearest class and check, of ten probes
    monkeypatch.setattr(plan, "host_memory", lambda: int((taken - excess) / 0.9) + 2)
    error, settings = refused(config)
    assert "score takes" in error
    assert settings["probe.num_probes"] == "40"


@pytest.mark.slow
def test_a_processors_memory_is_its_hosts(measured, monkeypatch):
    monkeypatch.setattr(image_plan, "resident_bytes", lambda: 0)
    for module in (machine, plan):
        monkeypatch.setattr(module, "host_memory", lambda: int(40 * MIB / 0.9))
    error, settings = refused(configured(("plan", "score")))
    assert error.count("score takes") == 1  # the stricter of both
    assert "of a process's host" in error
    value = int(settings["probe.batch_size"])
    assert "does not fit" not in told(configured(("plan", "score"), probe__batch_size=value))


def test_a_full_disk_is_refused(measured, monkeypatch):
    def full(*_):
        return image_plan.Disk(needed=10**9, free=10**8, is_there=False)

    monkeypatch.setattr(image_plan, "cache_disk", full)
    error, settings = refused(configured(("plan", "score")))
    assert "decoded images take 1 GB" in error
    assert settings["cache.max_gib"] == "0"
    assert "cache: not used" in told(
        configured(("plan", "score"), cache__max_gib=0.0), plan_details=True
    )


def test_a_cache_that_is_too_small_is_told(measured):
    text = told(configured(("plan", "score"), cache__max_gib=0.001), plan_details=True)
    assert "cache.max_gib=1 would keep 9.22 MB" in text
    assert "9.22 MB, twice for scoring" in text


@pytest.mark.slow
def test_devices_that_are_not_here(measured):
    text = told(configured(("plan", "score"), mesh__data=4))
    assert "mesh.data 4 x mesh.probe 1 x mesh.fsdp 1 = 4 devices" in text
    assert "1 are here" in text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dataset__train": "folder:nowhere"}, "no such folder"),
        ({"dataset__train": ""}, "dataset.train: missing"),
        ({"encoder__weights": "nowhere/nothing.safetensors"}, "nowhere/nothing.safetensors"),
        (
            {"encoder__image_size": 64, "encoder__name": "resnet50"},
            "names the architecture 'resnet18'",
        ),
    ],
)
def test_what_is_wrong_is_told_as_ever(measured, settings, said):
    with pytest.raises(expect.InputError, match=re.escape(said)):
        told(configured(**settings))


def test_unreadable_images_are_counted():
    images = [dlc.load_dataset("demo:caltech15/train")[i].image for i in range(4)] + [b"no image"]
    dataset = dlc.Dataset(images, np.array([0, 1, 0, 1, 0]), np.arange(5).astype(str), ("a", "b"))
    found = decoding_speed(dataset, 32)
    assert (found.num_read, found.num_unreadable) == (5, 1)
    assert found.num_bytes == np.mean([len(image) for image in images[:4]])
    with pytest.raises(expect.InputError, match="none of its 1 images is readable"):
        decoding_speed(dataset.subset(np.array([4])), 32)


def test_arrays_are_as_large_as_they_are():
    dataset = dlc.array_dataset(random_images(12, 40), np.arange(12) % 2)
    found = decoding_speed(dataset, 32)
    assert (found.pixels, found.num_bytes) == (1600, 4800)
    assert found.seconds > 0
    assert found.crop_seconds > 0


@pytest.mark.slow
def test_predicted_seconds_are_those_of_a_run(sample, sample_encoder):
    """Within a factor of three, of three tries: other work on the machine comes and goes."""
    config = configured(("plan", "score"), probe__num_probes=10, cache__max_gib=0.0)
    encoder = sample_encoder.for_mode("default")
    work = ImageCosts(config, encoder, sample, MeshSize(1, 1, 1), 0, 1.0)
    settings = {"num_probes": 10, "image_size": 64, "compute": dlc.Compute(batch_size=128)}
    dlc.probe(sample_encoder, sample, **settings)  # compiles
    ratios = []
    for _ in range(3):
        decoding = decoding_speed(sample, 64)
        speed, _ = scoring_speed(work.scoring())
        speeds = Speeds.of(work.mesh, speed, decoding.seconds, decoding.crop_seconds)
        predicted = sum(map(speeds.seconds, work.costs()))
        start = time.perf_counter()
        dlc.probe(sample_encoder, sample, **settings)
        ratios.append((time.perf_counter() - start) / predicted)
        if 1 / 3 < ratios[-1] < 3:
            return
    pytest.fail(f"took {ratios} times as long as predicted")
