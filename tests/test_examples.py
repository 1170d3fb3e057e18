"""Every public function has an example in its docstring, which runs and shows what it says."""

import doctest
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dlc_jax as dlc

TESTS = Path(__file__).resolve().parent
FUNCTIONS = [name for name in dlc.__all__ if not inspect.isclass(getattr(dlc, name))]
SLOW = {
    "certify",
    "evaluate_mmlu",
    "features",
    "finetune",
    "finetune_lora",
    "generate",
    "keep_curve",
    "linear_probes",
    "load_adapter",
    "load_language_model",
    "measure_responses",
    "probe",
    "probe_responses",
    "record_training",
    "response_features",
    "response_losses",
    "tokenise",
    "tune",
    "use_all_cores",
    "write_adapter",
    "write_merged",
}  # over two seconds when run alone: compilation, or loading transformers
LONG = {"save_encoder"}  # exports a network whole: minutes
FRESH = {"use_all_cores"}  # has to come before JAX looks for devices


def mark_of(name: str):
    return pytest.mark.slow if name in SLOW else pytest.mark.long if name in LONG else ()


def example(name: str) -> doctest.DocTest:
    """Returns what follows `Example:` in the docstring of a public function."""
    _, _, text = (inspect.getdoc(getattr(dlc, name)) or "").partition("\nExample:\n")
    return doctest.DocTestParser().get_doctest(text, {"dlc": dlc, "np": np}, name, None, 0)


def failures(name: str) -> str:
    """Runs an example in the current folder; returns what differs from what it shows."""
    lines: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example(name), out=lines.append)
    return "".join(lines)


def failures_of_a_fresh_process(name: str, folder: Path) -> str:
    chosen = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    env = {key: value for key, value in os.environ.items() if key not in chosen}
    env |= {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "JAX_PLATFORMS": "cpu"}
    program = f"import test_examples; print(test_examples.failures({name!r}), end='')"
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, cwd=folder, env=env, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_an_example_that_shows_a_value(name):
    shown = [part.want for part in example(name).examples if part.want]
    assert shown, f"{name}: no example in its docstring"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=mark_of(name)) for name in FUNCTIONS],
)
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = failures_of_a_fresh_process(name, tmp_path) if name in FRESH else failures(name)
    assert not found, found


def test_an_example_that_shows_something_else_is_found(monkeypatch):
    def three() -> int:
        """Returns 3.

        Example:
          >>> dlc.three()
          4
        """
        return 3

    monkeypatch.setattr(dlc, "three", three, raising=False)
    assert "Expected:\n    4\nGot:\n    3" in failures("three")


def test_slow_and_fresh_ones_are_public():
    assert set(FUNCTIONS) >= SLOW | LONG | FRESH
