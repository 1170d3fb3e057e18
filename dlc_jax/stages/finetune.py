"""The stage `finetune`: a run per selected cell, of images or of instructions."""

from __future__ import annotations

import functools

from dlc_jax.config import Config
from dlc_jax.distributed import Run, processes
from dlc_jax.encoders.huggingface import read_config
from dlc_jax.encoders.language_model import (
    MODEL_FILES,
    LanguageModel,
    load_language_model,
    load_tokenizer,
    longest_sequence,
    model_folder,
)
from dlc_jax.preprocess.tokens import Tokenised, check_vocabulary, tokenise
from dlc_jax.stages.agreement import agree, agree_on_files, agree_on_instructions
from dlc_jax.stages.job import Job
from dlc_jax.stages.measurements import dataset_facts, mid_grey_note
from dlc_jax.stages.score import Load, load_configured
from dlc_jax.stages.score_instructions import load_configured_instructions
from dlc_jax.stages.selection_inputs import SelectionInputs
from dlc_jax.stages.sweep import run_sweep
from dlc_jax.stages.sweep_results import (
    BASE_CELL,
)
from dlc_jax.stages.what_was_scored import scored_encoder
from dlc_jax.training.images import Finetuner
from dlc_jax.training.lora.tuner import LoraTuner
from dlc_jax.workspace import Workspace, artefacts, records


def source_of_test_set(config: Config) -> str:
    """Returns the source of the test set, which fine-tuning of images needs."""
    assert config.dataset.test is not None  # checked with the configuration
    return config.dataset.test


def run(job: Job) -> None:
    """Fine-tunes on every cell; adds a line to `job.failures` for each run that fails."""
    config, workspace, known = job.config, job.workspace, job.known
    if config.is_of_instructions:
        job.failures += run_finetune_instructions(config, workspace, known)
    else:
        job.failures += run_finetune(config, workspace, known, job.load_together)


def run_finetune(
    config: Config, workspace: Workspace, known: SelectionInputs | None, load: Load
) -> list[str]:
    """Fine-tunes the encoder on every selected cell and on the whole set.

    Leaves `finetune/<method>/<cell>/` and `results.csv`.

    Returns:
      A line for every run that failed.
    Raises:
      ValueError: see `run_sweep`.
    """
    workdir, echo = workspace
    encoder = load_configured(config, None if "score" in config.stages else echo)
    agree({f"encoder.weights {config.encoder.weights}": encoder.fingerprint})
    scored = scored_encoder(workdir, encoder.for_mode(config.mode).fingerprint)
    if scored is not None:
        tuned = f"{config.encoder.name} {config.encoder.weights}"
        echo(f"finetune: note: the encoder is {tuned}; the scores are of {scored}")
    dataset, test = load(config.dataset.train), load(source_of_test_set(config))
    make_tuner = functools.partial(
        Finetuner,
        encoder,
        config.images(dataset),
        test,
        config.finetune,
        config.conventions,
        Run(None, config.mesh.make(), progress=True),
    )
    end = run_sweep(config, workspace, known, dataset, make_tuner)
    settings = config.to_dict()
    made_with = {key: settings[key] for key in ("mode", "dataset", "encoder", "finetune")}
    made_with |= {"encoder_fingerprint": encoder.for_mode(config.mode).fingerprint}
    made_with |= {"test_fingerprint": test.fingerprint}
    if test.mid_grey:
        echo(mid_grey_note("finetune", sorted(test.mid_grey)))
    workspace.note("finetune", made_with, end.seconds, {"test_dataset": dataset_facts(test)})
    echo(f"files: {workdir}/ ({artefacts.RESULTS}, {artefacts.FINETUNE}/)")
    return end.failures


def check_instructions(config: Config) -> None:
    """Raises ValueError where what comes after scoring would fail: that costs a pass first."""
    if {"score", "finetune", "evaluate"} & set(config.stages) and processes.count() > 1:
        agree_on_files(model_folder(config.encoder.weights), MODEL_FILES)
    if {"score", "finetune"} & set(config.stages) and processes.count() > 1:
        agree_on_instructions(load_configured_instructions(config, config.dataset.train))
    if "finetune" in config.stages and config.dataset.test is not None:
        weights = config.encoder.weights
        sizes = read_config(model_folder(weights))
        max_length = longest_sequence(sizes, weights, config.encoder.max_length)
        data = load_configured_instructions(config, config.dataset.test)
        agree_on_instructions(data)
        on_corrupt = config.dataset.on_corrupt
        tokenizer = load_tokenizer(weights)
        tokens = tokenise(data, tokenizer, max_length, on_corrupt=on_corrupt)
        check_vocabulary(tokens.named, sizes.vocab_size, tokenizer.convert_ids_to_tokens)


def run_finetune_instructions(
    config: Config, workspace: Workspace, known: SelectionInputs | None
) -> list[str]:
    """Trains an adapter on every selected cell and on the whole set.

    Leaves `finetune/<method>/<cell>/adapter/` and `results.csv`.

    Returns:
      A line for every run that failed.
    Raises:
      ValueError: see `run_sweep`.
    """
    workdir, echo = workspace
    data = load_configured_instructions(config, config.dataset.train)
    model = load_model(config)
    max_length = model.max_length(config.encoder.max_length)
    fingerprint = model.fingerprint  # of all processes, where they share the weights
    workspace.alone(lambda: _set_other_base_aside(workspace, fingerprint))
    scored = scored_encoder(workdir, fingerprint)
    if scored not in (None, model.name):  # of the same name, it is read in another type
        echo(f"finetune: note: the model is {model.name}; the scores are of {scored}")

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
            tokens_per_batch=config.probe.tokens_per_batch,
            progress=True,
        )

    end = run_sweep(config, workspace, known, data, make_tuner)
    settings = config.to_dict()
    made_with = {key: settings[key] for key in ("dataset", "encoder", "lora")}
    made_with |= {"encoder_fingerprint": model.fingerprint}
    workspace.note("finetune", made_with, end.seconds)
    echo(f"files: {workdir}/ ({artefacts.RESULTS}, {artefacts.FINETUNE}/)")
    return end.failures


def load_model(config: Config) -> LanguageModel:
    """Loads the model over all devices of all processes."""
    weights, dtype = config.encoder.weights, config.lora.dtype
    return load_language_model(weights, dtype=dtype, mesh=config.mesh.make())


def _set_other_base_aside(workspace: Workspace, fingerprint: str) -> None:
    """Sets aside the answers of another model before it was fine-tuned."""
    record = records.read(workspace.root, f"{artefacts.EVALUATE}/{BASE_CELL.name}")
    if record is not None and record.key.get("run") != fingerprint:
        workspace.set_aside(record)
