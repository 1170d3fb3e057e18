"""`hf:` data sets of the Hugging Face hub, or local copies of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlc_jax import expect
from dlc_jax.datasets.labels import Columns
from dlc_jax.datasets.tables import ArrowTable, Table, from_tables, open_parquet
from dlc_jax.files.hub import fetching
from dlc_jax.types import Dataset

_CONVERTED = "refs/convert/parquet"


def load_hf(where: str, columns: Columns) -> Dataset:
    """Loads `<owner/name or folder>/<split>`; parts are joined by `+`, as in `train+validation`.

    A folder is what `datasets.save_to_disk` wrote, or a copy of a repository with its Parquet
    files, whose names hold the split (`data/train-00000-of-00002.parquet`, `train/0000.parquet`).

    Raises:
      ValueError: see `open_hf`; no image or label column.
    """
    return from_tables(f"hf:{where}", open_hf(where), columns)


def open_hf(where: str) -> list[Table]:
    """Returns the tables of a data set, see `load_hf`.

    Raises:
      ValueError: nothing there, the hub cannot be reached, no file of a split, or files of it in
        several configurations.
    """
    source = f"hf:{where}"
    place, _, splits = where.rpartition("/")
    if not place or not splits:
        raise expect.InputError(f"{source}: expected hf:<owner/name or folder>/<split>.")
    folder = Path(place).expanduser()
    tables: list[Table] = []
    for split in splits.split("+"):
        if folder.is_dir():
            tables += _local(source, folder, split)
        elif expect.is_hub_id(place):
            tables += open_parquet(_download(source, place, split))
        else:
            raise expect.InputError(
                f"{source}: no folder {place!r}, and that is no hub id (owner/name) either."
            )
    return tables


def _local(source: str, folder: Path, split: str) -> Sequence[Table]:
    if (folder / split / "state.json").is_file():
        return _saved(source, folder / split, None)
    if (folder / "state.json").is_file():  # one split saved on its own
        return _saved(source, folder, split)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.parquet"))]
    if found := _files_of(source, names, split):
        return open_parquet(folder / name for name in found)
    raise expect.InputError(
        f"{source}: no Parquet file of split {split!r} in {folder} "
        f"(found {expect.listed(names) or 'none'})."
    )


def _saved(source: str, folder: Path, split: str | None) -> list[ArrowTable]:
    """Returns what `save_to_disk` wrote; other Arrow files there are results that it cached."""
    problem = f"{source}: {folder / 'state.json'} does not say which Arrow files are the data"
    kinds = OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError
    with expect.refusing(problem, *kinds, shown=expect.first_line):
        state = json.loads((folder / "state.json").read_bytes())
        names = [file["filename"] for file in state["_data_files"]]
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"names the files {names}")
        _refuse_changes(source, folder / "state.json", state)
    held = state.get("_split")
    if split is not None and held not in (None, split):
        raise expect.InputError(f"{source}: {folder} holds the split {held!r}, not {split!r}.")
    return [ArrowTable.open(folder / name) for name in names]


def _refuse_changes(source: str, path: Path, state: dict[str, Any]) -> None:
    """Raises ValueError for changes that `datasets` 1.x makes to the files when it loads them."""
    found = [name for name in ("_indices_data_files", "_indices_files") if state.get(name)]
    if any(file.keys() & {"skip", "take"} for file in state["_data_files"]):
        found.append("skip and take in _data_files")
    if any(step.get("transforms") for step in state.get("_inplace_history") or []):
        found.append("_inplace_history")
    if found:
        raise expect.InputError(
            f"{source}: {path} has {', '.join(found)}: the rows are a selection or a changed "
            "version of the Arrow files, which is not read. Load it with `datasets`, call "
            "flatten_indices() and save it again."
        )


def _files_of(source: str, names: Sequence[str], split: str) -> list[str]:
    """Returns the files of a split, in sorted order; ValueError if several data sets have some."""
    named = rf"(.*/)?{re.escape(split)}([-.][^/]*|_\d+|/[^/]*)?\.parquet"  # it, or its folder
    found = sorted(name for name in names if re.fullmatch(named, name, re.DOTALL))
    folders = {f"/{name}".rpartition("/")[0].removesuffix(f"/{split}") for name in found}
    if len(folders) > 1:
        shown = expect.listed(repr(folder[1:]) for folder in sorted(folders))
        raise expect.InputError(
            f"{source}: files of split {split!r} are in several folders ({shown}), which may be "
            "configurations of it; expected one. Give a local copy of that folder, as in "
            f"hf:<copy>/<folder>/{split}."
        )
    return found


def _download(source: str, repository: str, split: str) -> list[Path]:
    with fetching(
        f"{source}: {repository!r} is neither a local folder nor could it be",
        "Without network: on a machine that has it, download "
        f"https://huggingface.co/datasets/{repository} (revision {_CONVERTED} if it has no Parquet "
        "files), bring the folder here and give hf:<folder>/<split>.",
    ) as hub:
        for revision in (None, _CONVERTED):  # the hub converts what its owners did not
            where = {"repo_type": "dataset", "revision": revision}
            if found := _files_of(source, hub.list_repo_files(repository, **where), split):
                return [Path(hub.hf_hub_download(repository, name, **where)) for name in found]
    raise expect.InputError(f"{source}: {repository} has no Parquet file of split {split!r}.")
