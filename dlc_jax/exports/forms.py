"""The forms of an export: positions, ids, a manifest, image files and folders, and Parquet."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int64
from PIL import Image

from dlc_jax import expect
from dlc_jax.datasets.files import is_junk, split_in
from dlc_jax.datasets.labels import composed
from dlc_jax.files.image_files import opened
from dlc_jax.files.libraries import pa, pq
from dlc_jax.selection import kept_positions, places_of
from dlc_jax.types import Dataset, Sample, Selection, file_of, labels_fingerprint
from dlc_jax.workspace import artefacts

PARTS = ("kept", "dropped")


class Part(NamedTuple):
    """The kept or the dropped samples.

    Attributes:
      name: `kept` or `dropped`.
      samples: Those samples, with all classes.
      rows: [k] positions of the samples in the scored order, ascending; that is the order of the
        data set unless samples were left out of the scores.
      selection: Selection that kept or dropped them; None where only positions were given.
    """

    name: str
    samples: Dataset
    rows: Int64[np.ndarray, " k"]
    selection: Selection | None


def part_positions(
    dataset: Dataset, kept: Selection | np.ndarray | Sequence[int], part: str, where: str
) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
    """Returns the positions of kept or dropped samples in the scored order and in the data set.

    Samples that were not scored, such as unreadable ones, are neither.

    Args:
      dataset, kept, part: See `export`.
      where: For messages.
    Raises:
      ValueError: an unknown part, `kept` that does not fit the data set, nothing is dropped, or a
        selection that does not know what was scored.
    """
    expect.one_of("export part", part, PARTS)
    rows = kept_positions(dataset, kept)
    scored: np.ndarray | None = dataset.ids
    if isinstance(kept, Selection):
        rows, scored = np.sort(kept.indices), _scored_ids(dataset, kept)
    if part == "dropped":
        if scored is None:
            raise expect.InputError(
                f"{where}: the selection does not know which samples it was made from, and so not "
                "which are dropped; expected one made with select(..., ids=...)."
            )
        rows = np.setdiff1d(np.arange(len(scored)), rows)
        if not len(rows):
            raise expect.InputError(f"{where}: nothing is dropped, so there is nothing to write.")
    if scored is dataset.ids:
        return rows, rows
    if scored is None:
        assert isinstance(kept, Selection)
        wanted = kept.ids[np.argsort(kept.indices)] if kept.ids is not None else None
        return rows, rows if wanted is None else places_of(dataset.name, dataset.ids, wanted)
    return rows, places_of(dataset.name, dataset.ids, scored[rows], part)


def _scored_ids(dataset: Dataset, kept: Selection) -> np.ndarray | None:
    """Returns the ids of what was scored, in that order; None where that cannot be known."""
    if kept.scored_ids is not None:
        return kept.scored_ids
    if kept.labels_fingerprint != labels_fingerprint(dataset.labels):
        return None
    expect.positions("kept.indices", kept.indices, len(dataset))
    in_its_order = kept.ids is None or np.array_equal(dataset.ids[kept.indices], kept.ids)
    return dataset.ids if in_its_order else None


_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def write_positions(part: Part, path: Path) -> None:
    """Writes positions in the scored order, int64, ascending."""
    with artefacts.atomic(path) as file:
        np.save(file, part.rows)


def write_ids(part: Part, path: Path) -> None:
    """Writes an id per line, UTF-8."""
    check_ids_are_lines(part.samples, str(path))
    with artefacts.atomic(path) as file:
        file.writelines(f"{name}\n".encode() for name in part.samples.ids.tolist())


def check_ids_are_lines(samples: Dataset, where: str) -> None:
    """Raises ValueError, naming it, for an id that is empty or holds a line break of any kind."""
    broken = [name for name in samples.ids.tolist() if name.splitlines() != [name]]
    if broken:
        raise expect.InputError(
            f"{where}: id {broken[0]!r} is not one line of text; use form jsonl."
        )


def write_jsonl(part: Part, path: Path) -> None:
    """Writes id, label, class_name and position in the scored order of every sample."""
    samples = part.samples
    with artefacts.atomic(path) as file:
        for name, label, position in zip(
            samples.ids.tolist(), samples.labels.tolist(), part.rows.tolist(), strict=True
        ):
            line = {"id": name, "label": label, "class_name": samples.class_names[label]}
            file.write(json_line({**line, "position": position}))


def json_line(value: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """Returns strict JSON on a line, also for readers to whom U+0085 and U+2028 end one."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=default)
    return f"{text.translate(_LINE_ENDS)}\n".encode()


def write_manifest(part: Part, path: Path) -> None:
    """Writes ids, samples per class, and how they were selected (nulls where that is not known)."""
    settings = (
        *("method", "keep_fraction", "split", "seed", "mode"),
        *("min_per_class", "variant", "allocation", "per_class"),
    )
    chosen = getattr(part.selection, "chosen", None)
    sizes = np.bincount(part.samples.labels, minlength=part.samples.num_classes)
    artefacts.write_json(
        path,
        {
            "dataset": part.samples.name,
            "part": part.name,
            **{name: getattr(part.selection, name, None) for name in settings},
            "chosen": None if chosen is None else chosen._asdict(),
            "num_samples": len(part.samples),
            "num_per_class": dict(zip(part.samples.class_names, sizes.tolist(), strict=True)),
            "ids": part.samples.ids.tolist(),
        },
    )


# What torchvision.datasets.ImageFolder takes for images; it looks at nothing else of a name.
FOLDER_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
)  # fmt: skip
# PIL's names of the formats that have such a suffix.
_SUFFIXES = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "PPM": ".ppm",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "WEBP": ".webp",
}
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def _each(samples: Dataset) -> Iterator[Sample]:
    """Yields the samples; ValueError, naming it, for one whose file cannot be read."""
    for index, name in enumerate(samples.ids.tolist()):
        with expect.refusing(f"{samples.name}: sample {name!r} cannot be read", OSError):
            sample = samples[index]
        yield sample


def check_fit_png(samples: Dataset, where: str) -> None:
    """Raises ValueError, naming the sample, for an array that PNG cannot hold.

    Args:
      samples: Samples, of which only arrays are looked at; sources hold either arrays or files.
      where: For the message.
    """
    for index, name in enumerate(samples.ids.tolist()):
        try:
            image = samples.images[index]
        except OSError:  # a file, and whether it matters is for the decoder to say
            return
        if not isinstance(image, np.ndarray):
            return
        _check_fits_png(image, f"{where}: sample {name!r} of {samples.name}")


def _check_fits_png(image: np.ndarray, where: str) -> None:
    num_channels = image.shape[2] if image.ndim == 3 else 1
    deepest = {"uint8": 4, "uint16": 1}.get(image.dtype.name, 0)  # channels, alpha among them
    if image.ndim not in (2, 3) or image.size == 0 or not 1 <= num_channels <= deepest:
        raise expect.InputError(
            f"{where} is an array of {image.dtype} {image.shape}, which PNG cannot hold; expected "
            "uint8, or uint16 of one channel."
        )


def encoded(sample: Sample) -> bytes:
    """Returns the image's own bytes; arrays as PNG, which loses nothing.

    Raises:
      ValueError: they are no image, or an array that PNG cannot hold.
    """
    image = sample.image
    with _decoding(sample):
        if isinstance(image, np.ndarray):
            _check_fits_png(image, f"sample {sample.id!r}")
            native = image.astype(image.dtype.newbyteorder("="), copy=False)
            return _png(Image.fromarray(native[:, :, 0] if image.shape[2:] == (1,) else native))
        with opened(image):
            return image


def as_file(sample: Sample) -> tuple[bytes, str]:
    """Returns the image as a file of an image folder: its bytes, and their suffix there.

    Formats that have no suffix there (GIF, JPEG 2000, AVIF, ...) become PNG of the same pixels, the
    first frame of several; all others keep their bytes.

    Raises:
      ValueError: it is no image.
    """
    content = encoded(sample)
    with _decoding(sample), opened(content) as image:
        suffix = _SUFFIXES.get(image.format or "")
        return (content, suffix) if suffix else (_png(image), ".png")


def _png(image: Image.Image) -> bytes:
    """Encodes the image in its own mode, or as RGB where PNG has no such mode."""
    if image.mode not in _PNG_MODES:
        image = image.convert("RGB")
        image.info.pop("icc_profile", None)  # describes the colours before conversion
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _decoding(sample: Sample) -> AbstractContextManager[None]:
    """Refuses what is no image: PIL's decoders raise anything from OSError to SyntaxError."""
    problem = f"sample {sample.id!r} is not a readable image"
    return expect.refusing(problem, Exception, shown=expect.first_line, end="")


CLASS_NAMES = "class_names.json"  # beside the folders of the classes
# Bytes of a name, and of a path below the folder of a class; file systems stop at 255 a name.
_LONGEST = 200
# Windows opens devices by these names, whatever their suffix.
_DEVICES = re.compile(r"(con|prn|aux|nul|clock\$|conin\$|conout\$|(com|lpt)[0-9¹²³])", re.I)


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Returns a folder name for each class: its own name where that is possible."""
    names, taken = [], {CLASS_NAMES}
    for class_name in class_names:
        name = _folder(composed(class_name))  # as `folder:` reads it
        own = [name] if len(name.encode()) <= _LONGEST else []
        candidates = itertools.chain(own, _marked(name, "", class_name))
        name = next(some for some in candidates if _folded(some) not in taken)
        taken.add(_folded(name))
        names.append(name)
    return names


class ImagePaths:
    """Paths of images below the folder of their class, no two the same to any file system."""

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def add(self, folder: str, class_name: str, sample_id: str, suffix: str) -> str:
        """Returns a path below the folder of all classes, with `/`.

        Folders and file name are those of the id where they can be, without the folder of the
        class.

        Args:
          folder: The folder of the class.
          class_name: Its name.
          sample_id: Any text; may be a path, and may lead anywhere.
          suffix: What the file name gets where it has none that image folders are read by.
        """
        parts = [part for part in sample_id.split("/") if part not in ("", ".", "..")]
        *folders, name = parts or ["_"]
        if class_name in folders:
            folders.remove(class_name)
        stem, ending = os.path.splitext(plain(name))
        if ending.lower() in FOLDER_SUFFIXES:
            suffix = ending
        else:
            stem += ending
        paths = _paths([folder, *map(_folder, folders)], stem, suffix, sample_id)
        return next(path for path in paths if self._take(path))

    def _take(self, path: str) -> bool:
        """Takes the path, and returns True, if it is free."""
        folded = _folded(path)
        folders = {folded[: match.start()] for match in re.finditer("/", folded)}
        if folded in self._files or folded in self._folders or folders & self._files:
            return False
        self._files.add(folded)
        self._folders |= folders
        return True


def plain(name: str) -> str:
    """Returns a name for a file or folder in which only what is unsafe is replaced.

    That is what leads elsewhere, what one of the usual file systems cannot hold, and what readers
    of folders take for hidden.
    """
    name = "".join("_" if _is_unsafe(char) else char for char in name)
    name = re.sub(r"^\.+|[.\s]+$", lambda found: "_" * len(found[0]), name) or "_"
    return f"_{name}" if _DEVICES.fullmatch(name.partition(".")[0].rstrip()) else name


def _folder(name: str) -> str:
    """Returns a name for a folder that readers of image folders do not pass over."""
    name = plain(name)
    return f"_{name}" if is_junk(name) else name


def _is_unsafe(char: str) -> bool:
    return char in '/\\:*?"<>|' or not (char.isprintable() or unicodedata.category(char) == "Zs")


def _paths(folders: Sequence[str], stem: str, suffix: str, sample_id: str) -> Iterator[str]:
    """Yields ever less of an id's own path, and ever more of its hash."""
    below = "/".join([*folders[1:], f"{stem}{suffix}"])
    if len(below.encode()) <= _LONGEST:
        yield f"{folders[0]}/{below}"
        yield "/".join([*folders, next(_marked(stem, suffix, sample_id))])
    for name in _marked(stem, suffix, sample_id):
        yield f"{folders[0]}/{name}"


def _marked(stem: str, suffix: str, of: str) -> Iterator[str]:
    """Yields names with a hash behind the stem, which is cut to fit."""
    for attempt in itertools.count():
        mark = f"-{hashlib.sha256(f'{attempt} {of}'.encode()).hexdigest()[:8]}{suffix}"
        cut = stem.encode()[: _LONGEST - len(mark.encode())].decode(errors="ignore")
        yield f"{cut}{mark}"


def _folded(path: str) -> str:
    """Returns what is the same for paths that some file system takes for the same."""
    path = unicodedata.normalize("NFD", path).casefold()
    return unicodedata.normalize("NFD", path)


def write_image_folder(part: Part, path: Path) -> None:
    """Writes `<class name>/<id>`, which `folder:` and torchvision's `ImageFolder` read back.

    Where a file system could not hold a name, or tell two apart, it is changed as little as
    possible; if that is a class's, `class_names.json` has the names of the classes by folder.

    Raises:
      ValueError: a sample that cannot be read.
    """
    with artefacts.atomic_folder(path) as root:
        for _, target, content in _targets(part.samples, root):
            target.write_bytes(content)


def write_image_links(part: Part, path: Path) -> None:
    """Writes the same with symbolic links to the images where they are.

    Raises:
      ValueError: see `write_image_folder`; or an image that is not a file of its own.
    """
    check_has_files(part.samples, str(path))
    with artefacts.atomic_folder(path) as root:
        for index, target, _ in _targets(part.samples, root):
            file = file_of(part.samples.images, index)
            assert file is not None  # checked above
            target.symlink_to(file.resolve())


def check_has_files(samples: Dataset, where: str) -> None:
    """Raises ValueError, naming the sample, unless every image is a file of its own.

    Args:
      samples: None of which is read.
      where: For the message.
    """
    for index, name in enumerate(samples.ids.tolist()):
        if file_of(samples.images, index) is None:
            raise expect.InputError(
                f"{where}: sample {name!r} of {samples.name} is no file of "
                "its own to link to; expected a source of files (folder:, csv:, "
                "fgvc_aircraft:). Use form image_folder, which copies."
            )


def _targets(samples: Dataset, root: Path) -> Iterator[tuple[int, Path, bytes]]:
    """Yields where each sample goes, with its place and content; makes the folders."""
    folders = _folders(samples)
    names = {folder: samples.class_names[label] for label, folder in folders.items()}
    if any(folder != name for folder, name in names.items()):
        artefacts.write_json(root / CLASS_NAMES, names)
    paths = ImagePaths()
    for index, sample in enumerate(_each(samples)):
        content, suffix = as_file(sample)
        class_name = samples.class_names[sample.label]
        target = root / paths.add(folders[sample.label], class_name, sample.id, suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        yield index, target, content


def _folders(samples: Dataset) -> dict[int, str]:
    """Returns the folders of the classes that have samples, the same for kept and dropped."""
    all_folders = folder_names(samples.class_names)
    folders = {label: all_folders[label] for label in np.unique(samples.labels).tolist()}
    if all(map(split_in, folders.values())):  # read back, they would be splits
        folders = {label: f"_{folder}" for label, folder in folders.items()}
    return folders


# Written at a time, so that memory does not grow with the selection.
_ROWS, _BYTES = 256, 2**26

Item = TypeVar("Item")


def write_parquet(part: Part, path: Path) -> None:
    """Writes a row per sample: image {bytes, path}, label; class names in the file's metadata."""
    with artefacts.atomic(path) as file:
        _write(part.samples, file)


def write_hub_folder(part: Part, path: Path) -> None:
    """Writes a folder that `datasets.load_dataset` reads as the split `train`."""
    with artefacts.atomic_folder(path) as root:
        (root / "data").mkdir()
        with open(root / "data" / "train-00000-of-00001.parquet", "wb") as file:
            _write(part.samples, file)
        (root / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
            f"    path: data/train-*\n---\n\n{len(part.samples)} samples of "
            f"{expect.markdown_text(part.samples.name)}.\n"
        )


def _write(samples: Dataset, file: IO) -> None:
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(samples.class_names), "_type": "ClassLabel"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"image": image, "label": pa.int64()}, metadata)
    rows: Iterator[dict[str, Any]] = (
        {"image": {"bytes": encoded(sample), "path": sample.id}, "label": sample.label}
        for sample in _each(samples)
    )
    with pq.ParquetWriter(file, schema) as table:
        for group in grouped(rows, lambda row: len(row["image"]["bytes"]), _BYTES, _ROWS):
            table.write_batch(pa.RecordBatch.from_pylist(group, schema=schema))


def grouped(
    items: Iterable[Item], num_bytes: Callable[[Item], int], most_bytes: int, most_items: float
) -> Iterator[list[Item]]:
    """Yields the items in order, as many at a time as these limits allow, at least one."""
    group: list[Item] = []
    total = 0
    for item in items:
        total += num_bytes(item)
        if group and (total > most_bytes or len(group) == most_items):
            yield group
            group, total = [], num_bytes(item)
        group.append(item)
    if group:
        yield group


class Export(NamedTuple):
    """How a form is written, and what its file or folder is called after the part's name.

    Attributes:
      write: Takes the part and where to write; the place is whole or not there at all.
      suffix: Ending of the file name, with its dot; that of a folder's name has none.
      check: Raises ValueError for samples that the form cannot hold; takes the data set and a name
        for the message. Called before scoring.
    """

    write: Callable[[Part, Path], None]
    suffix: str
    check: Callable[[Dataset, str], None] | None = None


EXPORTS: Mapping[str, Export] = {
    "npy": Export(write_positions, ".npy"),
    "ids": Export(write_ids, ".txt", check_ids_are_lines),
    "jsonl": Export(write_jsonl, ".jsonl"),
    "json": Export(write_manifest, ".json"),
    "parquet": Export(write_parquet, ".parquet", check_fit_png),
    "image_folder": Export(write_image_folder, "-images", check_fit_png),
    "image_links": Export(write_image_links, "-links", check_has_files),
    "hf": Export(write_hub_folder, "-hf", check_fit_png),
}
