"""What only some stages ask of a kind of data."""

import numpy as np
import pytest
from conftest import random_images

from dlc_jax.config import KINDS, Config
from dlc_jax.stages import pipeline
from dlc_jax.tasks import TASKS, images
from dlc_jax.tasks.task import EvaluatedTask, TunedTask


@pytest.mark.parametrize(("stage", "protocol"), [("tune", TunedTask), ("evaluate", EvaluatedTask)])
def test_kinds_that_have_a_stage_have_what_it_asks_for(stage, protocol):
    asked = [name for name in vars(protocol) if not name.startswith("_")]
    assert asked
    for name, kind in KINDS.items():
        has = {hasattr(TASKS[name], attribute) for attribute in asked}
        assert has == {stage in kind.stages}, name


@pytest.mark.slow
def test_the_encoder_is_loaded_once_for_all_stages(tmp_path, monkeypatch):
    loaded = []

    def counted(*given, load=images.load_encoder, **settings):
        loaded.append(given)
        return load(*given, **settings)

    monkeypatch.setattr(images, "load_encoder", counted)
    for name in ("train", "test"):
        np.savez(tmp_path / f"{name}.npz", images=random_images(20, 40), labels=np.arange(20) % 2)
    values = {
        "stages": ("score", "tune", "select", "finetune"),
        "dataset": {name: f"npz:{tmp_path}/{name}.npz" for name in ("train", "test")},
        "encoder": {"name": "resnet18", "weights": "demo:resnet18", "image_size": 32},
        "probe": {"num_probes": 2},
        "tuning": {"by": "finetune", "methods": ("easiest",), "num_repeats": 5},
        "finetune": {"epochs": 0, "full_set": False},
        "selection": {"methods": ("auto",), "keep_fractions": (0.5,), "seeds": (0,)},
    }
    pipeline.run(Config.of(values), tmp_path / "run", lambda line: None)
    assert loaded == [("resnet18", "demo:resnet18")]
