"""`hf:` data sets of the Hugging Face hub, or local copies of them."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa

from dlc_jax import checks
from dlc_jax.datasets.parquet import from_tables, read_parquet
from dlc_jax.types import Dataset

_CONVERTED = "refs/convert/parquet"


def load_hf(where: str) -> Dataset:
    """Loads `<owner/name or folder>/<split>`; parts are joined by `+`, as in `train+validation`.

    A folder is what `datasets.save_to_disk` wrote, or a copy of a repository with its Parquet
    files; their names tell the split (`data/train-00000-of-00002.parquet`, `train/0000.parquet`).

    Raises:
      ValueError: nothing there, the hub cannot be reached, no file of a split, or no image or
        label column.
    """
    source = f"hf:{where}"
    place, _, splits = where.rpartition("/")
    if not place or not splits:
        raise checks.InputError(f"{source}: expected hf:<owner/name or folder>/<split>.")
    folder = Path(place).expanduser()
    tables = []
    for split in splits.split("+"):
        if folder.is_dir():
            tables += _local(source, folder, split)
        elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place):
            tables += [read_parquet(file) for file in _download(source, place, split)]
        else:
            raise checks.InputError(
                f"{source}: no folder {place!r}, and that is no hub id (owner/name) either."
            )
    return from_tables(source, tables)


def _local(source: str, folder: Path, split: str) -> list[pa.Table]:
    saved = folder / split if (folder / split / "state.json").is_file() else None
    if saved is None and (folder / "state.json").is_file():  # one split saved on its own
        saved = folder
    if saved is not None:
        return [_read_arrow(file) for file in sorted(saved.glob("*.arrow"))]
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.parquet"))]
    found = [name for name in names if _is_of(name, split)]
    if not found:
        raise checks.InputError(
            f"{source}: no Parquet file of split {split!r} in {folder} "
            f"(found {', '.join(names[:10]) or 'none'})."
        )
    return [read_parquet(folder / name) for name in found]


def _is_of(name: str, split: str) -> bool:
    """Whether a file belongs to a split by its name or by the name of its folder."""
    folder, _, file = name.rpartition("/")
    in_name = re.fullmatch(rf"{re.escape(split)}([-_.].*)?\.parquet", file) is not None
    return in_name or folder.rpartition("/")[2] == split


def _read_arrow(file: Path) -> pa.Table:
    try:
        return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise checks.InputError(f"{file}: not a readable Arrow file: {error}.") from error


def _download(source: str, repository: str, split: str) -> list[Path]:
    import huggingface_hub  # only when a hub id is used: the import costs half a second

    try:
        for revision in (None, _CONVERTED):  # the hub converts what its owners did not
            names = huggingface_hub.list_repo_files(
                repository, repo_type="dataset", revision=revision
            )
            found = sorted(name for name in names if _is_of(name, split))
            if found:
                return [
                    Path(
                        huggingface_hub.hf_hub_download(
                            repository, name, repo_type="dataset", revision=revision
                        )
                    )
                    for name in found
                ]
    except Exception as error:  # its errors for no network, no such id and no access vary
        raise checks.InputError(
            f"{source}: {repository!r} is neither a local folder nor could it be fetched from the "
            f"Hugging Face hub ({checks.first_line(error)}). Without network: on a machine that "
            f"has it, download https://huggingface.co/datasets/{repository}, bring the folder here "
            "and give hf:<folder>/<split>."
        ) from error
    raise checks.InputError(f"{source}: {repository} has no Parquet file of split {split!r}.")
