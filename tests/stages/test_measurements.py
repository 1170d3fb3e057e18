"""Inputs of selectors: measured by the stage `score`, read by the stage `select`."""

import functools
import re

import numpy as np
import pytest

import dlc_jax as dlc
from dlc_jax import checks
from dlc_jax.config import STAGES, Config
from dlc_jax.selection import INPUTS, SELECTORS, Candidates
from dlc_jax.selection.geometry import k_center_greedy
from dlc_jax.selection.methods import Input, Method
from dlc_jax.stages import pipeline
from dlc_jax.stages.measurements import MEASURED, Measurement, read_input
from dlc_jax.workspace import artefacts, records


def test_each_input_can_be_measured_or_read_and_its_record_has_a_name_of_its_own():
    of = {name: some.of for name, some in INPUTS.items()}
    assert MEASURED.keys() == {name for name in of if of[name] == "encoder"}
    assert {name for name in of if of[name] == "training"} <= {*dir(dlc.TrainingRecord)}
    assert not INPUTS.keys() & {*STAGES, "table", "training", "ids"}


@pytest.fixture
def brightness(monkeypatch):
    """An input that the package does not have, and a selector that needs it."""
    measured = []

    def measure(scored, run):
        measured.append(len(scored.dataset))
        return np.arange(len(scored.dataset), dtype=np.float32)[:, None] ** 2

    check = functools.partial(checks.features_fit_labels, "brightness")
    monkeypatch.setitem(INPUTS, "brightness", Input(check, "a call"))
    monkeypatch.setitem(SELECTORS, "most_different", Method(k_center_greedy, needs="brightness"))
    monkeypatch.setitem(MEASURED, "brightness", Measurement(measure, ("dtype", "step")))
    return measured


def test_a_new_input_is_measured_recorded_and_selected_by(brightness, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (24, 40, 40, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(24) % 2)
    values = {
        "dataset": {"train": f"npz:{tmp_path}/x.npz"},
        "encoder": {"name": "resnet18", "weights": "demo:resnet18", "image_size": 32},
        "probe": {"num_probes": 2},
        "selection": {"methods": ("most_different",), "keep_fractions": (0.25,)},
    }
    said: list[str] = []

    def run(**changes) -> None:
        said.clear()
        pipeline.run(Config.of({**values, **changes}), tmp_path / "run", said.append)

    run(stages=("plan",))
    assert re.search(r"\| score +\| brightness ", "\n".join(said))
    run()
    root = tmp_path / "run"
    (path,) = (root / "selections/most_different").glob("*.npy")
    held = np.load(root / "scores/brightness.npz")
    labels = np.load(root / "scores/losses.npz")["labels"]
    arrays = {"brightness": held["brightness"]}
    candidates = Candidates(None, labels, ids=held["ids"], inputs=arrays)
    cell = {"keep_fraction": 0.25, "seed": 0}
    kept = candidates.select(method="most_different", **cell)
    np.testing.assert_array_equal(np.load(path), kept.indices)
    as_features = Candidates(None, labels, ids=held["ids"], features=held["brightness"])
    by_features = as_features.select(method="k_center_greedy", **cell)
    np.testing.assert_array_equal(kept.indices, by_features.indices)
    assert records.read(root, "brightness").kind == "brightness"
    run()
    assert "brightness: unchanged, not measured again" in said
    assert brightness == [24]
    run(probe={"num_probes": 2, "step": 0.03})  # a setting that decides it
    assert brightness == [24, 24]
    assert records.read(root, "brightness").key["step"] == 0.03
    (root / "scores/brightness.npz").unlink()
    with pytest.raises(dlc.InputError, match=r"brightness\.npz is missing; run the stage 'score'"):
        read_input(root, "brightness", artefacts.read_scores(root))


def test_inputs_that_are_missing_or_unknown_are_named(brightness):
    labels = np.arange(6) % 2
    with pytest.raises(dlc.InputError, match=r"^brightness: method 'most_different' needs them"):
        dlc.select(None, labels, method="most_different", keep_fraction=0.5)
    with pytest.raises(dlc.InputError, match=r"^inputs: unknown value 'bright'; .*brightness"):
        Candidates(None, labels, inputs={"bright": np.zeros((6, 1))})
    features = np.zeros((6, 1))
    with pytest.raises(dlc.InputError, match=r"^inputs: 'features' is given twice"):
        Candidates(None, labels, features=features, inputs={"features": features})
