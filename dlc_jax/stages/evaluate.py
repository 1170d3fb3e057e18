"""The stage `evaluate` of instructions: MMLU, of the model as it is and of every finished run."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, cast

import jax

from dlc_jax import expect
from dlc_jax.config import Config
from dlc_jax.encoders.language_model import LanguageModel
from dlc_jax.evaluation import evaluate_mmlu
from dlc_jax.exports.peft import load_adapter
from dlc_jax.selection import Cell
from dlc_jax.stages.select import Job
from dlc_jax.stages.sweep_results import BASE_CELL, read_run, run_folder, write_results
from dlc_jax.tasks.task import EvaluatedTask
from dlc_jax.training.loop import ADAPTER
from dlc_jax.workspace import Written, artefacts, records
from dlc_jax.workspace.artefacts import key_of

# What the stage `finetune` records of the models it trained.
_TRAINED = {
    "encoder_fingerprint": str,
    "encoder": {"weights": str},
    "lora": {"dtype": str},
}


def run(job: Job) -> None:
    """Asks MMLU of the model as it is and with the adapter of every finished run.

    Writes `evaluate/<method>/<cell>.json` and `results.csv`. Answers that are there are not
    computed again.

    Raises:
      ValueError: no questions, no run that is finished, or runs of another model.
    """
    start = time.perf_counter()
    config, workspace, task = job.config, job.workspace, cast(EvaluatedTask, job.task)
    workdir, echo = workspace
    mmlu, base = task.questions, task.model
    runs = {BASE_CELL: base.fingerprint}  # of all processes, where they share the weights
    finished = workspace.broadcast(lambda: _finished(config, workdir, base))
    runs |= {Cell(*cell): run for *cell, run in finished}
    if num_missing := len(config.runs()) + 1 - len(runs):
        echo(f"evaluate: note: {num_missing} runs are not finished, and not asked")
    echo(f"evaluate: {len(runs)} models on {mmlu.name}")
    for number, (cell, run) in enumerate(runs.items(), start=1):
        step = AnswersStep(config, task, cell, run, workdir)
        if made := workspace.ensure(step):
            accuracy, num_cut = made.value["result"]["test_accuracy"], made.value["num_truncated"]
            said = f"{accuracy:.2f} % of {made.value['num_questions']} questions"
            cut = f" ({num_cut} prompts cut at their beginning)" if num_cut else ""
            echo(f"evaluate: {number}/{len(runs)} {cell.name}: {said}{cut}")
    workspace.alone(lambda: write_results(workdir))
    made_with = {"evaluation": config.to_dict()["evaluation"], "mmlu": mmlu.fingerprint}
    workspace.note("evaluate", made_with, time.perf_counter() - start)
    echo(f"files: {workdir}/ ({artefacts.RESULTS}, {artefacts.EVALUATE}/)")


@dataclasses.dataclass(frozen=True, eq=False)
class AnswersStep:
    """Accuracies of a model on the questions, `evaluate/<method>/<cell>.json`.

    Attributes:
      task: Has the questions, and the model as it was before fine-tuning.
      cell: Cell whose adapter is loaded; `BASE_CELL`: none.
      run: Identity of the run that made the adapter, or fingerprint of the model without one.
      root: Work directory.
    """

    config: Config
    task: EvaluatedTask
    cell: Cell
    run: str
    root: Path

    kind = "answers"
    stage = "evaluate"
    obsolete = ()

    @property
    def name(self) -> str:
        return f"{artefacts.EVALUATE}/{self.cell.name}"

    @property
    def files(self) -> tuple[str, ...]:
        return (f"{self.name}.json",)

    @property
    def key(self) -> dict[str, Any]:
        base, mmlu = self.task.model, self.task.questions
        # comparable answers share questions, base model and settings
        asked = [mmlu.fingerprint, base.fingerprint, base.tokenizer_fingerprint, self.settings]
        return {"cell": self.cell._asdict(), "asked": key_of(self.kind, asked), "run": self.run}

    @property
    def settings(self) -> dict[str, Any]:
        evaluation = self.config.evaluation
        return {"num_shots": evaluation.num_shots, "limit": evaluation.limit}

    def compute(self, scratch: Path) -> dict[str, Any]:
        model = self.task.model
        if self.cell != BASE_CELL:
            adapter = run_folder(self.root, self.cell) / ADAPTER
            artefacts.pull(adapter)
            model = load_adapter(model, adapter)
        mmlu, num = self.task.questions, self.config.probe.tokens_per_batch
        found = evaluate_mmlu(model, mmlu, **self.settings, tokens_per_batch=num, progress=True)
        return {
            "result": {"test_accuracy": found.accuracy, **found.by_group},
            "by_subject": found.by_subject,
            "num_questions": found.num_questions,
            "num_truncated": found.num_truncated,
            "devices": [device.device_kind for device in jax.devices()],
        }

    def write(self, root: Path, found: dict[str, Any]) -> Written:
        artefacts.write_json(root / self.files[0], self.key | found)
        return Written(self.files)


def _finished(config: Config, workdir: Path, base: LanguageModel) -> list[list[Any]]:
    """Returns cell and identity of every finished run; ValueError if they are of another model."""
    trained = records.settings_of(workdir, "finetune", _TRAINED)
    if trained is not None and trained["encoder_fingerprint"] != base.fingerprint:
        raise expect.InputError(
            f"evaluate: the runs in {workdir} are not of {base.name} in "
            f"{base.architecture.dtype}; expected encoder.weights and lora.dtype as in the stage "
            f"'finetune', {trained['encoder']['weights']} in {trained['lora']['dtype']}."
        )
    runs = {cell: read_run(workdir, cell.name) for cell in config.runs()}
    found = [
        [*cell, run.identity]
        for cell, run in runs.items()
        if run is not None and records.RESULT in run.facts
    ]
    if not found:
        raise expect.InputError(
            f"evaluate: none of {len(runs)} runs is finished; run the stage 'finetune' first."
        )
    return found
