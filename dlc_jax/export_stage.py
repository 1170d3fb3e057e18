"""The stage `export`: every selected cell in the forms asked for, below `exports/`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dlc_jax import artefacts, provenance, selection_files
from dlc_jax.artefacts import ScoredSamples
from dlc_jax.config import Config
from dlc_jax.exports import EXPORTS, export
from dlc_jax.types import Dataset


def run_exports(
    config: Config,
    workdir: Path,
    samples: ScoredSamples,
    dataset: Dataset,
    echo: Callable[[str], None],
) -> None:
    """Writes `exports/<method>/<cell>/<part><suffix>`, each whole or not there at all.

    Raises:
      ValueError: data that are not those that were scored, a selection that is not there, a sample
        that cannot be read.
    """
    provenance.check_is_what_was_scored(workdir, dataset)
    cells = config.selection.cells()
    for method, keep_fraction, split, seed in cells:
        kept = selection_files.read_selection(
            workdir,
            samples,
            method=method,
            keep_fraction=keep_fraction,
            split=split,
            seed=seed,
            mode=config.mode,
        )
        cell = selection_files.cell_name(keep_fraction, split, seed)
        folder = workdir / artefacts.EXPORTS / method / cell
        for form in config.export.forms:
            for part in config.export.parts:
                path = folder / f"{part}{EXPORTS[form].suffix}"
                export(dataset, kept, path, form=form, part=part, overwrite=True)
    num_each = len(config.export.forms) * len(config.export.parts)
    echo(f"export: {len(cells) * num_each} exports of {len(cells)} selections written")
    echo(f"files: {workdir / artefacts.EXPORTS}/")
