"""What the processes of a run must have in common, compared before anything is computed.

A run of one process has nothing to compare: nothing is read for it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dlc_jax import expect
from dlc_jax.config import Config
from dlc_jax.datasets.instructions import Instructions
from dlc_jax.distributed import processes
from dlc_jax.types import ROWS_OF_DIGEST, Dataset, file_of
from dlc_jax.workspace import artefacts

_FEW_BLOCKS = 64  # of a data set that every process reads all of
_READERS = 2  # processes that read a sample of a larger one


def agree(facts: Mapping[str, Any], of: str = "") -> None:
    """Raises ValueError, in all processes, unless each passes the same values.

    Args:
      facts: What JSON can hold, by the name that the user knows.
      of: What they are facts of, for the message; its name may differ between processes.
    """
    texts = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
    first, *others = processes.everyones(texts)
    for number, theirs in enumerate(others, start=1):
        for name in [*first, *theirs]:
            if (mine := first.get(name)) != (other := theirs.get(name)):
                processes.refuse(
                    f"{of}{name}: process {number} has {expect.shortened(other or 'none')}, process"
                    f" 0 has {expect.shortened(mine or 'none')}; expected the same in all "
                    "processes."
                )


def agree_on_settings(config: Config, workdir: str) -> None:
    """Raises ValueError unless all processes have the same settings, code and work directory."""
    settings, versions = _flat(config.to_dict(), "config."), artefacts.versions()
    # the cache is a machine's own
    facts = {name: settings[name] for name in settings if not name.startswith("config.cache.")}
    facts |= {f"version of {name}": versions[name] for name in ("dlc_jax", "jax")}
    agree({"workdir": workdir} | facts)


def agree_on_images(dataset: Dataset) -> None:
    """Raises ValueError unless all processes see the same samples.

    Ids, labels and sizes of files are compared by all. Images are read by two processes each, of a
    small set by all, so that reading a large one is divided among them. Of several processes, all
    then have the fingerprint without reading anything else.
    """
    if processes.count() == 1:
        return
    agree({"class names": dataset.class_names}, f"{dataset.name}: ")
    ids, labels = dataset.ids, dataset.labels
    _same_rows(dataset.name, ids, lambda i: f"{ids[i]}\0{labels[i]}\0{_size(dataset, i)}")
    count, me = processes.count(), processes.index()
    num_readers = count if dataset.num_blocks <= _FEW_BLOCKS else min(count, _READERS)
    blocks = range(dataset.num_blocks)
    mine = [*itertools.chain(*(processes.share(blocks, me + k) for k in range(num_readers)))]
    digests: dict[int, str] = {}
    for found in processes.everyones([mine, dataset.digests(mine)]):
        for block, digest in zip(*found, strict=True):
            if digests.setdefault(block, digest) != digest:
                _same_rows(dataset.name, ids, lambda i: dataset.row_digest(i).hex(), [block])
                processes.refuse(f"{dataset.name}: does not give the same images twice.")
    dataset.__dict__["fingerprint"] = dataset.fingerprint_of([digests[block] for block in blocks])


def agree_on_instructions(data: Instructions) -> None:
    """Raises ValueError unless all processes see the same rows, texts and ids."""

    def row(position: int) -> str:
        others = None if data.others is None else data.others[position]
        texts = [data.prompts[position], data.responses[position], str(others)]
        fields = json.dumps(data.rows[position], sort_keys=True, default=str)
        return "\0".join([str(data.ids[position]), *texts, fields])

    if processes.count() > 1:
        _same_rows(data.name, data.ids, row)


def agree_on_files(folder: Path, patterns: Sequence[str]) -> None:
    """Raises ValueError unless the files of these names are the same for all processes."""
    if processes.count() == 1:
        return
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    with ThreadPoolExecutor() as pool:
        digests = pool.map(artefacts.file_hash, paths)
        names = [path.relative_to(folder).as_posix() for path in paths]
        agree(dict(zip(names, digests, strict=True)), f"{folder}/")


def _same_rows(
    name: str, ids: Any, row: Callable[[int], str], blocks: Sequence[int] | None = None
) -> None:
    """Raises ValueError, naming the first sample that differs, unless all see the same rows.

    Args:
      name: Name of the data set, for the message.
      ids: [n] sample ids.
      row: All that matters of the sample at a position.
      blocks: Only these; None: all.
    """
    agree({"number of samples": len(ids)}, f"{name}: ")

    def rows(block: int) -> list[str]:
        positions = range(block * ROWS_OF_DIGEST, min((block + 1) * ROWS_OF_DIGEST, len(ids)))
        return [_digest(row(position)) for position in positions]

    blocks = range(-(-len(ids) // ROWS_OF_DIGEST)) if blocks is None else blocks
    found = processes.everyones([_digest("".join(rows(block))) for block in blocks])
    for block, *digests in zip(blocks, *found, strict=True):
        if len(set(digests)) > 1:
            first, *others = processes.everyones(rows(block))
            number, place = next(
                (number, place)
                for number, theirs in enumerate(others, start=1)
                for place, digest in enumerate(theirs)
                if digest != first[place]
            )
            names = processes.everyones(str(ids[block * ROWS_OF_DIGEST + place]))
            of = f" ({names[number]!r} there)" if names[number] != names[0] else ""
            processes.refuse(
                f"{name}: sample {names[0]!r} of process 0 is not the same in process {number}{of};"
                " expected the same data in all processes."
            )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _size(dataset: Dataset, position: int) -> int:
    """Returns the bytes of the file that holds the image alone; -1 where there is none."""
    try:
        file = file_of(dataset.images, position)
        return -1 if file is None else os.stat(file).st_size
    except OSError:
        return -1


def _flat(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns nested settings by their dotted names, after a prefix."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        name = f"{prefix}{name}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found
