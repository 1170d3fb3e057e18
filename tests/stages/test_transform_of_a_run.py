"""A run whose encoder has images prepared as its checkpoint states."""

import json
import shutil
from importlib import resources
from typing import Any

import numpy as np
import pytest
from conftest import random_images

import dlc_jax as dlc
from dlc_jax.config import Config
from dlc_jax.stages import pipeline

SAMPLE = resources.files("dlc_jax.datasets") / "sample"
WORDS = "resize both sides to 20, centre crop 16, bicubic"


@pytest.fixture
def values(tmp_path) -> dict[str, Any]:
    """Settings of a run on 24 images, whose encoder states a transform."""
    own = {"input_size": [3, 16, 16], "crop_pct": 0.8, "crop_mode": "squash"}
    (tmp_path / "own").mkdir()
    shutil.copy(str(SAMPLE / "model.safetensors"), tmp_path / "own")
    (tmp_path / "own/config.json").write_text(json.dumps({"pretrained_cfg": own}))
    images = random_images(24, 40)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(24) % 2)
    encoder = {"name": "resnet18", "weights": f"{tmp_path}/own", "transform": "model"}
    values: dict[str, Any] = {"dataset": {"train": f"npz:{tmp_path}/x.npz"}, "encoder": encoder}
    values |= {"probe": {"num_probes": 2}, "cache": {"folder": f"{tmp_path}/cache"}}
    values["selection"] = {"methods": ("k_center_greedy",), "keep_fractions": (0.25,)}
    return values


@pytest.mark.slow
def test_the_plan_says_how_images_are_prepared(values, tmp_path):
    said: list[str] = []
    config = Config.of({**values, "stages": ("plan",), "plan_details": True})
    pipeline.run(config, tmp_path / "run", said.append)
    text = "\n".join(said)
    assert f" at 16 px; images: {WORDS}" in text
    assert "decoded: 24 x 16 x 16 x 3" in text


@pytest.mark.slow
def test_a_run_says_and_keeps_to_the_transform_it_was_scored_with(values, tmp_path):
    encoder, said = values["encoder"], []

    def run(changes: dict[str, Any] | None = None, **others) -> None:
        said.clear()
        settings = {**values, "encoder": encoder | (changes or {}), **others}
        pipeline.run(Config.of(settings), tmp_path / "run", said.append)

    run()
    assert any(line.endswith(f"images: {WORDS}") for line in said)
    held = np.load(tmp_path / "run/scores/features.npz")
    own_encoder = dlc.load_encoder("resnet18", f"{tmp_path}/own", transform="model")
    own_encoder = own_encoder.for_mode("default")
    dataset = dlc.load_dataset(values["dataset"]["train"])
    np.testing.assert_allclose(held["features"], dlc.features(own_encoder, dataset), atol=1e-5)
    provenance = json.loads((tmp_path / "run/provenance.json").read_text())
    assert provenance["encoder"]["transform"] == WORDS
    assert provenance["encoder"]["fingerprint"] == own_encoder.fingerprint
    run()
    assert "score: unchanged, not run again" in said
    with pytest.raises(dlc.InputError, match=r"encoder\.transform: 'paper' .* expected 'model'"):
        run({"transform": None, "image_size": 16}, stages=("select",))
    run({"image_size": 16}, stages=("score",))  # the size that it has anyway
    assert "score: unchanged, not run again" in said
    run({"transform": "paper", "image_size": 16}, stages=("score",))
    assert "score: unchanged, not run again" not in said
    provenance = json.loads((tmp_path / "run/provenance.json").read_text())
    assert provenance["encoder"]["transform"] == "resize 18, centre crop 16"
