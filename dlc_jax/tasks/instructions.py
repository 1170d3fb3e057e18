"""Instructions: scored by a language model that adapters are then trained for."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from dlc_jax import expect, reports
from dlc_jax.config import Config
from dlc_jax.datasets.instructions import Instructions, load_instructions
from dlc_jax.datasets.released_prompts import trained_as_released
from dlc_jax.distributed import Run, Team, processes, said_of
from dlc_jax.encoders import language_model
from dlc_jax.encoders.language_model import LanguageModel, load_language_model
from dlc_jax.encoders.torch_decoder import TorchSizes
from dlc_jax.evaluation import Mmlu, load_mmlu
from dlc_jax.exports.instructions import INSTRUCTION_EXPORTS
from dlc_jax.masking import masked_text
from dlc_jax.planning import instruction_plan
from dlc_jax.planning.costs import kept_by_run
from dlc_jax.planning.machine import MeshSize
from dlc_jax.planning.plan import Plan
from dlc_jax.preprocess.tokens import Tokenised, check_vocabulary, tokenise
from dlc_jax.probes.responses import measure_responses, response_features
from dlc_jax.probes.text import probe_responses
from dlc_jax.scores import SCORES, column_name, score
from dlc_jax.selection import Cell
from dlc_jax.tasks.agreement import agree, agree_on_files, agree_on_instructions
from dlc_jax.tasks.exports import ExportStep, export_steps
from dlc_jax.tasks.measurements import (
    NOT_IN_LOSSES,
    Measurement,
    measure_inputs,
    note_left_out,
    scored_encoder,
    similarities_to,
    write_certificate,
)
from dlc_jax.tasks.task import Sources, Training
from dlc_jax.training.lora.tuner import LoraTuner
from dlc_jax.types import ProbeLosses, ResponseLosses, Selection
from dlc_jax.workspace import Workspace, Written, artefacts
from dlc_jax.workspace.artefacts import ScoredSamples, json_hash

READABLE = "scores/easiest_hardest.md"


# Instructions that were not left out, their tokens, and what two passes over them give.
# The released code has the losses of its probes alone.
_Measured: TypeAlias = tuple[Instructions, Tokenised, ProbeLosses, ResponseLosses | None]


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredInstructions:
    """What is scored, and how; see `ScoredData`.

    Attributes:
      data: Instructions, those included that are left out.
      model: As it is scored with.
      mesh: All devices.
      target: What selected samples should be like; None: nothing is asked for.
      by_the_way: Features that the pass over responses gave, until their own step takes them.
    """

    config: Config
    data: Instructions
    model: LanguageModel
    mesh: Mesh
    say: Callable[[str], None]
    target: Instructions | None = None
    by_the_way: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def made_of(self) -> dict[str, Any]:
        """Data, model and how samples are read, which decide every measurement."""
        found = {
            "data": self.data.fingerprint,
            "model": self.model.fingerprint,
            "tokenizer": self.model.tokenizer_fingerprint,
            "max_length": self.max_length,
            "on_corrupt": self.config.dataset.on_corrupt,
        }
        if self.config.conventions.reads_as_released:
            found["mode"] = self.config.mode
        return found

    @property
    def max_length(self) -> int | None:
        """Longest sequence in tokens; None: any."""
        if self.config.conventions.reads_as_released:
            return _uncut(self.model.config)
        return self.model.max_length(self.config.encoder.max_length)

    @functools.cached_property
    def tokens(self) -> Tokenised:
        """Samples as the model reads them, but those that are left out."""
        return _tokenised(self.config, self.data, self.model.tokenizer, self.max_length)

    def run(self, scratch: Path) -> Run:
        """Where and on what measurements run."""
        return Run(scratch, self.mesh, progress=True)


def _features(scored: ScoredInstructions, run: Run) -> Float32[np.ndarray, "n d"]:
    return _features_of(scored, scored.tokens, run)


def _features_of(
    scored: ScoredInstructions, tokens: Tokenised, run: Run
) -> Float32[np.ndarray, "n d"]:
    num = scored.config.probe.tokens_per_batch
    return response_features(scored.model, tokens, tokens_per_batch=num, run=run)


def _features_of_targets(scored: ScoredInstructions, run: Run) -> Float32[np.ndarray, "q d"]:
    assert scored.target is not None  # checked with the configuration
    tokens = _tokenised(scored.config, scored.target, scored.model.tokenizer, scored.max_length)
    note_left_out(scored, len(tokens))
    return _features_of(scored, tokens, run)


# By names in `INPUTS`.
MEASURED: Mapping[str, Measurement] = {
    "features": Measurement(_features),
    "similarities": Measurement(_features_of_targets, compared=similarities_to),
}


@dataclasses.dataclass(frozen=True, eq=False)
class ResponsesStep:
    """Losses of responses, all scores made of them, and a text of the extremes."""

    scored: ScoredInstructions

    name = stage = "score"
    kind = "response losses"
    files = (artefacts.LOSSES, artefacts.SCORES, READABLE)
    obsolete = (artefacts.UNFINISHED,)

    @property
    def key(self) -> dict[str, Any]:
        return self._how | {"made_of": self.scored.made_of}

    @property
    def settings(self) -> dict[str, Any]:
        config = self.scored.config
        read = {"max_length": self.scored.max_length, "on_corrupt": config.dataset.on_corrupt}
        return (
            {"mode": config.mode, "seed": config.seed} | read | self._how | {"asked": config.asked}
        )

    @property
    def _how(self) -> dict[str, Any]:
        config = self.scored.config
        if config.conventions.reads_as_released:  # which has one path, and draws nothing
            return {"probe": {"dtype": config.probe.dtype}}
        probes = {k: v for k, v in config.to_dict()["probe"].items() if k not in NOT_IN_LOSSES}
        return {"seed": config.seed, "probe": probes, "category": self._categories}

    @property
    def _masked_text(self) -> str:
        model = self.scored.model
        is_masked = model.is_prunable
        if self.scored.config.conventions.reads_as_released:
            is_masked = model.architecture.is_linear
        return masked_text(model.params, is_masked)

    @property
    def _categories(self) -> str | None:
        """Hash of the classes that a column gives; ValueError where there is no such column."""
        column = self.scored.config.dataset.category
        if column is None:
            return None
        labels, names = self.scored.data.categories(column)
        return json_hash([column, labels.tolist(), names])

    def compute(self, scratch: Path) -> _Measured:
        scored = self.scored
        config, data, model, say = scored.config, scored.data, scored.model, scored.say
        say(f"score: {len(data)} instructions, {model.name} on {said_of(scored.mesh)}")
        say(f"score: masks {self._masked_text}")
        max_length, tokens = scored.max_length, scored.tokens
        if num := sum(len(row) > model.config.max_length for row in tokens.tokens):
            limit = model.config.max_length
            say(f"score: note: {num} of {len(tokens)} are longer than the {limit} of the model")
        if num := int(tokens.truncated.sum()):
            say(f"score: note: {num} of {len(tokens)} are cut off at {max_length} tokens")
        if tokens.skipped:
            name, why = next(iter(tokens.skipped.items()))
            say(f"score: note: {len(tokens.skipped)} left out, such as {name}: {why}")
        kept = data.subset(np.flatnonzero(np.isin(data.ids, tokens.ids)))
        run = scored.run(scratch)
        how: dict[str, Any] = {"tokens_per_batch": config.probe.tokens_per_batch, "run": run}
        if config.conventions.reads_as_released:
            return kept, tokens, probe_responses(model, tokens, mode=config.mode, **how), None
        probes = probe_responses(model, tokens, path=config.probe, seed=config.seed, **how)
        with_features = "features" in config.need.measured
        responses = measure_responses(
            model, kept, max_length=max_length, tokens=tokens, with_features=with_features, **how
        )
        if responses.features is not None:
            scored.by_the_way["features"] = responses.features
        return kept, tokens, probes, responses

    def write(self, root: Path, found: _Measured) -> Written:
        scored, (data, tokens, probes, responses) = self.scored, found
        config, model = scored.config, scored.model
        labels, class_names = probes.labels, probes.class_names
        if config.dataset.category is not None:
            labels, class_names = data.categories(config.dataset.category)
        scores = {"dlc": score(probes)}
        if responses is not None:
            scores |= _other_scores(config, responses, scored.say)
        artefacts.write_losses(
            root, losses=probes.losses, sparsity=probes.sparsity, labels=labels, ids=probes.ids
        )
        artefacts.write_scores(root, ScoredSamples(probes.ids, labels, class_names, scores))
        with artefacts.atomic(root / READABLE, "w") as file:
            file.write(reports.easiest_hardest_text(data, scores["dlc"]))
        facts = {
            "dataset": {
                "source": scored.data.name,
                "fingerprint": scored.data.fingerprint,
                "num_samples": len(scored.data),
                "num_truncated": int(tokens.truncated.sum()),
                "skipped": tokens.skipped,
            },
            "encoder": {
                "name": model.name,
                "fingerprint": model.fingerprint,
                "door": model.door,
                "masked": self._masked_text,
            },
        }
        if config.conventions.reads_as_released:  # its path has no more probes to compare with
            return Written(list(self.files), facts)
        of_classes = dataclasses.replace(probes, labels=labels)
        certificate = write_certificate(root, of_classes, config.seed, scored.say)
        return Written([*self.files, *certificate], facts)


def _other_scores(
    config: Config, responses: ResponseLosses, echo: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """Returns every column that can be computed; one that is not selected by may be missing."""
    wanted = {config.selection.score_of(method) for method in config.selection.methods}
    scores = {}
    missing: dict[str, list[str]] = {}  # why -> columns
    for name, method in SCORES.items():
        for variant in method.variants if method.of == "responses" else ():
            column = column_name(name, variant)
            try:
                scores[column] = score(responses, method=name, variant=variant)
            except expect.InputError as error:
                if column in wanted:
                    raise
                missing.setdefault(str(error), []).append(column)
    for why, columns in missing.items():
        echo(f"score: note: no column {', '.join(columns)}: {why}")
    return scores


def _tokenised(
    config: Config, data: Instructions, tokenizer: Any, max_length: int | None, *, cut: bool = False
) -> Tokenised:
    """Returns the tokens of samples; `cut`: of what the released code trains on, cut as it does."""
    how = {"on_corrupt": config.dataset.on_corrupt, "mode": config.mode}
    if not cut:
        return tokenise(data, tokenizer, max_length, **how)
    pairs = map(trained_as_released, data.prompts, data.responses)
    prompts, responses = zip(*pairs, strict=True)
    written = dataclasses.replace(data, prompts=prompts, responses=responses)
    whole = tokenise(written, tokenizer, None, **how)
    return whole.cut(np.full(len(whole), max_length))


def _uncut(sizes: language_model.Sizes) -> int | None:
    """Returns the longest sequence that a model can read at all; None: there is none.

    Rotations go on beyond what it was trained for; other classes may have no place left.
    """
    return sizes.max_length if isinstance(sizes, TorchSizes) else None


def _read(config: Config, source: str) -> Instructions:
    tokenizer = functools.partial(language_model.load_tokenizer, config.encoder.weights)
    how = dataclasses.asdict(config.dataset.reading)
    return load_instructions(source, tokenizer=tokenizer, **how)


class InstructionTask:
    """See `Task`.

    Args:
      config: Checked configuration.
      say: Takes each line meant for the user.
    """

    easiest_hardest = READABLE
    left_out = "samples left out"
    encoder_settings: tuple[str, ...] = ("name", "max_length")

    def __init__(self, config: Config, say: Callable[[str], None]):
        self._config, self._say = config, say
        # no bound method: in a circle of references the model would outlive the task
        self._sources = Sources(functools.partial(_read, config), agree_on_instructions)
        self.load = self._sources.load
        self._door_is_shown = False

    @functools.cached_property
    def model(self) -> LanguageModel:
        return self._model_in(self._config.lora.dtype, self._config.mesh.make())

    @functools.cached_property
    def questions(self) -> Mmlu:
        assert self._config.evaluation.mmlu is not None  # checked with the configuration
        return load_mmlu(self._config.evaluation.mmlu)

    def _model_in(self, dtype: str, mesh: jax.sharding.Mesh | None = None) -> LanguageModel:
        weights = self._config.encoder.weights
        model = load_language_model(weights, dtype=dtype, mesh=mesh, converted=self._converted)
        if not self._door_is_shown:
            self._say(f"model: {model.door}")
            self._door_is_shown = True
        if "finetune" in self._config.stages:  # what cannot be trained is not scored first
            lora = self._config.lora
            model.architecture.for_training(lora.adapter, lora.rematerialise)
        return model

    @property
    def _converted(self) -> bool:
        return self._config.encoder.name == language_model.CONVERTED_DECODER

    def encoder_fingerprint(self) -> str:
        return self._model_in(self._config.probe.dtype).fingerprint

    def check(self, workspace: Workspace) -> None:
        config = self._config
        stages, weights = {*config.stages}, config.encoder.weights
        if "export" in stages:
            workspace.alone(self._check_exports)
        if {"score", "finetune", "evaluate"} & stages and processes.count() > 1:
            agree_on_files(language_model.model_folder(weights), language_model.MODEL_FILES)
        if {"score", "finetune"} & stages:
            self._sources.load_together(config.dataset.train)
        if "finetune" in stages:
            data, category = self.load(config.dataset.train), config.dataset.category
            labels = np.zeros(len(data), int) if category is None else data.categories(category)[0]
            for num in kept_by_run(config, np.bincount(labels)):
                config.lora.steps_per_epoch(num)  # refuses before scoring what takes no step
        sources = {"finetune": config.dataset.test, "score": config.selection.target}
        if others := {some for stage, some in sources.items() if stage in stages and some}:
            folder = language_model.model_folder(weights)
            sizes = language_model.door_of(folder, converted=self._converted).sizes
            tokenizer = language_model.load_tokenizer(weights)
            max_length = language_model.longest_sequence(sizes, weights, config.encoder.max_length)
            for source in sorted(others):
                data = self._sources.load_together(source)
                tokens = _tokenised(config, data, tokenizer, max_length)
                check_vocabulary(tokens.named, sizes.vocab_size, tokenizer.convert_ids_to_tokens)
        if "evaluate" in stages:
            self.questions.check_shots(config.evaluation.num_shots)
            agree({self.questions.name: self.questions.fingerprint})

    def _check_exports(self) -> None:
        data = self.load(self._config.dataset.train)
        for form in self._config.export.forms:
            INSTRUCTION_EXPORTS[form].check(data)

    def score(self, workspace: Workspace) -> Config:
        config = self._config
        data, mesh = self.load(config.dataset.train), config.mesh.make()
        workspace.say(f"data: {data.summary}")
        model = self._model_in(config.probe.dtype, Team.of(mesh).mesh)
        _ = model.fingerprint  # of all processes, where they share the weights
        target = config.selection.target
        others = None if target is None else self._sources.load_together(target)
        scored = ScoredInstructions(config, data, model, mesh, workspace.say, others)
        if not workspace.ensure(ResponsesStep(scored)):
            workspace.say("score: unchanged, not run again")
        measure_inputs(workspace, scored, MEASURED)
        return config

    def exports(self, kept: Mapping[Cell, Selection], root: Path) -> Iterable[ExportStep]:
        data = self.load(self._config.dataset.train)
        # rows have fields in an order that the fingerprint, of what is trained on, does not know
        fields = (json.dumps(row, default=str) for row in data.rows)
        rows = artefacts.json_hash([data.fingerprint, *fields])
        scored_ids = next(iter(kept.values())).scored_ids
        data = data.subset(np.flatnonzero(np.isin(data.ids, np.asarray(scored_ids))))

        def writer(kept: Selection, part: str) -> Callable[[str, Path], Any]:
            is_part = np.isin(data.ids, np.asarray(kept.ids), invert=part == "dropped")
            positions = np.flatnonzero(is_part)  # a subset has its rows: made when it is written
            if not positions.size:
                name = Cell(kept.method, kept.keep_fraction, kept.split, kept.seed).name
                raise expect.InputError(f"{name}: nothing is {part}, so there is nothing to write.")
            return lambda form, path: INSTRUCTION_EXPORTS[form].write(data.subset(positions), path)

        return export_steps(self._config, root, kept, rows, writer)

    def training(self, workspace: Workspace) -> Training:
        config = self._config
        data, model = self.load(config.dataset.train), self.model
        if "score" not in config.stages:  # which has said it
            self._say(f"data: {data.summary}")
        max_length = model.max_length(config.encoder.max_length)
        fingerprint = model.fingerprint  # of all processes, where they share the weights
        scored = scored_encoder(workspace.root, fingerprint)
        if scored not in (None, model.name):  # of the same name, it is read in another type
            self._say(f"finetune: note: the model is {model.name}; the scores are of {scored}")

        def tokenised(data: Instructions, *, cut: bool = False) -> Tokenised:
            return _tokenised(config, data, model.tokenizer, max_length, cut=cut)

        def make_trainer() -> LoraTuner:
            test = config.dataset.test
            return LoraTuner(
                model,
                tokenised(data, cut=config.conventions.reads_as_released),
                config.lora,
                test=None if test is None else tokenised(self.load(test)),
                max_length=max_length,
                tokens_per_batch=config.probe.tokens_per_batch,
                progress=True,
            )

        settings = config.to_dict()
        made_with = {name: settings[name] for name in ("dataset", "encoder", "lora")}
        made_with["encoder_fingerprint"] = fingerprint
        return Training(data, fingerprint, make_trainer, made_with, facts=dict)

    def plan(self, mesh: MeshSize) -> Plan:
        config = self._config
        weights, test = config.encoder.weights, config.dataset.test
        if self._converted:
            raise expect.InputError(
                f"plan: memory and time of converted models are not known; expected encoder.name "
                f"{language_model.DECODER}, got {config.encoder.name}."
            )
        sizes = instruction_plan.model_sizes(weights)
        plan = functools.partial(instruction_plan.plan_of_instructions, config, sizes, mesh)
        try:
            data = self.load(config.dataset.train)
            num_test = 0 if test is None else len(self.load(test))
        except expect.InputError as error:  # a model can be planned for before there are data
            self._say(f"note: no passes and no time, since there are no data: {error}")
            return plan(None)
        is_here = instruction_plan.is_local(weights)
        tokenizer = language_model.load_tokenizer(weights) if is_here else None
        max_length = language_model.longest_sequence(sizes, weights, config.encoder.max_length)
        if config.conventions.reads_as_released:
            max_length = max(max_length, sizes.max_length)
        lengths = instruction_plan.Lengths.of(data, tokenizer, max_length)
        costs = instruction_plan.InstructionCosts
        return plan(costs(config, sizes, mesh, len(data), num_test, lengths))
