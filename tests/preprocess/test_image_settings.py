"""`Images` and the other objects that settings are given in."""

import subprocess
import sys

import numpy as np
import pytest

import dlc_jax as dlc
from dlc_jax.types import as_tuple, overridden


def test_a_data_set_stands_for_images_with_defaults(small_sample):
    assert dlc.Images.of(small_sample) == dlc.Images(small_sample, None, "error", None)
    assert dlc.Images(small_sample).side == 224
    assert dlc.Images.of(small_sample, 32).size == 32
    cached = dlc.Images(small_sample, 64, "skip", dlc.ImageCache())
    assert dlc.Images.of(cached) is cached
    assert dlc.Images.of(cached, 32) == dlc.Images(small_sample, 32, "skip", dlc.ImageCache())


def test_what_is_not_given_stays():
    path = dlc.PathSpec(step=0.1, num_probes="auto")
    assert overridden(path, step=None, masking=None) is path
    assert overridden(path, step=0.2) == dlc.PathSpec(step=0.2, num_probes="auto")


def test_unknown_choices_are_refused(small_sample):
    with pytest.raises(ValueError, match=r"dataset\.on_corrupt: unknown value 'ignore'"):
        dlc.Images(small_sample, on_corrupt="ignore")
    with pytest.raises(ValueError, match=r"encoder\.image_size: must be >= 8, got 4"):
        dlc.Images(small_sample, 4)


@pytest.mark.parametrize("given", [0.5, (0.5,), [0.5], np.array([0.5]), np.float64(0.5)])
def test_one_number_or_an_array_is_a_tuple(given):
    assert as_tuple(given) == (0.5,)
    assert as_tuple("q_proj") == ("q_proj",)
    assert as_tuple(None) is None


def test_mistakes_of_kind_are_named():
    """In a process without the run-time checks of annotations."""
    script = """
import dlc_jax as dlc
dataset = dlc.load_dataset("demo:caltech15/train")
encoder = dlc.load_encoder("resnet18", "demo:resnet18")
for images, arguments, says in (
    ("folder:x", {}, "images: expected a Dataset, as from dlc.load_dataset(...), got 'folder:x'"),
    (dataset, dict(path="linear"), "path: expected dlc.PathSpec(...), got 'linear'"),
    (dataset, dict(compute={"chunk": 2}), "compute: expected dlc.Compute(...), got {'chunk': 2}"),
    (dataset, dict(run="runs/mine"), "run: expected dlc.Run(...), got 'runs/mine'"),
    (dataset, dict(path=dlc.Images(dataset)), "path: expected dlc.PathSpec(...), got Images("),
):
    try:
        dlc.probe(encoder, images, image_size=32, **arguments)
    except dlc.InputError as error:
        assert says in str(error), error
        assert len(str(error)) < 150, error
    else:
        raise AssertionError(says)
for make, says in (
    (lambda: dlc.Images("folder:x"), "dataset: expected a Dataset"),
    (lambda: dlc.Images(dataset, "64"), "encoder.image_size: expected an integer, got '64'"),
    (lambda: dlc.Images(dataset, cache="x"), "cache: expected dlc.ImageCache(...), got 'x'"),
    (lambda: dlc.Run(folder=5), "run.folder: expected a path or None, got 5"),
    (lambda: dlc.Run(mesh="all"), "run.mesh: expected what dlc.make_mesh(...) gives or None"),
    (dlc.LoraConfig(targets=None).check, "lora.targets: expected one or more different names"),
    (dlc.LoraConfig(targets="q_proj").check, None),
    (dlc.FinetuneConfig(milestones=(0.5, "a")).check, "'a'"),
    (dlc.LinearProbeConfig(milestones=0.5).check, None),
):
    try:
        make()
    except dlc.InputError as error:
        assert says is not None and says in str(error), error
    else:
        assert says is None, says
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
