"""The stage `export`: every selected cell in the forms asked for, below `exports/`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dlc_jax import artefacts, provenance
from dlc_jax.artefacts import ScoredSamples
from dlc_jax.config import Config
from dlc_jax.datasets import load_dataset
from dlc_jax.exports import EXPORTS, export


def run_exports(
    config: Config, workdir: Path, samples: ScoredSamples, echo: Callable[[str], None]
) -> None:
    """Writes `exports/<method>/<cell>/<part><suffix>`, each whole or not there at all.

    Raises:
      ValueError: data that are not those that were scored, a selection that is not there, a sample
        that cannot be read.
    """
    dataset = load_dataset(config.dataset.train)
    provenance.check_is_what_was_scored(workdir, dataset)
    cells = config.selection.cells()
    for method, keep_fraction, split, seed in cells:
        kept = artefacts.read_selection(
            workdir,
            samples,
            method=method,
            keep_fraction=keep_fraction,
            split=split,
            seed=seed,
            mode=config.mode,
        )
        cell = artefacts.cell_name(keep_fraction, split, seed)
        folder = workdir / artefacts.EXPORTS / method / cell
        for form in config.export.forms:
            for part in config.export.parts:
                path = folder / f"{part}{EXPORTS[form].suffix}"
                export(dataset, kept, path, form=form, part=part, overwrite=True)
    num_each = len(config.export.forms) * len(config.export.parts)
    echo(f"export: {len(cells) * num_each} exports of {len(cells)} selections written")
    echo(f"files: {workdir / artefacts.EXPORTS}/")
