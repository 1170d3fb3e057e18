"""Stages are found by their names."""

import importlib
import inspect

import pytest

from dlc_jax.config import INSTRUCTION_STAGES, STAGES
from dlc_jax.stages import pipeline
from dlc_jax.stages.job import Job, Stage

ALL = dict.fromkeys([*STAGES, *INSTRUCTION_STAGES])


@pytest.mark.parametrize("name", [name for name in ALL if name not in pipeline._BESIDE_SCORES])
def test_each_stage_that_uses_scores_is_a_module_that_runs(name):
    module = importlib.import_module(f"dlc_jax.stages.{name}")
    assert isinstance(module, Stage)
    signature = inspect.signature(module.run, eval_str=True)
    (parameter,) = signature.parameters.values()
    assert parameter.annotation is Job
    assert signature.return_annotation is None
