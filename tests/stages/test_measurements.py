"""Inputs of selectors: measured by the stage `score`, read by the stage `select`."""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_images
from safetensors.numpy import load_file, save_file

import dlc_jax as dlc
import dlc_jax.datasets
from dlc_jax import expect
from dlc_jax.config import KINDS, Config
from dlc_jax.selection import INPUTS, SELECTORS, Candidates
from dlc_jax.selection.geometry import k_center_greedy
from dlc_jax.selection.settings import Input, Method
from dlc_jax.stages import pipeline
from dlc_jax.tasks.images import MEASURED, Measurement
from dlc_jax.tasks.measurements import read_input
from dlc_jax.workspace import artefacts, records


def settings_of_few_images(folder: Path) -> dict[str, Any]:
    """Writes 24 images of two classes; returns settings under which two probes score them."""
    np.savez(folder / "x.npz", images=random_images(24, 40), labels=np.arange(24) % 2)
    return {
        "dataset": {"train": f"npz:{folder}/x.npz"},
        "encoder": {"name": "resnet18", "weights": "demo:resnet18", "image_size": 32},
        "probe": {"num_probes": 2},
    }


def test_each_input_can_be_measured_or_read_and_its_record_has_a_name_of_its_own():
    of = {name: some.of for name, some in INPUTS.items()}
    assert MEASURED.keys() == {name for name in of if of[name] == "encoder"}
    assert {name for name in of if of[name] == "training"} <= {*dir(dlc.TrainingRecord)}
    assert not INPUTS.keys() & {*KINDS["images"].stages, "table", "training", "ids"}


@pytest.fixture
def brightness(monkeypatch):
    """An input that the package does not have, and a selector that needs it."""
    measured = []

    def measure(scored, run):
        measured.append(len(scored.dataset))
        return np.arange(len(scored.dataset), dtype=np.float32)[:, None] ** 2

    check = functools.partial(expect.features_fit_labels, "mean_light")
    monkeypatch.setitem(INPUTS, "mean_light", Input(check, "a call"))
    monkeypatch.setitem(SELECTORS, "most_different", Method(k_center_greedy, needs=("mean_light",)))
    monkeypatch.setitem(MEASURED, "mean_light", Measurement(measure, ("dtype", "step")))
    return measured


@pytest.mark.slow
def test_a_new_input_is_measured_recorded_and_selected_by(brightness, tmp_path):
    values = settings_of_few_images(tmp_path)
    values["selection"] = {"methods": ("most_different",), "keep_fractions": (0.25,)}
    said: list[str] = []

    def run(**changes) -> None:
        said.clear()
        pipeline.run(Config.of({**values, **changes}), tmp_path / "run", said.append)

    run(stages=("plan",))
    assert re.search(r"\| score +\| mean_light ", "\n".join(said))
    run()
    root = tmp_path / "run"
    (path,) = (root / "selections/most_different").glob("*.npy")
    held = np.load(root / "scores/mean_light.npz")
    labels = np.load(root / "scores/losses.npz")["labels"]
    arrays = {"mean_light": held["mean_light"]}
    candidates = Candidates(None, labels, ids=held["ids"], inputs=arrays)
    cell = {"keep_fraction": 0.25, "seed": 0}
    kept = candidates.select(method="most_different", **cell)
    np.testing.assert_array_equal(np.load(path), kept.indices)
    as_features = Candidates(None, labels, ids=held["ids"], features=held["mean_light"])
    by_features = as_features.select(method="k_center_greedy", **cell)
    np.testing.assert_array_equal(kept.indices, by_features.indices)
    assert records.read(root, "mean_light").kind == "mean light"
    run()
    assert "mean_light: unchanged, not measured again" in said
    assert brightness == [24]
    run(probe={"num_probes": 2, "step": 0.03})  # a setting that decides it
    assert brightness == [24, 24]
    assert records.read(root, "mean_light").key["step"] == 0.03
    (root / "scores/mean_light.npz").unlink()
    with pytest.raises(dlc.InputError, match=r"mean_light\.npz is missing; run the stage 'score'"):
        read_input(root, "mean_light", artefacts.read_scores(root))


def test_inputs_that_are_missing_or_unknown_are_named(brightness):
    labels = np.arange(6) % 2
    with pytest.raises(dlc.InputError, match=r"^mean_light: method 'most_different' needs them"):
        dlc.select(None, labels, method="most_different", keep_fraction=0.5)
    with pytest.raises(dlc.InputError, match=r"^inputs: unknown value 'bright'; .*mean_light"):
        Candidates(None, labels, inputs={"bright": np.zeros((6, 1))})
    features = np.zeros((6, 1))
    with pytest.raises(dlc.InputError, match=r"^inputs: 'features' is given twice"):
        Candidates(None, labels, features=features, inputs={"features": features})


def test_images_like_a_target_are_kept(tmp_path):
    """By the encoder's features of both; other targets are measured, and not mixed up."""
    values = settings_of_few_images(tmp_path)
    np.savez(tmp_path / "y.npz", images=random_images(3, 40, seed=7), labels=np.arange(3) % 2)
    target = f"npz:{tmp_path}/y.npz"
    values["selection"] = {
        "methods": ("rds", "random"),
        "keep_fractions": (0.25,),
        "target": target,
        "max_similarity": 0.9999,
    }
    pipeline.run(Config.of(values), tmp_path / "run", lambda line: None)
    encoder = dlc.load_encoder("resnet18", "demo:resnet18")
    sources = (values["dataset"]["train"], target)
    features = [dlc.features(encoder, dlc.load_dataset(s), image_size=32) for s in sources]
    root = tmp_path / "run"
    found = np.load(root / "scores/similarities.npz")["similarities"]
    np.testing.assert_allclose(found, dlc.similarities(*features), atol=1e-6)
    ids = np.load(root / "scores/losses.npz")["ids"]
    inputs = {"similarities": found, "features": features[0]}
    candidates = Candidates(None, np.arange(24) % 2, ids=ids, inputs=inputs)
    rules = dlc.Rules(max_similarity=0.9999)
    kept = candidates.select(method="rds", keep_fraction=0.25, rules=rules)
    (path,) = (root / "selections/rds").glob("*.npy")
    np.testing.assert_array_equal(np.load(path), kept.indices)
    key = records.read(root, "similarities").key
    assert key["target_fingerprint"] == dlc.load_dataset(target).fingerprint


@pytest.mark.slow
def test_a_second_encoder_is_asked_too(tmp_path, monkeypatch):
    """By the features of both; with another one they are measured again."""
    values = settings_of_few_images(tmp_path)
    path = tmp_path / "other.safetensors"
    sample = Path(dlc_jax.datasets.__file__).parent / "sample"
    weights = load_file(sample / "model.safetensors")
    generator = np.random.default_rng(0)
    scaled = {
        name: np.asarray(generator.uniform(0.5, 1.5) * w, "f4") for name, w in weights.items()
    }
    save_file(scaled, path)
    values["selection"] = {"methods": ("ram_apl",), "keep_fractions": (0.25,)}
    root, alone = tmp_path / "run", tmp_path / "alone"
    for second, workdir in (
        (None, alone),
        (f"resnet18={path}", root),
        ("resnet18=demo:resnet18", root),
    ):
        values["selection"]["second_encoder"] = second
        pipeline.run(Config.of(values), workdir, lambda line: None)
        (kept,) = (workdir / "selections/ram_apl").glob("*.npy")
        found = dict(np.load(workdir / "scores/features.npz"))
        labels = np.load(workdir / "scores/losses.npz")["labels"]
        inputs = {"features": found["features"]}
        if second is not None:
            data = dlc.load_dataset(values["dataset"]["train"])
            encoder = dlc.load_encoder(*second.split("="))
            inputs["second_features"] = dlc.features(encoder, data, image_size=32)
            measured = np.load(workdir / "scores/second_features.npz")["second_features"]
            np.testing.assert_allclose(measured, inputs["second_features"], rtol=1e-5, atol=1e-6)
        candidates = Candidates(None, labels, ids=found["ids"], inputs=inputs)
        expected = candidates.select(method="ram_apl", keep_fraction=0.25)
        np.testing.assert_array_equal(np.load(kept), expected.indices)
    values["selection"]["second_encoder"] = f"resnet18={path}"
    with pytest.raises(dlc.InputError, match="second_features are those of second_encoder resnet"):
        pipeline.run(Config.of(values | {"stages": ("select",)}), root, lambda line: None)
    values["selection"]["methods"] = ("herding",)
    with pytest.raises(dlc.InputError, match="second_encoder: is what method 'ram_apl' asks too"):
        Config.of(values)
