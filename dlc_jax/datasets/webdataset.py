"""`tar:` WebDataset shards, read in place: nothing is unpacked."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from dlc_jax import expect
from dlc_jax.datasets.files import LazyImages, is_junk, matching
from dlc_jax.datasets.labels import Columns, integers_or_text, labelled
from dlc_jax.files.image_files import suffixes
from dlc_jax.types import Dataset

_LABEL_KEYS = ("label", "cls", "class", "class_name")


class _Member(NamedTuple):
    """Where a file lies in a shard."""

    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.shard, "rb") as file:
            content = os.pread(file.fileno(), self.size, self.offset)
        if len(content) < self.size:
            raise OSError(f"{self.shard}: ends {self.size - len(content)} bytes early")
        return content


def load_tar(where: str, columns: Columns) -> Dataset:
    """Loads one shard, a folder of them or a glob, in sorted order.

    A sample is the members that share a name up to the first dot: an image and its label, as
    `.cls` (text) or in a `.json` (`label`, `cls`, `class` or `class_name`). Of `columns`, `image`
    is the suffix of the images, `label` a key of the `.json`. Links, devices and folders in a shard
    are passed over.

    Raises:
      ValueError: nothing there, not an uncompressed tar file, one that is damaged or cut short, a
        sample without image or label, with several images, or with a member that occurs twice.
    """
    source = f"tar:{where}"
    names: list[str] = []
    images: list[_Member] = []
    values: list[Any] = []
    readable, left_out = suffixes(), Counter[str]()
    for shard in matching("tar", where):
        for key, parts in _samples(source, shard).items():
            place = f"{source}: {shard.name}: sample {key!r}"
            names.append(key)
            images.append(_image(place, parts, columns.image))
            values.append(_label(place, parts, columns))
            left_out.update(kind for kind in parts if kind not in (*readable, ".cls", ".json"))
    members = LazyImages(images, _Member.read)
    return labelled(members, integers_or_text(values), names, source, left_out=dict(left_out))


def _samples(source: str, shard: Path) -> dict[str, dict[str, _Member]]:
    """Returns the members of each sample by lower-case suffix (`.jpg`, `.cls`), in order."""
    samples: dict[str, dict[str, _Member]] = {}
    problem = f"{source}: {shard}: not a readable, uncompressed tar file"
    kinds = tarfile.TarError, OSError, ValueError, EOFError
    with (
        expect.refusing(problem, *kinds, shown=expect.first_line),
        tarfile.open(shard, mode="r:") as file,  # "r:" alone: offsets are those of the file
    ):
        for member in file:
            folder, _, name = member.name.rpartition("/")
            stem, dot, suffix = name.partition(".")
            if not member.isreg() or not stem or any(map(is_junk, member.name.split("/"))):
                continue
            key, kind = f"{folder}/{stem}" if folder else stem, f"{dot}{suffix}".lower()
            parts = samples.setdefault(key, {})
            if kind in parts:
                raise expect.InputError(
                    f"{source}: {shard.name}: sample {key!r} has more than one member "
                    f"{kind!r} (again {member.name!r}); expected one."
                )
            parts[kind] = _Member(shard, member.offset_data, member.size)
        # tarfile takes a damaged header for the end
        if any(_Member(shard, file.offset, tarfile.BLOCKSIZE).read()):
            raise OSError(f"damaged or cut short at byte {file.offset}")
    return samples


def _image(where: str, parts: dict[str, _Member], wanted: str | None) -> _Member:
    if wanted is not None:
        wanted = f".{wanted.lower().removeprefix('.')}"
    found = list(parts) if wanted else [kind for kind in parts if kind in suffixes()]
    if not found:
        raise expect.InputError(
            f"{where} has no image (found {expect.listed(parts)}; expected one of "
            f"{', '.join(suffixes())})."
        )
    suffix = Columns(image=wanted)
    return parts[suffix.find(where, "image", found, (), declared=found, noun="member")]


def _label(where: str, parts: dict[str, _Member], columns: Columns) -> Any:
    wanted = columns.label
    kinds = OSError, ValueError, TypeError, RecursionError
    with expect.refusing(f"{where}: label cannot be read", *kinds):
        if ".cls" in parts and (wanted is None or (wanted == "cls" and ".json" not in parts)):
            return parts[".cls"].read().decode("utf-8-sig").strip()
        if ".json" in parts:
            facts = json.loads(parts[".json"].read())
            if isinstance(facts, dict) and (wanted or any(key in facts for key in _LABEL_KEYS)):
                return facts[columns.find(where, "label", list(facts), _LABEL_KEYS, noun="key")]
    expected = f".cls, or .json with {' or '.join(_LABEL_KEYS)}"
    if wanted:
        expected = f".json with {wanted!r}"
    raise expect.InputError(
        f"{where} has no label; expected {expected} (found {expect.listed(parts)})."
    )
