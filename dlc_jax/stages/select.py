"""The stage `select`: a kept subset for every cell, below `selections/`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from dlc_jax.config import Config
from dlc_jax.selection import AUTO, SELECTORS
from dlc_jax.stages import selection_files
from dlc_jax.stages.selection_inputs import SelectionInputs
from dlc_jax.types import Selection
from dlc_jax.version import __version__
from dlc_jax.workspace import artefacts, provenance


def run_select(
    config: Config, workdir: Path, known: SelectionInputs, echo: Callable[[str], None]
) -> Selection:
    """Writes every cell; returns the one the summary shows, the middle one of the first method.

    Args:
      config: Checked configuration.
      workdir: Where `selections/` goes.
      known: What the methods use.
      echo: Takes each line meant for the user.
    Raises:
      ValueError: something that a method needs is missing.
    """
    start = time.perf_counter()
    cells = config.selection.cells()
    made_from = {method: known.fingerprint(method) for method in config.selection.methods}
    how = [known.how(cell) for cell in cells]
    facts = [__version__, config.mode, cells, made_from, how]
    inputs = artefacts.json_hash(facts)
    _tell_of_another_mode(config, workdir, echo)
    there = [path.name for path in (workdir / "selections").glob("*")]
    all_known = known.fingerprints(name for name in there if name in (*SELECTORS, AUTO))
    num_aside = selection_files.set_superseded_aside(workdir, all_known, config.mode, known.how)
    if num_aside:
        others = "of other scores or mode moved to superseded/, or made with other settings"
        echo(f"select: {num_aside} selections {others}")
    of_first = [cell for cell in cells if cell[0] == config.selection.methods[0]]
    shown = of_first[len(of_first) // 2]
    files = [file for cell in cells for file in selection_files.files_of(cell)]
    if provenance.is_done(workdir, "select", inputs, files):
        echo("select: unchanged, not run again")
        return known.select(shown)
    paths, seconds_for = [], provenance.pruning_seconds(workdir)
    to_show: Selection | None = None  # the others would be 171 times the samples
    bare: set[float] = set()  # keep fractions already noted
    for cell, of_cell in zip(cells, how, strict=True):
        method, keep_fraction, *_ = cell
        before = time.perf_counter()
        selected = known.select(cell)
        to_show = selected if cell == shown else to_show
        selecting = time.perf_counter() - before
        earlier = provenance.seconds(workdir, known.stages(cell))
        seconds_for[cell.name] = round(selecting + earlier, 3)
        also = {"how": of_cell, "scores_fingerprint": made_from[method]}
        paths += selection_files.write_selection(workdir, selected, known.samples, also)
        num_lost = int((selected.num_kept_per_class == 0).sum())
        if num_lost and keep_fraction not in bare:
            bare.add(keep_fraction)
            echo(
                f"select: note: keep fraction {keep_fraction:g} keeps nothing of {num_lost} of "
                f"{len(known.samples.class_names)} classes (budgets are rounded in every class; "
                "selection.min_per_class=1 keeps one)"
            )
    told = {"pruning_seconds": seconds_for}
    made_with = {"mode": config.mode, "selection": config.to_dict()["selection"]}
    seconds = time.perf_counter() - start
    provenance.record(workdir, "select", inputs, paths, seconds, told, made_with)
    echo(f"select: {len(cells)} selections written")
    assert to_show is not None
    return to_show


def _tell_of_another_mode(config: Config, workdir: Path, echo: Callable[[str], None]) -> None:
    scored = (provenance.settings_of(workdir, "score", {}) or {}).get("mode", config.mode)
    if scored != config.mode:
        echo(f"select: note: in mode {config.mode!r}, from scores of mode {scored!r}")
