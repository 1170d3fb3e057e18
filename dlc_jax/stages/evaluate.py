"""The stage `evaluate` of instructions: MMLU, of the model as it is and of every finished run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dlc_jax import checks
from dlc_jax.config import Config
from dlc_jax.distributed import processes
from dlc_jax.distributed.processes import on_first, told_by_first
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.evaluation import Mmlu, evaluate_mmlu, load_mmlu
from dlc_jax.exports.peft import load_adapter
from dlc_jax.selection import Cell
from dlc_jax.stages.agreement import agree
from dlc_jax.stages.finetune import load_model
from dlc_jax.stages.sweep_results import (
    BASE_CELL,
    evaluation_file,
    facts_of,
    read_evaluation,
    write_results,
)
from dlc_jax.training.folder import ADAPTER
from dlc_jax.version import __version__
from dlc_jax.workspace import artefacts, provenance

# What the stage `finetune` records of the models it trained.
_TRAINED = {
    "encoder_fingerprint": str,
    "encoder": {"weights": str},
    "lora": {"dtype": str},
}


def check_questions(config: Config) -> None:
    """Raises ValueError where the questions cannot be asked, before a scoring pass is spent."""
    mmlu = _questions(config)
    mmlu.check_shots(config.evaluation.num_shots)
    agree({mmlu.name: mmlu.fingerprint})


def run_evaluate(config: Config, workdir: Path, echo: Callable[[str], None]) -> None:
    """Asks MMLU of the model as it is and with the adapter of every finished run.

    Writes `evaluate/<method>/<cell>.json` and `results.csv`. Who was asked the same is not asked
    again.

    Raises:
      ValueError: no questions, no run that is finished, or runs of another model.
    """
    start = time.perf_counter()
    mmlu = _questions(config)
    base = load_model(config)
    fingerprint = base.fingerprint

    def finished() -> list[Any]:
        return [[*cell, run] for cell, run in _finished(config, workdir, base).items()]

    found = {Cell(*cell): run for *cell, run in told_by_first(finished)}
    runs = {BASE_CELL: fingerprint, **found}
    if num_missing := len(config.runs()) + 1 - len(runs):
        echo(f"evaluate: note: {num_missing} runs are not finished, and not asked")
    echo(f"evaluate: {len(runs)} models on {mmlu.name}")
    settings = [config.evaluation.num_shots, config.evaluation.limit]
    asked = artefacts.json_hash([__version__, mmlu.fingerprint, fingerprint, *settings])
    for number, (cell, run) in enumerate(runs.items(), start=1):
        said = _evaluate(config, workdir, base, mmlu, cell, {"asked": asked, "run": run})
        if said is not None:
            echo(f"evaluate: {number}/{len(runs)} {cell.name}: {said}")

    def keep() -> None:
        write_results(workdir)
        seconds = time.perf_counter() - start
        made_with = {"evaluation": config.to_dict()["evaluation"], "mmlu": mmlu.fingerprint}
        inputs, paths = artefacts.json_hash([asked, list(runs.values())]), [Path(artefacts.RESULTS)]
        provenance.record(workdir, "evaluate", inputs, paths, seconds, {}, made_with)

    on_first(keep)
    echo(f"files: {workdir}/ ({artefacts.RESULTS}, {artefacts.EVALUATE}/)")


def _evaluate(
    config: Config,
    workdir: Path,
    base: LanguageModel,
    mmlu: Mmlu,
    cell: Cell,
    asked: dict[str, str],
) -> str | None:
    """Asks the model of a cell; returns what to say of it, None if it was asked the same before."""
    path = evaluation_file(workdir, cell)

    def was_asked() -> bool:
        known = read_evaluation(workdir, cell)
        return all(known.get(name) == value for name, value in asked.items())

    if told_by_first(was_asked):
        return None
    model = base
    if cell != BASE_CELL:
        adapter = _run_folder(workdir, cell) / ADAPTER
        artefacts.pull(adapter)
        model = load_adapter(base, adapter)
    found = _measured(config, model, mmlu)
    on_first(lambda: artefacts.write_json(path, {"cell": cell._asdict(), **asked, **found}))
    return _said(found)


def _finished(config: Config, workdir: Path, base: LanguageModel) -> dict[Cell, str]:
    """Returns the inputs of every finished run; ValueError if they are of another model."""
    trained = provenance.settings_of(workdir, "finetune", _TRAINED)
    if trained is not None and trained["encoder_fingerprint"] != base.fingerprint:
        raise checks.InputError(
            f"evaluate: the runs in {workdir} are not of {base.name} in "
            f"{base.architecture.dtype}; expected encoder.weights and lora.dtype as in the stage "
            f"'finetune', {trained['encoder']['weights']} in {trained['lora']['dtype']}."
        )
    facts = {cell: facts_of(workdir, cell) for cell in config.runs()}
    found = {cell: known["inputs"] for cell, known in facts.items() if "result" in known}
    if not found:
        raise checks.InputError(
            f"evaluate: none of {len(facts)} runs is finished; run the stage 'finetune' first."
        )
    return found


def _run_folder(workdir: Path, cell: Cell) -> Path:
    return workdir / artefacts.FINETUNE / cell.name


def _said(found: dict[str, Any]) -> str:
    said = f"{found['result']['test_accuracy']:.2f} % of {found['num_questions']} questions"
    if num_cut := found["num_truncated"]:
        said += f" ({num_cut} prompts cut at their beginning)"
    return said


def _measured(config: Config, model: LanguageModel, mmlu: Mmlu) -> dict[str, Any]:
    found = evaluate_mmlu(
        model,
        mmlu,
        num_shots=config.evaluation.num_shots,
        limit=config.evaluation.limit,
        tokens_per_batch=config.probe.tokens_per_batch,
        progress=processes.is_first(),
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
    return load_mmlu(config.evaluation.mmlu)
