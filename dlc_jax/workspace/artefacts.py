"""What a run leaves on disk: names, formats, keys, and writes that are whole or not there at all.

Keys of results are hashes of everything that decides them; the package's version has no part in
them. Each kind of result has a number, which is raised whenever the same settings would give other
bytes; `tests/golden/test_result_numbers.py` notices where they do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import platform
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL
from PIL import features

from dlc_jax import expect
from dlc_jax.files.array_files import npz_headers, read_npz

# used as parts of this module
from dlc_jax.files.json_files import check_shape
from dlc_jax.files.json_files import read_json as read_json
from dlc_jax.files.libraries import pa, pq
from dlc_jax.files.whole_files import atomic as atomic
from dlc_jax.files.whole_files import atomic_folder as atomic_folder
from dlc_jax.files.whole_files import clear_leftovers as clear_leftovers
from dlc_jax.files.whole_files import is_mirrored as is_mirrored
from dlc_jax.files.whole_files import is_temporary as is_temporary
from dlc_jax.files.whole_files import move as move
from dlc_jax.files.whole_files import pull as pull
from dlc_jax.files.whole_files import remove as remove
from dlc_jax.version import __version__

# Result numbers above 1, by kind of result; every other kind has number 1.
RESULT_NUMBERS: dict[str, int] = {
    "losses": 2,  # ties between equal weights, and random draws, in torch's order
    "report": 2,  # intervals over test samples too, and words for all gaps together
    "tuning": 2,  # gaps with intervals that count once what varies with samples and repeats
    # the same; then short responses shared rows; then scores of tokens; then, in half precision, a
    # loop over blocks
    "response losses": 5,
}
# Kinds that can be made again from other results: they are replaced, not set aside.
DERIVED = ("scores", "export", "report", "suspect labels", "near duplicates")
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "pillow",
    "pyarrow",
    "safetensors",
)


def result_number(kind: str) -> int:
    """Returns the result number of a kind of result."""
    return RESULT_NUMBERS.get(kind, 1)


def key_of(kind: str, decisive: Any) -> str:
    """Returns the SHA-256 of what decides a result, and of the number of its kind.

    Args:
      kind: Kind of result.
      decisive: Everything that decides the result, as JSON has it; names in any order.
    """
    return json_hash([kind, result_number(kind), decisive])


def json_hash(value: Any) -> str:
    """Returns the SHA-256 of a value's JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=plain).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Returns NumPy's numbers, which users' loops hand over, as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def machine() -> list[str]:
    """Returns what decides the bytes of unfinished parts, besides their settings."""
    device = jax.devices()[0]
    return [jax.__version__, device.platform, device.device_kind]


def decoder() -> list[str | None]:
    """Returns what decides the pixels of decoded images: the versions of Pillow and of its JPEG."""
    return [PIL.__version__, features.version("jpg")]


@functools.cache
def devices() -> list[str]:
    """Returns platform and kind of every device."""
    return [f"{device.platform} {device.device_kind}" for device in jax.devices()]


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of this package, Python and the libraries that results come from."""
    return {
        "dlc_jax": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
    }


CONFIG = "config.json"
PROVENANCE = "provenance.json"
LOSSES = "scores/losses.npz"
SCORES = "scores/scores.parquet"
TRAINING = "scores/training"
CERTIFICATE = "scores/certificate.json"
PICTURE = "scores/easiest_hardest.png"
SUSPECTS = "scores/suspect_labels.csv"
SUSPECTS_PICTURE = "scores/suspect_labels.png"
NEAR_DUPLICATES = "scores/near_duplicates.csv"
UNFINISHED = "unfinished"
TUNING = "tuning"
SELECTIONS = "selections"
RESULTS = "results.csv"
REPORT = "report"
FINETUNE = "finetune"
EVALUATE = "evaluate"
EXPORTS = "exports"
_LOSSES = {
    "losses": ("f", 2),
    "sparsity": ("f", 1),
    "labels": ("i", 1),
    "ids": ("U", 1),
}
_ROWS = 8192  # written and read at a time, so that memory does not grow with the data set
# Where temporary files may be left. Not inside exported image folders, which are large.
_FOLDERS = (
    "",
    "*",
    "*/*",
    "*/*/*",
    f"{TRAINING}/*/seen",
    "records/**",
    f"{TUNING}/**",
    f"{FINETUNE}/*/*/records/**",
    f"{EXPORTS}/idxs*/*/*/*/*",
)


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredSamples:
    """What `scores/` holds: everything selection needs, without images or encoder."""

    ids: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    scores: dict[str, np.ndarray]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over ids, class names, labels and DLC, which every work directory has."""
        return self.fingerprint_of({"dlc": self.scores["dlc"]})

    @functools.cached_property
    def by_id(self) -> np.ndarray:
        """[n] rows in the order of their ids."""
        return np.argsort(self.ids)

    def score(self, name: str) -> np.ndarray:
        """Returns a column of scores, [n].

        Raises:
          ValueError: it is not there.
        """
        if name not in self.scores:
            raise expect.InputError(
                f"{SCORES}: has no column {name!r}, only {expect.listed(self.scores)}; run the "
                "stage 'score' with the same selection.methods and selection.score first."
            )
        return self.scores[name]

    def fingerprint_of(self, arrays: Mapping[str, np.ndarray]) -> str:
        """SHA-256 over ids, class names, labels and these arrays, [n] or [n, d], as float32."""
        digest = hashlib.sha256("\0".join([*self.ids.tolist(), *self.class_names]).encode())
        digest.update(np.ascontiguousarray(self.labels, np.int32).tobytes())
        for name in sorted(arrays):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(arrays[name], np.float32).tobytes())
        return digest.hexdigest()


def prepare_workdir(workdir: Path, option: str = "--workdir") -> None:
    """Makes the work directory, and clears temporary files of runs that were killed.

    Args:
      workdir: Folder.
      option: Name of the option that gave it, for messages.
    Raises:
      ValueError: it cannot be written to.
    """
    with refusing_to_write(workdir, option):
        pull(workdir)
        with atomic(workdir / ".writable") as file:
            file.write(b"")
        remove(workdir / ".writable")
    for folders in _FOLDERS:
        clear_leftovers(workdir, folders)


def refusing_to_write(place: Path | str, option: str) -> contextlib.AbstractContextManager[None]:
    """Raises ValueError, naming place and option, for errors of the system in here."""
    return expect.refusing(f"{option}: cannot write to {place}", OSError, shown=expect.reason)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON; numbers that are not finite, which JSON has no form of, as null."""
    with atomic(path, "w") as file:
        json.dump(finite(value), file, indent=2, default=plain, allow_nan=False)
        file.write("\n")


def read_bytes(path: Path) -> bytes:
    """Returns the file's content, nothing if there is no such file."""
    return path.read_bytes() if path.is_file() else b""


def finite(value: Any, otherwise: Callable[[float], Any] = lambda _: None) -> Any:
    """Returns the value with None, or other values, for numbers in it that are NaN or infinite."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else otherwise(value)
    if isinstance(value, Mapping):
        return {key: finite(some, otherwise) for key, some in value.items()}
    return (
        [finite(some, otherwise) for some in value] if isinstance(value, (list, tuple)) else value
    )


def write_losses(workdir: Path, **arrays: np.ndarray) -> None:
    """Writes `scores/losses.npz`, as `read_losses` reads it; readable without pickle."""
    with atomic(workdir / LOSSES) as file:
        np.savez(file, allow_pickle=False, **arrays)


def write_scores(workdir: Path, samples: ScoredSamples) -> None:
    """Writes `scores/scores.parquet`: id, label, class_name, one column per scoring method."""
    schema = pa.schema(
        [("id", pa.string()), ("label", pa.int32()), ("class_name", pa.string())]
        + [(name, pa.float32()) for name in samples.scores],
        metadata={"class_names": json.dumps(samples.class_names)},
    )
    names = np.asarray(samples.class_names, dtype=object)
    with atomic(workdir / SCORES) as file, pq.ParquetWriter(file, schema) as table:
        for start in range(0, len(samples.ids), _ROWS):
            some = slice(start, start + _ROWS)
            labels = samples.labels[some]
            ids = samples.ids[some].tolist()
            columns = {"id": ids, "label": labels, "class_name": names[labels]}
            columns |= {name: values[some] for name, values in samples.scores.items()}
            table.write_batch(pa.record_batch(columns, schema=schema))


def read_scores(workdir: Path) -> ScoredSamples:
    """Reads `scores/scores.parquet`.

    Raises:
      ValueError: it is not there or not what `write_scores` writes.
    """
    path = _made_by_score(workdir / SCORES, "in this work directory")
    kinds = (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError)
    with (
        expect.refusing(f"{path}: not a table of scores", *kinds, shown=expect.first_line),
        open(path, "rb") as file,  # given a name, Arrow would expand a ~ in it
    ):
        table = pq.ParquetFile(file)
        class_names = json.loads(table.schema_arrow.metadata[b"class_names"])
        _check_columns(path, table.schema_arrow, class_names)
        wanted = [name for name in table.schema_arrow.names if name != "class_name"]
        parts: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
        for batch in table.iter_batches(_ROWS, columns=wanted, use_threads=False):
            for name in wanted:
                if batch[name].null_count:
                    raise ValueError(f"column {name} lacks values")
                part = batch[name].to_numpy(zero_copy_only=False)
                parts[name].append(part.astype(np.str_) if name == "id" else part.copy())
        columns = {name: np.concatenate(parts[name]) for name in wanted}
        ids, labels = columns.pop("id"), columns.pop("label")
    expect.dataset_is_consistent(str(path), len(labels), labels, ids, class_names)
    return ScoredSamples(ids, labels, tuple(class_names), columns)


def _made_by_score(path: Path, how: str) -> Path:
    """Returns the path; ValueError if there is no such file."""
    if not path.exists():
        raise expect.InputError(f"{path}: not there; run the stage 'score' {how} first.")
    return path


def _check_columns(path: Path, schema: pa.Schema, class_names: Any) -> None:
    """Raises ValueError unless columns have the types that `write_scores` gives them."""
    check_shape(class_names, [str], path, "class_names")
    known = {"id": pa.string(), "label": pa.int32(), "class_name": pa.string()}
    for name in dict.fromkeys([*known, "dlc", *schema.names]):
        kind, expected = schema.field(name).type, known.get(name, pa.float32())
        if kind != expected:
            raise expect.InputError(f"{path}: column {name} is {kind}, expected {expected}.")


def read_array(workdir: Path, name: str, key: str, samples: ScoredSamples) -> np.ndarray:
    """Reads what a stage left of every sample, [n, d].

    Raises:
      ValueError: it is not there, cannot be read, or is of other samples.
    """
    path = _made_by_score(workdir / name, "with the same selection.methods")
    arrays = read_npz(path, {key: ("f", 2), "ids": ("U", 1)})
    if not np.array_equal(arrays["ids"], samples.ids) or len(arrays[key]) != len(samples.ids):
        raise expect.InputError(
            f"{path}: is of other samples than {SCORES}; run the stage 'score' again."
        )
    return arrays[key]


def read_losses(workdir: Path) -> dict[str, np.ndarray]:
    """Reads `scores/losses.npz`: losses [m, n], sparsity [m], labels [n] and ids [n].

    Of images also nearest [m, n], unless an earlier version wrote them.

    Raises:
      ValueError: it is not there, cannot be read, or its arrays do not fit each other.
    """
    path = workdir / LOSSES
    has_nearest = "nearest" in npz_headers(path)
    arrays = read_npz(path, _LOSSES | ({"nearest": ("i", 2)} if has_nearest else {}))
    num_probes, num_samples = arrays["losses"].shape
    for name, length in (("sparsity", num_probes), ("labels", num_samples), ("ids", num_samples)):
        if len(arrays[name]) != length:
            raise expect.InputError(
                f"{path}: {name} has {len(arrays[name])} values, expected {length}, as losses "
                f"{arrays['losses'].shape} have."
            )
    if has_nearest and arrays["nearest"].shape != arrays["losses"].shape:
        raise expect.InputError(
            f"{path}: nearest has shape {arrays['nearest'].shape}, expected "
            f"{arrays['losses'].shape}, as losses have."
        )
    expect.losses_are_finite(arrays["losses"], arrays["ids"])
    return arrays


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def names_below(folder: Path | None) -> list[str]:
    """Returns the files in a folder, at any depth; none if there is no folder."""
    found = [] if folder is None else sorted(folder.rglob("*"))
    names = [path.relative_to(folder) for path in found if folder and path.is_file()]
    return [name.as_posix() for name in names if not is_temporary(name)]


def hashes_below(folder: Path | None, names: Collection[str] | None = None) -> dict[str, str]:
    """Returns the SHA-256 of the files in a folder, or of those of `names` that are there."""
    if folder is None:
        return {}
    found = names_below(folder)
    return {name: file_hash(folder / name) for name in found if names is None or name in names}


def difference(
    expected: Mapping[str, Any], found: Mapping[str, Any], between: str = " "
) -> str | None:
    """Returns a phrase for the first file whose SHA-256 is not the expected one, None for none.

    Args:
      expected, found: SHA-256 by name.
      between: Text between the name and what is wrong with it.
    """
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name}{between}is missing"
        if name not in expected:
            return f"{name}{between}does not belong there"
        if expected[name] != found[name]:
            return f"{name}{between}does not have the content that was written (SHA-256 differs)"
    return None
