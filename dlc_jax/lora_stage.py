"""The stages `finetune` and `evaluate` of instruction data."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import dlc_jax
from dlc_jax import artefacts, checks, provenance
from dlc_jax.config import Config
from dlc_jax.distributed import load_sharded
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.evaluation import Mmlu, evaluate_mmlu, load_mmlu
from dlc_jax.exports.peft import load_adapter
from dlc_jax.instructions_stage import load_configured_instructions
from dlc_jax.preprocess.tokens import Tokenised, tokenise
from dlc_jax.selection_inputs import SelectionInputs
from dlc_jax.sweep import run_sweep
from dlc_jax.sweep_results import (
    BASE_CELL,
    cells_of,
    evaluation_file,
    facts_of,
    write_results,
)
from dlc_jax.training.lora.tuner import ADAPTER, LoraTuner


def check_before_scoring(config: Config) -> None:
    """Raises ValueError where what comes after scoring would fail: that costs a pass first."""
    if "finetune" in config.stages and config.dataset.test is not None:
        load_configured_instructions(config, config.dataset.test)
    if "evaluate" in config.stages:
        _questions(config)


def run_finetune_instructions(
    config: Config, workdir: Path, known: SelectionInputs, echo: Callable[[str], None]
) -> list[str]:
    """Trains an adapter on every selected cell and on the whole set.

    Leaves `finetune/<method>/<cell>/adapter/` and `results.csv`.

    Returns:
      A line for every run that failed.
    Raises:
      ValueError: see `run_sweep`.
    """
    data = load_configured_instructions(config, config.dataset.train)
    model = load_sharded(config.encoder.weights, config.lora.dtype, config.mesh.fsdp)
    max_length = model.max_length(config.encoder.max_length)
    _forget_other_base(workdir, model)

    def tokenised(source: str) -> Tokenised:
        some = data
        if source != config.dataset.train:
            some = load_configured_instructions(config, source)
        on_corrupt = config.dataset.on_corrupt
        return tokenise(some, model.tokenizer, max_length, on_corrupt=on_corrupt)

    def make_tuner() -> LoraTuner:
        test = config.dataset.test
        return LoraTuner(
            model,
            tokenised(config.dataset.train),
            config.lora,
            test=None if test is None else tokenised(test),
            max_length=max_length,
            progress=True,
        )

    end = run_sweep(config, workdir, known, data, make_tuner, echo)
    settings = config.to_dict()
    made_with = {key: settings[key] for key in ("dataset", "encoder", "lora")}
    made_with |= {"encoder_fingerprint": model.fingerprint}
    inputs = artefacts.json_hash([made_with, settings["selection"], known.samples.fingerprint])
    paths = [Path(artefacts.RESULTS)]
    provenance.record(workdir, "finetune", inputs, paths, end.seconds, {}, made_with)
    echo(f"files: {workdir}/ ({artefacts.RESULTS}, {artefacts.FINETUNE}/)")
    return end.failures


def _forget_other_base(workdir: Path, model: LanguageModel) -> None:
    """Deletes what was measured of another model before it was fine-tuned."""
    path = evaluation_file(workdir, BASE_CELL)
    if artefacts.read_json(path).get("run") != model.fingerprint:
        path.unlink(missing_ok=True)


def run_evaluate(config: Config, workdir: Path, echo: Callable[[str], None]) -> None:
    """Asks MMLU of the model as it is and with every adapter; those that were asked are not again.

    Writes `evaluate/<method>/<cell>.json` and `results.csv`.

    Raises:
      ValueError: no questions, a run that is not finished.
    """
    start = time.perf_counter()
    mmlu = _questions(config)
    base = load_sharded(config.encoder.weights, config.lora.dtype, config.mesh.fsdp)
    asked = [BASE_CELL, *cells_of(config)]
    unfinished = [
        cell.name for cell in asked[1:] if "result" not in facts_of(_run_folder(workdir, cell))
    ]
    if unfinished:
        raise checks.InputError(
            f"evaluate: {len(unfinished)} of {len(asked) - 1} runs are not finished, first "
            f"{unfinished[0]}; run the stage 'finetune' first."
        )
    echo(f"evaluate: {len(asked)} models on {mmlu.name}")
    for number, cell in enumerate(asked, start=1):
        of_run = base.fingerprint
        if cell != BASE_CELL:
            of_run = facts_of(_run_folder(workdir, cell))["inputs"]
        asks = {"mmlu": mmlu.fingerprint, **dataclasses.asdict(config.evaluation), "run": of_run}
        asks["version"] = dlc_jax.__version__
        inputs = artefacts.json_hash(asks)
        path = evaluation_file(workdir, cell)
        if artefacts.read_json(path).get("inputs") == inputs:
            continue
        model = base
        if cell != BASE_CELL:
            model = load_adapter(base, _run_folder(workdir, cell) / ADAPTER)
        found = _measured(config, model, mmlu)
        artefacts.write_json(path, {"inputs": inputs, "run": of_run, **found})
        accuracy = found["result"]["test_accuracy"]
        said = f"{accuracy:.2f} % of {found['num_questions']} questions"
        if num_cut := found["num_truncated"]:
            said += f" ({num_cut} prompts cut at their beginning)"
        echo(f"evaluate: {number}/{len(asked)} {cell.name}: {said}")
    write_results(workdir)
    seconds = time.perf_counter() - start
    made_with = {"evaluation": config.to_dict()["evaluation"], "mmlu": mmlu.fingerprint}
    paths = [Path(artefacts.RESULTS)]
    provenance.record(
        workdir, "evaluate", artefacts.json_hash(made_with), paths, seconds, {}, made_with
    )
    echo(f"files: {workdir}/ ({artefacts.RESULTS}, {artefacts.EVALUATE}/)")


def _run_folder(workdir: Path, cell: Any) -> Path:
    return workdir / artefacts.FINETUNE / cell.name


def _measured(config: Config, model: LanguageModel, mmlu: Mmlu) -> dict[str, Any]:
    found = evaluate_mmlu(
        model,
        mmlu,
        num_shots=config.evaluation.num_shots,
        limit=config.evaluation.limit,
        tokens_per_batch=config.probe.tokens_per_batch,
        progress=True,
    )
    return {
        "result": {"test_accuracy": found.accuracy, **found.by_group},
        "by_subject": found.by_subject,
        "num_questions": found.num_questions,
        "num_truncated": found.num_truncated,
        "devices": [device.device_kind for device in jax.devices()],
    }


def _questions(config: Config) -> Mmlu:
    assert config.evaluation.mmlu is not None  # checked with the configuration
    return _load_mmlu(config.evaluation.mmlu)


_load_mmlu = functools.cache(load_mmlu)
