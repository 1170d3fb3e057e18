"""`tar:` WebDataset shards, read in place: nothing is unpacked."""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from dlc_jax import checks
from dlc_jax.datasets.files import is_junk, matching
from dlc_jax.datasets.labels import encode_labels, integers_or_text, stable_ids
from dlc_jax.image_files import suffixes
from dlc_jax.types import Dataset

_LABEL_KEYS = ("label", "cls", "class", "class_name")


class _Member(NamedTuple):
    """Where a file lies in a shard."""

    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        handle = os.open(self.shard, os.O_RDONLY)
        try:
            content = os.pread(handle, self.size, self.offset)
        finally:
            os.close(handle)
        if len(content) < self.size:
            raise OSError(f"{self.shard}: ends {self.size - len(content)} bytes early")
        return content


@dataclasses.dataclass(frozen=True)
class _Members:
    members: tuple[_Member, ...]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, position: int) -> bytes:
        return self.members[position].read()


def load_tar(where: str) -> Dataset:
    """Loads one shard, a folder of them or a glob, in sorted order.

    A sample is the members that share a name up to the first dot: an image and its label, as
    `.cls` (text) or in a `.json` (`label`, `cls`, `class` or `class_name`). Links, devices and
    folders in a shard are passed over.

    Raises:
      ValueError: nothing there, not an uncompressed tar file, one that is damaged or cut short, a
        sample without image or label.
    """
    source = f"tar:{where}"
    names: list[str] = []
    images: list[_Member] = []
    values: list[Any] = []
    readable, left_out = suffixes(), Counter[str]()
    for shard in matching("tar", where, ".tar"):
        for key, parts in _samples(source, shard).items():
            image = next((member for kind, member in parts.items() if kind in readable), None)
            if image is None:
                raise checks.InputError(
                    f"{source}: {shard.name}: sample {key!r} has no image (found "
                    f"{', '.join(parts)}; expected one of {', '.join(readable)})."
                )
            names.append(key)
            images.append(image)
            values.append(_label(source, shard, key, parts))
            left_out.update(kind for kind in parts if kind not in (*readable, ".cls", ".json"))
    if not images:
        raise checks.InputError(f"{source}: holds no sample.")
    members = _Members(tuple(images))
    labels = encode_labels(integers_or_text(values), None, source)
    return Dataset(
        members,
        labels.ids,
        stable_ids(names, members),
        labels.class_names,
        source,
        labels.table,
        left_out=dict(left_out),
    )


def _samples(source: str, shard: Path) -> dict[str, dict[str, _Member]]:
    """Returns the members of each sample by lower-case suffix (`.jpg`, `.cls`), in order."""
    samples: dict[str, dict[str, _Member]] = {}
    try:
        with tarfile.open(shard, mode="r:") as file:  # "r:" alone: offsets are those of the file
            for member in file:
                if not member.isreg():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if stem and not any(map(is_junk, member.name.split("/"))):
                    key = f"{folder}/{stem}" if folder else stem
                    place = _Member(shard, member.offset_data, member.size)
                    samples.setdefault(key, {})[dot + suffix.lower()] = place
            end = _Member(shard, file.offset, tarfile.BLOCKSIZE).read()
        if any(end):  # tarfile takes a damaged header for the end
            raise OSError(f"damaged or cut short at byte {file.offset}")
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise checks.InputError(
            f"{source}: {shard}: not a readable, uncompressed tar file: {checks.first_line(error)}."
        ) from error
    return samples


def _label(source: str, shard: Path, key: str, parts: dict[str, _Member]) -> Any:
    where = f"{source}: {shard.name}: sample {key!r}"
    try:
        if ".cls" in parts:
            return parts[".cls"].read().decode().strip()
        if ".json" in parts:
            facts = json.loads(parts[".json"].read())
            found = [facts[name] for name in _LABEL_KEYS if name in facts]
            if found:
                return found[0]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise checks.InputError(f"{where}: label cannot be read: {error}.") from error
    raise checks.InputError(
        f"{where} has no label; expected .cls, or .json with {' or '.join(_LABEL_KEYS)} "
        f"(found {', '.join(parts)})."
    )
