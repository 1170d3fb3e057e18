"""The stages in order; what is on disk and still valid is not done again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax import artefacts, checks, lease, provenance, reports
from dlc_jax.agreement import agree, agree_on_images
from dlc_jax.artefacts import ScoredSamples
from dlc_jax.config import Config, DatasetConfig
from dlc_jax.datasets.files import left_out_text
from dlc_jax.distributed import processes
from dlc_jax.distributed.processes import on_first
from dlc_jax.escaping import show, visible
from dlc_jax.export_stage import check_has_forms, check_takes_forms, run_exports
from dlc_jax.instructions_stage import (
    READABLE,
    check_has_forms_instructions,
    run_exports_instructions,
    run_score_instructions,
)
from dlc_jax.lora_stage import (
    check_before_scoring,
    run_evaluate,
    run_finetune_instructions,
)
from dlc_jax.plan_stage import run_plan
from dlc_jax.score_stage import (
    Load,
    check_scores_are_whole,
    dataset_facts,
    load_configured,
    mid_grey_note,
    run_score,
)
from dlc_jax.select_stage import run_select
from dlc_jax.selection import Cell
from dlc_jax.selection_inputs import SelectionInputs
from dlc_jax.sweep import run_sweep
from dlc_jax.sweep_results import note_on_chance, what_is_finished
from dlc_jax.training import Finetuner, class_ids_by_name
from dlc_jax.tune_stage import run_tune
from dlc_jax.types import Dataset, Selection
from dlc_jax.what_was_scored import check_names_what_was_scored


class _Sources:
    """Data sets by source, loaded once: stages share them, and their fingerprints."""

    def __init__(self, settings: DatasetConfig, echo: Callable[[str], None]) -> None:
        self._settings, self._echo = settings, echo
        self._found: dict[str, Dataset] = {}
        self._shared: set[str] = set()

    def __call__(self, source: str) -> Dataset:
        if source not in self._found:
            self._found[source] = dataset = self._settings.load(source)
            if dataset.left_out:
                self._echo(f"{source}: left out: {left_out_text(dataset.left_out)}")
            if dataset.empty_classes:
                names = checks.listed(map(repr, dataset.empty_classes))
                self._echo(f"{source}: note: classes without samples, left out: {names}")
        return self._found[source]

    def together(self, source: str) -> Dataset:
        """Returns the data set in all processes at once, which must see the same samples."""
        dataset = self(source)
        if source not in self._shared:
            agree_on_images(dataset)
            self._shared.add(source)
        return dataset


def run(config: Config, workdir: Path, echo: Callable[[str], None] = show) -> None:
    """Runs `config.stages` and leaves their artefacts in the work directory.

    All processes of a run call this. The first one tells the user, and writes; the others take part
    in scoring and training.

    Args:
      config: Checked configuration.
      workdir: Made if need be.
      echo: Takes each line meant for the user.
    Raises:
      ValueError: anything wrong with the work directory, data, encoder or configuration.
    """
    if not processes.is_first():
        echo = _say_nothing
    if "plan" in config.stages:
        on_first(lambda: run_plan(config, echo))
        if config.stages == ("plan",):
            return
        rest = tuple(stage for stage in config.stages if stage != "plan")
        config = dataclasses.replace(config, stages=rest)
    if {"score", "finetune", "evaluate"} & set(config.stages):
        config.mesh.make()
    on_first(lambda: check_takes_forms(config, workdir))
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(lease.held(lease.place_of(workdir), echo)))
        _run_stages(config, workdir, echo)


def _run_stages(config: Config, workdir: Path, echo: Callable[[str], None]) -> None:
    """Runs the stages in a work directory that nobody else writes to."""
    on_first(lambda: artefacts.prepare_workdir(workdir))
    load = _Sources(config.dataset, echo)
    # a mistake in what comes later should not cost a scoring pass first
    if "export" in config.stages:
        on_first(lambda: _check_exports(config, workdir, load))
    if config.is_of_instructions:
        check_before_scoring(config)
    elif "finetune" in config.stages:
        class_ids_by_name(load.together(_test_source(config)), load.together(config.dataset.train))
    resolved = config
    if "score" in config.stages:
        if config.is_of_instructions:
            run_score_instructions(config, workdir, echo)
        else:
            resolved = run_score(config, workdir, load.together, echo)
    failures = []
    if config.stages == ("report",):
        on_first(lambda: check_names_what_was_scored(config, workdir, load, echo))
    else:
        with _report_of_these_results(workdir):
            failures = _use_scores(config, resolved.to_dict(), workdir, load, echo)
    if "report" in config.stages:
        on_first(lambda: _report_if_it_can(config, workdir, bool(failures), echo))
    if failures:
        raise checks.SharedError(f"{len(failures)} runs failed: {checks.joined(failures, '; ')}")


def _check_exports(config: Config, workdir: Path, load: Load) -> None:
    if config.is_of_instructions:
        check_has_forms_instructions(config)
    else:
        check_has_forms(config, workdir, load(config.dataset.train))


def _say_nothing(line: str) -> None:
    """Takes the lines of processes other than the first."""


def _report_if_it_can(
    config: Config, workdir: Path, failed: bool, echo: Callable[[str], None]
) -> None:
    try:
        _report(config, workdir, echo)
    except checks.InputError as error:
        if not failed:
            raise
        echo(f"report: {error}")


@contextlib.contextmanager
def _report_of_these_results(workdir: Path) -> Iterator[None]:
    """Deletes the report if the results change meanwhile: it tells of other runs."""
    before = artefacts.read_bytes(workdir / artefacts.RESULTS)
    try:
        yield
    finally:
        changed = artefacts.read_bytes(workdir / artefacts.RESULTS) != before
        if changed and processes.is_first():
            artefacts.remove(workdir / artefacts.REPORT)


def _use_scores(
    config: Config,
    settings: dict[str, Any],
    workdir: Path,
    load: _Sources,
    echo: Callable[[str], None],
) -> list[str]:
    """Runs what starts from scores on disk; returns a line for every run that failed.

    What scoring resolved is for `config.json`: another encoder may be fine-tuned than was scored.
    """
    known = on_first(lambda: _until_exports(config, settings, workdir, load, echo))
    failures = []
    if "finetune" in config.stages:
        if config.is_of_instructions:
            failures = run_finetune_instructions(config, workdir, known, echo)
        else:
            failures = _finetune(config, workdir, known, load.together, echo)
    if "evaluate" in config.stages:
        run_evaluate(config, workdir, echo)
    return failures


def _until_exports(
    config: Config,
    settings: dict[str, Any],
    workdir: Path,
    load: Load,
    echo: Callable[[str], None],
) -> SelectionInputs:
    """Runs what one process does: tunes, selects, tells of it and exports."""
    check_scores_are_whole(workdir)
    samples = artefacts.read_scores(workdir)
    if "score" not in config.stages:  # the rest of the file still describes the scores
        check_names_what_was_scored(config, workdir, load, echo)
        others = {"seed", "dataset", "encoder", "cache", "probe", "record", "mesh"}
        if "finetune" not in config.stages:
            others |= {"finetune", "lora"}
        if "evaluate" not in config.stages:
            others |= {"evaluation"}
        mine = {key: value for key, value in settings.items() if key not in others}
        found = artefacts.read_json(workdir / artefacts.CONFIG, {"dataset?": dict})
        if "finetune" in config.stages and "dataset" in found:
            mine["dataset"] = found["dataset"] | {"test": config.dataset.test}
        settings |= found | mine
    artefacts.write_json(workdir / artefacts.CONFIG, settings)
    tuning = None
    if "tune" in config.stages or ("select" in config.stages and config.need.tuning):
        tuning = run_tune(config, workdir, samples, load, echo)
    known, shown = SelectionInputs(config, workdir, samples, tuning), None
    if "select" in config.stages:
        shown = run_select(config, workdir, known, echo)
    if "score" in config.stages or "select" in config.stages:
        _summarise(workdir, samples, shown, config.is_of_instructions, echo)
    if "export" in config.stages:
        if config.is_of_instructions:
            run_exports_instructions(config, workdir, known, echo)
        else:
            run_exports(config, workdir, known, load(config.dataset.train), echo)
    return known


def _test_source(config: Config) -> str:
    assert config.dataset.test is not None  # checked with the configuration
    return config.dataset.test


def _finetune(
    config: Config,
    workdir: Path,
    known: SelectionInputs | None,
    load: Load,
    echo: Callable[[str], None],
) -> list[str]:
    """Returns a line for every run that failed."""
    encoder = load_configured(config, None if "score" in config.stages else echo)
    agree({f"encoder.weights {config.encoder.weights}": encoder.fingerprint})
    scored = provenance.scored_encoder(workdir, encoder.for_mode(config.mode).fingerprint)
    if scored is not None:
        tuned = f"{config.encoder.name} {config.encoder.weights}"
        echo(f"finetune: note: the encoder is {tuned}; the scores are of {scored}")
    dataset, test = load(config.dataset.train), load(_test_source(config))
    make_tuner = functools.partial(
        Finetuner,
        encoder,
        dataset,
        test,
        config.finetune,
        image_size=config.encoder.image_size,
        mode=config.mode,
        on_corrupt=config.dataset.on_corrupt,
        cache=config.cache,
        mesh=config.mesh.make(),
        progress=processes.is_first(),
    )
    end = run_sweep(config, workdir, known, dataset, make_tuner, echo)
    if known is None:
        return end.failures
    settings = config.to_dict()
    made_with = {key: settings[key] for key in ("mode", "dataset", "encoder", "finetune")}
    made_with |= {"encoder_fingerprint": encoder.for_mode(config.mode).fingerprint}
    made_with |= {"test_fingerprint": test.fingerprint}
    if test.mid_grey:
        echo(mid_grey_note("finetune", sorted(test.mid_grey)))
    inputs = artefacts.json_hash([made_with, settings["selection"], known.samples.fingerprint])
    paths = [Path(artefacts.RESULTS)]
    facts = {"test_dataset": dataset_facts(test)}
    provenance.record(workdir, "finetune", inputs, paths, end.seconds, facts, made_with)
    echo(f"files: {workdir}/ ({artefacts.RESULTS}, {artefacts.FINETUNE}/)")
    return end.failures


def _report(config: Config, workdir: Path, echo: Callable[[str], None]) -> None:
    """Prints and saves what `results.csv` says."""
    seconds = provenance.pruning_seconds(workdir)
    results = [
        result._replace(pruning_seconds=seconds.get(Cell(*result[:4]).name, math.nan))
        for result in reports.read_results(workdir / artefacts.RESULTS)
    ]
    rows = reports.summarise(results)
    table, said = reports.results_table(rows), what_is_finished(config, workdir)
    if note := note_on_chance(workdir):
        said += f"\n\n{note}"
    echo(f"\n{said}\n\n{table}\n")
    with artefacts.atomic(workdir / artefacts.REPORT / "results.md", "w") as file:
        file.write(f"{said}\n\n{table}\n")
    if all(row.gap is None for row in rows):
        echo("report: no figure: there is no gap to random; add random to selection.methods")
        return
    shape = {"dataset": {"train": str}, "encoder": {"name": str}}
    trained = provenance.settings_of(workdir, "finetune", shape) or config.to_dict()
    title = f"{trained['dataset']['train']}, {trained['encoder']['name']}"
    figure = reports.gap_to_random(rows, title)
    for kind in ("png", "svg"):
        with artefacts.atomic(workdir / artefacts.REPORT / f"gap_to_random.{kind}") as file:
            figure.savefig(file, format=kind, dpi=150)
    echo(f"files: {workdir}/{artefacts.REPORT}/ (results.md, gap_to_random.png, .svg)")


def _summarise(
    workdir: Path,
    samples: ScoredSamples,
    shown: Selection | None,
    is_of_instructions: bool,
    echo: Callable[[str], None],
) -> None:
    indices = None
    echo("")
    if shown is not None:
        indices = shown.indices
        cell = Cell(shown.method, shown.keep_fraction, shown.split, shown.seed)
        chosen = "" if shown.chosen is None else f" ({shown.chosen.label})"
        echo(f"kept as in selections/{cell.name}{chosen}:")
    echo(
        reports.class_table(
            samples.class_names, samples.labels, samples.scores["dlc"], samples.ids, indices
        )
    )
    echo("")
    sizes = np.bincount(samples.labels, minlength=len(samples.class_names))
    singles = [samples.class_names[j] for j in np.flatnonzero(sizes == 1)]
    if singles:
        names = checks.listed(map(visible, singles))
        echo(f"classes of one sample (in mode 'default' always kept): {names}")
    known = provenance.read(workdir)
    skipped = known.get("dataset", {}).get("skipped", {})
    if skipped:
        kind = "" if is_of_instructions else "unreadable "
        echo(f"{kind}samples left out: {len(skipped)}, listed in {artefacts.PROVENANCE}")
    stages = known.get("stages", {})
    parts = ("score", "features", "training", "tune", "select")
    seconds = {name: stages[name]["seconds"] for name in parts if name in stages}
    echo(
        "seconds, when last run: "
        + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    )
    picture = READABLE if is_of_instructions else artefacts.PICTURE
    echo(f"files: {workdir}/ ({artefacts.SCORES}, {picture}, selections/)")
