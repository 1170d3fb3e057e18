"""Stages are found by their names."""

import importlib
import inspect
import json

import pytest
from test_measurements import settings_of_few_images

from dlc_jax.config import KINDS, Config
from dlc_jax.stages import pipeline
from dlc_jax.stages.select import Job

ALL = dict.fromkeys(stage for kind in KINDS.values() for stage in kind.stages)


@pytest.mark.parametrize("name", [name for name in ALL if name not in pipeline._BESIDE_SCORES])
def test_each_stage_that_uses_scores_is_a_module_that_runs(name):
    module = importlib.import_module(f"dlc_jax.stages.{name}")
    signature = inspect.signature(module.run, eval_str=True)
    (parameter,) = signature.parameters.values()
    assert parameter.annotation is Job
    assert signature.return_annotation is None


@pytest.mark.slow
def test_the_summary_comes_after_tuning_and_before_exports(tmp_path):
    values = settings_of_few_images(tmp_path)
    values["selection"] = {"methods": ("easiest",), "keep_fractions": (0.5,)}
    values["tuning"] = {"methods": ("easiest",), "num_repeats": 5}

    def places(*stages: str) -> list[int]:
        """Returns where tuning, the summary and exports end in what the stages print."""
        said: list[str] = []
        config = Config.of({**values, "stages": stages})
        pipeline.run(config, tmp_path / "run", said.append)
        starts = (f"files: {tmp_path}/run/tuning", "seconds, when last run: ", "export: ")
        found = [[n for n, line in enumerate(said) if line.startswith(start)] for start in starts]
        assert all(len(lines) <= 1 for lines in found)
        (summary,) = found[1]
        assert ("tune " in said[summary]) == ("tune" in stages)
        return [lines[0] for lines in found if lines]

    assert len(places("score")) == 1
    for stages in (("score", "tune"), ("score", "tune", "select", "export")):
        order = places(*stages)
        assert order == sorted(order)
        assert len(order) == 2 + ("export" in stages)


@pytest.mark.slow
def test_an_encoder_that_its_weights_name_is_taken_by_all_stages(tmp_path):
    """Each as a command of its own: what one has recorded the next one reads."""
    values = settings_of_few_images(tmp_path)
    values["encoder"]["name"] = None
    values["selection"] = {"methods": ("easiest", "random"), "keep_fractions": (0.5,)}
    values["dataset"]["test"] = values["dataset"]["train"]
    values["finetune"] = {"epochs": 1, "linear_probe": True, "full_set": False}
    said: list[str] = []
    for stage in ("score", "select", "finetune", "report"):
        pipeline.run(Config.of({**values, "stages": (stage,)}), tmp_path / "run", said.append)
    assert any("2 of the 2 runs asked for are finished" in text for text in said)
    record = json.loads((tmp_path / "run/records/score.json").read_text())["settings"]
    assert record["asked"]["encoder"]["name"] is None
    assert record["encoder"]["name"] == "resnet18"
    assert (tmp_path / "run/report/results.md").is_file()
